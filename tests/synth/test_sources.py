"""Readers of published corpora, against hand-made files and the corpora that ship."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bioinstruct.synth.sources import (
    Sentence,
    Span,
    find_spans,
    keep_entity,
    read_conll,
    read_pubmedqa,
    read_pubmedqa_labels,
)

DEMO = Path(__file__).parents[2] / "train" / "demo"
QUESTION = {
    "QUESTION": "Does it?",
    "CONTEXTS": ["It may.", "It did."],
    "LABELS": ["AIM", "RESULTS"],
    "LONG_ANSWER": "It does.",
    "final_decision": "yes",
}


def _conll(tmp_path: Path, text: str, name: str = "c.tsv") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


def _sentence(tags: str) -> Sentence:
    split = tuple(tags.split())
    return Sentence(tuple(f"w{i}" for i in range(len(split))), split, "x.tsv", 1, 1)


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O O", []),
        ("B I I O B", [(0, 3), (4, 5)]),
        ("B B I", [(0, 1), (1, 3)]),
        ("I I O I", [(0, 2), (3, 4)]),
        ("B-X I-X", [(0, 2, "X")]),
        ("B-X I-Y", [(0, 1, "X"), (1, 2, "Y")]),
        ("I-Y I-X I-X", [(0, 1, "Y"), (1, 3, "X")]),
        ("B-cell_type I-cell_type O", [(0, 2, "cell_type")]),
    ],
)
def test_spans(tags: str, spans: list[tuple[Any, ...]]) -> None:
    assert find_spans(tags.split()) == [Span(*span) for span in spans]


@given(st.lists(st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"]), max_size=12))
def test_spans_cover_exactly_the_tokens_that_are_not_O(tags: list[str]) -> None:
    spans = find_spans(tags)
    covered = [i for start, end, _ in spans for i in range(start, end)]
    assert covered == [i for i, tag in enumerate(tags) if tag != "O"]
    starts = {start for start, _, _ in spans}
    assert {i for i, tag in enumerate(tags) if tag.startswith("B")} <= starts
    assert all(tags[i][2:] == kind for start, end, kind in spans for i in range(start, end))


def test_orphans_are_counted() -> None:
    assert _sentence("I O B I I-X").orphans == 2
    assert _sentence("B I O").orphans == 0


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("gap", ["\t", " "])
@pytest.mark.parametrize("packed", [False, True])
def test_reads_conll(tmp_path: Path, end: str, gap: str, packed: bool) -> None:
    lines = ["-DOCSTART-\tO", "", "a\tB-X", "b\tI-X", "", "", "c\tO"]
    text = end.join(line.replace("\t", gap) for line in lines)
    path = tmp_path / "c.tsv"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    first, second = read_conll(path)
    assert first == Sentence(("a", "b"), ("B-X", "I-X"), str(path), 3, 1)
    assert second == Sentence(("c",), ("O",), str(path), 7, 2)
    assert first.text() == "a b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tO\nb\n", r"c.tsv:2: 1 columns where two are needed, token and tag: \"b\""),
        ("a NN B-NP O\n", "c.tsv:1: 4 columns"),
        ("a\tb\tO\n", "c.tsv:1: 3 columns"),
        ("a\tX\n", "c.tsv:1: tag 'X' must be O, B or I, or a typed one like B-Disease"),
        ("a\tS-X\n", "c.tsv:1: tag 'S-X' must be"),
        ("a\tB-\n", "c.tsv:1: tag 'B-' must be"),
        ("a\to\n", "c.tsv:1: tag 'o' must be"),
        ("\tO\n", "c.tsv:1: a token must be text without white space, not ''"),
        ("a b\tO\n", "c.tsv:1: a token must be text without white space, not 'a b'"),
        ("a\u00a0b\tO\n", "c.tsv:1: a token must be text without white space"),
        ("-DOCSTART- O\n\n", "c.tsv holds no sentences"),
        ("", "c.tsv is empty"),
        ('{"instruction": "a"}\n', "c.tsv:1: tag"),
    ],
)
def test_bad_conll_is_placed(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_conll(_conll(tmp_path, text))


def test_keep_entity() -> None:
    both = [_sentence("B-DNA I-DNA O B-cell_line"), _sentence("O I-cell_line I-DNA O")]
    assert [s.tags for s in keep_entity(both, "Cell Line")] == [
        ("O", "O", "O", "B-cell_line"),
        ("O", "I-cell_line", "O", "O"),
    ]
    with pytest.raises(ValueError, match="x.tsv tags no 'disease', only DNA, cell_line; name"):
        keep_entity(both, "disease")
    bare = [_sentence("B I O")]
    assert keep_entity(bare, "anything") == bare
    assert keep_entity([_sentence("O O")], "disease") == [_sentence("O O")]


def test_shipped_corpora_have_their_published_size() -> None:
    train, test = (read_conll(DEMO / f"ncbi-disease-{part}.tsv.gz") for part in ("train", "test"))
    assert (len(train), len(test)) == (5424, 940)
    assert sum(len(s.spans) for s in test) == 960
    assert sum(s.orphans for s in train + test) == 0
    assert {span.kind for s in test for span in s.spans} == {"Disease"}
    questions = read_pubmedqa(DEMO / "pubmedqa-ori_pqal.json.gz")
    labels = read_pubmedqa_labels(DEMO / "pubmedqa-test_ground_truth.json")
    assert (len(questions), len(labels)) == (1000, 500)
    answers = [q.answer for q in questions]
    assert [answers.count(a) for a in ("yes", "no", "maybe")] == [552, 338, 110]
    assert all(labels.get(q.id, q.answer) == q.answer for q in questions)


def test_pubmedqa_fields(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_text(json.dumps({"12": QUESTION}))
    (question,) = read_pubmedqa(path)
    assert question.id == "12"
    assert question.contexts == ("It may.", "It did.")
    assert (question.question, question.answer) == ("Does it?", "yes")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "must be a JSON object keyed by PubMed id"),
        ({}, "must be a JSON object keyed by PubMed id"),
        ({"12": []}, "q.json: id 12: a question must be an object"),
        ({"12": {"QUESTION": "Does it?"}}, "id 12: 'CONTEXTS' is missing .found QUESTION."),
        ({"12": {**QUESTION, "QUESTION": 1}}, "id 12: 'QUESTION' must be a string, not 1"),
        ({"12": {**QUESTION, "CONTEXTS": "x"}}, "id 12: 'CONTEXTS' must be a list of strings"),
        ({"12": {**QUESTION, "CONTEXTS": []}}, "id 12: 'CONTEXTS' must be a list of strings"),
        ({"12": {**QUESTION, "CONTEXTS": [1]}}, "id 12: 'CONTEXTS' must be a string, not 1"),
        ({"12": {**QUESTION, "final_decision": "Yes"}}, "must be yes, no or maybe, not .Yes."),
        ({"12": {**QUESTION, "final_decision": None}}, "must be yes, no or maybe, not null"),
    ],
)
def test_bad_pubmedqa_is_named(tmp_path: Path, value: object, message: str) -> None:
    path = tmp_path / "q.json"
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=message):
        read_pubmedqa(path)


def test_bad_labels_are_named(tmp_path: Path) -> None:
    path = tmp_path / "l.json"
    path.write_text('{"12": "perhaps"}')
    with pytest.raises(ValueError, match="l.json: id 12: the answer must be yes, no or maybe"):
        read_pubmedqa_labels(path)
    path.write_text('{"12": "yes"')
    with pytest.raises(ValueError, match="l.json:1:13: broken JSON"):
        read_pubmedqa_labels(path)
