"""LoRA inside the frozen product: one library GEMM each way over an augmented buffer.

    We = [[W, B], [A, 0]]                                   (N + R, K + R)
    y  = [x | t] We[:N]^T,         t  = s (m*x) A^T
    dx = [dy | ds] We[:, :K],      ds = s dy B              without dropout
    dx = dy W + m*(ds A)                                    with a mask m, as in lora.py

The branch costs R more columns of a product that runs anyway, instead of passes over y and dx. It
needs x and t side by side: whoever makes x leaves room behind each row (rows.py), and t is written
there; likewise ds behind dy. An x or dy without room is used as it is, and the branch is then added
in place.

The masters A and B stay float32; `Augmented.refresh` rounds them into We after each change. R is
the sum of the branches' ranks, rounded up to a multiple of 8 with zeros, so that rows stay aligned.
B is block-diagonal, and only its diagonal blocks are ever written. For a replicated base and
R <= MAX_RANKS; wider ones cost more columns than the passes they save. Where a measured table says
that gemm_lora is faster than the library (gemm_choices.py), it computes either product.

Shapes   T = packed tokens, K = input and N = output features of the group, R = padded ranks.
Numerics One float32 accumulator for the frozen and the LoRA term, one rounding of y.
Saved    x_TK and t_TR, which may stand behind x: its buffer is kept anyway.
Bound    FLOPs: 2*T*(N*K + R*N) forward, 2*T*(N*K + R*K) backward, and the passes of skinny.py.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels import skinny
from bioinstruct.kernels.dispatch import cdiv, uses_triton
from bioinstruct.kernels.dropout import Dropout
from bioinstruct.kernels.gemm_lora import gemm_lora, takes_product
from bioinstruct.kernels.lora import (
    Branch,
    Group,
    Part,
    down_backward,
    group_of,
    in_turn,
    input_gradient,
    lora_linear,
    parts_of,
    up_backward,
    write_t,
)
from bioinstruct.kernels.norm_lora import Late
from bioinstruct.kernels.rows import extended, with_dense_rows
from bioinstruct.kernels.skinny import Gradient, Mask, Parts

MAX_RANKS = 192


class Augmented:
    """The buffer of one frozen weight, or of a group of projections, and its branches.

    Args:
        w_NK: (N, K) frozen weight; it is copied unless there is no branch.
        branches: adapters in the order of their rows; they are copied by `refresh`.

    Raises:
        ValueError: more ranks than MAX_RANKS.
    """

    def __init__(self, w_NK: Tensor, branches: Sequence[Branch]) -> None:
        ranks = sum(len(branch.a_RK) for branch in branches)
        if ranks > MAX_RANKS:
            raise ValueError(f"an augmented buffer takes {MAX_RANKS} ranks at most, got {ranks}")
        self.branches, self.ranks, self.room = tuple(branches), ranks, 8 * cdiv(ranks, 8)
        self.N, self.K = w_NK.shape
        self.we = w_NK
        if ranks:
            self.we = w_NK.new_zeros(self.N + self.room, self.K + self.room)
            self.we[: self.N, : self.K] = w_NK
            self.refresh()

    @property
    def w_NK(self) -> Tensor:
        """The frozen weight, a view."""
        return self.we[: self.N, : self.K]

    @property
    def a_RK(self) -> Tensor:
        """The stacked A, padded, a view."""
        return self.we[self.N :, : self.K]

    @property
    def masters(self) -> list[Tensor]:
        """A and B of every branch, in turn."""
        return [m for branch in self.branches for m in (branch.a_RK, branch.b_NR)]

    def places(self) -> list[tuple[Tensor, Tensor, float]]:
        """Each master, the view of the buffer that holds its copy, and the copy's factor."""
        found, rank = [], self.N
        for a_RK, b_NR, start, factor, _ in self.branches:
            end = rank + len(a_RK)
            columns = slice(rank - self.N + self.K, end - self.N + self.K)
            found += [
                (a_RK, self.we[rank:end, : self.K], 1.0),
                (b_NR, self.we[start : start + len(b_NR), columns], factor),
            ]
            rank = end
        return found

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters into the buffer; to be called whenever they changed."""
        for master, place, factor in self.places():
            torch.mul(master, factor, out=place) if factor != 1 else place.copy_(master)


class Use(NamedTuple):
    """One pack's use of an augmented buffer."""

    buffer: Augmented
    group: Group

    @property
    def parts(self) -> list[Part]:
        """Of the branches."""
        return parts_of(self.group, self.buffer.masters)

    @property
    def mask(self) -> Mask:
        """Of all branches, where they share one."""
        return Mask(self.group.scale, self.group.dropout, self.group.sites[0])

    def fuses(self, most: int = skinny.MAX_RANK) -> bool:
        """Whether neighbouring kernels may take the branches along: few ranks, and one mask."""
        return 0 < self.buffer.room <= most and len(set(self.group.sites)) == 1

    def product(
        self,
        x_TK: Tensor,
        bias_N: Tensor | None = None,
        *,
        late: bool = False,
        keeps_x: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return y, and t for the backward pass, which also stands in the room behind x.

        Late, y lacks the branches' part, which whoever reads it adds. Whoever keeps x gets the t
        behind it; on its own t would keep all of x.
        """
        t_TR = x_TK.new_empty(len(x_TK), self.buffer.room)
        if self.buffer.ranks:
            x_ext = extended(x_TK, self.buffer.room)
            if x_ext is not None and keeps_x:
                t_TR = x_ext[:, self.buffer.K :]
            write_t(t_TR, x_TK, self.buffer.a_RK, self.group, self.parts)
            if x_ext is not None and not keeps_x:
                x_ext[:, self.buffer.K :] = t_TR
        if late:
            return _linear(x_TK, self.buffer.w_NK, bias_N), t_TR
        return self.applied(x_TK, t_TR, bias_N), t_TR

    def applied(self, x_TK: Tensor, t_TR: Tensor, bias_N: Tensor | None = None) -> Tensor:
        """Return y, where t is known, and stands in the room behind x if there is some."""
        buffer = self.buffer
        if not buffer.ranks:
            return _linear(x_TK, buffer.we, bias_N)
        if bias_N is None and takes_product(x_TK, buffer.w_NK, buffer.room):
            return gemm_lora(x_TK, buffer.w_NK, t_TR, buffer.we[: buffer.N, buffer.K :])
        x_ext = extended(x_TK, buffer.room)
        if x_ext is not None:
            return _linear(x_ext, buffer.we[: buffer.N], bias_N)
        return _linear(x_TK, buffer.w_NK, bias_N).addmm_(t_TR, buffer.we[: buffer.N, buffer.K :].T)

    def room_for_ds(self, dy_TN: Tensor) -> Tensor:
        """The room behind dy, or memory of its own, for the padded ds."""
        buffer = self.buffer
        dy_ext = extended(dy_TN, buffer.room)
        ds_TR = dy_TN.new_empty(len(dy_TN), buffer.room)
        if dy_ext is not None:
            ds_TR = dy_ext[:, buffer.N :]
        # the padding meets zeros of We, and zero times whatever lies there need not be zero
        ds_TR[:, buffer.ranks :] = 0
        return ds_TR

    def gradients_of_b(self, dy_TN: Tensor, t_TR: Tensor) -> tuple[Tensor, list[Gradient]]:
        """Return ds, written into the room behind dy where there is some, and dB of each branch."""
        ds_TR = self.room_for_ds(dy_TN)
        return ds_TR, up_backward(dy_TN, t_TR, ds_TR, self.group, self.parts)

    def gradients_of_a(self, source: skinny.Source, ds_TR: Tensor) -> list[Gradient]:
        """Return dA of each branch."""
        if not self.buffer.ranks:
            return []
        return down_backward(source, ds_TR[:, : self.buffer.ranks], self.group, self.parts)

    def parts_of_a(self, parts_PRK: Tensor) -> list[Gradient]:
        """Return dA of each branch, from parts that a fused kernel wrote."""
        scale = skinny.keep_scale(self.group.dropout)
        return [Parts(p.a_RK, parts_PRK[:, p.ranks], scale) for p in self.parts]

    def input_gradient(self, dy_TN: Tensor, ds_TR: Tensor) -> Tensor:
        """Return dx."""
        if self.buffer.ranks and self.group.dropout is not None:
            buffer = self.buffer
            return input_gradient(dy_TN, buffer.w_NK, ds_TR, buffer.a_RK, self.group, self.parts)
        return self.unmasked_gradient(dy_TN, ds_TR)

    def unmasked_gradient(self, dy_TN: Tensor, ds_TR: Tensor) -> Tensor:
        """Return dx without the part of it that goes through a mask."""
        buffer = self.buffer
        if not buffer.ranks or self.group.dropout is not None:
            return torch.mm(dy_TN, buffer.w_NK)
        if takes_product(dy_TN, buffer.w_NK.T, buffer.room):
            return gemm_lora(dy_TN, buffer.w_NK.T, ds_TR, buffer.a_RK.T)
        dy_ext = extended(dy_TN, buffer.room)
        if dy_ext is not None:
            return torch.mm(dy_ext, buffer.we[:, : buffer.K])
        return torch.mm(dy_TN, buffer.w_NK).addmm_(ds_TR, buffer.a_RK)


def _linear(x_TK: Tensor, w_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    return torch.mm(x_TK, w_NK.T) if bias_N is None else torch.addmm(bias_N, x_TK, w_NK.T)


class _AugmentedLinear(torch.autograd.Function):
    # the masters are inputs, or the first layer, whose x needs no gradient, would never be visited

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, use: Use, late: bool, *masters: Tensor) -> Any:
        x_TK = with_dense_rows(x_TK)
        y_TN, t_TR = use.product(x_TK, late=late, keeps_x=True)
        ctx.save_for_backward(x_TK, t_TR)
        ctx.use = use
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(t_TR)
        return (y_TN, t_TR) if late else y_TN

    @staticmethod
    def backward(ctx: Any, dy_TN: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        use: Use = ctx.use
        if dy_TN is None:
            return None, None, None, *[None] * len(use.buffer.masters)
        x_TK, t_TR = ctx.saved_tensors
        dy_TN = with_dense_rows(dy_TN)
        ds_TR, db = use.gradients_of_b(dy_TN, t_TR)
        da = use.gradients_of_a(skinny.Source(x_TK), ds_TR)
        dx_TK = use.input_gradient(dy_TN, ds_TR) if ctx.needs_input_grad[0] else None
        return dx_TK, None, None, *in_turn(da, db)


def augmented_linear(
    x_TK: Tensor,
    buffer: Augmented,
    scale: float = 1.0,
    dropout: Dropout | None = None,
    site: int = 0,
) -> Tensor:
    """lora_linear over an augmented buffer; without kernels (on a CPU) it is lora_linear itself.

    Args:
        x_TK: (T, K) activations, best made by `with_room`; then the room is written to.
        buffer: frozen weight and adapters, refreshed since the adapters last changed.
        scale: alpha / r, times a branch's own factor.
        dropout: masks of the branches' input, or None.
        site: number of this group in the model, which the masks depend on.

    Returns:
        (T, N), in x's dtype.

    Raises:
        ValueError: if the shapes do not match.
    """
    if x_TK.ndim != 2 or x_TK.shape[1] != buffer.K:
        raise ValueError(
            f"augmented_linear needs x_TK (T, {buffer.K}) for this buffer, got {tuple(x_TK.shape)}"
        )
    if not uses_triton(x_TK, buffer.we, *buffer.masters):
        return lora_linear(x_TK, buffer.w_NK, buffer.branches, scale, dropout, site)
    return linear_of(Use(buffer, group_of(buffer.branches, scale, dropout, site, fused=True)), x_TK)


def linear_of(use: Use, x_TK: Tensor) -> Tensor:
    """Compute augmented_linear by the kernels, whose use was prepared."""
    y_TN: Tensor = _AugmentedLinear.apply(x_TK, use, False, *use.buffer.masters)
    return y_TN


def late_linear_of(use: Use, x_TK: Tensor) -> tuple[Tensor, Late]:
    """Compute it but for the branches' part of y, which the norm that reads y next adds to it.

    The gradients are those of the whole: y's is the sum's.
    """
    y_TN, t_TR = _AugmentedLinear.apply(x_TK, use, True, *use.buffer.masters)
    return y_TN, Late(t_TR, use.buffer.we[: use.buffer.N, use.buffer.K :])
