"""Packs beside each other give the gradient of packs in turn, and the same bits every time."""

import threading
from collections.abc import Callable, Sequence

import pytest
import torch

from bioinstruct.model import Llm
from bioinstruct.model.adapters import Adapters, LoraSettings
from bioinstruct.train.data.batch import Batch, collate
from bioinstruct.train.data.tokens import TokenSet
from bioinstruct.train.side_by_side import SideBySide
from bioinstruct.train.step import Optimizer, add_gradient, train_step

LENGTHS = (23, 8, 40, 5, 17, 31, 9)
PACKS = [[6, 0], [5], [4, 1], [2], [3]]


@pytest.fixture
def batches(random_samples: Callable[[Sequence[int]], TokenSet]) -> list[Batch]:
    samples = random_samples(LENGTHS)
    return [collate(samples, pack, {i: 3 * i for i in range(len(LENGTHS))}) for pack in PACKS]


def adapters(stories: Llm) -> Adapters:
    made = Adapters(stories.config, LoraSettings(r=4, alpha=8.0, dropout=0.1))
    made.initialise(0)
    with torch.no_grad():
        made.flat_P.add_(
            torch.randn(made.flat_P.shape, generator=torch.Generator().manual_seed(1)), alpha=0.02
        )
    return made


def gradient(stories: Llm, batches: list[Batch], number: int) -> tuple[torch.Tensor, list[float]]:
    trained = adapters(stories)
    beside = SideBySide(stories.config, trained, number)
    losses = beside(batches, lambda own, batch: add_gradient(stories.model, own, batch, 0.01, 5))
    return trained.grad_P, [float(loss) for loss in losses]


@pytest.mark.parametrize("number", [2, 3, 5, 9])
def test_the_gradient_is_that_of_packs_in_turn(
    stories: Llm, batches: list[Batch], number: int
) -> None:
    one, losses_of_one = gradient(stories, batches, 1)
    several, losses = gradient(stories, batches, number)
    assert losses == losses_of_one
    assert (one - several).abs().max() <= 1e-6 * one.abs().max()
    assert one.any()


def test_layers_that_are_computed_again_may_be_so_in_threads(
    stories: Llm, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, _ = gradient(stories, batches, 2)
    monkeypatch.setattr(stories.model, "recomputed_layers", 3)
    assert torch.equal(kept, gradient(stories, batches, 2)[0])


def test_the_same_packs_give_the_same_bits(stories: Llm, batches: list[Batch]) -> None:
    first, _ = gradient(stories, batches, 2)
    for _ in range(5):
        assert torch.equal(first, gradient(stories, batches, 2)[0])


def test_a_run_of_steps_is_that_of_packs_in_turn(stories: Llm, batches: list[Batch]) -> None:
    found = []
    for number in (1, 2):
        trained = adapters(stories)
        beside = SideBySide(stories.config, trained, number) if number > 1 else None
        optimizer = Optimizer(trained)
        results = [
            train_step(stories.model, optimizer, batches, 90, 1e-3, 5, beside=beside)
            for _ in range(4)
        ]
        assert not trained.grad_P.any()
        found.append((trained.flat_P, [result.loss for result in results]))
    (one, losses), (two, losses_beside) = found
    assert losses == pytest.approx(losses_beside, rel=1e-5)
    assert (one - two).abs().max() <= 1e-3 * (one - adapters(stories).flat_P).abs().max()


def test_what_fails_is_raised_when_all_have_ended(stories: Llm, batches: list[Batch]) -> None:
    trained, ended = adapters(stories), []

    def add(own: Adapters, batch: Batch) -> torch.Tensor:
        if batch is batches[1]:
            raise torch.OutOfMemoryError("no room")
        loss = add_gradient(stories.model, own, batch, 0.01, 5)
        ended.append(threading.current_thread().name)
        return loss

    beside, threads = SideBySide(stories.config, trained, 3), torch.get_num_threads()
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        beside(batches, add)
    assert len(ended) >= 2
    assert torch.get_num_threads() == threads
    trained.grad_P.zero_()
    # nothing of the failed call is left in any thread's gradient
    beside(batches, lambda own, batch: add_gradient(stories.model, own, batch, 0.01, 5))
    assert torch.equal(trained.grad_P, gradient(stories, batches, 3)[0])


def test_every_thread_has_its_share(
    stories: Llm, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for number in (2, 3, 9):
        gradient(stories, batches, number)
    assert asked == [4, 8, 2, 8, 1, 8]
