"""RMSNorm, alone and after a residual addition, forward and backward.

    y = h * r * w,   r = 1 / sqrt(mean(h^2) + eps),   h = x or x + delta
                                               (Zhang & Sennrich 2019, arXiv 1910.07467)

Shapes   T = packed tokens, D = model width, P = row splits of the gain's gradient.
Numerics Loads and stores in the input dtype, all arithmetic in at least float32; h is rounded
         before it is normed, so that backward, which reads it, sees the same numbers.
Saved    h_TD (the residual stream, alive anyway) and r_T; y is never saved.
Bound    Memory: forward moves 2*T*D elements (4*T*D with the addition), backward 3*T*D (4*T*D). The
         gain is frozen in LoRA tuning, so its gradient is computed only when asked for. A row up
         to BLOCK_D stays in registers; a wider one is read twice, the second time from cache.
"""

from ctypes import CDLL
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels.dispatch import cdiv, jit, launch, next_power_of_2, tl, uses_triton
from bioinstruct.kernels.native import addresses, native, threads_for
from bioinstruct.kernels.rows import with_dense_rows, with_room

BLOCK_D = 4096

# ---- reference ---------------------------------------------------------------------------------


def rmsnorm_reference(x_TD: Tensor, w_D: Tensor, eps: float = 1e-5) -> Tensor:
    """Compute what rmsnorm must compute, through plain autograd; float64 in, float64 out."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    x, w = x_TD.to(wide), w_D.to(wide)
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w).to(x_TD.dtype)


# ---- kernels -----------------------------------------------------------------------------------


@jit
def residual(x_ptr, delta_ptr, d, mask, ADD: tl.constexpr):
    """x, or x + delta, rounded to x's dtype."""
    x = tl.load(x_ptr + d, mask=mask, other=0.0)
    if ADD:
        delta = tl.load(delta_ptr + d, mask=mask, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) + delta).to(x_ptr.dtype.element_ty)
    return x


@jit
def _put_normed(h, r, w_ptr, h_ptr, y_ptr, d, mask, ADD: tl.constexpr):
    w = tl.load(w_ptr + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + d, (h.to(tl.float32) * r * w).to(y_ptr.dtype.element_ty), mask=mask)
    if ADD:
        tl.store(h_ptr + d, h, mask=mask)


@jit
def _rmsnorm_fwd(
    x_ptr, delta_ptr, w_ptr, h_ptr, y_ptr, r_ptr, D, y_stride, eps,
    ADD: tl.constexpr, ONE_PASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    x_ptr += t * D
    delta_ptr += t * D
    h_ptr += t * D
    y_ptr += t * y_stride
    d = tl.arange(0, BLOCK)
    if ONE_PASS:
        h = residual(x_ptr, delta_ptr, d, d < D, ADD)
        squares = h.to(tl.float32) * h.to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / D + eps)
        _put_normed(h, r, w_ptr, h_ptr, y_ptr, d, d < D, ADD)
    else:
        squares = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, D, BLOCK):
            h = residual(x_ptr, delta_ptr, start + d, start + d < D, ADD).to(tl.float32)
            squares += h * h
        r = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / D + eps)
        for start in range(0, D, BLOCK):
            h = residual(x_ptr, delta_ptr, start + d, start + d < D, ADD)
            _put_normed(h, r, w_ptr, h_ptr, y_ptr, start + d, start + d < D, ADD)
    tl.store(r_ptr + t, r)


@jit
def _weighted(dy_ptr, w_ptr, d, mask):
    """g = dy * w."""
    w = tl.load(w_ptr + d, mask=mask, other=0.0).to(tl.float32)
    return tl.load(dy_ptr + d, mask=mask, other=0.0).to(tl.float32) * w


@jit
def _put_gradient(g, h, r, c, dh_ptr, dx_ptr, d, mask, ADD: tl.constexpr):
    """dx = r g - c h, plus the gradient that reaches h past the norm."""
    dx = r * g - c * h
    if ADD:
        dx += tl.load(dh_ptr + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + d, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@jit
def _rmsnorm_bwd(
    dy_ptr, h_ptr, w_ptr, r_ptr, dh_ptr, dx_ptr, D, dy_stride, dh_stride, dx_stride,
    ADD: tl.constexpr, ONE_PASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    dy_ptr += t * dy_stride
    h_ptr += t * D
    dh_ptr += t * dh_stride
    dx_ptr += t * dx_stride
    r = tl.load(r_ptr + t)
    d = tl.arange(0, BLOCK)
    if ONE_PASS:
        h = tl.load(h_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        g = _weighted(dy_ptr, w_ptr, d, d < D)
        c = r * r * r * (tl.sum(g * h, axis=0) / D)
        _put_gradient(g, h, r, c, dh_ptr, dx_ptr, d, d < D, ADD)
    else:
        products = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, D, BLOCK):
            h = tl.load(h_ptr + start + d, mask=start + d < D, other=0.0).to(tl.float32)
            products += _weighted(dy_ptr, w_ptr, start + d, start + d < D) * h
        c = r * r * r * (tl.sum(products, axis=0) / D)
        for start in range(0, D, BLOCK):
            h = tl.load(h_ptr + start + d, mask=start + d < D, other=0.0).to(tl.float32)
            g = _weighted(dy_ptr, w_ptr, start + d, start + d < D)
            _put_gradient(g, h, r, c, dh_ptr, dx_ptr, start + d, start + d < D, ADD)


@jit
def _rmsnorm_dw(dy_ptr, h_ptr, r_ptr, dw_ptr, T, D, ROWS, BLOCK: tl.constexpr):
    # each program owns ROWS tokens of BLOCK columns, and one part of a row of the partial dw_PD
    p = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dw = tl.zeros((BLOCK,), dtype=tl.float32)
    for t in range(p * ROWS, tl.minimum((p + 1) * ROWS, T)):
        h = tl.load(h_ptr + t * D + d, mask=d < D, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + t * D + d, mask=d < D, other=0.0).to(tl.float32)
        dw += dy * h * tl.load(r_ptr + t)
    tl.store(dw_ptr + p * D + d, dw, mask=d < D)


def _blocks(D: int) -> dict[str, Any]:
    """Constants of the kernels for rows of D elements: 16 of them a thread."""
    block = next_power_of_2(min(D, BLOCK_D))
    return {"ONE_PASS": block >= D, "BLOCK": block, "num_warps": max(1, block // 512)}


def _gain_gradient(dy_TD: Tensor, h_TD: Tensor, r_T: Tensor, w_D: Tensor) -> Tensor:
    if not uses_triton(dy_TD, h_TD, w_D):
        return (dy_TD * h_TD * r_T[:, None]).sum(0).to(w_D.dtype)
    T, D = h_TD.shape
    rows = max(1, cdiv(T, 64))
    parts = max(1, cdiv(T, rows))
    dw_PD = h_TD.new_empty(parts, D, dtype=torch.float32)
    block = min(512, next_power_of_2(D))
    grid = (cdiv(D, block), parts)
    launch(_rmsnorm_dw, grid, dy_TD, h_TD, r_T, dw_PD, T, D, rows, BLOCK=block, num_warps=4)
    return dw_PD.sum(0).to(w_D.dtype)


# ---- forward and backward ------------------------------------------------------------------------


class Normed(NamedTuple):
    """What the forward pass wrote."""

    h_TD: Tensor
    """What was normed: x itself, or its sum with delta."""
    y_TD: Tensor
    """Its norm, with room behind the rows where that was asked for."""
    r_T: Tensor
    """Reciprocal root mean squares, float32 at least."""


def norm_forward(
    x_TD: Tensor, delta_TD: Tensor | None, w_D: Tensor, eps: float, room: int = 0
) -> Normed:
    """Add and norm, in one pass but for torch's; room is how many columns stay free behind each
    row of y, on a GPU."""
    if not uses_triton(x_TD, w_D):
        return _forward_on_cpu(x_TD, delta_TD, w_D, eps)
    T, D = x_TD.shape
    x_TD, add = x_TD.contiguous(), delta_TD is not None
    h_TD = torch.empty_like(x_TD) if add else x_TD
    delta = delta_TD.contiguous() if delta_TD is not None else x_TD
    y_TD, r_T = with_room(x_TD, (T, D), room), x_TD.new_empty(T, dtype=torch.float32)
    tensors = x_TD, delta, w_D.contiguous(), h_TD, y_TD, r_T
    launch(_rmsnorm_fwd, (T,), *tensors, D, y_TD.stride(0), eps, ADD=add, **_blocks(D))
    return Normed(h_TD, y_TD, r_T)


def _library(first: Tensor, *others: Tensor | None) -> CDLL | None:
    """The operations in C, where all tensors are of one dtype."""
    alike = all(x is None or x.dtype == first.dtype for x in others)
    return native(first) if alike else None


def _forward_on_cpu(x_TD: Tensor, delta_TD: Tensor | None, w_D: Tensor, eps: float) -> Normed:
    T, D = x_TD.shape
    library = _library(x_TD, delta_TD, w_D)
    if library is None:
        h_TD = x_TD if delta_TD is None else x_TD + delta_TD
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        # vector_norm widens while it reads, so no squared copy of h is made
        norm_T1 = torch.linalg.vector_norm(h_TD, dim=-1, keepdim=True, dtype=wide)
        r_T1 = norm_T1.square_().div_(D).add_(eps).rsqrt_()
        y_TD: Tensor = (h_TD * r_T1).mul_(w_D.to(wide)).to(x_TD.dtype)
        return Normed(h_TD, y_TD, r_T1[:, 0])
    x_TD, w_D = x_TD.contiguous(), w_D.contiguous()
    delta_TD = None if delta_TD is None else delta_TD.contiguous()
    h_TD = x_TD if delta_TD is None else torch.empty_like(x_TD)
    y_TD, r_T = torch.empty_like(x_TD), x_TD.new_empty(T, dtype=torch.float32)
    tensors = x_TD, delta_TD, w_D, h_TD, y_TD, r_T
    library.norm(*addresses(*tensors), T, D, eps, threads_for(T * D))
    return Normed(h_TD, y_TD, r_T)


def norm_backward(
    dy_TD: Tensor, h_TD: Tensor, w_D: Tensor, r_T: Tensor, dh_TD: Tensor | None, room: int = 0
) -> Tensor:
    """Gradient through the norm; dh is the gradient that reaches h past it.

    Returns:
        (T, D) gradient of x and of delta alike, with room columns free behind each row, on a GPU.
    """
    if not uses_triton(dy_TD, h_TD, w_D):
        return norm_backward_on_cpu(dy_TD, h_TD, w_D, r_T, dh_TD)[0]
    T, D = h_TD.shape
    dx_TD = with_room(h_TD, (T, D), room)
    add, dy_TD = dh_TD is not None, with_dense_rows(dy_TD)
    dh = dy_TD if dh_TD is None else with_dense_rows(dh_TD)
    tensors = dy_TD, h_TD, w_D.contiguous(), r_T, dh, dx_TD
    strides = dy_TD.stride(0), dh.stride(0), dx_TD.stride(0)
    launch(_rmsnorm_bwd, (T,), *tensors, D, *strides, ADD=add, **_blocks(D))
    return dx_TD


def norm_backward_on_cpu(
    dy_TD: Tensor,
    h_TD: Tensor,
    w_D: Tensor,
    r_T: Tensor,
    dh_TD: Tensor | None,
    *,
    again: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Do as norm_backward does without a kernel of Triton's: in C, or in torch on any device.

    Returns:
        The gradient, and y once more if again.
    """
    T, D = h_TD.shape
    library = _library(h_TD, dy_TD, dh_TD, w_D)
    if library is None:
        r_T1, wide = r_T[:, None], r_T.dtype
        h, g = h_TD.to(wide), dy_TD * w_D.to(wide)
        c_T1 = (g * h).mean(-1, keepdim=True).mul_(r_T1.pow(3))
        dx = g.mul_(r_T1).addcmul_(h, c_T1, value=-1)
        dx_TD = (dx if dh_TD is None else dx.add_(dh_TD)).to(h_TD.dtype)
        y_TD = (h_TD * r_T1).mul_(w_D.to(wide)).to(h_TD.dtype) if again else None
        return dx_TD, y_TD
    dy_TD, h_TD, w_D = dy_TD.contiguous(), h_TD.contiguous(), w_D.contiguous()
    dx_TD = torch.empty_like(h_TD)
    dh_TD = None if dh_TD is None else dh_TD.contiguous()
    y_TD = torch.empty_like(h_TD) if again else None
    tensors = dy_TD, h_TD, w_D, r_T, dh_TD, dx_TD, y_TD
    library.norm_back(*addresses(*tensors), T, D, threads_for(T * D))
    return dx_TD, y_TD


# ---- autograd ----------------------------------------------------------------------------------


class _RMSNorm(torch.autograd.Function):
    """y of x; or h and y of x and delta."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, delta_TD: Tensor | None, w_D: Tensor, eps: float, room: int
    ) -> Any:
        h_TD, y_TD, r_T = norm_forward(x_TD, delta_TD, w_D, eps)
        ctx.save_for_backward(h_TD, w_D, r_T)
        ctx.set_materialize_grads(False)
        ctx.room = room
        return y_TD if delta_TD is None else (h_TD, y_TD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        h_TD, w_D, r_T = ctx.saved_tensors
        dh_TD, dy_TD = gradients if len(gradients) == 2 else (None, gradients[0])
        if dy_TD is None:
            return dh_TD, dh_TD, None, None, None
        dx_TD = dw_D = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            dx_TD = norm_backward(dy_TD, h_TD, w_D, r_T, dh_TD, ctx.room)
        if ctx.needs_input_grad[2]:
            dw_D = _gain_gradient(dy_TD.contiguous(), h_TD, r_T, w_D)
        return dx_TD, dx_TD if ctx.needs_input_grad[1] else None, dw_D, None, None


def rmsnorm(x_TD: Tensor, w_D: Tensor, eps: float = 1e-5) -> Tensor:
    """Root-mean-square norm over the last dimension.

    Args:
        x_TD: (T, D) activations, any float dtype.
        w_D: (D,) gain.
        eps: added to the mean square, in the units of x squared.

    Returns:
        (T, D), in x's dtype.

    Raises:
        ValueError: if the shapes do not match.
    """
    if x_TD.ndim != 2 or w_D.shape != x_TD.shape[1:]:
        raise ValueError(
            f"rmsnorm needs x_TD (T, D) and w_D (D,), got {tuple(x_TD.shape)}, {tuple(w_D.shape)}"
        )
    y_TD: Tensor = _RMSNorm.apply(x_TD, None, w_D, eps, 0)
    return y_TD


def add_rmsnorm(
    x_TD: Tensor, delta_TD: Tensor, w_D: Tensor, eps: float = 1e-5, room: int = 0
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and norm the sum, in one pass.

    Args:
        x_TD: (T, D) residual stream.
        delta_TD: (T, D) what a sub-layer adds, in x's dtype.
        w_D: (D,) gain.
        eps: added to the mean square, in the units of x squared.
        room: columns to leave free behind the rows of delta's gradient, on a GPU.

    Returns:
        The sum, rounded to x's dtype, and its norm; both (T, D).

    Raises:
        ValueError: if the shapes do not match.
    """
    if x_TD.ndim != 2 or delta_TD.shape != x_TD.shape or w_D.shape != x_TD.shape[1:]:
        raise ValueError(
            f"add_rmsnorm needs x_TD and delta_TD (T, D) and w_D (D,), got {tuple(x_TD.shape)}, "
            f"{tuple(delta_TD.shape)}, {tuple(w_D.shape)}"
        )
    h_TD, y_TD = _RMSNorm.apply(x_TD, delta_TD, w_D, eps, room)
    return h_TD, y_TD
