"""Labelled corpora to instruction records, and the prompts of the evaluation with them.

Training records and test prompts come out of the same functions, so they cannot drift apart.
Named entities have two answer forms: `list`, the mentions in order of appearance, one a line, or
`none` (short: what the demo trains on); and `medtuned`, one `token : TAG` line a token with TAG in
B, I, O (Rohanian et al., Artif Intell Med 158:103007, 2024; the wording here is our own).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bioinstruct.synth.sources import (
    Question,
    Sentence,
    keep_entity,
    read_conll,
    read_pubmedqa,
    read_pubmedqa_labels,
)

NER_FORMS = ("list", "medtuned")
NOTHING = "none"  # the answer of form `list` to a sentence without mentions


class Prompt(NamedTuple):
    """What a model is asked: the two fields that a template renders."""

    instruction: str
    input: str


class Converted(NamedTuple):
    """Records made from a corpus, and what happened on the way."""

    records: list[dict[str, object]]
    excluded: int
    """Records left out because --exclude names them."""
    orphans: int
    """Mentions of the corpus that begin with I; read as mentions."""


def ner_prompt(sentence: Sentence, entity: str, form: str) -> Prompt:
    """Return the prompt that asks for the mentions of one entity type.

    Args:
        entity: its name in the singular, for example disease.
        form: list or medtuned.
    """
    if _known(form) == "list":
        ask = (
            f"List the {entity} mentions of the sentence in order, one per line. "
            f"If there is none, write {NOTHING}."
        )
    else:
        ask = (
            "Copy the sentence token by token, one `token : tag` per line. The tag is B at the "
            f"first token of each {entity} mention, I at its other tokens, and O elsewhere."
        )
    return Prompt(ask, sentence.text())


def ner_answer(sentence: Sentence, form: str) -> str:
    """Return the gold answer to ner_prompt."""
    if _known(form) == "list":
        return "\n".join(sentence.text(s.start, s.end) for s in sentence.spans) or NOTHING
    tags = ["O"] * len(sentence.tokens)
    for start, end, _ in sentence.spans:
        tags[start:end] = ["B", *["I"] * (end - start - 1)]
    return "\n".join(f"{t} : {tag}" for t, tag in zip(sentence.tokens, tags, strict=True))


def qa_prompt(question: Question) -> Prompt:
    """Return the prompt that shows an abstract and asks its question."""
    ask = "Answer the question from the abstract with exactly one word: yes, no or maybe."
    return Prompt(ask, "\n".join((*question.contexts, f"Question: {question.question}")))


def ner_record(sentence: Sentence, entity: str, form: str) -> dict[str, object]:
    """Return a sentence as an instruction record; its id is the file's name and its number."""
    source = _stem(sentence.file)
    return _record(
        ner_prompt(sentence, entity, form),
        ner_answer(sentence, form),
        category="ie",
        source=source,
        key=f"{source}-{sentence.number}",
    )


def qa_record(question: Question) -> dict[str, object]:
    """Return a question as an instruction record; its id is the PubMed id."""
    prompt = qa_prompt(question)
    return _record(prompt, question.answer, category="qa", source="pubmedqa", key=question.id)


def convert_conll(path: Path, entity: str, form: str, exclude: Sequence[Path] = ()) -> Converted:
    """Convert a CoNLL file, without the sentences that stand in the excluded CoNLL files.

    Args:
        entity: a type of the file; mentions of other types are not asked for.
        form: list or medtuned.
        exclude: files whose sentences, compared token by token, are left out.

    Raises:
        ValueError: a file is malformed, or the type is not in it.
        OSError: a file cannot be opened.
    """
    known = {s.tokens for file in exclude for s in read_conll(file)}
    sentences = keep_entity(read_conll(path), entity)
    kept = [s for s in sentences if s.tokens not in known]
    records = [ner_record(s, entity, form) for s in kept]
    return Converted(records, len(sentences) - len(kept), sum(s.orphans for s in kept))


def convert_pubmedqa(path: Path, exclude: Sequence[Path] = ()) -> Converted:
    """Convert PubMedQA, without the ids that the excluded label files name.

    Raises:
        ValueError: a file is malformed.
        OSError: a file cannot be opened.
    """
    known = {key for file in exclude for key in read_pubmedqa_labels(file)}
    questions = read_pubmedqa(path)
    records = [qa_record(q) for q in questions if q.id not in known]
    return Converted(records, len(questions) - len(records), 0)


def _known(form: str) -> str:
    if form not in NER_FORMS:
        raise ValueError(f"form must be one of {', '.join(NER_FORMS)}, not {form!r}")
    return form


def _stem(file: str) -> str:
    return Path(file).name.split(".")[0]


def _record(
    prompt: Prompt, output: str, *, category: str, source: str, key: str
) -> dict[str, object]:
    return {**prompt._asdict(), "output": output, "category": category, "source": source, "id": key}
