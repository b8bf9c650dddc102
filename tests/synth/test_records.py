"""Instruction records: what is read, what is refused and how it says so, what is written."""

import gzip
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bioinstruct.synth.records import SUFFIXES, Record, Turn, read_records, write_records

SAMPLE = Path(__file__).parents[1] / "data" / "bioinstruct_real_sample_32.json"
GOOD = {"instruction": "do", "input": "x", "output": "y"}
# no lone surrogates: they are no text
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ROW = st.fixed_dictionaries(
    {"instruction": TEXT, "input": TEXT, "output": TEXT},
    optional={"id": TEXT, "category": st.sampled_from(["qa", "ie"]), "n": st.integers()},
)


def _write(tmp_path: Path, text: str, name: str = "data.jsonl") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    return path


def _refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_records(path)
    return str(caught.value)


def test_reads_the_real_sample_with_true_lines() -> None:
    records = read_records(SAMPLE)
    assert len(records) == 32
    lines = SAMPLE.read_text(encoding="utf-8").split("\n")
    for record in records:
        assert lines[record.line - 1].strip() == "{"
        assert json.dumps(record.instruction, ensure_ascii=False) in lines[record.line]
    assert records[0].where == f"{SAMPLE}:2"


def test_input_may_be_missing_and_extras_are_kept(tmp_path: Path) -> None:
    path = _write(tmp_path, '{"output": "", "instruction": "do", "id": 7, "tags": ["a"]}')
    assert read_records(path) == [Record("do", "", "", {"id": 7, "tags": ["a"]}, str(path), 1)]


@given(rows=st.lists(ROW, min_size=1, max_size=5), suffix=st.sampled_from(SUFFIXES))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]], suffix: str
) -> None:
    path = tmp_path_factory.mktemp("records") / f"a{suffix}"
    assert write_records(path, rows) == len(rows)
    records = read_records(path)
    names = ("instruction", "input", "output")
    assert [{n: getattr(r, n) for n in names} | r.extra for r in records] == rows
    first = 1 if ".jsonl" in suffix else 2
    assert [r.line for r in records] == list(range(first, first + len(rows)))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_rows_give_equal_bytes(tmp_path: Path, suffix: str) -> None:
    one, two = tmp_path / f"one{suffix}", tmp_path / "deep" / f"two{suffix}"
    write_records(one, [GOOD] * 3)
    write_records(two, iter([GOOD] * 3))
    assert one.read_bytes() == two.read_bytes()
    if suffix.endswith(".gz"):
        assert one.read_bytes()[3:8] == bytes(5)  # no flag for a name, and no time


def test_no_rows_are_an_empty_file_or_an_empty_array(tmp_path: Path) -> None:
    assert write_records(tmp_path / "a.jsonl", []) == 0
    assert (tmp_path / "a.jsonl").read_text() == ""
    assert write_records(tmp_path / "a.json", []) == 0
    assert json.loads((tmp_path / "a.json").read_text()) == []


def test_text_is_written_as_it_is(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl", [{**GOOD, "output": "\u03b2\u2028\U0001f9ec"}])
    assert "\u03b2\u2028\U0001f9ec" in (tmp_path / "a.jsonl").read_text(encoding="utf-8")


def test_writing_refuses_to_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_records(path, [GOOD])
    with pytest.raises(ValueError, match="a.jsonl exists; .* --overwrite"):
        write_records(path, [GOOD, GOOD])
    assert len(read_records(path)) == 1
    assert write_records(path, [GOOD, GOOD], overwrite=True) == 2
    assert len(read_records(path)) == 2


@pytest.mark.parametrize("name", ["a", "a.csv", "a.gz", "a.jsonl.zip"])
def test_writing_refuses_other_suffixes(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="records are written to .jsonl, .json"):
        write_records(tmp_path / name, [GOOD])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("bad", [float("nan"), "\ud800"])
def test_a_row_that_is_no_json_leaves_nothing(tmp_path: Path, suffix: str, bad: object) -> None:
    with pytest.raises(ValueError):
        write_records(tmp_path / f"a{suffix}", [GOOD, {**GOOD, "output": bad}])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("[1]", "must be an object with the fields .*, not .1."),
        ("42", "must be an object .*, not 42"),
        ("null", "must be an object .*, not null"),
        ("{}", "'instruction' is missing .found no fields."),
        ('{"instruction":"a"}', "'output' is missing .found 'instruction'.$"),
        (
            '{"instruction":"a","ouput":"b"}',
            "'output' is missing .*; did you mean 'output' where it says 'ouput'",
        ),
        ('{"Instruction":"a","output":"b"}', "where it says 'Instruction'"),
        ('{"instruction":"a","output":7}', "'output' must be a string, not 7"),
        ('{"instruction":["a"],"output":"b"}', "'instruction' must be a string, not"),
        ('{"instruction":"a","input":null,"output":"b"}', "'input' must be a string, not null"),
        ('{"instruction":"a","output":"\\ud83d"}', "'output' holds half of a surrogate pair"),
        ('{"messages":[]}', r"'messages' must be a list of turns, not \[\]"),
        ('{"conversations":3}', "'conversations' must be a list of turns, not 3"),
        ('{"messages":["x"]}', "turn 1 must be an object with the texts 'role' and 'content'"),
        ('{"messages":[{"role":"user"}]}', "turn 1 must be an object"),
        ('{"messages":[{"role":"user","content":[]}]}', "turn 1 must be an object"),
        ('{"messages":[{"role":"bot","content":""}]}', "turn 1 has 'role' .bot.; allowed are 'sys"),
        ('{"messages":[{"role":[],"content":""}]}', "turn 1 has 'role'"),
        ('{"messages":[{"role":"user","content":"a"}]}', "the turns are user; user and assistant"),
        ('{"messages":[{"role":"system","content":"a"}]}', "there is no turn of the user's"),
        (
            '{"conversations":[{"from":"gpt","value":"a"},{"from":"human","value":"b"}]}',
            "the turns are assistant, user; user and assistant must alternate, from user on",
        ),
    ],
)
@pytest.mark.parametrize("layout", ["lines", "array"])
def test_bad_records_are_named(tmp_path: Path, record: str, message: str, layout: str) -> None:
    good = json.dumps(GOOD)
    text = f"{good}\n{record}\n" if layout == "lines" else f"[{good},\n{record}]"
    path = _write(tmp_path, text)
    with pytest.raises(ValueError, match=rf"data.jsonl:2: .*{message}"):
        read_records(path)


def test_a_long_value_is_shown_short(tmp_path: Path) -> None:
    message = _refusal(_write(tmp_path, json.dumps({**GOOD, "output": list(range(999))})))
    assert len(message) < len(str(tmp_path)) + 120


def test_five_bad_records_are_spelled_out_and_all_are_counted(tmp_path: Path) -> None:
    good, bad = json.dumps(GOOD), '{"instruction":"a"}'
    message = _refusal(_write(tmp_path, "\n".join([good, bad] * 7)))
    assert message.startswith("7 of 14 records are bad:\n")
    assert message.count("'output' is missing") == 5
    assert message.endswith("... and 2 more")
    assert "data.jsonl:2:" in message and "data.jsonl:10:" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("[]", "holds no records"),
        ("[[]]", "must be an object"),
        ('{"data": [{"instruction": "a", "output": "b"}]}', "'instruction' is missing"),
    ],
)
def test_files_without_records_are_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in _refusal(_write(tmp_path, text))


def test_reads_25_000_records_in_a_second(tmp_path: Path) -> None:
    # the size of BioInstruct; 0.2 s where nothing else runs
    path = tmp_path / "many.json"
    rows = [{**GOOD, "output": "word " * 80, "id": str(i)} for i in range(25_000)]
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    start_s = time.process_time()
    records = read_records(path)
    assert time.process_time() - start_s < 1.0
    assert records[-1].line == 2 + 6 * 24_999


def test_compressed_array_with_a_wrong_suffix(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps([GOOD]).encode()))
    assert read_records(path)[0].output == "y"


SAID = [("system", "be brief"), ("user", "hi"), ("assistant", "hello"), ("user", "why?")]


@pytest.mark.parametrize(
    ("field", "role", "text", "names"),
    [
        ("messages", "role", "content", {}),
        ("conversations", "from", "value", {"user": "human", "assistant": "gpt"}),
    ],
)
def test_conversations_are_read(
    tmp_path: Path, field: str, role: str, text: str, names: dict[str, str]
) -> None:
    turns = [{role: names.get(r, r), text: t} for r, t in [*SAID, ("assistant", "so")]]
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({field: turns, "id": 4}) + "\n")
    (record,) = read_records(path)
    history = tuple(Turn(*said) for said in SAID[:3])
    assert record == Record("why?", "", "so", {"id": 4}, str(path), 1, history)
    first, last = record.answers()
    assert last is record
    assert (first.instruction, first.output, first.history) == ("hi", "hello", history[:1])


def test_a_record_with_a_conversation_beside_it_stays_a_record(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"instruction": "a", "output": "b", "messages": 3}')
    (record,) = read_records(path)
    assert (record.history, record.extra) == ((), {"messages": 3})
    assert record.answers() == [record]
