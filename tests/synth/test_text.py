"""Files as users have them: encodings, compression, JSON layouts, and every way to be broken."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bioinstruct.synth.text import json_values, read_json, read_text, shown

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def _file(tmp_path: Path, data: bytes, name: str = "a.json") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("data", [b"caf\xc3\xa9", b"\xef\xbb\xbfcaf\xc3\xa9"], ids=["plain", "bom"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.gz"])
def test_reads_by_content_not_by_suffix(
    tmp_path: Path, data: bytes, packed: bool, name: str
) -> None:
    path = _file(tmp_path, gzip.compress(data) if packed else data, name)
    assert read_text(path) == "caf\u00e9"


def test_reads_joined_gzip_files(tmp_path: Path) -> None:
    assert read_text(_file(tmp_path, gzip.compress(b"a\n") + gzip.compress(b"b\n"))) == "a\nb\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (gzip.compress(b""), "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"ok \xff\xfe", r"not UTF-8 text \(byte 3 is 0xff\)"),
        ("utf-16".encode("utf-16"), r"not UTF-8 text \(byte 0 is 0xff\)"),
        (gzip.compress(b"\x80"), r"not UTF-8 text \(byte 0 is 0x80\)"),
        (gzip.compress(b"abc" * 99)[:-9], "damaged or cut-off gzip"),
        (gzip.compress(b"abc" * 99)[:12], "damaged or cut-off gzip"),
        (b"\x1f\x8bjunk that is no gzip file", "damaged or cut-off gzip"),
        (gzip.compress(b"abc") + b"tail", "damaged or cut-off gzip"),
    ],
)
def test_refuses_what_is_no_text(tmp_path: Path, data: bytes, message: str) -> None:
    path = _file(tmp_path, data)
    with pytest.raises(ValueError, match=f"a.json .*{message}|a.json {message}"):
        read_text(path)


def test_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_text(tmp_path / "nowhere.json")
    with pytest.raises(IsADirectoryError):
        read_text(tmp_path)


@given(st.lists(VALUES, max_size=5), st.sampled_from([None, 0, 2]))
def test_walk_gives_what_json_loads_gives(
    tmp_path_factory: pytest.TempPathFactory, values: list[object], indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("walk") / "a.json"
    path.write_text(json.dumps(values, indent=indent), encoding="utf-8")
    assert [value for _, value in json_values(path)] == values
    assert read_json(path) == values
    objects = [{"value": value} for value in values]
    path.write_text("x" if not objects else "\n".join(map(json.dumps, objects)), encoding="utf-8")
    if objects:
        assert [value for _, value in json_values(path)] == objects


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('{"a":1}\n{"a":2}\n', [1, 2]),
        ('\n\n{"a":1}\r\n\r\n{"a":2}', [3, 5]),
        ('[\n {"a":\n1},\n\n {"a":2}\n]\n', [2, 5]),
        ('[{"a":1},{"a":2}]', [1, 1]),
        ('{"a":"\u2028\u0085"}\n{"a":2}', [1, 2]),
        ("[]", []),
        (" [ ] ", []),
    ],
)
def test_lines_are_true(tmp_path: Path, text: str, lines: list[int]) -> None:
    path = _file(tmp_path, text.encode())
    assert [line for line, _ in json_values(path)] == lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":1}\n{"a":}\n', "a.json:2:6: broken JSON: Expecting value at '}'"),
        ('{"a":1}\n{"a":1', "a.json:2:7: broken JSON: .* at the end of the file"),
        ('[{"a":1},\n', "a.json:.*broken JSON: Expecting value"),
        ('[{"a":1},]', "a.json:1:10: broken JSON: Expecting value at ']'"),
        ('[{"a":1}\n{"a":2}]', "a.json:2:1: broken JSON: expecting ',' or ']'"),
        ('[{"a":1}]\n[2]', "a.json:2:1: broken JSON: something follows the end"),
        ("[] 1", "a.json:1:4: broken JSON: something follows the end"),
        ('{"a":1},\n{"a":2}', "a.json:1:8: broken JSON: Expecting value at ','"),
        ('{"a":"line\nbreak"}', "a.json:1:11: broken JSON: Invalid control character"),
        (
            "instruction,output\n",
            "a.json:1:1: broken JSON: Expecting value at 'instruction,output'",
        ),
        ('{"a":1}\n{"b":1,"b":2}', "a.json:2: .*field 'b' stands twice"),
        ("\n" + "[" * 100_000, "a.json:2: .*recursion"),
        ('{"a":' + "9" * 5000 + "}", "a.json:1: .*Exceeds the limit"),
        ("\x00\x01", "a.json:1:1: broken JSON"),
    ],
)
def test_broken_json_is_placed(tmp_path: Path, text: str, message: str) -> None:
    path = _file(tmp_path, text.encode())
    with pytest.raises(ValueError, match=message):
        list(json_values(path))


def test_read_json_takes_one_value(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a.json:2:1: broken JSON: something follows the end"):
        read_json(_file(tmp_path, b'{"a":1}\n{"a":2}'))


def test_shown_is_short() -> None:
    assert shown([1, "b"]) == '[1, "b"]'
    assert len(shown("x" * 999)) == 40
    assert shown("x" * 999).endswith("...")
