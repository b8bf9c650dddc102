"""The journal: what was asked, what came back, what was made of it, one JSON object a line.

    intent   written before a request is sent: key, attempt, the picodollars reserved for it
    answer   written before the answer's text is looked at: status, usage, served model,
             fingerprint, times, the picodollars charged, and last of all the response, byte for
             byte: as it is where it is JSON on one line, else in base64; or the error instead
    verdict  what was kept of an answer, and why the rest was not
    batch    written before a batch is sent: the keys of its requests, with an intent for each;
             then `batch-created` with the endpoint's name for it, and `batch-ended` with what is
             charged for those of its requests that have no answer

Lines are only ever appended, each by one write, so that a kill at any moment leaves whole lines and
at most one torn one, which the next opening cuts off. An intent without an answer keeps its
reservation charged: nobody knows whether that request was billed. A lock on the file keeps a second
process out. The first complete answer of a key is the one that counts, for ever.
"""

import fcntl
import os
import time
from pathlib import Path
from typing import Any

from bioinstruct.synth.files import make_folder
from bioinstruct.synth.totals import Answer, Batch, answer_line, line_of, read_totals

NAME = "journal.jsonl"
SYNC_EVERY_S = 1.0  # a kill loses nothing; a power cut loses at most this


class Journal:
    """A run's journal, open for appending and locked.

    Args:
        folder: the run's folder; it is made where missing.

    Raises:
        ValueError: another process holds it, a line in it is broken, or the folder is a file.
        OSError: it cannot be opened or written.
    """

    def __init__(self, folder: Path) -> None:
        make_folder(folder, "--out")
        self.path = folder / NAME
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._lock()
            self._repair()
            self.totals = read_totals(self.path)
        except BaseException:
            os.close(self.file)
            raise
        self.synced_s, self.size = time.monotonic(), os.fstat(self.file).st_size

    def close(self) -> None:
        """Flush to disk and let go of the lock."""
        os.fsync(self.file)
        os.close(self.file)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def intent(self, key: str, reserved: int) -> int:
        """Record that a request is about to be sent; return the attempt's number.

        Args:
            key: the request's, hexadecimal: here and in `answer` lines are made by hand, which is
                twice as fast as an encoder.
            reserved: picodollars.
        """
        attempt, now_s = self.totals.attempts + 1, time.time()
        head = f'{{"type":"intent","attempt":{attempt},"key":"{key}"'
        self._write(f'{head},"reserved":{reserved},"time":{now_s:.3f}}}\n'.encode())
        self.totals.intend(attempt, reserved, now_s)
        return attempt

    def answer(self, attempt: int, answer: Answer, *, charged: int, seconds: float) -> None:
        """Record a response, before anything is made of it."""
        now_s = time.time()
        head = (
            f'{{"type":"answer","attempt":{attempt},"key":"{answer.key}","charged":{charged},'
            f'"time":{now_s:.3f},"seconds":{seconds:.3f}'
        )
        self._write(answer_line(head + (',"cached":true' if answer.cached else ""), answer))
        self.totals.answered(attempt, charged, now_s, answer)

    def take(self, answer: Answer) -> None:
        """Record an answer that another run bought, which costs nothing here."""
        self.answer(self.intent(answer.key, 0), answer, charged=0, seconds=0.0)

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

    def batch(self, run: str, keys: list[str], reserved: list[int]) -> Batch:
        """Record that requests are about to be sent together; return them as a batch."""
        number, first = len(self.totals.batches) + 1, self.totals.attempts + 1
        self._append(
            {
                "type": "batch",
                "batch": number,
                "run": run,
                "first": first,
                "keys": keys,
                "reserved": reserved,
                "time": round(time.time(), 3),
            }
        )
        return self.totals.batches[number]

    def batch_created(self, number: int, name: str) -> None:
        """Record that the endpoint has taken a batch, and under which name."""
        self._append({"type": "batch-created", "batch": number, "id": name})

    def batch_ended(self, number: int, status: str, charged: int) -> None:
        """Record that nothing more comes of a batch.

        Args:
            number: the batch's.
            status: how it ended.
            charged: picodollars for those of its requests that have no answer.
        """
        row = {"type": "batch-ended", "batch": number, "status": status, "charged": charged}
        self._append(row | {"time": round(time.time(), 3)})

    def verdict(self, request: int, key: str, items: list[dict[str, Any]]) -> None:
        """Record what was made of a request's answer, unless that stands there already."""
        row = {"type": "verdict", "request": request, "key": key, "items": items}
        if self.totals.verdicts.get(request) != row:
            self._append(row)

    def _append(self, row: dict[str, Any]) -> None:
        self._write(line_of(row))
        self.totals.add(row)

    def _write(self, line: bytes) -> None:
        try:
            if os.write(self.file, line) < len(line):
                raise OSError(28, "No space left on device", str(self.path))
        except OSError as error:
            os.ftruncate(self.file, self.size)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.size += len(line)
        if time.monotonic() - self.synced_s > SYNC_EVERY_S:
            self.sync()

    def sync(self) -> None:
        """Let what was written outlast a power cut."""
        os.fdatasync(self.file)
        self.synced_s = time.monotonic()

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
