"""`batch`: the same records as `generate` makes, with most answers bought in batches.

A batch is journalled with the keys of its requests before it is sent, and its whole worst case is
reserved then. The endpoint is told the folder's name for itself and the batch's number, so that a
batch whose creation was never recorded is found again by them; one that is not found was never
created and costs nothing. Answers and errors come back in any order and are journalled one by one.
What a batch leaves open is asked again, in another batch while there is much of it, online for the
rest. Once all that a batch brought is on disk, its files at the provider are deleted. The records
are what they would have been online: they follow from the answers alone.

What a request of a batch is charged: the cost of its usage at the batch's prices; its whole
reservation where an answer has no usage, or where the endpoint counts more answers than it hands
out; nothing where it was not worked off.
"""

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bioinstruct.synth import generation
from bioinstruct.synth.batch_api import (
    BACKOFF_S,
    ENDED,
    TRIES,
    BatchApi,
    Line,
    Remote,
    Unclear,
    line_of,
)
from bioinstruct.synth.cache import Cache
from bioinstruct.synth.collector import Collector
from bioinstruct.synth.console import Stopped, note
from bioinstruct.synth.endpoint import Endpoint, charge, fatal, overbilled, read_response
from bioinstruct.synth.generation import Result, how_to_afford, how_to_go_on
from bioinstruct.synth.models import Request
from bioinstruct.synth.money import shown
from bioinstruct.synth.plan import Asked, Plan
from bioinstruct.synth.totals import Batch

FRUITLESS = 3  # rounds of batches without an answer that end a run


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How requests are put into batches; the defaults are OpenAI's limits."""

    requests: int = 50_000
    """The most requests of a batch."""
    size_bytes: int = 200_000_000
    """The most bytes of a batch's file."""
    poll_s: float = 30.0
    """Seconds between two looks at the batches."""
    tail: int = 64
    """Fewer open requests than this are asked online, once there are answers; 0 for never."""
    keep_files: bool = False
    """Leave the batches' files at the provider; they are deleted once all in them is journalled."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("requests", 1, 50_000),
            ("size_bytes", 1, 200_000_000),
            ("poll_s", 0.01, 3600),
            ("tail", 0, 50_000),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must lie in {low} to {high}, not {value}")


def batch(batching: Batching | None = None, **settings: Any) -> Result:
    """Make instruction records with a chat model's Batch API; the same call again goes on.

    Args:
        batching: how requests are put into batches.
        settings: as for generation.generate.

    Returns:
        As generation.generate.

    Raises:
        ValueError, console.Stopped, OSError: as generation.generate.
    """
    return run(Plan(generation.settings_of(settings)), batching or Batching())


def run(plan: Plan, batching: Batching) -> Result:
    """Carry a run to its end in batches, or to where it must stop."""
    prices = plan.batch_prices  # refused before anything is read or written

    def buy(plan: Plan, endpoint: Endpoint, budget: int | None, collector: Collector) -> None:
        api = BatchApi(endpoint, plan.settings.limits.timeout_s)
        work = _Work(plan, api, budget, collector, batching)
        try:
            work.carry_out()
        except KeyboardInterrupt:
            count = len(collector.journal.totals.under_way)
            raise Stopped(
                how_to_go_on(f"stopped, batches under way: {count},", collector)
            ) from None
        finally:
            api.close()
        if collector.missing:
            generation.online(plan, endpoint, budget, collector)

    return generation.run(plan, buy, prices)


class _Work:
    """The batches of one invocation."""

    def __init__(
        self,
        plan: Plan,
        api: BatchApi,
        budget: int | None,
        collector: Collector,
        batching: Batching,
    ) -> None:
        self.plan, self.api, self.budget, self.batching = plan, api, budget, batching
        self.collector, self.journal = collector, collector.journal
        self.totals, self.prices = collector.journal.totals, plan.batch_prices
        self.cache = Cache(plan.settings.cache) if plan.settings.cache else None
        self.run = next((b.run for b in self.totals.batches.values()), "") or secrets.token_hex(8)
        self.told: dict[int, str] = {}
        self.failed = self.cancelled = ""
        self.wrong: ValueError | None = None
        self.listed = False

    def carry_out(self) -> None:
        """Send batches and collect them, until there are enough records or only a tail is left."""
        self._wait()
        fruitless = 0
        while True:
            self.collector.from_journal()
            if not self.collector.missing:
                return
            wanted = self._wanted()
            if not wanted:
                continue  # all of it was in the cache
            if self.totals.received and len(wanted) < self.batching.tail:
                return
            before = self.totals.received
            self._send(wanted)
            self._wait()
            fruitless = 0 if self.totals.received > before else fruitless + 1
            if fruitless and (self.failed or fruitless >= FRUITLESS):
                raise ValueError(
                    f"batches bring no answers: {self.failed or 'all of them expired'}; nothing "
                    "received is lost, the same command goes on, perhaps with a smaller "
                    "--batch-requests, and `generate` asks online"
                )
            self.failed = ""

    def _wanted(self) -> list[Request]:
        """Return the requests that are needed next and have no answer."""
        collector = self.collector
        asked: list[Asked] = []
        while len(asked) * collector.mean_kept < collector.missing:
            if (one := collector.questions.next()) is None:
                break
            asked.append(one)
        if not asked:
            raise ValueError(collector.exhausted())
        collector.questions.put_back(asked)
        wanted: dict[str, Request] = {}
        for one in asked:
            key = one.request.key
            if key in self.totals.answers or key in wanted:
                continue
            if self.cache and (answer := self.cache.get(key)):
                self.journal.take(answer)
            else:
                wanted[key] = one.request
        return list(wanted.values())

    def _send(self, wanted: Sequence[Request]) -> None:
        """Send requests in batches, as many as the budget has room for."""
        for part in _parts(wanted, self.batching):
            worst = [self.prices.worst(len(r.body), r.cap_tokens) for r in part]
            fits = len(part)
            while fits and not self._affords(sum(worst[:fits])):
                fits -= 1
            if not fits and not self.totals.under_way:
                raise Stopped(
                    f"the budget of {shown(self.budget or 0)} leaves no room for a batch of one "
                    f"request: {shown(self.totals.spent)} charged, {shown(worst[0])} needed at "
                    f"worst; {how_to_afford(self.collector)}"
                )
            if fits:
                self._create(part[:fits], worst[:fits])
            if fits < len(part):
                return

    def _affords(self, amount: int) -> bool:
        return self.budget is None or self.totals.spent + amount <= self.budget

    def _create(self, requests: Sequence[Request], worst: list[int]) -> None:
        made = self.journal.batch(self.run, [r.key for r in requests], worst)
        try:
            remote = self._created(self.api.upload(requests), made.number)
        except ValueError:
            self.journal.batch_ended(made.number, "refused", 0)
            raise
        self.journal.batch_created(made.number, remote.id)

    def _created(self, file: str, number: int) -> Remote:
        """Create a batch; where no answer comes, look whether it is there before trying again."""
        for attempt in range(TRIES):
            try:
                return self.api.create(file, self.run, number)
            except Unclear as error:
                said = str(error)
            time.sleep(BACKOFF_S * 2**attempt)
            if found := self.api.of_run(self.run).get(number):
                return found
        raise ValueError(f"no batch could be created: {said}")

    def _wait(self) -> None:
        """Wait until no batch is under way, and journal what they bring."""
        while self.totals.under_way:
            remotes = self._remotes()
            self._adopt(remotes)
            for batch in self.totals.under_way:
                remote = remotes.get(batch.number)
                if remote and remote.status in ENDED:
                    self._collect(batch, remote)
                elif remote:
                    self._tell(remote)
            if self.totals.under_way:
                time.sleep(self.batching.poll_s)
        if self.wrong:
            raise self.wrong
        if self.cancelled:
            raise Stopped(how_to_go_on(f"{self.cancelled} was cancelled", self.collector))

    def _remotes(self) -> dict[int, Remote]:
        """Return the batches by number: from the endpoint's whole list at first, or where a name is
        missing, else those under way, for an account's list may be long."""
        under_way = self.totals.under_way
        if not self.listed or not all(batch.id for batch in under_way):
            self.listed = True
            return self.api.of_run(self.run)
        found = {batch.number: self.api.one(batch.id) for batch in under_way}
        return {number: remote for number, remote in found.items() if remote}

    def _adopt(self, remotes: dict[int, Remote]) -> None:
        """Bring the journal's batches together with those that the endpoint has."""
        for batch in self.totals.batches.values():
            remote = remotes.get(batch.number)
            if remote and not batch.id:
                self.journal.batch_created(batch.number, remote.id)
            elif not remote and not batch.id and not batch.ended:
                self.journal.batch_ended(batch.number, "never created", 0)
            elif not remote and not batch.ended:
                held = sum(batch.reserved)
                note(f"{batch.id} is gone from the endpoint; {shown(held)} stay charged for it")
                self.journal.batch_ended(batch.number, "gone", held)

    def _tell(self, remote: Remote) -> None:
        text = f"{remote.id}: {remote.status}, {remote.completed} of {remote.total} requests done"
        if self.told.get(remote.number) != text:
            self.told[remote.number] = text
            note(text)

    def _collect(self, batch: Batch, remote: Remote) -> None:
        """Journal what a batch brought, and settle it."""
        attempts = {key: batch.first + place for place, key in enumerate(batch.keys)}
        answered, strange = set(), 0
        for file in remote.files:
            for line in self.api.lines(file):
                if line.key not in attempts:
                    strange += 1
                    continue
                if line.status == 200:
                    answered.add(line.key)
                if attempts[line.key] in self.totals.open:
                    self._take(attempts[line.key], line)
        rest = [self.totals.open[a] for a in attempts.values() if a in self.totals.open]
        unseen = max(0, remote.completed - len(answered))
        self.journal.batch_ended(
            batch.number, remote.status, sum(sorted(rest, reverse=True)[:unseen])
        )
        note(f"{remote.id}: {remote.status}, {len(answered)} of {len(attempts)} answers")
        if unseen or strange:
            note(
                f"{remote.id}: {unseen} answers are missing, {strange} lines belong to no request; "
                f"its files stay at the provider: {', '.join(remote.files)}"
            )
        elif not self.batching.keep_files:
            self._delete(remote)
        if remote.status == "failed":
            said = "; ".join(f"{code}: {message}" for code, message in remote.problems)
            self.failed = f"{remote.id} failed ({said or 'no reason given'})"
        elif remote.status == "cancelled":
            self.cancelled = remote.id

    def _delete(self, remote: Remote) -> None:
        """Delete a batch's files at the provider; what fails is only told."""
        self.journal.sync()  # from now on there is no other copy
        files = [remote.input, *remote.files]
        try:
            for file in files:
                self.api.delete(file)
        except ValueError as error:
            note(f"{remote.id}: files stay at the provider ({', '.join(files)}): {error}")
        else:
            note(f"{remote.id}: deleted its files at the provider ({', '.join(files)})")

    def _take(self, attempt: int, line: Line) -> None:
        """Journal one line of a batch."""
        if line.status is None:
            said = line.error or "no response"
            self.journal.failure(attempt, line.key, error=said, charged=0, seconds=0.0)
            return
        worst = self.totals.open[attempt]
        answer = read_response(line.key, line.status, self.api.endpoint.without_key(line.raw))
        cost = charge(answer, self.prices, worst)
        self.journal.answer(attempt, answer, charged=cost, seconds=0.0)
        if answer.complete and self.cache:
            self.cache.put(answer)
        wrong = overbilled(answer, cost, worst)
        if not answer.complete and (why := fatal(self.api.endpoint, self.plan.model.name, answer)):
            wrong = ValueError(why)
        self.wrong = self.wrong or wrong


def _parts(requests: Sequence[Request], batching: Batching) -> Iterator[list[Request]]:
    """Split requests, in their order, by number and by the size of their file."""
    part: list[Request] = []
    size = 0
    for request in requests:
        more = len(line_of(request))
        if more > batching.size_bytes:
            raise ValueError(
                f"a request takes {more} bytes of a batch's file; raise --batch-bytes "
                f"({batching.size_bytes})"
            )
        if part and (len(part) == batching.requests or size + more > batching.size_bytes):
            yield part
            part, size = [], 0
        part.append(request)
        size += more
    if part:
        yield part
