"""The path over copies of the masters against the reference in float64, gradients included."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bioinstruct.kernels import Branch, Copies, Dropout, Frozen, copied_linear
from bioinstruct.kernels.lora import lora_linear_reference
from bioinstruct.kernels.lora_copied import CopiedB

SCALE = 0.75


class Case(NamedTuple):
    K: int
    N: int
    branches: tuple[tuple[int, int, int, float], ...]
    """Start, rows, rank and factor of each."""


CASES = {
    "one": Case(24, 40, ((0, 40, 3, 1.0),)),
    "qkv": Case(33, 50, ((0, 30, 4, 1.0), (30, 10, 2, 0.5), (40, 10, 4, 3.0))),
    "k alone": Case(16, 30, ((20, 5, 5, 1.0),)),
}


def tensors(case: Case, T: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, list[Branch]]:
    """x, W, dy, and branches that are exact in dtype."""
    generator = torch.Generator().manual_seed(T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).double()

    branches = [
        Branch(normal(R, case.K).requires_grad_(), normal(N, R).requires_grad_(), start, factor, i)
        for i, (start, N, R, factor) in enumerate(case.branches)
    ]
    return normal(T, case.K), normal(case.N, case.K), normal(T, case.N), branches


def copies_of(branches: list[Branch], dtype: torch.dtype) -> Copies:
    """What Adapters.copies makes, with gradients that already hold something."""
    a_RK = torch.cat([b.a_RK.detach() for b in branches])
    wide = torch.promote_types(dtype, torch.float32)
    copied, rank = [], 0
    for branch in branches:
        scale = SCALE * branch.factor
        b_NR = (branch.b_NR.detach().to(wide) * scale).to(dtype)
        grad_NR = torch.ones(b_NR.shape, dtype=wide)
        copied.append(CopiedB(b_NR, grad_NR, scale, branch.start, rank))
        rank += len(branch.a_RK)
    master = branches[0].a_RK.detach().clone().requires_grad_()
    return Copies(a_RK.to(dtype), torch.ones(a_RK.shape, dtype=wide), copied, master)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("T", [1, 19])
@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_the_reference_does(
    name: str, T: int, p: float, dtype: torch.dtype
) -> None:
    x, w, dy, branches = tensors(CASES[name], T, dtype)
    dropout = Dropout(p, 11, torch.arange(T), torch.arange(T) // 5) if p else None

    def reference(kind: torch.dtype) -> list[Tensor]:
        leaf = x.to(kind, copy=True).requires_grad_()
        for branch in branches:
            branch.a_RK.grad = branch.b_NR.grad = None
        y = lora_linear_reference(leaf, w.to(kind), branches, SCALE, dropout, 6)
        y.backward(dy.to(kind))
        found = [y.detach(), leaf.grad, *(b.a_RK.grad for b in branches)]
        return [t.double() for t in (*found, *(b.b_NR.grad for b in branches)) if t is not None]

    exact, eager = reference(torch.float64), reference(dtype)
    copies, leaf = copies_of(branches, dtype), x.to(dtype, copy=True).requires_grad_()
    y = copied_linear(leaf, Frozen(w.to(dtype), copies, dropout, 6))
    y.backward(dy.to(dtype))
    assert leaf.grad is not None and copies.master.grad is None
    da = (copies.a_grad_RK - 1).split([len(b.a_RK) for b in branches])
    ours = [y.detach(), leaf.grad, *da, *(b.grad_NR - 1 for b in copies.branches)]
    scale = max(float(t.abs().max()) for t in exact)
    units = 64 if dtype == torch.float64 else 4  # B times its scale is rounded once more
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        allowed = 2 * (theirs - truth).abs().max() + units * torch.finfo(dtype).eps * scale
        assert (mine - truth).abs().max() <= allowed


def test_the_first_layer_whose_input_needs_no_gradient_still_learns() -> None:
    x, w, dy, branches = tensors(CASES["qkv"], 7, torch.float32)
    copies = copies_of(branches, torch.float32)
    copied_linear(x.float(), Frozen(w.float(), copies)).backward(dy.float())
    assert not torch.equal(copies.a_grad_RK, torch.ones_like(copies.a_grad_RK))


def test_only_x_and_t_are_saved() -> None:
    x, w, _, branches = tensors(CASES["qkv"], 7, torch.float32)
    leaf, saved = x.float().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        copied_linear(leaf, Frozen(w.float(), copies_of(branches, torch.float32)))
    assert [tuple(t.shape) for t in saved] == [(7, 33), (7, 10)]
