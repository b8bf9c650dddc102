"""Mentions and scores equal seqeval's; its values were computed once, by seqeval_golden.py."""

import json
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bioinstruct.eval import metrics
from bioinstruct.eval.tasks import find_task
from bioinstruct.synth.sources import find_spans, read_conll

HERE = Path(__file__).parent
GOLDEN: dict[str, Any] = json.loads((HERE / "golden" / "seqeval.json").read_text())
SCRIPT = runpy.run_path(str(HERE / "seqeval_golden.py"))
perturb: Callable[[list[list[str]]], list[list[str]]] = SCRIPT["perturb"]
tags_of: Callable[[Path], list[list[str]]] = SCRIPT["tags_of"]
SHIPPED = HERE.parents[1] / "train" / "demo" / "ncbi-disease-test.tsv.gz"
NCBI_TEST = "ner/NCBI-disease-IOB/test.tsv.gz"


def _counts(gold: list[list[str]], other: list[list[str]]) -> list[int]:
    pairs = [(set(find_spans(a)), set(find_spans(b))) for a, b in zip(gold, other, strict=True)]
    hits = sum(len(a & b) for a, b in pairs)
    return [hits, sum(len(a) for a, _ in pairs), sum(len(b) for _, b in pairs)]


def _check_scores(counts: list[int], golden: dict[str, Any]) -> None:
    assert counts == golden["hits_gold_predicted"]
    hits, in_gold, predicted = counts
    row = np.array([hits, predicted - hits, in_gold - hits])
    for name in ("precision", "recall", "f1"):
        assert abs(float(getattr(metrics, name)(row)) - golden[name]) < 1e-12


@pytest.mark.parametrize("case", GOLDEN["small"])
def test_small_cases(case: dict[str, Any]) -> None:
    spans = [[kind or "_", start, end - 1] for start, end, kind in find_spans(case["other"])]
    assert spans == case["spans"]
    _check_scores(_counts([case["gold"]], [case["other"]]), case)


@pytest.mark.parametrize("name", GOLDEN["files"])
def test_perturbed_corpora(name: str) -> None:
    data = os.environ.get("BIOINSTRUCT_DATA")
    if name == NCBI_TEST:
        path = SHIPPED
    elif data:
        path = Path(data) / name
    else:
        pytest.skip("BIOINSTRUCT_DATA names no folder")
    gold = [list(s.tags) for s in read_conll(path)]
    assert gold == tags_of(path)
    _check_scores(_counts(gold, perturb(gold)), GOLDEN["files"][name])


def test_the_task_scores_token_lines_as_seqeval_scores_tags() -> None:
    task = find_task("ncbi-disease")
    items = task.items(SHIPPED, "medtuned")
    sentences = read_conll(SHIPPED)
    other = perturb([list(s.tags) for s in sentences])
    outputs = [
        "\n".join(f"{token} : {tag}" for token, tag in zip(s.tokens, tags, strict=True))
        for s, tags in zip(sentences, other, strict=True)
    ]
    scores = task.score(items, outputs)
    for name in ("precision", "recall", "f1"):
        assert abs(scores[name].value - GOLDEN["files"][NCBI_TEST][name]) < 1e-12
    assert scores["f1"].extra["hallucinated"] == scores["f1"].unparsed == 0
