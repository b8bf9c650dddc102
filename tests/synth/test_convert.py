"""Corpora to records: the two NER forms, PubMedQA, exclusion, and the records that ship."""

import gzip
from pathlib import Path

import pytest

from bioinstruct.synth import convert
from bioinstruct.synth.records import read_records, write_records
from bioinstruct.synth.sources import Sentence, read_conll, read_pubmedqa, read_pubmedqa_labels

DEMO = Path(__file__).parents[2] / "train" / "demo"
TRAIN, TEST = DEMO / "ncbi-disease-train.tsv.gz", DEMO / "ncbi-disease-test.tsv.gz"
QUESTIONS, LABELS = DEMO / "pubmedqa-ori_pqal.json.gz", DEMO / "pubmedqa-test_ground_truth.json"
RECORDS = DEMO / "records.jsonl.gz"
SENTENCE = Sentence(
    ("Ataxia", "and", "breast", "cancer", "in", "Ataxia"),
    ("B-D", "O", "I-D", "I-D", "O", "B-D"),
    "folder/set.train.tsv.gz",
    9,
    4,
)


def test_list_form() -> None:
    assert convert.ner_answer(SENTENCE, "list") == "Ataxia\nbreast cancer\nAtaxia"
    nothing = Sentence(("well",), ("O",), "a", 1, 1)
    assert convert.ner_answer(nothing, "list") == "none"


def test_medtuned_form() -> None:
    assert convert.ner_answer(SENTENCE, "medtuned") == (
        "Ataxia : B\nand : O\nbreast : B\ncancer : I\nin : O\nAtaxia : B"
    )


@pytest.mark.parametrize("form", convert.NER_FORMS)
def test_ner_record(form: str) -> None:
    record = convert.ner_record(SENTENCE, "disease", form)
    assert record == {
        "instruction": convert.ner_prompt(SENTENCE, "disease", form).instruction,
        "input": "Ataxia and breast cancer in Ataxia",
        "output": convert.ner_answer(SENTENCE, form),
        "category": "ie",
        "source": "set",
        "id": "set-4",
    }
    assert "disease" in str(record["instruction"])


def test_prompts_ask_for_the_entity_and_do_not_depend_on_the_tags() -> None:
    blank = Sentence(SENTENCE.tokens, ("O",) * 6, "a", 1, 1)
    for form in convert.NER_FORMS:
        prompt = convert.ner_prompt(SENTENCE, "gene", form)
        assert prompt == convert.ner_prompt(blank, "gene", form)
        assert "gene" in prompt.instruction and "disease" not in prompt.instruction
    assert len(convert.ner_prompt(SENTENCE, "disease", "list").instruction.split()) <= 20


def test_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="form must be one of list, medtuned, not 'xml'"):
        convert.ner_answer(SENTENCE, "xml")


def test_qa_record_holds_no_conclusion() -> None:
    question = read_pubmedqa(QUESTIONS)[0]
    record = convert.qa_record(question)
    assert record["input"] == "\n".join(question.contexts) + f"\nQuestion: {question.question}"
    assert question.long_answer not in str(record["input"])
    assert (record["output"], record["id"]) == (question.answer, "21645374")
    assert (record["category"], record["source"]) == ("qa", "pubmedqa")


def test_exclusion_and_orphans_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("x\tI\n\ny\tB\nz\tO\n\nx\tO\n")
    (tmp_path / "b.tsv").write_text("y\tO\nz\tO\n")  # compared by its tokens alone
    made = convert.convert_conll(tmp_path / "a.tsv", "disease", "list", [tmp_path / "b.tsv"])
    assert [r["id"] for r in made.records] == ["a-1", "a-3"]
    assert (made.excluded, made.orphans) == (1, 1)


def test_shipped_records_are_what_convert_makes_of_the_shipped_corpora(tmp_path: Path) -> None:
    ner = convert.convert_conll(TRAIN, "disease", "list", [TEST])
    qa = convert.convert_pubmedqa(QUESTIONS, [LABELS])
    assert (len(ner.records), ner.excluded, ner.orphans) == (5423, 1, 0)
    assert (len(qa.records), qa.excluded) == (500, 500)
    write_records(tmp_path / "a.jsonl", [*ner.records, *qa.records])
    # the texts are compared, since compressed bytes depend on the zlib that made them
    assert gzip.decompress(RECORDS.read_bytes()) == (tmp_path / "a.jsonl").read_bytes()


def test_shipped_records_hold_nothing_of_the_test_sets() -> None:
    records = read_records(RECORDS)
    sentences = {s.text() for s in read_conll(TEST)}
    labels = read_pubmedqa_labels(LABELS)
    tested = [q for q in read_pubmedqa(QUESTIONS) if q.id in labels]
    questions = {convert.qa_prompt(q).input for q in tested}
    # short sections are stock phrases, such as "Retrospective review."
    contexts = {context for q in tested for context in q.contexts if len(context) > 60}
    for record in records:
        assert record.input not in sentences
        assert record.input not in questions
        assert record.extra["id"] not in labels
        assert contexts.isdisjoint(record.input.split("\n"))
    assert {r.output for r in records if r.extra["category"] == "qa"} == {"yes", "no", "maybe"}
    assert all(r.output and r.instruction and r.input for r in records)


def test_notice_stands_beside_the_data() -> None:
    notice = (DEMO / "NOTICE").read_text()
    for name in (TRAIN, TEST, QUESTIONS, LABELS, RECORDS):
        assert name.name in notice
    assert "Permission is hereby granted" in notice and "Copyright (c) 2019 pubmedqa" in notice
