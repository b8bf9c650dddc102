"""The seeds of synthesis: 80 curated records that show a language model what to write.

A request shows a few of them and asks the model to go on with the list, as BioInstruct did (arXiv
2310.19975) with 80 seeds of its own. What a model imitates it multiplies, mistakes included, so
each packaged seed says where its facts can be checked (`source`) and what a second reader should
look at (`note`). All notes, patients and studies in them are invented; none comes from a benchmark.

Fields of a seed: `instruction`, `input`, `output`, and `id`, `category` (qa, ie, gen or other),
`facets` (topic, task, difficulty), `source`, `note`. In a file of one's own only instruction and
output are needed.

Two prompts stand beside this file: `prompt_list.txt` asks for a numbered list, as the paper did,
`prompt_schema.txt` for one JSON object. Their placeholders:

    {n}      how many tasks the whole list has, the seeds included (the paper: 20)
    {shown}  how many seeds are shown (the paper: 3)
    {first}  the number of the first new task, shown + 1
    {seeds}  the seeds: blocks of `k. Instruction:`, `k. Input:`, `k. Output:`, numbered from 1,
             for a list; objects with instruction, input and output, one a line, for the schema
    {also}   what a run asks for beyond that (categories, facets), as further points of the list;
             usually nothing
"""

import difflib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bioinstruct.synth.records import Record, read_records
from bioinstruct.synth.text import shown

PACKAGED = Path(__file__).with_name("seeds.jsonl")
COUNTS = {"qa": 18, "ie": 27, "gen": 27, "other": 8}
"""Packaged seeds of each category: the shares of the paper's Fig. 1a, in 80."""
FACETS = ("topic", "task", "difficulty")
DIFFICULTIES = ("easy", "medium", "hard")
LEAST = 3  # a request shows three
BAD_SHOWN = 5  # bad seeds spelled out in one message


class Seed(NamedTuple):
    """One curated example; the fields beside the record's three are empty where a file has none."""

    id: str
    record: Record

    @property
    def category(self) -> str:
        """One of qa, ie, gen, other, or empty."""
        return str(self.record.extra.get("category", ""))

    @property
    def facets(self) -> dict[str, str]:
        """What the seed is about; the packaged ones have topic, task and difficulty."""
        facets = self.record.extra.get("facets", {})
        return dict(facets) if isinstance(facets, dict) else {}

    @property
    def source(self) -> str:
        """Where the facts can be checked."""
        return str(self.record.extra.get("source", ""))

    @property
    def note(self) -> str:
        """What a reviewer should look at."""
        return str(self.record.extra.get("note", ""))


def read_seeds(path: Path | None = None) -> list[Seed]:
    """Read seeds, in the order of their file.

    Args:
        path: records as read_records takes them; None means the packaged seeds. A seed without an
            id is named by its place: seed-001, seed-002 and so on.

    Returns:
        At least three seeds, no two with one id or with the same instruction and input.

    Raises:
        ValueError: the file is no file of records, a seed's field is missing, empty or wrong, or
            there are fewer than three; the packaged file is not what was packaged.
        OSError: the file cannot be opened.
    """
    file = PACKAGED if path is None else path
    records = read_records(file)
    seeds = [_seed(record, place) for place, record in enumerate(records, 1)]
    wanted = () if path else (*FACETS, "id", "category", "source", "note")
    bad = [f"{s.record.where}: {text}" for s in seeds if (text := _problem(s, wanted))]
    bad = bad or _repeated(seeds)
    if bad:
        raise ValueError(_summary(bad))
    if len(seeds) < LEAST:
        raise ValueError(f"{file} holds {len(seeds)} seeds; a request shows {LEAST}, add some")
    if path is None:
        _check_counts(seeds)
    return seeds


def _seed(record: Record, place: int) -> Seed:
    return Seed(str(record.extra.get("id", f"seed-{place:03d}")), record)


def _problem(seed: Seed, wanted: Sequence[str]) -> str | None:
    """Return what is wrong with one seed, or None; wanted are the fields it must have."""
    record = seed.record
    extra = record.extra
    for name in ("id", "category", "source", "note"):
        value = extra.get(name, "" if name in wanted else None)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            return f"{name!r} must be a text that is not empty, not {shown(value)}"
    for name in ("instruction", "output", *(["input"] if wanted else [])):
        if not getattr(record, name).strip():
            return f"{name!r} is empty; a seed shows what a whole record looks like"
    if record.output.strip() == record.input.strip():
        return "'output' repeats 'input'; a model would learn to copy"
    if "category" in extra and seed.category not in COUNTS:
        return _unknown("category", seed.category, list(COUNTS))
    return _facet_problem(extra.get("facets", {}), [name for name in FACETS if name in wanted])


def _facet_problem(facets: object, wanted: Sequence[str]) -> str | None:
    if not isinstance(facets, dict):
        return f"'facets' must be an object of texts, not {shown(facets)}"
    if missing := [name for name in wanted if name not in facets]:
        return f"'facets' lacks {missing[0]!r}"
    for name, value in facets.items():
        if not isinstance(value, str) or not value.strip():
            return f"'facets' must hold texts; {name!r} is {shown(value)}"
    level = facets.get("difficulty", DIFFICULTIES[0])
    return None if level in DIFFICULTIES else _unknown("difficulty", level, list(DIFFICULTIES))


def _unknown(name: str, value: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(value.lower(), known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{name!r} is {shown(value)}; it must be one of {', '.join(known)}{hint}"


def _repeated(seeds: Sequence[Seed]) -> list[str]:
    """Say which seeds have the id, or the instruction and input, of an earlier one."""
    first: dict[tuple[str, ...], str] = {}
    bad = []
    for seed in seeds:
        record = seed.record
        for what, key in (
            (f"id {seed.id!r}", ("id", seed.id)),
            ("this instruction with this input", ("text", record.instruction, record.input)),
        ):
            if (place := first.setdefault(key, record.where)) != record.where:
                bad.append(f"{record.where}: {what} stands at {place} already; seeds must differ")
    return bad


def _check_counts(seeds: Sequence[Seed]) -> None:
    found = Counter(seed.category for seed in seeds)
    if found != COUNTS:
        has, due = (", ".join(f"{c[name]} {name}" for name in COUNTS) for c in (found, COUNTS))
        raise ValueError(
            f"{PACKAGED} was changed: it has {has} seeds where {due} were packaged; install "
            "bioinstruct again, and pass seeds of your own with --seeds FILE"
        )


def _summary(bad: Sequence[str]) -> str:
    if len(bad) == 1:
        return bad[0]
    rest = f"\n  ... and {len(bad) - BAD_SHOWN} more" if len(bad) > BAD_SHOWN else ""
    return f"{len(bad)} mistakes in the seeds:\n  " + "\n  ".join(bad[:BAD_SHOWN]) + rest
