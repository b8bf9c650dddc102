"""LoRA linear: a frozen weight and its trainable low-rank branches, forward and backward.

    y  = x W^T + t B^T,   t  = s (m*x) A^T                  (Hu et al. 2021, arXiv 2106.09685)
    dx = dy W  + m*(ds A),   ds = s dy B,   dA = ds^T (m*x),   dB = dy^T t

Projections that share their input (q, k, v; gate, up) are one call: their weights lie one below
the other in W, each adapted one is a branch with its own A and B for its rows of W, and x is read
once for all of them. m is the dropout mask of the branches' input (inverted scale included), the
same for a whole group, regenerated in the backward pass.

Shapes   T = packed tokens, K = input features, N = output features of the group, R = sum of the
         branches' ranks.
Numerics W, x, y in the compute dtype; A and B are float32 masters, cast when they are used; library
         GEMMs accumulate in float32. dA and dB are returned in the masters' dtype.
         On a GPU the products of a rank's width are the passes of skinny.py, which add dA and dB
         into the masters' gradients themselves.
Saved    x_TK, t_TR; W, A and B are only referred to.
Bound    FLOPs: 2*T*N*K each way for W, about R/N + R/K of that for the branches each way, half as
         much again in the backward pass for dA and dB.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels import skinny
from bioinstruct.kernels.dispatch import uses_triton
from bioinstruct.kernels.dropout import Dropout


class Branch(NamedTuple):
    """The adapter of one projection of a group."""

    a_RK: Tensor
    """(R, K) down projection, float32 master."""
    b_NR: Tensor
    """(N, R) up projection, float32 master, zero at the start, not scaled."""
    start: int
    """First row of the group's weight that belongs to this projection."""


# ---- reference ---------------------------------------------------------------------------------


def lora_linear_reference(
    x_TK: Tensor,
    w_NK: Tensor,
    branches: Sequence[Branch],
    scale: float,
    dropout: Dropout | None = None,
    site: int = 0,
) -> Tensor:
    """Compute what lora_linear must compute, branch by branch, through plain autograd."""
    y_TN = x_TK @ w_NK.to(x_TK.dtype).T
    if dropout is not None:
        x_TK = x_TK * dropout.mask(site, x_TK.shape[1], x_TK.dtype)
    for a_RK, b_NR, start in branches:
        update = scale * (x_TK @ a_RK.to(x_TK.dtype).T) @ b_NR.to(x_TK.dtype).T
        pad = (start, y_TN.shape[1] - start - len(b_NR))
        y_TN = y_TN + torch.nn.functional.pad(update, pad)
    return y_TN


# ---- autograd ----------------------------------------------------------------------------------


class Group(NamedTuple):
    """What a call needs beside its tensors."""

    scale: float
    dropout: Dropout | None
    site: int
    starts: tuple[int, ...]
    """First row of each branch."""


def parts_of(group: Group, masters: Sequence[Tensor]) -> list[tuple[slice, slice, Tensor, Tensor]]:
    """Pair each branch's A and B with its columns of y and of t."""
    parts, rank = [], 0
    for start, a_RK, b_NR in zip(group.starts, masters[::2], masters[1::2], strict=True):
        ranks = slice(rank, rank := rank + len(a_RK))
        parts.append((slice(start, start + len(b_NR)), ranks, a_RK, b_NR))
    return parts


def _stacked_a(masters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return (masters[0] if len(masters) == 2 else torch.cat(tuple(masters[::2]))).to(dtype)


class _LoraLinear(torch.autograd.Function):
    # the masters are inputs, or the first layer, whose x needs no gradient, would never be visited

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, w_NK: Tensor, group: Group, *masters: Tensor) -> Tensor:
        inner_TK = x_TK
        if group.dropout is not None:
            inner_TK = x_TK * group.dropout.mask(group.site, x_TK.shape[1], x_TK.dtype)
        t_TR = torch.mm(inner_TK, _stacked_a(masters, x_TK.dtype).T).mul_(group.scale)
        y_TN = torch.mm(x_TK, w_NK.T)
        for columns, ranks, _, b_NR in parts_of(group, masters):
            y_TN[:, columns].addmm_(t_TR[:, ranks], b_NR.to(x_TK.dtype).T)
        ctx.save_for_backward(x_TK, w_NK, t_TR, *masters)
        ctx.group = group
        return y_TN

    @staticmethod
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, w_NK, t_TR, *masters = ctx.saved_tensors
        group: Group = ctx.group
        ds_TR = torch.empty_like(t_TR)
        gradients: list[Tensor | None] = [None] * len(masters)
        for i, (columns, ranks, _, b_NR) in enumerate(parts_of(group, masters)):
            dy_part = dy_TN[:, columns]
            ds_TR[:, ranks] = torch.mm(dy_part, b_NR.to(dy_TN.dtype))
            gradients[2 * i + 1] = torch.mm(dy_part.T, t_TR[:, ranks]).to(b_NR.dtype)
        ds_TR.mul_(group.scale)
        mask_TK = None
        if group.dropout is not None:
            mask_TK = group.dropout.mask(group.site, x_TK.shape[1], x_TK.dtype)
        da_RK = torch.mm(ds_TR.T, x_TK if mask_TK is None else x_TK * mask_TK)
        for i, (_, ranks, a_RK, _) in enumerate(parts_of(group, masters)):
            gradients[2 * i] = da_RK[ranks].to(a_RK.dtype)
        dx_TK = None
        if ctx.needs_input_grad[0]:
            a_RK = _stacked_a(masters, dy_TN.dtype)
            dx_TK = torch.mm(dy_TN, w_NK)
            if mask_TK is None:
                dx_TK.addmm_(ds_TR, a_RK)
            else:
                dx_TK.addcmul_(torch.mm(ds_TR, a_RK), mask_TK)
        return dx_TK, None, None, *gradients


class _FusedLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, w_NK: Tensor, group: Group, *masters: Tensor) -> Tensor:
        x_TK = with_dense_rows(x_TK)
        y_TN = torch.mm(x_TK, w_NK.T)
        a_RK = _stacked_a(masters, x_TK.dtype)
        t_TR = x_TK.new_empty(len(x_TK), len(a_RK))
        write_t(t_TR, x_TK, a_RK, group)
        for columns, ranks, _, b_NR in parts_of(group, masters):
            y_TN[:, columns].addmm_(t_TR[:, ranks], b_NR.to(x_TK.dtype).T)
        ctx.save_for_backward(x_TK, w_NK, t_TR, *masters)
        ctx.group = group
        return y_TN

    @staticmethod
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, w_NK, t_TR, *masters = ctx.saved_tensors
        group: Group = ctx.group
        dy_TN, ds_TR = with_dense_rows(dy_TN), torch.empty_like(t_TR)
        gradients = branch_gradients(x_TK, dy_TN, t_TR, ds_TR, group, masters)
        dx_TK = None
        if ctx.needs_input_grad[0]:
            dx_TK = input_gradient(dy_TN, w_NK, ds_TR, _stacked_a(masters, dy_TN.dtype), group)
        return dx_TK, None, None, *gradients


def with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _chunks(R: int) -> list[slice]:
    """Slices of at most MAX_RANK."""
    return [slice(i, min(i + skinny.MAX_RANK, R)) for i in range(0, R, skinny.MAX_RANK)]


def write_t(t_TR: Tensor, x_TK: Tensor, a_RK: Tensor, group: Group) -> None:
    """t = s (m*x) A^T of the whole group; t's and A's rows may be strided."""
    if len(a_RK) > skinny.MAX_RANK and group.dropout is None:
        torch.mm(x_TK, a_RK.T, out=t_TR).mul_(group.scale)
        return
    for ranks in _chunks(len(a_RK)):
        part = x_TK, a_RK[ranks], t_TR[:, ranks]
        skinny.shrink(*part, group.scale, group.dropout, group.site)


def branch_gradients(
    x_TK: Tensor,
    dy_TN: Tensor,
    t_TR: Tensor,
    ds_TR: Tensor,
    group: Group,
    masters: Sequence[Tensor],
) -> list[Tensor | None]:
    """Write ds = s dy B, and return dA and dB of every branch, None where added to its gradient."""
    gradients: list[Tensor | None] = [None] * len(masters)
    for i, (columns, ranks, _, b_NR) in enumerate(parts_of(group, masters)):
        part = dy_TN[:, columns], b_NR, t_TR[:, ranks], ds_TR[:, ranks]
        gradients[2 * i + 1] = _up_backward(*part, group.scale)
    gradients[::2] = _down_backward(x_TK, ds_TR, group, masters)
    return gradients


def _up_backward(
    dy_TN: Tensor, b_NR: Tensor, t_TR: Tensor, ds_TR: Tensor, scale: float
) -> Tensor | None:
    """Write ds = s dy B of one branch, and return dB unless it was added to B's gradient."""
    if b_NR.shape[1] <= skinny.MAX_RANK:
        return skinny.add_gradient(b_NR, skinny.shrink_dy(dy_TN, b_NR, t_TR, ds_TR, scale))
    ds_TR.copy_(torch.mm(dy_TN, b_NR.to(dy_TN.dtype)).mul_(scale))
    return torch.mm(dy_TN.T, t_TR).to(b_NR.dtype)


def _down_backward(
    x_TK: Tensor, ds_TR: Tensor, group: Group, masters: Sequence[Tensor]
) -> list[Tensor | None]:
    """dA of every branch, or None where it was added to A's gradient."""
    parts = parts_of(group, masters)
    if ds_TR.shape[1] > skinny.MAX_RANK and group.dropout is None:
        da_RK = torch.mm(ds_TR.T, x_TK)
        return [da_RK[ranks].to(a_RK.dtype) for _, ranks, a_RK, _ in parts]
    sums = [
        skinny.gradient_of_a(ds_TR[:, ranks], x_TK, group.dropout, group.site)
        for ranks in _chunks(ds_TR.shape[1])
    ]
    sums_PRK = sums[0] if len(sums) == 1 else torch.cat(sums, dim=1)
    return [
        skinny.add_gradient(a_RK, sums_PRK[:, ranks], skinny.keep_scale(group.dropout))
        for _, ranks, a_RK, _ in parts
    ]


def input_gradient(
    dy_TN: Tensor, w_NK: Tensor, ds_TR: Tensor, a_RK: Tensor, group: Group
) -> Tensor:
    """dx = dy W + m*(ds A)."""
    if group.dropout is None:
        return torch.mm(dy_TN, w_NK).addmm_(ds_TR, a_RK)
    if len(a_RK) <= skinny.MAX_RANK:
        g_TK = skinny.masked_expand(ds_TR, a_RK, group.dropout, group.site)
    else:
        mask_TK = group.dropout.mask(group.site, a_RK.shape[1], dy_TN.dtype)
        g_TK = torch.mm(ds_TR, a_RK).mul_(mask_TK)
    return g_TK.addmm_(dy_TN, w_NK)


def lora_linear(
    x_TK: Tensor,
    w_NK: Tensor,
    branches: Sequence[Branch] = (),
    scale: float = 1.0,
    dropout: Dropout | None = None,
    site: int = 0,
) -> Tensor:
    """Frozen linear of one projection, or of a group that shares its input, plus LoRA branches.

    Args:
        x_TK: (T, K) activations.
        w_NK: (N, K) frozen weight in x's dtype; a group's weights lie one below the other.
        branches: adapters of the adapted projections; empty for the plain frozen linear.
        scale: alpha / r, applied to every branch.
        dropout: masks of the branches' input, or None.
        site: number of this group in the model, which the masks depend on.

    Returns:
        (T, N), in x's dtype.

    Raises:
        ValueError: if the shapes do not match or branches overlap.
    """
    if x_TK.ndim != 2 or w_NK.ndim != 2 or x_TK.shape[1] != w_NK.shape[1]:
        raise ValueError(
            f"lora_linear needs x_TK (T, K) and w_NK (N, K), got {tuple(x_TK.shape)}, "
            f"{tuple(w_NK.shape)}"
        )
    if not branches:
        return torch.mm(x_TK, w_NK.T)
    _check(branches, *w_NK.shape)
    group = Group(scale, dropout, site, tuple(b.start for b in branches))
    masters = [m for branch in branches for m in (branch.a_RK, branch.b_NR)]
    function = _FusedLoraLinear if uses_triton(x_TK, w_NK, *masters) else _LoraLinear
    y_TN: Tensor = function.apply(x_TK, w_NK, group, *masters)
    return y_TN


def _check(branches: Sequence[Branch], N: int, K: int) -> None:
    end = 0
    for a_RK, b_NR, start in branches:
        if a_RK.shape[1] != K or a_RK.shape[0] != b_NR.shape[1]:
            raise ValueError(
                f"a LoRA branch needs A (R, {K}) and B (N, R), got {tuple(a_RK.shape)}, "
                f"{tuple(b_NR.shape)}"
            )
        if start < end or start + len(b_NR) > N:
            raise ValueError(
                f"LoRA branches must be in order and within the weight's {N} rows; one covers rows "
                f"{start} to {start + len(b_NR)}"
            )
        end = start + len(b_NR)
