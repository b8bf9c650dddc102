"""ROUGE-L between short texts, exactly as the rouge-score package computes it without stemming.

Tokens are the runs of a-z and 0-9 of the lower-cased text. With L the length of the longest common
subsequence of m and n tokens, p = L/m and r = L/n, the score is F = 2pr/(p+r) in floats, in just
this form, so that ties fall as they do there. L is found with one bit a token of one text (Hyyro
2004). A text is compared only with those whose common tokens, order left aside, would allow a
higher score than the best one so far: a bound that loses nothing.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

_NOT_TOKEN = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True, slots=True)
class Near:
    """A similar text: its score and its number in the order of adding, -1 for none."""

    score: float
    index: int


def tokens(text: str) -> list[str]:
    """Split a text as rouge-score does."""
    return _NOT_TOKEN.sub(" ", text.lower()).split()


def f_measure(common: int, m: int, n: int) -> float:
    """Return the score of texts of m and n tokens with a common subsequence of a length."""
    if not common:
        return 0.0
    p, r = common / m, common / n
    return 2 * p * r / (p + r)


def lcs_length(masks: dict[str, int], m: int, other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    Args:
        masks: bit i of a token's mask is set where token i of the first text is that token.
        m: tokens in the first text.
        other: the second text.
    """
    full = (1 << m) - 1
    row = full
    for token in other:
        match = row & masks.get(token, 0)
        row = ((row + match) | (row - match)) & full
    return m - row.bit_count()


def bit_masks(words: Sequence[str]) -> dict[str, int]:
    """Return for each token where it stands, as bits."""
    masks: dict[str, int] = defaultdict(int)
    for i, word in enumerate(words):
        masks[word] |= 1 << i
    return dict(masks)


class RougeIndex:
    """Texts that new ones are compared with."""

    def __init__(self) -> None:
        self.texts: list[list[str]] = []
        self.postings: dict[str, list[tuple[int, int]]] = defaultdict(list)

    def add(self, text: str) -> None:
        """Add a text; it gets the next number, counted from 0."""
        words = tokens(text)
        for word, count in Counter(words).items():
            self.postings[word].append((len(self.texts), count))
        self.texts.append(words)

    def nearest(self, text: str) -> Near:
        """Return the highest score and the first text that has it; (0.0, -1) for none."""
        words = tokens(text)
        m, shared = len(words), self._shared(words)
        texts = self.texts
        bounds = [(-f_measure(c, m, len(texts[i])), i) for i, c in shared.items()]
        bounds.sort()
        masks = bit_masks(words)
        best = Near(0.0, -1)
        for bound, i in bounds:
            if -bound < best.score:
                break
            score = f_measure(lcs_length(masks, m, texts[i]), m, len(texts[i]))
            if score > best.score or (score == best.score > 0 and i < best.index):
                best = Near(score, i)
        return best

    def _shared(self, words: Sequence[str]) -> Counter[int]:
        """Count the tokens, repeated ones included, that each text shares with words."""
        shared: Counter[int] = Counter()
        for word, count in Counter(words).items():
            for index, theirs in self.postings.get(word, ()):
                shared[index] += min(count, theirs)
        return shared
