"""The steps of a run: take one, look at it, evaluate, save, stop.

    step.py         one optimizer step
    plan/room.py    makes packs smaller where memory runs out
    culprits.py     which records are behind a step that cannot be used or stands out
    evaluation.py   validation loss, sample answers and task scores while training
    checkpoints.py  what a resume needs (resume/: its files, its folder, what is no tensor)

A step is a function of the settings, the records and what the steps before it left behind: weights,
moments, average and Standing. All of that is in a state, so a resumed run takes the same steps to
the last bit. Requests to stop are taken at step boundaries; the flag rides on the sum of the loss,
so all ranks stop after the same step.
"""

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bioinstruct.synth.console import Progress, Stopped, note
from bioinstruct.synth.files import write_text
from bioinstruct.train import culprits, evaluation
from bioinstruct.train.checkpoints import Checkpoints
from bioinstruct.train.data.batch import Batch
from bioinstruct.train.outcome import outcome_name, save_outcome
from bioinstruct.train.plan.planner import StepPlan, learning_rate
from bioinstruct.train.plan.prepare import Prepared, own_batches
from bioinstruct.train.plan.room import halve, try_worst_pack
from bioinstruct.train.ranks.stops import stop_requests
from bioinstruct.train.report.metrics import (
    MetricsLog,
    loss_svg,
    mfu,
    peak_memory_bytes,
    step_flops,
)
from bioinstruct.train.report.profiling import Profile
from bioinstruct.train.report.tensorboard_log import tensorboard_writer
from bioinstruct.train.resume import folder
from bioinstruct.train.resume.standing import Standing
from bioinstruct.train.resume.state import steps_of
from bioinstruct.train.side_by_side import SideBySide
from bioinstruct.train.step import Optimizer, OutOfRoom, StepResult, train_step


class _Taken(NamedTuple):
    """A step that was taken."""

    plan: StepPlan
    result: StepResult
    row: dict[str, Any]


class _Ahead(NamedTuple):
    """A step whose batches are on the device before its turn."""

    step: int
    max_tokens: int
    plan: StepPlan
    batches: list[Batch]


class Trainer:
    """Takes the steps of a run.

    Args:
        prepared: the run.
        out: its folder.
        profile: first and last step to trace.
    """

    def __init__(
        self, prepared: Prepared, out: Path, profile: tuple[int, int] | None = None
    ) -> None:
        self.prepared, self.out, self.settings = prepared, out, prepared.run.train
        self.optimizer = Optimizer(
            prepared.masters,
            weight_decay=self.settings.weight_decay,
            clip=self.settings.clip,
            ema=self.settings.ema,
        )
        self.beside = side_by_side(prepared)
        room = prepared.planner.max_tokens
        self.standing = Standing(max_tokens=room, asked_tokens=room)
        self.checkpoints = Checkpoints(prepared, out, self.optimizer)
        self.profile = Profile(out, profile if prepared.ranks.is_first else None)
        self.log: MetricsLog  # opened by run
        self._ahead: _Ahead | None = None

    def take_up(self) -> int:
        """Continue from the newest whole state and return how many steps were taken.

        Raises:
            ValueError: the run is another one, or its states are damaged.
        """
        if (standing := self.checkpoints.take_up()) is not None:
            self.standing = standing
            self._set_room(standing.max_tokens)
        return self.standing.step

    def hint(self) -> str:
        """Say where the run stands and how it goes on."""
        where = f"the adapter so far is in {self.out / 'adapter'}"
        if not steps_of(folder.states_of(self.out)):
            where = "no state was saved yet"
        elif self.prepared.adapters is None:
            where = "its state is saved"
        return (
            f"stopped after step {self.standing.step} of {self.prepared.num_steps}; {where}; "
            f"continue with: {folder.resume_command(self.out)}"
        )

    @property
    def outcome(self) -> Path:
        """The folder of what came out in the end."""
        return self.out / outcome_name(self.settings.method)

    @property
    def best(self) -> Path:
        """The folder of what is best by train.keep_best."""
        return self.out / f"{self.outcome.name}-best"

    @property
    def kept(self) -> Path:
        """The folder of what is best, or of what came out last where nothing is kept as best."""
        return self.outcome if self.standing.best_step is None else self.best

    def run(self) -> None:
        """Take all steps that are left.

        Raises:
            ValueError: too many steps in a row that are not finite; a record that does not fit.
            OSError: a file cannot be written.
            Stopped: a signal asked for it; the state is saved.
        """
        first, also = self.prepared.ranks.is_first, None
        if first and self.settings.tensorboard:
            also = tensorboard_writer(self.out, self.standing.step)
        self.log = MetricsLog(self.out / folder.METRICS if first else Path(os.devnull), also)
        try:
            with stop_requests(self.prepared.ranks.trouble) as asked:
                self._run(asked)
            if self.prepared.adapters is None:
                with self.optimizer.averaged():
                    save_outcome(self.prepared, self.outcome)
        finally:
            self.profile.close()
            self.checkpoints.saver.wait()
            self.log.close()
            if first:
                self._draw()
        if skipped := self.standing.skipped:
            note(f"{skipped} of {self.standing.step} steps were skipped; {folder.METRICS} has them")

    def _run(self, asked: Sequence[int]) -> None:
        standing = self.standing
        progress = Progress("training", self.prepared.num_steps)
        if not self.over:
            self._try_room()
        if standing.evaluation_owed:
            standing.evaluation_owed = False
            self._evaluate()
        while not self.over:
            with self.profile.step(standing.step + 1):
                taken = self._step(asked)
            row, stop = taken.row, any(taken.result.flags)
            progress.update(
                standing.step, f"loss {row['loss']:.4f}, {row['tokens_per_s']:.0f} tokens/s"
            )
            self._after(taken, stop, asked)

    @property
    def over(self) -> bool:
        """Whether no step is left."""
        return self.standing.stopped_early or self.standing.step >= self.prepared.num_steps

    def _after(self, taken: _Taken, stop: bool, asked: Sequence[int]) -> None:
        """What follows a step: reports, evaluation, state, and the end of the run if asked for."""
        standing, every = self.standing, self.settings.save_every
        self._report(taken)
        improved, due = False, self.over or self._due(self.settings.eval_every, self._eval_every)
        if due and stop and not self.over:
            standing.evaluation_owed = True
        elif due:
            improved = self._evaluate()
            stop = self.prepared.ranks.any_(bool(asked))
        halt = standing.skipped_in_a_row >= self.settings.max_skipped
        if self.over or stop or halt or improved or self._due(every):
            wait = self.over or stop or halt
            self.checkpoints.save(standing, self.log.sync, wait=wait)
        if halt:
            raise ValueError(self._not_finite(taken))
        if stop and (not self.over or self.prepared.jobs):
            raise Stopped(self.hint())

    def _due(self, *every: int) -> bool:
        return any(n > 0 and self.standing.step % n == 0 for n in every)

    @property
    def _eval_every(self) -> int:
        return self.prepared.run.eval.every

    @property
    def _keeps_by_loss(self) -> bool:
        return self.settings.keep_best in ("", "val_loss")

    def _step(self, asked: Sequence[int]) -> _Taken:
        """Take one step, with smaller packs where memory runs out."""
        prepared, settings, step = self.prepared, self.settings, self.standing.step
        start_s = time.perf_counter()
        prepared.ranks.begin_step(step + 1)
        lr = learning_rate(
            step,
            prepared.num_steps,
            peak=settings.lr,
            schedule=settings.schedule,
            warmup_steps=settings.warmup_steps,
            decay_share=settings.decay_share,
        )
        while True:
            plan, batches = self._planned(step)
            try:
                result = train_step(
                    prepared.llm.model,
                    self.optimizer,
                    batches,
                    plan.supervised_tokens,
                    lr,
                    settings.seed,
                    prepared.ranks,
                    self.beside,
                    lambda: [len(asked)],
                    lambda: self._look_ahead(step + 1),
                )
                break
            except OutOfRoom:
                self._set_room(halve(self.prepared))
        self.standing.step += 1
        row = self._row(plan, result, lr, time.perf_counter() - start_s)
        self.log.write(row)
        return _Taken(plan, result, row)

    def _planned(self, step: int) -> tuple[StepPlan, list[Batch]]:
        """The plan of a step and this rank's batches, made ahead or now."""
        room = self.prepared.planner.max_tokens
        if self._ahead is None or (self._ahead.step, self._ahead.max_tokens) != (step, room):
            plan = self.prepared.planner.plan(step)
            batches = list(own_batches(self.prepared, self.prepared.tokens, plan))
            self._ahead = _Ahead(step, room, plan, batches)
        return self._ahead.plan, self._ahead.batches

    def _look_ahead(self, step: int) -> None:
        """Make the next step's batches while the device is busy with this one's."""
        if step < self.prepared.num_steps:
            self._planned(step)

    def _row(self, plan: StepPlan, result: StepResult, lr: float, seconds: float) -> dict[str, Any]:
        prepared, device = self.prepared, self.prepared.llm.model.device
        flops = step_flops(
            prepared.llm.config,
            None if prepared.adapters is None else prepared.adapters.flat_P.numel(),
            prepared.tokens.lengths[list(plan.draws)].tolist(),
            plan.supervised_tokens,
        )
        return {
            "step": self.standing.step,
            "epoch": plan.epoch,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens": plan.tokens,
            "supervised_tokens": plan.supervised_tokens,
            "tokens_per_s": plan.tokens / seconds,
            "mfu": mfu(flops / prepared.ranks.size, seconds, device),
            "peak_memory_bytes": peak_memory_bytes(device),
        }

    def _try_room(self) -> None:
        """Run the largest pack to come, and halve the packs until it fits."""
        while True:
            try:
                try_worst_pack(self.prepared, self.standing.step)
                return
            except OutOfRoom:
                self._set_room(halve(self.prepared))

    def _set_room(self, max_tokens: int) -> None:
        self.standing.max_tokens = max_tokens
        planner = self.prepared.planner.with_room(max_tokens)
        self.prepared = dataclasses.replace(self.prepared, planner=planner)

    def _report(self, taken: _Taken) -> None:
        """Write and say what is unusual about a step, with the records behind it."""
        result, what = taken.result, (self.prepared, taken.plan, self.standing.step, self.log)
        for spike in self.standing.see(result.loss, result.grad_norm, self.settings.spikes):
            culprits.report_spike(*what, spike)
        if self.standing.skipped_in_a_row:
            culprits.report_skipped(*what)

    def _not_finite(self, taken: _Taken) -> str:
        places = [self.prepared.tokens.places[i] for pack in taken.plan.packs for i in pack]
        return (
            f"the loss or gradient of the last {self.standing.skipped_in_a_row} steps is not a "
            f"finite number (train.max_skipped); they changed no weight. Records of the last one: "
            f"{culprits.listed(places)}. Lower train.lr, or look at the records that "
            f"{self.out / folder.METRICS} names"
        )

    def _evaluate(self) -> bool:
        """Evaluate what is due after this step; return whether it is the best so far."""
        prepared, step = self.prepared, self.standing.step
        loss, scores = None, None
        with self.optimizer.averaged():
            if self.over or self._due(self.settings.eval_every):
                loss = evaluation.validate(prepared, step, self.out, self.log)
            # the last adapter is scored after training; here only where it may be the best
            if self._due(self._eval_every) and not (self.over and self._keeps_by_loss):
                scores = evaluation.score(prepared, step, self.out, self.log)
            better = self._judge(loss, scores)
            if better:
                save_outcome(prepared, self.best)
        return better

    def _judge(self, loss: float | None, scores: dict[str, dict[str, float]] | None) -> bool:
        """Whether train.keep_best was evaluated and is better than ever; ends a run that waits."""
        wanted, standing = self.settings.keep_best, self.standing
        if not wanted or (wanted == "val_loss" and loss is None):
            return False
        if wanted != "val_loss" and scores is None:
            return False
        value = loss if wanted == "val_loss" else _named(wanted, scores, self.prepared)
        assert value is not None
        better = standing.judge(value, lower_is_better=wanted == "val_loss")
        if self.settings.patience and standing.since_best >= self.settings.patience:
            standing.stopped_early = True
            note(
                f"stopping early: {wanted} has not been better than {standing.best:.4g} (step "
                f"{standing.best_step}) in {standing.since_best} evaluations"
            )
        return better

    def _draw(self) -> None:
        lines = (self.out / folder.METRICS).read_text(encoding="utf-8").splitlines()
        write_text(self.out / "loss.svg", loss_svg([json.loads(line) for line in lines]))


def side_by_side(prepared: Prepared) -> SideBySide | None:
    """What takes a run's packs several at once, or None where one is taken."""
    number, adapters = prepared.run.train.packs_at_once, prepared.adapters
    assert isinstance(number, int)
    if number == 1 or adapters is None:
        return None
    return SideBySide(prepared.llm.config, adapters, number)


def _named(wanted: str, scores: dict[str, dict[str, float]] | None, prepared: Prepared) -> float:
    """The score that TASK or TASK:SCORE names."""
    assert scores is not None
    task, _, name = wanted.partition(":")
    main = {job.task.name: job.task.main for job in prepared.jobs}
    return scores[task][name or main[task]]
