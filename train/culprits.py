"""Which records are behind a step that is not finite, or that stands out.

The step's packs are run again, without the optimizer: each alone, and one that is not finite in
halves, down to single records. Documents of a pack do not see each other, so a record that is not
finite in a pack is not finite alone.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from bioinstruct.synth.console import note
from bioinstruct.train.data.batch import collate
from bioinstruct.train.plan.planner import StepPlan
from bioinstruct.train.plan.prepare import Prepared, own_packs
from bioinstruct.train.report.metrics import MetricsLog
from bioinstruct.train.resume.standing import Spike
from bioinstruct.train.step import add_gradient

SHOWN = 5
T = TypeVar("T")


class Share(NamedTuple):
    """What samples add to a step."""

    loss: float
    """Mean over their supervised tokens, in nats."""
    grad_norm: float
    """Of the gradient of that mean."""

    @property
    def finite(self) -> bool:
        """Whether the step could use them."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def halved(samples: Sequence[int], is_bad: Callable[[Sequence[int]], bool]) -> list[list[int]]:
    """Find the smallest bad groups in a group, by halving.

    Args:
        samples: the group.
        is_bad: runs a group.

    Returns:
        Single samples; or a longer group where it is bad and neither of its halves is.
    """
    if not is_bad(samples):
        return []
    if len(samples) == 1:
        return [list(samples)]
    middle = len(samples) // 2
    parts = [g for half in (samples[:middle], samples[middle:]) for g in halved(half, is_bad)]
    return parts or [list(samples)]


def not_finite(prepared: Prepared, plan: StepPlan) -> list[str]:
    """Places of the records whose loss or gradient is not finite, over all ranks.

    Where the packs are finite one by one, and their sum is not, the list is empty.
    """

    def is_bad(samples: Sequence[int]) -> bool:
        return not share(prepared, plan, samples).finite

    own = [
        prepared.tokens.places[i]
        for pack in _looked_at(prepared, plan)
        for group in halved(pack, is_bad)
        for i in group
    ]
    return _gathered(prepared, own)


def foremost(prepared: Prepared, plan: StepPlan, what: str) -> list[tuple[str, float]]:
    """Places of the records with the largest loss or gradient norm, and that number, largest first.

    Args:
        prepared: the run.
        plan: the step.
        what: loss | grad_norm.
    """
    own = []
    for pack in _looked_at(prepared, plan):
        for i in pack:
            value: float = getattr(share(prepared, plan, [i]), what)
            own.append((prepared.tokens.places[i], value))
    return sorted(_gathered(prepared, own), key=lambda pair: -pair[1])[:SHOWN]


def _looked_at(prepared: Prepared, plan: StepPlan) -> list[list[int]]:
    """The packs that this rank looks at: its own, or all where ranks must compute side by side."""
    return plan.packs if prepared.masters.is_sharded else own_packs(prepared, prepared.tokens, plan)


def _gathered(prepared: Prepared, own: list[T]) -> list[T]:
    """What all ranks found, each thing once."""
    if prepared.masters.is_sharded:
        return own
    return [one for found in prepared.ranks.gather(own) for one in found]


def report_skipped(prepared: Prepared, plan: StepPlan, step: int, log: MetricsLog) -> None:
    """Write and say which records kept a step from being used.

    Args:
        prepared: the run.
        plan: the step.
        step: its number, from 1.
        log: where the event goes.
    """
    records = not_finite(prepared, plan)
    log.write({"step": step, "event": "skipped", "records": records})
    told = listed(records) if records else "no record alone, but their sum"
    note(f"step {step} was skipped, because a loss or gradient is not finite: {told}")


def report_spike(
    prepared: Prepared, plan: StepPlan, step: int, log: MetricsLog, spike: Spike
) -> None:
    """Write and say which records are foremost in a step that stands out; as report_skipped."""
    records = foremost(prepared, plan, spike.what)
    shown = [{"record": place, spike.what: value} for place, value in records]
    log.write({"step": step, "event": "spike", **spike._asdict(), "records": shown})
    told = ", ".join(f"{place} ({value:.3g})" for place, value in records)
    name = "loss" if spike.what == "loss" else "gradient norm"
    note(
        f"step {step}: {name} {spike.value:.3g} is {spike.deviations:.0f} robust deviations above "
        f"the median {spike.median:.3g} of the steps before; largest by record: {told}"
    )


def share(prepared: Prepared, plan: StepPlan, samples: Sequence[int]) -> Share:
    """Run samples as a pack of their own; the flat gradient is empty before and after."""
    model, masters = prepared.llm.model, prepared.masters
    batch = collate(prepared.tokens, samples, plan.draws, model.device)
    scale = 1 / max(1, len(batch.labels_S))
    masters.before_pack(is_last=True)
    loss = add_gradient(model, masters.adapters, batch, scale, prepared.run.train.seed)
    norm = float(masters.gradient_norm())
    masters.grad_P.zero_()
    return Share(float(loss), norm)


def listed(places: Sequence[str]) -> str:
    """A few places as text, and how many more there are."""
    rest = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    return ", ".join(places[:SHOWN]) + rest
