"""The cache of tokens: same tokens, right key, several processes, kills at any moment."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bioinstruct.model import Llm
from bioinstruct.model.templates import get_template
from bioinstruct.train.data import token_cache
from bioinstruct.train.data.token_cache import load_tokens
from bioinstruct.train.data.tokens import Limits, TokenSet

LIMITS = Limits(max_tokens=400, on_empty="error", on_overlong="error")


@pytest.fixture
def records_file(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    rows = [
        {"instruction": f"Say {i}", "input": "", "output": f"word {i}", "category": "ab"[i % 2]}
        for i in range(9)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(stories: Llm, path: Path, name: str = "bioinstruct", limits: Limits = LIMITS) -> TokenSet:
    template = get_template(name, stories.tokenizer)
    return load_tokens(path, template, stories.tokenizer, limits)


def entries(tmp_path: Path) -> list[Path]:
    return [p for p in (tmp_path / "cache" / "tokens").iterdir() if p.is_dir()]


def assert_equal(a: TokenSet, b: TokenSet) -> None:
    for name in ("files", "starts", "sizes", "prompts"):
        assert np.array_equal(getattr(a, name), getattr(b, name))
    assert all(np.array_equal(x, y) for x, y in zip(a.arrays, b.arrays, strict=True))
    for name in ("sources", "categories"):
        own, other = getattr(a, name), getattr(b, name)
        assert own.names == other.names
        assert np.array_equal(own.ids, other.ids)
    assert a.places == b.places


def test_the_cache_gives_the_same_tokens(
    stories: Llm, records_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(stories, records_file)
    monkeypatch.setattr(token_cache, "read_records", lambda path: 1 / 0)
    again = load(stories, records_file)
    assert_equal(first, again)
    assert isinstance(again.arrays[0], np.memmap)
    assert first.sources.names == (str(records_file),)
    assert first.categories.names == ("a", "b")


def test_equal_bytes_under_another_name_are_named_by_it(
    stories: Llm, records_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(stories, records_file)
    other = records_file.with_name("other.jsonl")
    other.write_bytes(records_file.read_bytes())
    monkeypatch.setattr(token_cache, "read_records", lambda path: 1 / 0)
    tokens = load(stories, other)
    assert tokens.places[0] == f"{other}:1"
    assert tokens.sources.names == (str(other),)


def test_the_cache_sees_changed_bytes_and_templates_and_needs_no_limits(
    stories: Llm, records_file: Path, tmp_path: Path
) -> None:
    load(stories, records_file)
    load(stories, records_file, name="medtuned")
    load(stories, records_file, limits=Limits(399, "error", "error"))
    assert len(entries(tmp_path)) == 2
    records_file.write_text(records_file.read_text().replace("word 3", "word 33"))
    changed = load(stories, records_file)
    assert "33" in stories.tokenizer.decode(changed.sample(3)[0].tolist())
    assert len(entries(tmp_path)) == 3


def test_what_was_reported_is_reported_again_from_the_cache(
    stories: Llm, records_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = '{"instruction": "a", "input": "", "output": ""}\n' * 2
    records_file.write_text(empty + '{"instruction": "a", "input": "", "output": "b"}\n')
    for _ in range(2):
        load(stories, records_file, limits=Limits(400, "drop", "error"))
        assert "2 records with an empty output" in capsys.readouterr().err


WORKER = """
import sys, time
from pathlib import Path
from bioinstruct.model.templates import get_template
from bioinstruct.model.tokenizers.tokenizer import load_tokenizer
from bioinstruct.train.data import token_cache
from bioinstruct.train.data.tokens import Limits

slow, path, words = float(sys.argv[1]), Path(sys.argv[2]), load_tokenizer(Path(sys.argv[3]))
inner, store = token_cache.encode_all, token_cache._flush

def encode(*args):
    print("encoding", flush=True)
    return inner(*args)

def flush(file):
    store(file)
    print("wrote", flush=True)
    time.sleep(slow)

token_cache.encode_all, token_cache._flush = encode, flush
found = token_cache.load_tokens(
    path, get_template("bioinstruct", words), words, Limits(400, "error", "error")
)
print(len(found), int(found.arrays[0].sum()), flush=True)
"""


def start(stories: Llm, path: Path, slow: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WORKER, str(slow), str(path), str(stories.tokenizer.source)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_processes_at_once_tokenize_once_and_read_the_same(
    stories: Llm, records_file: Path, tmp_path: Path
) -> None:
    processes = [start(stories, records_file, 0.05) for _ in range(3)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert sum(out.count("encoding") for out, _ in outputs) == 1
    assert len({out.splitlines()[-1] for out, _ in outputs}) == 1
    assert len(entries(tmp_path)) == 1


def test_a_killed_writer_leaves_nothing_broken(
    stories: Llm, records_file: Path, tmp_path: Path
) -> None:
    process = start(stories, records_file, 60.0)
    assert process.stdout is not None
    assert [process.stdout.readline().strip() for _ in range(2)] == ["encoding", "wrote"]
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    left = entries(tmp_path)
    assert [path.name.startswith(".writing-") for path in left] == [True]
    began = time.monotonic()
    tokens = load(stories, records_file)
    assert time.monotonic() - began < 30  # its lock ended with it
    assert len(tokens) == 9
    assert [path.name.startswith(".writing-") for path in entries(tmp_path)] == [False]
    assert_equal(tokens, load(stories, records_file))


def test_without_locks_the_faster_process_wins(
    stories: Llm, records_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(file: object, how: int) -> None:
        raise OSError("this file system has no locks")

    monkeypatch.setattr(token_cache.fcntl, "flock", none)
    inner = token_cache.encode_all

    def meanwhile(*args: object) -> object:
        monkeypatch.setattr(token_cache, "encode_all", inner)
        load(stories, records_file)
        return inner(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(token_cache, "encode_all", meanwhile)
    assert len(load(stories, records_file)) == 9
