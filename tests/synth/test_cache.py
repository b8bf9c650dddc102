"""Answers that runs share: free, the same records, safe for several processes."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bioinstruct.synth import batch, generate
from bioinstruct.synth.batching import Batching
from bioinstruct.synth.cache import Cache
from bioinstruct.synth.endpoint import read_response
from bioinstruct.synth.generation import Result
from bioinstruct.synth.pace import Limits
from bioinstruct.synth.report import status
from bioinstruct.synth.totals import read_totals

Make = Callable[..., Result]
RAW = b'{"choices": [{"message": {"content": "a"}}], "usage": {}}'


@pytest.fixture
def options(local: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return local | {"n": 150, "batch_factor": 0.5, "cache": tmp_path / "cache"}


@pytest.fixture
def make(options: dict[str, Any]) -> Make:
    return lambda **settings: generate(**options | settings)


def test_what_one_run_bought_is_free_for_another(make: Make, server: Any, tmp_path: Path) -> None:
    paid = make(n=150)
    sent = len(server.seen)
    free = make(out=tmp_path / "other", budget=0.0)
    assert len(server.seen) == sent
    assert (free.charged_usd, free.cached) == (0.0, free.requests)
    assert paid.cached == 0
    one, other = (tmp_path / name / "records.jsonl" for name in ("run", "other"))
    assert one.read_bytes() == other.read_bytes()
    assert f"({free.requests} from the cache)" in status(tmp_path / "other")
    assert f"({free.requests} from the cache)" in (tmp_path / "other" / "card.md").read_text()


def test_only_what_is_missing_is_bought(make: Make, server: Any, tmp_path: Path) -> None:
    make(n=60, limits=Limits(concurrency=1))
    first = len(server.seen)
    result = make(out=tmp_path / "other")
    assert max(server.bought().values()) == 1
    assert result.cached == first
    assert read_totals(tmp_path / "other" / "journal.jsonl").attempts == len(server.seen)
    make(out=tmp_path / "third", cache=None, limits=Limits(concurrency=1))  # off unless asked
    assert max(server.bought().values()) == 2
    one, other = (tmp_path / name / "records.jsonl" for name in ("other", "third"))
    assert one.read_bytes() == other.read_bytes()


def test_batches_share_it_too(
    make: Make, server: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    pytest.importorskip("openai")
    make(n=60, limits=Limits(concurrency=1))
    bought = len(server.seen)
    options |= {"out": tmp_path / "batched"}
    result = batch(Batching(poll_s=0.02, tail=0), **options)
    assert result.cached == bought
    assert max(server.bought().values()) == 1
    again = make(out=tmp_path / "third", budget=0.0)
    assert again.charged_usd == 0
    assert again.records == result.records


def test_two_runs_at_once(make: Make, server: Any, tmp_path: Path) -> None:
    server.behaviour.latency_s = 0.02
    other = threading.Thread(target=make, kwargs={"out": tmp_path / "other"})
    other.start()
    make()
    other.join()
    one, two = (tmp_path / name / "records.jsonl" for name in ("run", "other"))
    assert one.read_bytes() == two.read_bytes()
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".json"]


@pytest.mark.parametrize("raw", [RAW, RAW + b"\n", b'{"error": {"code": "content_filter"}}'])
def test_answers_come_back_as_they_were(tmp_path: Path, raw: bytes) -> None:
    status = 400 if b"error" in raw else 200
    answer = read_response("ab" * 32, status, raw)
    Cache(tmp_path).put(answer)
    got = Cache(tmp_path).get("ab" * 32)
    assert got == answer
    assert got is not None and got.cached
    assert Cache(tmp_path).get("cd" * 32) is None


def test_a_broken_file_is_named(tmp_path: Path, make: Make) -> None:
    cache, key = Cache(tmp_path), "ab" * 32
    cache.put(read_response(key, 200, RAW))
    (path,) = tmp_path.rglob("*.json")
    whole = path.read_bytes()
    for broken in (b"", whole[:-9], b"[]", whole.replace(b"abab", b"cdcd", 1)):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"{key}.json: broken answer .* remove the file"):
            cache.get(key)


def test_a_cache_that_cannot_be_written_stops_the_run(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--cache needs a folder, and .*file is a file"):
        make(cache=tmp_path / "file" / "cache")
