"""LoRA linear: a frozen weight and its trainable low-rank branches, forward and backward.

    y  = x W^T + t B^T,   t  = s (m*x) A^T                  (Hu et al. 2021, arXiv 2106.09685)
    dx = dy W  + m*(ds A),   ds = s dy B,   dA = ds^T (m*x),   dB = dy^T t

Projections that share their input (q, k, v; gate, up) are one call: their weights lie one below
the other in W, each adapted one is a branch with its own A and B for its rows of W, and x is read
once for all of them. m is the dropout mask of the branches' input (inverted scale included),
regenerated in the backward pass: one for a whole group, or one a branch, as PEFT draws it.

Shapes   T = packed tokens, K = input features, N = output features of the group, R = sum of the
         branches' ranks.
Numerics W, x, y in the compute dtype; A and B are float32 masters, cast when they are used; library
         GEMMs accumulate in float32. dA and dB are added into the masters' gradients where those
         exist, which saves a pass over them, and returned in the masters' dtype elsewhere.
         On a GPU the products of a rank's width are the passes of skinny.py; lora_copied.py is the
         same with less work around them.
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
from bioinstruct.kernels.gemm_lora import gemm_lora, takes_product
from bioinstruct.kernels.rows import with_dense_rows
from bioinstruct.kernels.skinny import Gradient, Parts, settled


class Branch(NamedTuple):
    """The adapter of one projection of a group."""

    a_RK: Tensor
    """(R, K) down projection, float32 master."""
    b_NR: Tensor
    """(N, R) up projection, float32 master, zero at the start, not scaled."""
    start: int
    """First row of the group's weight that belongs to this projection."""
    factor: float = 1.0
    """Its scale as a multiple of the call's."""
    number: int = 0
    """Which projection of the group it is, counted from 0; tells the masks of branches apart."""


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
    for a_RK, b_NR, start, factor, number in branches:
        inner_TK = x_TK
        if dropout is not None:
            own = dropout.site_of(site, number)
            inner_TK = x_TK * dropout.mask(own, x_TK.shape[1], x_TK.dtype)
        update = scale * factor * (inner_TK @ a_RK.to(x_TK.dtype).T) @ b_NR.to(x_TK.dtype).T
        pad = (start, y_TN.shape[1] - start - len(b_NR))
        y_TN = y_TN + torch.nn.functional.pad(update, pad)
    return y_TN


# ---- the passes of a rank's width --------------------------------------------------------------


class Group(NamedTuple):
    """What a call needs beside its tensors."""

    scale: float
    dropout: Dropout | None
    starts: tuple[int, ...]
    """First row of each branch."""
    factors: tuple[float, ...]
    """Of each branch."""
    sites: tuple[int, ...]
    """Mask of each branch; all the same unless masks are drawn per module."""
    fused: bool
    """Whether the kernels run."""


def group_of(
    branches: Sequence[Branch],
    scale: float,
    dropout: Dropout | None,
    site: int,
    *,
    fused: bool,
) -> Group:
    """Collect what a call needs beside its tensors."""
    sites = [site if dropout is None else dropout.site_of(site, b.number) for b in branches]
    starts, factors = [b.start for b in branches], [b.factor for b in branches]
    return Group(scale, dropout, tuple(starts), tuple(factors), tuple(sites), fused)


class Part(NamedTuple):
    """One branch's place in its group."""

    columns: slice
    """Of y."""
    ranks: slice
    """Columns of t."""
    a_RK: Tensor
    b_NR: Tensor
    factor: float


def parts_of(group: Group, masters: Sequence[Tensor]) -> list[Part]:
    """Pair each branch's A and B with its columns of y and of t."""
    parts, rank = [], 0
    pairs = zip(group.starts, masters[::2], masters[1::2], group.factors, strict=True)
    for start, a_RK, b_NR, factor in pairs:
        ranks = slice(rank, rank := rank + len(a_RK))
        parts.append(Part(slice(start, start + len(b_NR)), ranks, a_RK, b_NR, factor))
    return parts


class Span(NamedTuple):
    """Ranks of t that are made in one pass, and the site of their mask."""

    ranks: slice
    site: int


def spans_of(group: Group, parts: Sequence[Part], R: int) -> list[Span]:
    """All R ranks where there is no mask, else runs of one mask that a kernel can take."""
    if group.dropout is None:
        return [Span(slice(0, R), 0)]
    runs: list[Span] = []
    for part, site in zip(parts, group.sites, strict=True):
        if runs and runs[-1].site == site:
            runs[-1] = Span(slice(runs[-1].ranks.start, part.ranks.stop), site)
        else:
            runs.append(Span(part.ranks, site))
    most = skinny.MAX_RANK if group.fused else R
    return [
        Span(slice(first, min(first + most, ranks.stop)), site)
        for ranks, site in runs
        for first in range(ranks.start, ranks.stop, most)
    ]


def _stacked_a(parts: Sequence[Part], dtype: torch.dtype) -> Tensor:
    """Every A of a group, one below the other."""
    return (parts[0].a_RK if len(parts) == 1 else torch.cat([p.a_RK for p in parts])).to(dtype)


def _narrow_b(part: Part, dtype: torch.dtype) -> Tensor:
    """B in the compute dtype, its factor included."""
    return (part.b_NR if part.factor == 1 else part.b_NR * part.factor).to(dtype)


def _by_kernel(group: Group, ranks: slice) -> bool:
    return group.fused and ranks.stop - ranks.start <= skinny.MAX_RANK


def _masked(x_TK: Tensor, group: Group, site: int) -> Tensor:
    if group.dropout is None:
        return x_TK
    return x_TK * group.dropout.mask(site, x_TK.shape[1], x_TK.dtype)


def write_t(t_TR: Tensor, x_TK: Tensor, a_RK: Tensor, group: Group, parts: Sequence[Part]) -> None:
    """t = s (m*x) A^T of the whole group; t's and A's rows may be strided.

    A may have rows beyond the parts' ranks; they are zero, and so are their columns of t.
    """
    spans = spans_of(group, parts, len(a_RK))
    t_TR[:, spans[-1].ranks.stop :] = 0
    for ranks, site in spans:
        if _by_kernel(group, ranks):
            part = x_TK, a_RK[ranks], t_TR[:, ranks]
            skinny.shrink(*part, group.scale, group.dropout, site)
        else:
            part_TR = torch.mm(_masked(x_TK, group, site), a_RK[ranks].T, out=t_TR[:, ranks])
            part_TR.mul_(group.scale)


def up_backward(
    dy_TN: Tensor, t_TR: Tensor, ds_TR: Tensor, group: Group, parts: Sequence[Part]
) -> list[Gradient]:
    """Write ds = s dy B, and return dB of every branch."""
    found: list[Gradient] = []
    for part in parts:
        dy, t, ds = dy_TN[:, part.columns], t_TR[:, part.ranks], ds_TR[:, part.ranks]
        if _by_kernel(group, part.ranks):
            sums = skinny.shrink_dy(dy, part.b_NR, t, ds, group.scale * part.factor)
            found.append(Parts(part.b_NR, sums, part.factor))
        else:
            torch.mm(dy, _narrow_b(part, dy.dtype), out=ds).mul_(group.scale)
            found.append(_added(part.b_NR, dy.T, t, part.factor))
    return found


def _added(master: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor | None:
    """Add factor times a product to the master's gradient and return None; or return it."""
    if master.grad is None:
        return torch.mm(left, right).mul_(factor).to(master.dtype)
    _add_product(master.grad, left, right, factor)
    return None


def _add_product(total: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=factor)
    else:
        total.add_(torch.mm(left, right), alpha=factor)


def down_backward(
    source: skinny.Source, ds_TR: Tensor, group: Group, parts: Sequence[Part]
) -> list[Gradient]:
    """dA = ds^T (m*x) of every branch."""
    if not group.fused:
        inner = {site: _masked(source.made(), group, site) for site in set(group.sites)}
        return [
            _added(part.a_RK, ds_TR[:, part.ranks].T, inner[site])
            for part, site in zip(parts, group.sites, strict=True)
        ]
    sums = [
        skinny.gradient_of_a(ds_TR[:, ranks], source, group.dropout, site)
        if _by_kernel(group, ranks)
        else source.gradient(ds_TR[:, ranks])[None]
        for ranks, site in spans_of(group, parts, ds_TR.shape[1])
    ]
    sums_PRK = sums[0] if len(sums) == 1 else torch.cat(sums, dim=1)
    scale = skinny.keep_scale(group.dropout)
    return [Parts(p.a_RK, sums_PRK[:, p.ranks], scale) for p in parts]


def input_gradient(
    dy_TN: Tensor,
    w_NK: Tensor,
    ds_TR: Tensor,
    a_RK: Tensor,
    group: Group,
    parts: Sequence[Part],
) -> Tensor:
    """dx = dy W + m*(ds A)."""
    if group.fused and len(set(group.sites)) == 1 and takes_product(dy_TN, w_NK.T, len(a_RK)):
        return gemm_lora(dy_TN, w_NK.T, ds_TR, a_RK.T, group.dropout, group.sites[0])
    if group.dropout is None:
        return torch.mm(dy_TN, w_NK).addmm_(ds_TR, a_RK)
    g_TK: Tensor | None = None
    for ranks, site in spans_of(group, parts, ds_TR.shape[1]):
        if _by_kernel(group, ranks):
            g_TK = skinny.masked_expand(ds_TR[:, ranks], a_RK[ranks], group.dropout, site, g_TK)
        else:
            own_TK = _masked(torch.mm(ds_TR[:, ranks], a_RK[ranks]), group, site)
            g_TK = own_TK if g_TK is None else g_TK.add_(own_TK)
    assert g_TK is not None
    return g_TK.addmm_(dy_TN, w_NK)


# ---- autograd ----------------------------------------------------------------------------------


def in_turn(da: Sequence[Gradient], db: Sequence[Gradient]) -> list[Tensor | None]:
    """Gradients of A and B of every branch, in the masters' order; None where added already."""
    return settled([gradient for pair in zip(da, db, strict=True) for gradient in pair])


class _LoraLinear(torch.autograd.Function):
    # the masters are inputs, or the first layer, whose x needs no gradient, would never be visited

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, w_NK: Tensor, group: Group, *masters: Tensor) -> Tensor:
        x_TK, parts = with_dense_rows(x_TK), parts_of(group, masters)
        a_RK = _stacked_a(parts, x_TK.dtype)
        t_TR = x_TK.new_empty(len(x_TK), len(a_RK))
        write_t(t_TR, x_TK, a_RK, group, parts)
        narrow = [_narrow_b(part, x_TK.dtype) for part in parts]
        is_whole = len(parts) == 1 and len(narrow[0]) == len(w_NK)
        if group.fused and is_whole and takes_product(x_TK, w_NK, len(a_RK)):
            y_TN = gemm_lora(x_TK, w_NK, t_TR, narrow[0])
        else:
            y_TN = torch.mm(x_TK, w_NK.T)
            for part, b_NR in zip(parts, narrow, strict=True):
                y_TN[:, part.columns].addmm_(t_TR[:, part.ranks], b_NR.T)
        ctx.save_for_backward(x_TK, w_NK, t_TR, *masters)
        ctx.group = group
        return y_TN

    @staticmethod
    def backward(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, w_NK, t_TR, *masters = ctx.saved_tensors
        group: Group = ctx.group
        dy_TN, ds_TR = with_dense_rows(dy_TN), torch.empty_like(t_TR)
        parts = parts_of(group, masters)
        db = up_backward(dy_TN, t_TR, ds_TR, group, parts)
        da = down_backward(skinny.Source(x_TK), ds_TR, group, parts)
        dx_TK = None
        if ctx.needs_input_grad[0]:
            a_RK = _stacked_a(parts, dy_TN.dtype)
            dx_TK = input_gradient(dy_TN, w_NK, ds_TR, a_RK, group, parts)
        return dx_TK, None, None, *in_turn(da, db)


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
        scale: alpha / r, times a branch's own factor.
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
    masters = [m for branch in branches for m in (branch.a_RK, branch.b_NR)]
    fused = uses_triton(x_TK, w_NK, *masters)
    group = group_of(branches, scale, dropout, site, fused=fused)
    y_TN: Tensor = _LoraLinear.apply(x_TK, w_NK, group, *masters)
    return y_TN


def _check(branches: Sequence[Branch], N: int, K: int) -> None:
    end = 0
    for a_RK, b_NR, start, *_ in branches:
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
