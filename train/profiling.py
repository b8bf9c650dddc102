"""`--profile a:b`: a trace of the steps a to b, to be opened in chrome://tracing or Perfetto."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

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


class Profile:
    """Traces some steps of a run.

    Args:
        out: folder of the run.
        steps: first and last step; None for no trace.
    """

    def __init__(self, out: Path, steps: tuple[int, int] | None) -> None:
        self.out, self.steps = out, steps
        self._running: profile | None = None

    def before(self, step: int) -> None:
        """Begin where the trace begins with this step, counted from 1."""
        if self.steps is None or step != self.steps[0]:
            return
        kinds = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(ProfilerActivity.CUDA)
        self._running = profile(activities=kinds)
        self._running.__enter__()

    def after(self, step: int) -> None:
        """Write the trace where it ends with this step."""
        if self.steps is not None and step >= self.steps[1]:
            self.close()

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
