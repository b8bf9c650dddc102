"""Whole runs of `generate` against the local server: the estimate, the funnel, the rate kept.

For answers of one length, of twice that, and as long as the seeds: what the configuration alone
says a run will cost, what is said after 20 answers, and the final bill, which is compared with the
server's own books. Then a run under a limit of requests a minute, of which the server refuses what
is over; a budget of $1.00 at three concurrencies, with faults of every kind, invoked again and
again; the same records in batches of which a part fails or expires; and a run killed with -9 as
often as told, carried to its end, and compared with runs that nothing stopped.

    python benches/synth_runs.py --records 2000
    python benches/synth_runs.py --part kills --kills 20
"""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from bioinstruct.synth import batching, estimate, generation, money
from bioinstruct.synth.batching import Batching
from bioinstruct.synth.console import Stopped
from bioinstruct.synth.journal import NAME
from bioinstruct.synth.pace import Limits
from bioinstruct.synth.plan import Plan, Settings
from bioinstruct.synth.totals import read_totals

SERVER = Path(__file__).parents[1] / "tests" / "synth" / "server.py"
PRICES = (2.5, 10.0)
PARTS = ("runs", "limited", "budget", "batch", "kills")
SEEDS_WORDS = 60  # of input and of output, with which the server's tasks are as long as the seeds


def server_module() -> ModuleType:
    """Load the tests' server."""
    spec = importlib.util.spec_from_file_location("synth_server", SERVER)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def settings(folder: Path, url: str, records: int, limits: Limits) -> Settings:
    """Return a run with the installed seeds on a local server."""
    return Settings(
        out=folder,
        n=records,
        model="local",
        base_url=url,
        price_in=PRICES[0],
        price_out=PRICES[1],
        budget=math.inf,
        limits=limits,
    )


def after_twenty(folder: Path, plan: Plan) -> float:
    """Return the estimate that 20 answers give, in USD."""
    totals = read_totals(folder / NAME)
    rows = [totals.verdicts[i] for i in range(estimate.ENOUGH)]
    usages = [totals.answers[row["key"]].usage for row in rows]
    told = estimate.from_answers(
        n=plan.settings.n,
        accepted=sum(not item["rule"] for row in rows for item in row["items"]),
        requests=estimate.ENOUGH,
        spent=sum(plan.prices.cost(usage) for usage in usages if usage),
    )
    assert told is not None
    return told / money.PICO


def whole_run(module: ModuleType, words: int, records: int) -> dict[str, Any]:
    """Make records from answers of a length; return estimates, bill and funnel."""
    doing = module.Behaviour(words=words, latency_s=0.02)
    with module.running(doing) as server, tempfile.TemporaryDirectory() as folder:
        plan = Plan(settings(Path(folder), server.url, records, Limits(concurrency=16)))
        start_s = time.perf_counter()
        result = generation.run(plan)
        took_s = time.perf_counter() - start_s
        bill, told = server.bill(*PRICES), after_twenty(Path(folder), plan)
        return {
            "words": words,
            "records": len(result.records),
            "requests": len(server.seen),
            "seconds": round(took_s, 2),
            "estimate_usd": round(estimate.from_settings(plan, plan.prices).cost / money.PICO, 4),
            "after_20_usd": round(told, 4),
            "charged_usd": round(result.charged_usd, 4),
            "server_bill_usd": round(bill, 4),
            "after_20_over_bill": round(told / bill, 3),
            "funnel": dict(result.funnel.most_common()),
        }


def limited_run(module: ModuleType, records: int, rpm: int, by_header: bool) -> dict[str, Any]:
    """Make records under a limit of requests a minute, told by a flag or by the server's header."""
    headers = {"x-ratelimit-limit-requests": str(rpm)} if by_header else {}
    doing = module.Behaviour(latency_s=0.2, rpm=rpm, headers=headers)
    with module.running(doing) as server, tempfile.TemporaryDirectory() as folder:
        limits = Limits(concurrency=16, rpm=None if by_header else rpm)
        generation.run(Plan(settings(Path(folder), server.url, records, limits)))
        times = [seen.time_s for seen in server.seen]
        rate = (len(times) - 1) / (times[-1] - times[0]) * 60
        refused = sum(seen.status == 429 for seen in server.seen)
    return {"rpm": rpm, "by_header": by_header, "kept_rpm": round(rate, 1), "refused": refused}


def budget_run(module: ModuleType, concurrency: int, invocations: int) -> dict[str, Any]:
    """Spend $1.00 on an endpoint that fails in seven ways; return the server's bill each time.

    Raises:
        ValueError: an invocation did not stop at its budget, or the bill passed it.
    """
    faults = {"429": 0.05, "429-bare": 0.02, "500": 0.05, "cut": 0.04, "malformed": 0.03}
    doing = module.Behaviour(faults=faults | {"no-usage": 0.03, "slow": 0.02}, slow_s=2.0)
    bills, said = [], ""
    with module.running(doing) as server, tempfile.TemporaryDirectory() as folder:
        limits = Limits(concurrency=concurrency, timeout_s=1.0, max_failures=1000)
        chosen = settings(Path(folder), server.url, 100_000, limits)
        for _ in range(invocations):
            try:
                generation.run(Plan(replace(chosen, budget=1.0)))
            except Stopped as stop:  # the command line makes exit 3 of it
                said = str(stop)
            bills.append(server.bill(*PRICES))
            if not said or bills[-1] > 1:
                raise ValueError(f"a bill of ${bills[-1]:.4f} on a budget of $1.00; {said}")
        requests = len(server.seen)
    return {
        "concurrency": concurrency,
        "requests": requests,
        "bills_usd": [round(bill, 4) for bill in bills],
        "said": said,
    }


def batch_run(module: ModuleType, records: int) -> dict[str, Any]:
    """Make records in batches with errors, expiry and a lost creation, and online; compare.

    Raises:
        ValueError: the records differ, or something was bought twice.
    """
    doing = module.Behaviour(batch_errors=0.1, batch_end=("expired", 0.7), batch_cuts=1)
    with module.running(doing) as server, tempfile.TemporaryDirectory() as folder:
        made = {}
        for name in ("online", "batch"):
            server.seen.clear()
            out = Path(folder) / name
            chosen = settings(out, server.url, records, Limits(concurrency=16))
            plan = Plan(replace(chosen, batch_factor=0.5))
            how = Batching(requests=50, poll_s=0.1, tail=8)
            result = generation.run(plan) if name == "online" else batching.run(plan, how)
            bill = server.bill(*PRICES)
            made[name] = {"charged_usd": result.charged_usd, "server_bill_usd": round(bill, 4)}
            if max(server.bought().values()) > 1:
                raise ValueError(f"{name}: an answer was bought twice")
        one, other = (Path(folder) / name / generation.RECORDS for name in made)
        if one.read_bytes() != other.read_bytes():
            raise ValueError("records made in batches differ from those made online")
        return made | {"batches": len(server.batches)}


def answers_in(folder: Path) -> int:
    """Return how many answers a run's journal holds, while it is written."""
    path = folder / NAME
    return path.read_bytes().count(b'{"type":"answer"') if path.exists() else 0


def killed_run(module: ModuleType, records: int, kills: int) -> dict[str, Any]:
    """Kill a run again and again, spread over its answers, then carry it to its end.

    Raises:
        ValueError: an answer that the journal had was bought again, or the records differ.
    """
    flights: list[int] = []
    lost = 0
    doing = module.Behaviour(latency_s=0.03)
    with module.running(doing) as server, tempfile.TemporaryDirectory() as folder:
        out = {name: Path(folder) / name for name in ("whole", "single", "killed")}
        for name, concurrency in (("whole", 8), ("single", 1)):
            limits = Limits(concurrency=concurrency)
            made = generation.run(Plan(settings(out[name], server.url, records, limits)))
        server.seen.clear()
        args = ["generate", "--out", out["killed"], "--n", records, "--model", "local"]
        args += ["--base-url", server.url, "--price-in", PRICES[0], "--price-out", PRICES[1]]
        args += ["--budget", "none", "--concurrency", 8]
        command = [sys.executable, "-m", "bioinstruct.synth.cli", *map(str, args)]
        received: list[int] = []
        for kill in range(1, kills + 1):
            with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
                while answers_in(out["killed"]) < kill * made.requests // (kills + 1):
                    time.sleep(0.001)
                process.kill()
            totals = read_totals(out["killed"] / NAME)
            lost += totals.received < max(received, default=0)
            received.append(totals.received)
            flights.append(len(totals.open) - sum(flights))
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        totals, bought = read_totals(out["killed"] / NAME), server.bought()
        again = sum(bought.values()) - len(bought)
        one, *others = ((path / generation.RECORDS).read_bytes() for path in out.values())
        if lost or totals.received != len(bought) or again > sum(flights):
            raise ValueError(f"{again} requests bought again, {sum(flights)} in flight at kills")
        if any(other != one for other in others):
            raise ValueError("the records of the killed run differ")
        return {
            "kills": kills,
            "requests": made.requests,
            "received_at_kills": received,
            "in_flight_at_kills": flights,
            "bought_again": again,
            "answers_lost": lost,
            "records_equal": True,
            "charged_usd": round(totals.spent / money.PICO, 4),
            "server_bill_usd": round(server.bill(*PRICES), 4),
        }


def main() -> None:
    """Run everything, or the parts asked for, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--limited-records", type=int, default=2000)
    parser.add_argument("--rpm", type=int, default=600)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--part", action="append", choices=PARTS)
    given = parser.parse_args()
    module = server_module()
    parts: dict[str, Callable[[], Any]] = {
        "runs": lambda: [whole_run(module, w, given.records) for w in (12, 24, SEEDS_WORDS)],
        "limited": lambda: [
            limited_run(module, given.limited_records, given.rpm, by_header)
            for by_header in (False, True)
        ],
        "budget": lambda: [budget_run(module, concurrency, 3) for concurrency in (1, 16, 256)],
        "batch": lambda: batch_run(module, given.records),
        "kills": lambda: killed_run(module, given.records, given.kills),
    }
    print(json.dumps({name: parts[name]() for name in given.part or PARTS}))


if __name__ == "__main__":
    main()
