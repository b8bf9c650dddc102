"""What a run will cost, before it starts and while it runs.

Before: a request reads its prompt at 4 bytes a token, the model writes 17 tasks as long as the
seeds are on average, and 85 % of them are kept. With 20 answers there, what they were billed and
what was kept of them takes the place of these assumptions.
"""

import json
import math
from typing import NamedTuple

from bioinstruct.synth import money
from bioinstruct.synth.money import Prices, Usage
from bioinstruct.synth.plan import Plan
from bioinstruct.synth.prompting import NEW, YIELD
from bioinstruct.synth.questions import first

BYTES_PER_TOKEN = 4
ENOUGH = 20  # answers from which the assumptions give way
DEFAULT_CAP = 2  # times the estimate


class Estimate(NamedTuple):
    """A whole run's requests, tokens and cost in picodollars."""

    requests: int
    usage: Usage
    cost: int


def from_settings(plan: Plan, prices: Prices) -> Estimate:
    """Estimate a run from its configuration alone, at the prices of asking online or in batches."""
    records = [seed.record for seed in plan.seeds]
    texts = [{"instruction": r.instruction, "input": r.input, "output": r.output} for r in records]
    mean_bytes = sum(len(json.dumps(t, ensure_ascii=False).encode()) for t in texts) / len(texts)
    written = min(round(NEW * mean_bytes / BYTES_PER_TOKEN), plan.settings.max_tokens)
    read = round(len(first(plan).request.body) / BYTES_PER_TOKEN)
    requests = math.ceil(plan.settings.n / (NEW * YIELD))
    usage = Usage(read * requests, written * requests)
    return Estimate(requests, usage, prices.cost(usage))


def from_answers(*, n: int, accepted: int, requests: int, spent: int) -> int | None:
    """Estimate the final bill from what came; None before there is enough of it.

    Args:
        n: records wanted.
        accepted: records kept so far.
        requests: answers they came from.
        spent: picodollars those answers cost.
    """
    if requests < ENOUGH or not accepted:
        return None
    return round(spent / requests * math.ceil(n / (accepted / requests)))


def cap(plan: Plan, prices: Prices) -> int | None:
    """Return the budget in picodollars: the one given, or else twice the estimate.

    Without one given, the cap never lies below the worst case of the first request: a run of a few
    records could not begin otherwise.
    """
    budget = plan.settings.budget
    if budget is None:
        request = first(plan).request
        worst = prices.worst(len(request.body), request.cap_tokens)
        return max(DEFAULT_CAP * from_settings(plan, prices).cost, worst)
    return None if math.isinf(budget) else money.from_usd(budget)


def text(plan: Plan, prices: Prices) -> str:
    """Return the estimate and the cap for a user."""
    made, limit = from_settings(plan, prices), cap(plan, prices)
    return (
        f"{plan.settings.n} records: about {made.requests} request{'s' * (made.requests > 1)}, "
        f"{made.usage.prompt_tokens:,} tokens read and {made.usage.completion_tokens:,} written, "
        f"{money.shown(made.cost)} "
        f"(assumed: {NEW} tasks an answer, as long as the seeds, yield {YIELD:.2f}); "
        f"cap {'none' if limit is None else money.shown(limit)}"
    )
