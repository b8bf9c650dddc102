"""SwiGLU, forward and backward.

    h = silu(gate) * up,   silu(z) = z * sigmoid(z)          (Shazeer 2020, arXiv 2002.05202)

Shapes   T = packed tokens, F = feed-forward width. gate and up lie side by side in one (T, 2F)
         buffer, as the fused gate+up projection writes them.
Numerics Loads and stores in the input dtype; all computes in float32 and rounds h once,
         but for torch's operations, which round silu(gate) too.
Saved    gate_up only; h is the next projection's input and that one keeps it.
Bound    Memory: forward moves 3*T*F elements, backward 5*T*F.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bioinstruct.kernels.dispatch import cdiv, jit, launch, next_power_of_2, tl, uses_triton
from bioinstruct.kernels.native import addresses, native, threads_for
from bioinstruct.kernels.rows import with_room

BLOCK_F = 1024

# ---- reference ---------------------------------------------------------------------------------


def swiglu_reference(gate_up_T2F: Tensor) -> Tensor:
    """Compute what swiglu must compute, through plain autograd; float64 in, float64 out."""
    wide = torch.promote_types(gate_up_T2F.dtype, torch.float32)
    gate_TF, up_TF = gate_up_T2F.to(wide).chunk(2, dim=-1)
    return (gate_TF * torch.sigmoid(gate_TF) * up_TF).to(gate_up_T2F.dtype)


# ---- kernels -----------------------------------------------------------------------------------


@jit
def _swiglu_fwd(gate_up_ptr, h_ptr, F, h_stride, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up_ptr + t * 2 * F + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + t * 2 * F + F + f, mask=f < F, other=0.0).to(tl.float32)
    h = gate * tl.sigmoid(gate) * up
    tl.store(h_ptr + t * h_stride + f, h.to(h_ptr.dtype.element_ty), mask=f < F)


@jit
def _swiglu_bwd(
    dh_ptr, gate_up_ptr, dgate_up_ptr, h_ptr, F, dgate_up_stride,
    AGAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dh = tl.load(dh_ptr + t * F + f, mask=f < F, other=0.0).to(tl.float32)
    gate = tl.load(gate_up_ptr + t * 2 * F + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + t * 2 * F + F + f, mask=f < F, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    silu = gate * s
    # silu' = s + silu (1 - s)
    dgate = dh * up * (s + silu * (1.0 - s))
    narrow = dgate_up_ptr.dtype.element_ty
    dgate_up_ptr += t * dgate_up_stride
    tl.store(dgate_up_ptr + f, dgate.to(narrow), mask=f < F)
    tl.store(dgate_up_ptr + F + f, (dh * silu).to(narrow), mask=f < F)
    if AGAIN:
        tl.store(h_ptr + t * F + f, (silu * up).to(narrow), mask=f < F)


def _over_rows(kernel: Any, T: int, F: int, *arguments: Any, **constants: Any) -> None:
    block = min(BLOCK_F, next_power_of_2(F))
    launch(kernel, (T, cdiv(F, block)), *arguments, **constants, BLOCK=block, num_warps=4)


def swiglu_forward(gate_up_T2F: Tensor, room: int = 0) -> Tensor:
    """The gated product; room is how many columns stay free behind each row of h, on a GPU."""
    if not uses_triton(gate_up_T2F):
        return _forward_on_cpu(gate_up_T2F)
    T, F = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    h_TF = with_room(gate_up_T2F, (T, F), room)
    _over_rows(_swiglu_fwd, T, F, gate_up_T2F, h_TF, F, h_TF.stride(0))
    return h_TF


def swiglu_backward(
    dh_TF: Tensor, gate_up_T2F: Tensor, room: int = 0, *, again: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Gradient through the gated product.

    Returns:
        The gradient of gate_up, with room columns free behind each row, on a GPU; and h once more
        if again.
    """
    if not uses_triton(gate_up_T2F):
        return _backward_on_cpu(dh_TF, gate_up_T2F, again)
    T, F = dh_TF.shape
    dgate_up_T2F = with_room(gate_up_T2F, gate_up_T2F.shape, room)
    h_TF = torch.empty_like(dh_TF) if again else None
    tensors = dh_TF, gate_up_T2F, dgate_up_T2F, dh_TF if h_TF is None else h_TF
    _over_rows(_swiglu_bwd, T, F, *tensors, F, dgate_up_T2F.stride(0), AGAIN=again)
    return dgate_up_T2F, h_TF


def _forward_on_cpu(gate_up_T2F: Tensor) -> Tensor:
    T, F = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    library = native(gate_up_T2F)
    if library is None:
        gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
        return functional.silu(gate_TF).mul_(up_TF)
    gate_up_T2F = gate_up_T2F.contiguous()
    h_TF = gate_up_T2F.new_empty(T, F)
    library.gated(*addresses(gate_up_T2F, h_TF), T, F, threads_for(T * F))
    return h_TF


def _backward_on_cpu(
    dh_TF: Tensor, gate_up_T2F: Tensor, again: bool
) -> tuple[Tensor, Tensor | None]:
    T, F = dh_TF.shape
    gate_up_T2F = gate_up_T2F.contiguous()
    dgate_up_T2F = torch.empty_like(gate_up_T2F)
    library = native(gate_up_T2F) if dh_TF.dtype == gate_up_T2F.dtype else None
    if library is None:
        (gate_TF, up_TF), (dgate_TF, dup_TF) = (
            both.chunk(2, dim=-1) for both in (gate_up_T2F, dgate_up_T2F)
        )
        silu_TF = functional.silu(gate_TF)
        torch.mul(silu_TF, dh_TF, out=dup_TF)
        torch.mul(dh_TF, up_TF, out=dgate_TF)
        torch.ops.aten.silu_backward.grad_input(dgate_TF, gate_TF, grad_input=dgate_TF)
        return dgate_up_T2F, silu_TF.mul_(up_TF) if again else None
    h_TF = torch.empty_like(dh_TF) if again else None
    tensors = dh_TF.contiguous(), gate_up_T2F, dgate_up_T2F, h_TF
    library.gated_back(*addresses(*tensors), T, F, threads_for(T * F))
    return dgate_up_T2F, h_TF


# ---- autograd ----------------------------------------------------------------------------------


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_T2F: Tensor) -> Tensor:
        gate_up_T2F = gate_up_T2F.contiguous()
        ctx.save_for_backward(gate_up_T2F)
        return swiglu_forward(gate_up_T2F)

    @staticmethod
    def backward(ctx: Any, dh_TF: Tensor) -> Tensor:
        return swiglu_backward(dh_TF.contiguous(), *ctx.saved_tensors)[0]


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
