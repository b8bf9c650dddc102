"""The journal: what was asked, what came back, what was made of it, one JSON object a line.

    intent   written before a request is sent: key, attempt, the picodollars reserved for it
    answer   written before the answer's text is looked at: status, usage, served model,
             fingerprint, times, the picodollars charged, and last of all the response, byte for
             byte: as it is where it is JSON on one line, else in base64; or the error instead
    verdict  what was kept of an answer, and why the rest was not

Lines are only ever appended, each by one write, so that a kill at any moment leaves whole lines and
at most one torn one, which the next opening cuts off. An intent without an answer keeps its
reservation charged: nobody knows whether that request was billed. A lock on the file keeps a second
process out. The first complete answer of a key is the one that counts, for ever.
"""

import base64
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bioinstruct.synth.money import Usage

NAME = "journal.jsonl"
RAW = b',"raw":'  # inside a string of JSON its quotes would be escaped: it cannot stand earlier
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
SYNC_EVERY_S = 1.0  # a kill loses nothing; a power cut loses at most this


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


class Totals:
    """What a journal adds up to; grows line by line."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.verdicts: dict[int, dict[str, Any]] = {}
        self.open: dict[int, int] = {}
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
            self.attempts = max(self.attempts, row["attempt"])
            self.open[row["attempt"]] = int(row["reserved"])
            self.first_s = self.first_s or row["time"]
        elif kind == "answer":
            self._answer(row, answer)
        elif kind == "verdict":
            self.verdicts[row["request"]] = dict(row)
        else:
            raise ValueError(f"unknown type {kind!r}")

    def _answer(self, row: Mapping[str, Any], answer: Answer | None) -> None:
        self.open.pop(row["attempt"])
        self.charged += row["charged"]
        self.last_s = row["time"]
        if answer is None or not answer.complete:
            self.failed += 1
            return
        self.received += 1
        self.answers.setdefault(answer.key, answer)


class Journal:
    """A run's journal, open for appending and locked.

    Args:
        folder: the run's folder; it is made where missing.

    Raises:
        ValueError: another process holds it, or a line in it is broken.
        OSError: it cannot be opened or written.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / NAME
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._lock()
            self._repair()
            self.totals = read_totals(self.path)
        except BaseException:
            os.close(self.file)
            raise
        self.synced_s = time.monotonic()

    def close(self) -> None:
        """Flush to disk and let go of the lock."""
        os.fsync(self.file)
        os.close(self.file)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def intent(self, key: str, reserved: int) -> int:
        """Record that a request is about to be sent; return the attempt's number."""
        attempt = self.totals.attempts + 1
        self._append(
            {
                "type": "intent",
                "attempt": attempt,
                "key": key,
                "reserved": reserved,
                "time": round(time.time(), 3),
            }
        )
        return attempt

    def answer(self, attempt: int, answer: Answer, *, charged: int, seconds: float) -> None:
        """Record a response, before anything is made of it."""
        row: dict[str, Any] = {
            "type": "answer",
            "attempt": attempt,
            "key": answer.key,
            "status": answer.status,
            "complete": answer.complete,
            "charged": charged,
            "usage": answer.usage,
            "model": answer.model,
            "fingerprint": answer.fingerprint,
            "time": round(time.time(), 3),
            "seconds": round(seconds, 3),
        }
        # decoded and begun so, it is UTF-8
        if answer.text and answer.raw.startswith(b'{"') and b"\n" not in answer.raw:
            self._append(row, RAW + answer.raw, answer)
            return
        row["raw_base64"] = base64.b64encode(answer.raw).decode()
        self._append(row, b"", answer)

    def failure(self, attempt: int, key: str, *, error: str, charged: int, seconds: float) -> None:
        """Record that no whole response came."""
        self._append(
            {
                "type": "answer",
                "attempt": attempt,
                "key": key,
                "status": None,
                "complete": False,
                "charged": charged,
                "error": error,
                "time": round(time.time(), 3),
                "seconds": round(seconds, 3),
            }
        )

    def verdict(self, request: int, key: str, items: list[dict[str, Any]]) -> None:
        """Record what was made of a request's answer, unless that stands there already."""
        row = {"type": "verdict", "request": request, "key": key, "items": items}
        if self.totals.verdicts.get(request) != row:
            self._append(row)

    def _append(self, row: dict[str, Any], tail: bytes = b"", answer: Answer | None = None) -> None:
        line = b"%b%b}\n" % (_ENCODER.encode(row).encode()[:-1], tail)
        start = os.lseek(self.file, 0, os.SEEK_END)
        try:
            if os.write(self.file, line) < len(line):
                raise OSError(28, "No space left on device", str(self.path))
        except OSError as error:
            os.ftruncate(self.file, start)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.totals.add(row, answer)
        now_s = time.monotonic()
        if now_s - self.synced_s > SYNC_EVERY_S:
            os.fdatasync(self.file)
            self.synced_s = now_s

    def _lock(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is working on {self.path.parent}; "
                "wait for it to end, or choose another --out"
            ) from error

    def _repair(self) -> None:
        size = os.fstat(self.file).st_size
        end = size
        while end:
            start = max(0, end - 65536)
            newline = os.pread(self.file, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            os.ftruncate(self.file, end)


def read_totals(path: Path) -> Totals:
    """Add up a journal; a torn last line is passed over.

    Raises:
        ValueError: a whole line is broken.
        OSError: it cannot be opened.
    """
    totals = Totals()
    for number, line in _whole_lines(path):
        try:
            head, mark, tail = line.partition(RAW)
            row = json.loads(head + b"}" if mark else line)
            answered = row["type"] == "answer" and row["status"] is not None
            totals.add(row, _read_answer(row, tail[:-2]) if answered else None)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path}:{number}: broken journal line ({type(error).__name__}: {error}); "
                "restore the file from a copy: nothing else knows what was paid for"
            ) from error
    return totals


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield number, line


def _read_answer(row: Mapping[str, Any], raw: bytes) -> Answer:
    raw = base64.b64decode(row["raw_base64"]) if "raw_base64" in row else raw
    usage = Usage(*row["usage"]) if row["usage"] else None
    return Answer(
        row["key"], row["status"], raw, usage, row["model"], row["fingerprint"], row["complete"]
    )
