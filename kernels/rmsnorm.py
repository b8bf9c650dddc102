"""RMSNorm, forward and backward.

    y = x * r * w,   r = 1 / sqrt(mean(x^2) + eps)      (Zhang & Sennrich 2019, arXiv 1910.07467)

Shapes   T = packed tokens, D = model width.
Numerics Loads and stores in the input dtype, all arithmetic in at least float32.
Saved    x_TD (the residual stream, alive anyway) and r_T; y is never saved.
Bound    Memory: forward moves 2*T*D elements, backward 3*T*D. The gain is frozen in LoRA tuning, so
         its gradient is computed only when asked for.
"""

from typing import Any

import torch
from torch import Tensor

# ---- reference ---------------------------------------------------------------------------------


def rmsnorm_reference(x_TD: Tensor, w_D: Tensor, eps: float = 1e-5) -> Tensor:
    """Compute what rmsnorm must compute, through plain autograd; float64 in, float64 out."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    x, w = x_TD.to(wide), w_D.to(wide)
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w).to(x_TD.dtype)


# ---- autograd ----------------------------------------------------------------------------------


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        # vector_norm widens while it reads, so no squared copy of x is made
        norm_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True, dtype=wide)
        r_T1 = norm_T1.square_().div_(x_TD.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, w_D, r_T1)
        y_TD: Tensor = (x_TD * r_T1).mul_(w_D.to(wide)).to(x_TD.dtype)
        return y_TD

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TD, w_D, r_T1 = ctx.saved_tensors
        wide = r_T1.dtype
        dx_TD = dw_D = None
        if ctx.needs_input_grad[1]:
            dw_D = (dy_TD * x_TD * r_T1).sum(0).to(w_D.dtype)
        if ctx.needs_input_grad[0]:
            x, g = x_TD.to(wide), dy_TD * w_D.to(wide)
            c_T1 = (g * x).mean(-1, keepdim=True).mul_(r_T1.pow(3))
            dx_TD = g.mul_(r_T1).addcmul_(x, c_T1, value=-1).to(x_TD.dtype)
        return dx_TD, dw_D, None


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
    y_TD: Tensor = _RMSNorm.apply(x_TD, w_D, eps)
    return y_TD
