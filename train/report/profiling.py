"""`--profile a:b`: a trace of the steps a to b, to be opened in chrome://tracing or Perfetto."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bioinstruct.synth.console import note
from bioinstruct.synth.files import replaces


def read_steps(text: str) -> tuple[int, int]:
    """Read "a:b", the first and the last step of a trace, counted from 1.

    Raises:
        ValueError: it is something else.
    """
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(f"--profile {text!r} must be a:b, two step numbers from 1 on, as in 3:5")
    return int(first), int(last)


def check_reached(steps: tuple[int, int], taken: int, num_steps: int) -> None:
    """Refuse a trace that would never begin.

    Args:
        steps: first and last step of the trace.
        taken: steps taken before.
        num_steps: of the whole run.

    Raises:
        ValueError: its first step is taken already, or never.
    """
    if not taken < steps[0] <= num_steps:
        raise ValueError(
            f"--profile {steps[0]}:{steps[1]} would trace nothing: what is left of this run is the "
            f"steps {taken + 1} to {num_steps}; name some of those"
        )


class Profile:
    """Traces some steps of a run.

    Args:
        out: folder of the run.
        steps: first and last step; None for no trace.
    """

    def __init__(self, out: Path, steps: tuple[int, int] | None) -> None:
        self.out, self.steps = out, steps
        self._running: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Enclose a step, counted from 1; the trace begins and ends with the steps asked for."""
        if self.steps is not None and number == self.steps[0]:
            self._begin()
        with record_function("step"):
            yield
        if self.steps is not None and number >= self.steps[1]:
            self.close()

    def _begin(self) -> None:
        kinds = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(ProfilerActivity.CUDA)
        self._running = profile(activities=kinds)
        self._running.__enter__()

    def close(self) -> None:
        """Write what was traced so far, if anything was."""
        if self._running is None or self.steps is None:
            return
        self._running.__exit__(None, None, None)
        path = self.out / f"profile-{self.steps[0]}-{self.steps[1]}.json"
        with replaces(path) as temporary:
            self._running.export_chrome_trace(str(temporary))
        self._running = None
        note(f"the trace is in {path}; open it in chrome://tracing or ui.perfetto.dev")
