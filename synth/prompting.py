"""What request i says: the prompt with three examples in it, in either format.

A prompt is plain text with the fields that seeds.py explains: {seeds}, which it must hold, {n},
{shown}, {first} and {also}; any other {name} is refused. Nothing of it depends on time, machine or
requests of the same round.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bioinstruct.synth.draws import SHOWN
from bioinstruct.synth.seeds import COUNTS, Seed
from bioinstruct.synth.text import read_text

TOTAL = 20  # tasks in the list, the examples included
NEW = TOTAL - SHOWN
YIELD = 0.85  # of the new tasks, kept: assumed before there is an answer
FORMATS = ("schema", "list")
CATEGORIES = dict(
    zip(
        COUNTS,
        ("answering questions", "extracting information", "writing text", "all other work"),
        strict=True,
    )
)
"""What the categories mean."""
_FIELD = re.compile(r"\{([a-z_]+)\}")


def read_prompt(path: Path | None, form: str) -> str:
    """Read a prompt, or where none is named the installed one of a format.

    Raises:
        ValueError: it has no {seeds}, or a field that is none of ours.
        OSError: the file cannot be opened.
    """
    text = read_text(path or Path(__file__).with_name(f"prompt_{form}.txt")).strip()
    names = set(_FIELD.findall(text))
    known = {"seeds", "n", "shown", "first", "also"}
    if unknown := sorted(names - known):
        raise ValueError(
            f"{path}: unknown field {{{unknown[0]}}}; "
            f"known are {', '.join(f'{{{name}}}' for name in sorted(known))}"
        )
    if "seeds" not in names:
        raise ValueError(f"{path}: a prompt needs {{seeds}}, where the examples are put")
    return text


def prompt(
    template: str,
    seeds: Sequence[Seed],
    form: str,
    *,
    wishes: Sequence[str] = (),
    with_category: bool = False,
) -> str:
    """Return the text of one request.

    Args:
        template: as from read_prompt.
        seeds: the examples, in the order in which they are shown.
        form: schema or list.
        wishes: sentences for {also}, each a point of the list that stands there.
        with_category: show the examples' categories.
    """
    show = _objects if form == "schema" else _numbered
    values = {
        "seeds": show(seeds, with_category),
        "n": str(TOTAL),
        "shown": str(len(seeds)),
        "first": str(len(seeds) + 1),
        "also": "".join(f"\n{number}. {wish}" for number, wish in enumerate(wishes, 9)),
    }
    return _FIELD.sub(lambda found: values[found[1]], template)


def category_wish(wanted: Mapping[str, int], form: str) -> str:
    """Return the sentence that asks for tasks by category."""
    where = 'in its field "category"' if form == "schema" else 'after its output, as "Category:",'
    names = "; ".join(f"{name}: {CATEGORIES[name]}" for name in wanted)
    counts = ", ".join(f"{count} {name}" for name, count in wanted.items() if count)
    return (
        f"Each task says {where} which kind of work it is ({names}). Of the new tasks "
        f"make {counts}."
    )


def facet_wish(values: Mapping[str, str]) -> str:
    """Return the sentence that asks for facets."""
    asked = ", ".join(f"{name}: {value}" for name, value in values.items())
    return f"As far as it makes sense, the new tasks have this in common: {asked}."


def _numbered(seeds: Sequence[Seed], with_category: bool) -> str:
    lines = []
    for k, (_, seed) in enumerate(seeds, 1):
        lines += [f"{k}. Instruction: {seed.instruction}", f"{k}. Input: {seed.input}"]
        lines += [f"{k}. Output: {seed.output}"]
        lines += [f"{k}. Category: {seed.extra['category']}", ""] if with_category else [""]
    return "\n".join(lines).strip()


def _objects(seeds: Sequence[Seed], with_category: bool) -> str:
    return "\n".join(
        json.dumps(
            {"instruction": seed.instruction, "input": seed.input, "output": seed.output}
            | ({"category": seed.extra["category"]} if with_category else {}),
            ensure_ascii=False,
        )
        for _, seed in seeds
    )
