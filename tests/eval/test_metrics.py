"""Scores and intervals, against sums done by hand and resampling done one by one."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bioinstruct.eval import metrics

COUNTS = st.lists(st.tuples(*[st.integers(0, 9)] * 3), min_size=1, max_size=9)
LABELS = ("yes", "no", "maybe")


def test_known_values() -> None:
    counts = np.array([3, 1, 2])
    assert metrics.precision(counts) == 3 / 4
    assert metrics.recall(counts) == 3 / 5
    assert metrics.f1(counts) == 2 * 3 / (2 * 3 + 1 + 2)
    assert metrics.accuracy(np.array([3, 1])) == 3 / 4


@given(COUNTS)
def test_f1_is_the_harmonic_mean_and_symmetric(counts: list[tuple[int, int, int]]) -> None:
    tp, fp, fn = (np.array(column) for column in zip(*counts, strict=True))
    value = metrics.f1(np.stack([tp, fp, fn], 1))
    assert np.array_equal(value, metrics.f1(np.stack([tp, fn, fp], 1)))
    p, r = metrics.precision(np.stack([tp, fp, fn], 1)), metrics.recall(np.stack([tp, fp, fn], 1))
    both = np.where(p + r > 0, p + r, 1)
    assert np.allclose(value, 2 * p * r / both)
    assert ((value >= 0) & (value <= 1)).all()


def test_nothing_to_find_and_nothing_found_is_0() -> None:
    for statistic in (metrics.precision, metrics.recall, metrics.f1):
        assert statistic(np.array([0, 0, 0])) == 0
    assert metrics.accuracy(np.array([0, 0])) == 0


def test_macro_f1_by_hand() -> None:
    gold = ["yes", "yes", "yes", "no", "no", "maybe"]
    answers = ["yes", "yes", "no", "no", None, "yes"]
    counts_NC = metrics.confusion(gold, answers, LABELS)
    assert counts_NC.shape == (6, 12) and (counts_NC.sum(1) == 1).all()
    # yes: 2 hits of 3 gold and 3 answers; no: 1 of 2 and 2; maybe: 0 of 1 and 0
    by_hand = (2 * 2 / 6 + 2 * 1 / 4 + 0) / 3
    assert metrics.macro_f1(counts_NC.sum(0)) == pytest.approx(by_hand, abs=1e-15)


@given(st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from([*LABELS, None])), min_size=1))
def test_macro_f1_is_the_mean_of_one_against_the_rest(pairs: list[tuple[str, str | None]]) -> None:
    gold, answers = zip(*pairs, strict=True)
    values = []
    for label in LABELS:
        tp = sum(g == a == label for g, a in pairs)
        fp = sum(a == label for a in answers) - tp
        fn = sum(g == label for g in gold) - tp
        values.append(float(metrics.f1(np.array([tp, fp, fn]))))
    found = metrics.macro_f1(metrics.confusion(gold, answers, LABELS).sum(0))
    assert found == pytest.approx(np.mean(values), abs=1e-12)


def _documents(n: int) -> metrics.Counts:
    draws = np.random.default_rng(3)
    gold = draws.poisson(1.0, n)
    tp = draws.binomial(gold, 0.6)
    return np.stack([tp, draws.poisson(0.3, n), gold - tp], 1)


def test_interval_is_that_of_resampling_one_by_one() -> None:
    counts_NC = _documents(200)
    draws = np.random.default_rng(11)
    values = [
        float(metrics.f1(counts_NC[draws.integers(0, 200, 200)].sum(0))) for _ in range(10_000)
    ]
    low, high = metrics.bootstrap(counts_NC, metrics.f1)
    assert low == pytest.approx(np.quantile(values, 0.025), abs=4e-3)
    assert high == pytest.approx(np.quantile(values, 0.975), abs=4e-3)


def test_interval_of_a_share_is_the_binomial_one() -> None:
    correct = np.arange(500) < 300
    low, high = metrics.bootstrap(np.stack([correct, ~correct], 1).astype(int), metrics.accuracy)
    half = 1.96 * (0.6 * 0.4 / 500) ** 0.5
    assert (low, high) == pytest.approx((0.6 - half, 0.6 + half), abs=2e-3)


@given(COUNTS)
def test_interval_does_not_depend_on_the_order(counts: list[tuple[int, int, int]]) -> None:
    counts_NC = np.array(counts)
    interval = metrics.bootstrap(counts_NC, metrics.f1, resamples=50)
    assert interval == metrics.bootstrap(counts_NC[::-1], metrics.f1, resamples=50)
    assert interval.low <= interval.high
    assert interval == metrics.bootstrap(counts_NC, metrics.f1, resamples=50)


def test_interval_of_equal_documents_is_a_point() -> None:
    assert metrics.bootstrap(np.array([[2, 1, 1]] * 9), metrics.recall) == (2 / 3, 2 / 3)
    assert metrics.bootstrap(np.array([[1, 0]]), metrics.accuracy) == (1.0, 1.0)


def test_another_seed_gives_another_but_close_interval() -> None:
    counts_NC = _documents(300)
    one, two = (metrics.bootstrap(counts_NC, metrics.f1, seed=seed) for seed in (1, 2))
    assert one != two
    assert one == pytest.approx(two, abs=6e-3)


def test_10_000_resamples_of_940_documents_take_half_a_second() -> None:
    counts_NC = _documents(940)
    start_s = time.process_time()
    metrics.bootstrap(counts_NC, metrics.f1)
    assert time.process_time() - start_s < 0.5


def test_score_carries_everything() -> None:
    counts_NC = np.array([[1, 0, 0], [0, 1, 1]])
    score = metrics.score(counts_NC, metrics.f1, unparsed=1, extra={"tp": 1}, version=3)
    assert (score.value, score.n, score.unparsed, score.version) == (0.5, 2, 1, 3)
    assert (score.low, score.high, score.extra) == (0.0, 1.0, {"tp": 1})
