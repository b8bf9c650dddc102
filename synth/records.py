"""Instruction records in Alpaca's form: reading them strictly, writing them reproducibly.

A record is an object `{"instruction", "input", "output"}`; `input` may be missing, and any other
field (category, source, id, ...) is carried along. Conversations are read too:

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}   ShareGPT

each with a system text first, if any, and then user and assistant in turn, the assistant last. The
last two turns are the record's instruction and output, what stands before is its history.

A file is one JSON array or one object a line, plain or gzip; the reader decides by content, the
writer by suffix.
"""

import difflib
import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from bioinstruct.synth.files import replaces
from bioinstruct.synth.text import json_values, shown

FIELDS = ("instruction", "input", "output")
CHAT_FIELDS = ("messages", "conversations")
BAD_SHOWN = 5  # bad records spelled out in one message
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


class Turn(NamedTuple):
    """What one side of a conversation said."""

    role: str
    """system | user | assistant."""
    text: str


@dataclass(frozen=True, slots=True)
class Record:
    """One instruction record and where it stands."""

    instruction: str
    input: str
    output: str
    extra: dict[str, object]
    """Every other field of the object, as read."""
    file: str
    line: int
    """Where the object begins, counted from 1."""
    history: tuple[Turn, ...] = ()
    """What was said before, in a conversation."""

    @property
    def where(self) -> str:
        """The record's place as file:line."""
        return f"{self.file}:{self.line}"

    def answers(self) -> list["Record"]:
        """Return a record for each of the assistant's turns, what was said before as its history.

        A record without history is the only one.
        """
        places = [i for i, turn in enumerate(self.history) if turn.role == "assistant"]
        earlier = [
            replace(
                self,
                instruction=self.history[i - 1].text,
                input="",
                output=self.history[i].text,
                history=self.history[: i - 1],
            )
            for i in places
        ]
        return [*earlier, self]


def read_records(path: Path) -> list[Record]:
    """Read every record of a file; an empty output is no error here.

    Args:
        path: a JSON array or JSON lines, plain or gzip, UTF-8.

    Returns:
        At least one record, in file order; a conversation is one record.

    Raises:
        ValueError: the file is empty, binary, cut off or broken JSON, or records in it lack a
            field or have a wrong type; up to five of those are spelled out, all are counted.
        OSError: the file cannot be opened.
    """
    records: list[Record] = []
    bad: list[str] = []
    for line, value in json_values(path):
        chat = _chat_field(value)
        if problem := _chat_problem(value, chat) if chat else _problem(value):
            bad.append(f"{path}:{line}: {problem}")
        elif chat and isinstance(value, dict):
            *history, user, assistant = _turns(value[chat], chat)
            extra = {k: v for k, v in value.items() if k not in (*FIELDS, chat)}
            texts = (user.text, "", assistant.text)
            records.append(Record(*texts, extra, str(path), line, tuple(history)))
        elif isinstance(value, dict):
            extra = {k: v for k, v in value.items() if k not in FIELDS}
            text = (value["instruction"], value.get("input", ""), value["output"])
            records.append(Record(*text, extra, str(path), line))
    if bad:
        raise ValueError(_summary(bad, len(bad) + len(records)))
    if not records:
        raise ValueError(f"{path} holds no records")
    return records


def write_records(
    path: Path, rows: Iterable[Mapping[str, object]], *, overwrite: bool = False
) -> int:
    """Write records, whole or not at all; equal rows give equal bytes, compressed ones too.

    Args:
        path: ends in .jsonl (one object a line) or .json (one array), with or without .gz.
        rows: the objects, written in the given order.
        overwrite: whether an existing file may be replaced.

    Returns:
        How many rows were written.

    Raises:
        ValueError: the suffix is another one, the file exists, or a row is no JSON.
        OSError: the file cannot be written.
    """
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: records are written to {', '.join(SUFFIXES)}; name the file so")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another name or pass --overwrite")
    as_array = ".jsonl" not in path.suffixes
    with replaces(path) as temporary, temporary.open("wb") as raw:
        if not path.name.endswith(".gz"):
            return _write(raw, rows, as_array)
        # no name and no time in the header, so that the bytes depend on the rows alone
        with gzip.GzipFile("", "wb", compresslevel=9, fileobj=raw, mtime=0) as packed:
            return _write(packed, rows, as_array)


def _write(
    file: BinaryIO | gzip.GzipFile, rows: Iterable[Mapping[str, object]], as_array: bool
) -> int:
    count = 0
    before, after = ("[\n", "]\n") if as_array else ("", "")
    for row in rows:
        text = json.dumps(dict(row), ensure_ascii=False, allow_nan=False)
        file.write(f"{before}{text}".encode())
        before = ",\n" if as_array else "\n"
        count += 1
    end = "\n" if count else before
    file.write(f"{end}{after}".encode())
    return count


def _problem(value: object) -> str | None:
    """Return what is wrong with one value as a record, or None."""
    if not isinstance(value, dict):
        return f"a record must be an object with the fields {_names(FIELDS)}, not {shown(value)}"
    for name in ("instruction", "output"):
        if name not in value:
            return _missing(name, list(value))
    for name in FIELDS:
        text = value.get(name, "")
        if not isinstance(text, str):
            return f"{name!r} must be a string, not {shown(text)}"
        if not text.isascii() and not _encodable(text):
            return f"{name!r} holds half of a surrogate pair (\\ud800 to \\udfff); mend it"
    return None


def _missing(name: str, found: list[str]) -> str:
    near = difflib.get_close_matches(name, [f for f in found if f not in FIELDS], 1)
    hint = f"; did you mean {name!r} where it says {near[0]!r}?" if near else ""
    return f"field {name!r} is missing (found {_names(found) or 'no fields'}){hint}"


# chat field -> the keys of a turn's role and text, and the roles by the names they have there
_CHAT = {
    "messages": ("role", "content", {r: r for r in ("system", "user", "assistant")}),
    "conversations": (
        "from",
        "value",
        {
            "system": "system",
            "human": "user",
            "user": "user",
            "gpt": "assistant",
            "assistant": "assistant",
        },
    ),
}


def _chat_field(value: object) -> str | None:
    """The field that makes a value a conversation, unless it is a plain record too."""
    if not isinstance(value, dict) or {"instruction", "output"} & value.keys():
        return None
    return next((field for field in CHAT_FIELDS if field in value), None)


def _turns(turns: list[dict[str, str]], chat: str) -> list[Turn]:
    role, text, names = _CHAT[chat]
    return [Turn(names[turn[role]], turn[text]) for turn in turns]


def _chat_problem(value: object, chat: str) -> str | None:
    """Return what is wrong with one value as a conversation, or None."""
    turns = value[chat] if isinstance(value, dict) else None
    if not isinstance(turns, list) or not turns:
        return f"{chat!r} must be a list of turns, not {shown(turns)}"
    role, text, names = _CHAT[chat]
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get(text), str):
            return f"turn {number} must be an object with the texts {role!r} and {text!r}"
        said_by = turn.get(role)
        if not isinstance(said_by, str) or said_by not in names:
            return f"turn {number} has {role!r} {shown(said_by)}; allowed are {_names(names)}"
        if not _encodable(turn[text]):
            return f"turn {number} holds half of a surrogate pair (\\ud800 to \\udfff); mend it"
    roles = [names[turn[role]] for turn in turns]
    said = roles[1:] if roles[0] == "system" else roles
    if said[::2] != ["user"] * (len(said) // 2) or said[1::2] != ["assistant"] * (len(said) // 2):
        return f"the turns are {', '.join(roles)}; user and assistant must alternate, from user on"
    return None if said else "there is no turn of the user's"


def _encodable(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _summary(bad: list[str], total: int) -> str:
    if len(bad) == 1:
        return bad[0]
    rest = f"\n  ... and {len(bad) - BAD_SHOWN} more" if len(bad) > BAD_SHOWN else ""
    return f"{len(bad)} of {total} records are bad:\n  " + "\n  ".join(bad[:BAD_SHOWN]) + rest


def _names(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
