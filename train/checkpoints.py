"""The states of a run: taken up when it is resumed, written while it goes on.

resume/state.py knows files and tensors; here is what a run puts into them, and what must not have
changed when it comes back.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bioinstruct.kernels.attention import choose_backend
from bioinstruct.kernels.native import operations
from bioinstruct.model.adapters import Adapters
from bioinstruct.model.lora.pissa import Factors
from bioinstruct.synth.console import note
from bioinstruct.train.plan.prepare import Prepared
from bioinstruct.train.resume import folder
from bioinstruct.train.resume.fingerprint import fingerprint
from bioinstruct.train.resume.standing import Standing
from bioinstruct.train.resume.state import Keep, Saver, Snapshot, State, open_state, snapshot
from bioinstruct.train.step import Optimizer

MASTERS, TRAINED = "masters.flat", "average.flat"
"""Names of the adapters' masters in a state, and of their average where one is kept."""


class Checkpoints:
    """Writes and reads the states of a run.

    Args:
        prepared: the run.
        out: its folder.
        optimizer: holds what trains, and the moments.
    """

    def __init__(self, prepared: Prepared, out: Path, optimizer: Optimizer) -> None:
        self.prepared, self.out, self.optimizer = prepared, out, optimizer
        self.num_writers = optimizer.masters.num_writers
        self.saver = Saver(folder.states_of(out), rank=prepared.ranks.rank, size=self.num_writers)
        self._fingerprint: dict[str, Any] | None = None

    def take_up(self) -> Standing | None:
        """Continue from the newest whole state.

        Returns:
            Where the run stands; None where it has no state yet.

        Raises:
            ValueError: the run is another one, or its states are damaged.
        """

        def find() -> str:
            state = folder.find_state(self.out, self.fingerprint())
            return "" if state is None else state.path.name

        name = self.prepared.ranks.from_first(find)
        if not name:
            note(f"{self.out} holds no state yet; starting at step 0")
            return None
        return self._restore(open_state(folder.states_of(self.out) / name))

    def _restore(self, state: State) -> Standing:
        self.optimizer.restore(state)
        self._keep_attention(state)
        self._compare_operations(state)
        standing = Standing.of(state.facts["standing"])
        asked = self.prepared.planner.max_tokens
        if standing.asked_tokens != asked:
            standing.max_tokens = standing.asked_tokens = asked
        if standing.skipped_in_a_row >= self.prepared.run.train.max_skipped:
            standing.skipped_in_a_row = 0
        before, now = state.facts["ranks"], self.prepared.ranks.size
        told = "" if before == now else f", taken by {before} ranks: equal up to rounding on {now}"
        note(f"resuming after step {state.step} of {self.prepared.num_steps}{told}")
        return standing

    def _keep_attention(self, state: State) -> None:
        """Compute with the backend that the run had: auto is a timed choice, and might differ."""
        model, before = self.prepared.llm.model, state.facts.get("attention")
        if self.prepared.run.attention != "auto" or before in (None, model.attention_backend):
            return
        try:
            model.attention_backend = choose_backend(before, model.device, model.dtype)
        except ValueError as error:
            note(f"{error}; the run goes on with {model.attention_backend}, equal up to rounding")

    def _operations(self) -> str:
        model = self.prepared.llm.model
        return operations(model.device, model.dtype)

    def _compare_operations(self, state: State) -> None:
        """Say so where a compiler came or went, as the bytes are no longer those of one run."""
        now, before = self._operations(), state.facts.get("operations")
        if before not in (None, now):
            note(f"its operations ran in {before}, and now in {now}: equal up to rounding")

    def fingerprint(self) -> dict[str, Any]:
        """Return what determines this run; taken once."""
        if self._fingerprint is None:
            prepared = self.prepared
            self._fingerprint = fingerprint(
                prepared.run,
                tokens=prepared.tokens,
                validation=prepared.validation,
                model=prepared.llm.path,
                dtype=prepared.llm.model.dtype,
                num_steps=prepared.num_steps,
            )
        return self._fingerprint

    def save(self, standing: Standing, before: Callable[[], None], *, wait: bool) -> None:
        """Write adapter and state in a thread.

        Args:
            standing: where the run stands.
            before: called in the thread before anything is written.
            wait: whether all ranks wait until they are written.

        Raises:
            ValueError, OSError: they cannot be written, or the ones before could not.
        """
        if self.prepared.ranks.rank < self.num_writers:
            self._start(standing, before)
        if wait:
            self.prepared.ranks.from_first(self.saver.wait)

    def _start(self, standing: Standing, before: Callable[[], None]) -> None:
        facts = {
            "fingerprint": self.fingerprint() if self.prepared.ranks.is_first else {},
            "standing": standing.facts(),
            "updates": self.optimizer.updates,
            "ranks": self.prepared.ranks.size,
            "attention": self.prepared.llm.model.attention_backend,
            "operations": self._operations(),
            "torch": torch.__version__,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        taken = snapshot(standing.step, self.optimizer.pieces(), facts)

        def first() -> None:
            before()
            if self.prepared.ranks.is_first:
                self._save_adapter(taken)

        keep = Keep(self.prepared.run.train.keep, standing.best_step)
        self.saver.save(taken, keep, first)

    def _save_adapter(self, taken: Snapshot) -> None:
        if self.prepared.adapters is None:
            return
        adapters = self.prepared.adapters
        copy = Adapters(self.prepared.llm.config, adapters.settings)
        copy.flat_P.copy_(taken.pieces.get(TRAINED, taken.pieces[MASTERS]).rows)
        copy.taken = [Factors(start.a_RK.cpu(), start.b_NR.cpu()) for start in adapters.taken]
        copy.save(self.out / "adapter", str(self.prepared.llm.path))
