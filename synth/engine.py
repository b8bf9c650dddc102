"""The request engine: one scheduler between many questions and one endpoint.

A request passes, in the order in which it was asked, the gate (rates, pauses, concurrency) and the
ledger (its worst case must fit into the budget); its intent is journalled, it is sent, and the
response is journalled before anything is made of it. Refusals and cut connections are retried here
and nowhere else. What no retry can mend - a wrong key, an empty account, an unknown model, a bill
above its reservation - stops everything at once; what is in flight is still waited for and kept.

What an attempt is charged: the cost of its usage; its whole reservation where the bill is unknown
(no usage, a timeout, a cut connection, a kill); nothing for an error response or where no
connection was made.
"""

import asyncio
import gc
import random
import time
from collections.abc import Awaitable, Mapping
from types import TracebackType

from bioinstruct.synth import endpoint as endpoints
from bioinstruct.synth.cache import Cache
from bioinstruct.synth.console import Stopped
from bioinstruct.synth.endpoint import Endpoint
from bioinstruct.synth.journal import Journal
from bioinstruct.synth.models import Request
from bioinstruct.synth.money import Ledger, Prices, shown
from bioinstruct.synth.pace import Gate, Limits, retry_after_s
from bioinstruct.synth.totals import Answer
from bioinstruct.synth.wire import Cut, Unsent, Wire

MAX_TRIES = 20  # of one request, rate refusals not counted
BACKOFF_S, BACKOFF_MOST_S = 0.5, 60.0
# a request makes hundreds of objects and no cycle: looking for cycles as often as Python does by
# default takes an eighth of the time
GC_THRESHOLDS = (20_000, 20, 100)


class BudgetReached(Stopped):
    """The next request's worst case no longer fits into the budget."""


class Closing(Exception):
    """Nothing more is sent, because what was wanted is there."""


class Engine:
    """Asks an endpoint; used as `async with`.

    Args:
        endpoint: where to.
        journal: open for appending; answers in it are not asked for again.
        ledger: with what the journal was charged already.
        prices: of the model, to reserve and settle by.
        limits: how hard to drive the endpoint.
        cache: answers shared with other runs, or None.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        journal: Journal,
        ledger: Ledger,
        prices: Prices,
        limits: Limits,
        cache: Cache | None = None,
    ) -> None:
        self.cache = cache
        self.endpoint, self.journal, self.ledger = endpoint, journal, ledger
        self.prices, self.limits = prices, limits
        self.gate = Gate(limits.concurrency, limits.rpm, limits.tpm)
        self.failures = 0
        self.answered = False
        self.asking: dict[str, asyncio.Event | None] = {}
        self.halted: Exception | None = None
        self.overbilled: Exception | None = None
        self.refused = 0

    async def __aenter__(self) -> "Engine":
        headers = {"Content-Type": "application/json"}
        if self.endpoint.key:
            headers["Authorization"] = f"Bearer {self.endpoint.key}"
        self.turn, self.changed, self.halting = asyncio.Lock(), asyncio.Event(), asyncio.Event()
        self.wire = Wire(
            self.endpoint.url,
            headers,
            proxy=self.endpoint.proxy(),
            timeout_s=self.limits.timeout_s,
        )
        self.thresholds = gc.get_threshold()
        gc.set_threshold(*GC_THRESHOLDS)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        gc.set_threshold(*self.thresholds)
        await self.wire.close()

    def halt(self, reason: Exception) -> None:
        """Send nothing more; whoever waits for its turn gets the reason. The first one stays."""
        self.halted = self.halted or reason
        self.halting.set()
        self.changed.set()

    async def ask(self, request: Request, model: str) -> Answer:
        """Return the answer to a request: from the journal, from one in flight, or a bought one.

        Raises:
            BudgetReached: it does not fit into the budget.
            ValueError: the endpoint refuses, or fails again and again; the text says how.
            OSError: the journal cannot be written.
            Closing: the engine was halted because nothing more is wanted.
        """
        answers, key = self.journal.totals.answers, request.key
        while (answer := answers.get(key)) is None:
            if key in self.asking:
                self.asking[key] = asked = self.asking[key] or asyncio.Event()
                await asked.wait()
                self._check()
                continue
            self.asking[key] = None  # an event only for those who wait
            try:
                return self._cached(key) or await self._buy(request, model)
            except OSError as error:
                self.halt(error)
                raise
            finally:
                if waited_for := self.asking.pop(key):
                    waited_for.set()
        return answer

    def _cached(self, key: str) -> Answer | None:
        """Return the answer that another run bought, journalled, or None."""
        answer = self.cache.get(key) if self.cache else None
        if answer:
            self.journal.take(answer)
        return answer

    async def _buy(self, request: Request, model: str) -> Answer:
        worst = self.prices.worst(len(request.body), request.cap_tokens)
        tokens = len(request.body) // 4 + request.cap_tokens
        tries = 0
        while True:
            await self._enter(worst, tokens)
            response, sent_s = None, time.monotonic()
            try:
                response = await self._send(request, worst)
            finally:
                self.gate.in_flight -= 1
                self.changed.set()
            answer, headers = response
            if answer is not None:
                used = sum(answer.usage) if answer.usage else tokens
                self.gate.tokens.take(sent_s, used - tokens)
                if answer.complete:
                    self._succeeded(headers)
                    if self.cache:
                        self.cache.put(answer)
                    return answer
                if reason := endpoints.fatal(self.endpoint, model, answer):
                    self.refused = answer.status
                    self.halt(ValueError(reason))
            tries += answer is None or answer.status != 429
            await self._failed(answer, headers, sent_s, tries)

    async def _enter(self, worst: int, tokens: int) -> None:
        """Wait for this request's turn, then take its place in the gate and in the ledger."""
        async with self.turn:
            while True:
                self._check()
                now_s = time.monotonic()
                wait_s = self.gate.wait_s(now_s)
                if wait_s == 0 and self.ledger.fits(worst):
                    break
                if wait_s == 0 and not self.ledger.reserved:
                    self.halt(BudgetReached(self._budget_text(worst)))
                    continue
                self.changed.clear()
                await _within(self.changed.wait(), wait_s or None)
            self.gate.enter(now_s, tokens)
            self.ledger.reserve(worst)

    async def _send(self, request: Request, worst: int) -> tuple[Answer | None, Mapping[str, str]]:
        """Send once; journal and settle whatever comes of it."""
        journal, key = self.journal, request.key
        charge = worst
        try:
            attempt = journal.intent(key, worst)
            sent_s = time.monotonic()
            try:
                status, headers, raw = await self.wire.post(request.body)
            except (Cut, Unsent) as error:
                charge = 0 if isinstance(error, Unsent) else worst
                took_s = time.monotonic() - sent_s
                journal.failure(attempt, key, error=str(error), charged=charge, seconds=took_s)
                if isinstance(error, Unsent) and not self.answered:
                    self.halt(ValueError(f"cannot reach {self.endpoint.base_url}: {error}"))
                return None, {"error": str(error)}
            answer = endpoints.read_response(key, status, self.endpoint.without_key(raw))
            charge = self._charge(answer, worst)
            took_s = time.monotonic() - sent_s
            journal.answer(attempt, answer, charged=charge, seconds=took_s)
            return answer, headers
        finally:
            self.ledger.settle(worst, charge)

    def _charge(self, answer: Answer, worst: int) -> int:
        cost = endpoints.charge(answer, self.prices, worst)
        if over := endpoints.overbilled(answer, cost, worst):
            self.overbilled = over
            self.halt(over)
        return cost

    def _succeeded(self, headers: Mapping[str, str]) -> None:
        self.failures, self.answered = 0, True
        self.gate.faster()
        self.gate.heed(headers)

    async def _failed(
        self, answer: Answer | None, headers: Mapping[str, str], sent_s: float, tries: int
    ) -> None:
        """Slow down, count, and wait before the next attempt."""
        said = headers.get("error", "") if answer is None else _told(answer)
        if self.gate.slower(sent_s):
            self.failures += 1
        if self.failures >= self.limits.max_failures:
            self.halt(
                ValueError(
                    f"{self.failures} failures in a row, the last: {said}; nothing received is "
                    "lost, the same command goes on"
                )
            )
        if tries >= MAX_TRIES:
            self.halt(ValueError(f"one request failed {tries} times, the last: {said}"))
        self._check()
        told_s = None if answer is None else retry_after_s(headers)
        if told_s is not None:
            self.gate.pause(told_s)
            return
        most_s = min(BACKOFF_MOST_S, BACKOFF_S * 2 ** max(tries - 1, self.failures - 1, 0))
        await _within(self.halting.wait(), most_s * random.uniform(0.5, 1.0))
        self._check()

    def _check(self) -> None:
        if self.halted:
            raise self.halted

    def _budget_text(self, worst: int) -> str:
        cap = self.ledger.cap or 0
        return (
            f"the budget of {shown(cap)} leaves no room for the next request: "
            f"{shown(self.ledger.charged)} charged, {shown(worst)} needed at worst"
        )


def _told(answer: Answer) -> str:
    if answer.status == 200:
        return "an answer that is no chat completion"
    return f"HTTP {answer.status}: {endpoints.says(answer)}"


async def _within(event: Awaitable[object], seconds: float | None) -> None:
    """Wait for an event, but no longer than some seconds."""
    try:
        async with asyncio.timeout(seconds):
            await event
    except TimeoutError:
        return
