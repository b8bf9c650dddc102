"""From a model's text to candidate records, in both formats, and what is wrong with each.

`schema` answers are one JSON object {"tasks": [...]}; `list` answers go on with a numbered list of
`k. Instruction:`, `k. Input:`, `k. Output:`. A text cut off by the output cap is salvaged: whole
items count, the last one is marked. No item is passed over in silence.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Collection
from operator import itemgetter
from typing import Any, NamedTuple

from bioinstruct.synth.records import FIELDS
from bioinstruct.synth.totals import Text

_fields = itemgetter(*FIELDS)
_DECODER = json.JSONDecoder(strict=False)  # models leave line breaks in strings
_MARK = r"[ \t]*(?:[#*]+[ \t]*)?"
_ITEM = re.compile(rf"^{_MARK}\d+[.)]{_MARK}Instruction{_MARK}:{_MARK}", re.I | re.M)
_INPUT = re.compile(rf"^{_MARK}(?:\d+[.)])?{_MARK}Input{_MARK}:{_MARK}", re.I | re.M)
_OUTPUT = re.compile(rf"^{_MARK}(?:\d+[.)])?{_MARK}Output{_MARK}:{_MARK}", re.I | re.M)
_CATEGORY = re.compile(
    rf"^{_MARK}(?:\d+[.)])?{_MARK}Category{_MARK}:{_MARK}(?=\w+\s*\Z)", re.I | re.M
)
_REFUSAL = re.compile(
    r"^(?:i(?:'|\u2019)?m sorry|i am sorry|sorry,|i can(?:no|')?t |i(?:'| a)m (?:unable|not able)|"
    r"as an ai\b)",
    re.I,
)


def schema(categories: Collection[str] = ()) -> dict[str, Any]:
    """Return the JSON schema of an answer, in the endpoint's form; with the field `category`, one
    of categories, where there are some."""
    fields: dict[str, Any] = {field: {"type": "string"} for field in FIELDS}
    if categories:
        fields["category"] = {"type": "string", "enum": list(categories)}
    task = {"type": "object", "properties": fields, "required": list(fields)}
    tasks = {"type": "array", "items": task | {"additionalProperties": False}}
    whole = {"type": "object", "properties": {"tasks": tasks}, "required": ["tasks"]}
    named = {"name": "tasks", "strict": True, "schema": whole | {"additionalProperties": False}}
    return {"type": "json_schema", "json_schema": named}


class Candidate(NamedTuple):
    """An item of an answer that may become a record."""

    instruction: str
    input: str
    output: str
    problem: str = ""
    """What is wrong with it before any rule is asked: malformed, truncated, refusal, ..."""
    category: str = ""
    """What the model says it is, where it was asked."""


def candidates(text: Text, form: str) -> list[Candidate]:
    """Return every item of an answer, the broken ones marked; at least one.

    Args:
        text: what the model wrote.
        form: schema or list.
    """
    if text.finish == "content_filter" and not text.content.strip():
        return [Candidate("", "", "", "filtered")]
    if text.refusal or _REFUSAL.match(text.content.lstrip()):
        return [Candidate("", "", text.refusal or text.content, "refusal")]
    cut = text.finish == "length"
    found = _from_json(text.content, cut) if form == "schema" else _from_list(text.content, cut)
    return found or [Candidate("", "", text.content, "empty")]


def _from_json(content: str, cut: bool) -> list[Candidate]:
    """Read an object with tasks; from a broken text the first array, as far as it is whole."""
    with contextlib.suppress(ValueError, RecursionError):
        whole = _DECODER.decode(content)
        if isinstance(whole, dict) and isinstance(whole.get("tasks"), list):
            return [_from_value(value) for value in whole["tasks"]]
    at = content.find("[")
    if at < 0:
        return [Candidate("", "", content, "truncated" if cut else "malformed")]
    found, at = list[Candidate](), at + 1
    while True:
        at = _skipped(content, at)
        if content.startswith("]", at):
            return found
        try:
            value, at = _DECODER.raw_decode(content, at)
        except (ValueError, RecursionError):
            problem = "truncated" if cut or at >= len(content) else "malformed"
            return [*found, Candidate("", "", content[at:], problem)]
        found.append(_from_value(value))


def _skipped(content: str, at: int) -> int:
    while at < len(content) and content[at] in " \t\r\n,":
        at += 1
    return at


def _from_value(value: Any) -> Candidate:
    try:
        # of all that JSON holds only texts can be stripped
        given, shown, done = map(str.strip, _fields(value))
    except (KeyError, TypeError):
        return Candidate("", "", json.dumps(value), "malformed")
    category = value.get("category", "")
    if category.__class__ is not str:
        category = ""
    if not (given.isascii() and shown.isascii() and done.isascii() and category.isascii()):
        given, shown, done, category = map(_whole, (given, shown, done, category))
    return Candidate(given, shown, done, "" if given and done else "empty", category)


def _whole(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can carry and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _from_list(content: str, cut: bool) -> list[Candidate]:
    starts = [found.start() for found in _ITEM.finditer(content)]
    first = content[: starts[0]] if starts else content
    if _OUTPUT.search(first):  # the model went on right after the prompt's last number
        content, starts = f"0. Instruction: {content}", [0, *(s + 16 for s in starts)]
    found = [
        _from_item(content[start:end]) for start, end in itertools.pairwise([*starts, len(content)])
    ]
    if cut and found:
        found[-1] = found[-1]._replace(problem="truncated")
    return found


def _from_item(item: str) -> Candidate:
    head = _ITEM.match(item)
    given = _INPUT.search(item)
    answer = _OUTPUT.search(item, given.end() if given else 0)
    if head is None or given is None or answer is None:
        return Candidate("", "", item, "malformed")
    instruction = item[head.end() : given.start()]
    done, category = item[answer.end() :], ""
    if named := _CATEGORY.search(done):
        done, category = done[: named.start()], done[named.end() :].strip()
    shown, instruction, done = item[given.end() : answer.start()], instruction.strip(), done.strip()
    problem = "" if instruction and done else "empty"
    return Candidate(instruction, shown.strip(), done, problem, category)
