"""The two halves of a transformer layer with LoRA, each one autograd function, for the kernels.

    h = x + delta
    q, k, v = rope(qkv(norm(h)))                     norm_heads; norm_linear without the rotation
    delta'  = down(silu(gate) * up),  gate, up = gate_up(norm(h))                       norm_mlp

x is the residual stream and delta what the half before adds to it; h goes on as the next half's x.
What such a half computes is the composition of rmsnorm, augmented_linear, split_rope and swiglu;
as one function it keeps less: norms and the gated product are made again in the backward pass,
their rows are written with room for t, the gradients' with room for ds (augmented.py), and the
residual's gradient is added where the norm's is made.

Shapes   T = packed tokens, D = model width, N = output features of a group, F = feed-forward width,
         R = padded ranks, H, G, E = query heads, key heads and their width.
Saved    h, r_T, t of every group, gate and up. Gains and biases are frozen.
Bound    Matrix products as in augmented.py; between them every activation is read and written once.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels.augmented import Use, in_turn
from bioinstruct.kernels.rmsnorm import norm_backward, norm_forward
from bioinstruct.kernels.rope import Heads, Rotation, turn_back, turn_heads
from bioinstruct.kernels.rows import with_dense_rows
from bioinstruct.kernels.skinny import Source
from bioinstruct.kernels.swiglu import swiglu_backward, swiglu_forward


class Norm(NamedTuple):
    """The norm before a half, and the room behind the rows of its input's gradient."""

    gain_D: Tensor
    eps: float
    room: int = 0
    """Columns that the linear which made delta wants for its ds."""


class Half(NamedTuple):
    """What a half gives back."""

    h_TD: Tensor
    """The residual stream with delta."""
    y: Tensor
    """What the half computed of it."""


# ---- norm and projection -----------------------------------------------------------------------


class _Head(NamedTuple):
    """How the projection of norm_linear goes on."""

    bias_N: Tensor | None
    rotation: Rotation | None
    num_heads: int


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        delta_TD: Tensor | None,
        norm: Norm,
        use: Use,
        head: _Head,
        *masters: Tensor,
    ) -> Any:
        room = use.buffer.room
        h_TD, n_TD, r_T = norm_forward(x_TD, delta_TD, norm.gain_D, norm.eps, room)
        y_TN, t_TR = use.product(n_TD, head.bias_N)
        ctx.save_for_backward(h_TD, r_T, t_TR)
        ctx.norm, ctx.use, ctx.head, ctx.adds = norm, use, head, delta_TD is not None
        ctx.set_materialize_grads(False)
        out: tuple[Tensor, ...] = (y_TN,)
        if head.rotation is not None:
            out = turn_heads(y_TN, head.rotation, head.num_heads)
        # an input is not given back as an output
        return (h_TD, *out) if ctx.adds else out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        h_TD, r_T, t_TR = ctx.saved_tensors
        norm, use, head = ctx.norm, ctx.use, ctx.head
        dh_TD = gradients[0] if ctx.adds else None
        own = [gradient for gradient in gradients[ctx.adds :] if gradient is not None]
        if not own:
            return dh_TD, dh_TD, None, None, None, *[None] * len(use.buffer.masters)
        if head.rotation is not None:
            # queries, keys and values are used together, by attention
            dy_TN = turn_back(own, head.rotation, use.buffer.room)
        else:
            dy_TN = with_dense_rows(own[0])
        ds_TR, db = use.gradients_of_b(dy_TN, t_TR)
        da = use.gradients_of_a(Source(h_TD, r_T, norm.gain_D), ds_TR)
        dx_TD = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            dn_TD = use.input_gradient(dy_TN, ds_TR)
            dx_TD = norm_backward(dn_TD, h_TD, norm.gain_D, r_T, dh_TD, norm.room)
        return dx_TD, dx_TD if ctx.adds else None, None, None, None, *in_turn(da, db)


def norm_linear(
    x_TD: Tensor, delta_TD: Tensor | None, norm: Norm, use: Use, bias_N: Tensor | None = None
) -> Half:
    """Add delta to the residual stream, norm it, and project it.

    Args:
        x_TD: (T, D) residual stream.
        delta_TD: (T, D) what is added to it, or None for nothing.
        norm: its gain and eps.
        use: the projection.
        bias_N: frozen, of the projection.

    Returns:
        The sum, and (T, N).
    """
    masters = use.buffer.masters
    out = _NormLinear.apply(x_TD, delta_TD, norm, use, _Head(bias_N, None, 0), *masters)
    return Half(x_TD, *out) if delta_TD is None else Half(*out)


def norm_heads(
    x_TD: Tensor,
    delta_TD: Tensor | None,
    norm: Norm,
    use: Use,
    rotation: Rotation,
    num_heads: int,
    bias_N: Tensor | None = None,
) -> tuple[Tensor, Heads]:
    """Do as norm_linear and split_rope do one after the other.

    Args:
        x_TD: (T, D) residual stream.
        delta_TD: (T, D) what is added to it, or None for nothing.
        norm: its gain and eps.
        use: the projection to queries, keys and values.
        rotation: the tokens' cos and sin.
        num_heads: H.
        bias_N: frozen, of the projection.

    Returns:
        The sum, and its heads.
    """
    head = _Head(bias_N, rotation, num_heads)
    out = _NormLinear.apply(x_TD, delta_TD, norm, use, head, *use.buffer.masters)
    return (x_TD, Heads(*out)) if delta_TD is None else (out[0], Heads(*out[1:]))


# ---- norm and feed-forward ---------------------------------------------------------------------


class _NormMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        delta_TD: Tensor,
        norm: Norm,
        gate_up: Use,
        down: Use,
        *masters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        h_TD, n_TD, r_T = norm_forward(x_TD, delta_TD, norm.gain_D, norm.eps, gate_up.buffer.room)
        gate_up_T2F, t_TR = gate_up.product(n_TD)
        del n_TD
        y_TD, t_down_TR = down.product(swiglu_forward(gate_up_T2F, down.buffer.room))
        ctx.save_for_backward(h_TD, r_T, gate_up_T2F, t_TR, t_down_TR)
        ctx.norm, ctx.gate_up, ctx.down = norm, gate_up, down
        ctx.set_materialize_grads(False)
        return h_TD, y_TD

    @staticmethod
    def backward(ctx: Any, dh_TD: Tensor | None, dy_TD: Tensor | None) -> tuple[Tensor | None, ...]:
        h_TD, r_T, gate_up_T2F, t_TR, t_down_TR = ctx.saved_tensors
        norm, gate_up, down = ctx.norm, ctx.gate_up, ctx.down
        if dy_TD is None:
            unused = [None] * len(gate_up.buffer.masters + down.buffer.masters)
            return dh_TD, dh_TD, None, None, None, *unused
        dy_TD = with_dense_rows(dy_TD)
        ds_down_TR, db_down = down.gradients_of_b(dy_TD, t_down_TR)
        da_TF = down.input_gradient(dy_TD, ds_down_TR)
        again = down.buffer.ranks > 0
        dy_T2F, a_TF = swiglu_backward(da_TF, gate_up_T2F, gate_up.buffer.room, again=again)
        del da_TF
        da_down = [] if a_TF is None else down.gradients_of_a(Source(a_TF), ds_down_TR)
        ds_TR, db = gate_up.gradients_of_b(dy_T2F, t_TR)
        da = gate_up.gradients_of_a(Source(h_TD, r_T, norm.gain_D), ds_TR)
        dx_TD = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            dn_TD = gate_up.input_gradient(dy_T2F, ds_TR)
            dx_TD = norm_backward(dn_TD, h_TD, norm.gain_D, r_T, dh_TD, norm.room)
        gradients = (*in_turn(da, db), *in_turn(da_down, db_down))
        return dx_TD, dx_TD, None, None, None, *gradients


def norm_mlp(x_TD: Tensor, delta_TD: Tensor, norm: Norm, gate_up: Use, down: Use) -> Half:
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
    masters = gate_up.buffer.masters + down.buffer.masters
    return Half(*_NormMlp.apply(x_TD, delta_TD, norm, gate_up, down, *masters))
