"""The state of a run on disk: whole or not there, whatever kills the process and when.

    state/step-00000020/            one state, its name the number of steps taken
        rank-00000.safetensors      what that rank holds: masters, moments, average
        state.json                  everything else, and each file's size and SHA-256
    state/.writing-step-00000030/   one that is being written, or was when the process died

A state is written under the second name, every file and the folder flushed to disk, and takes its
own name in one rename; the states before it are deleted only then. The numbers are copied first, so
a thread writes them while training goes on.

Replicated tensors are written by the first rank alone. A tensor that is sharded by rows is written
piece by piece, each rank its own, without a word between them but the files: the first rank waits
for the others' before it closes the state. Any number of ranks can read any rows back.
"""

import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bioinstruct.synth.console import note
from bioinstruct.synth.files import replaces

FORMAT = 1
RECORD = "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_WRITING = ".writing-"
_OTHERS_S = 1800.0  # how long the first rank waits for the files of the others
_POLL_S = 0.05


class Piece(NamedTuple):
    """Rows of a tensor that this rank holds."""

    rows: Tensor
    """(rows, ...) on any device."""
    start: int
    """Number of the first of them in the whole tensor."""
    total: int
    """Rows of the whole tensor."""


def whole(tensor: Tensor) -> Piece:
    """Return a tensor that this rank holds entirely."""
    return Piece(tensor, 0, len(tensor))


class Snapshot(NamedTuple):
    """Copies of all that a state holds, taken between two steps."""

    step: int
    """Steps taken."""
    pieces: Mapping[str, Piece]
    """On the CPU; empty on a rank that holds nothing of its own."""
    facts: Mapping[str, Any]
    """What JSON can hold."""


class Keep(NamedTuple):
    """Which states stay."""

    newest: int
    """So many of the newest, at least 1."""
    best: int | None = None
    """Step of one that stays besides."""


def snapshot(step: int, pieces: Mapping[str, Piece], facts: Mapping[str, Any]) -> Snapshot:
    """Copy tensors to the CPU, so that the originals may change while the copies are written."""
    copies = {
        name: piece._replace(rows=piece.rows.detach().to("cpu", copy=True))
        for name, piece in pieces.items()
    }
    return Snapshot(step, copies, json.loads(json.dumps(facts, allow_nan=False)))


# ---- writing -----------------------------------------------------------------------------------


def write_state(folder: Path, taken: Snapshot, keep: Keep, *, rank: int = 0, size: int = 1) -> None:
    """Write this rank's part of a state; the first rank closes it and deletes old ones.

    Args:
        folder: holds the states.
        taken: what to write.
        keep: which states stay once this one is whole.
        rank: this process.
        size: processes that write a part each.

    Raises:
        OSError: the disk is full or not writable, or another rank's part does not come.
    """
    final = folder / state_name(taken.step)
    temporary = folder / (_WRITING + final.name)
    if final.exists():  # written before, by the run that this one continues
        return
    temporary.mkdir(parents=True, exist_ok=True)
    _write_part(temporary, rank, taken.pieces)
    if rank:
        return
    parts = _all_parts(temporary, size)
    record = {"format": FORMAT, "step": taken.step, "parts": parts, "facts": taken.facts}
    with replaces(temporary / RECORD) as file:
        file.write_text(json.dumps(record, indent=1), encoding="utf-8")
    for name in parts:
        (temporary / _receipt(name)).unlink()
    _flush(temporary)
    temporary.rename(final)
    _flush(folder)
    steps = steps_of(folder)
    for step in set(steps) - {*steps[-keep.newest :], keep.best}:
        _delete(folder / state_name(step))


def _write_part(folder: Path, rank: int, pieces: Mapping[str, Piece]) -> None:
    name = f"rank-{rank:05d}.safetensors"
    with replaces(folder / name) as temporary:
        tensors = {key: piece.rows.contiguous() for key, piece in pieces.items()}
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
    part = {
        "bytes": (folder / name).stat().st_size,
        "sha256": _sha256(folder / name),
        "pieces": {key: [piece.start, piece.total] for key, piece in pieces.items()},
    }
    # written last: it says that the part is complete
    with replaces(folder / _receipt(name)) as temporary:
        temporary.write_text(json.dumps(part), encoding="utf-8")


def _receipt(name: str) -> str:
    return f"{name}.json"


def _all_parts(folder: Path, size: int) -> dict[str, Any]:
    """Wait for every rank's part and return what each says of itself."""
    names = [f"rank-{rank:05d}.safetensors" for rank in range(size)]
    deadline_s = time.monotonic() + _OTHERS_S
    while missing := [name for name in names if not (folder / _receipt(name)).exists()]:
        if time.monotonic() > deadline_s:
            raise OSError(
                f"{folder}: {missing[0]} did not come within {_OTHERS_S:.0f} s; all ranks must "
                "see one folder, and its disk must have room"
            )
        time.sleep(_POLL_S)
    return {name: json.loads((folder / _receipt(name)).read_text("utf-8")) for name in names}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(folder: Path) -> None:
    """Make the names in a folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _delete(state: Path) -> None:
    # under another name first: a state that is deleted halfway must not look whole
    doomed = state.with_name(_WRITING + "old-" + state.name)
    state.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


class Saver:
    """Writes states in a thread of its own, one at a time.

    Args:
        folder: holds the states.
        rank: this process.
        size: processes that write a part each; 1 where the first rank holds everything.
    """

    def __init__(self, folder: Path, *, rank: int = 0, size: int = 1) -> None:
        self.folder, self.rank, self.size = folder, rank, size
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, taken: Snapshot, keep: Keep, before: Callable[[], None]) -> None:
        """Start to write a state; waits only for the one before it.

        Args:
            taken: what to write.
            keep: which states stay once this one is whole.
            before: called in the thread before the state is written.

        Raises:
            ValueError, OSError: what went wrong with the one before.
        """
        self.wait()

        def write() -> None:
            try:
                before()
                write_state(self.folder, taken, keep, rank=self.rank, size=self.size)
            except (OSError, ValueError) as error:
                self._error = error

        # no daemon: a process that ends waits until its last state is whole
        self._thread = threading.Thread(target=write, name="saver")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the state that is being written.

        Raises:
            ValueError, OSError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


# ---- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """A whole state, its numbers not read yet."""

    path: Path
    step: int
    """Steps taken."""
    facts: Mapping[str, Any]
    parts: Mapping[str, Any]

    def names(self) -> set[str]:
        """Names of the tensors in it."""
        return {key for part in self.parts.values() for key in part["pieces"]}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows of a tensor, from whichever ranks' files hold them.

        Raises:
            ValueError: there is no such tensor, or rows of it are missing.
        """
        found: list[Tensor] = []
        place, end = start, stop
        for name_of_part, piece in sorted(self._holders(name), key=lambda p: p[1][0]):
            first, total = piece
            end = total if end is None else end
            with safetensors.safe_open(self.path / name_of_part, framework="pt") as file:
                rows = file.get_slice(name)
                last = first + rows.get_shape()[0]
                if first <= place < min(last, end):
                    found.append(rows[place - first : min(last, end) - first])
                    place = min(last, end)
        if end is None or place < end:
            raise ValueError(f"{self.path} lacks rows of {name}; delete this state and resume")
        return torch.cat(found) if found else torch.empty(0)

    def _holders(self, name: str) -> list[tuple[str, list[int]]]:
        return [
            (p, part["pieces"][name]) for p, part in self.parts.items() if name in part["pieces"]
        ]

    def check(self) -> None:
        """Compare sizes and checksums of its files with what was written.

        Raises:
            ValueError: a file is missing, cut or damaged.
        """
        for name, part in self.parts.items():
            file = self.path / name
            if not file.is_file() or file.stat().st_size != part["bytes"]:
                raise ValueError(f"{file} is missing or cut")
            if _sha256(file) != part["sha256"]:
                raise ValueError(f"{file} is damaged: it has not the checksum it was written with")


def state_name(step: int) -> str:
    """Name of the folder of a state, by its steps."""
    return f"step-{step:08d}"


def steps_of(folder: Path) -> list[int]:
    """Steps of the states in a folder, ascending."""
    if not folder.is_dir():
        return []
    names = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in names if match)


def newest_state(folder: Path) -> State | None:
    """Open the newest state whose files are as they were written.

    A damaged one that is newer is set aside under another name, with a note.

    Returns:
        The state; None where there is none at all.

    Raises:
        ValueError: there are states, and all are damaged or of another format.
    """
    problems: dict[Path, str] = {}
    for step in reversed(steps_of(folder)):
        path = folder / state_name(step)
        try:
            state = open_state(path)
            state.check()
        except ValueError as error:
            problems[path] = str(error)
            continue
        for damaged, problem in problems.items():
            damaged.rename(damaged.with_name(f"damaged-{damaged.name}"))
            note(f"{problem}; the state before it is used")
        return state
    if problems:
        raise ValueError(f"no state in {folder} can be used: {'; '.join(problems.values())}")
    return None


def open_state(path: Path) -> State:
    """Read a state's record.

    Raises:
        ValueError: it is missing, damaged, or of another format.
    """
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / RECORD} cannot be read: {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path / RECORD} is not of format {FORMAT}, which this version reads")
    return State(path, record["step"], record["facts"], record["parts"])


def clear_unfinished(folder: Path) -> Sequence[Path]:
    """Delete what a killed process left half-written, anywhere in a run's folder; return it."""
    left = sorted(folder.rglob(f"{_WRITING}*"))
    for path in left:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # it may have stood in a folder that is gone already
    return left
