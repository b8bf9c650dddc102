"""The LoRA linear as a graph split at its rank-wide tensors: a rival formula, re-implemented.

    x' = m*x                     stored, where there is dropout
    t = s x' A^T                 one pass over x'
    y = x W^T + t B^T            one kernel (gemm_lora): the update starts the accumulator
    ds = s dy B,  dB = dy^T t    one pass over dy
    dx = dy W + m*(ds A)         one kernel
    dA = ds^T x'                 one pass over x'

LoRAFusion's split (Zhu et al., EuroSys 2026, arXiv 2510.00206), with two things in its favour: sums
over tokens in two stages instead of atomics, and no stored mask. Each projection is on its own.
Without the kernels (on a CPU) it is lora_linear.

Shapes   T tokens, K inputs, N outputs of one projection, R rank.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels import Branch, Dropout, lora_linear, skinny
from bioinstruct.kernels.dispatch import uses_triton
from bioinstruct.kernels.gemm_lora import gemm_lora


class _Given(NamedTuple):
    scale: float
    dropout: Dropout | None
    site: int


class _GraphSplit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TK: Tensor, w_NK: Tensor, given: _Given, a_RK: Tensor, b_NR: Tensor
    ) -> Tensor:
        inner_TK = x_TK
        if given.dropout is not None:
            inner_TK = x_TK * given.dropout.mask(given.site, x_TK.shape[1], x_TK.dtype)
        t_TR = torch.mm(inner_TK, a_RK.to(x_TK.dtype).T).mul_(given.scale)
        ctx.save_for_backward(inner_TK, w_NK, t_TR, a_RK, b_NR)
        ctx.given = given
        return gemm_lora(x_TK, w_NK, t_TR, b_NR)

    @staticmethod
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        inner_TK, w_NK, t_TR, a_RK, b_NR = ctx.saved_tensors
        given: _Given = ctx.given
        dy_TN, ds_TR = dy_TN.contiguous(), torch.empty_like(t_TR)
        parts_PNR = skinny.shrink_dy(dy_TN, b_NR.contiguous(), t_TR, ds_TR, given.scale)
        (db_NR,) = skinny.settled([skinny.Parts(b_NR, parts_PNR)])
        da_RK = torch.mm(ds_TR.T, inner_TK).to(a_RK.dtype)
        dx_TK = gemm_lora(dy_TN, w_NK.T, ds_TR, a_RK.T, given.dropout, given.site)
        return dx_TK, None, None, da_RK, db_NR


def graph_split(
    x_TK: Tensor,
    w_NK: Tensor,
    branches: list[Branch],
    scale: float,
    dropout: Dropout | None,
    site: int,
) -> Tensor:
    """lora_linear by this split, where every projection of the group has a branch."""
    if not uses_triton(x_TK, w_NK):
        return lora_linear(x_TK, w_NK, branches, scale, dropout, site)
    outs = []
    for branch in branches:
        w_part = w_NK[branch.start : branch.start + len(branch.b_NR)]
        given = _Given(scale, dropout, site)
        outs.append(_GraphSplit.apply(x_TK, w_part, given, branch.a_RK, branch.b_NR))
    return torch.cat(outs, 1)
