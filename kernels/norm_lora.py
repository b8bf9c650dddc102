"""RMSNorm fused with the LoRA branches of the projections that follow it.

    forward    h = x + delta,  y = h r w,  t = s (m*y) A^T              in one pass over x and delta
    backward   g = w * (dy + m*(ds A)),   dx = r g - c h + dh,   c_t = r^3 / D sum_k g_tk h_tk
               dA = ds^T (m*y)                                    y from h and r, so it is not saved

Where delta still lacks its own branch's part (Late), that is added to it on the way in, at no cost
in memory. dy is the frozen product's gradient; without a mask the library product has added ds A to
it (augmented.py), with one it is added here, and the mask is drawn once for it and for dA. The row
sums c come first, because a program of the second kernel owns a block of columns: so dA is summed
over many rows in registers, and few parts of it go through memory. The branch's share of a row sum
needs no columns: sum_k y_k m_k (ds A)_k = ds . t / s. And D c / r^2 is also what the projection
gave times its gradient, (W y + B t) . dz, so whoever makes dz may hand c over: a pass less runs.

Shapes   T = packed tokens, D = model width, R = padded ranks, P = row splits, L = ranks of delta's
         branch.
Numerics Loads and stores in the input dtype, arithmetic and sums in float32; h and y are rounded
         before they are used, so that forward and backward see the same numbers.
Bound    Memory: forward 4*T*D elements (2*T*D without delta), read once more from cache; backward
         reads 2*T*D for the sums, unless they are known, and moves 4*T*D; parts of dA 4*P*R*D
         bytes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels.dispatch import INTERPRETED, cdiv, dot, jit, launch, next_power_of_2, tl
from bioinstruct.kernels.dropout import keep_lanes
from bioinstruct.kernels.rmsnorm import residual
from bioinstruct.kernels.rows import with_dense_rows, with_room
from bioinstruct.kernels.skinny import (
    Mask,
    add_t,
    keep_scale,
    mask_arguments,
    rank_block,
    row_split,
)

# ---- kernels -----------------------------------------------------------------------------------


@jit
def _summed(
    x_ptr, delta_ptr, s, b_ptr, t, d, T, D, L, b_stride,
    ADD: tl.constexpr, LATE: tl.constexpr, UP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """x, x + delta, or x + delta + s B^T, rounded to x's dtype."""
    place, mask = t * D + d[None, :], (t < T) & (d[None, :] < D)
    if LATE:
        rank = tl.arange(0, BLOCK_L)[:, None]
        b = tl.load(
            b_ptr + d[None, :] * b_stride + rank, mask=(rank < L) & (d[None, :] < D), other=0.0
        )
        delta = tl.load(delta_ptr + place, mask=mask, other=0.0).to(tl.float32)
        delta = dot(s, b, delta, UP)
        x = tl.load(x_ptr + place, mask=mask, other=0.0)
        h = (x.to(tl.float32) + delta).to(x_ptr.dtype.element_ty)
    else:
        h = residual(x_ptr, delta_ptr, place, mask, ADD)
    return h


@jit(do_not_specialize=["seed", "site", "q"])
def _norm_t(
    x_ptr, delta_ptr, w_ptr, a_ptr, s_ptr, b_ptr, h_ptr, y_ptr, t_ptr, r_ptr, positions_ptr,
    draws_ptr, T, D, R, L, y_stride, a_stride, s_stride, b_stride, eps, scale, seed, site, q,
    ADD: tl.constexpr, LATE: tl.constexpr, DROP: tl.constexpr, UP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    rank = tl.arange(0, BLOCK_R)[None, :]
    narrow = y_ptr.dtype.element_ty
    late = tl.arange(0, BLOCK_L)[None, :]
    s = tl.load(s_ptr + t * s_stride + late, mask=LATE & (t < T) & (late < L), other=0.0)
    squares = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h = _summed(
            x_ptr, delta_ptr, s, b_ptr, t, d, T, D, L, b_stride, ADD, LATE, UP,
            BLOCK_T, BLOCK_D, BLOCK_L,
        )  # fmt: skip
        squares += h.to(tl.float32) * h.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(squares, axis=1)[:, None] / D + eps)
    tl.store(r_ptr + t, r, mask=t < T)
    acc = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = (t < T) & (d[None, :] < D)
        # summed once more rather than read back: other threads may have written it
        h = _summed(
            x_ptr, delta_ptr, s, b_ptr, t, d, T, D, L, b_stride, ADD, LATE, UP,
            BLOCK_T, BLOCK_D, BLOCK_L,
        )  # fmt: skip
        if ADD:
            tl.store(h_ptr + t * D + d[None, :], h, mask=mask)
        w = tl.load(w_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        y = (h.to(tl.float32) * r * w).to(narrow)
        tl.store(y_ptr + t * y_stride + d[None, :], y, mask=mask)
        acc = add_t(
            acc, y, a_ptr, a_stride, positions_ptr, draws_ptr, seed, site, q, t, T, start, D, R,
            DROP, UP, BLOCK_D, BLOCK_R,
        )  # fmt: skip
    out = (acc * scale).to(narrow)
    mask = (t < T) & (rank < R)
    tl.store(t_ptr + t * R + rank, out, mask=mask)
    tl.store(y_ptr + t * y_stride + D + rank, out, mask=mask)


@jit
def _norm_sums(
    dy_ptr, h_ptr, w_ptr, r_ptr, ds_ptr, t_ptr, c_ptr, D, R, dy_stride, ds_stride, unscale,
    DROP: tl.constexpr, BLOCK_D: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    r = tl.load(r_ptr + t)
    products = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        dy = tl.load(dy_ptr + t * dy_stride + d, mask=d < D, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + t * D + d, mask=d < D, other=0.0).to(tl.float32)
        products += dy * h * tl.load(w_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    total = tl.sum(products, axis=0)
    if DROP:
        rank = tl.arange(0, RANKS)
        ds = tl.load(ds_ptr + t * ds_stride + rank, mask=rank < R, other=0.0).to(tl.float32)
        s = tl.load(t_ptr + t * R + rank, mask=rank < R, other=0.0).to(tl.float32)
        total += tl.sum(ds * s, axis=0) * unscale / r
    tl.store(c_ptr + t, r * r * r * total / D)


@jit(do_not_specialize=["seed", "site", "q"])
def _norm_bwd_da(
    dy_ptr, h_ptr, w_ptr, r_ptr, c_ptr, ds_ptr, a_ptr, dh_ptr, dx_ptr, da_ptr,
    positions_ptr, draws_ptr, T, D, R, dy_stride, ds_stride, a_stride, dh_stride, dx_stride, ROWS,
    keep_scale, seed, site, q,
    ADD: tl.constexpr, DROP: tl.constexpr, UP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # program (d, p) owns BLOCK_D columns and ROWS rows: their dx, and part p of the columns' dA
    p = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_D
    d = (first + tl.arange(0, BLOCK_D))[None, :]
    rank = tl.arange(0, BLOCK_R)
    narrow = dx_ptr.dtype.element_ty
    w = tl.load(w_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    a_mask = (rank[:, None] < R) & (d < D)
    if DROP:
        a = tl.load(a_ptr + rank[:, None] * a_stride + d, mask=a_mask, other=0.0)
    da = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for start in range(p * ROWS, tl.minimum((p + 1) * ROWS, T), BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T))[:, None]
        mask = (t < T) & (d < D)
        dy = tl.load(dy_ptr + t * dy_stride + d, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + t * D + d, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + t, mask=t < T, other=0.0)
        c = tl.load(c_ptr + t, mask=t < T, other=0.0)
        ds = tl.load(
            ds_ptr + t * ds_stride + rank[None, :], mask=(t < T) & (rank[None, :] < R), other=0.0
        )
        y = (h * r * w).to(narrow)
        if DROP:
            positions = tl.load(positions_ptr + t, mask=t < T, other=0)
            draws = tl.load(draws_ptr + t, mask=t < T, other=0)
            keep = keep_lanes(seed, site, positions, draws, first // 8, q, BLOCK_D // 8)
            back = dot(ds, a, tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32), UP)
            dy += tl.where(keep, back, 0.0) * keep_scale
            y = tl.where(keep, y, 0.0).to(narrow)
        dx = r * (dy * w) - c * h
        if ADD:
            dx += tl.load(dh_ptr + t * dh_stride + d, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + t * dx_stride + d, dx.to(narrow), mask=mask)
        da = dot(tl.trans(ds), y, da, UP)
    tl.store(da_ptr + (p * R + rank[:, None]) * D + d, da, mask=a_mask)


# ---- launches ----------------------------------------------------------------------------------


class NormedT(NamedTuple):
    """What the forward kernel wrote."""

    h_TD: Tensor
    """What was normed: x itself, or its sum with delta."""
    y_TD: Tensor
    """Its norm; t stands in the room behind its rows."""
    r_T: Tensor
    """Reciprocal root mean squares, float32."""
    t_TR: Tensor
    """Once more, compactly, for the backward pass."""


class Late(NamedTuple):
    """What the branch of the linear that made delta adds to it, which delta does not hold yet."""

    t_TL: Tensor
    """Rows may be strided, as b's."""
    b_DL: Tensor


def _forward_tiles(R: int, *, late: bool) -> dict[str, int]:
    """The rank's tile, warps and stages: what was found to spill nowhere."""
    tiles = rank_block(R, 32 if late else 64)
    return {**tiles, "num_stages": 1 if late and R > 16 else 2}


def norm_with_t(
    x_TD: Tensor,
    delta_TD: Tensor | None,
    w_D: Tensor,
    eps: float,
    a_RD: Tensor,
    mask: Mask,
    late: Late | None = None,
) -> NormedT:
    """Launch the forward kernel.

    Args:
        x_TD: (T, D) residual stream.
        delta_TD: (T, D) what is added to it, or None.
        w_D: (D,) gain.
        eps: added to the mean square.
        a_RD: (R, D) stacked A in x's dtype, R a multiple of 8; rows may be strided.
        mask: of the branches' input.
        late: what delta lacks; at most MAX_RANK ranks.
    """
    (T, D), R = x_TD.shape, len(a_RD)
    x_TD, add = x_TD.contiguous(), delta_TD is not None
    delta = x_TD if delta_TD is None else delta_TD.contiguous()
    s_TL, b_DL = (x_TD[:, :0], x_TD[:, :0]) if late is None else late
    h_TD = torch.empty_like(x_TD) if add else x_TD
    y_TD, t_TR = with_room(x_TD, (T, D), R), x_TD.new_empty(T, R)
    r_T = x_TD.new_empty(T, dtype=torch.float32)
    positions, draws, *numbers = mask_arguments(mask.dropout, mask.site, x_TD)
    launch(
        _norm_t, (cdiv(T, 32),), x_TD, delta, w_D, a_RD, s_TL, b_DL, h_TD, y_TD, t_TR, r_T,
        positions, draws, T, D, R, s_TL.shape[1], y_TD.stride(0), a_RD.stride(0), s_TL.stride(0),
        b_DL.stride(0), eps, mask.scale * keep_scale(mask.dropout), *numbers,
        ADD=add, LATE=late is not None, DROP=mask.dropout is not None, UP=INTERPRETED,
        BLOCK_T=32, BLOCK_D=128, BLOCK_L=max(16, next_power_of_2(s_TL.shape[1])),
        **_forward_tiles(R, late=late is not None),
    )  # fmt: skip
    return NormedT(h_TD, y_TD, r_T, t_TR)


def norm_backward_with_da(
    dy_TD: Tensor,
    normed: tuple[Tensor, Tensor, Tensor],
    branch: tuple[Tensor, Tensor, Tensor],
    mask: Mask,
    dh_TD: Tensor | None,
    room: int = 0,
    c_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernels.

    Args:
        dy_TD: (T, D) gradient of the norm by the frozen product; the branches' where there is no
            mask.
        normed: h_TD, its r_T and the gain.
        branch: ds_TR and t_TR of the same padded ranks, and the stacked A; rows may be strided but
            for t's.
        mask: of the branches' input.
        dh_TD: (T, D) gradient that reaches h past the norm, or None.
        room: columns to leave free behind the rows of dx.
        c_T: the row sums, float32, where they are known.

    Returns:
        dx, and (P, R, D) float32 parts of dA without the mask's scale.
    """
    (h_TD, r_T, w_D), (ds_TR, t_TR, a_RD) = normed, branch
    (T, D), R = h_TD.shape, ds_TR.shape[1]
    dy_TD = with_dense_rows(dy_TD)
    dh = dy_TD if dh_TD is None else with_dense_rows(dh_TD)
    drop, dx_TD = mask.dropout is not None, with_room(h_TD, (T, D), room)
    if c_T is None:
        c_T = torch.empty_like(r_T)
        launch(
            _norm_sums, (T,), dy_TD, h_TD, w_D, r_T, ds_TR, t_TR, c_T, D, R, dy_TD.stride(0),
            ds_TR.stride(0), 1 / mask.scale, DROP=drop, BLOCK_D=min(2048, next_power_of_2(D)),
            RANKS=next_power_of_2(R), num_warps=8,
        )  # fmt: skip
    # wider blocks of a masked rank above 32 spill
    block_t, block_d = 32, 32 if drop and R > 32 else 64
    splits, rows = row_split(T, cdiv(D, block_d), block_t)
    parts = h_TD.new_empty(splits, R, D, dtype=torch.float32)
    positions, draws, *numbers = mask_arguments(mask.dropout, mask.site, h_TD)
    launch(
        _norm_bwd_da, (cdiv(D, block_d), splits), dy_TD, h_TD, w_D, r_T, c_T, ds_TR, a_RD, dh,
        dx_TD, parts, positions, draws, T, D, R, dy_TD.stride(0), ds_TR.stride(0), a_RD.stride(0),
        dh.stride(0), dx_TD.stride(0), rows, keep_scale(mask.dropout), *numbers,
        ADD=dh_TD is not None, DROP=drop, UP=INTERPRETED, BLOCK_T=block_t, BLOCK_D=block_d,
        **rank_block(R), num_stages=2,
    )  # fmt: skip
    return dx_TD, parts
