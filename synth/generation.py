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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bioinstruct.synth import answers, estimate, money, report
from bioinstruct.synth import plan as plans
from bioinstruct.synth.console import Progress, Stopped, note
from bioinstruct.synth.endpoint import Endpoint, open_endpoint, text_of
from bioinstruct.synth.engine import BudgetReached, Closing, Engine
from bioinstruct.synth.identifiers import refuse_identifiers
from bioinstruct.synth.journal import Answer, Journal
from bioinstruct.synth.plan import Asked, Plan, Settings
from bioinstruct.synth.prompting import NEW
from bioinstruct.synth.records import write_records
from bioinstruct.synth.rouge import Near
from bioinstruct.synth.sieve import Judge, Sieve

RECORDS = "records.jsonl"
FRUITLESS = 64  # requests in a row with nothing kept that end a run


class Result(NamedTuple):
    """What a run made."""

    records: list[dict[str, Any]]
    funnel: Counter[str]
    """Candidates by what became of them; those kept under `kept`."""
    requests: int
    """Answers that were judged."""
    charged_usd: float
    """What the folder was charged so far, all invocations together."""


class Collector:
    """Judges answers in the order of their requests, until there are enough records."""

    def __init__(self, plan: Plan, journal: Journal, judge: Judge) -> None:
        self.plan, self.journal, self.judge = plan, journal, judge
        self.records: list[dict[str, Any]] = []
        self.names = [seed.id for seed in plan.seeds]
        self.funnel: Counter[str] = Counter()
        self.decided = self.fruitless = self.cost = 0

    @property
    def missing(self) -> int:
        """Records still wanted."""
        return self.plan.settings.n - len(self.records)

    @property
    def mean_kept(self) -> float:
        """Records that a request brings, as far as is known."""
        return max(len(self.records) / self.decided if self.decided else NEW * estimate.YIELD, 0.5)

    def decide(self, asked: Asked, answer: Answer) -> None:
        """Judge the candidates of the next answer, and journal the verdict.

        Raises:
            ValueError: nothing was kept of many answers in a row.
        """
        assert asked.index == self.decided
        before, items = len(self.records), []
        for number, item in enumerate(
            answers.candidates(text_of(answer), self.plan.settings.format)
        ):
            if not self.missing:
                break  # what follows the last record wanted was never judged
            verdict = self.judge(item)
            near = self._named(verdict.near)
            items.append({"rule": verdict.rule, "nearest": near})
            self.funnel[verdict.rule or "kept"] += 1
            if not verdict.rule:
                self._keep(item, asked, number, near)
        self.decided += 1
        self.cost += self.plan.prices.cost(answer.usage) if answer.usage else 0
        self.journal.verdict(asked.index, asked.request.key, items)
        self.fruitless = 0 if len(self.records) > before else self.fruitless + 1
        if self.fruitless >= FRUITLESS and self.missing:
            raise ValueError(
                f"nothing was kept of {FRUITLESS} answers in a row ({self.told()}); the seeds or "
                "the prompt give no new tasks any more: see the verdicts in journal.jsonl"
            )

    def _keep(
        self, item: answers.Candidate, asked: Asked, number: int, near: dict[str, Any] | None
    ) -> None:
        name = f"synth-{len(self.records) + 1:06d}"
        self.names.append(name)
        self.records.append(
            {
                "id": name,
                "instruction": item.instruction,
                "input": item.input,
                "output": item.output,
                "source": self.plan.settings.model,
                "provenance": {
                    "request": asked.index,
                    "item": number,
                    "key": asked.request.key,
                    "seeds": [seed.id for seed in asked.seeds],
                    "rules": self.plan.settings.rules,
                    "nearest": near,
                },
            }
        )

    def _named(self, near: Near | None) -> dict[str, Any] | None:
        return near and {"id": self.names[near.place], "rouge_l": round(near.score, 4)}

    def told(self) -> str:
        """Return the funnel in words."""
        dropped = [f"{count} {rule}" for rule, count in self.funnel.most_common() if rule != "kept"]
        kept = self.funnel["kept"]
        return f"{sum(self.funnel.values())} candidates, {kept} kept, dropped: " + (
            ", ".join(dropped) or "none"
        )


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
    for name in ("out", "seeds", "prompt", "models"):
        if settings.get(name) is not None:
            settings[name] = Path(settings[name])
    return run(Plan(Settings(**settings)))


def run(plan: Plan) -> Result:
    """Carry a run to its end, or to where it must stop."""
    settings = plan.settings
    _refuse_shrinking(settings)
    with Journal(settings.out) as journal:
        if journal.totals.received:
            plans.refuse_changes(settings.out, plans.read_run(settings.out)["fixed"], plan.fixed)
        budget = estimate.cap(plan)
        collector = Collector(plan, journal, _judge(plan))
        rest = _from_journal(plan, collector)
        if collector.missing:
            endpoint = open_endpoint(settings.base_url, settings.api_key_env)
            if not endpoint.local and settings.seeds and not settings.allow_phi_like:
                refuse_identifiers(plan.seeds)
            plans.write_run(plan, budget)
            _in_loop(plan, endpoint, budget, collector, rest)
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
    now = {k: v for k, v in plan.fixed.items() if k not in ("rules", "rouge")}
    plans.refuse_changes(folder, was, now)
    with Journal(folder) as journal:
        collector = Collector(plan, journal, _judge(plan))
        _from_journal(plan, collector)
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


def _from_journal(plan: Plan, collector: Collector) -> Iterator[Asked]:
    """Judge what the journal holds; return the requests from the first one it does not hold."""
    known, asked = collector.journal.totals.answers, plan.asked()
    for one in asked:
        if not collector.missing:
            break
        if one.request.key not in known:
            return _chained(one, asked)
        collector.decide(one, known[one.request.key])
    return asked


def _chained(first: Asked, rest: Iterator[Asked]) -> Iterator[Asked]:
    yield first
    yield from rest


def _written(plan: Plan, collector: Collector) -> Result:
    folder, totals = plan.settings.out, collector.journal.totals
    write_records(folder / RECORDS, collector.records, overwrite=True)
    result = Result(
        collector.records, collector.funnel, collector.decided, totals.spent / money.PICO
    )
    report.write_card(plan, totals, result.records, result.funnel, requests=result.requests)
    return result


def _in_loop(
    plan: Plan,
    endpoint: Endpoint,
    budget: int | None,
    collector: Collector,
    rest: Iterator[Asked],
) -> None:
    """Run the event loop here, or in a thread of its own where one runs already (a notebook)."""
    work = _collect(plan, endpoint, budget, collector, rest)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, work).result()


async def _collect(
    plan: Plan,
    endpoint: Endpoint,
    budget: int | None,
    collector: Collector,
    rest: Iterator[Asked],
) -> None:
    journal = collector.journal
    ledger = money.Ledger(budget, journal.totals.spent)
    limits = plan.settings.limits
    async with Engine(
        endpoint, journal=journal, ledger=ledger, prices=plan.prices, limits=limits
    ) as engine:
        _stop_on_signals()
        try:
            await _drive(plan, engine, collector, rest)
            if engine.overbilled:  # even where the records are all there
                raise engine.overbilled
        except asyncio.CancelledError:
            raise Stopped(_how_to_go_on("stopped", plan, collector)) from None
        except BudgetReached as error:
            more = "raise it with --budget, or choose --n"
            text = f"{error}; {len(collector.records)} of {plan.settings.n} records are there; "
            raise Stopped(f"{text}{more} {max(len(collector.records), 1)}") from None
        except ValueError as error:
            if engine.refused == 400 and not journal.totals.received and _wants_schema(plan):
                raise ValueError(
                    f"{error}; if it takes no JSON schema, pass --format list"
                ) from None
            raise


def _wants_schema(plan: Plan) -> bool:
    return plan.settings.format == "schema"


def _how_to_go_on(what: str, plan: Plan, collector: Collector) -> str:
    have, journal = len(collector.records), collector.journal
    return (
        f"{what} with {have} of {plan.settings.n} records, "
        f"{money.shown(journal.totals.spent)} charged; the same command goes on"
    )


def _stop_on_signals() -> None:
    """Let Ctrl-C and SIGTERM end the sending first, and only then, said twice, the waiting."""
    main = asyncio.current_task()
    assert main is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        # outside the main thread signals belong to somebody else
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
            asyncio.get_running_loop().add_signal_handler(number, main.cancel)


async def _drive(plan: Plan, engine: Engine, collector: Collector, rest: Iterator[Asked]) -> None:
    """Keep enough requests under way, and judge their answers in order."""
    waiting: deque[tuple[Asked, asyncio.Task[Answer]]] = deque()
    most = 2 * plan.settings.limits.concurrency
    progress = Progress("records", plan.settings.n)
    try:
        while collector.missing:
            while len(waiting) < most and len(waiting) * collector.mean_kept < collector.missing:
                if (asked := next(rest, None)) is None:
                    break
                task = asyncio.create_task(engine.ask(asked.request, plan.settings.model))
                waiting.append((asked, task))
            if not waiting:
                raise ValueError(
                    f"every triple of the {len(plan.seeds)} seeds was shown, and "
                    f"{len(collector.records)} of {plan.settings.n} records were kept; add seeds "
                    "in a new --out"
                )
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
    body = json.dumps(json.loads(plan.first.request.body), ensure_ascii=False, indent=2)
    return f"{body}\n{estimate.text(plan)}"
