"""Rotary position embedding on packed tokens, and the split of a fused qkv row.

    (a, b) -> (a cos - b sin, b cos + a sin),   angle = position * base^(-2i/E)
                                                       (Su et al. 2021, arXiv 2104.09864)

a is the first half of a head, b the second (Hugging Face's layout; Meta's interleaved weights are
permuted when they are loaded). The backward pass is the rotation by the negative angle.

Shapes   T = packed tokens, H = query heads, G = key/value heads, E = head width,
         N = (H + 2G) * E columns of the fused projection.
Numerics cos and sin are float32 tables gathered by position; rotation in float32 at least.
Saved    The two gathered tables, shared by all layers of a pack.
Bound    Memory: forward and backward each read and write T*N elements; on a GPU split_rope turns
         queries and keys where they lie, T*(H+G)*E elements, and leaves the values alone.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels.dispatch import cdiv, jit, launch, next_power_of_2, tl, uses_triton

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


def _rotate_into(out_THE: Tensor, x_THE: Tensor, rotation: Rotation, sign: float) -> None:
    """Write x rotated by sign times the angle; out may not overlap x."""
    cos, sin = rotation.cos_TE[:, None], rotation.sin_TE[:, None]
    a_THE, b_THE = x_THE.chunk(2, dim=-1)
    if x_THE.dtype != cos.dtype:
        a_THE, b_THE = a_THE.to(cos.dtype), b_THE.to(cos.dtype)
    half = x_THE.shape[-1] // 2
    out_THE[..., :half] = (a_THE * cos).addcmul_(b_THE, sin, value=-sign)
    out_THE[..., half:] = (b_THE * cos).addcmul_(a_THE, sin, value=sign)


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


def _launch_rotate(dst_THE: Tensor, src_THE: Tensor, rotation: Rotation, sign: float) -> None:
    """Write src rotated by sign times the angle into dst, which may be src itself."""
    T, heads, E = src_THE.shape
    if src_THE.stride(-1) != 1:
        src_THE = src_THE.contiguous()
    block = next_power_of_2(E // 2)
    tokens = max(1, 1024 // block)
    launch(
        _rotate, (cdiv(T, tokens), cdiv(heads, HEADS)),
        src_THE, dst_THE, rotation.cos_TE, rotation.sin_TE, T, heads, E // 2,
        *src_THE.stride()[:2], *dst_THE.stride()[:2], sign,
        HEADS=HEADS, BLOCK_T=tokens, BLOCK_E=block, num_warps=4,
    )  # fmt: skip


# ---- autograd ----------------------------------------------------------------------------------


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TE, sin_TE)
        y_THE = torch.empty_like(x_THE, memory_format=torch.contiguous_format)
        _rotate_into(y_THE, x_THE, Rotation(cos_TE, sin_TE), 1.0)
        return y_THE

    @staticmethod
    def backward(ctx: Any, dy_THE: Tensor) -> tuple[Tensor, None, None]:
        dx_THE = torch.empty_like(dy_THE, memory_format=torch.contiguous_format)
        _rotate_into(dx_THE, dy_THE, Rotation(*ctx.saved_tensors), -1.0)
        return dx_THE, None, None


class _SplitRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv_TN: Tensor, cos_TE: Tensor, sin_TE: Tensor, H: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        T, N = qkv_TN.shape
        E = 2 * cos_TE.shape[-1]
        G = (N // E - H) // 2
        ctx.save_for_backward(cos_TE, sin_TE)
        x = qkv_TN.view(T, H + 2 * G, E)
        # one buffer for the three, in the column order of the projection
        out = torch.empty_like(x)
        _rotate_into(out[:, : H + G], x[:, : H + G], Rotation(cos_TE, sin_TE), 1.0)
        out[:, H + G :] = x[:, H + G :]
        return out[:, :H], out[:, H : H + G], out[:, H + G :]

    @staticmethod
    def backward(
        ctx: Any, dq_THE: Tensor, dk_TGE: Tensor, dv_TGE: Tensor
    ) -> tuple[Tensor, None, None, None]:
        rotation = Rotation(*ctx.saved_tensors)
        T, H, E = dq_THE.shape
        G = dk_TGE.shape[1]
        dx = dq_THE.new_empty(T, H + 2 * G, E)
        _rotate_into(dx[:, :H], dq_THE, rotation, -1.0)
        _rotate_into(dx[:, H : H + G], dk_TGE, rotation, -1.0)
        dx[:, H + G :] = dv_TGE
        return dx.flatten(1), None, None, None


class _FusedRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TE, sin_TE)
        y_THE = torch.empty_like(x_THE, memory_format=torch.contiguous_format)
        _launch_rotate(y_THE, x_THE, Rotation(cos_TE, sin_TE), 1.0)
        return y_THE

    @staticmethod
    def backward(ctx: Any, dy_THE: Tensor) -> tuple[Tensor, None, None]:
        dx_THE = torch.empty_like(dy_THE, memory_format=torch.contiguous_format)
        _launch_rotate(dx_THE, dy_THE, Rotation(*ctx.saved_tensors), -1.0)
        return dx_THE, None, None


class _FusedSplitRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv_TN: Tensor, cos_TE: Tensor, sin_TE: Tensor, H: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        E = 2 * cos_TE.shape[-1]
        T, N = qkv_TN.shape
        x = qkv_TN.detach().view(T, N // E, E)
        G = (x.shape[1] - H) // 2
        ctx.save_for_backward(cos_TE, sin_TE)
        turned = x[:, : H + G]
        _launch_rotate(turned, turned, Rotation(cos_TE, sin_TE), 1.0)
        return x[:, :H], x[:, H : H + G], x[:, H + G :]

    @staticmethod
    def backward(
        ctx: Any, dq_THE: Tensor, dk_TGE: Tensor, dv_TGE: Tensor
    ) -> tuple[Tensor, None, None, None]:
        rotation = Rotation(*ctx.saved_tensors)
        T, H, E = dq_THE.shape
        G = dk_TGE.shape[1]
        dx = dq_THE.new_empty(T, H + 2 * G, E)
        _launch_rotate(dx[:, :H], dq_THE, rotation, -1.0)
        _launch_rotate(dx[:, H : H + G], dk_TGE, rotation, -1.0)
        dx[:, H + G :] = dv_TGE
        return dx.flatten(1), None, None, None


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
    function = _FusedRope if uses_triton(x_THE, *rotation) else _Rope
    y_THE: Tensor = function.apply(x_THE, *rotation)
    return y_THE


def split_rope(qkv_TN: Tensor, rotation: Rotation, num_heads: int) -> Heads:
    """Split the fused projection into heads and rotate queries and keys.

    The projection's memory belongs to the result: on a GPU its queries and keys are rotated in
    place, so nothing else may read qkv_TN afterwards.

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
    function = _FusedSplitRope if uses_triton(qkv_TN, *rotation) else _SplitRope
    return Heads(*function.apply(qkv_TN, *rotation, num_heads))


def _check(rotation: Rotation, T: int, E: int) -> None:
    for name, table in rotation._asdict().items():
        if table.shape != (T, E // 2):
            raise ValueError(f"{name} must be ({T}, {E // 2}), got {tuple(table.shape)}")
