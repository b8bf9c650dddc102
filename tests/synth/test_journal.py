"""The journal: what survives a kill, a full disk, a second process, a hand that edits."""

import json
import os
from pathlib import Path

import pytest

from bioinstruct.synth.journal import NAME, Journal
from bioinstruct.synth.money import Usage
from bioinstruct.synth.totals import Answer, read_totals

RAW = b'{"choices": [{"message": {"content": "a \\"raw\\": b"}}], "model": ",\\"raw\\":"}'
BODIES = (
    RAW,
    b'{"a":1}',
    b'{\n "a": 1}\n',
    b"\xff\x00junk\n",
    b"",
    '{"a": "\u00e9\u2028"}'.encode(),
)


def answer(key: str, raw: bytes = RAW, *, complete: bool = True) -> Answer:
    from bioinstruct.synth.endpoint import read_response

    made = read_response(key, 200, raw)
    usage = Usage(3, 4)
    return Answer(key, 200, raw, usage, ',"raw":', "fp", complete, made.text)


@pytest.mark.parametrize("raw", BODIES)
def test_responses_come_back_byte_for_byte(tmp_path: Path, raw: bytes) -> None:
    given = answer("k", raw)
    with Journal(tmp_path) as journal:
        journal.answer(journal.intent("k", 9), given, charged=5, seconds=1.0)
    for line in (tmp_path / NAME).read_bytes().splitlines():
        json.loads(line)
    totals = read_totals(tmp_path / NAME)
    assert totals.answers == {"k": given}
    assert (totals.spent, totals.received) == (5, 1)


def test_only_the_first_whole_answer_counts(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        for raw, complete in ((b'{"a":0}', False), (b'{"a":1}', True), (b'{"a":2}', True)):
            given = answer("k", raw, complete=complete)
            journal.answer(journal.intent("k", 9), given, charged=1, seconds=0.0)
    totals = read_totals(tmp_path / NAME)
    assert totals.answers["k"].raw == b'{"a":1}'
    assert (totals.charged, totals.failed, totals.received) == (3, 1, 2)


def test_what_was_never_answered_stays_charged(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.intent("a", 70)
        failed = journal.intent("b", 20)
        journal.failure(failed, "b", error="cut", charged=20, seconds=0.1)
        refused = journal.intent("c", 10)
        journal.failure(refused, "c", error="no connection", charged=0, seconds=0.1)
    with Journal(tmp_path) as journal:
        assert journal.totals.spent == 90
        assert journal.totals.open == {1: 70}
        assert journal.intent("d", 1) == 4


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_torn_tail_is_cut_off(tmp_path: Path, cut: int) -> None:
    with Journal(tmp_path) as journal:
        journal.intent("a", 1)
        journal.answer(journal.intent("b", 2), answer("b"), charged=2, seconds=0.0)
    path = tmp_path / NAME
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(whole[:-cut])
    assert read_totals(path).spent == 3  # reading alone passes it over
    with Journal(tmp_path) as journal:
        assert path.read_bytes() == b"".join(lines[:-1])
        assert journal.totals.spent == 3
        journal.intent("c", 5)
    assert read_totals(path).spent == 8


@pytest.mark.parametrize(
    "line", ["junk", "[]", "1", "{}", '{"type":"new"}', '{"type":"answer","attempt":7}', "\x00"]
)
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / NAME
    with Journal(tmp_path) as journal:
        journal.intent("a", 1)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"journal.jsonl:2: broken journal line .*from a copy"):
        Journal(tmp_path)
    path.write_text("")
    Journal(tmp_path).close()


def test_a_second_holder_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path), pytest.raises(ValueError, match="another process is working on"):
        Journal(tmp_path)
    Journal(tmp_path).close()


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    with Journal(tmp_path) as journal:
        journal.intent("a", 1)
        monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:10]))
        with pytest.raises(OSError, match="No space left"):
            journal.intent("b", 2)
        monkeypatch.undo()
        journal.intent("c", 4)
    assert read_totals(tmp_path / NAME).spent == 5
