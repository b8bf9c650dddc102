"""PubMedQA: answer a question from an abstract with yes, no or maybe; accuracy and macro-F1.

Paper: Jin, Dhingra, Liu, Cohen, Lu. PubMedQA: A Dataset for Biomedical Research Question Answering.
EMNLP-IJCNLP 2019. MIT License.
Files: ori_pqal.json (PQA-L, 1,000 questions), plain or gzip, and beside it the official
test_ground_truth.json, whose 500 ids are the test set; a prefix of the first name, as in
pubmedqa-ori_pqal.json.gz, is expected before the second one's too.
Reading: the abstract without its conclusion is given ("reasoning required"); see eval/answers.py
for how an answer is read. An unparsed answer is wrong.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bioinstruct.eval import answers, metrics
from bioinstruct.eval.task import Item, Task, Verdict
from bioinstruct.synth.convert import qa_prompt
from bioinstruct.synth.sources import ANSWERS, Question, read_pubmedqa, read_pubmedqa_labels

VERSION = 1
QUESTIONS, LABELS = "ori_pqal", "test_ground_truth.json"


class Split(NamedTuple):
    """The labelled questions, parted as the authors part them."""

    train: list[Question]
    test: list[Question]


def split(path: Path) -> Split:
    """Part ori_pqal.json by the test_ground_truth.json beside it.

    Raises:
        ValueError: a file is malformed, the labels are missing, or the two contradict each other.
        OSError: a file cannot be opened.
    """
    prefix, found, _ = path.name.partition(QUESTIONS)
    labels_path = path.with_name((prefix if found else "") + LABELS)
    questions = read_pubmedqa(path)
    if not labels_path.exists():
        raise ValueError(f"{path} needs {labels_path.name} beside it: it names the test questions")
    labels = read_pubmedqa_labels(labels_path)
    test = [q for q in questions if q.id in labels]
    if len(test) < len(labels):
        lost = next(key for key in labels if key not in {q.id for q in test})
        raise ValueError(f"{labels_path} names id {lost}, which {path} does not hold")
    for question in test:
        if question.answer != labels[question.id]:
            raise ValueError(f"{labels_path} and {path} answer id {question.id} differently")
    return Split([q for q in questions if q.id not in labels], test)


def _read(path: Path, form: str) -> list[Item]:
    return [
        Item(q.id, *qa_prompt(q), q.answer, partial(_judge, q.answer)) for q in split(path).test
    ]


def _judge(gold: str, output: str) -> Verdict:
    answer = answers.read_choice(output, ANSWERS)
    return Verdict(answer, {"correct": int(answer == gold)})


def _grade(items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, metrics.Score]:
    gold = [item.gold for item in items]
    given = [verdict.parsed for verdict in verdicts]
    correct_N = np.array([verdict.counts["correct"] for verdict in verdicts])
    said = Counter(str(answer) for answer in given if answer is not None)
    extra = {"correct": int(correct_N.sum()), **{f"said_{a}": said[a] for a in ANSWERS}}
    counts = {
        "accuracy": (np.stack([correct_N, 1 - correct_N], 1), metrics.accuracy),
        "macro_f1": (metrics.confusion(gold, given, ANSWERS), metrics.macro_f1),
    }
    return {
        name: metrics.score(
            counts_NC, statistic, unparsed=given.count(None), extra=extra, version=VERSION
        )
        for name, (counts_NC, statistic) in counts.items()
    }


TASK = Task(
    name="pubmedqa",
    version=VERSION,
    paper="Jin, Dhingra, Liu, Cohen, Lu. EMNLP-IJCNLP 2019",
    licence="MIT",
    source="ori_pqal.json[.gz] with test_ground_truth.json beside it; ids are PubMed ids",
    forms=(),
    max_new_tokens=8,
    main="accuracy",
    read=_read,
    grade=_grade,
)
