"""What request i says: the prompt with three seeds in it, in either format.

A prompt is plain text with the fields that seeds.py explains: {seeds}, which it must hold, {n},
{shown} and {first}; any other {name} is refused. Nothing of it depends on time, machine or other
requests.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from bioinstruct.synth.draws import SHOWN
from bioinstruct.synth.seeds import Seed
from bioinstruct.synth.text import read_text

TOTAL = 20  # tasks in the list, the seeds included
NEW = TOTAL - SHOWN
FORMATS = ("schema", "list")
_FIELD = re.compile(r"\{([a-z_]+)\}")


def read_prompt(path: Path | None, form: str) -> str:
    """Read a prompt, or where none is named the installed one of a format.

    Raises:
        ValueError: it has no {seeds}, or a field that is none of ours.
        OSError: the file cannot be opened.
    """
    text = read_text(path or Path(__file__).with_name(f"prompt_{form}.txt")).strip()
    names = set(_FIELD.findall(text))
    known = {"seeds", "n", "shown", "first"}
    if unknown := sorted(names - known):
        raise ValueError(
            f"{path}: unknown field {{{unknown[0]}}}; "
            f"known are {', '.join(f'{{{name}}}' for name in sorted(known))}"
        )
    if "seeds" not in names:
        raise ValueError(f"{path}: a prompt needs {{seeds}}, where the examples are put")
    return text


def prompt(template: str, seeds: Sequence[Seed], form: str) -> str:
    """Return the text of one request.

    Args:
        template: as from read_prompt.
        seeds: the examples, in the order in which they are shown.
        form: schema or list.
    """
    show = _objects if form == "schema" else _numbered
    values = {
        "seeds": show(seeds),
        "n": str(TOTAL),
        "shown": str(len(seeds)),
        "first": str(len(seeds) + 1),
    }
    return _FIELD.sub(lambda found: values[found[1]], template)


def _numbered(seeds: Sequence[Seed]) -> str:
    lines = []
    for k, (_, seed) in enumerate(seeds, 1):
        lines += [f"{k}. Instruction: {seed.instruction}", f"{k}. Input: {seed.input}"]
        lines += [f"{k}. Output: {seed.output}", ""]
    return "\n".join(lines).strip()


def _objects(seeds: Sequence[Seed]) -> str:
    return "\n".join(
        json.dumps(
            {"instruction": seed.instruction, "input": seed.input, "output": seed.output},
            ensure_ascii=False,
        )
        for _, seed in seeds
    )
