"""Judging answers: candidates become records in the order of the requests, whatever came first."""

import math
from collections import Counter
from typing import Any

from bioinstruct.synth import answers
from bioinstruct.synth.endpoint import text_of
from bioinstruct.synth.journal import Journal
from bioinstruct.synth.plan import Asked, Plan
from bioinstruct.synth.prompting import NEW, YIELD
from bioinstruct.synth.questions import Questions
from bioinstruct.synth.rouge import Near
from bioinstruct.synth.sieve import Judge, Verdict
from bioinstruct.synth.totals import Answer

FRUITLESS = 64  # requests in a row with nothing kept that end a run


class Collector:
    """Judges answers in the order of their requests, until there are enough records."""

    def __init__(self, plan: Plan, journal: Journal, judge: Judge) -> None:
        self.plan, self.journal, self.judge = plan, journal, judge
        self.records: list[dict[str, Any]] = []
        self.questions = Questions(plan, self.records)
        self.categories: Counter[str] = Counter()
        self.names = [seed.id for seed in plan.seeds]
        self.funnel: Counter[str] = Counter()
        self.decided = self.fruitless = self.cost = self.allowed = 0

    @property
    def missing(self) -> int:
        """Records still wanted."""
        return self.plan.settings.n - len(self.records)

    @property
    def mean_kept(self) -> float:
        """Records that a request brings, as far as is known."""
        return max(len(self.records) / self.decided if self.decided else NEW * YIELD, 0.5)

    def decide(self, asked: Asked, answer: Answer) -> None:
        """Judge the candidates of the next answer, and journal the verdict.

        Raises:
            ValueError: nothing was kept of many answers in a row.
        """
        assert asked.index == self.decided
        before, items = len(self.records), []
        self.allowed = before + NEW
        for number, item in enumerate(
            answers.candidates(text_of(answer), self.plan.settings.format)
        ):
            if not self.missing:
                break  # what follows the last record wanted was never judged
            verdict = self._full(item) or self.judge(item)
            near = self._named(verdict.near)
            items.append({"rule": verdict.rule, "nearest": near})
            self.funnel[verdict.rule or "kept"] += 1
            if not verdict.rule:
                self._keep(item, asked, number, near)
        self.decided += 1
        self.questions.decided(self.decided)
        self.cost += self.plan.prices.cost(answer.usage) if answer.usage else 0
        self.journal.verdict(asked.index, asked.request.key, items)
        self.fruitless = 0 if len(self.records) > before else self.fruitless + 1
        if self.fruitless >= FRUITLESS and self.missing:
            full = ", or no quota has room for them" if self.plan.quotas else ""
            raise ValueError(
                f"nothing was kept of {FRUITLESS} answers in a row ({self.told()}); the seeds or "
                f"the prompt give no new tasks any more{full}: see the verdicts in journal.jsonl"
            )

    def from_journal(self) -> None:
        """Judge what the journal holds, up to the first request that it does not hold."""
        known = self.journal.totals.answers
        while self.missing and (asked := self.questions.next()):
            if asked.request.key not in known:
                self.questions.put_back([asked])
                return
            self.decide(asked, known[asked.request.key])

    def _full(self, item: answers.Candidate) -> Verdict | None:
        """Return why a candidate's category takes no more records for now, or None.

        A category may be ahead of its share of the records by what one answer brings.
        """
        quotas = self.plan.quotas
        if not quotas or item.problem:
            return None
        if item.category not in quotas:
            return Verdict("category", None)
        most = math.ceil(quotas[item.category] * self.allowed)
        return Verdict("quota", None) if self.categories[item.category] >= most else None

    def _keep(
        self, item: answers.Candidate, asked: Asked, number: int, near: dict[str, Any] | None
    ) -> None:
        name = f"synth-{len(self.records) + 1:06d}"
        self.names.append(name)
        self.categories[item.category] += 1
        with_category = {"category": item.category} if self.plan.quotas else {}
        with_facets = {"facets": asked.facets} if asked.facets else {}
        self.records.append(
            {
                "id": name,
                "instruction": item.instruction,
                "input": item.input,
                "output": item.output,
                **with_category,
                "source": self.plan.settings.model,
                "provenance": {
                    "request": asked.index,
                    "item": number,
                    "key": asked.request.key,
                    "seeds": [seed.id for seed in asked.seeds],
                    "rules": self.plan.settings.rules,
                    **with_facets,
                    "nearest": near,
                },
            }
        )

    def _named(self, near: Near | None) -> dict[str, Any] | None:
        return near and {"id": self.names[near.place], "rouge_l": round(near.score, 4)}

    def exhausted(self) -> str:
        """Return the sentence for a run that has no request left."""
        return (
            f"every triple of the {len(self.plan.seeds)} seeds was shown, and "
            f"{len(self.records)} of {self.plan.settings.n} records were kept; add seeds in a new "
            "--out"
        )

    def told(self) -> str:
        """Return the funnel in words."""
        dropped = [f"{count} {rule}" for rule, count in self.funnel.most_common() if rule != "kept"]
        kept = self.funnel["kept"]
        return f"{sum(self.funnel.values())} candidates, {kept} kept, dropped: " + (
            ", ".join(dropped) or "none"
        )
