"""The two halves of a transformer layer with LoRA over copied masters: the path without Triton.

    h = x + delta
    y = linear(norm(h))                                                              norm_linear
    y = down(silu(gate) * up),   gate, up = gate_up(norm(h))                         norm_mlp

What sublayers.py is to the kernels. As one function a half keeps less than its operations would one
by one: what norms and gates give is made again in the backward pass, where the gradient's pass has
its inputs at hand, for a hundredth of the time (LOG.md). Weights, gains and biases are frozen.

Shapes   T = packed tokens, D = model width, N = output features of a group, F = feed-forward width,
         R = ranks.
Saved    h, r_T, t of every group, gate and up.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels.lora_copied import Frozen
from bioinstruct.kernels.rmsnorm import norm_backward_on_cpu, norm_forward
from bioinstruct.kernels.rows import with_dense_rows
from bioinstruct.kernels.swiglu import swiglu_backward, swiglu_forward


class Gain(NamedTuple):
    """The norm before a half."""

    gain_D: Tensor
    eps: float


def _back_through_norm(
    saved: tuple[Tensor, Tensor],
    norm: Gain,
    linear: Frozen,
    gradients: tuple[Tensor, Tensor | None, Tensor | None],
    *,
    wanted: bool,
) -> Tensor | None:
    """Gradient of the residual stream; dA is added where it belongs.

    Args:
        saved: h_TD and r_T.
        norm: of the half.
        linear: the projection behind it.
        gradients: of the projection and its branches, dy_TN and ds_TR; and dh_TD, that reaches h
            past the norm.
        wanted: whether the residual stream's is; the embedding's is not.
    """
    (h_TD, r_T), (dy_TN, ds_TR, dh_TD) = saved, gradients
    if not wanted:
        linear.into_a(norm_forward(h_TD, None, *norm).y_TD, ds_TR)
        return None
    dn_TD = linear.input_gradient(dy_TN, ds_TR)
    given = dn_TD, h_TD, norm.gain_D, r_T, dh_TD
    dx_TD, n_TD = norm_backward_on_cpu(*given, again=ds_TR is not None)
    if n_TD is not None:
        linear.into_a(n_TD, ds_TR)
    return dx_TD


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        delta_TD: Tensor | None,
        norm: Gain,
        linear: Frozen,
        bias_N: Tensor | None,
        master: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        del master  # autograd's alone
        h_TD, n_TD, r_T = norm_forward(x_TD, delta_TD, *norm)
        y_TN, t_TR = linear.forward(n_TD)
        ctx.save_for_backward(h_TD, r_T, t_TR)
        ctx.norm, ctx.linear, ctx.adds = norm, linear, delta_TD is not None
        ctx.set_materialize_grads(False)
        y_TN = y_TN if bias_N is None else y_TN.add_(bias_N)
        # with or without a delta, the gradient past the norm is added in one way, to the last bit
        return (h_TD if ctx.adds else h_TD.view_as(h_TD)), y_TN

    @staticmethod
    def backward(ctx: Any, dh_TD: Tensor | None, dy_TN: Tensor | None) -> tuple[Tensor | None, ...]:
        h_TD, r_T, t_TR = ctx.saved_tensors
        if dy_TN is None:
            return dh_TD, dh_TD if ctx.adds else None, None, None, None, None
        dy_TN = with_dense_rows(dy_TN)
        found = dy_TN, ctx.linear.into_b(dy_TN, t_TR), dh_TD
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dx_TD = _back_through_norm((h_TD, r_T), ctx.norm, ctx.linear, found, wanted=wanted)
        return dx_TD, dx_TD if ctx.adds else None, None, None, None, None


def copied_norm_linear(
    x_TD: Tensor,
    delta_TD: Tensor | None,
    norm: Gain,
    linear: Frozen,
    bias_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add delta to the residual stream, norm it, and project it.

    Args:
        x_TD: (T, D) residual stream.
        delta_TD: (T, D) what is added to it, or None for nothing.
        norm: its gain and eps.
        linear: the projection.
        bias_N: of the projection.

    Returns:
        The sum, and (T, N).
    """
    given = x_TD, delta_TD, norm, linear, bias_N, linear.master
    h_TD, y_TN = _NormLinear.apply(*given)
    return h_TD, y_TN


class _NormMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        delta_TD: Tensor,
        norm: Gain,
        gate_up: Frozen,
        down: Frozen,
        *masters: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        del masters  # autograd's alone
        h_TD, n_TD, r_T = norm_forward(x_TD, delta_TD, *norm)
        gate_up_T2F, t_TR = gate_up.forward(n_TD)
        y_TD, t_down_TR = down.forward(swiglu_forward(gate_up_T2F))
        ctx.save_for_backward(h_TD, r_T, t_TR, gate_up_T2F, t_down_TR)
        ctx.norm, ctx.gate_up, ctx.down = norm, gate_up, down
        ctx.set_materialize_grads(False)
        return h_TD, y_TD

    @staticmethod
    def backward(ctx: Any, dh_TD: Tensor | None, dy_TD: Tensor | None) -> tuple[Tensor | None, ...]:
        h_TD, r_T, t_TR, gate_up_T2F, t_down_TR = ctx.saved_tensors
        gate_up, down = ctx.gate_up, ctx.down
        if dy_TD is None:
            return dh_TD, dh_TD, None, None, None, None, None
        dy_TD = with_dense_rows(dy_TD)
        ds_down_TR = down.into_b(dy_TD, t_down_TR)
        da_TF = down.input_gradient(dy_TD, ds_down_TR)
        again = ds_down_TR is not None
        dy_T2F, a_TF = swiglu_backward(da_TF, gate_up_T2F, again=again)
        if a_TF is not None:
            down.into_a(a_TF, ds_down_TR)
        found = dy_T2F, gate_up.into_b(dy_T2F, t_TR), dh_TD
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dx_TD = _back_through_norm((h_TD, r_T), ctx.norm, gate_up, found, wanted=wanted)
        return dx_TD, dx_TD, None, None, None, None, None


def copied_norm_mlp(
    x_TD: Tensor, delta_TD: Tensor, norm: Gain, gate_up: Frozen, down: Frozen
) -> tuple[Tensor, Tensor]:
    """Add delta to the residual stream, norm it, and pass it through the gated feed-forward.

    Args:
        x_TD: (T, D) residual stream.
        delta_TD: (T, D) what is added to it.
        norm: its gain and eps.
        gate_up: the projection to (T, 2F), gate first.
        down: the projection back to (T, D).

    Returns:
        The sum, and (T, D).
    """
    given = x_TD, delta_TD, norm, gate_up, down, gate_up.master, down.master
    h_TD, y_TD = _NormMlp.apply(*given)
    return h_TD, y_TD
