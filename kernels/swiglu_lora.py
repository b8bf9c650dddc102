"""SwiGLU fused with the LoRA branches of the projections around it.

    forward    h = silu(gate) * up,  t = s (m*h) A^T         A of down; one pass over gate and up
    backward   dh += m*(ds A)                      with a mask; without, dh holds the branch's part
               dgate = dh up silu'(gate),  dup = dh silu(gate)
               ds_gate = s dgate B_gate,  dB_gate = dgate^T t_gate,  and up's alike
               dA = ds^T (m*h)                          h from gate and up again: it is not saved
               c = r^2 (gate . dgate + up . dup)        a row's, for the norm before (norm_lora.py)

A program of the backward kernel owns a block of columns and several rows, so that dB and dA are
summed in registers; of ds and c it writes parts. It stops at MAX_RANK, above which its tiles would
spill.

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
    CHUNK,
    Mask,
    add_t,
    keep_scale,
    mask_arguments,
    rank_block,
    read_back,
    row_split,
)

MAX_RANK = 16
BLOCK_F = 128

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
        acc = add_t(
            acc, h, a_ptr, a_stride, positions_ptr, draws_ptr, seed, site, q, t, T, start, F, R,
            DROP, UP, BLOCK_F, BLOCK_R,
        )  # fmt: skip
    out = (acc * scale).to(narrow)
    mask = (t < T) & (rank < R)
    tl.store(t_ptr + t * R + rank, out, mask=mask)
    tl.store(h_ptr + t * h_stride + F + rank, out, mask=mask)


@jit(do_not_specialize=["seed", "site", "q"])
def _swiglu_bwd_lora(
    dh_ptr, gate_up_ptr, ds_ptr, a_ptr, b_ptr, t_ptr, dgate_up_ptr, ds_parts, db_parts, da_parts,
    r_ptr, c_parts, positions_ptr, draws_ptr,
    T, F, R, GATE, UPS, ds_stride, a_stride, b_stride, t_stride, dgate_up_stride, ROWS,
    keep_scale, seed, site, q,
    DROP: tl.constexpr, UP: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # program (c, p) owns BLOCK_F columns and ROWS rows; GATE and UPS are the two branches' ranks
    c, p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_F
    n = first + tl.arange(0, BLOCK_F)
    f = n[None, :]
    rank = tl.arange(0, BLOCK_R)
    narrow = dgate_up_ptr.dtype.element_ty
    a_mask = (rank[:, None] < R) & (f < F)
    ds_parts += c * T * (GATE + UPS)
    db_gate = tl.zeros((BLOCK_F, BLOCK_R), dtype=tl.float32)
    db_up = tl.zeros((BLOCK_F, BLOCK_R), dtype=tl.float32)
    da = tl.zeros((BLOCK_R, BLOCK_F), dtype=tl.float32)
    last = tl.minimum((p + 1) * ROWS, T)
    for chunk in range(p * ROWS, last, CHUNK):
        end = tl.minimum(chunk + CHUNK, last)
        for start in range(chunk, end, BLOCK_T):
            t = (start + tl.arange(0, BLOCK_T))[:, None]
            mask = (t < T) & (f < F)
            dh = tl.load(dh_ptr + t * F + f, mask=mask, other=0.0).to(tl.float32)
            ds = tl.load(
                ds_ptr + t * ds_stride + rank[None, :],
                mask=(t < T) & (rank[None, :] < R),
                other=0.0,
            )
            place = gate_up_ptr + t * 2 * F + f
            gate = tl.load(place, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(place + F, mask=mask, other=0.0).to(tl.float32)
            s = tl.sigmoid(gate)
            silu = gate * s
            h = (silu * up).to(narrow)
            if DROP:
                positions = tl.load(positions_ptr + t, mask=t < T, other=0)
                draws = tl.load(draws_ptr + t, mask=t < T, other=0)
                keep = keep_lanes(seed, site, positions, draws, first // 8, q, BLOCK_F // 8)
                a = tl.load(a_ptr + rank[:, None] * a_stride + f, mask=a_mask, other=0.0)
                back = dot(ds, a, tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32), UP)
                dh += tl.where(keep, back, 0.0) * keep_scale
                h = tl.where(keep, h, 0.0).to(narrow)
            da = dot(tl.trans(ds), h, da, UP)
            # silu' = s + silu (1 - s)
            dgate = dh * up * (s + silu * (1.0 - s))
            out = dgate_up_ptr + t * dgate_up_stride + f
            tl.store(out, dgate.to(narrow), mask=mask)
            tl.store(out + F, (dh * silu).to(narrow), mask=mask)
            r = tl.load(r_ptr + t, mask=t < T, other=0.0)
            own = tl.sum(dgate * gate + dh * silu * up, axis=1)[:, None]
            tl.store(c_parts + c * T + t, r * r * own, mask=t < T)
        db_gate = read_back(
            dgate_up_ptr, b_ptr, t_ptr, ds_parts, db_gate, chunk, end, n, F, GATE, T,
            dgate_up_stride, b_stride, t_stride, UP, BLOCK_T, BLOCK_R,
        )  # fmt: skip
        db_up = read_back(
            dgate_up_ptr + F, b_ptr + F * b_stride + GATE, t_ptr + GATE, ds_parts + T * GATE, db_up,
            chunk, end, n, F, UPS, T, dgate_up_stride, b_stride, t_stride, UP, BLOCK_T, BLOCK_R,
        )  # fmt: skip
    row = p * F * (GATE + UPS)
    column = rank[None, :]
    place = db_parts + row + n[:, None] * GATE + column
    tl.store(place, db_gate, mask=(n[:, None] < F) & (column < GATE))
    place = db_parts + row + F * GATE + n[:, None] * UPS + column
    tl.store(place, db_up, mask=(n[:, None] < F) & (column < UPS))
    tl.store(da_parts + (p * R + rank[:, None]) * F + f, da, mask=a_mask)


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
        **rank_block(R, 32), num_stages=1 if R <= 16 else 3,
    )  # fmt: skip
    return h_TF, t_TR


class GateGradients(NamedTuple):
    """What the backward kernel wrote; parts are float32 and to be added over their first axis."""

    dgate_up_T2F: Tensor
    ds_CTR: tuple[Tensor, Tensor]
    """Of gate and of up, without the scale of the branches."""
    db_PFR: tuple[Tensor, Tensor]
    da_PRF: Tensor
    """Of down, without the mask's scale."""
    c_CT: Tensor
    """The norm's row sums, times its columns."""


def swiglu_backward_with_lora(
    dh_TF: Tensor,
    gate_up_T2F: Tensor,
    down: tuple[Tensor, Tensor],
    above: tuple[Tensor, Tensor, tuple[int, int], Tensor],
    mask: Mask,
    room: int,
) -> GateGradients:
    """Launch the backward kernel.

    Args:
        dh_TF: (T, F) contiguous gradient of h.
        gate_up_T2F: (T, 2F) contiguous, gate first.
        down: its ds_TR and the stacked A, at most MAX_RANK ranks; rows may be strided.
        above: block-diagonal B of gate and up, (2F, ranks); their t; how many ranks each has, at
            most MAX_RANK; rows may be strided; and r_T of the norm before them.
        mask: of down's input.
        room: columns to leave free behind the rows of gate_up's gradient.
    """
    (ds_TR, a_RF), (b_2FR, t_TR, (gate, up), r_T) = down, above
    (T, F), R = dh_TF.shape, ds_TR.shape[1]
    out_T2F = with_room(gate_up_T2F, gate_up_T2F.shape, room)
    columns = cdiv(F, BLOCK_F)
    splits, rows = row_split(T, columns, CHUNK)

    def parts(*shape: int) -> Tensor:
        return dh_TF.new_empty(shape, dtype=torch.float32)

    ds_C = parts(columns, T * (gate + up))
    db_P, da_PRF = parts(splits, F * (gate + up)), parts(splits, R, F)
    c_CT = parts(columns, T)
    positions, draws, *numbers = mask_arguments(mask.dropout, mask.site, dh_TF)
    launch(
        _swiglu_bwd_lora, (columns, splits), dh_TF, gate_up_T2F, ds_TR, a_RF, b_2FR, t_TR, out_T2F,
        ds_C, db_P, da_PRF, r_T, c_CT, positions, draws, T, F, R, gate, up, ds_TR.stride(0),
        a_RF.stride(0), b_2FR.stride(0), t_TR.stride(0), out_T2F.stride(0), rows,
        keep_scale(mask.dropout), *numbers, DROP=mask.dropout is not None, UP=INTERPRETED,
        CHUNK=CHUNK, BLOCK_T=32 if mask.dropout is None else 16, BLOCK_F=BLOCK_F, BLOCK_R=16,
        num_warps=8, num_stages=2,
    )  # fmt: skip
    return GateGradients(
        out_T2F,
        _split(ds_C, T, (gate, up)),
        _split(db_P, F, (gate, up)),
        da_PRF,
        c_CT,
    )


def _split(parts: Tensor, rows: int, ranks: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Parts of both branches, which stand one after the other, apart."""
    gate, up = parts.split([rows * rank for rank in ranks], dim=1)
    return gate.unflatten(1, (rows, ranks[0])), up.unflatten(1, (rows, ranks[1]))
