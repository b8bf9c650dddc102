"""The backward rotation fused with the LoRA branches of the projection before it.

    dy = rotation^-1 of dq and dk,  dv as it is;     ds = s dy B,   dB = dy^T t     of q, k and v each

One launch a projection: its heads' gradient is turned on its way into the rows of dy, and the two
products of a rank's width are taken from the registers that hold it.

Shapes   T = packed tokens, E = head width, R = rank of the projection, H = its heads, P = row splits.
Numerics dy is rounded before the products, as a separate pass would read it; sums in float32.
Bound    Memory: 2*T*H*E elements; the parts are 4*R*H*(T + P*E) bytes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels.dispatch import INTERPRETED, dot, jit, launch, next_power_of_2, tl
from bioinstruct.kernels.rope import Rotation
from bioinstruct.kernels.rows import with_dense_rows
from bioinstruct.kernels.skinny import rank_block, row_split


@jit
def _turn_back_lora(
    src_ptr, dst_ptr, cos_ptr, sin_ptr, b_ptr, t_ptr, ds_parts, db_parts,
    T, half, R, src_t, src_h, dst_t, b_stride, t_stride, ROWS,
    TURN: tl.constexpr, UP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # program (h, p) owns a head and ROWS rows: part h of their ds, part p of the head's dB
    h, p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    rank = tl.arange(0, BLOCK_R)[None, :]
    narrow = dst_ptr.dtype.element_ty
    first = h * 2 * half
    b_mask = (e[:, None] < half) & (rank < R)
    b_place = b_ptr + (first + e[:, None]) * b_stride + rank
    b_one = tl.load(b_place, mask=b_mask, other=0.0)
    b_two = tl.load(b_place + half * b_stride, mask=b_mask, other=0.0)
    db_one = tl.zeros((BLOCK_E, BLOCK_R), dtype=tl.float32)
    db_two = tl.zeros((BLOCK_E, BLOCK_R), dtype=tl.float32)
    for start in range(p * ROWS, tl.minimum((p + 1) * ROWS, T), BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T))[:, None]
        mask = (t < T) & (e[None, :] < half)
        src = src_ptr + t * src_t + h * src_h + e[None, :]
        one = tl.load(src, mask=mask, other=0.0)
        two = tl.load(src + half, mask=mask, other=0.0)
        if TURN:
            cos = tl.load(cos_ptr + t * half + e[None, :], mask=mask, other=0.0)
            sin = tl.load(sin_ptr + t * half + e[None, :], mask=mask, other=0.0)
            a = one.to(tl.float32)
            b = two.to(tl.float32)
            one = (a * cos + b * sin).to(narrow)
            two = (b * cos - a * sin).to(narrow)
        dst = dst_ptr + t * dst_t + first + e[None, :]
        tl.store(dst, one, mask=mask)
        tl.store(dst + half, two, mask=mask)
        ds = dot(one, b_one, tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32), UP)
        ds = dot(two, b_two, ds, UP)
        tl.store(ds_parts + (h * T + t) * R + rank, ds, mask=(t < T) & (rank < R))
        s = tl.load(t_ptr + t * t_stride + rank, mask=(t < T) & (rank < R), other=0.0)
        db_one = dot(tl.trans(one), s, db_one, UP)
        db_two = dot(tl.trans(two), s, db_two, UP)
    columns = tl.num_programs(0) * 2 * half
    db_place = db_parts + (p * columns + first + e[:, None]) * R + rank
    tl.store(db_place, db_one, mask=b_mask)
    tl.store(db_place + half * R, db_two, mask=b_mask)


class HeadGradients(NamedTuple):
    """Float32 parts, to be added over their first axis."""

    ds_HTR: Tensor
    """Without the scale of the branches."""
    db_PNR: Tensor


def turn_back_with_lora(
    dy_THE: Tensor,
    out_TN: Tensor,
    rotation: Rotation | None,
    b_NR: Tensor,
    t_TR: Tensor,
) -> HeadGradients:
    """Launch the kernel for one projection.

    Args:
        dy_THE: (T, H, E) gradient of its heads.
        out_TN: (T, N) where their gradient before the rotation goes; rows may be strided.
        rotation: the tokens' cos and sin, or None for values, which are not rotated.
        b_NR: (N, R) in dy's dtype; rows may be strided.
        t_TR: (T, R); rows may be strided.
    """
    dy_THE = with_dense_rows(dy_THE)
    (T, H, E), R = dy_THE.shape, t_TR.shape[1]
    block_t = 32 if R <= 16 else 16
    splits, rows = row_split(T, H, block_t)
    ds_HTR = dy_THE.new_empty(H, T, R, dtype=torch.float32)
    db_PNR = dy_THE.new_empty(splits, H * E, R, dtype=torch.float32)
    table = (dy_THE, dy_THE) if rotation is None else rotation
    launch(
        _turn_back_lora, (H, splits), dy_THE, out_TN, *table, b_NR, t_TR, ds_HTR, db_PNR,
        T, E // 2, R, *dy_THE.stride()[:2], out_TN.stride(0), b_NR.stride(0), t_TR.stride(0), rows,
        TURN=rotation is not None, UP=INTERPRETED, BLOCK_T=block_t,
        BLOCK_E=max(16, next_power_of_2(E // 2)), **rank_block(R, 128), num_stages=2,
    )  # fmt: skip
    return HeadGradients(ds_HTR, db_PNR)
