"""Laws of the planner: every sample once an epoch, no pack over its room, a pure function."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bioinstruct.train.plan.planner import Planner, evened, learning_rate, pack_samples

lengths_lists = st.lists(st.integers(1, 50), min_size=1, max_size=60)
batches = st.one_of(
    st.fixed_dictionaries({"batch_samples": st.integers(1, 70)}),
    st.fixed_dictionaries({"batch_tokens": st.integers(1, 400)}),
)


def planner(lengths: list[int], batch: dict[str, int], seed: int = 0, room: int = 50) -> Planner:
    supervised = [max(1, n // 3) for n in lengths]
    return Planner(lengths, supervised, max_tokens=room, seed=seed, **batch)  # type: ignore[arg-type]


@given(lengths=lengths_lists, batch=batches, seed=st.integers(0, 9), room=st.integers(50, 120))
def test_every_sample_exactly_once_an_epoch(
    lengths: list[int], batch: dict[str, int], seed: int, room: int
) -> None:
    whole = planner(lengths, batch, seed, room)
    step = 0
    for epoch in range(3):
        seen: list[int] = []
        draws: list[int] = []
        for _ in range(whole.steps_of(epoch)):
            plan = whole.plan(step)
            assert plan.epoch == epoch
            samples = [i for pack in plan.packs for i in pack]
            assert all(sum(lengths[i] for i in pack) <= room for pack in plan.packs)
            assert sorted(samples) == sorted(plan.draws)
            assert plan.tokens == sum(lengths[i] for i in samples)
            assert plan.supervised_tokens == sum(max(1, lengths[i] // 3) for i in samples)
            if "batch_samples" in batch:
                assert len(samples) <= batch["batch_samples"]
            elif len(samples) > 1:
                assert plan.tokens <= batch["batch_tokens"]
            seen += samples
            draws += plan.draws.values()
            step += 1
        assert sorted(seen) == list(range(len(lengths)))
        n = len(lengths)
        assert sorted(draws) == list(range(epoch * n, (epoch + 1) * n))


@given(lengths=lengths_lists, batch=batches, step=st.integers(0, 40))
def test_a_step_does_not_depend_on_what_was_planned_before(
    lengths: list[int], batch: dict[str, int], step: int
) -> None:
    walked = planner(lengths, batch)
    for k in range(step):
        walked.plan(k)
    assert walked.plan(step) == planner(lengths, batch).plan(step)


def test_order_is_fixed_for_good() -> None:
    """The permutation is part of what makes a run repeatable, also by a later version."""
    order = planner([1] * 8, {"batch_samples": 2}, seed=5).order(3)
    assert order.tolist() == sorted(
        range(8), key=lambda i: int(np.random.Philox(key=[5, 3]).random_raw(8)[i])
    )


def test_epochs_and_seeds_differ() -> None:
    one = planner([1] * 50, {"batch_samples": 50}, seed=1)
    two = planner([1] * 50, {"batch_samples": 50}, seed=2)
    orders = [one.order(0), one.order(1), two.order(0)]
    assert all((a != b).any() for a, b in itertools.combinations(orders, 2))


def test_without_shuffling_the_samples_keep_their_order() -> None:
    plain = Planner([1] * 6, [1] * 6, max_tokens=9, batch_samples=4, shuffle=False)
    assert [sorted(plain.plan(k).draws) for k in range(3)] == [[0, 1, 2, 3], [4, 5], [0, 1, 2, 3]]


@given(lengths=lengths_lists, room=st.integers(50, 100))
def test_packs_are_best_fit_decreasing(lengths: list[int], room: int) -> None:
    """Against the plain quadratic algorithm, which scans all packs for the tightest."""
    packs: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        left = [room - sum(lengths[j] for j in pack) for pack in packs]
        fitting = [k for k in range(len(packs)) if left[k] >= lengths[i]]
        if fitting:
            packs[min(fitting, key=lambda k: left[k])].append(i)
        else:
            packs.append([i])
    ours = pack_samples(lengths, room)
    rooms = [sorted(sum(lengths[i] for i in pack) for pack in p) for p in (ours, packs)]
    assert rooms[0] == rooms[1]


def test_packing_is_tight_on_instruction_lengths() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5, 0.6, 5000).astype(int) + 8, 2000)
    packs = pack_samples(lengths, 4096)
    assert lengths.sum() / (len(packs) * 4096) > 0.99


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"lengths": []}, "no samples to plan"),
        ({"lengths": [51]}, "a sample has 51 tokens, a pack only 50"),
        ({"lengths": [1], "batch_tokens": 3}, "either batch_samples or batch_tokens"),
        ({"lengths": [1], "batch_samples": None}, "either batch_samples or batch_tokens"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], sentence: str) -> None:
    given_ = {"max_tokens": 50, "batch_samples": 2, **arguments}
    with pytest.raises(ValueError, match=sentence):
        Planner(supervised=given_["lengths"], **given_)  # type: ignore[arg-type]


@given(lengths=lengths_lists, room=st.integers(50, 100), number=st.integers(1, 5))
def test_evened_packs_hold_the_same_samples_in_threads_of_like_cost(
    lengths: list[int], room: int, number: int
) -> None:
    packs = pack_samples(lengths, room)
    costs = {i: float(n) for i, n in enumerate(lengths)}
    found = evened(packs, number, costs, np.array(lengths), room)
    assert sorted(i for pack in found for i in pack) == list(range(len(lengths)))
    assert all(pack and sum(lengths[i] for i in pack) <= room for pack in found)
    if found != packs:
        assert len(found) == number * -(-len(packs) // number)
        assert found == evened(packs, number, costs, np.array(lengths), room)
    spent = sorted(sum(lengths[i] for i in pack) for pack in found)
    if len(found) == number > 1 and found != packs:
        # the last sample of the dearest pack went where least was spent, if there was room
        dearest = max(found, key=lambda pack: sum(lengths[i] for i in pack))
        if spent[0] + min(lengths[i] for i in dearest) <= room:
            assert spent[-1] - spent[0] <= max(lengths)


def test_a_step_of_one_pack_is_split_over_threads() -> None:
    lengths = np.array([7, 3, 5, 5, 1, 3])
    costs = {i: float(n) for i, n in enumerate(lengths)}
    found = evened([[0, 1, 2, 3, 4, 5]], 2, costs, lengths, 50)
    assert sorted(int(lengths[pack].sum()) for pack in found) == [11, 13]
    assert evened([[0]], 2, costs, lengths, 50) == [[0]]  # one record cannot be split
    assert evened([], 2, costs, lengths, 50) == []
    full = [[0, 1], [2, 3]]  # no room but for these
    assert evened(full, 2, costs, lengths, 10) == full


def test_number_of_steps() -> None:
    plan = planner([1] * 10, {"batch_samples": 4})
    assert [plan.num_steps(e) for e in (0.01, 1, 2, 2.5)] == [1, 3, 6, 8]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate(schedule: str) -> None:
    rates = [
        learning_rate(k, 110, peak=2.0, schedule=schedule, warmup_steps=10) for k in range(110)
    ]
    assert rates[:10] == pytest.approx([0.2 * (k + 1) for k in range(10)])
    assert rates[10] == 2.0
    middle = {"cosine": 1.0, "linear": 1.0, "constant": 2.0}[schedule]
    assert rates[60] == pytest.approx(middle)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] > 0


def test_wsd_stays_at_the_peak_and_then_falls() -> None:
    rates = [
        learning_rate(k, 100, peak=2.0, schedule="wsd", warmup_steps=10, decay_share=0.3)
        for k in range(100)
    ]
    assert rates[:10] == pytest.approx([0.2 * (k + 1) for k in range(10)])
    assert rates[10:71] == [2.0] * 61
    assert rates[70:] == pytest.approx([2.0 * (100 - k) / 30 for k in range(70, 100)])


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_wsd_whose_decay_meets_the_warm_up(share: float) -> None:
    rates = [
        learning_rate(k, 10, peak=1.0, schedule="wsd", warmup_steps=6, decay_share=share)
        for k in range(10)
    ]
    assert rates[6:] == pytest.approx([1.0, 0.75, 0.5, 0.25])
