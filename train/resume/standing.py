"""Where a run stands, besides its weights and moments; and what is unusual about a step.

A loss or gradient norm is a spike when it lies many robust deviations above the median of the steps
before it:

    (x - median) / max(1.4826 MAD, 1 % of the median) > threshold

MAD is the median of the distances from the median; 1.4826 times it is the standard deviation of a
normal distribution, and no single earlier spike moves it (Rousseeuw & Croux 1993).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

WINDOW, ENOUGH = 64, 16
"""Steps that are looked back on, and how many there must be."""
_TO_SIGMA, _FLOOR = 1.4826, 0.01


class Spike(NamedTuple):
    """A step's value that stands out."""

    what: str
    """loss | grad_norm."""
    value: float
    median: float
    deviations: float


@dataclass
class Standing:
    """How far a run is; JSON holds every bit of it."""

    max_tokens: int
    """Tokens of a pack now."""
    asked_tokens: int
    """What the settings asked for when max_tokens was chosen."""
    step: int = 0
    """Steps taken, skipped ones too."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    losses: list[float] = field(default_factory=list)
    """Of the last steps, finite ones."""
    norms: list[float] = field(default_factory=list)
    best: float | None = None
    """Best value of train.keep_best so far."""
    best_step: int | None = None
    since_best: int = 0
    """Evaluations since then."""
    evaluation_owed: bool = False
    """Whether the evaluation after this step was put off by a request to stop."""
    stopped_early: bool = False

    def facts(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Standing":
        """Return what facts() was taken of."""
        return cls(**facts)

    def see(self, loss: float, norm: float, threshold: float) -> list[Spike]:
        """Take note of a step.

        Args:
            loss: of the step.
            norm: of its gradient.
            threshold: deviations from which on a value is a spike; 0 for none.

        Returns:
            What stands out. A step that is not finite is counted as skipped and nothing else.
        """
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.skipped += 1
            self.skipped_in_a_row += 1
            return []
        self.skipped_in_a_row = 0
        found = []
        for what, value, seen in (("loss", loss, self.losses), ("grad_norm", norm, self.norms)):
            middle, deviations = robust_score(value, seen)
            if threshold and len(seen) >= ENOUGH and deviations > threshold:
                found.append(Spike(what, value, middle, deviations))
            seen.append(value)
            del seen[:-WINDOW]
        return found

    def judge(self, value: float, lower_is_better: bool) -> bool:
        """Take note of an evaluation and return whether it is the best so far."""
        sign = -1 if lower_is_better else 1
        if math.isfinite(value) and (self.best is None or sign * value > sign * self.best):
            self.best, self.best_step, self.since_best = value, self.step, 0
            return True
        self.since_best += 1
        return False


def robust_score(value: float, seen: Sequence[float]) -> tuple[float, float]:
    """Return the median of what was seen, and how many robust deviations the value is above it."""
    if not seen:
        return value, 0.0
    middle = median(seen)
    spread = _TO_SIGMA * median(abs(x - middle) for x in seen)
    return middle, (value - middle) / max(spread, _FLOOR * abs(middle), 1e-30)
