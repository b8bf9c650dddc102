"""Scores with what belongs to them: value, n, interval, unparsed answers, counts, version.

Every metric here is a function of counts summed over documents: N documents, C counts each, as
counts_NC. That makes the percentile bootstrap over documents (Efron, Annals of Statistics 7, 1979)
cheap without an approximation: documents with equal rows are interchangeable, so a resample is one
multinomial draw over the K kinds of rows, and 10,000 resamples are one product
weights_BK @ kinds_KC.

The documents of a corpus without document borders, such as the CoNLL form of NCBI-disease, are its
sentences; intervals are then a little narrow where mentions cluster by abstract.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Values = NDArray[np.float64]
Statistic = Callable[[Counts], Values]

RESAMPLES = 10_000
LEVEL = 0.95
SEED = 0


class Interval(NamedTuple):
    """The bounds of a confidence interval at LEVEL."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One number of one system on one task, with what is needed to judge it."""

    value: float
    n: int
    """Documents scored, unparsed ones among them."""
    low: float
    high: float
    """The percentile bootstrap interval over documents, at 95 %."""
    unparsed: int
    """Answers that could not be read; they count as wrong."""
    extra: dict[str, int]
    """The counts that the value was made of, and others of interest."""
    version: int
    """The task's version; scores of different versions do not compare."""


def precision(counts: Counts) -> Values:
    """Return tp / (tp + fp) of (..., 3) counts tp, fp, fn; 0 where nothing was predicted."""
    return _ratio(counts[..., 0], counts[..., 0] + counts[..., 1])


def recall(counts: Counts) -> Values:
    """Return tp / (tp + fn) of (..., 3) counts tp, fp, fn; 0 where there is nothing to find."""
    return _ratio(counts[..., 0], counts[..., 0] + counts[..., 2])


def f1(counts: Counts) -> Values:
    """Return 2 tp / (2 tp + fp + fn) of (..., 3) counts tp, fp, fn; 0 where all are 0."""
    return _ratio(2 * counts[..., 0], 2 * counts[..., 0] + counts[..., 1] + counts[..., 2])


def accuracy(counts: Counts) -> Values:
    """Return correct / (correct + wrong) of (..., 2) counts correct, wrong."""
    return _ratio(counts[..., 0], counts[..., 0] + counts[..., 1])


def macro_f1(counts: Counts) -> Values:
    """Return the plain mean of the classes' F1 values; a class that never occurs has F1 0.

    Args:
        counts: (..., L * (L + 1)) confusion counts, gold class by predicted class in row order,
            where the last predicted column holds the answers that name no class.
    """
    num_labels = math.isqrt(counts.shape[-1])  # L * (L + 1) lies between L ** 2 and (L + 1) ** 2
    cells = counts.reshape(*counts.shape[:-1], num_labels, num_labels + 1)
    hits = np.diagonal(cells[..., :num_labels], axis1=-2, axis2=-1)
    in_gold, in_answers = cells.sum(-1), cells[..., :num_labels].sum(-2)
    values: Values = _ratio(2 * hits, in_gold + in_answers).mean(-1)
    return values


def confusion(gold: Sequence[str], answers: Sequence[object], labels: Sequence[str]) -> Counts:
    """Return counts_NC for macro_f1: one confusion cell set to 1 a document.

    Args:
        gold: N classes, each one of labels.
        answers: N predicted classes; anything that is none of labels is an unread answer.
    """
    width = len(labels) + 1
    counts_NC = np.zeros((len(gold), len(labels) * width), np.int64)
    for row, label, answer in zip(counts_NC, gold, answers, strict=True):
        column = labels.index(answer) if answer in labels else len(labels)
        row[labels.index(label) * width + column] = 1
    return counts_NC


def bootstrap(
    counts_NC: Counts, statistic: Statistic, *, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval:
    """Return the percentile interval of a statistic over resampled documents.

    Args:
        counts_NC: the counts of N >= 1 documents.
        statistic: maps summed counts (..., C) to values (...).
        resamples: how many, >= 1.
        seed: of the draws; the same seed gives the same interval.
    """
    kinds_KC, of_K = np.unique(counts_NC, axis=0, return_counts=True)
    draws = np.random.default_rng(seed)
    weights_BK = draws.multinomial(len(counts_NC), of_K / len(counts_NC), size=resamples)
    values_B = statistic(weights_BK @ kinds_KC)
    low, high = np.quantile(values_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def score(
    counts_NC: Counts,
    statistic: Statistic,
    *,
    unparsed: int,
    extra: dict[str, int],
    version: int,
) -> Score:
    """Return a statistic of N documents with its interval."""
    low, high = bootstrap(counts_NC, statistic)
    return Score(
        value=float(statistic(counts_NC.sum(0))),
        n=len(counts_NC),
        low=low,
        high=high,
        unparsed=unparsed,
        extra=extra,
        version=version,
    )


def _ratio(above: Counts, below: Counts) -> Values:
    return np.where(below == 0, 0.0, above / np.maximum(below, 1))
