"""LoRA linear over copies of the masters that were made once a step: the path of CPUs.

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
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


def _columns(x: Tensor, first: int, number: int) -> Tensor:
    return x if number == x.shape[1] else x.narrow(1, first, number)


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(torch.mm(left, right), alpha=scale)


class _CopiedLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TK: Tensor,
        w_NK: Tensor,
        copies: Copies,
        dropout: Dropout | None,
        site: int,
        master: Tensor,
    ) -> Tensor:
        del master  # autograd's alone
        inner_TK = x_TK
        if dropout is not None:
            inner_TK = dropout.mask(site, x_TK.shape[1], x_TK.dtype).mul_(x_TK)
        t_TR = torch.mm(inner_TK, copies.a_RK.T)
        y_TN = torch.mm(x_TK, w_NK.T)
        for b_NR, _, _, start, rank in copies.branches:
            N, R = b_NR.shape
            _columns(y_TN, start, N).addmm_(_columns(t_TR, rank, R), b_NR.T)
        ctx.save_for_backward(x_TK, w_NK, t_TR)
        ctx.rest = copies, dropout, site
        return y_TN

    @staticmethod
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, w_NK, t_TR = ctx.saved_tensors
        copies, dropout, site = ctx.rest
        dy_TN, ds_TR = with_dense_rows(dy_TN), torch.empty_like(t_TR)
        for b_NR, grad_NR, scale, start, rank in copies.branches:
            N, R = b_NR.shape
            own_TN = _columns(dy_TN, start, N)
            torch.mm(own_TN, b_NR, out=_columns(ds_TR, rank, R))
            _add_product(grad_NR, own_TN.T, _columns(t_TR, rank, R), scale)
        mask_TK = None if dropout is None else dropout.mask(site, x_TK.shape[1], x_TK.dtype)
        inner_TK = x_TK if mask_TK is None else x_TK * mask_TK
        _add_product(copies.a_grad_RK, ds_TR.T, inner_TK)
        dx_TK = None
        if ctx.needs_input_grad[0]:
            dx_TK = (
                torch.mm(dy_TN, w_NK).addmm_(ds_TR, copies.a_RK)
                if mask_TK is None
                else torch.mm(ds_TR, copies.a_RK).mul_(mask_TK).addmm_(dy_TN, w_NK)
            )
        return dx_TK, None, None, None, None, None


def copied_lora_linear(
    x_TK: Tensor, w_NK: Tensor, copies: Copies, dropout: Dropout | None = None, site: int = 0
) -> Tensor:
    """Frozen linear of a group of projections plus its LoRA branches.

    Args:
        x_TK: (T, K) activations.
        w_NK: (N, K) frozen weight in x's dtype; a group's weights lie one below the other.
        copies: of the group's branches in x's dtype, as new as the masters.
        dropout: masks of the branches' input, one for the whole group; or None.
        site: number of this group in the model, which the masks depend on.

    Returns:
        (T, N), in x's dtype.
    """
    y_TN: Tensor = _CopiedLora.apply(
        with_dense_rows(x_TK), w_NK, copies, dropout, site, copies.master
    )
    return y_TN
