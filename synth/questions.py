"""Which requests a run makes: each as soon as what it depends on is decided.

Request i follows from the settings, the seed, i, and the records accepted before i's round; a round
is 64 requests, whatever the concurrency. Only two settings look at those records:

    rotate   how many of the three examples are accepted records instead of seeds; while there are
             too few records, seeds take their places
    quotas   what share of the records each category is to have: a request says how many of its
             tasks are wanted of each, and what earlier rounds lack is made up for

Without them nothing waits for a round to end. Facets ask request i for a value of each that the
seeds have, such as a topic; that takes no round either.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

from bioinstruct.synth import draws
from bioinstruct.synth.plan import Asked, Plan
from bioinstruct.synth.prompting import CATEGORIES, NEW, YIELD
from bioinstruct.synth.records import Record
from bioinstruct.synth.seeds import Seed

ROUND = 64  # requests
_SPREAD = 2654435769  # 2**32 over the golden ratio: its multiples fill the circle evenly


class Questions:
    """A run's requests, in their order.

    Args:
        plan: the run.
        records: those accepted so far; the list grows while the run goes on.
    """

    def __init__(self, plan: Plan, records: Sequence[Mapping[str, Any]]) -> None:
        self.plan, self.records = plan, records
        self.triples = draws.draws(plan.draw, plan.settings.seed, len(plan.seeds))
        self.index = 0
        self.pools = [0]
        """How many records each round may look at."""
        self.back: deque[Asked] = deque()

    def decided(self, number: int) -> None:
        """Tell how many requests are decided; call it after each."""
        if number % ROUND == 0:
            self.pools.append(len(self.records))

    def next(self) -> Asked | None:
        """Return the next request; None where a round must end first, or no triple is left."""
        if self.back:
            return self.back.popleft()
        round_of = self.index // ROUND if self.plan.in_rounds else 0
        if round_of >= len(self.pools):
            return None
        if (triple := next(self.triples, None)) is None:
            return None
        asked = self._asked(triple, self.records[: self.pools[round_of]])
        self.index += 1
        return asked

    def put_back(self, asked: Sequence[Asked]) -> None:
        """Take requests back that are still to be asked; they come first again, in their order."""
        self.back.extendleft(reversed(asked))

    def _asked(self, triple: draws.Triple, pool: Sequence[Mapping[str, Any]]) -> Asked:
        plan, index = self.plan, self.index
        shown = [plan.seeds[i] for i in triple]
        for place, k in enumerate(rotated(plan.settings.seed, index, plan.settings.rotate, pool)):
            shown[len(shown) - 1 - place] = _as_seed(pool[k])
        wanted = wanted_tasks(plan.quotas, pool, index % ROUND) if plan.quotas else None
        return plan.ask(index, tuple(shown), wanted)


def first(plan: Plan) -> Asked:
    """Return request 0 of a run."""
    asked = Questions(plan, ()).next()
    assert asked is not None
    return asked


def rotated(seed: int, index: int, rotate: int, pool: Sequence[object]) -> list[int]:
    """Return which accepted records request index shows: rotate different ones, or none yet."""
    chosen: list[int] = []
    attempt = 0
    while len(pool) >= rotate > len(chosen):
        k = draws.number(seed, "rotated", index, attempt) % len(pool)
        attempt += 1
        if k not in chosen:
            chosen.append(k)
    return chosen


def wanted_tasks(
    quotas: Mapping[str, float], pool: Sequence[Mapping[str, Any]], place: int
) -> dict[str, int]:
    """Return how many tasks of each category a request asks for.

    Args:
        quotas: the share of each category; they add up to 1.
        pool: the records accepted before the request's round.
        place: the request's in its round.

    Returns:
        Numbers that add up to the tasks of a request. Over a round they follow what the categories
        lack of their shares, the round's own records counted as at the usual yield.
    """
    have = Counter(record.get("category", "") for record in pool)
    after = len(pool) + ROUND * NEW * YIELD
    lacks = {name: max(share * after - have[name], 0.0) for name, share in quotas.items()}
    total, wanted = sum(lacks.values()), dict.fromkeys(quotas, 0)
    for task in range(place * NEW, (place + 1) * NEW):
        at = (task * _SPREAD % 2**32) / 2**32 * total
        wanted[_holds(lacks, at)] += 1
    return {name: wanted[name] for name in CATEGORIES if name in wanted}


def _holds(shares: Mapping[str, float], at: float) -> str:
    """Return the name whose share a point falls into, when the shares lie end to end."""
    for name, share in shares.items():
        if (at := at - share) < 0:
            return name
    return name


def _as_seed(record: Mapping[str, Any]) -> Seed:
    texts = (record["instruction"], record["input"], record["output"])
    return Seed(record["id"], Record(*texts, {"category": record.get("category", "")}, "", 0))
