"""This process among those that train together, started by torchrun or alone.

    torchrun --nproc-per-node 8 train/main.py RECIPE.toml

starts 8 processes (ranks) and tells each by environment variables who it is: RANK of WORLD_SIZE,
and LOCAL_RANK on its machine, which is also the number of its GPU. Alone, every method here is the
identity, so that one loop serves one process and many.

Sums over ranks come back bitwise equal on all of them, so whatever is decided by such a sum is
decided alike everywhere, and no rank enters a collective that the others skip. What only the first
rank does may take long (it scores, it writes); the others then wait at the key-value store of
torchrun, whose patience is not that of a collective.
"""

import heapq
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bioinstruct.model.llm import choose_device
from bioinstruct.synth.console import Stopped
from bioinstruct.train.ranks.watch import Watch

T = TypeVar("T")
TIMEOUT = "BIOINSTRUCT_RANK_TIMEOUT_S"
"""Environment variable: seconds after which a collective that lacks a rank fails."""
_PATIENCE = timedelta(days=7)  # for the first rank's own work; torchrun ends a job whose ranks die


class Ranks:
    """Who this process is, and what the processes say to each other.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
        device: where this process computes.
        local_rank: number of this process on its machine.
        local_size: number of processes on this machine.
        watch: tells which rank died; None alone.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        device: torch.device | str = "cpu",
        local_rank: int = 0,
        local_size: int = 1,
        watch: Watch | None = None,
    ) -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self.local_rank, self.local_size = local_rank, local_size
        self.watch, self._said = watch, 0

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files and talks to the user."""
        return self.rank == 0

    def begin_step(self, number: int) -> None:
        """Note which step this rank is in, for the report should it die."""
        if self.watch is not None:
            self.watch.begin_step(number)

    def trouble(self) -> None:
        """Expect a rank to be lost: torchrun ends all ranks when one dies, by SIGTERM."""
        if self.watch is not None:
            self.watch.trouble()

    def sum_(self, x: Tensor) -> None:
        """Replace a tensor by its sum over ranks, in one collective."""
        if self.size > 1:
            dist.all_reduce(x)

    def total(self, values: Sequence[float]) -> list[float]:
        """Sum numbers over ranks, all of them in one collective, in float64."""
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.sum_(sums)
        totals: list[float] = sums.tolist()
        return totals

    def any_(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return self.total([float(flag)])[0] > 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks; small and picklable."""
        values: list[T | None] = [None] * self.size
        if self.size == 1:
            return [value]
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]  # every slot is filled

    def from_first(self, make: Callable[[], T]) -> T:
        """Let the first rank make a value, however long it takes, and hand it to all.

        Args:
            make: called on the first rank alone; its value is small and picklable.

        Raises:
            ValueError, OSError: what make raised, on every rank.
        """
        if self.size == 1:
            return make()
        self._said += 1
        store, key = _store(), f"bioinstruct/first/{self._said}"
        if not self.is_first:
            store.wait([key], _PATIENCE)
            value, error = pickle.loads(store.get(key))
        else:
            value, error = _outcome(make)
            store.set(key, pickle.dumps((value, error)))
        if error is not None:
            raise error
        made: T = value
        return made

    def first_then_all(self, make: Callable[[], T]) -> T:
        """Let the first rank make something, then every other rank its own.

        Raises:
            ValueError, OSError: what make raised on the first rank, on every rank.
        """
        made: list[T] = []
        self.from_first(lambda: made.append(make()))
        return made[0] if self.is_first else make()


def _outcome(make: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return make(), None
    except (ValueError, OSError) as error:
        return None, error


def _store() -> Any:
    # the only way to the store that the group itself was made with
    return dist.distributed_c10d._get_default_store()


ALONE = Ranks()
"""One process on the CPU."""


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Be the rank that torchrun's environment names; without torchrun, alone.

    NCCL joins GPUs, gloo joins CPUs. A collective that waits for longer than the environment
    variable BIOINSTRUCT_RANK_TIMEOUT_S, 600 by default, fails.

    Args:
        device: auto | cpu | cuda, and alone also cuda:N.

    Raises:
        ValueError: a device that is unknown, or GPUs that are not there for all ranks.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(device=choose_device(device))
        return
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    own = _own_device(device, local_rank, local_size)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo",
        timeout=timedelta(seconds=_timeout_s()),
        device_id=own if own.type == "cuda" else None,
    )
    rank = int(os.environ["RANK"])
    watch = Watch(rank, size)
    with _reported(watch):
        yield Ranks(
            rank, size, device=own, local_rank=local_rank, local_size=local_size, watch=watch
        )
        # not after an error: the other ranks may be anywhere, and the process ends
        dist.barrier()
    dist.destroy_process_group()


def to_its_end(work: Callable[[], object]) -> None:
    """Do a process's work; one of several then ends at once, with the work's exit code.

    The interpreter's own shutdown is left out there: threads of gloo or NCCL that still ask for the
    interpreter would abort a process that has done its work.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        work()
        return
    code = 0
    try:
        work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:
            stream.flush()
    os._exit(code)


@contextmanager
def _reported(watch: Watch) -> Iterator[None]:
    """Turn a collective that failed into the sentence which rank died, and tell own errors."""
    try:
        yield
    except (Stopped, KeyboardInterrupt):
        raise
    except Exception as error:
        own = isinstance(error, (ValueError, OSError, torch.OutOfMemoryError))
        if isinstance(error, RuntimeError) and not own and (lost := watch.verdict()):
            raise ConnectionError(lost) from error
        watch.announce(str(error) or type(error).__name__)
        raise
    finally:
        watch.close()


def _timeout_s() -> float:
    text = os.environ.get(TIMEOUT, "600")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ValueError(f"{TIMEOUT} = {text!r} must be a number of seconds above 0")
    return seconds


def _own_device(device: str, local_rank: int, local_size: int) -> torch.device:
    kind = choose_device(device)
    if kind.type == "cpu":
        return kind
    if kind.index is not None:
        raise ValueError(
            f"device = {device!r} under torchrun would give one GPU to all processes; set it to "
            "cuda or auto, and each takes its own"
        )
    if torch.cuda.device_count() < local_size:
        raise ValueError(
            f"torchrun started {local_size} processes here, but this machine shows "
            f"{torch.cuda.device_count()} GPUs; set --nproc-per-node to that number"
        )
    return torch.device("cuda", local_rank)


def deal(costs: Sequence[float], size: int) -> list[list[int]]:
    """Deal packs to ranks: the dearest first, each to the rank with the least work so far.

    No rank gets more than ceil(packs / size), so that ranks which must take the same number of
    passes need the fewest idle ones; each rank's packs come dearest first, so that passes that run
    side by side are alike.

    Args:
        costs: of each pack, in any unit.
        size: number of ranks.

    Returns:
        The numbers of each rank's packs.
    """
    most = -(-len(costs) // size)
    hands: list[list[int]] = [[] for _ in range(size)]
    least = [(0.0, rank) for rank in range(size)]
    for pack in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        work, rank = heapq.heappop(least)
        hands[rank].append(pack)
        if len(hands[rank]) < most:
            heapq.heappush(least, (work + costs[pack], rank))
    return hands
