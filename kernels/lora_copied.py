"""LoRA linear over copies of the masters that were made once a step: the path without Triton.

    y  = x W^T + t B^T,     t  = (m*x) A^T        with B the master times its scale
    dx = dy W  + m*(ds A),  ds = dy B,   dA += ds^T (m*x),   dB += scale dy^T t

What lora.py computes, with less around the products. At rank 16 and 512 tokens the products of a
branch take no longer than finding its tensors, scaling t and ds, and asking for gradients one by
one; so all of that is done once a step, for all packs and layers, and the scale lies in B. The
gradients are added where they belong and autograd gets none.

Shapes   T = packed tokens, K = input features, N = output features of the group, R = sum of the
         branches' ranks.
Numerics As lora.py, except that t and ds are not rounded after they are scaled.
Saved    x_TK, t_TR.
Bound    As lora.py.
"""

from collections.abc import Sequence
from ctypes import CDLL
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels.branches import add_outer, add_product, branch_library, product_into
from bioinstruct.kernels.dropout import Dropout
from bioinstruct.kernels.rows import with_dense_rows


class CopiedB(NamedTuple):
    """B of one branch of a group, and what goes with it."""

    b_NR: Tensor
    """In the compute dtype, its scale included."""
    grad_NR: Tensor
    """Where the gradient of its master is added."""
    scale: float
    start: int
    """Its first column of y."""
    rank: int
    """Its first column of t."""


class Copies(NamedTuple):
    """The branches of a group in the compute dtype."""

    a_RK: Tensor
    """Every A, one below the other."""
    a_grad_RK: Tensor
    """Where the gradients of their masters are added."""
    branches: Sequence[CopiedB]
    master: Tensor
    """One of them; autograd visits a function only for an input that trains."""


class Frozen(NamedTuple):
    """One use of a frozen weight, with its branches where it has some.

    The two passes of lora.py as steps: forward; then, from the gradient of the output,
    `into_b`, `input_gradient` and `into_a`.
    """

    w_NK: Tensor
    """(N, K); a group's weights lie one below the other."""
    copies: Copies | None = None
    """Of the group's branches in the weight's dtype, as new as the masters."""
    dropout: Dropout | None = None
    """Masks of the branches' input, one for the whole group."""
    site: int = 0
    """Number of this group in the model, which the masks depend on."""

    @property
    def master(self) -> Tensor | None:
        """What autograd is to visit a function for."""
        return None if self.copies is None else self.copies.master

    def _mask(self, dtype: torch.dtype) -> Tensor | None:
        if self.dropout is None:
            return None
        return self.dropout.mask(self.site, self.w_NK.shape[1], dtype)

    def _library(self, x: Tensor) -> CDLL | None:
        """Of the branches' products, where it has them."""
        assert self.copies is not None
        sizes = (n for branch in self.copies.branches for n in branch.b_NR.shape)
        return branch_library(x, self.w_NK.shape[1], *sizes)

    def forward(self, x_TK: Tensor) -> tuple[Tensor, Tensor | None]:
        """y and t."""
        if self.copies is None:
            return torch.mm(x_TK, self.w_NK.T), None
        mask_TK = self._mask(x_TK.dtype)
        inner_TK = x_TK if mask_TK is None else mask_TK.mul_(x_TK)
        t_TR = x_TK.new_empty(len(x_TK), len(self.copies.a_RK))
        library = self._library(x_TK)
        product_into(library, t_TR, inner_TK, self.copies.a_RK.T)
        y_TN = torch.mm(x_TK, self.w_NK.T)
        for b_NR, _, _, start, rank in self.copies.branches:
            N, R = b_NR.shape
            add_product(library, _columns(y_TN, start, N), _columns(t_TR, rank, R), b_NR.T)
        return y_TN, t_TR

    def into_b(self, dy_TN: Tensor, t_TR: Tensor | None) -> Tensor | None:
        """Add dB where it belongs; return ds."""
        if self.copies is None or t_TR is None:
            return None
        ds_TR, library = torch.empty_like(t_TR), self._library(dy_TN)
        for b_NR, grad_NR, scale, start, rank in self.copies.branches:
            N, R = b_NR.shape
            own_TN = _columns(dy_TN, start, N)
            product_into(library, _columns(ds_TR, rank, R), own_TN, b_NR)
            add_outer(library, grad_NR.T, _columns(t_TR, rank, R), own_TN, scale)
        return ds_TR

    def input_gradient(self, dy_TN: Tensor, ds_TR: Tensor | None) -> Tensor:
        """dx."""
        if self.copies is None or ds_TR is None:
            return torch.mm(dy_TN, self.w_NK)
        mask_TK = self._mask(dy_TN.dtype)
        if mask_TK is None:
            dx_TK = torch.mm(dy_TN, self.w_NK)
            add_product(self._library(dx_TK), dx_TK, ds_TR, self.copies.a_RK)
            return dx_TK
        return torch.mm(ds_TR, self.copies.a_RK).mul_(mask_TK).addmm_(dy_TN, self.w_NK)

    def into_a(self, x_TK: Tensor, ds_TR: Tensor | None) -> None:
        """Add dA where it belongs."""
        if self.copies is None or ds_TR is None:
            return
        mask_TK = self._mask(x_TK.dtype)
        inner_TK = x_TK if mask_TK is None else mask_TK.mul_(x_TK)
        add_outer(self._library(x_TK), self.copies.a_grad_RK, ds_TR, inner_TK)


def _columns(x: Tensor, first: int, number: int) -> Tensor:
    return x if number == x.shape[1] else x.narrow(1, first, number)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, frozen: Frozen, master: Tensor | None) -> Tensor:
        del master  # autograd's alone
        y_TN, t_TR = frozen.forward(x_TK)
        ctx.save_for_backward(x_TK, t_TR)
        ctx.frozen = frozen
        return y_TN

    @staticmethod
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        (x_TK, t_TR), frozen = ctx.saved_tensors, ctx.frozen
        dy_TN = with_dense_rows(dy_TN)
        ds_TR = frozen.into_b(dy_TN, t_TR)
        frozen.into_a(x_TK, ds_TR)
        dx_TK = frozen.input_gradient(dy_TN, ds_TR) if ctx.needs_input_grad[0] else None
        return dx_TK, None, None


def copied_linear(x_TK: Tensor, frozen: Frozen) -> Tensor:
    """Frozen linear of a group of projections plus its LoRA branches.

    Args:
        x_TK: (T, K) activations in the weight's dtype.
        frozen: the weight and its branches.

    Returns:
        (T, N), in x's dtype.
    """
    y_TN: Tensor = _Linear.apply(with_dense_rows(x_TK), frozen, frozen.master)
    return y_TN
