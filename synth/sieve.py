"""Which candidates become records, and why the others do not.

Rules after Self-Instruct, on the instruction: its words, keywords of what a language model cannot
do, and its ROUGE-L to every seed and every record accepted before. `paper` is BioInstruct's text
(fewer than 3 or more than 150 words, F >= 0.7, an output that repeats the input); `alpaca` the
limits of Alpaca's code (3 words or fewer, F > 0.7, odd beginnings); `none` looks at ROUGE only.
"""

import re
import string
from collections.abc import Callable
from typing import NamedTuple, Protocol

from bioinstruct.synth.answers import Candidate
from bioinstruct.synth.similarity import Near, RougeIndex

ROUGE = 0.7
MOST_WORDS = 150
KEYWORDS = (
    "image images graph graphs picture pictures file files map maps draw plot go to video audio "
    "music flowchart diagram"
)
_KEYWORD = re.compile(r"\b(?:" + "|".join(KEYWORDS.replace("go to", "").split()) + r"|go to)\b")


class Verdict(NamedTuple):
    """What became of a candidate."""

    rule: str
    """The rule that dropped it; empty where it is kept."""
    near: Near


class Judge(Protocol):
    """Decides on candidates one by one; what it accepts counts against the next."""

    def __call__(self, candidate: Candidate) -> Verdict:
        """Judge a candidate, and take it in where it is kept."""


class Sieve:
    """The rules with their memory of what was accepted.

    Args:
        rules: one of RULES.
        rouge: the highest ROUGE-L F that is not a repetition; `alpaca` allows it itself.
        known: the seeds' instructions.
    """

    def __init__(self, rules: str, rouge: float, known: list[str]) -> None:
        if rules not in RULES:
            raise ValueError(f"rules must be one of {', '.join(RULES)}, not {rules!r}")
        if not 0 < rouge <= 1:
            raise ValueError(f"rouge must lie above 0 and not above 1, not {rouge}")
        self.check, self.rouge, self.index = RULES[rules], rouge, RougeIndex()
        self.tie_is_near = rules != "alpaca"
        for text in known:
            self.index.add(text)

    def __call__(self, candidate: Candidate) -> Verdict:
        """Judge a candidate, and take it in where it is kept."""
        rule = candidate.problem or self.check(candidate)
        if rule:
            return Verdict(rule, Near(0.0, -1))
        near = self.index.nearest(candidate.instruction)
        if near.score > self.rouge or (self.tie_is_near and near.score == self.rouge):
            return Verdict("rouge", near)
        self.index.add(candidate.instruction)
        return Verdict("", near)


def _paper(candidate: Candidate) -> str:
    words = len(candidate.instruction.split())
    if words < 3:
        return "too_short"
    return _common(candidate, words)


def _alpaca(candidate: Candidate) -> str:
    words = len(candidate.instruction.split())
    if words <= 3:
        return "too_short"
    text = candidate.instruction
    if text.startswith("Write a program"):
        return "program"
    if text[0] in string.punctuation or not text[0].isascii():
        return "odd_beginning"
    return _common(candidate, words)


def _common(candidate: Candidate, words: int) -> str:
    if words > MOST_WORDS:
        return "too_long"
    if _KEYWORD.search(candidate.instruction.lower()):
        return "keyword"
    output = candidate.output.strip().casefold()
    if output and output == candidate.input.strip().casefold():
        return "output_is_input"
    return ""


def _none(candidate: Candidate) -> str:
    return ""


RULES: dict[str, Callable[[Candidate], str]] = {"paper": _paper, "alpaca": _alpaca, "none": _none}
