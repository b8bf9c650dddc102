"""The backward rotation fused with the LoRA branches of the projection before it.

    dy = rotation^-1 of dq and dk,  dv as it is;   ds = s dy B,  dB = dy^T t    of q, k and v each

One launch a projection: its heads' gradient is turned on its way into the rows of dy, CHUNK rows
at a time, which are read back from cache for the two products of a rank's width.

Shapes   T = packed tokens, E = head width, R = rank of the projection, H = its heads, C = blocks
         of heads, P = row splits.
Numerics dy is rounded before the products, as a separate pass would read it; sums in float32.
Bound    Memory: 2*T*H*E elements; the parts are 4*R*(C*T + P*H*E) bytes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels.dispatch import INTERPRETED, cdiv, jit, launch, next_power_of_2, tl
from bioinstruct.kernels.rope import Rotation
from bioinstruct.kernels.rows import with_dense_rows
from bioinstruct.kernels.skinny import CHUNK, PROGRAMS, rank_block, read_back, row_split


@jit
def _turn_back_lora(
    src_ptr, dst_ptr, cos_ptr, sin_ptr, b_ptr, t_ptr, ds_parts, db_parts,
    T, heads, half, R, src_t, src_h, dst_t, b_stride, t_stride, ROWS,
    TURN: tl.constexpr, UP: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # program (c, p) owns HEADS heads and ROWS rows: part c of their ds, part p of the heads' dB
    c, p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = c * HEADS
    width = tl.minimum(HEADS, heads - first) * 2 * half
    e = tl.arange(0, BLOCK_E)[None, :]
    n = tl.arange(0, 2 * HEADS * BLOCK_E)
    src_ptr += first * src_h
    dst_ptr += first * 2 * half
    b_ptr += first * 2 * half * b_stride
    ds_parts += c * T * R
    narrow = dst_ptr.dtype.element_ty
    db = tl.zeros((2 * HEADS * BLOCK_E, BLOCK_R), dtype=tl.float32)
    last = tl.minimum((p + 1) * ROWS, T)
    for chunk in range(p * ROWS, last, CHUNK):
        end = tl.minimum(chunk + CHUNK, last)
        for start in range(chunk, end, BLOCK_T):
            t = (start + tl.arange(0, BLOCK_T))[:, None]
            whole = (t < T) & (e < half)
            if TURN:
                cos = tl.load(cos_ptr + t * half + e, mask=whole, other=0.0)
                sin = tl.load(sin_ptr + t * half + e, mask=whole, other=0.0)
            for i in tl.static_range(HEADS):
                mask = whole & (2 * half * i + e * 0 < width)
                a = tl.load(src_ptr + t * src_t + i * src_h + e, mask=mask, other=0.0)
                b = tl.load(src_ptr + t * src_t + i * src_h + half + e, mask=mask, other=0.0)
                if TURN:
                    one = (a.to(tl.float32) * cos + b.to(tl.float32) * sin).to(narrow)
                    b = (b.to(tl.float32) * cos - a.to(tl.float32) * sin).to(narrow)
                    a = one
                out = dst_ptr + t * dst_t + i * 2 * half + e
                tl.store(out, a, mask=mask)
                tl.store(out + half, b, mask=mask)
        db = read_back(
            dst_ptr, b_ptr, t_ptr, ds_parts, db, chunk, end, n, width, R, T,
            dst_t, b_stride, t_stride, UP, BLOCK_T, BLOCK_R,
        )  # fmt: skip
    rank = tl.arange(0, BLOCK_R)[None, :]
    row = (p * heads + first) * 2 * half + n[:, None]
    tl.store(db_parts + row * R + rank, db, mask=(n[:, None] < width) & (rank < R))


def _tiles(R: int) -> dict[str, int]:
    """Heads of a program, the rank's tile, warps and stages: what was found to spill nowhere."""
    few = R <= 16
    return {"HEADS": 1 + few, **rank_block(R, 16 if few else 64), "num_stages": 1 if few else 2}


class HeadGradients(NamedTuple):
    """Float32 parts, to be added over their first axis."""

    ds_CTR: Tensor
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
    tiles = _tiles(R)
    blocks = cdiv(H, tiles["HEADS"])
    splits, rows = row_split(T, blocks, CHUNK, PROGRAMS // 2)
    ds_CTR = dy_THE.new_empty(blocks, T, R, dtype=torch.float32)
    db_PNR = dy_THE.new_empty(splits, H * E, R, dtype=torch.float32)
    table = (dy_THE, dy_THE) if rotation is None else rotation
    launch(
        _turn_back_lora, (blocks, splits), dy_THE, out_TN, *table, b_NR, t_TR, ds_CTR, db_PNR,
        T, H, E // 2, R, *dy_THE.stride()[:2], out_TN.stride(0), b_NR.stride(0), t_TR.stride(0),
        rows, TURN=rotation is not None, UP=INTERPRETED, CHUNK=CHUNK, BLOCK_T=32,
        BLOCK_E=max(16, next_power_of_2(E // 2)), **tiles,
    )  # fmt: skip
    return HeadGradients(ds_CTR, db_PNR)
