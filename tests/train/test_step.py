"""Laws of a training step, in float32 on a real small model: packing, micro-batches, masters."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bioinstruct.model import Llm
from bioinstruct.model.adapters import TARGETS, Adapters, LoraSettings
from bioinstruct.model.llama import Llama
from bioinstruct.train.data.batch import collate
from bioinstruct.train.data.tokens import TokenSet
from bioinstruct.train.step import Optimizer, add_gradient, summed_loss, train_step

LENGTHS = (23, 8, 40, 5, 17, 31, 9)


@pytest.fixture
def samples(random_samples: Callable[[Sequence[int]], TokenSet]) -> TokenSet:
    return random_samples(LENGTHS)


@pytest.fixture(params=["blocked", "sdpa"])
def model(stories: Llm, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Llama:
    monkeypatch.setattr(stories.model, "attention_backend", request.param)
    return stories.model


def adapters(model: Llama, dropout: float = 0.0, **settings: object) -> Adapters:
    made = Adapters(model.config, LoraSettings(r=4, alpha=8.0, dropout=dropout, **settings))  # type: ignore[arg-type]
    made.initialise(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        made.flat_P.add_(0.02 * torch.randn(made.flat_P.shape, generator=generator))
    return made


DRAWS = {i: 100 + 7 * i for i in range(len(LENGTHS))}


def gradient(
    model: Llama, samples: TokenSet, split: list[list[int]], dropout: float = 0.0
) -> tuple[Tensor, float]:
    """Summed gradient and loss of all samples, in these packs."""
    trained = adapters(model, dropout)
    scale = 1 / int(samples.supervised.sum())
    loss = sum(
        float(add_gradient(model, trained, collate(samples, pack, DRAWS), scale, dropout_seed=3))
        for pack in split
    )
    return trained.grad_P.clone(), loss


ALL = list(range(len(LENGTHS)))
SPLITS = {
    1: [ALL],
    2: [[0, 2, 4], [1, 3, 5, 6]],
    5: [[6], [5, 0], [4], [1, 2], [3]],
    7: [[i] for i in ALL],
}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("parts", [2, 5, 7])
def test_micro_batches_give_the_same_gradient(
    model: Llama, samples: TokenSet, parts: int, dropout: float
) -> None:
    whole, loss = gradient(model, samples, SPLITS[1], dropout)
    split, split_loss = gradient(model, samples, SPLITS[parts], dropout)
    assert (whole - split).abs().max() <= 1e-6 * whole.abs().max()
    assert loss == pytest.approx(split_loss, rel=1e-6)


def test_dropout_changes_the_gradient(model: Llama, samples: TokenSet) -> None:
    plain, _ = gradient(model, samples, SPLITS[1])
    dropped, _ = gradient(model, samples, SPLITS[1], 0.1)
    assert (plain - dropped).abs().max() > 1e-3 * plain.abs().max()


def test_loss_and_gradient_by_finite_differences(stories: Llm, samples: TokenSet) -> None:
    """The whole step's gradient against the slope of the loss, in float64."""
    model = Llama(stories.config, dtype=torch.float64)
    for name, place in stories.model.destinations().items():
        model.destinations()[name].copy_(place)
    trained = Adapters(model.config, LoraSettings(r=2, alpha=4.0), dtype=torch.float64)
    trained.initialise(0)
    generator = torch.Generator().manual_seed(2)
    noise, direction = torch.randn(2, len(trained.flat_P), generator=generator, dtype=torch.float64)
    batch = collate(samples, [0, 1, 2], DRAWS)

    def loss_at(distance: float) -> float:
        with torch.no_grad():
            trained.flat_P.copy_(start + distance * direction)
        return summed_loss(model, trained, batch)

    with torch.no_grad():
        start = trained.flat_P.add_(0.02 * noise).clone()
    add_gradient(model, trained, batch, 1.0)
    slope, eps = float(trained.grad_P @ direction), 1e-4
    near, far = loss_at(eps) - loss_at(-eps), loss_at(2 * eps) - loss_at(-2 * eps)
    assert slope == pytest.approx((8 * near - far) / (12 * eps), rel=1e-7)


def test_loss_is_the_mean_over_supervised_tokens(stories: Llm, samples: TokenSet) -> None:
    _, loss = gradient(stories.model, samples, SPLITS[5])
    total = 0.0
    trained = adapters(stories.model)
    for i in ALL:
        ids, prompt = samples.sample(i)
        (logits,) = Llm(stories.path, stories.model, stories.tokenizer, trained).logits(
            [ids.tolist()]
        )
        targets = torch.from_numpy(ids[prompt:].astype(np.int64))
        rows = logits[prompt - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(rows, targets, reduction="sum"))
    assert loss == pytest.approx(total / samples.supervised.sum(), rel=1e-5)


def run(model: Llama, samples: TokenSet, lr: float, steps: int = 3) -> Adapters:
    trained = adapters(model, dropout=0.05)
    optimizer = Optimizer(trained)
    for _ in range(steps):
        batches = [collate(samples, pack, DRAWS) for pack in SPLITS[2]]
        train_step(model, optimizer, batches, int(samples.supervised.sum()), lr, dropout_seed=1)
    return trained


def test_the_same_run_twice_is_bitwise_equal(model: Llama, samples: TokenSet) -> None:
    assert torch.equal(run(model, samples, 1e-3).flat_P, run(model, samples, 1e-3).flat_P)


def test_a_tiny_learning_rate_still_moves_the_masters(model: Llama, samples: TokenSet) -> None:
    """In bfloat16 a step of 1e-6 on weights of this size would be rounded away."""
    moved = run(model, samples, 1e-6, steps=1).flat_P - adapters(model).flat_P
    assert (moved != 0).float().mean() > 0.99


def test_training_lowers_the_loss(model: Llama, samples: TokenSet) -> None:
    batch = collate(samples, ALL, DRAWS)
    before = summed_loss(model, adapters(model), batch)
    assert summed_loss(model, run(model, samples, 1e-2, steps=8), batch) < 0.9 * before


@pytest.mark.parametrize("target", list(TARGETS))
def test_each_target_alone_trains(stories: Llm, samples: TokenSet, target: str) -> None:
    model = stories.model
    trained = adapters(model, targets=(target,))
    add_gradient(model, trained, collate(samples, ALL, DRAWS), 1.0)
    for module in trained.modules:
        assert module.target == target
        assert module.a_RK.grad is not None
        assert module.b_NR.grad is not None
        assert module.a_RK.grad.abs().max() > 0
        assert module.b_NR.grad.abs().max() > 0


def test_gradients_are_views_of_the_flat_buffer(stories: Llm, samples: TokenSet) -> None:
    trained = adapters(stories.model)
    add_gradient(stories.model, trained, collate(samples, ALL, DRAWS), 1.0)
    masters = [m.a_RK for m in trained.modules] + [m.b_NR for m in trained.modules]
    flat = torch.cat([t.grad.flatten() for t in masters if t.grad is not None])
    assert torch.equal(flat, trained.grad_P)
    assert trained.num_a == sum(m.a_RK.numel() for m in trained.modules)


def test_a_gradient_that_is_not_finite_changes_nothing(stories: Llm) -> None:
    trained = adapters(stories.model)
    before = trained.flat_P.clone()
    trained.grad_P[5] = torch.nan
    optimizer = Optimizer(trained)
    assert not np.isfinite(optimizer.step(0.1))
    assert torch.equal(trained.flat_P, before)
    assert not optimizer.m_P.any()
    assert not trained.grad_P.any()


def test_clipping_limits_the_first_update(stories: Llm, samples: TokenSet) -> None:
    norms = []
    for clip in (0.0, 1e-3):
        trained = adapters(stories.model)
        optimizer = Optimizer(trained, clip=clip)
        add_gradient(stories.model, trained, collate(samples, ALL, DRAWS), 1.0)
        optimizer.step(0.0)
        norms.append(float(optimizer.m_P.norm()))
    assert norms[1] == pytest.approx(0.1 * 1e-3, rel=1e-4)
    assert norms[0] > norms[1]


def test_collated_labels_are_the_next_tokens(samples: TokenSet) -> None:
    batch = collate(samples, [1, 4], DRAWS)
    rows, labels = batch.rows_S.tolist(), batch.labels_S.tolist()
    start = 0
    expected: list[tuple[int, int]] = []
    for i in (1, 4):
        ids, prompt = samples.sample(i)
        assert batch.pack.ids_T[start : start + len(ids) - 1].tolist() == ids[:-1].tolist()
        expected += [(start + t, int(ids[t + 1])) for t in range(prompt - 1, len(ids) - 1)]
        start += len(ids) - 1
    assert list(zip(rows, labels, strict=True)) == expected
    bounds = batch.pack.documents.bounds
    assert [b - a for a, b in pairwise(bounds)] == [LENGTHS[1], LENGTHS[4]]
    assert batch.pack.positions_T.tolist() == [*range(LENGTHS[1]), *range(LENGTHS[4])]
    assert batch.draws_T.unique_consecutive().tolist() == [DRAWS[1], DRAWS[4]]


def test_lora_plus_gives_b_a_multiple_of_the_rate(stories: Llm) -> None:
    plain, plus = adapters(stories.model), adapters(stories.model, plus_ratio=8.0)
    before_P = plain.flat_P.clone()
    gradient_P = torch.randn(before_P.shape, generator=torch.Generator().manual_seed(4))
    for trained in (plain, plus):
        trained.grad_P.copy_(gradient_P)
        Optimizer(trained, weight_decay=0.1).step(1e-2)
        assert not trained.grad_P.any()
    moved_P, moved_plus_P = plain.flat_P - before_P, plus.flat_P - before_P
    assert torch.equal(moved_P[: plain.num_a], moved_plus_P[: plain.num_a])
    ratio = moved_plus_P[plain.num_a :] / moved_P[plain.num_a :]
    assert torch.allclose(ratio, torch.full_like(ratio, 8.0), rtol=1e-3)


def test_a_patterned_scale_trains_like_a_plain_one(stories: Llm, samples: TokenSet) -> None:
    """A scale given by a pattern trains like the same scale given plainly."""
    one = adapters(stories.model, targets=("v_proj",), alpha_pattern={"v_proj": 20.0})
    other = Adapters(stories.config, LoraSettings(r=4, alpha=20.0, targets=("v_proj",)))
    other.flat_P.copy_(one.flat_P)
    for trained in (one, other):
        add_gradient(stories.model, trained, collate(samples, ALL, DRAWS), 1.0)
    assert one.grad_P.any()
    assert (one.grad_P - other.grad_P).abs().max() < 1e-5 * one.grad_P.abs().max()


def test_the_average_follows_the_masters(stories: Llm) -> None:
    trained = adapters(stories.model)
    optimizer = Optimizer(trained, ema=0.9)
    average_P = trained.flat_P.clone()
    for update in range(1, 30):
        trained.grad_P.normal_()
        optimizer.step(1e-2)
        kept = min(0.9, update / (update + 9))
        average_P = kept * average_P + (1 - kept) * trained.flat_P
    own_P = trained.flat_P.clone()
    with optimizer.averaged():
        assert torch.allclose(trained.flat_P, average_P, atol=1e-6)
        assert not torch.allclose(trained.flat_P, own_P, atol=1e-3)
    assert torch.equal(trained.flat_P, own_P)


def test_without_an_average_nothing_is_kept(stories: Llm) -> None:
    trained = adapters(stories.model)
    optimizer = Optimizer(trained)
    own_P = trained.flat_P.clone()
    with optimizer.averaged():
        assert torch.equal(trained.flat_P, own_P)
    assert optimizer.average_P is None


class _Reads(TorchDispatchMode):
    """Counts operations whose result the host must have before it can go on."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(self.WAITING):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_nothing_is_read_from_the_device_before_the_end_of_a_step(
    stories: Llm, samples: TokenSet, dropout: float
) -> None:
    """The step's numbers are read together, by one tolist, after all its work was given out."""
    trained = adapters(stories.model, dropout=dropout)
    batches = [collate(samples, pack, DRAWS) for pack in SPLITS[2]]
    reads, optimizer, seen = _Reads(), Optimizer(trained), []
    with reads:
        train_step(
            stories.model,
            optimizer,
            batches,
            50,
            1e-3,
            meanwhile=lambda: seen.append(len(reads.found)),
        )
    assert seen == [0]
    assert reads.found == []
