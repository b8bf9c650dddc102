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
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

_WORDS = re.compile("[a-z0-9]+")
Ints = NDArray[np.int64]
Word = TypeVar("Word", bound=Hashable)
FEW = 256  # texts that may hold a word before it counts as common
ONES = np.array([number.bit_count() for number in range(1 << 16)], np.uint8)


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
    and takes true scores in falling order of the bounds until none left can win. Of the 64 symbols
    that many texts hold a text has bits, of the others a list has the texts. For a whole file
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
        self._bit_of: dict[tuple[str, int], int] = {}
        self._common = array("Q")

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> int:
        """Take a text in; return its place, which is the number of texts before it."""
        place, words = len(self._texts), rouge_words(text)
        self._texts.append(words)
        self._lengths.append(len(words))
        self._common.append(0)
        for symbol in _symbols(words):
            if symbol in self._bit_of:
                self._common[place] |= self._bit_of[symbol]
                continue
            holders = self._holders.setdefault(symbol, array("q"))
            holders.append(place)
            if len(holders) > max(FEW, place // 64) and len(self._bit_of) < 64:
                self._make_common(symbol)
        return place

    def _make_common(self, symbol: tuple[str, int]) -> None:
        """Turn the list of a symbol's texts into a bit of each text."""
        bit = self._bit_of[symbol] = 1 << len(self._bit_of)
        texts = np.frombuffer(self._common, np.uint64)
        texts[np.frombuffer(self._holders.pop(symbol), np.int64)] |= np.uint64(bit)

    def nearest(self, text: str, at_least: float = 0.0) -> Near | None:
        """Return the text with the highest F, the earliest of several.

        Args:
            text: what to compare with all texts so far.
            at_least: neighbours below this F do not count.

        Returns:
            None where no text shares a word with this one, or none reaches at_least.
        """
        words = rouge_words(text)
        bits = word_bits(words)
        best: Near | None = None
        for place, bound in self._by_bound(words, bits, at_least):
            if best is not None and bound < best.score:
                break
            score = self._score(bits, len(words), place)
            if score >= at_least and (best is None or (score, best.place) > (best.score, place)):
                best = Near(place, score)
        return best

    def _score(self, bits: Mapping[str, int], size: int, place: int) -> float:
        other = self._texts[place]
        return f_measure(lcs_length(bits, size, other), size, len(other))

    def _by_bound(
        self, words: list[str], bits: Mapping[str, int], at_least: float
    ) -> Iterator[tuple[int, float]]:
        """Yield texts in falling order of what F can be at most, none left out that may win."""
        overlap = self._overlap(words)
        if not overlap.any():
            return
        lengths = np.frombuffer(self._lengths, np.int64)
        # F within a few units in the last place, at a third of the operations
        bounds = overlap / (lengths + len(words))
        top = int(bounds.argmax())
        floor = max(self._score(bits, len(words), top), at_least) / 2 * (1 - 1e-12)
        places = np.flatnonzero((bounds >= floor) & (overlap > 0))
        exact = f_measures(overlap[places], len(words), lengths[places])
        order = np.argsort(-exact, kind="stable")
        yield from zip(places[order].tolist(), exact[order].tolist(), strict=True)

    def is_near(self, text: str) -> bool:
        """Return whether any text so far has an F of at least the threshold to this one."""
        return self.nearest(text, self.threshold) is not None

    def _overlap(self, words: list[str]) -> Ints:
        """Return with how many of the words each text agrees."""
        symbols = _symbols(words)
        common = sum(self._bit_of.get(symbol, 0) for symbol in symbols)
        texts = np.frombuffer(self._common, np.uint64)
        overlap: Ints = _ones(texts & np.uint64(common)).astype(np.int64)
        for symbol in symbols:
            if symbol in self._holders:
                # a text holds a symbol once, so no place stands here twice
                overlap[np.frombuffer(self._holders[symbol], np.int64)] += 1
        return overlap


def _ones_by_table(numbers: NDArray[np.uint64]) -> NDArray[np.uint8]:
    pieces = ONES[numbers.view(np.uint16).reshape(len(numbers), 4)]
    counts: NDArray[np.uint8] = pieces[:, 0] + pieces[:, 1] + pieces[:, 2] + pieces[:, 3]
    return counts


_ones = getattr(np, "bitwise_count", _ones_by_table)  # since numpy 2


def _symbols(words: list[str]) -> list[tuple[str, int]]:
    """Return each word with how often it stood before."""
    seen: dict[str, int] = {}
    symbols = []
    for word in words:
        seen[word] = seen.get(word, -1) + 1
        symbols.append((word, seen[word]))
    return symbols
