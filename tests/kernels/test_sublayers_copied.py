"""The halves of a layer over copied masters against their operations' references in float64."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bioinstruct.kernels import (
    Branch,
    Copies,
    Dropout,
    Frozen,
    Gain,
    copied_norm_linear,
    copied_norm_mlp,
    dispatch,
)
from bioinstruct.kernels.lora import lora_linear_reference
from bioinstruct.kernels.lora_copied import CopiedB
from bioinstruct.kernels.rmsnorm import rmsnorm_reference
from bioinstruct.kernels.swiglu import swiglu_reference

SCALE, EPS, D, F, RANK = 0.75, 1e-5, 36, 40, 4
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
Pair = tuple[Tensor, Tensor]


class Group(NamedTuple):
    """A projection and its branches, as float64 leaves."""

    w_NK: Tensor
    branches: list[Branch]
    site: int

    def copies(self, dtype: torch.dtype) -> Copies:
        wide = torch.promote_types(dtype, torch.float32)
        a_RK = torch.cat([b.a_RK.detach() for b in self.branches])
        copied = [
            CopiedB(
                (b.b_NR.detach().to(wide) * SCALE).to(dtype),
                torch.zeros(b.b_NR.shape, dtype=wide),
                SCALE, b.start, i * RANK,
            )
            for i, b in enumerate(self.branches)
        ]  # fmt: skip
        master = self.branches[0].a_RK.detach().clone().requires_grad_()
        return Copies(a_RK.to(dtype), torch.zeros(a_RK.shape, dtype=wide), copied, master)


def group(N: int, K: int, rows: Sequence[int], site: int, dtype: torch.dtype) -> Group:
    generator = torch.Generator().manual_seed(site)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / 4).to(dtype).double()

    starts = [sum(rows[:i]) for i in range(len(rows))]
    branches = [
        Branch(normal(RANK, K).requires_grad_(), normal(n, RANK).requires_grad_(), start)
        for n, start in zip(rows, starts, strict=True)
    ]
    return Group(normal(N, K), branches, site)


def rows_of(T: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T)
    return [torch.randn(T, D, generator=generator).to(dtype).double() for _ in range(4)]


def backward(out: Pair, dh: Tensor, dy: Tensor) -> None:
    torch.autograd.backward(out, (dh.to(out[0].dtype), dy[:, : out[1].shape[1]].to(out[1].dtype)))


def by_reference(
    half: Callable[[Tensor, Tensor], Pair], groups: Sequence[Group], T: int, dtype: torch.dtype
) -> list[Tensor]:
    """Outputs and gradients: of x, of delta, of every A and B."""
    x, delta, dh, dy = (t.to(dtype, copy=True) for t in rows_of(T, dtype))
    leaves = [x.requires_grad_(), delta.requires_grad_()]
    masters = [m for g in groups for b in g.branches for m in (b.a_RK, b.b_NR)]
    for master in masters:
        master.grad = None
    out = half(*leaves)
    backward(out, dh, torch.cat([dy] * 4, 1))
    found = [*(o.detach() for o in out), *(t.grad for t in leaves), *(m.grad for m in masters)]
    return [t.double() for t in found if t is not None]


def check(
    half: Callable[[torch.dtype], Callable[[Tensor, Tensor], Pair]],
    ours: Callable[[Tensor, Tensor, list[Frozen]], Pair],
    groups: Sequence[Group],
    T: int,
    p: float,
    dtype: torch.dtype,
) -> None:
    exact = by_reference(half(torch.float64), groups, T, torch.float64)
    eager = by_reference(half(dtype), groups, T, dtype)
    x, delta, dh, dy = (t.to(dtype, copy=True) for t in rows_of(T, dtype))
    leaves = [x.requires_grad_(), delta.requires_grad_()]
    frozen = [Frozen(g.w_NK.to(dtype), g.copies(dtype), dropout_of(T, p), g.site) for g in groups]
    out = ours(*leaves, frozen)
    backward(out, dh, torch.cat([dy] * 4, 1))
    found: list[Tensor | None] = [*(o.detach() for o in out), *(t.grad for t in leaves)]
    for f in frozen:
        assert f.copies is not None and f.copies.master.grad is None
        a_grads = f.copies.a_grad_RK.split(RANK)
        found += [
            m for a, b in zip(a_grads, f.copies.branches, strict=True) for m in (a, b.grad_NR)
        ]
    scale = max(float(t.abs().max()) for t in exact)
    units = 64 if dtype == torch.float64 else 4  # B times its scale is rounded once more
    for mine, theirs, truth in zip(found, eager, exact, strict=True):
        assert mine is not None
        allowed = 2 * (theirs - truth).abs().max() + units * torch.finfo(dtype).eps * scale
        assert (mine - truth).abs().max() <= allowed


def dropout_of(T: int, p: float) -> Dropout | None:
    return Dropout(p, 11, torch.arange(T), torch.arange(T) // 5) if p else None


def gain(dtype: torch.dtype) -> Tensor:
    return torch.linspace(0.5, 1.5, D, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("T", [1, 19])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_norm_and_projection(kernels: str, T: int, p: float, dtype: torch.dtype) -> None:
    qkv, bias = group(50, D, (30, 10, 10), 4, dtype), torch.linspace(-1, 1, 50).to(dtype)

    def half(kind: torch.dtype) -> Callable[[Tensor, Tensor], Pair]:
        def run(x: Tensor, delta: Tensor) -> Pair:
            h = x + delta
            n = rmsnorm_reference(h, gain(dtype).to(kind), EPS)
            y = lora_linear_reference(
                n, qkv.w_NK.to(kind), qkv.branches, SCALE, dropout_of(T, p), qkv.site
            )
            return h, y + bias.to(kind)

        return run

    def ours(x: Tensor, delta: Tensor, frozen: list[Frozen]) -> Pair:
        return copied_norm_linear(x, delta, Gain(gain(dtype), EPS), frozen[0], bias)

    with dispatch.forced(kernels):
        check(half, ours, [qkv], T, p, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("T", [1, 19])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_norm_and_feed_forward(kernels: str, T: int, p: float, dtype: torch.dtype) -> None:
    groups = group(2 * F, D, (F, F), 6, dtype), group(D, F, (D,), 7, dtype)

    def half(kind: torch.dtype) -> Callable[[Tensor, Tensor], Pair]:
        def linear(x: Tensor, own: Group) -> Tensor:
            given = own.w_NK.to(kind), own.branches, SCALE, dropout_of(T, p), own.site
            return lora_linear_reference(x, *given)

        def run(x: Tensor, delta: Tensor) -> Pair:
            h = x + delta
            n = rmsnorm_reference(h, gain(dtype).to(kind), EPS)
            return h, linear(swiglu_reference(linear(n, groups[0])), groups[1])

        return run

    def ours(x: Tensor, delta: Tensor, frozen: list[Frozen]) -> Pair:
        return copied_norm_mlp(x, delta, Gain(gain(dtype), EPS), *frozen)

    with dispatch.forced(kernels):
        check(half, ours, groups, T, p, dtype)


def test_without_a_delta_the_first_layer_learns_and_adds_alike() -> None:
    qkv = group(50, D, (50,), 4, torch.float32)
    x, delta, dh, dy = (t.float() for t in rows_of(7, torch.float32))
    found = []
    for given in ((x, delta), (x + delta, None)):
        frozen = Frozen(qkv.w_NK.float(), qkv.copies(torch.float32))
        leaf = given[0].clone().requires_grad_()
        out = copied_norm_linear(leaf, given[1], Gain(gain(torch.float32), EPS), frozen)
        backward(out, dh, torch.cat([dy] * 4, 1))
        assert frozen.copies is not None and frozen.copies.a_grad_RK.any()
        found.append([*out, leaf.grad, frozen.copies.a_grad_RK])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None)
    frozen = Frozen(qkv.w_NK.float(), qkv.copies(torch.float32))
    out = copied_norm_linear(x + delta, None, Gain(gain(torch.float32), EPS), frozen)
    backward(out, dh, torch.cat([dy] * 4, 1))
    assert frozen.copies is not None
    assert torch.equal(frozen.copies.a_grad_RK, found[1][3])


def test_neither_norms_nor_gated_products_are_saved() -> None:
    groups = (
        group(2 * F, D, (F, F), 6, torch.float32),
        group(D, F, (D,), 7, torch.float32),
    )
    frozen = [Frozen(g.w_NK.float(), g.copies(torch.float32)) for g in groups]
    x, delta, *_ = (t.float().requires_grad_() for t in rows_of(7, torch.float32))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        copied_norm_mlp(x, delta, Gain(gain(torch.float32), EPS), *frozen)
    assert [tuple(t.shape) for t in saved] == [(7, D), (7,), (7, 2 * RANK), (7, 2 * F), (7, RANK)]
