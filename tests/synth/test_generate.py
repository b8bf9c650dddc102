"""`generate` against a local server: what it makes, what it costs, what stops it."""

import asyncio
import json
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bioinstruct.synth import generate
from bioinstruct.synth.console import Stopped
from bioinstruct.synth.generation import Result
from bioinstruct.synth.money import PICO
from bioinstruct.synth.pace import Limits
from bioinstruct.synth.records import read_records
from bioinstruct.synth.report import status
from bioinstruct.synth.totals import read_totals

PRICE_IN, PRICE_OUT = 1.0, 2.0
Make = Callable[..., Result]


@pytest.fixture
def make(local: dict[str, Any]) -> Make:
    """Call generate with the local server, prices and a folder, unless told otherwise."""
    given = local | {"n": 100, "limits": Limits(concurrency=16, timeout_s=30)}
    return lambda **settings: generate(**given | settings)


def command(server: Any, seeds: Path, out: Path, *more: object) -> list[str]:
    args = ["generate", "--out", out, "--model", "local", "--base-url", server.url]
    args += ["--seeds", seeds, "--price-in", PRICE_IN, "--price-out", PRICE_OUT, *more]
    return [sys.executable, "-m", "bioinstruct.synth.cli", *map(str, args)]


def billed(server: Any) -> float:
    return server.bill(PRICE_IN, PRICE_OUT)


def test_a_run_from_end_to_end(make: Make, server: Any, tmp_path: Path) -> None:
    result = make()
    out = tmp_path / "run"
    records = read_records(out / "records.jsonl")
    assert len(records) == len(result.records) == 100
    assert result.funnel["kept"] == 100
    assert {"rouge", "too-short", "keyword"} <= set(result.funnel)
    assert result.charged_usd == pytest.approx(billed(server), abs=1e-12)
    assert len({r.instruction for r in records}) == 100
    assert sorted(path.name for path in out.iterdir()) == [
        "card.md",
        "journal.jsonl",
        "records.jsonl",
        "run.toml",
    ]
    assert "100 instruction records" in (out / "card.md").read_text()
    assert tomllib.loads((out / "run.toml").read_text())["fixed"]["rules"] == "paper"
    told = status(out)
    assert "100 of 100 (done)" in told
    assert "100 kept" in told


def test_provenance_is_true(make: Make, server: Any, tmp_path: Path) -> None:
    records = make(n=40).records
    keys = read_totals(tmp_path / "run" / "journal.jsonl").answers
    by_name = {f"s{i}" for i in range(12)} | {r["id"] for r in records}
    for record in records:
        provenance = record["provenance"]
        items = json.loads(
            json.loads(keys[provenance["key"]].raw)["choices"][0]["message"]["content"]
        )["tasks"]
        assert items[provenance["item"]]["instruction"] == record["instruction"]
        assert len(set(provenance["seeds"])) == 3
        assert provenance["nearest"]["id"] in by_name
        assert 0 < provenance["nearest"]["rouge_l"] < 0.7


@pytest.mark.parametrize("concurrency", [1, 3, 200])
def test_concurrency_changes_no_byte(make: Make, tmp_path: Path, concurrency: int) -> None:
    make(out=tmp_path / "a")
    make(out=tmp_path / "b", limits=Limits(concurrency=concurrency))
    one, other = (tmp_path / name / "records.jsonl" for name in "ab")
    assert one.read_bytes() == other.read_bytes()


def test_faults_change_no_byte(make: Make, server: Any, tmp_path: Path) -> None:
    make(out=tmp_path / "a")
    faults = dict.fromkeys(("429", "429-bare", "500", "cut", "malformed", "no-usage"), 0.05)
    server.behaviour.faults = faults
    make(out=tmp_path / "b")
    assert {s.fault for s in server.seen} > {"", "429", "500", "cut"} or len(server.seen) < 60
    one, other = (tmp_path / name / "records.jsonl" for name in "ab")
    assert one.read_bytes() == other.read_bytes()
    assert server.early == 0


def test_a_finished_run_sends_nothing(make: Make, server: Any, tmp_path: Path) -> None:
    make()
    sent = len(server.seen)
    before = (tmp_path / "run" / "records.jsonl").read_bytes()
    make(base_url="https://nowhere.invalid/v1")  # no key either: neither is needed
    assert len(server.seen) == sent
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == before


def test_a_larger_n_extends(make: Make, server: Any, tmp_path: Path) -> None:
    make(n=50)
    before = (tmp_path / "run" / "records.jsonl").read_bytes()
    make(n=120)
    after = (tmp_path / "run" / "records.jsonl").read_bytes()
    assert after.startswith(before)
    assert max(server.bought().values()) == 1
    make(out=tmp_path / "once", n=120)
    assert (tmp_path / "once" / "records.jsonl").read_bytes() == after


def test_a_smaller_n_is_refused(make: Make) -> None:
    make(n=50)
    with pytest.raises(ValueError, match="holds 50 records already; ask for 50 or more"):
        make(n=49)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "other"),
        ("seed", 1),
        ("rules", "alpaca"),
        ("rouge", 0.6),
        ("format", "list"),
        ("temperature", 0.5),
        ("max_tokens", 2048),
    ],
)
def test_what_is_fixed_may_not_change(make: Make, server: Any, field: str, value: object) -> None:
    make(n=20)
    sent = len(server.seen)
    name = "sampling" if field in ("temperature", "max_tokens") else field
    with pytest.raises(ValueError, match=f"was begun with {name} = .* choose another --out"):
        make(n=30, **{field: value})
    assert len(server.seen) == sent


def test_other_seeds_or_prompts_are_refused(make: Make, seeds: Path, tmp_path: Path) -> None:
    make(n=20)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Tasks:\n{seeds}\n")
    with pytest.raises(ValueError, match="begun with prompt"):
        make(n=30, prompt=prompt)
    seeds.write_text("".join(seeds.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(ValueError, match="begun with seeds"):
        make(n=30)


def test_list_format_and_salvage(make: Make, server: Any) -> None:
    server.behaviour.form = "list"
    assert len(make(format="list", max_tokens=400).records) == 100
    assert {s.status for s in server.seen} == {200}
    assert all("response_format" not in body for body in server.bodies)


def test_cut_json_keeps_its_whole_items(make: Make) -> None:
    result = make(max_tokens=300)
    assert len(result.records) == 100
    assert result.funnel["truncated"] >= result.requests - 1


@pytest.mark.parametrize("concurrency", [1, 64])
@pytest.mark.parametrize("faults", [{}, {"cut": 0.1, "no-usage": 0.1, "500": 0.1, "429": 0.05}])
def test_the_bill_never_passes_the_budget(
    make: Make, server: Any, concurrency: int, faults: dict[str, float], tmp_path: Path
) -> None:
    server.behaviour.faults = faults
    limits = Limits(concurrency=concurrency)
    for budget in (0.05, 0.05, 0.10):
        with pytest.raises(Stopped, match=r"budget of \$0.* raise it with --budget"):
            make(n=1000, budget=budget, limits=limits)
        assert billed(server) <= budget
        assert read_totals(tmp_path / "run" / "journal.jsonl").spent <= budget * PICO
    assert not (tmp_path / "run" / "records.jsonl").exists()
    server.behaviour.faults = {}
    make(n=60, budget=3.0, limits=limits)
    assert max(server.bought().values()) == 1 or faults


def test_a_stopped_run_ends_at_what_it_has(make: Make, server: Any) -> None:
    with pytest.raises(Stopped, match=r"choose --n (\d+)") as caught:
        make(n=1000, budget=0.05)
    have = int(str(caught.value).rsplit(" ", 1)[1])
    sent = len(server.seen)
    assert len(make(n=have, budget=0.05).records) == have
    assert len(server.seen) == sent


def test_a_bill_above_its_reservation_aborts(make: Make, server: Any) -> None:
    server.behaviour.usage_extra = 50_000
    with pytest.raises(ValueError, match="does not keep to the output cap"):
        make()


def test_no_price_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="no price is known for 'local'"):
        make(price_in=None, price_out=None)
    with pytest.raises(ValueError, match="both or neither"):
        make(price_in=None)


def test_the_default_cap_is_twice_the_estimate(make: Make, server: Any, tmp_path: Path) -> None:
    server.behaviour.words = 200
    with pytest.raises(Stopped, match="raise it"):
        make(n=500, budget=None)
    assert billed(server) < 0.2


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ((401, {"message": "bad key"}), "refuses the key .*bad key"),
        ((403, {"message": "no"}), "refuses the key"),
        ((429, {"message": "pay", "code": "insufficient_quota"}), "no credit left"),
        ((402, {"message": "pay"}), "no credit left"),
        ((404, {"message": "no model"}), "knows no model 'local'"),
        ((400, {"message": "response_format"}), "pass --format list"),
        ((307, {"message": "elsewhere"}), "refuses the request"),
    ],
)
def test_what_no_retry_can_mend_stops_at_once(
    make: Make, server: Any, error: tuple[int, dict[str, str]], said: str
) -> None:
    server.behaviour.error = error
    with pytest.raises(ValueError, match=said):
        make()
    assert len(server.seen) <= 16
    server.behaviour.error = None
    assert len(make(n=20).records) == 20


def test_format_may_change_before_the_first_answer(make: Make, server: Any) -> None:
    server.behaviour.error = (400, {"message": "no schema here"})
    with pytest.raises(ValueError, match="--format list"):
        make()
    server.behaviour.error, server.behaviour.form = None, "list"
    assert len(make(n=20, format="list").records) == 20


def test_a_filtered_request_counts_as_answered(make: Make, server: Any) -> None:
    server.behaviour.error = (400, {"message": "filtered", "code": "content_filter"})
    with pytest.raises(ValueError, match="nothing was kept of 64 answers .*64 filtered"):
        make()


@pytest.mark.parametrize("content", ["", "hello", "I'm sorry, I can't help.", '{"tasks": []}'])
def test_useless_answers_end_the_run(make: Make, server: Any, content: str) -> None:
    server.behaviour.content = content or " "
    with pytest.raises(ValueError, match="nothing was kept of 64 answers in a row"):
        make()


def test_an_endpoint_that_always_fails(make: Make, server: Any) -> None:
    server.behaviour.faults = {"429": 1.0}
    server.behaviour.retry_after = "0.01"
    with pytest.raises(ValueError, match="3 failures in a row, the last: HTTP 429: slow down"):
        make(limits=Limits(concurrency=4, max_failures=3))


def test_retry_after_is_kept(make: Make, server: Any) -> None:
    server.behaviour.faults, server.behaviour.retry_after = {"429": 0.4}, "0.3"
    make(n=400, limits=Limits(concurrency=8, max_failures=1000))
    assert sum(s.status == 429 for s in server.seen) > 2
    assert server.early == 0


@pytest.mark.parametrize("by_header", [False, True])
def test_a_limit_of_requests_is_used_and_not_passed(
    make: Make, server: Any, by_header: bool
) -> None:
    server.behaviour.headers = {"x-ratelimit-limit-requests": "1200"} if by_header else {}
    make(n=500, limits=Limits(concurrency=2, rpm=None if by_header else 1200))
    times = [seen.time_s for seen in server.seen]
    # a busy machine may be late; the bench asks for 90 % of the limit
    assert 0.5 * 20 <= (len(times) - 1) / (times[-1] - times[0]) <= 1.1 * 20


def test_timeouts_are_charged(make: Make, server: Any, tmp_path: Path) -> None:
    server.behaviour.faults, server.behaviour.slow_s = {"slow": 0.3}, 1.0
    make(n=40, limits=Limits(concurrency=4, timeout_s=0.3))
    totals = read_totals(tmp_path / "run" / "journal.jsonl")
    assert totals.failed == sum(s.fault == "slow" for s in server.seen)
    assert totals.spent / PICO >= billed(server)


def test_keys_are_nowhere(
    make: Make, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-123")
    server.behaviour.key = "another"
    with pytest.raises(ValueError, match="refuses the key") as caught:
        make(api_key_env="MY_KEY")  # the server repeats the key in its refusal
    assert "sk-secret" not in str(caught.value)
    server.behaviour.key = "sk-secret-123"
    make(api_key_env="MY_KEY")
    for path in (tmp_path / "run").iterdir():
        assert b"sk-secret" not in path.read_bytes()


def test_a_remote_endpoint_needs_a_key(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="set OPENAI_API_KEY"):
        make(base_url="https://api.example.invalid/v1")
    with pytest.raises(ValueError, match="set NO_SUCH"):
        make(api_key_env="NO_SUCH")


def test_seeds_that_look_like_patients_stay_here(
    make: Make, seeds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-key-123")
    seeds.write_text(seeds.read_text().replace("The note of case 3", "Mrs. Miller, MRN 1234567,"))
    remote = {"base_url": "https://127.0.0.2.invalid/v1"}
    with pytest.raises(ValueError, match="seeds.jsonl:4: a name with a title in 'input'"):
        make(**remote)
    with pytest.raises(ValueError, match="cannot reach"):
        make(**remote, allow_phi_like=True)
    assert len(make(n=20).records) == 20  # a server on this machine may see them


def test_too_few_seeds(make: Make, seeds: Path) -> None:
    lines = seeds.read_text().splitlines(keepends=True)
    seeds.write_text("".join(lines[:2]))
    with pytest.raises(ValueError, match="holds 2 seeds; a request shows 3"):
        make()


def test_exhausted_triples_end_the_run(make: Make, seeds: Path) -> None:
    lines = seeds.read_text().splitlines(keepends=True)
    seeds.write_text("".join(lines[:4]))
    with pytest.raises(ValueError, match="every triple of the 4 seeds was shown"):
        make(rules="alpaca")


def test_replay_applies_other_rules(server: Any, seeds: Path, tmp_path: Path, make: Make) -> None:
    make()
    before = (tmp_path / "run" / "records.jsonl").read_bytes()
    sent = len(server.seen)
    args = command(server, seeds, tmp_path / "run", "--n", 100, "--replay")
    done = subprocess.run([*args, "--rules", "none"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "100 records" in done.stderr
    assert (tmp_path / "run" / "records.jsonl").read_bytes() != before
    assert subprocess.run(args).returncode == 0
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == before
    assert len(server.seen) == sent


def test_dry_run_and_estimate_write_nothing(server: Any, seeds: Path, tmp_path: Path) -> None:
    out = tmp_path / "none"
    args = command(server, seeds, out, "--n", 1000, "--dry-run")
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"model": "local"' in done.stdout
    assert "1000 records: about 70 requests" in done.stdout
    assert not out.exists()
    assert server.seen == []


def test_generate_inside_a_running_loop(make: Make) -> None:
    async def notebook() -> Result:
        return make(n=20)

    assert len(asyncio.run(notebook()).records) == 20


def answers_in(folder: Path) -> int:
    path = folder / "journal.jsonl"
    return path.read_bytes().count(b'{"type":"answer"') if path.exists() else 0


@pytest.mark.slow
def test_twenty_kills_lose_and_buy_nothing(
    make: Make, server: Any, seeds: Path, tmp_path: Path
) -> None:
    n, kills, in_flight = 2000, 20, 0
    server.behaviour.latency_s = 0.03
    out = tmp_path / "run"
    args = command(server, seeds, out, "--n", n, "--budget", "none", "--concurrency", 8)
    for kill in range(1, kills + 1):
        process = subprocess.Popen(args, stderr=subprocess.DEVNULL)
        while answers_in(out) < kill * 6 and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.wait()
        totals = read_totals(out / "journal.jsonl")
        in_flight = len(totals.open)
    assert subprocess.run(args, stderr=subprocess.DEVNULL).returncode == 0
    totals = read_totals(out / "journal.jsonl")
    bought = server.bought()
    again = sum(bought.values()) - len(bought)
    assert 0 < again <= len(totals.open) == in_flight
    assert totals.received == len(bought)
    assert totals.spent / PICO >= billed(server)
    make(out=tmp_path / "once", n=n)
    make(out=tmp_path / "one", n=n, limits=Limits(concurrency=1))
    for other in ("once", "one"):
        same = (tmp_path / other / "records.jsonl").read_bytes()
        assert (out / "records.jsonl").read_bytes() == same
