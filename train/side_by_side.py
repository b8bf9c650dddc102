"""Packs of a step taken side by side on a CPU, each by a share of its threads.

The operations of one pack are small: split over threads, each waits for the slowest of them, and
the smallest are not split at all. Whole packs beside each other wait for nothing, and on two cores
take four fifths of the time (LOG.md); the price is the memory of so many packs. A thread adds its
packs' gradients into a buffer of its own, dearest pack first, and the buffers are added up in
order, so the same packs and threads give the same bits.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

from bioinstruct.model.adapters import Adapters
from bioinstruct.model.config import LlamaConfig
from bioinstruct.train.data.batch import Batch
from bioinstruct.train.ranks.process import deal
from bioinstruct.train.report.metrics import step_flops

T = TypeVar("T")


class SideBySide:
    """Adds gradients of packs, several at once.

    Args:
        config: the model's shape.
        adapters: whose gradient is wanted.
        number: packs at once.
    """

    def __init__(self, config: LlamaConfig, adapters: Adapters, number: int) -> None:
        self.config, self.adapters, self.number = config, adapters, number
        self._twins = [adapters.twin() for _ in range(number - 1)]

    def __call__(self, batches: Sequence[Batch], add: Callable[[Adapters, Batch], T]) -> list[T]:
        """Add the gradients of all packs.

        Args:
            batches: the packs.
            add: adds one's gradient to that of the adapters it is given.

        Returns:
            What it returned, in the packs' order.

        Raises:
            Exception: what add raised, after all threads have ended.
        """
        # no more than packs, so that each has its share of the threads
        number = max(1, min(self.number, len(batches)))
        found: dict[int, T] = {}

        def take(adapters: Adapters, hand: list[int]) -> None:
            for i in hand:
                found[i] = add(adapters, batches[i])

        if number == 1:
            take(self.adapters, [*range(len(batches))])
            return [found[i] for i in range(len(batches))]
        own, *hands = self._dealt(batches, number)
        twins, failed = self._twins[: number - 1], None
        with _shared_threads(number), ThreadPoolExecutor(number - 1) as pool:
            pairs = zip(twins, hands, strict=True)
            tasks = [pool.submit(take, twin, hand) for twin, hand in pairs]
            try:  # the caller's thread takes its share: its heap has room that loading left
                take(self.adapters, own)
            except Exception as error:
                failed = error
            wait(tasks)
        for twin in twins:
            self.adapters.grad_P += twin.grad_P
            twin.grad_P.zero_()
        if failed is not None:
            raise failed
        for task in tasks:
            task.result()
        return [found[i] for i in range(len(batches))]

    def _dealt(self, batches: Sequence[Batch], number: int) -> list[list[int]]:
        costs = []
        for batch in batches:
            bounds = batch.pack.documents.bounds
            lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
            costs.append(step_flops(self.config, 0, lengths, len(batch.rows_S)))
        return deal(costs, number)


@contextmanager
def _shared_threads(number: int) -> Iterator[None]:
    """Give each of so many threads its share of PyTorch's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // number))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
