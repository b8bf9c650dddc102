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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels.augmented import Use
from bioinstruct.kernels.lora import Part, in_turn
from bioinstruct.kernels.norm_lora import Late, norm_backward_with_da, norm_with_t
from bioinstruct.kernels.rmsnorm import norm_backward, norm_forward
from bioinstruct.kernels.rope import Heads, Rotation, rotate_into, turn_back, turn_heads
from bioinstruct.kernels.rope_lora import turn_back_with_lora
from bioinstruct.kernels.rows import with_dense_rows, with_room
from bioinstruct.kernels.skinny import Gradient, Parts, Source, sum_into
from bioinstruct.kernels.swiglu import swiglu_backward, swiglu_forward
from bioinstruct.kernels.swiglu_lora import MAX_RANK as GATE_RANK
from bioinstruct.kernels.swiglu_lora import swiglu_backward_with_lora, swiglu_with_t


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


# ---- forwards and backwards through a norm -----------------------------------------------------


class _Projected(NamedTuple):
    h_TD: Tensor
    r_T: Tensor
    t_TR: Tensor
    y_TN: Tensor


def _projected(
    x_TD: Tensor,
    delta_TD: Tensor | None,
    norm: Norm,
    use: Use,
    bias_N: Tensor | None = None,
    late: Late | None = None,
) -> _Projected:
    """Norm and project, t with the norm where its ranks are few."""
    given = x_TD, delta_TD, norm.gain_D, norm.eps
    if use.fuses():
        h_TD, n_TD, r_T, t_TR = norm_with_t(*given, use.buffer.a_RK, use.mask, late)
        return _Projected(h_TD, r_T, t_TR, use.applied(n_TD, t_TR, bias_N))
    h_TD, n_TD, r_T = norm_forward(*given, use.buffer.room)
    y_TN, t_TR = use.product(n_TD, bias_N)
    return _Projected(h_TD, r_T, t_TR, y_TN)


class _Above(NamedTuple):
    """What the backward pass of a half knows when it reaches the projection behind the norm."""

    dy_TN: Tensor
    """Gradient of the projection."""
    ds_TR: Tensor
    """Of its branches, padded."""
    db: list[Gradient]
    c_T: Tensor | None = None
    """The norm's row sums, where they came at no cost."""


def _back_through_norm(
    above: _Above,
    saved: Sequence[Tensor],
    norm: Norm,
    use: Use,
    dh_TD: Tensor | None,
    *,
    wanted: bool,
) -> tuple[Tensor | None, list[Gradient]]:
    """Gradient of the residual stream, and dA; both in one pass where the ranks are few.

    Args:
        above: gradients of the projection and its branches.
        saved: h_TD, r_T and t_TR.
        norm: of the half.
        use: the projection.
        dh_TD: gradient that reaches h past the norm.
        wanted: whether the residual stream's is; the embedding's is not.
    """
    h_TD, r_T, t_TR = saved
    dy_TN, ds_TR, _, c_T = above
    if wanted and use.fuses():
        dn_TD = use.unmasked_gradient(dy_TN, ds_TR)
        normed, branch = (h_TD, r_T, norm.gain_D), (ds_TR, t_TR, use.buffer.a_RK)
        given = dn_TD, normed, branch, use.mask, dh_TD, norm.room
        dx_TD, parts = norm_backward_with_da(*given, c_T)
        return dx_TD, use.parts_of_a(parts)
    da = use.gradients_of_a(Source(h_TD, r_T, norm.gain_D), ds_TR)
    if not wanted:
        return None, da
    dn_TD = use.input_gradient(dy_TN, ds_TR)
    return norm_backward(dn_TD, h_TD, norm.gain_D, r_T, dh_TD, norm.room), da


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
        h_TD, r_T, t_TR, y_TN = _projected(x_TD, delta_TD, norm, use, head.bias_N)
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
        norm, use, head = ctx.norm, ctx.use, ctx.head
        dh_TD = gradients[0] if ctx.adds else None
        own = [gradient for gradient in gradients[ctx.adds :] if gradient is not None]
        if not own:
            return dh_TD, dh_TD, None, None, None, *[None] * len(use.buffer.masters)
        saved = ctx.saved_tensors  # once: a recomputed layer gives them only once
        t_TR = saved[2]
        if head.rotation is None:
            dy_TN = with_dense_rows(own[0])
            above = _Above(dy_TN, *use.gradients_of_b(dy_TN, t_TR))
        else:
            # queries, keys and values are used together, by attention
            above = _back_through_heads(own, head.rotation, use, t_TR)
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dx_TD, da = _back_through_norm(above, saved, norm, use, dh_TD, wanted=wanted)
        return dx_TD, dx_TD if ctx.adds else None, None, None, None, *in_turn(da, above.db)


def _back_through_heads(
    gradients: Sequence[Tensor], rotation: Rotation, use: Use, t_TR: Tensor
) -> _Above:
    """Rotate the gradients of queries and keys back, with ds and dB on the way."""
    buffer, (T, _, E) = use.buffer, gradients[0].shape
    if not use.fuses():
        dy_TN = turn_back(gradients, rotation, buffer.room)
        return _Above(dy_TN, *use.gradients_of_b(dy_TN, t_TR))
    dy_TN = with_room(t_TR, (T, buffer.N), buffer.room)
    ds_TR = use.room_for_ds(dy_TN)
    by_start = {part.columns.start: part for part in use.parts}
    db: list[Gradient] = []
    first = 0
    for gradient, turn in zip(gradients, (rotation, rotation, None), strict=True):
        heads = gradient.shape[1]
        columns = slice(first, first := first + heads * E)
        part = by_start.get(columns.start)
        if part is None:
            own = dy_TN[:, columns].unflatten(1, (heads, E))
            own.copy_(gradient) if turn is None else rotate_into(own, gradient, turn, -1.0)
            continue
        b_NR = buffer.we[columns, buffer.K :][:, part.ranks]
        t_own = t_TR[:, part.ranks]
        sums = turn_back_with_lora(gradient, dy_TN[:, columns], turn, b_NR, t_own)
        sum_into(ds_TR[:, part.ranks], sums.ds_CTR, use.group.scale)
        db.append(Parts(part.b_NR, sums.db_PNR, part.factor))
    return _Above(dy_TN, ds_TR, db)


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
        late: Late | None,
        *masters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        h_TD, r_T, t_TR, gate_up_T2F = _projected(x_TD, delta_TD, norm, gate_up, late=late)
        if down.fuses():
            a_TF, t_down_TR = swiglu_with_t(gate_up_T2F, down.buffer.a_RK, down.mask)
            y_TD = down.applied(a_TF, t_down_TR)
        else:
            y_TD, t_down_TR = down.product(swiglu_forward(gate_up_T2F, down.buffer.room))
        ctx.save_for_backward(h_TD, r_T, t_TR, gate_up_T2F, t_down_TR)
        ctx.norm, ctx.gate_up, ctx.down = norm, gate_up, down
        ctx.set_materialize_grads(False)
        return h_TD, y_TD

    @staticmethod
    def backward(ctx: Any, dh_TD: Tensor | None, dy_TD: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, gate_up_T2F, t_down_TR = ctx.saved_tensors
        norm, gate_up, down = ctx.norm, ctx.gate_up, ctx.down
        if dy_TD is None:
            unused = [None] * len(gate_up.buffer.masters + down.buffer.masters)
            return dh_TD, dh_TD, None, None, None, None, *unused
        dy_TD = with_dense_rows(dy_TD)
        ds_down_TR, db_down = down.gradients_of_b(dy_TD, t_down_TR)
        behind = _Above(dy_TD, ds_down_TR, db_down)
        above, da_down = _back_through_gate(behind, gate_up_T2F, saved[1:], gate_up, down)
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dx_TD, da = _back_through_norm(above, saved, norm, gate_up, dh_TD, wanted=wanted)
        gradients = (*in_turn(da, above.db), *in_turn(da_down, db_down))
        return dx_TD, dx_TD, None, None, None, None, *gradients


def _back_through_gate(
    behind: _Above, gate_up_T2F: Tensor, saved: Sequence[Tensor], gate_up: Use, down: Use
) -> tuple[_Above, list[Gradient]]:
    """Gradients of gate and up and of their branches, and dA of down.

    Args:
        behind: gradients of down and its branches.
        gate_up_T2F: gate and up.
        saved: r_T of the norm before them, and t_TR of their branches.
        gate_up: their projection.
        down: the projection of the gated product.
    """
    r_T, t_TR = saved
    dy_TD, ds_down_TR, *_ = behind
    buffer, parts, F = gate_up.buffer, gate_up.parts, down.buffer.K
    ranks = _rank(parts, 0), _rank(parts, F)
    if not (gate_up.fuses() and max(ranks) <= GATE_RANK and down.fuses(GATE_RANK)):
        da_TF = down.input_gradient(dy_TD, ds_down_TR)
        again = down.buffer.ranks > 0
        dy_T2F, a_TF = swiglu_backward(da_TF, gate_up_T2F, buffer.room, again=again)
        da_down = [] if a_TF is None else down.gradients_of_a(Source(a_TF), ds_down_TR)
        return _Above(dy_T2F, *gate_up.gradients_of_b(dy_T2F, t_TR)), da_down
    da_TF = down.unmasked_gradient(dy_TD, ds_down_TR)
    b_2FR, own = buffer.we[: buffer.N, buffer.K :], (ds_down_TR, down.buffer.a_RK)
    found = swiglu_backward_with_lora(
        da_TF, gate_up_T2F, own, (b_2FR, t_TR, ranks, r_T), down.mask, buffer.room
    )
    ds_TR = gate_up.room_for_ds(found.dgate_up_T2F)
    db: list[Gradient] = []
    sums = [both for both in zip(found.ds_CTR, found.db_PFR, strict=True) if both[0].shape[2]]
    for part, (ds_CTR, db_PFR) in zip(parts, sums, strict=True):
        sum_into(ds_TR[:, part.ranks], ds_CTR, gate_up.group.scale)
        db.append(Parts(part.b_NR, db_PFR, part.factor))
    c_T = torch.empty_like(r_T)
    sum_into(c_T[None], found.c_CT, 1 / buffer.K)
    return _Above(found.dgate_up_T2F, ds_TR, db, c_T), down.parts_of_a(found.da_PRF)


def _rank(parts: Sequence[Part], start: int) -> int:
    """Rank of the branch whose rows begin there; 0 where there is none."""
    return sum(len(part.a_RK) for part in parts if part.columns.start == start)


def norm_mlp(
    x_TD: Tensor, delta_TD: Tensor, norm: Norm, gate_up: Use, down: Use, late: Late | None = None
) -> Half:
    """Add delta to the residual stream, norm it, and pass it through the gated feed-forward.

    Args:
        x_TD: (T, D) residual stream.
        delta_TD: (T, D) what is added to it.
        norm: its gain and eps.
        gate_up: the projection to (T, 2F), gate first.
        down: the projection back to (T, D).
        late: what delta lacks of its own branch, where gate_up.fuses().

    Returns:
        The sum, and (T, D).
    """
    masters = gate_up.buffer.masters + down.buffer.masters
    return Half(*_NormMlp.apply(x_TD, delta_TD, norm, gate_up, down, late, *masters))
