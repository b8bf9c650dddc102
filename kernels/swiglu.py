"""SwiGLU, forward and backward.

    h = silu(gate) * up,   silu(z) = z * sigmoid(z)          (Shazeer 2020, arXiv 2002.05202)

Shapes   T = packed tokens, F = feed-forward width. gate and up lie side by side in one (T, 2F)
         buffer, as the fused gate+up projection writes them.
Numerics Loads and stores in the input dtype; the CPU's vectorised silu computes in float32.
Saved    gate_up only; h is the next projection's input and that one keeps it.
Bound    Memory: forward moves 3*T*F elements, backward 5*T*F.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# ---- reference ---------------------------------------------------------------------------------


def swiglu_reference(gate_up_T2F: Tensor) -> Tensor:
    """Compute what swiglu must compute, through plain autograd; float64 in, float64 out."""
    wide = torch.promote_types(gate_up_T2F.dtype, torch.float32)
    gate_TF, up_TF = gate_up_T2F.to(wide).chunk(2, dim=-1)
    return (gate_TF * torch.sigmoid(gate_TF) * up_TF).to(gate_up_T2F.dtype)


# ---- autograd ----------------------------------------------------------------------------------


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_T2F: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_T2F)
        gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
        return functional.silu(gate_TF).mul_(up_TF)

    @staticmethod
    def backward(ctx: Any, dh_TF: Tensor) -> Tensor:
        (gate_up_T2F,) = ctx.saved_tensors
        gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
        dgate_up_T2F = torch.empty_like(gate_up_T2F)
        dgate_TF, dup_TF = dgate_up_T2F.chunk(2, dim=-1)
        torch.mul(functional.silu(gate_TF), dh_TF, out=dup_TF)
        dgate_TF.copy_(torch.ops.aten.silu_backward(dh_TF * up_TF, gate_TF))
        return dgate_up_T2F


def swiglu(gate_up_T2F: Tensor) -> Tensor:
    """Gate the second half of each row by silu of the first half.

    Args:
        gate_up_T2F: (T, 2F) activations, gate in the first F columns, any float dtype.

    Returns:
        (T, F), in the input's dtype.

    Raises:
        ValueError: if the last dimension is odd.
    """
    if gate_up_T2F.ndim != 2 or gate_up_T2F.shape[1] % 2:
        raise ValueError(f"swiglu needs gate_up_T2F (T, 2F), got {tuple(gate_up_T2F.shape)}")
    h_TF: Tensor = _SwiGLU.apply(gate_up_T2F)
    return h_TF
