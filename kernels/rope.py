"""Rotary position embedding on packed tokens, and the split of a fused qkv row.

    (a, b) -> (a cos - b sin, b cos + a sin),   angle = position * base^(-2i/E)
                                                       (Su et al. 2021, arXiv 2104.09864)

a is the first half of a head, b the second (Hugging Face's layout; Meta's interleaved weights are
permuted when they are loaded). The backward pass is the rotation by the negative angle.

Shapes   T = packed tokens, H = query heads, G = key/value heads, E = head width,
         N = (H + 2G) * E columns of the fused projection.
Numerics cos and sin are float32 tables gathered by position; rotation in float32 at least.
Saved    The two gathered tables, shared by all layers of a pack.
Bound    Memory: forward reads and writes T*(H+G)*E elements, as queries and keys are turned where
         they lie and the values left alone; backward T*N elements.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels.dispatch import cdiv, jit, launch, next_power_of_2, tl, uses_triton
from bioinstruct.kernels.native import addresses, native, threads_for
from bioinstruct.kernels.rows import with_room

HEADS = 4
"""Heads that one program turns with the same angles."""


class Rotation(NamedTuple):
    """cos and sin of every token's angles, made once for a pack and used by all layers."""

    cos_TE: Tensor
    """(T, E/2), float32 (float64 for a float64 model)."""
    sin_TE: Tensor
    """(T, E/2), as cos."""


class Heads(NamedTuple):
    """Query, key and value heads of packed tokens."""

    q_THE: Tensor
    k_TGE: Tensor
    v_TGE: Tensor


# ---- reference ---------------------------------------------------------------------------------


def rope_reference(x_THE: Tensor, rotation: Rotation) -> Tensor:
    """Rotate every head of x, through plain autograd; float64 in, float64 out."""
    wide = torch.promote_types(x_THE.dtype, torch.float32)
    a_THE, b_THE = x_THE.to(wide).chunk(2, dim=-1)
    cos, sin = rotation.cos_TE.to(wide)[:, None], rotation.sin_TE.to(wide)[:, None]
    return torch.cat((a_THE * cos - b_THE * sin, b_THE * cos + a_THE * sin), dim=-1).to(x_THE.dtype)


# ---- kernels -----------------------------------------------------------------------------------


@jit
def _rotate(
    src_ptr, dst_ptr, cos_ptr, sin_ptr, T, heads, half, src_t, src_h, dst_t, dst_h, sign,
    HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    # src and dst may be the same: each element is read and written by one program, and read first
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    e = tl.arange(0, BLOCK_E)[None, :]
    mask = (t < T) & (e < half)
    cos = tl.load(cos_ptr + t * half + e, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + t * half + e, mask=mask, other=0.0) * sign
    narrow = dst_ptr.dtype.element_ty
    for i in tl.static_range(HEADS):
        head = tl.program_id(1) * HEADS + i
        # compared as a block: the interpreter takes no scalar condition into a mask
        mask_h = mask & (head + e * 0 < heads)
        src = src_ptr + t * src_t + head * src_h + e
        dst = dst_ptr + t * dst_t + head * dst_h + e
        a = tl.load(src, mask=mask_h, other=0.0).to(tl.float32)
        b = tl.load(src + half, mask=mask_h, other=0.0).to(tl.float32)
        tl.store(dst, (a * cos - b * sin).to(narrow), mask=mask_h)
        tl.store(dst + half, (b * cos + a * sin).to(narrow), mask=mask_h)


def rotate_into(out_THE: Tensor, x_THE: Tensor, rotation: Rotation, sign: float) -> None:
    """Write x rotated by sign times the angle into out, which may be x itself."""
    T, heads, E = x_THE.shape
    if not uses_triton(out_THE, x_THE, *rotation):
        library = native(x_THE)
        if library is None or not _is_plain(out_THE, x_THE, rotation):
            _rotate_in_torch(out_THE, x_THE, rotation, sign)
            return
        (x, out), tables = addresses(x_THE, out_THE), addresses(*rotation)
        strides = x_THE.stride(0), out_THE.stride(0)
        threads = threads_for(x_THE.numel())
        library.rotate(x, strides[0], out, strides[1], *tables, sign, T, heads, E, threads)
        return
    if x_THE.stride(-1) != 1:
        x_THE = x_THE.contiguous()
    block = next_power_of_2(E // 2)
    tokens = max(1, 1024 // block)
    launch(
        _rotate, (cdiv(T, tokens), cdiv(heads, HEADS)),
        x_THE, out_THE, rotation.cos_TE, rotation.sin_TE, T, heads, E // 2,
        *x_THE.stride()[:2], *out_THE.stride()[:2], sign,
        HEADS=HEADS, BLOCK_T=tokens, BLOCK_E=block, num_warps=4,
    )  # fmt: skip


def _is_plain(out_THE: Tensor, x_THE: Tensor, rotation: Rotation) -> bool:
    """Whether the heads of a token lie side by side, and the tables are as they are made."""
    heads = all(x.stride(2) == 1 and x.stride(1) == x.shape[2] for x in (out_THE, x_THE))
    return heads and all(t.is_contiguous() and t.dtype == torch.float32 for t in rotation)


def _rotate_in_torch(out_THE: Tensor, x_THE: Tensor, rotation: Rotation, sign: float) -> None:
    cos, sin = rotation.cos_TE[:, None], rotation.sin_TE[:, None]
    a_THE, b_THE = x_THE.chunk(2, dim=-1)
    if x_THE.dtype != cos.dtype:
        a_THE, b_THE = a_THE.to(cos.dtype), b_THE.to(cos.dtype)
    half = x_THE.shape[-1] // 2
    turned_a = (a_THE * cos).addcmul_(b_THE, sin, value=-sign)
    turned_b = (b_THE * cos).addcmul_(a_THE, sin, value=sign)
    # only now, as out may be x
    out_THE[..., :half] = turned_a
    out_THE[..., half:] = turned_b


# ---- autograd ----------------------------------------------------------------------------------


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TE, sin_TE)
        y_THE = torch.empty_like(x_THE, memory_format=torch.contiguous_format)
        rotate_into(y_THE, x_THE, Rotation(cos_TE, sin_TE), 1.0)
        return y_THE

    @staticmethod
    def backward(ctx: Any, dy_THE: Tensor) -> tuple[Tensor, None, None]:
        dx_THE = torch.empty_like(dy_THE, memory_format=torch.contiguous_format)
        rotate_into(dx_THE, dy_THE, Rotation(*ctx.saved_tensors), -1.0)
        return dx_THE, None, None


def turn_heads(qkv_TN: Tensor, rotation: Rotation, num_heads: int) -> Heads:
    """Rotate the queries and keys of a fused projection where they lie; return views of it."""
    E = 2 * rotation.cos_TE.shape[-1]
    T, N = qkv_TN.shape
    x = qkv_TN.detach().view(T, N // E, E)
    H, G = num_heads, (x.shape[1] - num_heads) // 2
    turned = x[:, : H + G]
    rotate_into(turned, turned, rotation, 1.0)
    return Heads(x[:, :H], x[:, H : H + G], x[:, H + G :])


def turn_back(gradients: Sequence[Tensor], rotation: Rotation, room: int = 0) -> Tensor:
    """Gradient of the fused projection (T, N), with room columns free behind each row.

    Args:
        gradients: of queries, keys and values.
        rotation: the tokens' cos and sin.
        room: columns.
    """
    dq_THE, dk_TGE, dv_TGE = gradients
    T, H, E = dq_THE.shape
    G = dk_TGE.shape[1]
    dx_TN = with_room(dq_THE, (T, (H + 2 * G) * E), room)
    dx = dx_TN.view(T, H + 2 * G, E)
    rotate_into(dx[:, :H], dq_THE, rotation, -1.0)
    rotate_into(dx[:, H : H + G], dk_TGE, rotation, -1.0)
    dx[:, H + G :] = dv_TGE
    return dx_TN


class _SplitRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_TN: Tensor, cos_TE: Tensor, sin_TE: Tensor, H: int) -> Heads:
        ctx.save_for_backward(cos_TE, sin_TE)
        return turn_heads(qkv_TN, Rotation(cos_TE, sin_TE), H)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return turn_back(gradients, Rotation(*ctx.saved_tensors)), None, None, None


def rope(x_THE: Tensor, rotation: Rotation) -> Tensor:
    """Rotate every head of packed tokens by its position's angles.

    Args:
        x_THE: (T, heads, E) queries or keys.
        rotation: the tokens' cos and sin.

    Returns:
        (T, heads, E), contiguous, in x's dtype.

    Raises:
        ValueError: if the table does not have T rows of E/2 columns.
    """
    T, _, E = x_THE.shape
    _check(rotation, T, E)
    y_THE: Tensor = _Rope.apply(x_THE, *rotation)
    return y_THE


def split_rope(qkv_TN: Tensor, rotation: Rotation, num_heads: int) -> Heads:
    """Split the fused projection into heads and rotate queries and keys.

    The projection's memory belongs to the result: its queries and keys are rotated in place, so
    nothing else may read qkv_TN afterwards.

    Args:
        qkv_TN: (T, (H + 2G) * E) contiguous: H query heads, G key heads, G value heads.
        rotation: the tokens' cos and sin; E is twice its width.
        num_heads: H.

    Raises:
        ValueError: if the columns are not H + 2G heads of the table's width.
    """
    T, N = qkv_TN.shape
    E = 2 * rotation.cos_TE.shape[-1]
    _check(rotation, T, E)
    if N % E or num_heads >= N // E or (N // E - num_heads) % 2:
        raise ValueError(f"{N} columns are not {num_heads} query heads and pairs of width {E}")
    return Heads(*_SplitRope.apply(qkv_TN, *rotation, num_heads))


def _check(rotation: Rotation, T: int, E: int) -> None:
    for name, table in rotation._asdict().items():
        if table.shape != (T, E // 2):
            raise ValueError(f"{name} must be ({T}, {E // 2}), got {tuple(table.shape)}")
