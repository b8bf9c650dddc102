"""The folder of a run: begun, found again, and closed.

run.toml            the settings, and how the run was made; a recipe for the same run
metrics.jsonl       a row a step, and rows of evaluations and events
samples.jsonl       sample answers
adapter/            the newest adapter; adapter-best/ the best one
state/              what a resume needs, and `finished` once there is nothing left to do
*.cut.jsonl         rows that a resume took out of the two files above, because the state that
                    it started from is older than they are
"""

import fcntl
import json
import os
import shlex
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bioinstruct.synth.console import note
from bioinstruct.synth.files import write_text
from bioinstruct.train.resume.fingerprint import refuse_changes
from bioinstruct.train.resume.state import State, clear_unfinished, newest_state
from bioinstruct.train.run import RECORD_TABLE, Run, to_toml

SETTINGS, METRICS, SAMPLES = "run.toml", "metrics.jsonl", "samples.jsonl"
FINISHED, LOCK = "finished", "lock"
EVALUATED = "val_loss", "scores"
"""Fields of metrics.jsonl that an evaluation writes."""


def states_of(out: Path) -> Path:
    """Where a run's states lie."""
    return out / "state"


def output_folder(run: Run, recipe_name: str, resume: bool) -> Path:
    """Return the folder that a run writes to, without making it.

    Raises:
        ValueError: it is a file, it holds a run that is not to be resumed, or a run is to be
            resumed and no folder is named.
    """
    if resume and not run.out:
        raise ValueError(
            "--resume needs the folder of the run: give its run.toml as the recipe, or --set "
            "out=FOLDER"
        )
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    out = Path(run.out) if run.out else Path("runs") / f"{recipe_name}-{stamp}"
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file; give a folder")
    if not resume and ((out / SETTINGS).exists() or (out / METRICS).exists()):
        raise ValueError(
            f"{out} already holds a run; choose another folder with --set out=FOLDER, or continue "
            "that run with --resume"
        )
    return out


def resume_command(out: Path) -> str:
    """The command that continues a run."""
    return shlex.join([*_launcher(), sys.argv[0], str(out / SETTINGS), "--resume"])


def _launcher() -> list[str]:
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return ["python"] if size == 1 else ["torchrun", "--nproc-per-node", str(size)]


def find_state(out: Path, fingerprint: Mapping[str, Any]) -> State | None:
    """Open the newest whole state of a run, and cut the rows that were written after it.

    Args:
        out: folder of the run.
        fingerprint: of the run that wants to continue.

    Returns:
        The state; None where the run has none yet.

    Raises:
        ValueError: the run is another one, or its states are damaged.
    """
    clear_unfinished(out)
    state = newest_state(states_of(out))
    if state is not None:
        refuse_changes(state.facts["fingerprint"], fingerprint, out)
    step = 0 if state is None else state.step
    # an evaluation that the state owes is made again, with all its rows
    owed = state is not None and bool(state.facts["standing"]["evaluation_owed"])
    cut_rows(out / METRICS, step, without=EVALUATED if owed else ())
    cut_rows(out / SAMPLES, step, without=("record",) if owed else ())
    return state


def cut_rows(path: Path, step: int, without: Sequence[str] = ()) -> int:
    """Move the rows of later steps, and a last row that is not whole, to NAME.cut.jsonl.

    Args:
        path: JSON lines with a `step`; may be missing.
        step: the last step whose rows stay.
        without: rows of that step that have one of these fields are moved too.

    Returns:
        How many rows were moved.
    """
    if not path.is_file():
        return 0
    kept: list[str] = []
    cut: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        row = _row(line)
        stays = row["step"] < step or (row["step"] == step and not row.keys() & set(without))
        (kept if stays else cut).append(line.rstrip("\n") + "\n")
    if cut:
        side = path.with_suffix(".cut" + path.suffix)
        earlier = side.read_text(encoding="utf-8") if side.is_file() else ""
        write_text(side, earlier + "".join(cut))
        write_text(path, "".join(kept))
        note(f"{len(cut)} rows after step {step} of {path.name} were moved to {side.name}")
    return len(cut)


def _row(line: str) -> dict[str, Any]:
    """A row; one that a kill has cut off counts as later than any step."""
    try:
        row: dict[str, Any] = json.loads(line)
    except ValueError:
        row = {}
    return row if line.endswith("\n") and row else {"step": float("inf")}


def begin(out: Path, run: Run, made: Mapping[str, Any], step: int | None) -> None:
    """Make the folder and write run.toml, which keeps how the run was first started.

    Args:
        out: the folder.
        run: the settings.
        made: how this process makes the run.
        step: steps taken before, where a run is resumed.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / SETTINGS
    if step is None or not path.is_file():
        write_text(path, to_toml(run, made))
        return
    before = tomllib.loads(path.read_text(encoding="utf-8")).get(RECORD_TABLE, {})
    now = datetime.now(UTC).isoformat(timespec="seconds")
    line = f"{now} after step {step}, {made['ranks']} ranks, torch {made['torch']}"
    resumed = [*before.get("resumed", []), line]
    write_text(path, to_toml(run, {**made, **before, "resumed": resumed}))


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Hold a run's folder, so that no second process writes to it; the system lets go of it.

    Raises:
        ValueError: another process holds it.
    """
    states_of(out).mkdir(parents=True, exist_ok=True)
    with (states_of(out) / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is at work in {out}; wait until it has ended, or name another "
                "folder with --set out=FOLDER"
            ) from None
        except OSError:
            note(f"the file system of {out} has no locks: see to it that one process uses it")
        yield


def is_finished(out: Path) -> bool:
    """Whether a run has nothing left to do."""
    return (states_of(out) / FINISHED).is_file()


def finish(out: Path, step: int) -> None:
    """Note that a run has nothing left to do."""
    write_text(states_of(out) / FINISHED, f"{step} steps\n")
