"""What request i says: the prompt with three seeds in it, in either format.

A prompt is plain text with the fields {examples} (which it must hold), {form}, {total}, {shown},
{first}; any other {name} is refused. Nothing of it depends on time, machine or other requests.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bioinstruct.synth.draws import SHOWN
from bioinstruct.synth.records import Record, read_records
from bioinstruct.synth.text import read_text

SEEDS = Path(__file__).with_name("seeds.jsonl")
PROMPT = Path(__file__).with_name("prompt.txt")
TOTAL = 20  # tasks in the list, the seeds included
NEW = TOTAL - SHOWN
FORMATS = ("schema", "list")
_FIELD = re.compile(r"\{([a-z_]+)\}")
_FORMS = {
    "schema": (
        'Answer with one JSON object {"tasks": [...]} that holds only the new tasks, each an '
        "object with the text fields instruction, input and output."
    ),
    "list": (
        "Go on with the numbered list in exactly the form of the given tasks: `k. Instruction:`, "
        "`k. Input:`, `k. Output:`. Write nothing else."
    ),
}


class Seed(NamedTuple):
    """One curated example."""

    id: str
    record: Record


def read_seeds(path: Path | None = None) -> list[Seed]:
    """Read seeds: records, with an id or else named by their place.

    Raises:
        ValueError: fewer than three, two with one id, or broken records.
        OSError: the file cannot be opened.
    """
    if path is None and not SEEDS.exists():
        raise ValueError("no seeds are installed; name a file of records with --seeds FILE")
    records = read_records(path or SEEDS)
    seeds = [Seed(str(r.extra.get("id", f"seed-{i:03d}")), r) for i, r in enumerate(records, 1)]
    if len(seeds) < SHOWN:
        raise ValueError(f"{path or SEEDS} holds {len(seeds)} seeds; a request shows {SHOWN}")
    places: dict[str, str] = {}
    for seed in seeds:
        if not seed.record.instruction.strip() or not seed.record.output.strip():
            raise ValueError(f"{seed.record.where}: a seed needs an instruction and an output")
        if seed.id in places:
            raise ValueError(
                f"{seed.record.where}: id {seed.id!r} stands at {places[seed.id]} already"
            )
        places[seed.id] = seed.record.where
    return seeds


def read_prompt(path: Path | None = None) -> str:
    """Read a prompt.

    Raises:
        ValueError: it has no {examples}, or a field that is none of ours.
        OSError: the file cannot be opened.
    """
    text = read_text(path or PROMPT).strip()
    names = set(_FIELD.findall(text))
    known = {"examples", "form", "total", "shown", "first"}
    if unknown := sorted(names - known):
        raise ValueError(
            f"{path}: unknown field {{{unknown[0]}}}; "
            f"known are {', '.join(f'{{{name}}}' for name in sorted(known))}"
        )
    if "examples" not in names:
        raise ValueError(f"{path}: a prompt needs {{examples}}, where the seeds are put")
    return text


def prompt(template: str, seeds: Sequence[Seed], form: str) -> str:
    """Return the text of one request.

    Args:
        template: as from read_prompt.
        seeds: the examples, in the order in which they are shown.
        form: schema or list.
    """
    show = _json_examples if form == "schema" else _list_examples
    values = {
        "examples": show(seeds),
        "form": _FORMS[form],
        "total": str(TOTAL),
        "shown": str(len(seeds)),
        "first": str(len(seeds) + 1),
    }
    return _FIELD.sub(lambda found: values[found[1]], template)


def _list_examples(seeds: Sequence[Seed]) -> str:
    lines = []
    for k, (_, seed) in enumerate(seeds, 1):
        lines += [f"{k}. Instruction: {seed.instruction}", f"{k}. Input: {seed.input}"]
        lines += [f"{k}. Output: {seed.output}", ""]
    return "\n".join(lines).strip()


def _json_examples(seeds: Sequence[Seed]) -> str:
    return "\n".join(
        json.dumps(
            {"instruction": seed.instruction, "input": seed.input, "output": seed.output},
            ensure_ascii=False,
        )
        for _, seed in seeds
    )
