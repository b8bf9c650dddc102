"""Which records of which files an epoch takes: filter, cap, hold out, weigh, subset; in this order.

    filter   categories of the whole run, then of the file
    cap      at most so many records of a file
    hold out the share for validation, before copies are made, so that no record stands on both
             sides; every answer of a conversation goes with it
    weigh    w: every record floor(w) times, and a random (w - floor(w)) of them once more
    subset   so many of what the weights make, copies counted

Each draw is a permutation by raw Philox numbers of its own key, of which a first part is taken.
So a smaller cap, fraction or subset is contained in a larger one of the same seed, and nothing
depends on the number of processes, the batch size or the packing.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bioinstruct.model.templates import Template
from bioinstruct.model.tokenizers.tokenizer import Tokenizer
from bioinstruct.train.data.token_cache import load_tokens
from bioinstruct.train.data.tokens import Limits, TokenSet
from bioinstruct.train.demo import resolve
from bioinstruct.train.run import DataSettings, MixFile, Run

# keys of the draws; those of the epochs' orders are small numbers
_HELD, _CAP, _FRACTION, _SUBSET = (k << 40 for k in (1, 2, 3, 4))


class Mixture(NamedTuple):
    """What a run trains on and what it is validated on."""

    tokens: TokenSet
    validation: TokenSet | None


def files_of(data: DataSettings) -> list[MixFile]:
    """All files of records, those of data.path with weight 1.

    Raises:
        ValueError: none is named, or one is not there.
    """
    files = [MixFile(path=path) for path in data.path]
    for file, key in [(f, "data.path") for f in files] + [(f, "data.mix") for f in data.mix]:
        existing(file.path, key)
    if not files and not data.mix:
        raise ValueError("data.path is not set; give --set data.path=FILE")
    return [*files, *data.mix]


def existing(name: str, key: str) -> Path:
    """The file that a setting names.

    Raises:
        ValueError: it is not there.
    """
    path = resolve(name)
    if not path.is_file():
        raise ValueError(f"{key}: there is no file {name}")
    return path


def load_mixture(run: Run, template: Template, tokenizer: Tokenizer, limits: Limits) -> Mixture:
    """Read, encode and mix the files of a run.

    Raises:
        ValueError: files that are missing or broken, records that the limits refuse, a category
            that no record has, more samples asked for than there are, nothing left to train on.
        OSError: a file cannot be read, or the cache cannot be written.
    """
    data, seed = run.data, run.train.seed if run.data.seed is None else run.data.seed
    files = files_of(data)
    parts = [load_tokens(resolve(file.path), template, tokenizer, limits) for file in files]
    _check_categories(data, files, parts)
    parts = [
        _capped(_of_categories(part, data.categories, file.categories), file, seed, i)
        for i, (part, file) in enumerate(zip(parts, files, strict=True))
    ]
    whole = TokenSet.joined(parts)
    if not len(whole):
        raise ValueError("data.categories and those of data.mix leave no record to train on")
    held = np.zeros(len(whole), dtype=bool)
    validation = None
    if isinstance(data.validation, str):
        held_file = existing(data.validation, "data.validation")
        validation = load_tokens(held_file, template, tokenizer, limits)
    elif data.validation:
        held = _held_out(files, parts, data.validation, seed)
        validation = whole.subset(np.flatnonzero(held))
    bounds = np.cumsum([0, *(len(part) for part in parts)])
    records = Records.of(whole.records, bounds)
    copies = weighted(records, bounds, [file.weight for file in files], held, seed)
    return Mixture(whole.subset(records.samples(subset(copies, data.samples, seed))), validation)


def _check_categories(
    data: DataSettings, files: Sequence[MixFile], parts: Sequence[TokenSet]
) -> None:
    """Refuse a category that no record has: it is a slip, and would leave records out unseen."""
    asked = [("data.categories", data.categories, parts)]
    asked += [
        (f"data.mix of {file.path}: categories", file.categories, [part])
        for file, part in zip(files, parts, strict=True)
    ]
    for name, wanted, among in asked:
        found = sorted({c for part in among for c in part.categories.names if c})
        if missing := [category for category in wanted if category not in found]:
            raise ValueError(
                f"{name}: no record has the category {missing[0]!r}; those that records have are "
                f"{', '.join(found) or 'none: the records lack the field category'}"
            )


def _of_categories(part: TokenSet, *filters: tuple[str, ...]) -> TokenSet:
    names = part.categories.names
    allowed = np.array([all(not f or name in f for f in filters) for name in names], dtype=bool)
    kept = allowed[part.categories.ids]
    return part if kept.all() else part.subset(np.flatnonzero(kept))


def _capped(part: TokenSet, file: MixFile, seed: int, number: int) -> TokenSet:
    records, own = np.unique(part.records, return_inverse=True)
    if file.cap is None or file.cap >= len(records):
        return part
    return part.subset(np.flatnonzero(drawn(len(records), file.cap, seed, _CAP + number)[own]))


def _held_out(
    files: Sequence[MixFile], parts: Sequence[TokenSet], share: float, seed: int
) -> NDArray[np.bool_]:
    """Whether each sample is held out: all of a record's, in every listing of its file."""
    paths = list(dict.fromkeys(file.path for file in files))
    named = [
        part.records + (paths.index(file.path) << 40)
        for file, part in zip(files, parts, strict=True)
    ]
    records, own = np.unique(np.concatenate(named), return_inverse=True)
    held = max(1, round(share * len(records)))
    if held >= len(records):
        raise ValueError(
            f"data.validation = {share} of {len(records)} records leaves none to train on"
        )
    return drawn(len(records), held, seed, _HELD)[own]


def drawn(count: int, wanted: int, seed: int, key: int) -> NDArray[np.bool_]:
    """Which `wanted` of `count` things are drawn; fewer are among more."""
    order = np.random.Philox(key=[seed, key]).random_raw(count).argsort(kind="stable")
    chosen = np.zeros(count, dtype=bool)
    chosen[order[:wanted]] = True
    return chosen


class Records(NamedTuple):
    """Where each record's samples stand: a conversation has several, one after the other."""

    firsts: NDArray[np.int64]
    """(R,) number of the first sample."""
    counts: NDArray[np.int64]
    """(R,) samples."""

    @classmethod
    def of(cls, numbers: NDArray[np.int64], bounds: NDArray[np.int64]) -> "Records":
        """Tell records apart by number, and where one file ends and the next begins.

        Args:
            numbers: of each sample's record in its file.
            bounds: first sample of each file, and the end.
        """
        begins = np.diff(numbers, prepend=-1) != 0
        begins[bounds[bounds < len(numbers)]] = True
        firsts = np.flatnonzero(begins)
        return cls(firsts, np.diff(firsts, append=len(numbers)))

    def samples(self, entries: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample numbers of these records, all of one before the next's."""
        counts = self.counts[entries]
        before = np.cumsum(counts) - counts
        return np.repeat(self.firsts[entries] - before, counts) + np.arange(counts.sum())


def weighted(
    records: Records,
    bounds: NDArray[np.int64],
    weights: Sequence[float],
    held: NDArray[np.bool_],
    seed: int,
) -> NDArray[np.int64]:
    """Copies of records by the weights of their files.

    Args:
        records: of all files.
        bounds: first sample of each file, and the end.
        weights: of each file.
        held: whether each sample is left out.
        seed: of the fractions.

    Returns:
        Record numbers, one an entry: a record stands there once a copy.
    """
    copies = np.zeros(len(records.firsts), dtype=np.int64)
    file = np.searchsorted(bounds, records.firsts, side="right") - 1
    for number, weight in enumerate(weights):
        own = np.flatnonzero((file == number) & ~held[records.firsts])
        extra = round((weight - math.floor(weight)) * len(own))
        copies[own] = math.floor(weight) + drawn(len(own), extra, seed, _FRACTION + number)
    return np.repeat(np.arange(len(copies)), copies)


def subset(entries: NDArray[np.int64], wanted: int | None, seed: int) -> NDArray[np.int64]:
    """A random subset of the entries, in their order; None for all of them.

    Raises:
        ValueError: more are asked for than there are, or none are left.
    """
    if wanted is not None and wanted > len(entries):
        raise ValueError(
            f"data.samples = {wanted}, but the mixture has {len(entries)} records to train on; "
            "lower it, or raise the weights of data.mix"
        )
    if not len(entries):
        raise ValueError("the weights of data.mix leave no record to train on")
    return entries if wanted is None else entries[drawn(len(entries), wanted, seed, _SUBSET)]
