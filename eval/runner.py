"""Items in, a model's answers and their scores out.

The model is anything with the few methods of `Model`; bioinstruct.model.load returns one, and a
test can script one. Answers are decoded greedily by the model's own rule. An answer may take as
many tokens as the task says, or as the longest gold answer of the whole file takes and a few more;
answers that hit that limit are counted as unfinished and scored as they stand.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bioinstruct.eval.metrics import Score
from bioinstruct.eval.task import Item, Task, Verdict, draw
from bioinstruct.synth.console import Progress

SPARE_TOKENS = 8  # room for the stop token and for other ways to split the same text


class Answer(Protocol):
    """A generated text, and whether it ended by itself before the token limit."""

    @property
    def text(self) -> str: ...

    @property
    def finished(self) -> bool: ...


class Tokenizer(Protocol):
    """As much of a tokenizer as is needed to count tokens."""

    def encode(self, text: str, /) -> Sequence[int]: ...


class Model(Protocol):
    """What the runner needs of a language model."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def answer(
        self,
        pairs: Sequence[tuple[str, str]],
        template: str,
        max_new_tokens: int,
        on_progress: Callable[[int], None] | None = None,
    ) -> Sequence[Answer]:
        """Answer (instruction, input) pairs; on_progress hears how many are done."""
        ...

    def default_template(self) -> str:
        """Return the name of the template that fits the model."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A task on one file, ready to be put to models."""

    task: Task
    path: Path
    form: str
    items: list[Item]
    golds: list[str]
    """The gold answers of the whole file, also where items is a part of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one system answered to a job, and how it scored."""

    job: Job
    template: str | None
    """None where the answers came from a file."""
    max_new_tokens: int | None
    outputs: list[str]
    finished: list[bool]
    """False where an answer was cut at max_new_tokens."""
    verdicts: list[Verdict]
    scores: dict[str, Score]
    seconds: float

    @property
    def unfinished(self) -> int:
        """How many answers were cut."""
        return self.finished.count(False)


def prepare(
    task: Task, path: Path, *, form: str | None = None, limit: int | None = None, seed: int = 0
) -> Job:
    """Read a task's file and draw its items.

    Args:
        form: the answer form, the task's default for None.
        limit: how many items to draw, all for None.
        seed: of the draw.

    Raises:
        ValueError: the file is malformed, the form unknown, or limit below 1.
        OSError: the file cannot be opened.
    """
    every = task.items(path, form)
    golds = [item.gold for item in every]
    items = draw(every, limit, seed)
    return Job(task=task, path=path, form=task.form(form), items=items, golds=golds)


def run_tasks(
    llm: Model,
    jobs: Sequence[Job],
    *,
    template: str | None = None,
    on_progress: Callable[[Job, int], None] | None = None,
) -> list[Result]:
    """Put every job to a model, one after the other.

    Args:
        template: the prompt template, the model's own for None.
        on_progress: hears the job under way and how many of its items are done.

    Raises:
        ValueError: the template does not fit the model.
    """
    name = llm.default_template() if template is None else template
    return [_run(llm, job, name, on_progress) for job in jobs]


def progress_bars(when: str = "") -> Callable[[Job, int], None]:
    """Return an on_progress that shows each task's progress from the moment it begins.

    Args:
        when: said behind the task's name, for example " before training".
    """
    bars: dict[str, Progress] = {}

    def show(job: Job, done: int) -> None:
        name = job.task.name
        bars.setdefault(name, Progress(name + when, len(job.items))).update(done)

    return show


def grade(job: Job, outputs: Sequence[str]) -> Result:
    """Score answers that were made elsewhere, one an item, in order."""
    return _result(job, list(outputs), [True] * len(outputs))


def token_limit(llm: Model, job: Job) -> int:
    """Return how many tokens an answer to this job may take."""
    if job.task.max_new_tokens is not None:
        return job.task.max_new_tokens
    return max(len(llm.tokenizer.encode(gold)) for gold in set(job.golds)) + SPARE_TOKENS


def _run(
    llm: Model, job: Job, template: str, on_progress: Callable[[Job, int], None] | None
) -> Result:
    def report(done: int) -> None:
        if on_progress is not None:
            on_progress(job, done)

    limit = token_limit(llm, job)
    pairs = [(item.instruction, item.input) for item in job.items]
    report(0)
    start_s = time.monotonic()
    answers = llm.answer(pairs, template, limit, report)
    texts = [answer.text for answer in answers]
    return _result(
        job,
        texts,
        [answer.finished for answer in answers],
        template=template,
        limit=limit,
        seconds=time.monotonic() - start_s,
    )


def _result(
    job: Job,
    outputs: list[str],
    finished: list[bool],
    *,
    template: str | None = None,
    limit: int | None = None,
    seconds: float = 0.0,
) -> Result:
    verdicts = job.task.judge(job.items, outputs)
    return Result(
        job=job,
        template=template,
        max_new_tokens=limit,
        outputs=outputs,
        finished=finished,
        verdicts=verdicts,
        scores=job.task.grade(job.items, verdicts),
        seconds=seconds,
    )
