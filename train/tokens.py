"""Records -> token samples, kept in a memory-mapped cache.

A sample is a prompt and an answer that ends with the template's stop token. Its inputs are all
tokens but the last, its labels all but the first, and the labels from the answer's first token on
are supervised: labels are stored shifted, so no boundary between documents is left to be masked.

The cache is keyed by everything that determines the tokens: the files' bytes, the tokenizer, the
template and the limits. It is written to a temporary folder and renamed.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bioinstruct.model.templates import Sample, Template, encode_sample
from bioinstruct.model.tokenizer import Tokenizer
from bioinstruct.synth.console import Progress, note
from bioinstruct.synth.files import cache_folder
from bioinstruct.synth.records import Record, read_records

SHOWN = 5  # bad records printed in full


@dataclass(frozen=True)
class TokenSet:
    """Token samples of a list of records.

    Attributes:
        tokens: all samples one after the other, uint32.
        offsets: sample i is tokens[offsets[i] : offsets[i + 1]].
        prompts: number of prompt tokens of each sample.
        places: "file:line" of each sample's record.
    """

    tokens: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    prompts: NDArray[np.int64]
    places: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Input tokens of each sample, which is what a pack holds."""
        return np.diff(self.offsets) - 1

    @property
    def supervised(self) -> NDArray[np.int64]:
        """Supervised tokens of each sample."""
        return np.diff(self.offsets) - self.prompts

    def sample(self, i: int) -> tuple[NDArray[np.uint32], int]:
        """Tokens of sample i, and how many of them are prompt."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]], int(self.prompts[i])

    def subset(self, chosen: Sequence[int]) -> "TokenSet":
        """The samples of these numbers, in this order."""
        parts = [self.sample(i)[0] for i in chosen]
        return TokenSet(
            np.concatenate(parts) if parts else self.tokens[:0],
            np.cumsum([0, *map(len, parts)]).astype(np.int64),
            self.prompts[list(chosen)],
            [self.places[i] for i in chosen],
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


def encode_records(
    records: Sequence[Record], template: Template, tokenizer: Tokenizer, limits: Limits
) -> tuple[TokenSet, list[str]]:
    """Encode records, and apply the limits.

    Returns:
        The samples, and one line for the user about each kind of record changed or left out.

    Raises:
        ValueError: records that the limits refuse, with their places and what can be done.
    """
    samples: list[Sample] = []
    places: list[str] = []
    empty: list[str] = []
    overlong: list[str] = []
    lacking: dict[str, list[int]] = {}
    progress = Progress("tokenizing", len(records))
    every = ((n, one) for n, whole in enumerate(records, 1) for one in _learned(whole, limits))
    for number, record in every:
        progress.update(number)
        missing = tokenizer.lacking(record.instruction + record.input + record.output)
        if missing:
            lacking[record.where] = missing
        if not record.output.strip():
            empty.append(record.where)
            if limits.on_empty != "keep":
                continue
        sample = encode_sample(
            template,
            tokenizer,
            record.instruction,
            record.input,
            record.output,
            record.history,
        )
        excess = len(sample.prompt_ids) + len(sample.answer_ids) - 1 - limits.max_tokens
        if excess > 0:
            overlong.append(f"{record.where} ({limits.max_tokens + excess} tokens)")
            if limits.on_overlong != "truncate" or excess >= len(sample.prompt_ids):
                continue
            sample = Sample(sample.prompt_ids[excess:], sample.answer_ids)
        samples.append(sample)
        places.append(record.where)
    notes = _report(empty, overlong, lacking, limits)
    if not samples:
        raise ValueError("no record is left to train on")
    return _join(samples, places), notes


def _learned(record: Record, limits: Limits) -> list[Record]:
    return record.answers() if limits.turns == "all" else [record]


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


def _join(samples: list[Sample], places: list[str]) -> TokenSet:
    parts = [np.array([*s.prompt_ids, *s.answer_ids], dtype=np.uint32) for s in samples]
    return TokenSet(
        np.concatenate(parts),
        np.cumsum([0, *map(len, parts)]).astype(np.int64),
        np.array([len(s.prompt_ids) for s in samples], dtype=np.int64),
        places,
    )


def load_tokens(
    paths: Sequence[Path], template: Template, tokenizer: Tokenizer, limits: Limits
) -> TokenSet:
    """Read and encode record files, or take their tokens from the cache.

    Raises:
        ValueError: as for read_records and encode_records.
        OSError: a file cannot be read, or the cache cannot be written.
    """
    folder = cache_folder() / "tokens" / _key(paths, template, tokenizer, limits)
    if not (folder / "report.json").is_file():
        records = [record for path in paths for record in read_records(path)]
        tokens, notes = encode_records(records, template, tokenizer, limits)
        _store(folder, tokens, notes)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for line in report["notes"]:
        note(line)
    tokens, offsets, prompts = (np.load(folder / f"{n}.npy", mmap_mode="r") for n in _ARRAYS)
    return TokenSet(tokens, offsets, prompts, report["places"])


_ARRAYS = "tokens", "offsets", "prompts"


def _key(paths: Sequence[Path], template: Template, tokenizer: Tokenizer, limits: Limits) -> str:
    digest = hashlib.sha256()
    # places name the files, so their names count beside their bytes
    facts = [version("bioinstruct"), repr(template), tokenizer.fingerprint, repr(limits)]
    digest.update("\0".join([*facts, *map(str, paths)]).encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _store(folder: Path, tokens: TokenSet, notes: list[str]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    try:
        for name in _ARRAYS:
            np.save(temporary / f"{name}.npy", getattr(tokens, name))
        report = {"notes": notes, "places": tokens.places}
        (temporary / "report.json").write_text(json.dumps(report), encoding="utf-8")
        try:
            temporary.rename(folder)
        except OSError:
            # another process was faster; its folder holds the same
            if not (folder / "report.json").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
