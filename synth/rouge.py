"""ROUGE-L between short texts, decided exactly as the rouge-score package decides it, and an index
that finds the nearest of all earlier texts.

A text becomes words: lower case, runs of anything but a-z and 0-9 are borders, no stemming. With L
the length of the longest common subsequence (LCS) of two texts of m and n words,

    P = L / m,  R = L / n,  F = 2 P R / (P + R) = 2 L / (m + n),  and 0 without a common word.

F is taken from P and R in floating point, in rouge-score's order, for ties hang on that: where
F = 0.7 in exact arithmetic, (L, m, n) = (7, 10, 10) gives 0.7, (7, 7, 13) 0.7000000000000001 and
(21, 23, 37) 0.6999999999999998. The operations are symmetric in P and R, so both orders of two
texts give the same bits.

The LCS is bit-parallel (Hyyro, Bit-parallel LCS-length computation revisited, AWOCA 2004): one
integer holds a row of the usual table, with a 0 where the row grows, and a word of the other text
costs one `&`, one `+`, one `-` and one `|`. Python's integers have any width, so texts may too.

L is at most the overlap of the two texts as multisets. A word and how often it stood before make a
symbol, and then that overlap is the number of common symbols: one addition per posting.
"""

import re
from array import array
from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

_WORDS = re.compile("[a-z0-9]+")
Ints = NDArray[np.int64]
Word = TypeVar("Word", bound=Hashable)


class Near(NamedTuple):
    """A neighbour: its place among the texts, counted from 0, and the ROUGE-L F to it."""

    place: int
    score: float


def rouge_words(text: str) -> list[str]:
    """Return the words of a text as ROUGE counts them; none where it has no a-z and no 0-9."""
    return _WORDS.findall(text.lower())


def rouge_l(one: str, two: str) -> float:
    """Return the ROUGE-L F of two texts, from 0 to 1, bit for bit that of rouge-score."""
    a, b = rouge_words(one), rouge_words(two)
    return f_measure(lcs_length(word_bits(a), len(a), b), len(a), len(b))


def f_measure(lcs: int, m: int, n: int) -> float:
    """Return F for an LCS of lcs words between texts of m and n words."""
    if lcs == 0:
        return 0.0
    precision, recall = lcs / m, lcs / n
    return 2 * precision * recall / (precision + recall)


def f_measures(lcs: Ints, m: Ints | int, n: Ints) -> NDArray[np.float64]:
    """Return f_measure of arrays, elementwise and with the same bits; every lcs is at least 1."""
    precision, recall = lcs / m, lcs / n
    return np.asarray(2 * precision * recall / (precision + recall), np.float64)


def needed_lcs(m: Ints, n: Ints, threshold: float) -> Ints:
    """Return the least LCS whose F reaches threshold, elementwise; it may exceed m or n.

    Args:
        m: numbers of words, each at least 1.
        n: those of the other texts; broadcast against m.
        threshold: above 0, at most 1.
    """
    # a little under the real solution of 2 L / (m + n) = threshold, then upwards by F itself
    lcs = np.maximum(np.floor(threshold * (m + n) / 2 - 0.5), 1).astype(np.int64)
    for _ in range(3):
        lcs += f_measures(lcs, m, n) < threshold
    return lcs


def word_bits(words: Iterable[Word]) -> dict[Word, int]:
    """Return for each word an integer whose bits are the places where it stands."""
    bits: dict[Word, int] = {}
    for place, word in enumerate(words):
        bits[word] = bits.get(word, 0) | 1 << place
    return bits


def lcs_length(bits: Mapping[Word, int], size: int, words: Iterable[Word]) -> int:
    """Return the LCS length of two texts: the bits (see word_bits) and number of words of the one,
    the words of the other."""
    full = row = (1 << size) - 1
    for word in words:
        if places := bits.get(word):
            grown = row & places
            row = (row + grown) | (row - grown)
    # carries left at the top; a zero below them is a step of the row
    return size - (row & full).bit_count()


def checked_threshold(threshold: float) -> float:
    """Return threshold.

    Raises:
        ValueError: it is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(
            f"the ROUGE-L threshold is {threshold:g}; give one above 0 and at most 1 (0.7 is usual)"
        )
    return threshold


class RougeIndex:
    """Texts so far, and for a new one the nearest of them: for a stream, one text at a time.

    A query counts common symbols with every text (see the module), which bounds each F from above,
    and takes true scores in falling order of the bounds until none left can win. For a whole file
    at once synth/near_copies.py decides the same in far less time.

    Args:
        threshold: F from which texts are near, above 0 and at most 1.

    Raises:
        ValueError: the threshold is out of range.
    """

    def __init__(self, threshold: float = 0.7) -> None:
        self.threshold = checked_threshold(threshold)
        self._texts: list[list[str]] = []
        self._lengths = array("q")
        self._holders: dict[tuple[str, int], array[int]] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> int:
        """Take a text in; return its place, which is the number of texts before it."""
        place, words = len(self._texts), rouge_words(text)
        self._texts.append(words)
        self._lengths.append(len(words))
        for symbol in _symbols(words):
            self._holders.setdefault(symbol, array("q")).append(place)
        return place

    def nearest(self, text: str, at_least: float = 0.0) -> Near | None:
        """Return the text with the highest F, the earliest of several.

        Args:
            text: what to compare with all texts so far.
            at_least: neighbours below this F do not count.

        Returns:
            None where no text shares a word with this one, or none reaches at_least.
        """
        words = rouge_words(text)
        places, bounds = self._bounds(words)
        wanted = bounds >= at_least
        places, bounds = places[wanted], bounds[wanted]
        order = np.argsort(-bounds, kind="stable")
        bits = word_bits(words)
        best: Near | None = None
        for place, bound in zip(places[order].tolist(), bounds[order].tolist(), strict=True):
            if best is not None and bound < best.score:
                break
            other = self._texts[place]
            score = f_measure(lcs_length(bits, len(words), other), len(words), len(other))
            if score >= at_least and (best is None or (score, best.place) > (best.score, place)):
                best = Near(place, score)
        return best

    def is_near(self, text: str) -> bool:
        """Return whether any text so far has an F of at least the threshold to this one."""
        return self.nearest(text, self.threshold) is not None

    def _bounds(self, words: list[str]) -> tuple[Ints, NDArray[np.float64]]:
        """Return the texts that share a word, in order, and what F can be at most."""
        overlap = np.zeros(len(self._texts), np.int64)
        for symbol in _symbols(words):
            if symbol in self._holders:
                # a text holds a symbol once, so no place stands here twice
                overlap[np.frombuffer(self._holders[symbol], np.int64)] += 1
        places = np.flatnonzero(overlap)
        lengths = np.frombuffer(self._lengths, np.int64)[places] if len(places) else places
        return places, f_measures(overlap[places], len(words), lengths)


def _symbols(words: list[str]) -> list[tuple[str, int]]:
    """Return each word with how often it stood before."""
    seen: dict[str, int] = {}
    symbols = []
    for word in words:
        seen[word] = seen.get(word, -1) + 1
        symbols.append((word, seen[word]))
    return symbols
