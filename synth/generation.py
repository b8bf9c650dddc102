"""`generate`: from seeds to records, through requests that are bought once.

The records are a pure function of what run.toml fixes and of the first whole answer to each
request: answers may come in any order, but they are judged in the order of the requests, and the
run ends with the n-th record kept. So concurrency, kills and machines change nothing, and a run
goes on by being told the same command again: what the journal holds is judged anew, for nothing.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import signal
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bioinstruct.synth import estimate, money, report
from bioinstruct.synth import plan as plans
from bioinstruct.synth.cache import Cache
from bioinstruct.synth.collector import Collector
from bioinstruct.synth.console import Progress, Stopped, note
from bioinstruct.synth.endpoint import Endpoint, open_endpoint
from bioinstruct.synth.engine import BudgetReached, Closing, Engine
from bioinstruct.synth.identifiers import refuse_identifiers
from bioinstruct.synth.journal import Journal
from bioinstruct.synth.money import Prices
from bioinstruct.synth.plan import Asked, Plan, Settings
from bioinstruct.synth.questions import first
from bioinstruct.synth.records import write_records
from bioinstruct.synth.sieve import Judge, Sieve
from bioinstruct.synth.totals import Answer

RECORDS = "records.jsonl"


Buy = Callable[[Plan, Endpoint, int | None, Collector], None]


class Result(NamedTuple):
    """What a run made."""

    records: list[dict[str, Any]]
    funnel: Counter[str]
    """Candidates by what became of them; those kept under `kept`."""
    requests: int
    """Answers that were judged."""
    charged_usd: float
    """What the folder was charged so far, all invocations together."""
    cached: int
    """Answers that came from the cache, for nothing."""


def generate(**settings: Any) -> Result:
    """Make instruction records with a chat model; the same call again goes on.

    Args:
        settings: the fields of plan.Settings: out, n and model are needed, for instance
            generate(out="runs/a", n=100, model="gpt-4o", budget=2.0).

    Returns:
        The records, which stand in out/records.jsonl too, and what became of the candidates.

    Raises:
        ValueError: a setting, a seed or an answer of the endpoint makes it impossible; the text
            says what to do.
        console.Stopped: the budget is used up; the text says how to go on.
        OSError: a file cannot be read or written.
    """
    return run(Plan(settings_of(settings)))


def settings_of(settings: dict[str, Any]) -> Settings:
    """Return settings from arguments, in which paths may be texts."""
    for name in ("out", "seeds", "prompt", "models", "cache"):
        if settings.get(name) is not None:
            settings[name] = Path(settings[name])
    return Settings(**settings)


def run(plan: Plan, buy: Buy | None = None, prices: Prices | None = None) -> Result:
    """Carry a run to its end, or to where it must stop.

    Args:
        plan: the run.
        buy: how the answers come that the journal does not hold. Default: online.
        prices: what the default budget is reckoned with. Default: those of asking online.
    """
    buy = buy or online
    settings = plan.settings
    _refuse_shrinking(settings)
    with Journal(settings.out) as journal:
        if journal.totals.received or journal.totals.batches:
            plans.refuse_changes(settings.out, plans.read_run(settings.out)["fixed"], plan.fixed)
        budget = estimate.cap(plan, prices or plan.prices)
        collector = Collector(plan, journal, _judge(plan))
        collector.from_journal()
        if collector.missing:
            endpoint = open_endpoint(settings.base_url, settings.api_key_env)
            if not endpoint.local and settings.seeds and not settings.allow_phi_like:
                refuse_identifiers(plan.seeds)
            plans.write_run(plan, budget)
            buy(plan, endpoint, budget, collector)
        plans.write_run(plan, budget)
        return _written(plan, collector)


def replay(plan: Plan) -> Result:
    """Judge a run's journal anew, without a request; other rules are allowed.

    Writes as many records as the journal gives, at most n.

    Raises:
        ValueError: the folder holds no run, or something other than the rules differs.
    """
    folder = plan.settings.out
    was = plans.read_run(folder)["fixed"]
    plan = Plan(plan.settings, was["draw"])
    if plan.in_rounds and (was["rules"], was["rouge"]) != (
        plan.settings.rules,
        plan.settings.rouge,
    ):
        raise ValueError(
            f"{folder}: with rotate or quotas the requests depend on what the rules accepted, so "
            "other rules would need other answers; use `filter` on its records instead"
        )
    now = {k: v for k, v in plan.fixed.items() if k not in ("rules", "rouge")}
    plans.refuse_changes(folder, was, now)
    with Journal(folder) as journal:
        collector = Collector(plan, journal, _judge(plan))
        collector.from_journal()
        if not collector.records:
            raise ValueError(f"{folder}: nothing was kept of {collector.decided} answers")
        return _written(plan, collector)


def _judge(plan: Plan) -> Judge:
    settings = plan.settings
    return Sieve(settings.rules, settings.rouge, [s.record.instruction for s in plan.seeds])


def _refuse_shrinking(settings: Settings) -> None:
    path = settings.out / RECORDS
    if path.exists() and (have := path.read_bytes().count(b"\n")) > settings.n:
        raise ValueError(
            f"{path} holds {have} records already; ask for {have} or more, or take the first "
            f"{settings.n} lines of it"
        )


def _written(plan: Plan, collector: Collector) -> Result:
    folder, totals = plan.settings.out, collector.journal.totals
    write_records(folder / RECORDS, collector.records, overwrite=True)
    result = Result(
        collector.records,
        collector.funnel,
        collector.decided,
        totals.spent / money.PICO,
        totals.cached,
    )
    report.write_card(plan, totals, result.records, result.funnel, requests=result.requests)
    return result


def online(plan: Plan, endpoint: Endpoint, budget: int | None, collector: Collector) -> None:
    """Ask one request at a time, many at once, until there are enough records.

    Raises:
        ValueError: a batch of this folder is under way, so answers would be bought twice.
    """
    if under_way := collector.journal.totals.under_way:
        raise ValueError(
            f"{plan.settings.out} has batches under way ({len(under_way)}), which hold the next "
            "requests; collect them with `bioinstruct-synth batch` and the same options, after "
            "cancelling them at the provider if they take too long"
        )
    # a notebook has a loop that runs already, so there the work takes a thread
    work = _collect(plan, endpoint, budget, collector)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, work).result()


async def _collect(
    plan: Plan, endpoint: Endpoint, budget: int | None, collector: Collector
) -> None:
    journal = collector.journal
    ledger = money.Ledger(budget, journal.totals.spent)
    async with Engine(
        endpoint,
        journal=journal,
        ledger=ledger,
        prices=plan.prices,
        limits=plan.settings.limits,
        cache=Cache(plan.settings.cache) if plan.settings.cache else None,
    ) as engine:
        _stop_on_signals()
        try:
            await _drive(plan, engine, collector)
            if engine.overbilled:  # even where the records are all there
                raise engine.overbilled
        except asyncio.CancelledError:
            raise Stopped(how_to_go_on("stopped", collector)) from None
        except BudgetReached as error:
            raise Stopped(f"{error}; {how_to_afford(collector)}") from None
        except ValueError as error:
            if engine.refused == 400 and not journal.totals.received and _wants_schema(plan):
                raise ValueError(
                    f"{error}; if it takes no JSON schema, pass --format list"
                ) from None
            raise


def _wants_schema(plan: Plan) -> bool:
    return plan.settings.format == "schema"


def how_to_go_on(what: str, collector: Collector) -> str:
    """Return the sentence for a run that was stopped."""
    have, wanted = len(collector.records), collector.plan.settings.n
    charged = money.shown(collector.journal.totals.spent)
    return f"{what} with {have} of {wanted} records, {charged} charged; the same command goes on"


def how_to_afford(collector: Collector) -> str:
    """Return the sentence for a run that its budget stops."""
    have, wanted = len(collector.records), collector.plan.settings.n
    end = f", or choose --n {have}" if have else ""
    return f"{have} of {wanted} records are there; raise it with --budget{end}"


def _stop_on_signals() -> None:
    """Let Ctrl-C and SIGTERM end the sending first, and only then, said twice, the waiting."""
    main = asyncio.current_task()
    assert main is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        # outside the main thread signals belong to somebody else
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
            asyncio.get_running_loop().add_signal_handler(number, main.cancel)


async def _drive(plan: Plan, engine: Engine, collector: Collector) -> None:
    """Keep enough requests under way, and judge their answers in order."""
    waiting: deque[tuple[Asked, asyncio.Task[Answer]]] = deque()
    most = 2 * plan.settings.limits.concurrency
    progress = Progress("records", plan.settings.n)
    try:
        while collector.missing:
            while len(waiting) < most and len(waiting) * collector.mean_kept < collector.missing:
                if (asked := collector.questions.next()) is None:
                    break
                task = asyncio.create_task(engine.ask(asked.request, plan.settings.model))
                waiting.append((asked, task))
            if not waiting:
                raise ValueError(collector.exhausted())
            asked, task = waiting.popleft()
            try:
                # unlike await, wait leaves the request alive when this task is cancelled
                await asyncio.wait((task,))
            except asyncio.CancelledError:
                waiting.appendleft((asked, task))
                raise
            collector.decide(asked, task.result())
            progress.update(len(collector.records), _meter(plan, engine, collector))
    finally:
        engine.halt(Closing())
        await _drained(engine, [task for _, task in waiting])


async def _drained(engine: Engine, tasks: list[asyncio.Task[Answer]]) -> None:
    """Wait for what is in flight: it is paid for."""
    if engine.gate.in_flight and not isinstance(engine.halted, Closing):
        note(f"waiting for {engine.gate.in_flight} answers in flight")
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, OSError):
            raise result


def _meter(plan: Plan, engine: Engine, collector: Collector) -> str:
    charged = engine.ledger.charged
    final = estimate.from_answers(
        n=plan.settings.n,
        accepted=len(collector.records),
        requests=collector.decided,
        spent=collector.cost,
    )
    of = f" of about {money.shown(final)}" if final else ""
    return f"{money.shown(charged)}{of}, {engine.gate.in_flight} in flight"


def dry_run(plan: Plan) -> str:
    """Return request 0 and the estimate."""
    body = json.dumps(json.loads(first(plan).request.body), ensure_ascii=False, indent=2)
    return f"{body}\n{estimate.text(plan, plan.prices)}"
