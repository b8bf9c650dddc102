"""Linear cross-entropy over supervised rows only; the logits never exist as a whole.

    loss = scale * sum_s ( logsumexp(z_s) - z_s[label_s] ),   z_s = h[rows_s] W^T

The gradient with respect to h is computed chunk by chunk in the forward pass, in the buffer of the
logits: dz = scale * (softmax(z) - onehot); so is that of the head W, where W trains. scale is
1 / supervised tokens of the whole step, known before the forward pass, so gradients of
micro-batches and ranks just add up.

Shapes   T = packed tokens, D = model width, S = supervised rows, V = vocabulary.
Numerics Logits by one GEMM in h's dtype; log-sum-exp, loss and softmax in at least float32.
         dW is summed over chunks in at least float32.
Saved    dh_SD of the supervised rows; dW_VD where W trains.
Bound    FLOPs: 4*S*D*V with gradient, 2*S*D*V without. The kernel reads a chunk of logits twice,
         the second time from cache, and writes the gradient in its place.
"""

from typing import Any

import torch
from torch import Tensor

from bioinstruct.kernels.dispatch import jit, launch, next_power_of_2, tl, uses_triton
from bioinstruct.kernels.native import addresses, native, threads_for

CHUNK_BYTES = 32 << 20  # logits of one chunk: enough rows for a GEMM that reads the whole head
SOFTMAX_BYTES = 2 << 20  # of these, rows made wide at once: they stay in a CPU core's cache
GPU_CHUNK_BYTES = 256 << 20  # 4,096 rows of 32,000 bfloat16 logits: whole tiles for the GEMMs
BLOCK_V = 4096


# ---- reference ---------------------------------------------------------------------------------


def linear_cross_entropy_reference(
    h_TD: Tensor, w_VD: Tensor, rows_S: Tensor, labels_S: Tensor, scale: float = 1.0
) -> Tensor:
    """Compute what linear_cross_entropy must compute, with whole logits and plain autograd."""
    wide = torch.promote_types(h_TD.dtype, torch.float32)
    z_SV = (h_TD[rows_S] @ w_VD.to(h_TD.dtype).T).to(wide)
    picked_S = z_SV.gather(1, labels_S[:, None])[:, 0]
    return (z_SV.logsumexp(-1) - picked_S).sum() * scale


# ---- kernel ------------------------------------------------------------------------------------


@jit
def _softmax_gradient(z_ptr, label_ptr, loss_ptr, V, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    # one program owns one row: its loss, and softmax - onehot over its logits
    s = tl.program_id(0).to(tl.int64)
    z_ptr += s * V
    label = tl.load(label_ptr + s)
    # read before any thread writes: the reductions below are barriers
    picked = tl.load(z_ptr + label).to(tl.float32)
    v = tl.arange(0, BLOCK)
    largest = -3.0e38
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        z = tl.load(z_ptr + start + v, mask=start + v < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, tl.max(z, axis=0))
        total = total * tl.exp(largest - higher) + tl.exp(z - higher)
        largest = higher
    lse = largest + tl.log(tl.sum(total, axis=0))
    tl.store(loss_ptr + s, lse - picked)
    if GRAD:
        for start in range(0, V, BLOCK):
            z = tl.load(z_ptr + start + v, mask=start + v < V, other=0.0).to(tl.float32)
            p = tl.exp(z - lse)
            dz = tl.where(start + v == label, p - 1.0, p)
            tl.store(z_ptr + start + v, dz.to(z_ptr.dtype.element_ty), mask=start + v < V)


# ---- autograd ----------------------------------------------------------------------------------


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_TD: Tensor, w_VD: Tensor, rows_S: Tensor, labels_S: Tensor, scale: float
    ) -> Tensor:
        wide = torch.promote_types(h_TD.dtype, torch.float32)
        S, V = len(rows_S), len(w_VD)
        loss = torch.zeros((), dtype=wide, device=h_TD.device)
        wants_grad = ctx.needs_input_grad[0]
        dh_SD = h_TD.new_empty(S, h_TD.shape[1]) if wants_grad else None
        dw_VD = torch.zeros_like(w_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        chunk = max(1, CHUNK_BYTES // (V * h_TD.itemsize))
        for start in range(0, S, chunk):
            part = slice(start, start + chunk)
            logits = h_TD[rows_S[part]] @ w_VD.T
            loss += _gradient_on_cpu(logits, labels_S[part], wants_grad)
            if dh_SD is not None:
                torch.mm(logits, w_VD, out=dh_SD[part]).mul_(scale)
                _add_head_gradient(dw_VD, logits, h_TD[rows_S[part]])
        _keep(ctx, dh_SD, dw_VD, h_TD, rows_S, scale)
        return loss * scale

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        dh_SD, rows_S, dw_VD = ctx.saved_tensors
        dh_TD = dh_SD.new_zeros(ctx.shape)
        # a row may be supervised once only, so plain copies need no accumulation
        dh_TD[rows_S] = dh_SD * dloss.to(dh_SD.dtype)
        dw_VD = None if dw_VD is None else (dw_VD * dloss).to(dh_SD.dtype)
        return dh_TD, dw_VD, None, None, None


def _gradient_on_cpu(z_SV: Tensor, labels_S: Tensor, wants_grad: bool) -> Tensor:
    """Sum of the rows' losses; where wanted, make of the logits their gradient."""
    S, V = z_SV.shape
    if (library := native(z_SV)) is not None:
        labels_S = labels_S.contiguous()
        if not labels_S.is_meta:
            _check_labels(labels_S, V)
        losses_S = z_SV.new_empty(S, dtype=torch.float32)
        tensors = addresses(z_SV, labels_S, losses_S)
        library.cross_entropy(*tensors, S, V, wants_grad, threads_for(S * V))
        return losses_S.sum(dtype=torch.float64)
    wide = torch.promote_types(z_SV.dtype, torch.float32)
    few, total = max(1, SOFTMAX_BYTES // (V * wide.itemsize)), z_SV.new_zeros((), dtype=wide)
    for z, labels in zip(z_SV.split(few), labels_S[:, None].split(few), strict=True):
        p = z.softmax(-1, dtype=wide)
        # the largest probability is exp(0) / sum, at least 1 / V, so its log is safe
        lse = z.amax(-1, keepdim=True).to(wide) - p.amax(-1, keepdim=True).log_()
        total += (lse - z.gather(1, labels)).sum()
        if wants_grad:
            z.copy_(p.scatter_add_(1, labels, -torch.ones_like(lse)))
    return total


def _check_labels(labels_S: Tensor, V: int) -> None:
    """Refuse what the loop in C would look up outside the logits, as torch's operations do."""
    labels = labels_S.numpy()
    if labels.dtype != "int64" or len(labels) and (labels.min() < 0 or labels.max() >= V):
        raise IndexError(f"labels_S must be int64 from 0 to {V - 1}, got {labels_S}")


def _add_head_gradient(dw_VD: Tensor | None, dz_SV: Tensor, h_SD: Tensor) -> None:
    if dw_VD is not None:
        dw_VD += torch.mm(dz_SV.T, h_SD)


def _keep(
    ctx: Any,
    dh_SD: Tensor | None,
    dw_VD: Tensor | None,
    h_TD: Tensor,
    rows_S: Tensor,
    scale: float,
) -> None:
    if dh_SD is not None:
        ctx.save_for_backward(dh_SD, rows_S, None if dw_VD is None else dw_VD.mul_(scale))
        ctx.shape = h_TD.shape


class _FusedLinearCrossEntropy(_LinearCrossEntropy):
    @staticmethod
    def forward(
        ctx: Any, h_TD: Tensor, w_VD: Tensor, rows_S: Tensor, labels_S: Tensor, scale: float
    ) -> Tensor:
        S, V = len(rows_S), len(w_VD)
        losses_S = h_TD.new_empty(S, dtype=torch.float32)
        wants_grad = ctx.needs_input_grad[0]
        dh_SD = h_TD.new_empty(S, h_TD.shape[1]) if wants_grad else None
        dw_VD = torch.zeros_like(w_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        constants = {"GRAD": wants_grad, "BLOCK": min(BLOCK_V, next_power_of_2(V))}
        chunk = max(1, GPU_CHUNK_BYTES // (V * h_TD.itemsize))
        for start in range(0, S, chunk):
            part = slice(start, start + chunk)
            z = h_TD[rows_S[part]] @ w_VD.T
            tensors = z, labels_S[part], losses_S[part]
            launch(_softmax_gradient, (len(z),), *tensors, V, **constants, num_warps=8)
            if dh_SD is not None:
                torch.addmm(dh_SD[part], z, w_VD, beta=0, alpha=scale, out=dh_SD[part])
                _add_head_gradient(dw_VD, z, h_TD[rows_S[part]])
        _keep(ctx, dh_SD, dw_VD, h_TD, rows_S, scale)
        return losses_S.sum() * scale


def linear_cross_entropy(
    h_TD: Tensor, w_VD: Tensor, rows_S: Tensor, labels_S: Tensor, scale: float = 1.0
) -> Tensor:
    """Sum of the supervised tokens' negative log-likelihoods, times scale.

    Args:
        h_TD: (T, D) final hidden states.
        w_VD: (V, D) output head, frozen or trained along, in h's dtype.
        rows_S: (S,) int64, the supervised rows of h, each at most once; S may be 0.
        labels_S: (S,) int64, the token that follows each of these rows.
        scale: factor of the loss and its gradient.

    Returns:
        A scalar in at least float32; zero, with zero gradients, when S is 0.

    Raises:
        ValueError: if the shapes do not match.
    """
    if h_TD.ndim != 2 or w_VD.ndim != 2 or h_TD.shape[1] != w_VD.shape[1]:
        raise ValueError(
            f"linear_cross_entropy needs h_TD (T, D) and w_VD (V, D), got {tuple(h_TD.shape)}, "
            f"{tuple(w_VD.shape)}"
        )
    if rows_S.shape != labels_S.shape or rows_S.ndim != 1:
        raise ValueError(
            f"rows_S and labels_S must be (S,) alike, got {tuple(rows_S.shape)}, "
            f"{tuple(labels_S.shape)}"
        )
    function = _FusedLinearCrossEntropy if uses_triton(h_TD, w_VD) else _LinearCrossEntropy
    loss: Tensor = function.apply(h_TD, w_VD, rows_S, labels_S, scale)
    return loss
