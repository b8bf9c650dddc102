"""The files and the table of an evaluation.

`results.json` holds every score with its interval, counts and version, and what it was made with;
`samples_<task>.jsonl` every item with its answer and verdict (`samples_<task>.2.jsonl` is the
second row's, where several adapters were run); `report.md` the table that is also printed.
"""

import dataclasses
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from bioinstruct.eval.metrics import LEVEL, RESAMPLES
from bioinstruct.eval.runner import Result
from bioinstruct.synth.files import write_text

RESULTS, REPORT = "results.json", "report.md"
COLUMNS = ("system", "task", "score", "value", "95 % interval", "n", "unparsed", "counts")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One system and its results."""

    system: str
    """What the table calls it."""
    model: str | None
    adapter: str | None
    results: list[Result]


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Refuse a folder that already holds results, unless they may be replaced.

    Raises:
        ValueError: it does, or it is no folder.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; --out names a folder")
    old = _old_files(out)
    if old and not overwrite:
        raise ValueError(
            f"{out} already holds results ({old[0].name}); name another folder with --out, "
            "or pass --overwrite"
        )


def write_samples(out: Path, row: Row, number: int) -> None:
    """Write the samples of a row's tasks.

    Args:
        number: the row's place in the table, from 1.
    """
    for result in row.results:
        items = zip(result.job.items, result.outputs, result.finished, result.verdicts, strict=True)
        lines = [
            {
                "id": item.id,
                "instruction": item.instruction,
                "input": item.input,
                "output": output,
                "finished": finished,
                "gold": item.gold,
                "parsed": verdict.parsed,
                "counts": verdict.counts,
            }
            for item, output, finished, verdict in items
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        # a lone surrogate cannot be encoded; a model's tokenizer may still decode to one
        safe = text.encode("utf-8", "replace").decode("utf-8")
        write_text(out / samples_name(result, number), safe)


def write_results(out: Path, rows: Sequence[Row], settings: Mapping[str, object]) -> None:
    """Write results.json and report.md; samples of an earlier evaluation are removed.

    Args:
        settings: what the evaluation was asked for, recorded as it is.
    """
    current = {samples_name(r, i) for i, row in enumerate(rows, 1) for r in row.results}
    whole = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": dict(settings),
        "versions": _versions(),
        "interval": {"level": LEVEL, "method": "percentile bootstrap", "resamples": RESAMPLES},
        "rows": [_row(row, number) for number, row in enumerate(rows, 1)],
    }
    write_text(out / REPORT, _markdown(rows, settings))
    write_text(out / RESULTS, json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False))
    for path in _old_files(out):
        if path.name not in {*current, RESULTS, REPORT}:
            path.unlink()


def samples_name(result: Result, number: int) -> str:
    """Return the file name of a row's samples."""
    middle = "" if number == 1 else f".{number}"
    return f"samples_{result.job.task.name}{middle}.jsonl"


def table(rows: Sequence[Row]) -> str:
    """Return every score of every row as an aligned Markdown table; values are percentages."""
    cells = [list(COLUMNS)]
    for row in rows:
        for result in row.results:
            cells += _score_cells(row.system, result)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells)


def _score_cells(system: str, result: Result) -> list[list[str]]:
    lines = []
    for name, score in result.scores.items():
        counts = ", ".join(f"{k} {v}" for k, v in score.extra.items())
        lines.append(
            [
                system,
                _task_label(result),
                name,
                f"{100 * score.value:.1f}",
                f"{100 * score.low:.1f} to {100 * score.high:.1f}",
                str(score.n),
                str(score.unparsed),
                counts if name == result.job.task.main else "",
            ]
        )
    return lines


def _task_label(result: Result) -> str:
    form = f" ({result.job.form})" if result.job.form else ""
    return f"{result.job.task.name}{form}"


def _row(row: Row, number: int) -> dict[str, object]:
    return {
        "system": row.system,
        "model": row.model,
        "adapter": row.adapter,
        "tasks": {r.job.task.name: _entry(r, samples_name(r, number)) for r in row.results},
    }


def _entry(result: Result, samples: str) -> dict[str, object]:
    return {
        "path": str(result.job.path),
        "form": result.job.form or None,
        "template": result.template,
        "items": len(result.job.items),
        "items_in_file": len(result.job.golds),
        "max_new_tokens": result.max_new_tokens,
        "unfinished": result.unfinished,
        "seconds": round(result.seconds, 3),
        "version": result.job.task.version,
        "samples": samples,
        "scores": {name: dataclasses.asdict(score) for name, score in result.scores.items()},
    }


def _markdown(rows: Sequence[Row], settings: Mapping[str, object]) -> str:
    asked = "\n".join(
        f"- {key}: {value}" for key, value in settings.items() if value not in (None, [])
    )
    cut = [
        f"- {row.system}, {_task_label(r)}: {r.unfinished} answers were cut at "
        f"{r.max_new_tokens} tokens"
        for row in rows
        for r in row.results
        if r.unfinished
    ]
    notes = "\n".join(
        [
            f"- Values are percentages; intervals are {LEVEL:.0%} percentile bootstraps over items "
            f"({RESAMPLES:,} resamples).",
            "- Unparsed answers are those that could not be read; they are scored as wrong.",
            *cut,
        ]
    )
    return f"# Evaluation\n\n{table(rows)}\n\n{notes}\n\nMade with\n\n{asked}\n"


def _versions() -> dict[str, str]:
    found = {"bioinstruct": version("bioinstruct"), "python": platform.python_version()}
    for name in ("numpy", "torch"):
        if name in sys.modules:
            found[name] = version(name)
    # what of a model runs in C on a CPU; scoring alone has no model
    native = sys.modules.get("bioinstruct.kernels.native")
    if native is not None and (used := native.used()):
        found["operations"] = used
    return found


def _old_files(out: Path) -> list[Path]:
    names = (RESULTS, REPORT, "samples_*.jsonl")
    return sorted(path for name in names for path in out.glob(name))
