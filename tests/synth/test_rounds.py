"""Rotation, quotas and facets: what rounds depend on, and that nothing else changes the records."""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bioinstruct.synth import batch, generate
from bioinstruct.synth.batching import Batching
from bioinstruct.synth.generation import Result
from bioinstruct.synth.pace import Limits
from bioinstruct.synth.plan import Plan, Settings
from bioinstruct.synth.prompting import NEW, read_prompt
from bioinstruct.synth.questions import ROUND, rotated, wanted_tasks
from bioinstruct.synth.seeds import COUNTS

Make = Callable[..., Result]
SHARES = {"qa": 0.225, "ie": 0.3375, "gen": 0.3375, "other": 0.1}
# three tasks an answer, so that 64 requests make a round of some 150 records
ROUNDS = {"rotate": 2, "quotas": "paper", "facets": "topic"}


@pytest.fixture
def options(local: dict[str, Any], server: Any) -> dict[str, Any]:
    """Runs with the installed seeds, for nothing."""
    server.behaviour.tasks = 3
    free = {"price_in": 0.0, "price_out": 0.0, "budget": None}
    return local | free | {"n": 400, "seeds": None, "max_tokens": 2000}


@pytest.fixture
def make(options: dict[str, Any]) -> Make:
    return lambda **settings: generate(**options | settings)


def test_a_rotated_request_shows_records_of_earlier_rounds(make: Make, tmp_path: Path) -> None:
    records = make(rotate=2).records
    made_in = {r["id"]: r["provenance"]["request"] // ROUND for r in records}
    assert max(made_in.values()) >= 2
    for record in records:
        provenance = record["provenance"]
        rounds = [made_in[name] for name in provenance["seeds"] if name in made_in]
        assert len(rounds) == (2 if provenance["request"] >= ROUND else 0)
        assert len(set(provenance["seeds"])) == 3
        assert all(earlier < provenance["request"] // ROUND for earlier in rounds)


def test_rotated_records_stand_in_the_prompt(make: Make, server: Any) -> None:
    records = {r["id"]: r for r in make(rotate=1).records}
    bodies = [body["messages"][0]["content"] for body in server.bodies]
    last = list(records.values())[-1]["provenance"]
    shown = [records[name] for name in last["seeds"] if name in records]
    assert len(shown) == 1
    assert any(json.dumps(shown[0]["instruction"], ensure_ascii=False) in b for b in bodies)


def test_quotas_are_kept(make: Make, server: Any) -> None:
    result = make(quotas="paper")
    counts = Counter(r["category"] for r in result.records)
    for name, share in SHARES.items():
        assert abs(counts[name] - share * 400) <= NEW
    assert result.funnel["quota"] > 0  # the server asks for no category in particular
    enum = server.bodies[0]["response_format"]["json_schema"]["schema"]["properties"]["tasks"]
    assert enum["items"]["properties"]["category"]["enum"] == list(COUNTS)


def test_a_model_that_ignores_the_quotas_stops_the_run(make: Make, server: Any) -> None:
    server.behaviour.categories = ("qa", "gen", "none of these")
    with pytest.raises(ValueError, match=r"64 answers in a row.*category.*no quota has room"):
        make(quotas="qa=0.5,ie=0.3,gen=0.2")


def test_quotas_in_lists(make: Make, server: Any) -> None:
    server.behaviour.form = "list"
    result = make(n=60, quotas="paper", format="list")
    assert {r["category"] for r in result.records} <= set(COUNTS)
    assert not any("Category" in r["output"] for r in result.records)
    assert "Category: " in server.bodies[0]["messages"][0]["content"].partition("List of")[2]


def test_facets_are_asked_for(make: Make, server: Any) -> None:
    records = make(n=60, facets="topic,difficulty").records
    asked = {
        found[0]
        for body in server.bodies
        if (found := re.findall(r"in common: (.*)\.$", body["messages"][0]["content"], re.M))
    }
    for record in records:
        facets = record["provenance"]["facets"]
        assert f"topic: {facets['topic']}, difficulty: {facets['difficulty']}" in asked
    assert len(asked) > 10


@pytest.mark.parametrize("concurrency", [1, 200])
def test_concurrency_changes_no_byte(make: Make, tmp_path: Path, concurrency: int) -> None:
    make(out=tmp_path / "a", **ROUNDS)
    make(out=tmp_path / "b", **ROUNDS, limits=Limits(concurrency=concurrency))
    one, other = (tmp_path / name / "records.jsonl" for name in "ab")
    assert one.read_bytes() == other.read_bytes()


def test_kills_and_batches_change_no_byte(
    make: Make, server: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    make(out=tmp_path / "once", **ROUNDS)
    same = (tmp_path / "once" / "records.jsonl").read_bytes()
    batch(Batching(poll_s=0.02), **options | ROUNDS | {"out": tmp_path / "b", "batch_factor": 1})
    assert (tmp_path / "b" / "records.jsonl").read_bytes() == same
    args = ["generate", "--out", tmp_path / "run", "--n", 400, "--model", "local", "--rotate", 2]
    args += ["--quotas", "paper", "--facets", "topic", "--max-tokens", 2000, "--price-in", 0]
    args += ["--price-out", 0, "--base-url", server.url]
    line = [sys.executable, "-m", "bioinstruct.synth.cli", *map(str, args)]
    server.seen.clear()
    server.behaviour.latency_s = 0.01
    for kill in range(1, 4):
        process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
        while len(server.seen) < 40 * kill and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.wait()
    make(out=tmp_path / "run", **ROUNDS)
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == same


def test_a_larger_n_extends(make: Make, tmp_path: Path) -> None:
    make(n=100, **ROUNDS)
    before = (tmp_path / "run" / "records.jsonl").read_bytes()
    make(n=300, **ROUNDS)
    after = (tmp_path / "run" / "records.jsonl").read_bytes()
    assert after.startswith(before)
    make(out=tmp_path / "once", n=300, **ROUNDS)
    assert (tmp_path / "once" / "records.jsonl").read_bytes() == after


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rotate": 1}, "begun with rotate = 2"),
        ({"quotas": ""}, "begun with quotas"),
        ({"facets": "task"}, "begun with facets"),
    ],
)
def test_what_decides_the_requests_is_fixed(make: Make, change: dict[str, Any], said: str) -> None:
    make(n=20, **ROUNDS)
    with pytest.raises(ValueError, match=said):
        make(n=30, **ROUNDS | change)


def test_replay_needs_the_same_rules(make: Make, options: dict[str, Any]) -> None:
    from bioinstruct.synth.generation import replay

    made = make(n=200, **ROUNDS).records
    assert replay(Plan(Settings(**options | ROUNDS | {"n": 200}))).records == made
    with pytest.raises(ValueError, match="with rotate or quotas the requests depend on"):
        replay(Plan(Settings(**options | ROUNDS | {"n": 200, "rules": "none"})))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rotate": 3}, "rotate must lie in 0 to 2"),
        ({"quotas": "qa=0.5"}, "must be shares that add up to 1"),
        ({"quotas": "qa=0.5,xy=0.5"}, "must be shares"),
        ({"quotas": "qa=-1,ie=2"}, "must be shares"),
        ({"quotas": "qa"}, "must be shares"),
        ({"facets": "colour"}, "no seed has a facet 'colour'; the installed ones have topic"),
    ],
)
def test_wrong_settings(make: Make, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(**settings)


def test_own_seeds_and_prompts_must_allow_it(make: Make, seeds: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"seeds.jsonl:1: with quotas every seed needs"):
        make(seeds=seeds, quotas="paper")
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Go on:\n{seeds}")
    with pytest.raises(ValueError, match=r"prompt.txt: with quotas or facets .* \{also\}"):
        make(prompt=prompt, facets="topic")


def test_nothing_asked_leaves_no_trace_in_the_prompt(make: Make, server: Any) -> None:
    make(n=10)
    text = server.bodies[0]["messages"][0]["content"]
    assert text.startswith(read_prompt(None, "schema").partition("{n}")[0])
    assert "where that is needed.\n\nThe first 3 tasks" in text
    assert "category" not in json.dumps(server.bodies[0]["response_format"])


@given(st.integers(0, 99), st.integers(0, 500), st.integers(0, 2), st.integers(0, 40))
def test_rotation_draws_different_records(seed: int, index: int, rotate: int, size: int) -> None:
    drawn = rotated(seed, index, rotate, range(size))
    assert len(set(drawn)) == len(drawn) == (rotate if size >= rotate else 0)
    assert all(0 <= k < size for k in drawn)


@given(st.dictionaries(st.sampled_from(list(COUNTS)), st.integers(0, 400)))
def test_a_round_asks_for_what_is_missing(have: dict[str, int]) -> None:
    pool = [{"category": name} for name, count in have.items() for _ in range(count)]
    asked: Counter[str] = Counter()
    for place in range(ROUND):
        wanted = wanted_tasks(SHARES, pool, place)
        assert sum(wanted.values()) == NEW
        asked.update(wanted)
    after = len(pool) + ROUND * NEW * 0.85
    lacks = {name: max(share * after - have.get(name, 0), 0) for name, share in SHARES.items()}
    for name, lack in lacks.items():
        assert asked[name] == pytest.approx(ROUND * NEW * lack / sum(lacks.values()), abs=5)
