"""The LoRA linear as a graph split at its rank-wide tensors: a rival formula, re-implemented.

    t = s (m*x) A^T              one pass over x
    y = x W^T + t B^T            one kernel (gemm_lora): the update starts the accumulator
    ds = s dy B,  dB = dy^T t    one pass over dy
    dx = dy W + m*(ds A)         one kernel
    dA = ds^T (m*x)              one pass over x

LoRAFusion's split (Zhu et al., EuroSys 2026, arXiv 2510.00206), with our passes: sums over tokens
in two stages instead of atomics, and the mask computed where it is used instead of stored, both of
which are in its favour. Each projection is on its own. Without the kernels (on a CPU) the same
formula in library products.

Shapes   T tokens, K inputs, N outputs of one projection, R rank.
"""

from typing import Any

import torch
from torch import Tensor

from bioinstruct.kernels import Branch, Dropout, lora_linear
from bioinstruct.kernels.dispatch import uses_triton
from bioinstruct.kernels.gemm_lora import gemm_lora
from bioinstruct.kernels.lora import Group, branch_gradients, write_t


class _GraphSplit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TK: Tensor, w_NK: Tensor, group: Group, a_RK: Tensor, b_NR: Tensor
    ) -> Tensor:
        t_TR = x_TK.new_empty(len(x_TK), len(a_RK))
        write_t(t_TR, x_TK, a_RK, group)
        ctx.save_for_backward(x_TK, w_NK, t_TR, a_RK, b_NR)
        ctx.group = group
        return gemm_lora(x_TK, w_NK, t_TR, b_NR)

    @staticmethod
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, w_NK, t_TR, a_RK, b_NR = ctx.saved_tensors
        group: Group = ctx.group
        ds_TR = torch.empty_like(t_TR)
        gradients = branch_gradients(x_TK, dy_TN, t_TR, ds_TR, group, [a_RK, b_NR])
        dx_TK = gemm_lora(dy_TN, w_NK.T, ds_TR, a_RK.T, group.dropout, group.site)
        return dx_TK, None, None, *gradients


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
        group = Group(scale, dropout, site, (0,))
        outs.append(_GraphSplit.apply(x_TK, w_part, group, branch.a_RK, branch.b_NR))
    return torch.cat(outs, 1)
