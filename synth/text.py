"""Text and JSON files as users have them: plain or gzip, with or without a BOM, one record a line
or one array, and every mistake in them named by file, line and column.

Kind and layout are decided by content, never by the suffix. JSON is walked value by value with the
decoder's own `raw_decode`, so that the line of each element is true in a pretty-printed array too.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

GZIP_MAGIC = b"\x1f\x8b"
_SPACE = re.compile(r"[ \t\r\n]*")


class Located(NamedTuple):
    """A JSON value and the line it begins in, counted from 1."""

    line: int
    value: object


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, plain or gzip; a byte order mark is taken off.

    Raises:
        ValueError: the file is empty, no UTF-8, or a damaged gzip file.
        OSError: the file cannot be opened.
    """
    data = path.read_bytes()
    if data.startswith(GZIP_MAGIC):
        try:
            data = gzip.decompress(data)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{path} is a damaged or cut-off gzip file ({error}); copy it again"
            ) from error
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}); "
            "pass a text file, or convert its encoding to UTF-8"
        ) from error
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def read_json(path: Path) -> object:
    """Return the one JSON value that a file holds.

    Raises:
        ValueError: as for read_text; broken JSON; something after the value.
        OSError: the file cannot be opened.
    """
    text = read_text(path)
    value, at = _decode(text, _skip(text, 0), path)
    _refuse_rest(text, at, path)
    return value


def json_values(path: Path) -> Iterator[Located]:
    """Yield the elements of a JSON array, or the values of a JSON-lines file, with their lines.

    Raises:
        ValueError: as for read_text; broken JSON, with line and column.
        OSError: the file cannot be opened.
    """
    text = read_text(path)
    at = _skip(text, 0)
    in_array = text[at] == "["
    if in_array:
        at = _skip(text, at + 1)
        if text.startswith("]", at):
            return _refuse_rest(text, at + 1, path)
    line, counted = 1, 0
    while at < len(text) or in_array:
        line, counted = line + text.count("\n", counted, at), at
        value, at = _decode(text, at, path)
        yield Located(line, value)
        at = _skip(text, at)
        if in_array and text.startswith("]", at):
            return _refuse_rest(text, at + 1, path)
        if in_array and not text.startswith(",", at):
            raise _broken(path, json.JSONDecodeError("expecting ',' or ']'", text, at))
        at = _skip(text, at + 1) if in_array else at
    return None


def shown(value: object, limit: int = 40) -> str:
    """Return a value as JSON, cut to about limit characters, for an error message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None  # the pattern matches the empty string
    return found.end()


def _decode(text: str, at: int, path: Path) -> tuple[object, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        start = text.count("\n", 0, at) + 1
        raise _broken(path, error, start) from error
    except (ValueError, RecursionError) as error:  # a doubled field, a huge number, deep nesting
        line = text.count("\n", 0, at) + 1
        raise ValueError(f"{path}:{line}: the JSON value that begins here: {error}") from error


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} stands twice in one object; keep one of them")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _refuse_rest(text: str, at: int, path: Path) -> None:
    at = _skip(text, at)
    if at < len(text):
        raise _broken(path, json.JSONDecodeError("something follows the end", text, at))


def _broken(path: Path, error: json.JSONDecodeError, start: int | None = None) -> ValueError:
    """Word a decoding error; start is the line where the broken value begins, where one does."""
    rest = error.doc[error.pos : error.pos + 30].split("\n")[0]
    seen = f" at {rest!r}" if rest else " at the end of the file" if _at_end(error) else ""
    begun = (
        f" (in the value that begins in line {start})" if start not in (None, error.lineno) else ""
    )
    place = f"{path}:{error.lineno}:{error.colno}"
    return ValueError(f"{place}: broken JSON: {error.msg}{seen}{begun}")


def _at_end(error: json.JSONDecodeError) -> bool:
    return error.pos >= len(error.doc.rstrip())
