"""SwiGLU fused with the LoRA branches of the projections around it.

    forward    h = silu(gate) * up,  t = s (m*h) A^T           A of down; in one pass over gate and up
    backward   dh += m*(ds A)                          with a mask; without, dh holds the branch's part
               dgate = dh up silu'(gate),  dup = dh silu(gate)
               ds_gate = s dgate B_gate,  dB_gate = dgate^T t_gate,  and up's alike
               dA = ds^T (m*h)                              h from gate and up again: it is not saved

A program of the backward kernel owns a block of columns and several rows, so that dB and dA are
summed in registers. It stops at MAX_RANK, above which its tiles would spill.

Shapes   T = packed tokens, F = feed-forward width, R = padded ranks of down, C = column blocks,
         P = row splits.
Numerics Loads and stores in the input dtype, arithmetic and sums in float32; dgate, dup and h are
         rounded before the branches' products, as the separate passes see them.
Bound    Memory: forward moves 3*T*F elements, backward 5*T*F; the parts are 8*R*C*T bytes of ds and
         12*R*P*F of dA and dB.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels.dispatch import INTERPRETED, cdiv, dot, jit, launch, tl
from bioinstruct.kernels.dropout import keep_lanes
from bioinstruct.kernels.rows import with_room
from bioinstruct.kernels.skinny import (
    Mask,
    keep_scale,
    mask_arguments,
    masked,
    rank_block,
    row_split,
)

MAX_RANK = 16

# ---- kernels -----------------------------------------------------------------------------------


@jit(do_not_specialize=["seed", "site", "q"])
def _swiglu_t(
    gate_up_ptr, a_ptr, h_ptr, t_ptr, positions_ptr, draws_ptr,
    T, F, R, h_stride, a_stride, scale, seed, site, q,
    DROP: tl.constexpr, UP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    rank = tl.arange(0, BLOCK_R)[None, :]
    narrow = h_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        mask = (t < T) & (f[None, :] < F)
        place = gate_up_ptr + t * 2 * F + f[None, :]
        gate = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(place + F, mask=mask, other=0.0).to(tl.float32)
        h = (gate * tl.sigmoid(gate) * up).to(narrow)
        tl.store(h_ptr + t * h_stride + f[None, :], h, mask=mask)
        if DROP:
            h = masked(
                h, positions_ptr, draws_ptr, seed, site, t, T, start // 8, q, BLOCK_F // 8
            ).to(narrow)
        a = tl.load(
            a_ptr + rank * a_stride + f[:, None],
            mask=(rank < R) & (f[:, None] < F),
            other=0.0,
        )
        acc = dot(h, a, acc, UP)
    out = (acc * scale).to(narrow)
    mask = (t < T) & (rank < R)
    tl.store(t_ptr + t * R + rank, out, mask=mask)
    tl.store(h_ptr + t * h_stride + F + rank, out, mask=mask)


@jit(do_not_specialize=["seed", "site", "q"])
def _swiglu_bwd_lora(
    dh_ptr, gate_up_ptr, ds_ptr, a_ptr, b_ptr, t_ptr, dgate_up_ptr, ds_parts, db_parts, da_parts,
    positions_ptr, draws_ptr,
    T, F, R, GATE, UPS, ds_stride, a_stride, b_stride, t_stride, dgate_up_stride, ROWS,
    keep_scale, seed, site, q,
    DROP: tl.constexpr, UP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # program (c, p) owns BLOCK_F columns and ROWS rows; GATE and UPS are the two branches' ranks
    c, p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_F
    f = first + tl.arange(0, BLOCK_F)
    rank = tl.arange(0, BLOCK_R)[None, :]
    narrow = dgate_up_ptr.dtype.element_ty
    g_mask, u_mask = (f[:, None] < F) & (rank < GATE), (f[:, None] < F) & (rank < UPS)
    b_gate = tl.load(b_ptr + f[:, None] * b_stride + rank, mask=g_mask, other=0.0)
    b_up = tl.load(b_ptr + (F + f[:, None]) * b_stride + GATE + rank, mask=u_mask, other=0.0)
    column = tl.arange(0, BLOCK_R)[:, None]
    a_mask = (column < R) & (f[None, :] < F)
    if DROP:
        a = tl.load(a_ptr + column * a_stride + f[None, :], mask=a_mask, other=0.0)
    db_gate = tl.zeros((BLOCK_F, BLOCK_R), dtype=tl.float32)
    db_up = tl.zeros((BLOCK_F, BLOCK_R), dtype=tl.float32)
    da = tl.zeros((BLOCK_R, BLOCK_F), dtype=tl.float32)
    zero = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for start in range(p * ROWS, tl.minimum((p + 1) * ROWS, T), BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T))[:, None]
        mask = (t < T) & (f[None, :] < F)
        dh = tl.load(dh_ptr + t * F + f[None, :], mask=mask, other=0.0).to(tl.float32)
        ds = tl.load(ds_ptr + t * ds_stride + rank, mask=(t < T) & (rank < R), other=0.0)
        if DROP:
            positions = tl.load(positions_ptr + t, mask=t < T, other=0)
            draws = tl.load(draws_ptr + t, mask=t < T, other=0)
            keep = keep_lanes(seed, site, positions, draws, first // 8, q, BLOCK_F // 8)
            back = dot(ds, a, tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32), UP)
            dh += tl.where(keep, back, 0.0) * keep_scale
        place = gate_up_ptr + t * 2 * F + f[None, :]
        gate = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(place + F, mask=mask, other=0.0).to(tl.float32)
        s = tl.sigmoid(gate)
        silu = gate * s
        h = (silu * up).to(narrow)
        if DROP:
            h = tl.where(keep, h, 0.0).to(narrow)
        da = dot(tl.trans(ds), h, da, UP)
        # silu' = s + silu (1 - s)
        dgate = (dh * up * (s + silu * (1.0 - s))).to(narrow)
        out = dgate_up_ptr + t * dgate_up_stride + f[None, :]
        part = ds_parts + (c * T + t) * (GATE + UPS) + rank
        tl.store(out, dgate, mask=mask)
        tl.store(part, dot(dgate, b_gate, zero, UP), mask=(t < T) & (rank < GATE))
        t_gate = tl.load(t_ptr + t * t_stride + rank, mask=(t < T) & (rank < GATE), other=0.0)
        db_gate = dot(tl.trans(dgate), t_gate, db_gate, UP)
        dup = (dh * silu).to(narrow)
        tl.store(out + F, dup, mask=mask)
        tl.store(part + GATE, dot(dup, b_up, zero, UP), mask=(t < T) & (rank < UPS))
        t_up = tl.load(t_ptr + t * t_stride + GATE + rank, mask=(t < T) & (rank < UPS), other=0.0)
        db_up = dot(tl.trans(dup), t_up, db_up, UP)
    db_gate_ptr = db_parts + p * F * (GATE + UPS) + f[:, None] * GATE + rank
    tl.store(db_gate_ptr, db_gate, mask=g_mask)
    db_up_ptr = db_parts + p * F * (GATE + UPS) + F * GATE + f[:, None] * UPS + rank
    tl.store(db_up_ptr, db_up, mask=u_mask)
    tl.store(da_parts + (p * R + column) * F + f[None, :], da, mask=a_mask)


# ---- launches ----------------------------------------------------------------------------------


def swiglu_with_t(gate_up_T2F: Tensor, a_RF: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel.

    Args:
        gate_up_T2F: (T, 2F) contiguous, gate first.
        a_RF: (R, F) stacked A in the same dtype, R a multiple of 8; rows may be strided.
        mask: of the branch's input.

    Returns:
        h with t in the room behind its rows, and t once more, compactly.
    """
    (T, F), R = (len(gate_up_T2F), gate_up_T2F.shape[1] // 2), len(a_RF)
    h_TF, t_TR = with_room(gate_up_T2F, (T, F), R), gate_up_T2F.new_empty(T, R)
    positions, draws, *numbers = mask_arguments(mask.dropout, mask.site, gate_up_T2F)
    launch(
        _swiglu_t, (cdiv(T, 32),), gate_up_T2F, a_RF, h_TF, t_TR, positions, draws,
        T, F, R, h_TF.stride(0), a_RF.stride(0), mask.scale * keep_scale(mask.dropout), *numbers,
        DROP=mask.dropout is not None, UP=INTERPRETED, BLOCK_T=32, BLOCK_F=128,
        **rank_block(R, 128), num_stages=2,
    )  # fmt: skip
    return h_TF, t_TR


class GateGradients(NamedTuple):
    """What the backward kernel wrote; parts are float32 and to be added over their first axis."""

    dgate_up_T2F: Tensor
    ds_CTR: Tensor
    """Of gate and up, without the scale of the branches."""
    db_gate_PFR: Tensor
    db_up_PFR: Tensor
    da_PRF: Tensor
    """Of down, without the mask's scale."""


def swiglu_backward_with_lora(
    dh_TF: Tensor,
    gate_up_T2F: Tensor,
    down: tuple[Tensor, Tensor],
    above: tuple[Tensor, Tensor, tuple[int, int]],
    mask: Mask,
    room: int,
) -> GateGradients:
    """Launch the backward kernel.

    Args:
        dh_TF: (T, F) contiguous gradient of h.
        gate_up_T2F: (T, 2F) contiguous, gate first.
        down: its ds_TR and the stacked A, at most MAX_RANK ranks; rows may be strided.
        above: block-diagonal B of gate and up, (2F, ranks); their t; how many ranks each has, at
            most MAX_RANK; rows may be strided.
        mask: of down's input.
        room: columns to leave free behind the rows of gate_up's gradient.
    """
    (ds_TR, a_RF), (b_2FR, t_TR, (gate, up)) = down, above
    (T, F), R = dh_TF.shape, ds_TR.shape[1]
    out_T2F = with_room(gate_up_T2F, gate_up_T2F.shape, room)
    block_t, block_f = 16, 128
    columns = cdiv(F, block_f)
    splits, rows = row_split(T, columns, block_t)

    def parts(*shape: int) -> Tensor:
        return dh_TF.new_empty(shape, dtype=torch.float32)

    ds_CTR, db_P, da_PRF = (
        parts(columns, T, gate + up),
        parts(splits, F * (gate + up)),
        parts(splits, R, F),
    )
    positions, draws, *numbers = mask_arguments(mask.dropout, mask.site, dh_TF)
    launch(
        _swiglu_bwd_lora, (columns, splits), dh_TF, gate_up_T2F, ds_TR, a_RF, b_2FR, t_TR, out_T2F,
        ds_CTR, db_P, da_PRF, positions, draws, T, F, R, gate, up, ds_TR.stride(0), a_RF.stride(0),
        b_2FR.stride(0), t_TR.stride(0), out_T2F.stride(0), rows, keep_scale(mask.dropout), *numbers,
        DROP=mask.dropout is not None, UP=INTERPRETED, BLOCK_T=block_t, BLOCK_F=block_f,
        BLOCK_R=16, num_warps=8, num_stages=2,
    )  # fmt: skip
    db_gate, db_up = db_P.split((F * gate, F * up), dim=1)
    return GateGradients(
        out_T2F, ds_CTR, db_gate.unflatten(1, (F, gate)), db_up.unflatten(1, (F, up)), da_PRF
    )
