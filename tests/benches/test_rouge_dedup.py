"""The near-copy bench: its corpus is what it says, and wrong decisions are never timed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bioinstruct.benches import rouge_dedup
from bioinstruct.benches.rouge_dedup import (
    Bigrams,
    dropped_by_pairs,
    dropped_by_rapidfuzz,
    dropped_by_us,
    make_texts,
    measure,
)
from bioinstruct.synth.records import read_records
from bioinstruct.synth.rouge import rouge_words

SAMPLE = Path(__file__).parents[1] / "data" / "bioinstruct_real_sample_32.json"


def test_words_follow_each_other_as_in_the_sentences() -> None:
    sentences = [rouge_words(r.instruction) for r in read_records(SAMPLE)]
    follow = {pair for s in sentences for pair in zip(s, s[1:], strict=False)}
    start, end = {s[0] for s in sentences}, {s[-1] for s in sentences}
    for text in Bigrams(sentences).texts(200, np.random.default_rng(0)):
        assert text[0] in start
        for one, two in zip(text, text[1:], strict=False):
            assert (one, two) in follow or (one in end and two in start)


def test_corpus_has_its_length_and_copies_and_hangs_on_the_seed() -> None:
    texts = make_texts(SAMPLE, 3000, 0)
    assert texts == make_texts(SAMPLE, 3000, 0) != make_texts(SAMPLE, 3000, 1)
    assert 18 < np.mean([len(text.split()) for text in texts]) < 22
    # copies of copies and chance neighbours come on top of the planted ones
    assert 0.1 < np.mean(dropped_by_us(texts)) < 0.5


def test_all_decide_alike() -> None:
    texts = make_texts(SAMPLE, 400, 2)
    assert dropped_by_us(texts) == dropped_by_pairs(texts)
    pytest.importorskip("rapidfuzz", reason="the bench's rival is not installed")
    assert dropped_by_us(texts) == dropped_by_rapidfuzz(texts)


def test_one_text_at_a_time_decides_the_same() -> None:
    done = run("--texts", "500", "--stream", "--data", str(SAMPLE))
    assert done.returncode == 0, done.stderr
    dropped = dropped_by_us(make_texts(SAMPLE, 500, 0))
    assert json.loads(done.stdout)["dropped"] == sum(dropped)


def test_wrong_decisions_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rouge_dedup, "dropped_by_us", lambda texts: [False] * len(texts))
    with pytest.raises(ValueError, match=r"\d+ of 300 decisions differ from those by every pair"):
        measure(SAMPLE, 400, 0, 0)


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, rouge_dedup.__file__, *options]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_the_line() -> None:
    done = run("--texts", "500", "--rapidfuzz", "0", "--data", str(SAMPLE))
    assert done.returncode == 0, done.stderr
    row: dict[str, Any] = json.loads(done.stdout)
    dropped = dropped_by_us(make_texts(SAMPLE, 500, 0))
    assert (row["bench"], row["texts"], row["dropped"]) == ("rouge_dedup", 500, sum(dropped))
    assert row["seconds"] > 0 and row["peak_rss_bytes"] > 1e7 and row["versions"]["numpy"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--texts", "0"], 2, "0 is not in the range"),
        (["--data", "nowhere.json", "--rapidfuzz", "0"], 1, "No such file or directory"),
    ],
)
def test_wrong_use_is_one_sentence(options: list[str], code: int, message: str) -> None:
    done = run(*options)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr and "Traceback" not in done.stderr
