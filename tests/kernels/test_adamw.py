"""The flat optimizer against torch's own AdamW."""

import math

import pytest
import torch

from bioinstruct.kernels import adamw
from bioinstruct.kernels.adamw import adamw_, clip_factor, global_norm


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_ten_updates_equal_torchs(weight_decay: float) -> None:
    torch.manual_seed(0)
    start = torch.randn(100, dtype=torch.float64)
    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=0.01, weight_decay=weight_decay)
    ours, m, v = start.clone(), torch.zeros(100).double(), torch.zeros(100).double()
    for step in range(1, 11):
        grad = torch.randn(100, dtype=torch.float64)
        theirs.grad = grad.clone()
        optimizer.step()
        adamw_(ours, grad, m, v, lr=0.01, step=step, weight_decay=weight_decay)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-12)


def test_clipping_scales_to_the_limit() -> None:
    grad = torch.tensor([3.0, 4.0])
    assert global_norm(grad) == 5
    assert clip_factor(5.0, 1.0) == 0.2
    assert clip_factor(5.0, 0.0) == clip_factor(5.0, 6.0) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_norm_shows_what_is_not_finite(bad: float) -> None:
    grad = torch.ones(1000)
    grad[500] = bad
    assert not global_norm(grad).isfinite()


def test_the_norm_of_pieces_is_the_norm_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x_P = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = float(adamw.wide_norm(x_P))
    monkeypatch.setattr(adamw, "NORM_PIECE", 64)
    assert float(adamw.wide_norm(x_P)) == pytest.approx(whole, rel=1e-14)
    for bad in (torch.inf, torch.nan):
        x_P[77] = bad
        assert not torch.isfinite(adamw.wide_norm(x_P))
