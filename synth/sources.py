"""Readers of labelled corpora in the form their authors publish them.

CoNLL: one `token<TAB>tag` a line, a blank line between sentences, `-DOCSTART-` lines skipped.
A tag is O, or B or I with or without a type (`B-Disease`). Mentions are read as the CoNLL
evaluation script reads them: a B begins one, and so does an I that continues nothing of its type.

PubMedQA (Jin et al., EMNLP-IJCNLP 2019): one JSON object, keyed by PubMed id.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from bioinstruct.synth.text import read_json, read_text, shown

TAG = re.compile(r"O|[BI](-\S+)?")
ANSWERS = ("yes", "no", "maybe")


class Span(NamedTuple):
    """A mention: tokens start to end (exclusive), and its type, "" where tags have none."""

    start: int
    end: int
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence of a CoNLL file; tokens and tags are equally long, no token has white space."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...]
    file: str
    line: int
    """The line of its first token."""
    number: int
    """Its place among the file's sentences, counted from 1."""

    @property
    def spans(self) -> list[Span]:
        """The mentions in order of appearance."""
        return find_spans(self.tags)

    @property
    def orphans(self) -> int:
        """How many mentions begin with I instead of B."""
        return sum(self.tags[span.start].startswith("I") for span in self.spans)

    def text(self, start: int = 0, end: int | None = None) -> str:
        """The tokens from start to end, joined by single spaces."""
        return " ".join(self.tokens[start:end])


@dataclass(frozen=True, slots=True)
class Question:
    """A PubMedQA record: a question, the abstract without its conclusion, and the answer."""

    id: str
    question: str
    contexts: tuple[str, ...]
    labels: tuple[str, ...]
    """The abstract's section names, one a context."""
    long_answer: str
    answer: str
    """yes, no or maybe."""


def find_spans(tags: Sequence[str]) -> list[Span]:
    """Return the mentions of a tag sequence, as conlleval and seqeval's default mode find them.

    Args:
        tags: each O, or B or I with or without a type after a hyphen.
    """
    spans: list[Span] = []
    start, kind = -1, ""
    for i, tag in enumerate((*tags, "O")):
        prefix, _, its_kind = tag.partition("-")
        if start >= 0 and (prefix != "I" or its_kind != kind):
            spans.append(Span(start, i, kind))
            start = -1
        if prefix != "O" and start < 0:
            start, kind = i, its_kind
    return spans


def read_conll(path: Path) -> list[Sentence]:
    """Read the sentences of a CoNLL file, plain or gzip, columns parted by a tab or by spaces.

    Raises:
        ValueError: a line has not two columns, a tag is unknown, or there is no sentence.
        OSError: the file cannot be opened.
    """
    sentences: list[Sentence] = []
    for block in _blocks(read_text(path)):
        pairs = [_columns(line, f"{path}:{number}") for number, line in block]
        tokens, tags = zip(*pairs, strict=True)
        sentences.append(Sentence(tokens, tags, str(path), block[0][0], len(sentences) + 1))
    if not sentences:
        raise ValueError(f"{path} holds no sentences")
    return sentences


def keep_entity(sentences: Sequence[Sentence], entity: str) -> list[Sentence]:
    """Return the sentences with mentions of one type only; the other types' tags become O.

    Args:
        entity: a type of the file, in any case, "_" as good as a space. Where tags have no type
            it is not compared with anything.

    Raises:
        ValueError: tags have types and none of them is the wanted one.
    """
    kinds = {span.kind for sentence in sentences for span in sentence.spans}
    kept = {kind for kind in kinds if not kind or _plain(kind) == _plain(entity)}
    if kinds and not kept:
        raise ValueError(
            f"{sentences[0].file} tags no {entity!r}, only {', '.join(sorted(kinds))}; "
            "name one of these as --entity"
        )
    if kept == kinds:
        return list(sentences)
    return [
        replace(s, tags=tuple(t if t.partition("-")[2] in kept else "O" for t in s.tags))
        for s in sentences
    ]


def read_pubmedqa(path: Path) -> list[Question]:
    """Read the expert-labelled questions (`ori_pqal.json`, plain or gzip), in file order.

    Raises:
        ValueError: broken JSON, or a record without a field or with a wrong value, by its id.
        OSError: the file cannot be opened.
    """
    return [_question(str(path), key, value) for key, value in _keyed(path).items()]


def read_pubmedqa_labels(path: Path) -> dict[str, str]:
    """Read `test_ground_truth.json`: the answer of each official test id.

    Raises:
        ValueError: it is no object of yes, no and maybe.
        OSError: the file cannot be opened.
    """
    return {key: _answer(f"{path}: id {key}", value) for key, value in _keyed(path).items()}


def _blocks(text: str) -> Iterator[list[tuple[int, str]]]:
    """Yield runs of lines that are not blank, each line with its number."""
    block: list[tuple[int, str]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.startswith("-DOCSTART-"):
            block.append((number, line.rstrip("\r")))
        elif block:
            yield block
            block = []
    if block:
        yield block


def _columns(line: str, where: str) -> tuple[str, str]:
    columns = line.split("\t") if "\t" in line else line.split()
    if len(columns) != 2:
        raise ValueError(
            f"{where}: {len(columns)} columns where two are needed, token and tag: {shown(line)}"
        )
    token, tag = columns[0], columns[1].strip()
    if not token or token.split() != [token]:
        raise ValueError(f"{where}: a token must be text without white space, not {token!r}")
    if not TAG.fullmatch(tag):
        raise ValueError(f"{where}: tag {tag!r} must be O, B or I, or a typed one like B-Disease")
    return token, tag


def _plain(kind: str) -> str:
    return kind.replace("_", " ").lower()


def _keyed(path: Path) -> dict[str, object]:
    value = read_json(path)
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{path} must be a JSON object keyed by PubMed id, not {shown(value)}")
    return value


def _question(file: str, key: str, value: object) -> Question:
    where = f"{file}: id {key}"
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a question must be an object, not {shown(value)}")
    names = ("QUESTION", "CONTEXTS", "LABELS", "LONG_ANSWER", "final_decision")
    missing = [name for name in names if name not in value]
    if missing:
        raise ValueError(f"{where}: {missing[0]!r} is missing (found {', '.join(value)})")
    return Question(
        id=key,
        question=_text(where, "QUESTION", value["QUESTION"]),
        contexts=_texts(where, "CONTEXTS", value["CONTEXTS"]),
        labels=_texts(where, "LABELS", value["LABELS"]),
        long_answer=_text(where, "LONG_ANSWER", value["LONG_ANSWER"]),
        answer=_answer(where, value["final_decision"]),
    )


def _text(where: str, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name!r} must be a string, not {shown(value)}")
    return value


def _texts(where: str, name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {name!r} must be a list of strings, not {shown(value)}")
    return tuple(_text(where, name, part) for part in value)


def _answer(where: str, value: object) -> str:
    if not isinstance(value, str) or value not in ANSWERS:
        raise ValueError(f"{where}: the answer must be yes, no or maybe, not {shown(value)}")
    return value
