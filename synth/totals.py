"""What the lines of a journal say: answers, batches, and what they add up to.

journal.py explains the lines. The response of an answer line stands at its very end, as it was
received where it is JSON on one line, else in base64.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from bioinstruct.synth.money import Usage

RAW = b',"raw":'  # inside a string of JSON its quotes would be escaped: it cannot stand earlier
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class Text(NamedTuple):
    """What a model wrote, and why it stopped."""

    content: str
    finish: str
    refusal: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A response of the endpoint, as received."""

    key: str
    status: int
    raw: bytes
    usage: Usage | None = None
    model: str = ""
    """The model that the endpoint says it served."""
    fingerprint: str = ""
    complete: bool = False
    """Whether it counts as the key's answer: nothing is asked again then."""
    text: Text | None = field(default=None, compare=False)
    """What was decoded of it already."""
    cached: bool = field(default=False, compare=False)
    """Whether it was bought by another run."""


@dataclass(slots=True)
class Batch:
    """Requests that were sent together; the k-th of keys has the attempt number first + k."""

    number: int
    run: str
    """What the endpoint was told to know the batches of this folder by."""
    first: int
    keys: list[str]
    reserved: list[int]
    """Picodollars."""
    id: str = ""
    """The endpoint's name for it, once it is known."""
    ended: bool = False


class Totals:
    """What a journal adds up to; grows line by line."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.verdicts: dict[int, dict[str, Any]] = {}
        self.open: dict[int, int] = {}
        self.batches: dict[int, Batch] = {}
        self.cached = 0
        self.charged = self.attempts = self.received = self.failed = 0
        self.first_s = self.last_s = 0.0

    @property
    def spent(self) -> int:
        """Picodollars charged, reservations that were never settled included."""
        return self.charged + sum(self.open.values())

    def add(self, row: Mapping[str, Any], answer: Answer | None = None) -> None:
        """Count one line.

        Args:
            row: the line's object.
            answer: of an answer line, the response.

        Raises:
            KeyError, TypeError, ValueError: the line is none of ours.
        """
        kind = row["type"]
        if kind == "intent":
            self.intend(row["attempt"], int(row["reserved"]), row["time"])
        elif kind == "answer":
            self.answered(row["attempt"], row["charged"], row["time"], answer)
        elif kind == "verdict":
            self.verdicts[row["request"]] = dict(row)
        elif kind.startswith("batch"):
            self._batch(kind, row)
        else:
            raise ValueError(f"unknown type {kind!r}")

    def intend(self, attempt: int, reserved: int, time_s: float) -> None:
        """Count an intent."""
        self.attempts = max(self.attempts, attempt)
        self.open[attempt] = reserved
        self.first_s = self.first_s or time_s

    @property
    def under_way(self) -> list[Batch]:
        """Batches whose end is not known."""
        return [batch for batch in self.batches.values() if not batch.ended]

    def _batch(self, kind: str, row: Mapping[str, Any]) -> None:
        number = row["batch"]
        if kind == "batch":
            self.batches[number] = batch = Batch(
                number, row["run"], row["first"], row["keys"], row["reserved"]
            )
            self.attempts = max(self.attempts, batch.first + len(batch.keys) - 1)
            self.first_s = self.first_s or row["time"]
            self._reopen(batch)
            return
        batch = self.batches[number]
        if kind == "batch-created":
            batch.id = row["id"]
            if batch.ended:  # given up as never begun, and yet it turned up
                self._reopen(batch)
        elif kind == "batch-ended":
            batch.ended = True
            for attempt in range(batch.first, batch.first + len(batch.keys)):
                self.open.pop(attempt, None)
            self.charged += row["charged"]
            self.last_s = row["time"]
        else:
            raise ValueError(f"unknown type {kind!r}")

    def _reopen(self, batch: Batch) -> None:
        batch.ended = False
        self.open.update(enumerate(batch.reserved, batch.first))

    def answered(self, attempt: int, charged: int, time_s: float, answer: Answer | None) -> None:
        """Count a response, or None for none."""
        self.open.pop(attempt)
        self.charged += charged
        self.last_s = time_s
        if answer is None or not answer.complete:
            self.failed += 1
            return
        self.received += 1
        self.cached += answer.cached
        self.answers.setdefault(answer.key, answer)


def read_totals(path: Path) -> Totals:
    """Add up a journal; a torn last line is passed over.

    Raises:
        ValueError: a whole line is broken.
        OSError: it cannot be opened.
    """
    totals = Totals()
    for number, line in _whole_lines(path):
        try:
            totals.add(*read_line(line))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path}:{number}: broken journal line ({type(error).__name__}: {error}); "
                "restore the file from a copy: nothing else knows what was paid for"
            ) from error
    return totals


def line_of(row: Mapping[str, Any]) -> bytes:
    """Return an object as a journal's line."""
    return f"{_ENCODER.encode(row)}\n".encode()


def answer_line(head: str, answer: Answer) -> bytes:
    """Return the line of a response.

    Args:
        head: the JSON object of what is known about it, without its closing brace.
        answer: the response, which ends the line.
    """
    usage = "null" if answer.usage is None else list(answer.usage)
    head += (
        f',"status":{answer.status},"complete":{"true" if answer.complete else "false"},'
        f'"usage":{usage},"model":{_quoted(answer.model)},'
        f'"fingerprint":{_quoted(answer.fingerprint)}'
    )
    # decoded and begun so, it is UTF-8
    if answer.text and answer.raw.startswith(b'{"') and b"\n" not in answer.raw:
        return b"%b%b%b}\n" % (head.encode(), RAW, answer.raw)
    return f'{head},"raw_base64":"{base64.b64encode(answer.raw).decode()}"}}\n'.encode()


_quoted = lru_cache(_ENCODER.encode)  # of a few names, again and again


def read_line(line: bytes) -> tuple[dict[str, Any], Answer | None]:
    """Return a line's object, and of an answer line the response.

    Raises:
        KeyError, TypeError, ValueError: the line is none of ours.
    """
    head, mark, tail = line.partition(RAW)
    row = json.loads(head + b"}" if mark else line)
    answered = row["type"] == "answer" and row["status"] is not None
    return row, _read_answer(row, tail[:-2]) if answered else None


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield number, line


def _read_answer(row: Mapping[str, Any], raw: bytes) -> Answer:
    raw = base64.b64decode(row["raw_base64"]) if "raw_base64" in row else raw
    usage = Usage(*row["usage"]) if row["usage"] else None
    return Answer(
        row["key"],
        row["status"],
        raw,
        usage,
        row["model"],
        row["fingerprint"],
        row["complete"],
        cached=bool(row.get("cached")),
    )
