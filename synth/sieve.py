"""Which candidates become records, and why the others do not: filters.py, one candidate at a time.

A candidate meets the rules on its own text first, then ROUGE-L to every seed and to every record
accepted before it. The order of the candidates decides, so the caller must keep one that never
changes.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from bioinstruct.synth.answers import Candidate
from bioinstruct.synth.filters import rouge_threshold, text_drop
from bioinstruct.synth.records import Record
from bioinstruct.synth.rouge import Near, RougeIndex


class Verdict(NamedTuple):
    """What became of a candidate."""

    rule: str
    """The rule that dropped it; empty where it is kept."""
    near: Near | None
    """The nearest seed or record, where ROUGE-L was asked."""


class Judge(Protocol):
    """Decides on candidates one by one; what it accepts counts against the next."""

    def __call__(self, candidate: Candidate) -> Verdict:
        """Judge a candidate, and take it in where it is kept."""


class Sieve:
    """The rules with their memory of what was accepted.

    Args:
        rules: one of filters.RULES.
        rouge: the ROUGE-L threshold.
        known: the seeds' instructions.

    Raises:
        ValueError: rules are unknown, or rouge is out of range.
    """

    def __init__(self, rules: str, rouge: float, known: Sequence[str]) -> None:
        self.rules, self.threshold = rules, rouge_threshold(rules, rouge)
        self.index = RougeIndex(self.threshold)
        for text in known:
            self.index.add(text)

    def __call__(self, candidate: Candidate) -> Verdict:
        """Judge a candidate, and take it in where it is kept."""
        if candidate.problem:
            return Verdict(candidate.problem, None)
        given, shown, done = candidate[:3]
        if drop := text_drop(self.rules, Record(given, shown, done, {}, "", 0)):
            return Verdict(drop.rule, None)
        near = self.index.nearest(given)
        if near and near.score >= self.threshold:
            return Verdict("rouge", near)
        self.index.add(given)
        return Verdict("", near)
