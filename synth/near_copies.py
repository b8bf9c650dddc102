"""Near copies in a whole collection: which texts stay when each must differ from all that stay.

The decisions are those of a loop over synth/rouge.py's RougeIndex; almost all pairs of texts are
ruled out here without being looked at. L is the LCS of two texts of m and n words, need the least L
with F >= threshold.

Pairs of rare words (a prefix filter as in Chaudhuri et al., A primitive operator for similarity
joins in data cleaning, ICDE 2006, with two words in place of one). Order the words of a text by
rarity in the collection, then by place. Of the L words of the LCS the first two in this order have
the other L - 2 behind them; so they stand among the first m - L + 2 of the one text, among the
first n - L + 2 of the other, and in the same sequence in both. Near texts therefore share an
ordered pair of words out of prefixes of m - need + 2 words: of 20 words some 60 pairs, the rare
ones of 190. A shared pair with r words behind its second one allows L <= r + 2, which rules out
most of the rest; what is left then is checked for the words that one text lacks of the other, by
sets of bits, before its LCS is taken.

A mark before the first word of every text, commoner than any word, makes each LCS at least 2, so
that the argument holds for one common word too. Counting it, L <= r + 1 above; it only ever enters
the prefixes of the shortest texts.

The matching is a sort: one 64-bit integer holds [hash of the pair | text | r], and then a run of
equal hashes holds the texts that share the pair, in their order. Different pairs with equal hashes
cost time only, since the LCS of every candidate is taken in the end.

Texts are decided in blocks, and dropped ones leave the lists: a thousand variants of one text meet
the one that stays, not each other. The pairs of a text grow with the square of its words; texts
beyond a length go through a RougeIndex instead.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bioinstruct.synth.rouge import (
    ONES,
    Near,
    RougeIndex,
    checked_threshold,
    f_measure,
    lcs_length,
    needed_lcs,
    rouge_words,
    word_bits,
)

LONGEST = 120  # words of a text whose pairs are sorted
PAIRS = 40_000_000  # of all texts, at 8 bytes; the longest texts go without where there are more
LOWEST = 0.5  # below this threshold a prefix is most of its text, and pairs rule out little
FIRST_BLOCK, LAST_BLOCK = 256, 8192  # texts decided together
MATCHES = 4_000_000  # of a block; one with more is halved
CACHED = 1 << 18  # matches whose arrays a processor's cache holds
PLACE_BITS, PLACE_MASK = 8, 255  # of a word in a text
BEHIND_BITS, BEHIND_MASK = np.uint64(7), np.uint64(127)
SIGNS = 16  # of 16 bits each
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: a multiplicative hash

U64 = NDArray[np.uint64]
Ints = NDArray[np.int64]


def near_copies(texts: Sequence[str], threshold: float, *, pool: int = 0) -> list[Near | None]:
    """Decide in order which texts stay: those with no F >= threshold to any earlier one that stays.

    Args:
        texts: the collection.
        threshold: above 0, at most 1.
        pool: the first this many stay in any case.

    Returns:
        For each text None where it stays, else the nearest of the texts that stay before it, the
        earliest of several; an exact copy in words is decided as its first copy was.

    Raises:
        ValueError: the threshold is out of range.
    """
    found = _Texts(texts)
    decided = _Decisions(found, checked_threshold(threshold), sum(p < pool for p in found.places))
    decided.run()
    near: list[Near | None] = [None] * len(texts)
    for at, first in enumerate(found.firsts):
        if at < pool or first is None:
            continue
        verdict = decided.near[first]
        if verdict is not None:
            near[at] = Near(found.places[verdict.place], verdict.score)
        elif found.places[first] != at:
            near[at] = Near(found.places[first], 1.0)
    return near


class _Texts:
    """A collection without its exact copies and wordless texts, words as numbers."""

    def __init__(self, texts: Sequence[str]) -> None:
        numbers: defaultdict[str, int] = defaultdict()
        numbers.default_factory = numbers.__len__
        number: dict[tuple[int, ...], int] = {}
        self.texts = texts
        self.places: list[int] = []
        """Where each different text stands first."""
        self.firsts: list[int | None] = []
        """For each text its number among the different ones; None for one without words."""
        for place, text in enumerate(texts):
            words = tuple(map(numbers.__getitem__, rouge_words(text)))
            first = number.setdefault(words, len(number)) if words else None
            self.firsts.append(first)
            if first == len(self.places):
                self.places.append(place)
        self.words = list(number)
        self.num_words = len(numbers)

    def __len__(self) -> int:
        return len(self.words)


class _Decisions:
    """The loop over the texts, in blocks."""

    def __init__(self, texts: _Texts, threshold: float, pool: int) -> None:
        self.texts, self.threshold, self.pool = texts, threshold, pool
        self.near: list[Near | None] = [None] * len(texts)
        self.dropped = np.zeros(len(texts), bool)
        self.matcher = _Matcher(texts, threshold)
        self.long = RougeIndex(threshold)
        self.long_places: list[int] = []

    def run(self) -> None:
        """Decide every text after the pool."""
        for text in range(self.pool):
            self._keep(text)
        start, size = self.pool, FIRST_BLOCK
        while start < len(self.texts):
            end = min(start + size, len(self.texts))
            entries = self.matcher.entries(start, end)
            num_matches = self.matcher.num_matches(entries)
            if num_matches > MATCHES and end - start > 1:
                size = (end - start) // 2
                continue
            self._decide(start, end, self.matcher.candidates(entries, self.dropped))
            self.matcher.forget(self.dropped)
            start = end
            if num_matches < MATCHES // 4:
                size = min(2 * size, LAST_BLOCK)

    def _decide(self, start: int, end: int, candidates: dict[int, list[int]]) -> None:
        for text in range(start, end):
            best = self._best(text, candidates.get(text, []))
            if len(self.texts.words[text]) >= self.matcher.longish:
                best = _better(best, self._best_long(text))
            self.near[text] = best
            self.dropped[text] = best is not None
            if best is None:
                self._keep(text)

    def _best(self, text: int, others: list[int]) -> Near | None:
        if not others:
            return None
        words, best = self.texts.words[text], None
        bits = word_bits(words)
        for other in others:
            if not self.dropped[other]:
                theirs = self.texts.words[other]
                lcs = lcs_length(bits, len(words), theirs)
                score = f_measure(lcs, len(words), len(theirs))
                if score >= self.threshold:
                    best = _better(best, Near(other, score))
        return best

    def _best_long(self, text: int) -> Near | None:
        near = self.long.nearest(self.texts.texts[self.texts.places[text]], self.threshold)
        return Near(self.long_places[near.place], near.score) if near else None

    def _keep(self, text: int) -> None:
        if len(self.texts.words[text]) >= self.matcher.longish:
            self.long.add(self.texts.texts[self.texts.places[text]])
            self.long_places.append(text)


def _better(one: Near | None, two: Near | None) -> Near | None:
    if one is None or two is None:
        return one or two
    return max(one, two, key=lambda near: (near.score, -near.place))


class _ByRarity(NamedTuple):
    """The words of the texts up to a length, a mark added, rare words first."""

    symbols: Ints
    """Word and place in the text as one number, text after text; a higher word is commoner."""
    texts_N: Ints
    starts_N: Ints
    lengths_N: Ints
    """For each text its number, where its symbols begin, and its words without the mark."""
    num_words: int


class _Matcher:
    """The word pairs of all texts up to a length, sorted, and the candidates they give.

    Shapes: E entries (a pair of a text), M matches (two entries with one hash), N texts.
    """

    def __init__(self, texts: _Texts, threshold: float) -> None:
        lengths_N = np.fromiter(map(len, texts.words), np.int64, len(texts))
        sizes = np.arange(1, LONGEST + 1)
        need = needed_lcs(sizes[:, None], sizes, threshold)
        need[need > np.minimum(sizes[:, None], sizes)] = 2 * LONGEST
        # no pair of a text is needed behind the prefix of its easiest neighbour
        prefixes = np.minimum(sizes + 1, sizes - need.min(axis=1) + 2)
        self.longest = _longest(lengths_N, prefixes) if threshold >= LOWEST else 0
        self.longish = _longish(lengths_N, self.longest, threshold)
        self.need = need.astype(np.int16).ravel()
        self.lengths_N = lengths_N.astype(np.int32)
        self.text_bits = np.uint64(len(texts).bit_length())
        packed_E = self._pack(_by_rarity(texts, lengths_N, self.longest), prefixes)
        packed_E.sort()
        self.signs_NS = _signs(texts, lengths_N)
        self._index(_shared(packed_E, self._shift))
        self.forgotten = 0

    def _pack(self, rarity: _ByRarity, prefixes: Ints) -> U64:
        """Return [hash | text | words behind] of every ordered pair of every prefix, unsorted."""
        sizes_N = prefixes[rarity.lengths_N - 1]
        packed_E = np.empty(int((sizes_N * (sizes_N - 1) // 2).sum()), np.uint64)
        done = 0
        for size in np.unique(sizes_N).tolist():
            rows = np.flatnonzero(sizes_N == size)
            x, y = np.triu_indices(size, 1)
            step = max(1, 1_000_000 // len(x))
            for at in range(0, len(rows), step):
                some = rows[at : at + step]
                pairs = self._pack_rows(rarity, some, size, x, y)
                packed_E[done : done + pairs.size] = pairs.ravel()
                done += pairs.size
        return packed_E

    def _pack_rows(self, rarity: _ByRarity, rows: Ints, size: int, x: Ints, y: Ints) -> U64:
        """Return the packed pairs of some texts whose prefixes have one size, a row a text."""
        symbols = rarity.symbols[rarity.starts_N[rows][:, None] + np.arange(size)]
        words, places = symbols >> PLACE_BITS, symbols & PLACE_MASK
        forward = places[:, x] < places[:, y]
        first = np.where(forward, words[:, x], words[:, y])
        second = np.where(forward, words[:, y], words[:, x])
        pair = (first * rarity.num_words + second).astype(np.uint64) * _SPREAD
        behind = (rarity.lengths_N[rows][:, None] - y).astype(np.uint64)
        low = rarity.texts_N[rows][:, None].astype(np.uint64) << BEHIND_BITS | behind
        packed: U64 = pair >> self._shift << self._shift | low
        return packed

    @property
    def _shift(self) -> np.uint64:
        return self.text_bits + BEHIND_BITS

    def _index(self, packed_E: U64) -> None:
        """Hold sorted entries: for each its text, words behind, and where its run begins."""
        self.packed_E = packed_E
        mask = (np.uint64(1) << self.text_bits) - np.uint64(1)
        self.text_E = (packed_E >> BEHIND_BITS & mask).astype(np.int32)
        self.behind_E = (packed_E & BEHIND_MASK).astype(np.int16)
        self.size_E = self.lengths_N[self.text_E]
        heads = packed_E >> self._shift
        begins = np.arange(len(heads), dtype=np.int32)
        begins[1:][heads[1:] == heads[:-1]] = 0
        self.begin_E = np.maximum.accumulate(begins) if len(begins) else begins

    def entries(self, start: int, end: int) -> Ints:
        """Return the entries of texts start to end."""
        return np.flatnonzero((self.text_E >= start) & (self.text_E < end))

    def num_matches(self, entries: Ints) -> int:
        """Return how many entries stand before these in their runs."""
        return int((entries - self.begin_E[entries]).sum())

    def candidates(self, entries: Ints, dropped: NDArray[np.bool_]) -> dict[int, list[int]]:
        """Return for each text of the entries the earlier texts it may be near, dropped ones not.

        Args:
            entries: from entries().
            dropped: for each text whether it is out.
        """
        found = [np.zeros(0, np.int64)]
        ends = np.cumsum(entries - self.begin_E[entries])
        # so many at a time as a processor's cache holds
        cuts = np.searchsorted(ends, np.arange(CACHED, ends[-1:].sum(), CACHED))
        for some in np.split(entries, cuts):
            found.append(self._matches(some, dropped))
        pairs = np.unique(np.concatenate(found))
        number = len(self.lengths_N)
        text_P, other_P = pairs // number, pairs % number
        likely = self._enough_words(text_P, other_P)
        candidates: defaultdict[int, list[int]] = defaultdict(list)
        for text, other in zip(text_P[likely].tolist(), other_P[likely].tolist(), strict=True):
            candidates[text].append(other)
        return candidates

    def _matches(self, entries: Ints, dropped: NDArray[np.bool_]) -> Ints:
        """Return text * N + earlier text for the matches of some entries that may be near."""
        begins = self.begin_E[entries]
        counts = entries - begins
        skipped = np.cumsum(counts) - counts
        before_M = np.arange(counts.sum()) + np.repeat(begins - skipped, counts)
        row_M = np.repeat((self.size_E[entries] - 1) * LONGEST - 1, counts)
        need_M = self.need[row_M + self.size_E[before_M]]
        behind_M = np.repeat(self.behind_E[entries], counts)
        stays = np.flatnonzero(need_M <= np.minimum(behind_M, self.behind_E[before_M]) + 1)
        other_M = self.text_E[before_M[stays]].astype(np.int64)
        text_M = np.repeat(self.text_E[entries], counts)[stays].astype(np.int64)
        stays = np.flatnonzero((text_M != other_M) & ~dropped[other_M])
        pairs: Ints = text_M[stays] * len(self.lengths_N) + other_M[stays]
        return pairs

    def _enough_words(self, text_P: Ints, other_P: Ints) -> NDArray[np.bool_]:
        """Return for which pairs both texts have few enough words that the other lacks."""
        size_P, other_size_P = self.lengths_N[text_P], self.lengths_N[other_P]
        need_P = self.need[(size_P - 1) * LONGEST + other_size_P - 1]
        enough_P = np.empty(len(text_P), bool)
        for at in range(0, len(text_P), CACHED // 8):
            part = slice(at, at + CACHED // 8)
            one, two = self.signs_NS[text_P[part]], self.signs_NS[other_P[part]]
            lacks = ONES[one & ~two].sum(axis=1, dtype=np.int32)
            lacked = ONES[two & ~one].sum(axis=1, dtype=np.int32)
            enough_P[part] = (lacks <= size_P[part] - need_P[part]) & (
                lacked <= other_size_P[part] - need_P[part]
            )
        return enough_P

    def forget(self, dropped: NDArray[np.bool_]) -> None:
        """Take dropped texts out of the runs, when enough of them have gathered."""
        number = int(dropped.sum())
        if number - self.forgotten > len(dropped) // 16:
            self._index(self.packed_E[~dropped[self.text_E]])
            self.forgotten = number


def _signs(texts: _Texts, lengths_N: Ints) -> NDArray[np.uint16]:
    """Return a set of bits for each text, one for each of its words; words may share a bit."""
    flat = np.fromiter(itertools.chain.from_iterable(texts.words), np.int64, lengths_N.sum())
    bits = flat % (16 * SIGNS)
    signs = np.zeros((len(texts), SIGNS), np.uint16)
    rows = np.repeat(np.arange(len(texts)), lengths_N)
    np.bitwise_or.at(signs, (rows, bits // 16), np.uint16(1) << (bits % 16).astype(np.uint16))
    return signs


def _by_rarity(texts: _Texts, lengths_N: Ints, longest: int) -> _ByRarity:
    chosen = np.flatnonzero(lengths_N <= longest)
    sizes = lengths_N[chosen]
    words = (texts.words[text] for text in chosen.tolist())
    flat = np.fromiter(itertools.chain.from_iterable(words), np.int64, int(sizes.sum()))
    counts = np.bincount(flat, minlength=texts.num_words)
    rank = np.empty(texts.num_words, np.int64)
    rank[np.argsort(counts, kind="stable")] = np.arange(texts.num_words)
    row = np.repeat(np.arange(len(chosen)), sizes)
    place = np.arange(len(flat)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    word_bits_needed = PLACE_BITS + texts.num_words.bit_length()
    symbols = row << word_bits_needed | rank[flat] << PLACE_BITS | place + 1
    # the mark: place 0, and a rank above every word's
    marks = np.arange(len(chosen)) << word_bits_needed | texts.num_words << PLACE_BITS
    symbols = np.concatenate([symbols, marks])
    symbols.sort()
    symbols &= (1 << word_bits_needed) - 1
    starts = np.cumsum(sizes + 1) - (sizes + 1)
    return _ByRarity(symbols, chosen, starts, sizes, texts.num_words + 1)


def _shared(packed_E: U64, shift: np.uint64) -> U64:
    """Return the sorted entries whose hash another entry has too."""
    heads = packed_E >> shift
    same = heads[1:] == heads[:-1]
    keep = np.zeros(len(packed_E), bool)
    keep[1:] |= same
    keep[:-1] |= same
    return packed_E[keep]


def _longest(lengths_N: Ints, prefixes: Ints) -> int:
    """Return the length up to which all texts together have at most PAIRS pairs."""
    number = np.bincount(lengths_N[lengths_N <= LONGEST], minlength=LONGEST + 1)[1:]
    pairs = np.cumsum(number * (prefixes * (prefixes - 1) // 2))
    return int(np.searchsorted(pairs, PAIRS, side="right"))


def _longish(lengths_N: Ints, longest: int, threshold: float) -> int:
    """Return a length below which no text is near one beyond longest."""
    if lengths_N.max(initial=0) <= longest:
        return int(lengths_N.max(initial=0)) + 1
    return max(1, int(threshold * (longest + 1) / (2 - threshold)) - 1)
