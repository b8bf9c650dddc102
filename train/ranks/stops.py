"""Requests to stop, taken at the next step boundary.

Ctrl-C (SIGINT), SIGTERM and SIGUSR1 are collected; the loop asks for them between steps. Schedulers
send SIGTERM, or what they are told to, some time before they kill: SLURM's `--signal=USR1@120`.
torchrun hands on SIGINT and SIGTERM by itself, and SIGUSR1 with `--signals-to-handle`.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from bioinstruct.synth.console import note

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def stop_requests(told: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """Collect the signals instead of breaking off.

    Alone, the same signal a second time breaks off. Under torchrun a repeated one does nothing: a
    terminal sends Ctrl-C to every process, and torchrun sends it once more.

    Args:
        told: called at each signal.

    Yields:
        The signals that came, in order.
    """
    asked: list[int] = []
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ

    def handler(number: int, frame: FrameType | None) -> None:
        if number in asked and not under_torchrun:
            raise KeyboardInterrupt
        if not asked:
            note(f"\n{signal.Signals(number).name}: stopping after this step")
        asked.append(number)
        told()

    previous = {number: signal.signal(number, handler) for number in SIGNALS}
    failed = False
    try:
        yield asked
    except Exception:
        failed = True
        raise
    finally:
        # a process that is stopping is not to be hurried on its way out; nor one that failed, for
        # torchrun sends SIGTERM when a rank dies, while the others still find out which one
        if not asked and not (failed and under_torchrun):
            for number, old in previous.items():
                signal.signal(number, old)


def interrupt_on_usr1() -> None:
    """Let SIGUSR1 end the process as Ctrl-C does, where no step boundary is waited for."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGUSR1, handler)
