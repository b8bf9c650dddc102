"""Token samples of records, and the limits that they are held to.

A sample is a prompt and an answer that ends with the template's stop token. Its inputs are all
tokens but the last, its labels all but the first, and the labels from the answer's first token on
are supervised: labels are stored shifted, so no boundary between documents is left to be masked.

Samples are spans of one long array. Choosing some, or cutting a prompt on its left, is arithmetic
on the spans and copies no token; token_cache.py keeps the array on disk, mixture.py puts the
samples of several files together.
"""

import collections
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bioinstruct.model.templates import Template, encode_sample
from bioinstruct.model.tokenizers.tokenizer import Tokenizer
from bioinstruct.synth.console import Progress
from bioinstruct.synth.records import Record

SHOWN = 5  # bad records printed in full


class Labels(NamedTuple):
    """A name for each sample, as a number into the list of different names."""

    names: tuple[str, ...]
    ids: NDArray[np.int32]

    @classmethod
    def of(cls, values: Sequence[str]) -> "Labels":
        """Number names in the order in which they first appear."""
        numbers = {name: i for i, name in enumerate(dict.fromkeys(values))}
        ids = np.fromiter((numbers[v] for v in values), dtype=np.int32, count=len(values))
        return cls(tuple(numbers), ids)

    @classmethod
    def joined(cls, parts: Sequence["Labels"]) -> "Labels":
        """One after the other, equal names under one number."""
        names = tuple(dict.fromkeys(name for part in parts for name in part.names))
        number = {name: i for i, name in enumerate(names)}
        tables = [np.array([number[name] for name in p.names], dtype=np.int32) for p in parts]
        ids = [table[p.ids] for table, p in zip(tables, parts, strict=True)]
        return cls(names, np.concatenate([np.zeros(0, dtype=np.int32), *ids]))


@dataclass(frozen=True)
class TokenSet:
    """Token samples of a list of records.

    Attributes:
        arrays: uint32 tokens, an array a file.
        files: (n,) which array a sample's tokens stand in.
        starts: (n,) its first token there.
        sizes: (n,) its tokens, the last label included.
        prompts: (n,) how many of them are prompt.
        records: (n,) number of each sample's record in its file, counted from 0.
        places: "file:line" of each sample's record.
        sources: what each came from: the record's own `source`, or its file.
        categories: the record's `category`, or "".
    """

    arrays: tuple[NDArray[np.uint32], ...]
    files: NDArray[np.int32]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    prompts: NDArray[np.int64]
    records: NDArray[np.int64]
    places: list[str]
    sources: Labels
    categories: Labels

    @classmethod
    def laid(
        cls,
        tokens: NDArray[np.uint32],
        sizes: Sequence[int] | NDArray[np.int64],
        prompts: Sequence[int] | NDArray[np.int64],
        places: list[str],
        records: NDArray[np.int64] | None = None,
        sources: Labels | None = None,
        categories: Labels | None = None,
    ) -> "TokenSet":
        """Samples one after the other in one array, each a record of its own by default."""
        sizes = np.asarray(sizes, dtype=np.int64)
        none = Labels(("",), np.zeros(len(sizes), dtype=np.int32))
        return cls(
            (tokens,),
            np.zeros(len(sizes), dtype=np.int32),
            np.cumsum(sizes) - sizes,
            sizes,
            np.asarray(prompts, dtype=np.int64),
            np.arange(len(sizes)) if records is None else records,
            places,
            sources or none,
            categories or none,
        )

    @classmethod
    def joined(cls, parts: Sequence["TokenSet"]) -> "TokenSet":
        """The samples of several sets, one set after the other; at least one set."""
        first = np.cumsum([0, *(len(p.arrays) for p in parts)])
        return cls(
            tuple(array for p in parts for array in p.arrays),
            np.concatenate([p.files + at for p, at in zip(parts, first, strict=False)]).astype(
                np.int32
            ),
            np.concatenate([p.starts for p in parts]),
            np.concatenate([p.sizes for p in parts]),
            np.concatenate([p.prompts for p in parts]),
            np.concatenate([p.records for p in parts]),
            [place for p in parts for place in p.places],
            Labels.joined([p.sources for p in parts]),
            Labels.joined([p.categories for p in parts]),
        )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Input tokens of each sample, which is what a pack holds."""
        return self.sizes - 1

    @property
    def supervised(self) -> NDArray[np.int64]:
        """Supervised tokens of each sample."""
        return self.sizes - self.prompts

    def sample(self, i: int) -> tuple[NDArray[np.uint32], int]:
        """Tokens of sample i, and how many of them are prompt."""
        start = int(self.starts[i])
        return self.arrays[self.files[i]][start : start + int(self.sizes[i])], int(self.prompts[i])

    def subset(self, chosen: Sequence[int] | NDArray[np.int64]) -> "TokenSet":
        """The samples of these numbers, in this order; one may be named several times."""
        at = np.asarray(chosen, dtype=np.int64)
        return dataclasses.replace(
            self,
            files=self.files[at],
            starts=self.starts[at],
            sizes=self.sizes[at],
            prompts=self.prompts[at],
            records=self.records[at],
            places=[self.places[i] for i in at.tolist()],
            sources=Labels(self.sources.names, self.sources.ids[at]),
            categories=Labels(self.categories.names, self.categories.ids[at]),
        )


@dataclass(frozen=True)
class Limits:
    """What a sample may be, and what happens to one that is not."""

    max_tokens: int
    """Longest sample, in input tokens."""
    on_empty: str
    on_overlong: str
    turns: str = "all"
    """Which of a conversation's answers are learned, each given what was said before it."""


@dataclass(frozen=True)
class Encoded:
    """Samples before any limit: the same whatever the limits are.

    Attributes:
        samples: of all answers of all records.
        last: (n,) whether it is its record's last answer.
        empty: (n,) whether the output is blank.
        lacking: sample number -> bytes of its text that the vocabulary does not have.
    """

    samples: TokenSet
    last: NDArray[np.bool_]
    empty: NDArray[np.bool_]
    lacking: dict[int, list[int]]


def encode_all(records: Sequence[Record], template: Template, tokenizer: Tokenizer) -> Encoded:
    """Encode every answer of every record.

    Raises:
        ValueError: as for encode_sample.
    """
    ids: list[NDArray[np.uint32]] = []
    prompts: list[int] = []
    lacking: dict[int, list[int]] = {}
    progress = Progress("tokenizing", len(records))
    every = [record.answers() for record in records]
    for number, answers in enumerate(every, 1):
        progress.update(number)
        for one in answers:
            if missing := tokenizer.lacking(one.instruction + one.input + one.output):
                lacking[len(ids)] = missing
            texts = one.instruction, one.input, one.output
            prompt, answer = encode_sample(template, tokenizer, *texts, one.history)
            ids.append(np.array(prompt + answer, dtype=np.uint32))
            prompts.append(len(prompt))
    flat = [one for answers in every for one in answers]
    numbers = np.repeat(np.arange(len(every)), [len(answers) for answers in every])
    tokens = TokenSet.laid(
        np.concatenate([np.zeros(0, dtype=np.uint32), *ids]),
        [len(part) for part in ids],
        prompts,
        places_of([one.file for one in flat], [one.line for one in flat], numbers),
        numbers,
        Labels.of([_text(one, "source") or one.file for one in flat]),
        Labels.of([_text(one, "category") for one in flat]),
    )
    last = [one is answers[-1] for answers in every for one in answers]
    empty = [not one.output.strip() for one in flat]
    return Encoded(tokens, np.array(last, dtype=bool), np.array(empty, dtype=bool), lacking)


def places_of(files: Sequence[str], lines: Sequence[int], numbers: NDArray[np.int64]) -> list[str]:
    """Where records stand: file:line, and which record where a line holds several.

    Args:
        files: of each sample.
        lines: of each sample's record.
        numbers: of each sample's record in its file, counted from 0.
    """
    pairs = list(zip(files, lines, strict=True))
    held = collections.Counter(place for place, _ in set(zip(pairs, numbers.tolist(), strict=True)))
    return [
        f"{file}:{line}" if held[file, line] == 1 else f"{file}:{line} (record {number + 1})"
        for (file, line), number in zip(pairs, numbers.tolist(), strict=True)
    ]


def _text(record: Record, field: str) -> str:
    value = record.extra.get(field, "")
    return value if isinstance(value, str) else ""


def limited(encoded: Encoded, limits: Limits) -> tuple[TokenSet, list[str]]:
    """Hold samples to the limits.

    Returns:
        The samples, and one line for the user about each kind of record changed or left out.

    Raises:
        ValueError: records that the limits refuse, with their places and what can be done.
    """
    tokens = encoded.samples
    kept = encoded.last if limits.turns == "last" else np.ones(len(tokens), dtype=bool)
    empty = kept & encoded.empty
    if limits.on_empty != "keep":
        kept = kept & ~empty
    excess = tokens.lengths - limits.max_tokens
    overlong = kept & (excess > 0)
    long = [f"{tokens.places[i]} ({tokens.lengths[i]} tokens)" for i in np.flatnonzero(overlong)]
    lacking = {tokens.places[i]: codes for i, codes in encoded.lacking.items()}
    notes = _report([tokens.places[i] for i in np.flatnonzero(empty)], long, lacking, limits)
    # a prompt may be cut, an answer may not
    cut = np.where(overlong & (limits.on_overlong == "truncate"), excess, 0)
    kept = kept & (cut < tokens.prompts) & ~(overlong & (cut == 0))
    tokens = dataclasses.replace(
        tokens, starts=tokens.starts + cut, sizes=tokens.sizes - cut, prompts=tokens.prompts - cut
    )
    if not kept.any():
        raise ValueError(f"no record is left: {'; '.join(notes) or 'there are none'}")
    return (tokens if kept.all() else tokens.subset(np.flatnonzero(kept))), notes


def encode_records(
    records: Sequence[Record], template: Template, tokenizer: Tokenizer, limits: Limits
) -> tuple[TokenSet, list[str]]:
    """Encode records and hold them to the limits, as `limited` says."""
    return limited(encode_all(records, template, tokenizer), limits)


def _report(
    empty: list[str], overlong: list[str], lacking: dict[str, list[int]], limits: Limits
) -> list[str]:
    """Raise for the kinds of record that the limits refuse; return a line for each other kind."""
    kinds = [
        (
            empty,
            "with an empty output",
            limits.on_empty,
            "set data.on_empty to drop or keep",
        ),
        (
            overlong,
            f"over {limits.max_tokens} tokens",
            limits.on_overlong,
            "raise data.max_tokens_per_pack (at most the model's context) or set "
            "data.on_overlong to drop or truncate",
        ),
    ]
    found = [
        (f"{len(places)} records {what}: {_few(places)}", policy, advice)
        for places, what, policy, advice in kinds
        if places
    ]
    wrong = [f"{text}; {advice}" for text, policy, advice in found if policy == "error"]
    if wrong:
        raise ValueError("; ".join(wrong))
    notes = [f"{text}; {_DONE[policy]}" for text, policy, _ in found]
    if lacking:
        codes = sorted({b for missing in lacking.values() for b in missing})
        notes.append(
            f"{len(lacking)} records hold bytes the vocabulary lacks, left out of the tokens ("
            f"{', '.join(f'0x{b:02x}' for b in codes)}): {_few(list(lacking))}"
        )
    return notes


_DONE = {
    "drop": "dropped",
    "keep": "kept",
    "truncate": "prompts cut on the left; dropped where the answer alone is too long",
}


def _few(places: list[str]) -> str:
    rest = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    return ", ".join(places[:SHOWN]) + rest
