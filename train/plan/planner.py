"""Which samples a step takes, and how they are packed: a pure function, and the data loader.

An epoch's order is a permutation drawn from a counter-based generator keyed by (seed, epoch); a
step takes the next samples of it and packs them, best fit decreasing, into packs of at most T
tokens. Nothing is dropped, truncated or repeated, and there is no state: step k is the same
whatever ran before it, so resuming means calling plan(k).

The draw number of a sample, epoch * samples + place in the permutation, never repeats in a run; the
dropout masks are counted by it.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class StepPlan(NamedTuple):
    """The work of one optimizer step."""

    epoch: int
    packs: list[list[int]]
    """Sample numbers of each pack."""
    draws: dict[int, int]
    """Draw number of each sample of the step."""
    tokens: int
    supervised_tokens: int


class Planner:
    """Plans every step of a run.

    Args:
        lengths: tokens of each sample.
        supervised: supervised tokens of each sample.
        max_tokens: T, the tokens of one pack.
        batch_samples: samples of a step, or None for batch_tokens.
        batch_tokens: tokens of a step, at most; a longer sample makes a step of its own.
        seed: of the permutations.
        shuffle: False keeps the samples' own order.

    Raises:
        ValueError: no samples, a sample longer than max_tokens, or not just one batch size.
    """

    def __init__(
        self,
        lengths: Sequence[int] | NDArray[np.int64],
        supervised: Sequence[int] | NDArray[np.int64],
        *,
        max_tokens: int,
        batch_samples: int | None = None,
        batch_tokens: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.supervised = np.asarray(supervised, dtype=np.int64)
        self.max_tokens, self.seed, self.shuffle = max_tokens, seed, shuffle
        self.batch_samples, self.batch_tokens = batch_samples, batch_tokens
        if not len(self.lengths):
            raise ValueError("there are no samples to plan")
        longest = int(self.lengths.max())
        if longest > max_tokens:
            raise ValueError(f"a sample has {longest} tokens, a pack only {max_tokens}")
        if (batch_samples is None) == (batch_tokens is None):
            raise ValueError("give either batch_samples or batch_tokens")
        self._epoch = cache(self._plan_epoch)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Sample numbers in the order in which an epoch draws them."""
        n = len(self.lengths)
        if not self.shuffle:
            return np.arange(n)
        # raw Philox output is fixed for good; Generator.permutation may change between versions
        keys = np.random.Philox(key=[self.seed, epoch]).random_raw(n)
        return np.argsort(keys, kind="stable").astype(np.int64)

    def _plan_epoch(self, epoch: int) -> tuple[NDArray[np.int64], list[int]]:
        """The epoch's order, and the place in it where each step starts, with its end."""
        order = self.order(epoch)
        if self.batch_samples is not None:
            return order, [*range(0, len(order), self.batch_samples), len(order)]
        assert self.batch_tokens is not None
        ends = np.cumsum(self.lengths[order])
        starts = [0]
        while starts[-1] < len(order):
            before = int(ends[starts[-1] - 1]) if starts[-1] else 0
            end = int(np.searchsorted(ends, before + self.batch_tokens, side="right"))
            starts.append(max(end, starts[-1] + 1))
        return order, starts

    def steps_of(self, epoch: int) -> int:
        """Number of steps of an epoch."""
        if self.batch_samples is not None:
            return -(-len(self.lengths) // self.batch_samples)
        return len(self._epoch(epoch)[1]) - 1

    def num_steps(self, epochs: float) -> int:
        """Number of steps of so many epochs, the last one perhaps in part; at least 1."""
        whole = int(epochs)
        steps = sum(self.steps_of(e) for e in range(whole))
        return max(1, steps + round((epochs - whole) * self.steps_of(whole)))

    def with_room(self, max_tokens: int) -> "Planner":
        """Return a planner of the same steps with packs of another size."""
        return Planner(
            self.lengths,
            self.supervised,
            max_tokens=max_tokens,
            batch_samples=self.batch_samples,
            batch_tokens=self.batch_tokens,
            seed=self.seed,
            shuffle=self.shuffle,
        )

    def plan(self, step: int) -> StepPlan:
        """Plan step number `step`, counted from 0 over all epochs."""
        epoch = 0
        while step >= self.steps_of(epoch):
            step -= self.steps_of(epoch)
            epoch += 1
        order, starts = self._epoch(epoch)
        chosen = order[starts[step] : starts[step + 1]]
        first = epoch * len(order) + starts[step]
        return StepPlan(
            epoch,
            [
                [int(chosen[i]) for i in pack]
                for pack in pack_samples(self.lengths[chosen], self.max_tokens)
            ],
            {int(sample): first + i for i, sample in enumerate(chosen)},
            int(self.lengths[chosen].sum()),
            int(self.supervised[chosen].sum()),
        )


def pack_samples(lengths: Sequence[int] | NDArray[np.int64], max_tokens: int) -> list[list[int]]:
    """Best fit decreasing: each sample, longest first, into the fullest pack that still takes it.

    Packs are kept by their free room, and a bit set of the rooms in use finds the tightest one in
    one shift, so the cost hardly grows with the number of packs.

    Args:
        lengths: tokens of each sample, each at most max_tokens.
        max_tokens: room of a pack.

    Returns:
        The numbers of the samples of each pack, in ascending order.
    """
    by_room: dict[int, list[int]] = {}
    rooms = 0
    packs: list[list[int]] = []
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[i])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, pack = max_tokens, len(packs)
            packs.append([])
        packs[pack].append(i)
        left = by_room.setdefault(room - length, [])
        left.append(pack)
        rooms |= 1 << (room - length)
    return [sorted(pack) for pack in packs]


def evened(
    packs: Sequence[list[int]],
    number: int,
    costs: Mapping[int, float],
    lengths: NDArray[np.int64],
    max_tokens: int,
) -> list[list[int]]:
    """Lay the samples of packs anew, so that a multiple of so many packs are about equally dear.

    The dearest sample first, each into the pack that is cheapest so far and still takes it. Where
    one is left over, or a pack would get nothing, the packs stay as they are.

    Args:
        packs: sample numbers.
        number: packs that are computed at once.
        costs: of each sample, in any unit.
        lengths: tokens by sample number.
        max_tokens: room of a pack.
    """
    samples = sorted((i for pack in packs for i in pack), key=lambda i: (-costs[i], i))
    wanted = number * -(-len(packs) // number)
    found: list[list[int]] = [[] for _ in range(wanted)]
    spent, rooms = [0.0] * wanted, [max_tokens] * wanted
    for i in samples:
        fitting = [pack for pack in range(wanted) if rooms[pack] >= lengths[i]]
        if not fitting:
            return [*packs]
        pack = min(fitting, key=lambda p: (spent[p], p))
        found[pack].append(i)
        spent[pack] += costs[i]
        rooms[pack] -= int(lengths[i])
    return [sorted(pack) for pack in found] if all(found) else [*packs]


def learning_rate(
    step: int,
    num_steps: int,
    *,
    peak: float,
    schedule: str,
    warmup_steps: int,
    decay_share: float = 0.2,
) -> float:
    """Learning rate of a step, counted from 0.

    Linear warm-up reaches the peak at step warmup_steps - 1. Then

        constant    stays there
        linear      falls in a line
        cosine      falls in half a cosine
        wsd         stays there, and falls in a line over the last decay_share of all steps
                    (warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395)

    and what falls would reach 0 at step num_steps.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    start = warmup_steps
    if schedule == "wsd":
        start = max(start, num_steps - round(decay_share * num_steps))
    progress = max(0, step - start) / max(1, num_steps - start)
    if schedule == "cosine":
        return peak * 0.5 * (1 + float(np.cos(np.pi * progress)))
    return peak * (1 - progress)
