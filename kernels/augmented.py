"""LoRA inside the frozen product: one library GEMM each way over an augmented buffer.

    We = [[W, B], [A, 0]]                                   (N + R, K + R)
    y  = [x | t] We[:N]^T,         t  = s (m*x) A^T
    dx = [dy | ds] We[:, :K],      ds = s dy B              without dropout
    dx = dy W + m*(ds A)                                    with a mask m, as in lora.py

The branch costs R more columns of a product that runs anyway, instead of passes over y and dx. It
needs x and t side by side: whoever makes x leaves room behind each row (`with_room`), and t is
written there; likewise ds behind dy. An x or dy without room is used as it is, and the branch is
then added in place.

The masters A and B stay float32; `Augmented.refresh` rounds them into We after each change. R is
the sum of the branches' ranks, rounded up to a multiple of 8 with zeros, so that rows stay aligned.
B is block-diagonal, and only its diagonal blocks are ever written. For a replicated base and
R <= MAX_RANKS; wider ones cost more columns than the passes they save.

Shapes   T = packed tokens, K = input and N = output features of the group, R = padded ranks.
Numerics One float32 accumulator for the frozen and the LoRA term, one rounding of y.
Saved    x_TK and t_TR (in x's room, or apart).
Bound    FLOPs: 2*T*(N*K + R*N) forward, 2*T*(N*K + R*K) backward, and the passes of skinny.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bioinstruct.kernels.dispatch import cdiv, uses_triton
from bioinstruct.kernels.dropout import Dropout
from bioinstruct.kernels.lora import (
    Branch,
    Group,
    branch_gradients,
    input_gradient,
    lora_linear,
    with_dense_rows,
    write_t,
)

MAX_RANKS = 192


class Augmented:
    """The buffer of one frozen weight, or of a group of projections, and its branches.

    Args:
        w_NK: (N, K) frozen weight; it is copied.
        branches: adapters in the order of their rows; they are copied by `refresh`.

    Raises:
        ValueError: no branch, or more ranks than MAX_RANKS.
    """

    def __init__(self, w_NK: Tensor, branches: Sequence[Branch]) -> None:
        ranks = sum(len(branch.a_RK) for branch in branches)
        if not 1 <= ranks <= MAX_RANKS:
            raise ValueError(f"an augmented buffer takes 1 to {MAX_RANKS} ranks, got {ranks}")
        self.branches, self.ranks, self.room = tuple(branches), ranks, 8 * cdiv(ranks, 8)
        self.N, self.K = w_NK.shape
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

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters into the buffer; to be called whenever they changed."""
        rank = 0
        for a_RK, b_NR, start in self.branches:
            end = rank + len(a_RK)
            self.we[self.N + rank : self.N + end, : self.K] = a_RK
            self.we[start : start + len(b_NR), self.K + rank : self.K + end] = b_NR
            rank = end


def with_room(like: Tensor, shape: Sequence[int], room: int) -> Tensor:
    """An unwritten (T, K) tensor of like's dtype and device, with room behind each row."""
    T, K = shape
    return like.new_empty(T, K + room)[:, :K]


def extended(x_TK: Tensor, room: int) -> Tensor | None:
    """(T, K + room): x and the room behind its rows; None unless all its storage is just these."""
    T, K = x_TK.shape
    whole = T * (K + room) * x_TK.itemsize == x_TK.untyped_storage().nbytes()
    if not whole or x_TK.storage_offset() or x_TK.stride() != (K + room, 1):
        return None
    # through .data: autograd is not to see that the room, which is not x's, gets written
    return x_TK.data.as_strided((T, K + room), (K + room, 1))


class _AugmentedLinear(torch.autograd.Function):
    # the masters are inputs, or the first layer, whose x needs no gradient, would never be visited

    @staticmethod
    def forward(
        ctx: Any, x_TK: Tensor, buffer: Augmented, group: Group, *masters: Tensor
    ) -> Tensor:
        x_TK = with_dense_rows(x_TK)
        T, N, K = len(x_TK), buffer.N, buffer.K
        x_ext = extended(x_TK, buffer.room)
        t_TR = x_TK.new_empty(T, buffer.room) if x_ext is None else x_ext[:, K:]
        write_t(t_TR, x_TK, buffer.a_RK, group)
        if x_ext is not None:
            y_TN = torch.mm(x_ext, buffer.we[:N].T)
        else:
            y_TN = torch.mm(x_TK, buffer.w_NK.T).addmm_(t_TR, buffer.we[:N, K:].T)
        ctx.save_for_backward(x_TK, t_TR, *masters)
        ctx.buffer, ctx.group = buffer, group
        return y_TN

    @staticmethod
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, t_TR, *masters = ctx.saved_tensors
        buffer: Augmented = ctx.buffer
        group: Group = ctx.group
        dy_TN = with_dense_rows(dy_TN)
        dy_ext = extended(dy_TN, buffer.room)
        ds_TR = torch.empty_like(t_TR) if dy_ext is None else dy_ext[:, buffer.N :]
        # the padding meets zeros of We, and zero times whatever lies there need not be zero
        ds_TR[:, buffer.ranks :] = 0
        real = slice(0, buffer.ranks)
        gradients = branch_gradients(x_TK, dy_TN, t_TR, ds_TR[:, real], group, masters)
        dx_TK = None
        if ctx.needs_input_grad[0]:
            if dy_ext is not None and group.dropout is None:
                dx_TK = torch.mm(dy_ext, buffer.we[:, : buffer.K])
            else:
                dx_TK = input_gradient(dy_TN, buffer.w_NK, ds_TR, buffer.a_RK, group)
        return dx_TK, None, None, *gradients


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
        scale: alpha / r, applied to every branch.
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
    masters = [m for branch in buffer.branches for m in (branch.a_RK, branch.b_NR)]
    if not uses_triton(x_TK, buffer.we, *masters):
        return lora_linear(x_TK, buffer.w_NK, buffer.branches, scale, dropout, site)
    group = Group(scale, dropout, site, tuple(branch.start for branch in buffer.branches))
    y_TN: Tensor = _AugmentedLinear.apply(x_TK, buffer, group, *masters)
    return y_TN
