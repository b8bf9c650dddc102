"""The key-value header of a GGUF file, read in a fraction of a second.

A GGUF file opens with `"GGUF"`, a version (uint32), the number of tensors and the number of
metadata entries (uint64 each); then the entries, each a name, a type number and a value; then the
tensors. Everything is little-endian; a text is its length in bytes (uint64) and UTF-8; an array is
its element type, its length and the elements. The `gguf` package builds a view for each of the
100,000 texts of a vocabulary, which takes seconds; this reader walks the mapped file once.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import re
import struct
from pathlib import Path

MAGIC = b"GGUF"
VERSIONS = (2, 3)
TEXT, ARRAY = 8, 9
NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
MAX_DEPTH = 4  # arrays of arrays occur, deeper nesting is a sign of junk

_UINT64 = struct.Struct("<Q")
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def gguf_parts(path: Path) -> list[Path]:
    """Return the files of a model, by the name of one: NAME-00001-of-00003.gguf and so on."""
    found = _PART.fullmatch(path.name)
    if found is None:
        return [path]
    name, _, count = found.groups()
    return [
        path.with_name(f"{name}-{number:05d}-of-{count}.gguf")
        for number in range(1, int(count) + 1)
    ]


def read_metadata(path: Path) -> dict[str, object]:
    """Read the metadata entries of a GGUF file; the tensors are not touched.

    Args:
        path: the file.

    Returns:
        Name -> value: bool, int, float, str, or a list of these.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no GGUF file, of an unknown version, cut short or damaged.
    """
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError(f"{path} is not a GGUF file: it does not begin with the bytes 'GGUF'")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _entries(data, path)
            except (struct.error, IndexError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"{path} is a damaged or incomplete GGUF file: its header breaks off or holds "
                    f"junk ({error}); fetch it again"
                ) from error


def _entries(data: mmap.mmap, path: Path) -> dict[str, object]:
    version, _, count = struct.unpack_from("<IQQ", data, 4)
    if version not in VERSIONS:
        raise ValueError(
            f"{path} is GGUF version {version}; versions 2 and 3, little-endian, can be read"
        )
    entries: dict[str, object] = {}
    offset = 24
    for _ in range(count):
        (name,), offset = _texts(data, offset, 1)
        (kind,) = struct.unpack_from("<I", data, offset)
        entries[name], offset = _value(data, offset + 4, kind, 0)
    return entries


def _value(data: mmap.mmap, offset: int, kind: int, depth: int) -> tuple[object, int]:
    """The value of the given type at offset, and the offset behind it."""
    if kind != ARRAY:
        values, offset = _values(data, offset, kind, 1)
        return values[0], offset
    if depth >= MAX_DEPTH:
        raise IndexError(f"arrays nested more than {MAX_DEPTH} deep")
    inner, count = struct.unpack_from("<IQ", data, offset)
    offset += 12
    if inner != ARRAY:
        return _values(data, offset, inner, count)
    # an array takes 12 bytes at least, so a greater count is junk and would run for ever
    _need(data, offset, 12 * count)
    arrays = []
    for _ in range(count):
        array, offset = _value(data, offset, inner, depth + 1)
        arrays.append(array)
    return arrays, offset


def _values(data: mmap.mmap, offset: int, kind: int, count: int) -> tuple[list[object], int]:
    if kind == TEXT:
        texts, offset = _texts(data, offset, count)
        return list(texts), offset
    if kind not in NUMBERS:
        raise IndexError(f"unknown value type {kind}")
    size = struct.calcsize(NUMBERS[kind]) * count
    _need(data, offset, size)
    return list(struct.unpack_from(f"<{count}{NUMBERS[kind]}", data, offset)), offset + size


def _texts(data: mmap.mmap, offset: int, count: int) -> tuple[list[str], int]:
    _need(data, offset, 8 * count)
    texts = []
    for _ in range(count):
        (length,) = _UINT64.unpack_from(data, offset)
        start, offset = offset + 8, offset + 8 + length
        _need(data, start, length)
        texts.append(data[start:offset].decode("utf-8"))
    return texts, offset


def _need(data: mmap.mmap, offset: int, size: int) -> None:
    # slices of a mapped file come back short without an error
    if offset + size > len(data):
        raise IndexError(f"{size} bytes wanted at byte {offset} of {len(data)}")
