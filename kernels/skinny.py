"""The memory-bound passes of a LoRA linear: one read of x or dy each, a rank's width of output.

    t  = s (m*x) A^T              shrink
    ds = s dy B,   dB = dy^T t    shrink_dy, one read of dy for both
    dA = ds^T (m*x)               gradient_of_a
    G  = m*(ds A)                 masked_expand, which a library GEMM then adds dy W to

m is the dropout mask of the branch's input (inverted scale included); it is computed where it is
used. Sums over tokens or columns are split over programs; each writes a float32 part, and a second
kernel adds the parts in their order. No atomics, so a result is the same bits every time.

Shapes   T = packed tokens, K = input features, N = output features, R = rank, C = column blocks,
         P = row splits.
Numerics Operands in the activations' dtype (A and B are cast from their float32 masters), products
         and parts in float32, one rounding at the end.
Bound    Memory: shrink and gradient_of_a read T*K elements, shrink_dy T*N, masked_expand writes
         T*K; the parts are 4*R*(C*T + P*N) and 4*R*P*K bytes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels.dispatch import (
    INTERPRETED,
    cdiv,
    dot,
    jit,
    launch,
    next_power_of_2,
    tl,
)
from bioinstruct.kernels.dropout import Dropout, keep_lanes

MAX_RANK = 64
"""Above it a rank's tile no longer fits beside the activations', and library GEMMs take over."""
CHUNK = 128
"""Rows that a fused kernel writes before it reads them back: few enough to be in cache still."""
PROGRAMS = 256
"""Wanted programs of a split sum, about two a multiprocessor, one where they are of eight warps;
fixed, so that sums are, too."""

# ---- kernels -----------------------------------------------------------------------------------


@jit
def masked(x, positions_ptr, draws_ptr, seed, site, t, T, first, q, EIGHTHS: tl.constexpr):
    """x where the mask keeps, else 0; the mask's scale is the caller's."""
    positions = tl.load(positions_ptr + t, mask=t < T, other=0)
    draws = tl.load(draws_ptr + t, mask=t < T, other=0)
    keep = keep_lanes(seed, site, positions, draws, first, q, EIGHTHS)
    return tl.where(keep, x, 0.0)


@jit
def add_t(
    acc, x, a_ptr, a_stride, positions_ptr, draws_ptr, seed, site, q, t, T, start, K, R,
    DROP: tl.constexpr, UP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + (m*x) A^T for the columns of x from start on; scales, the mask's too, come later."""
    narrow = x.dtype
    if DROP:
        x = masked(x, positions_ptr, draws_ptr, seed, site, t, T, start // 8, q, BLOCK_K // 8)
        x = x.to(narrow)
    k = (start + tl.arange(0, BLOCK_K))[:, None]
    r = tl.arange(0, BLOCK_R)[None, :]
    a = tl.load(a_ptr + r * a_stride + k, mask=(r < R) & (k < K), other=0.0)
    return dot(x, a.to(narrow), acc, UP)


@jit(do_not_specialize=["seed", "site", "q"])
def _shrink(
    x_ptr, a_ptr, t_ptr, positions_ptr, draws_ptr, T, K, R, x_stride, a_stride, t_stride, scale,
    seed, site, q, DROP: tl.constexpr, UP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    r = tl.arange(0, BLOCK_R)[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K))[None, :]
        x = tl.load(x_ptr + t * x_stride + k, mask=(t < T) & (k < K), other=0.0)
        acc = add_t(
            acc, x, a_ptr, a_stride, positions_ptr, draws_ptr, seed, site, q, t, T, start, K, R,
            DROP, UP, BLOCK_K, BLOCK_R,
        )  # fmt: skip
    out = (acc * scale).to(t_ptr.dtype.element_ty)
    tl.store(t_ptr + t * t_stride + r, out, mask=(t < T) & (r < R))


@jit
def read_back(
    dy_ptr, b_ptr, t_ptr, ds_ptr, db, first, end, n, N, R, T, dy_stride, b_stride, t_stride,
    UP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write dy B of rows first to end and columns n, and return dB with their dy^T t added.

    For kernels that have written dy themselves. Taking the products from the registers that hold it
    would want these in other layouts, and spill; the rows just written are still in cache.
    """
    tl.debug_barrier()
    rank = tl.arange(0, BLOCK_R)[None, :]
    mask = (n[:, None] < N) & (rank < R)
    b = tl.load(b_ptr + n[:, None] * b_stride + rank, mask=mask, other=0.0)
    for start in range(first, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)[:, None]
        own = (t < T) & (rank < R)
        dy = tl.load(
            dy_ptr + t * dy_stride + n[None, :], mask=(t < T) & (n[None, :] < N), other=0.0
        )
        ds = dot(dy, b, tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32), UP)
        tl.store(ds_ptr + t * R + rank, ds, mask=own)
        s = tl.load(t_ptr + t * t_stride + rank, mask=own, other=0.0)
        db = dot(tl.trans(dy), s, db, UP)
    return db


@jit
def _shrink_dy(
    dy_ptr, b_ptr, t_ptr, ds_ptr, db_ptr, T, N, R, dy_stride, t_stride, ROWS,
    UP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # program (c, p) owns BLOCK_N columns and ROWS rows: part c of their ds, part p of their dB
    c, p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n = c * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)[None, :]
    narrow = dy_ptr.dtype.element_ty
    b_mask = (n[:, None] < N) & (r < R)
    b = tl.load(b_ptr + n[:, None] * R + r, mask=b_mask, other=0.0).to(narrow)
    db = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for start in range(p * ROWS, tl.minimum((p + 1) * ROWS, T), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)[:, None]
        dy = tl.load(
            dy_ptr + t * dy_stride + n[None, :], mask=(t < T) & (n[None, :] < N), other=0.0
        )
        ds = dot(dy, b, tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32), UP)
        tl.store(ds_ptr + (c * T + t) * R + r, ds, mask=(t < T) & (r < R))
        s = tl.load(t_ptr + t * t_stride + r, mask=(t < T) & (r < R), other=0.0)
        db = dot(tl.trans(dy), s, db, UP)
    tl.store(db_ptr + (p * N + n[:, None]) * R + r, db, mask=b_mask)


@jit(do_not_specialize=["seed", "site", "q"])
def _gradient_of_a(
    ds_ptr, x_ptr, r_ptr, gain_ptr, da_ptr, positions_ptr, draws_ptr,
    T, K, R, ds_stride, x_stride, ROWS, seed, site, q,
    NORM: tl.constexpr, DROP: tl.constexpr, UP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # program (k, p) owns BLOCK_K columns and ROWS rows: part p of the columns' dA
    p = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_K
    k = (first + tl.arange(0, BLOCK_K))[None, :]
    rank = tl.arange(0, BLOCK_R)
    da = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    if NORM:
        gain = tl.load(gain_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    for start in range(p * ROWS, tl.minimum((p + 1) * ROWS, T), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        x = tl.load(x_ptr + t[:, None] * x_stride + k, mask=(t[:, None] < T) & (k < K), other=0.0)
        if NORM:
            r = tl.load(r_ptr + t, mask=t < T, other=0.0)[:, None]
            x = (x.to(tl.float32) * r * gain).to(x_ptr.dtype.element_ty)
        if DROP:
            x = masked(
                x, positions_ptr, draws_ptr, seed, site, t[:, None], T, first // 8, q, BLOCK_K // 8
            ).to(x_ptr.dtype.element_ty)
        ds = tl.load(
            ds_ptr + t[None, :] * ds_stride + rank[:, None],
            mask=(t[None, :] < T) & (rank[:, None] < R),
            other=0.0,
        )
        da = dot(ds, x, da, UP)
    tl.store(da_ptr + (p * R + rank[:, None]) * K + k, da, mask=(rank[:, None] < R) & (k < K))


@jit(do_not_specialize=["seed", "site", "q"])
def _masked_expand(
    ds_ptr, a_ptr, g_ptr, positions_ptr, draws_ptr, T, K, R, ds_stride, a_stride, scale,
    seed, site, q, ADD: tl.constexpr, UP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    first = tl.program_id(1) * BLOCK_K
    k = (first + tl.arange(0, BLOCK_K))[None, :]
    r = tl.arange(0, BLOCK_R)
    narrow = g_ptr.dtype.element_ty
    ds = tl.load(ds_ptr + t * ds_stride + r[None, :], mask=(t < T) & (r[None, :] < R), other=0.0)
    a = tl.load(a_ptr + r[:, None] * a_stride + k, mask=(r[:, None] < R) & (k < K), other=0.0)
    g = dot(ds, a.to(narrow), tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32), UP)
    g = masked(g, positions_ptr, draws_ptr, seed, site, t, T, first // 8, q, BLOCK_K // 8)
    g = g * scale
    if ADD:
        g += tl.load(g_ptr + t * K + k, mask=(t < T) & (k < K), other=0.0).to(tl.float32)
    tl.store(g_ptr + t * K + k, g.to(narrow), mask=(t < T) & (k < K))


@jit
def _sum_block(
    parts_ptr, out_ptr, block, P, size, columns, part_stride, out_stride, scale,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    part = parts_ptr + i
    for _ in range(0, P):
        total += tl.load(part, mask=i < size, other=0.0)
        part += part_stride
    place = out_ptr + i // columns * out_stride + i % columns
    total = total * scale
    if ADD:
        total += tl.load(place, mask=i < size, other=0.0).to(tl.float32)
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=i < size)


@jit
def _sum_parts(
    parts_ptr, out_ptr, P, size, columns, part_stride, out_stride, scale,
    parts2_ptr, out2_ptr, P2, size2, part2_stride, scale2, first2,
    ADD: tl.constexpr, ADD2: tl.constexpr, TWO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # the programs from first2 on take a second sum, whose result is dense
    block = tl.program_id(0)
    if TWO and block >= first2:
        _sum_block(
            parts2_ptr, out2_ptr, block - first2, P2, size2, size2, part2_stride, size2, scale2,
            ADD2, BLOCK,
        )  # fmt: skip
    else:
        _sum_block(
            parts_ptr, out_ptr, block, P, size, columns, part_stride, out_stride, scale, ADD, BLOCK
        )


# ---- launches ----------------------------------------------------------------------------------


def keep_scale(dropout: Dropout | None) -> float:
    """What kept values are multiplied by."""
    return 1.0 if dropout is None else 65536 / (65536 - dropout.dropped)


def mask_arguments(dropout: Dropout | None, site: int, some: Tensor) -> list[Any]:
    """The mask's tensors and numbers, in the kernels' order; without a mask nothing reads them."""
    if dropout is None:
        return [some, some, 0, 0, 0]
    return [dropout.positions_T, dropout.draws_T, dropout.seed, site, dropout.dropped]


def rank_block(R: int, doubled_from: int = 64) -> dict[str, int]:
    """The rank's tile, at least the 16 a product takes on a GPU, and its warps.

    Four warps below doubled_from and eight from there on is what spills on no architecture.
    """
    block = max(16, next_power_of_2(R))
    return {"BLOCK_R": block, "num_warps": 4 if block < doubled_from else 8}


def row_split(T: int, blocks: int, block_t: int, programs: int = PROGRAMS) -> tuple[int, int]:
    """(splits, rows of each) of T rows, so that splits times blocks is about that many programs."""
    wanted = max(1, min(cdiv(programs, blocks), cdiv(T, block_t)))
    rows = cdiv(cdiv(max(T, 1), wanted), block_t) * block_t
    return cdiv(T, rows), rows


class Parts(NamedTuple):
    """A master's gradient that is still to be added up over the first axis of its parts."""

    master: Tensor
    parts: Tensor
    """(P, *master's shape), of which the last axes are dense."""
    scale: float = 1.0


Gradient = Tensor | Parts | None
"""What autograd is to store, or to leave as it is because it was added to already; or parts."""


class _Sum(NamedTuple):
    parts: Tensor
    out: Tensor
    scale: float
    add: bool


def _add_up(first: _Sum, second: _Sum | None = None) -> None:
    """Launch one sum, or two; the second one's result is dense."""
    parts, out, scale, add = first
    size, columns = out.numel(), out.shape[1]
    numbers = len(parts), size, columns, parts.stride(0), out.stride(0), scale
    other = second or first
    size2, blocks = other.out.numel(), cdiv(size, 1024)
    numbers2 = len(other.parts), size2, other.parts.stride(0), other.scale, blocks
    grid = (blocks + (cdiv(size2, 1024) if second else 0),)
    launch(
        _sum_parts, grid, parts, out, *numbers, other.parts, other.out, *numbers2,
        ADD=add, ADD2=other.add, TWO=second is not None, BLOCK=1024, num_warps=4,
    )  # fmt: skip


def sum_into(out: Tensor, parts: Tensor, scale: float) -> None:
    """out = scale * the sum of parts over their first dimension; out's rows may be strided."""
    _add_up(_Sum(parts, out, scale, add=False))


def settled(gradients: Sequence[Gradient]) -> list[Tensor | None]:
    """Add up what is in parts, two gradients a launch.

    A sum is added to the master's gradient where it has one, and the result is None. That saves a
    pass over a gradient of the master's size, and its allocation.
    """
    found: list[Tensor | None] = []
    sums: list[_Sum] = []
    for gradient in gradients:
        if not isinstance(gradient, Parts):
            found.append(gradient)
            continue
        own = gradient.master.grad
        add = own is not None and own.is_contiguous()
        out = own if own is not None and add else torch.empty_like(gradient.master)
        sums.append(_Sum(gradient.parts, out, gradient.scale, add))
        found.append(None if add else out)
    for i in range(0, len(sums), 2):
        _add_up(*sums[i : i + 2])
    return found


class Mask(NamedTuple):
    """Scale of the branches, and the mask of their input."""

    scale: float
    dropout: Dropout | None
    site: int


def shrink(
    x_TK: Tensor,
    a_RK: Tensor,
    t_TR: Tensor,
    scale: float,
    dropout: Dropout | None = None,
    site: int = 0,
) -> None:
    """Write t = scale (m*x) A^T.

    Args:
        x_TK: (T, K) activations; rows may be strided.
        a_RK: (R, K); rows may be strided.
        t_TR: (T, R) in x's dtype; rows may be strided.
        scale: of the branch.
        dropout: mask of x, or None.
        site: of the mask.
    """
    T, K = x_TK.shape
    positions, draws, *numbers = mask_arguments(dropout, site, x_TK)
    launch(
        _shrink, (cdiv(T, 64),), x_TK, a_RK, t_TR, positions, draws,
        T, K, len(a_RK), x_TK.stride(0), a_RK.stride(0), t_TR.stride(0),
        scale * keep_scale(dropout), *numbers,
        DROP=dropout is not None, UP=INTERPRETED, BLOCK_T=64, BLOCK_K=64,
        **rank_block(len(a_RK), 32), num_stages=3,
    )  # fmt: skip


def shrink_dy(dy_TN: Tensor, b_NR: Tensor, t_TR: Tensor, ds_TR: Tensor, scale: float) -> Tensor:
    """Write ds = scale dy B, and return dB's parts.

    Args:
        dy_TN: (T, N) gradient of the branch's output; rows may be strided.
        b_NR: (N, R) contiguous.
        t_TR: (T, R) of the forward pass; rows may be strided.
        ds_TR: (T, R) in dy's dtype; rows may be strided.
        scale: of the branch.

    Returns:
        (P, N, R) float32, whose sum over P is dB.
    """
    (T, N), R = dy_TN.shape, b_NR.shape[1]
    # wide blocks of columns, since each writes a part of ds
    block_t, block_n = 32, 256
    columns = cdiv(N, block_n)
    splits, rows = row_split(T, columns, block_t, PROGRAMS // 2)
    ds_parts = dy_TN.new_empty(columns, T, R, dtype=torch.float32)
    db_parts = dy_TN.new_empty(splits, N, R, dtype=torch.float32)
    launch(
        _shrink_dy, (columns, splits), dy_TN, b_NR, t_TR, ds_parts, db_parts,
        T, N, R, dy_TN.stride(0), t_TR.stride(0), rows, UP=INTERPRETED,
        BLOCK_T=block_t, BLOCK_N=block_n, **rank_block(R, 16), num_stages=3,
    )  # fmt: skip
    sum_into(ds_TR, ds_parts, scale)
    return db_parts


class Source(NamedTuple):
    """The input of a LoRA linear: x itself, or what its norm is computed from again."""

    x_TK: Tensor
    """x, or the h that was normed; rows may be strided."""
    r_T: Tensor | None = None
    """Reciprocal root mean squares of h; None where x is given."""
    gain_K: Tensor | None = None
    """The norm's."""

    def made(self) -> Tensor:
        """Return x."""
        if self.r_T is None or self.gain_K is None:
            return self.x_TK
        return (self.x_TK * self.r_T[:, None] * self.gain_K.float()).to(self.x_TK.dtype)

    def gradient(self, ds_TR: Tensor) -> Tensor:
        """Return ds^T x by a library product; what norms x is put on the narrow sides instead."""
        if self.r_T is None or self.gain_K is None:
            return torch.mm(ds_TR.T, self.x_TK)
        return torch.mm((ds_TR * self.r_T[:, None]).to(ds_TR.dtype).T, self.x_TK) * self.gain_K


def gradient_of_a(
    ds_TR: Tensor, source: Source, dropout: Dropout | None = None, site: int = 0
) -> Tensor:
    """Return (P, R, K) float32 parts, whose sum over P is dA without the mask's scale.

    Args:
        ds_TR: (T, R) in x's dtype; rows may be strided.
        source: (T, K) activations.
        dropout: mask of x, or None.
        site: of the mask.
    """
    x_TK, r_T, gain_K = source
    (T, K), R = x_TK.shape, ds_TR.shape[1]
    block_t, block_k = 32, 128
    splits, rows = row_split(T, cdiv(K, block_k), block_t)
    parts = x_TK.new_empty(splits, R, K, dtype=torch.float32)
    normed = x_TK if r_T is None else r_T, x_TK if gain_K is None else gain_K
    positions, draws, *numbers = mask_arguments(dropout, site, x_TK)
    launch(
        _gradient_of_a, (cdiv(K, block_k), splits), ds_TR, x_TK, *normed, parts, positions, draws,
        T, K, R, ds_TR.stride(0), x_TK.stride(0), rows, *numbers, NORM=r_T is not None,
        DROP=dropout is not None, UP=INTERPRETED, BLOCK_T=block_t, BLOCK_K=block_k,
        **rank_block(R), num_stages=3,
    )  # fmt: skip
    return parts


def masked_expand(
    ds_TR: Tensor, a_RK: Tensor, dropout: Dropout, site: int, onto_TK: Tensor | None = None
) -> Tensor:
    """Return G = m*(ds A), (T, K) in ds's dtype; or add it to onto.

    Args:
        ds_TR: (T, R); rows may be strided.
        a_RK: (R, K); rows may be strided.
        dropout: the mask of the branch's input.
        site: of the mask.
        onto_TK: contiguous; what another mask gave.
    """
    T, (R, K) = len(ds_TR), a_RK.shape
    g_TK = ds_TR.new_empty(T, K) if onto_TK is None else onto_TK
    positions, draws, *numbers = mask_arguments(dropout, site, ds_TR)
    launch(
        _masked_expand, (cdiv(T, 32), cdiv(K, 128)), ds_TR, a_RK, g_TK, positions, draws,
        T, K, R, ds_TR.stride(0), a_RK.stride(0), keep_scale(dropout), *numbers,
        ADD=onto_TK is not None, UP=INTERPRETED, BLOCK_T=32, BLOCK_K=128, **rank_block(R),
    )  # fmt: skip
    return g_TK
