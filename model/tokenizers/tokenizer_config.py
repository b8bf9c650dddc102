"""What tokenizer_config.json says beside a tokenizer: which tokens begin and end a sequence.

A tokenizer's own file holds the pieces; whether a sequence begins with BOS, which token ends it,
and which control tokens a chat fine-tune has added behind the vocabulary often stand only here.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from bioinstruct.model.fields import Fields

NAME = "tokenizer_config.json"
FILES = (
    "tokenizer.model",
    "tokenizer.json",
    NAME,
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
"""What makes a folder of weights whole."""


class Declared(NamedTuple):
    """The settings of a tokenizer_config.json; None where it says nothing."""

    adds_bos: bool | None
    bos: str | None
    eos: str | None
    added: dict[str, int]
    """Name -> id of every added token, control tokens mostly."""


def read_declared(folder: Path) -> Declared:
    """Read tokenizer_config.json in a folder; without the file nothing is declared.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON, or an entry is of the wrong type.
    """
    path = folder / NAME
    if not path.is_file():
        return Declared(None, None, None, {})
    fields = Fields(read_json(path), str(path))
    return Declared(
        adds_bos=fields.boolean("add_bos_token") if fields.has("add_bos_token") else None,
        bos=_token(fields, "bos_token"),
        eos=_token(fields, "eos_token"),
        added=_added(fields),
    )


def read_json(path: Path) -> object:
    """Read a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON; the message names the line and the column.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text, so not valid JSON") from None


def _token(fields: Fields, key: str) -> str | None:
    """A token is written as its name, or as an object whose `content` is the name."""
    if not fields.has(key):
        return None
    if isinstance(fields.mapping[key], dict):
        return Fields(fields.mapping[key], f"{fields.source}: {key}").text("content")
    return fields.text(key)


def _added(fields: Fields) -> dict[str, int]:
    added = {}
    if fields.has("added_tokens_decoder"):
        source = f"{fields.source}: added_tokens_decoder"
        for key, entry in Fields(fields.mapping["added_tokens_decoder"], source).mapping.items():
            if not key.isdecimal() or len(key) > 7:
                raise ValueError(f"{source}: {key!r} is not a token id")
            added[Fields(entry, f"{source}: {key}").text("content")] = int(key)
    return added


def copy_tokenizer(source: Path, out: Path) -> list[Path]:
    """Copy the files of a tokenizer beside the weights, so that the folder is whole."""
    copied = []
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
            copied.append(out / name)
    return copied
