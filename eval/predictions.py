"""Answers made by any program: JSON lines, or an array, of objects with `id` and `output`."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bioinstruct.eval.task import Item
from bioinstruct.synth.text import json_values, shown

NAMED = 5  # ids spelled out in a message


class Matched(NamedTuple):
    """Answers in the items' order."""

    outputs: list[str]
    missing: list[str]
    """Ids without an answer; an empty one, which no task can read, stands in outputs."""
    unknown: list[str]
    """Ids that no item has; they were not scored."""


def read_predictions(path: Path) -> dict[str, str]:
    """Return the output of each id; other fields are left aside.

    Raises:
        ValueError: broken JSON, a missing field, a wrong type, or an id that stands twice.
        OSError: the file cannot be opened.
    """
    outputs: dict[str, str] = {}
    lines: dict[str, int] = {}
    for line, value in json_values(path):
        where = f"{path}:{line}"
        if not isinstance(value, dict) or not {"id", "output"} <= value.keys():
            raise ValueError(f"{where}: an object with id and output is needed, not {shown(value)}")
        key, output = value["id"], value["output"]
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise ValueError(f"{where}: 'id' must be a string or an integer, not {shown(key)}")
        if not isinstance(output, str):
            raise ValueError(f"{where}: 'output' must be a string, not {shown(output)}")
        if str(key) in outputs:
            raise ValueError(f"{where}: id {key} already stands at line {lines[str(key)]}")
        outputs[str(key)], lines[str(key)] = output, line
    return outputs


def match(
    items: Sequence[Item], predictions: dict[str, str], *, allow_missing: bool = False
) -> Matched:
    """Lay predictions onto items.

    Args:
        allow_missing: whether items without an answer count as unparsed.

    Raises:
        ValueError: answers are missing and may not, or no id fits at all.
    """
    known = {item.id for item in items}
    missing = [item.id for item in items if item.id not in predictions]
    unknown = [key for key in predictions if key not in known]
    if len(missing) == len(items):
        raise ValueError(
            f"none of the {len(items)} ids is among the predictions (wanted {some(missing)}; "
            f"found {some(unknown) or 'none'}); see `bioinstruct-eval tasks` for what the ids are"
        )
    if missing and not allow_missing:
        raise ValueError(
            f"{len(missing)} of {len(items)} ids have no prediction: {some(missing)}; "
            "add them, or count them as unparsed with --allow-missing"
        )
    return Matched([predictions.get(item.id, "") for item in items], missing, unknown)


def some(keys: Sequence[str]) -> str:
    """Return the first few keys, and a mark where there are more."""
    return ", ".join(keys[:NAMED]) + (", ..." if len(keys) > NAMED else "")
