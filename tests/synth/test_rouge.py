"""ROUGE-L and its index: laws, against a plain table and against every pair."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioinstruct.synth import near_copies as module
from bioinstruct.synth import rouge
from bioinstruct.synth.near_copies import near_copies
from bioinstruct.synth.rouge import (
    Near,
    RougeIndex,
    f_measure,
    f_measures,
    lcs_length,
    needed_lcs,
    rouge_l,
    rouge_words,
    word_bits,
)

# few words, so that repeats, ties and near copies are common
WORDS = st.lists(st.sampled_from("abcdef"), max_size=14)
TEXT = WORDS.map(" ".join)
TEXTS = st.lists(TEXT, max_size=30)
THRESHOLD = st.sampled_from(
    [0.3, 0.5, 0.6, 2 / 3, 0.7, math.nextafter(0.7, 2), 0.7000000000000002, 0.75, 0.8, 1.0]
) | st.floats(0.01, 1)


def table_lcs(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        above = row[:]
        for j, y in enumerate(b):
            row[j + 1] = above[j] + 1 if x == y else max(row[j], above[j + 1])
    return row[-1]


def greedy(texts: list[str], threshold: float, pool: int = 0) -> list[Near | None]:
    """What near_copies promises, from every pair."""
    kept: list[int] = []
    near: list[Near | None] = []
    firsts: dict[tuple[str, ...], int] = {}
    for place, text in enumerate(texts):
        first = firsts.setdefault(tuple(rouge_words(text)), place)
        scores = [Near(k, rouge_l(text, texts[k])) for k in kept]
        found = [n for n in scores if n.score >= threshold]
        best = max(found, key=lambda n: (n.score, -n.place), default=None)
        if place < pool:
            best = None
        elif best and first != place and near[first]:
            best = near[first]
        near.append(best)
        if best is None:
            kept.append(place)
    return near


@given(WORDS, WORDS)
def test_bit_parallel_is_the_table(a: list[str], b: list[str]) -> None:
    assert lcs_length(word_bits(a), len(a), b) == table_lcs(a, b)


@pytest.mark.parametrize("length", [63, 64, 65, 130, 1000])
def test_texts_wider_than_a_machine_word(length: int) -> None:
    draw = np.random.default_rng(length)
    a, b = ([str(w) for w in draw.integers(0, 9, length)] for _ in range(2))
    assert lcs_length(word_bits(a), length, b) == table_lcs(a, b)


@given(TEXT, TEXT)
def test_score_is_symmetric_and_one_only_for_equal_words(a: str, b: str) -> None:
    assert rouge_l(a, b).hex() == rouge_l(b, a).hex()
    assert (rouge_l(a, b) == 1) == (a == b != "")
    assert 0 <= rouge_l(a, b) <= 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("--- !?", []),
        ("IL-6 isn't 5.5mg/kg\n\tb.d.", ["il", "6", "isn", "t", "5", "5mg", "kg", "b", "d"]),
        ("naïve β-blocker", ["na", "ve", "blocker"]),
        ("37 \u212a \u0130", ["37", "k", "i"]),  # what lower() turns into ASCII
        ("\u533b\u5b66", []),
        ("snake_case", ["snake", "case"]),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert rouge_words(text) == words


def test_no_words_are_near_nothing() -> None:
    assert rouge_l("", "") == rouge_l("!", "?") == rouge_l("", "a") == 0
    index = RougeIndex(0.01)
    index.add("!")
    assert index.nearest("!") is None and not index.is_near("!")
    assert near_copies(["!", "!", "?"], 0.01) == [None] * 3


@settings(deadline=None)
@given(THRESHOLD)
def test_needed_lcs_is_the_first_that_reaches(threshold: float) -> None:
    sizes = np.arange(1, 41)
    needed = needed_lcs(sizes[:, None], sizes, threshold)
    for m in sizes.tolist():
        for n in sizes.tolist():
            first = next(k for k in range(200) if f_measure(k, m, n) >= threshold)
            assert needed[m - 1, n - 1] == first


def test_ties_are_decided_as_floats_are() -> None:
    ties = [(7 * k, m, 20 * k - m) for k in range(1, 15) for m in range(7 * k, 13 * k + 1)]
    scores = [f_measure(*tie) for tie in ties]
    ulps = {round((score - 0.7) * 2**53) for score in scores}
    assert ulps == {-1, 0, 1, 2}  # so neither `>= 0.7` nor `> 0.7` is a matter of integers
    lcs, m, n = np.array(ties).T
    assert f_measures(lcs, m, n).tolist() == scores
    for threshold in {0.7, *scores}:
        reached = needed_lcs(m, n, threshold) <= lcs
        assert reached.tolist() == [s >= threshold for s in scores]
    assert f_measure(7, 7, 13) == math.nextafter(0.7, 1)  # alpaca's `> 0.7` drops this one


@given(st.integers(1, 150), st.integers(1, 150))
def test_f_grows_with_the_lcs_and_is_2l_over_m_plus_n(m: int, n: int) -> None:
    scores = [f_measure(lcs, m, n) for lcs in range(min(m, n) + 1)]
    assert all(a < b for a, b in pairwise(scores))
    for lcs, score in enumerate(scores):
        assert abs(Fraction(score) - Fraction(2 * lcs, m + n)) < Fraction(1, 10**15)


@settings(deadline=None)
@given(TEXTS, TEXT, st.floats(0, 1), st.sampled_from([0, 1, 5, 99]))
def test_nearest_is_the_best_of_every_pair(
    texts: list[str], text: str, at_least: float, few: int
) -> None:
    index = RougeIndex(0.7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rouge, "FEW", few)
        assert [index.add(t) for t in texts] == list(range(len(texts)))
    scores = [Near(k, rouge_l(text, t)) for k, t in enumerate(texts)]
    found = [n for n in scores if n.score > 0 and n.score >= at_least]
    best = max(found, key=lambda n: (n.score, -n.place), default=None)
    assert index.nearest(text, at_least) == best
    assert index.is_near(text) == any(n.score >= 0.7 for n in scores)
    assert len(index) == len(texts)


def test_more_common_words_than_there_are_bits() -> None:
    texts = [" ".join(f"w{(k * i) % 90}" for i in range(1, 60)) for k in range(1, 90)]
    index = RougeIndex(0.7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rouge, "FEW", 3)
        for place, text in enumerate(texts):
            scores = [(rouge_l(text, other), -k) for k, other in enumerate(texts[:place])]
            if scores and max(scores)[0]:
                score, k = max(scores)
                assert index.nearest(text) == Near(-k, score)
            index.add(text)
    assert len(index._bit_of) == 64 < len(index._holders)


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_bits_are_counted(numbers: list[int]) -> None:
    counts = [number.bit_count() for number in numbers]
    array = np.array(numbers, np.uint64)
    assert rouge._ones_by_table(array).tolist() == rouge._ones(array).tolist() == counts


@settings(deadline=None, max_examples=300)
@given(TEXTS, THRESHOLD, st.integers(0, 5))
def test_a_whole_file_is_decided_as_by_every_pair(
    texts: list[str], threshold: float, pool: int
) -> None:
    assert near_copies(texts, threshold, pool=pool) == greedy(texts, threshold, pool)


@pytest.mark.parametrize("threshold", [0.5, 0.7, math.nextafter(0.7, 1), 0.9])
@pytest.mark.parametrize("settings", [{}, {"LONGEST": 9}, {"PAIRS": 4000}, {"MATCHES": 5}])
def test_long_texts_and_small_limits_decide_the_same(
    monkeypatch: pytest.MonkeyPatch, threshold: float, settings: dict[str, int]
) -> None:
    for name, value in {"FIRST_BLOCK": 16, "CACHED": 64, **settings}.items():
        monkeypatch.setattr(module, name, value)
    draw = np.random.default_rng(3)
    texts: list[str] = []
    for _ in range(400):
        words = [f"w{w}" for w in draw.zipf(1.5, draw.integers(1, 30)) % 50]
        if texts and draw.random() < 0.5:
            words = texts[draw.integers(len(texts))].split()
            words[draw.integers(len(words))] = f"w{draw.integers(50)}"
            words += ["w1"] * draw.integers(3)
        texts.append(" ".join(words))
    near = near_copies(texts, threshold)
    assert near == greedy(texts, threshold)
    assert 40 < near.count(None) < 360


def test_scores_do_not_depend_on_the_order_of_the_texts() -> None:
    texts = ["a b c d e", "a b c d f", "x y z", "a b x y z"]
    for turned in (texts, texts[::-1]):
        index = RougeIndex()
        for text in turned:
            index.add(text)
        near = index.nearest("a b c d e")
        assert near is not None and (turned[near.place], near.score) == ("a b c d e", 1.0)


def test_a_thousand_variants_of_one_text_meet_one_kept_text() -> None:
    texts = [f"list every drug that treats condition number {k} in adults" for k in range(3000)]
    near = near_copies(texts, 0.7)
    assert near == [None] + [Near(0, rouge_l(texts[0], texts[1]))] * 2999


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.01, math.nan, math.inf])
def test_thresholds_that_mean_nothing(threshold: float) -> None:
    for call in (lambda: RougeIndex(threshold), lambda: near_copies(["a"], threshold)):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            call()


def test_nothing_in_nothing_out() -> None:
    assert near_copies([], 0.7) == []
    assert RougeIndex().nearest("a") is None
