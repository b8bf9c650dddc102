"""The runner with a scripted model: what it asks, what it allows, what it makes of the answers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from bioinstruct.eval.runner import SPARE_TOKENS, grade, prepare, run_tasks, token_limit
from bioinstruct.eval.tasks import find_task

DEMO = Path(__file__).parents[2] / "train" / "demo"
NCBI, PUBMEDQA = DEMO / "ncbi-disease-test.tsv.gz", DEMO / "pubmedqa-ori_pqal.json.gz"


class Reply(NamedTuple):
    text: str
    finished: bool


class Letters:
    """A tokenizer with one token a character."""

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        return [ord(c) for c in text]


class Scripted:
    """A model that answers from a table and remembers what it was asked."""

    tokenizer = Letters()

    def __init__(self, replies: dict[tuple[str, str], Reply]) -> None:
        self.replies = replies
        self.asked: list[tuple[str, int, int]] = []

    def default_template(self) -> str:
        return "chatml"

    def answer(
        self,
        pairs: Sequence[tuple[str, str]],
        template: str,
        max_new_tokens: int,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Reply]:
        self.asked.append((template, max_new_tokens, len(pairs)))
        assert on_progress is not None
        on_progress(len(pairs))
        return [self.replies.get(pair, Reply("", True)) for pair in pairs]


def test_runs_every_job_and_scores_it() -> None:
    jobs = [
        prepare(find_task("ncbi-disease"), NCBI, limit=20, seed=3),
        prepare(find_task("pubmedqa"), PUBMEDQA, limit=10),
    ]
    replies = {(i.instruction, i.input): Reply(i.gold, True) for j in jobs for i in j.items}
    first = jobs[0].items[0]
    replies[first.instruction, first.input] = Reply("", False)
    llm, heard = Scripted(replies), []
    results = run_tasks(llm, jobs, on_progress=lambda job, done: heard.append((job, done)))
    assert [r.job for r in results] == jobs
    assert [(job.task.name, done) for job, done in heard] == [
        ("ncbi-disease", 0),
        ("ncbi-disease", 20),
        ("pubmedqa", 0),
        ("pubmedqa", 10),
    ]
    longest = max(map(len, jobs[0].golds))
    assert llm.asked == [("chatml", longest + SPARE_TOKENS, 20), ("chatml", 8, 10)]
    assert [r.unfinished for r in results] == [1, 0]
    assert results[0].scores["f1"].unparsed == 1
    assert results[1].scores["accuracy"].value == 1.0
    assert results[0].outputs[1:] == [i.gold for i in jobs[0].items[1:]]
    assert [r.template for r in results] == ["chatml", "chatml"]


def test_a_template_can_be_named() -> None:
    llm = Scripted({})
    job = prepare(find_task("pubmedqa"), PUBMEDQA, limit=1)
    (result,) = run_tasks(llm, [job], template="medtuned")
    assert llm.asked == [("medtuned", 8, 1)]
    assert result.template == "medtuned"


def test_the_token_limit_does_not_depend_on_the_draw() -> None:
    jobs = [prepare(find_task("ncbi-disease"), NCBI, form="list", limit=n) for n in (5, 50, None)]
    assert {token_limit(Scripted({}), job) for job in jobs} == {133 + SPARE_TOKENS}
    assert [len(job.items) for job in jobs] == [5, 50, 940]


def test_the_seed_draws() -> None:
    task = find_task("pubmedqa")
    one, same, other = (prepare(task, PUBMEDQA, limit=30, seed=s) for s in (1, 1, 2))
    ids = [[item.id for item in job.items] for job in (one, same, other)]
    assert ids[0] == ids[1] != ids[2]


def test_answers_made_elsewhere_are_graded_alike() -> None:
    job = prepare(find_task("pubmedqa"), PUBMEDQA, limit=30)
    result = grade(job, ["no"] * 30)
    assert result.scores == job.task.score(job.items, ["no"] * 30)
    assert (result.template, result.max_new_tokens, result.unfinished) == (None, None, 0)
    with pytest.raises(ValueError):
        grade(job, ["no"] * 29)
