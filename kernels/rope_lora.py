"""The backward rotation fused with the LoRA branches of the projection before it.

    dy = rotation^-1 of dq and dk,  dv as it is;   ds = s dy B,  dB = dy^T t    of q, k and v each

One launch a projection: its heads' gradient is turned on its way into the rows of dy, CHUNK rows
at a time, which are read back from cache for the two products of a rank's width.

Shapes   T = packed tokens, E = head width, R = rank of the projection, H = its heads, P = row
         splits.
Numerics dy is rounded before the products, as a separate pass would read it; sums in float32.
Bound    Memory: 2*T*H*E elements; the parts are 4*R*H*(T + P*E) bytes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels.dispatch import INTERPRETED, jit, launch, next_power_of_2, tl
from bioinstruct.kernels.rope import Rotation
from bioinstruct.kernels.rows import with_dense_rows
from bioinstruct.kernels.skinny import CHUNK, rank_block, read_back, row_split


@jit
def _turn_back_lora(
    src_ptr, dst_ptr, cos_ptr, sin_ptr, b_ptr, t_ptr, ds_parts, db_parts,
    T, half, R, src_t, src_h, dst_t, b_stride, t_stride, ROWS,
    TURN: tl.constexpr, UP: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # program (h, p) owns a head and ROWS rows: part h of their ds, part p of the head's dB
    h, p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    e = tl.arange(0, BLOCK_E)[None, :]
    n = tl.arange(0, 2 * BLOCK_E)
    src_ptr += h * src_h
    dst_ptr += h * 2 * half
    b_ptr += h * 2 * half * b_stride
    ds_parts += h * T * R
    narrow = dst_ptr.dtype.element_ty
    db = tl.zeros((2 * BLOCK_E, BLOCK_R), dtype=tl.float32)
    last = tl.minimum((p + 1) * ROWS, T)
    for chunk in range(p * ROWS, last, CHUNK):
        end = tl.minimum(chunk + CHUNK, last)
        for start in range(chunk, end, BLOCK_T):
            t = (start + tl.arange(0, BLOCK_T))[:, None]
            mask = (t < T) & (e < half)
            a = tl.load(src_ptr + t * src_t + e, mask=mask, other=0.0)
            b = tl.load(src_ptr + t * src_t + half + e, mask=mask, other=0.0)
            if TURN:
                cos = tl.load(cos_ptr + t * half + e, mask=mask, other=0.0)
                sin = tl.load(sin_ptr + t * half + e, mask=mask, other=0.0)
                one = (a.to(tl.float32) * cos + b.to(tl.float32) * sin).to(narrow)
                b = (b.to(tl.float32) * cos - a.to(tl.float32) * sin).to(narrow)
                a = one
            tl.store(dst_ptr + t * dst_t + e, a, mask=mask)
            tl.store(dst_ptr + t * dst_t + half + e, b, mask=mask)
        db = read_back(
            dst_ptr, b_ptr, t_ptr, ds_parts, db, chunk, end, n, 2 * half, R, T,
            dst_t, b_stride, t_stride, UP, BLOCK_T, BLOCK_R,
        )  # fmt: skip
    rank = tl.arange(0, BLOCK_R)[None, :]
    row = p * tl.num_programs(0) * 2 * half + h * 2 * half + n[:, None]
    tl.store(db_parts + row * R + rank, db, mask=(n[:, None] < 2 * half) & (rank < R))


def _warps(R: int, *, turns: bool) -> dict[str, int]:
    """The rank's tile, warps and stages; what spills nowhere was found by trying."""
    if R > 16:
        return {**rank_block(R), "num_stages": 2}
    return {**rank_block(R, 16 if turns else 64), "num_stages": 2 if turns else 1}


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
    splits, rows = row_split(T, H, CHUNK)
    ds_HTR = dy_THE.new_empty(H, T, R, dtype=torch.float32)
    db_PNR = dy_THE.new_empty(splits, H * E, R, dtype=torch.float32)
    table = (dy_THE, dy_THE) if rotation is None else rotation
    launch(
        _turn_back_lora, (H, splits), dy_THE, out_TN, *table, b_NR, t_TR, ds_HTR, db_PNR,
        T, E // 2, R, *dy_THE.stride()[:2], out_TN.stride(0), b_NR.stride(0), t_TR.stride(0), rows,
        TURN=rotation is not None, UP=INTERPRETED, CHUNK=CHUNK, BLOCK_T=32,
        BLOCK_E=max(16, next_power_of_2(E // 2)), **_warps(R, turns=rotation is not None),
    )  # fmt: skip
    return HeadGradients(ds_HTR, db_PNR)
