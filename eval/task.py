"""What a task is: a published file read into items, and the items' answers judged and scored."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bioinstruct.eval.metrics import Score


class Verdict(NamedTuple):
    """What became of one answer."""

    parsed: object
    """What was read out of it, fit for JSON; None if it could not be read."""
    counts: dict[str, int]
    """What it adds to the scores, for example tp, fp and fn."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question put to a model."""

    id: str
    instruction: str
    input: str
    gold: str
    """The right answer, in the form that the instruction asks for."""
    judge: Callable[[str], Verdict]
    """Judges an answer's text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A dataset with its prompt, its reading of answers and its scores."""

    name: str
    version: int
    """Raised whenever prompts, reading or scoring change."""
    paper: str
    licence: str
    source: str
    """Which file of the publishers it reads, and what its ids are."""
    forms: tuple[str, ...]
    """The answer forms to choose from, the default first; empty where there is one."""
    max_new_tokens: int | None
    """The most tokens an answer may take; None: what the longest gold answer takes, and a few."""
    main: str
    """The score to look at first."""
    read: Callable[[Path, str], list[Item]]
    """Reads the items of a file in one form."""
    grade: Callable[[Sequence[Item], Sequence[Verdict]], dict[str, Score]]
    """Makes the scores of judged items."""

    def form(self, wanted: str | None) -> str:
        """Return the answer form to use, the default for None.

        Raises:
            ValueError: the task has no such form.
        """
        if wanted is None:
            return self.forms[0] if self.forms else ""
        if wanted not in self.forms:
            allowed = f"one of {', '.join(self.forms)}" if self.forms else "left out: it has one"
            raise ValueError(f"task {self.name}: --form must be {allowed}, not {wanted!r}")
        return wanted

    def items(
        self, path: Path, form: str | None = None, *, limit: int | None = None, seed: int = 0
    ) -> list[Item]:
        """Return the items of a file, or limit of them drawn by seed, in file order.

        Raises:
            ValueError: the file is malformed, the form unknown, or limit below 1.
            OSError: the file cannot be opened.
        """
        return draw(self.read(path, self.form(form)), limit, seed)

    def judge(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Verdict]:
        """Return the verdict on each answer."""
        return [item.judge(output) for item, output in zip(items, outputs, strict=True)]

    def score(self, items: Sequence[Item], outputs: Sequence[str]) -> dict[str, Score]:
        """Return the scores of the answers, the main one first."""
        return self.grade(items, self.judge(items, outputs))


def draw(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """Return limit items drawn by seed, in their order; all where limit is None or too high.

    Raises:
        ValueError: limit is below 1.
    """
    if limit is None:
        return list(items)
    if limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    chosen = random.Random(seed).sample(range(len(items)), min(limit, len(items)))
    return [items[i] for i in sorted(chosen)]
