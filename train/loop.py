"""The training run, from settings to files: prepare, score, train, score again.

    plan/prepare.py    loads and checks everything
    resume/folder.py   the output folder, also of a run that is resumed
    trainer.py         takes the steps, evaluates, saves, stops
    report/scores.py   task scores before and after

Under torchrun every rank runs this module alike; files are written, answers generated and scored,
by the first rank alone.
"""

import dataclasses
import os
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.utils import deterministic

from bioinstruct.eval.report import Row
from bioinstruct.model.adapters import Adapters
from bioinstruct.model.checkpoint import open_checkpoint
from bioinstruct.model.llm import Llm
from bioinstruct.synth.console import Stopped, note
from bioinstruct.train.checkpoints import MASTERS, TRAINED
from bioinstruct.train.outcome import outcome_name
from bioinstruct.train.plan.dry_run import summary
from bioinstruct.train.plan.prepare import Prepared, made, prepare
from bioinstruct.train.ranks.process import ALONE, Ranks
from bioinstruct.train.report.profiling import check_reached
from bioinstruct.train.report.scores import check_best, score_tasks, stored_row, write_report
from bioinstruct.train.report.tensorboard_log import check_installed
from bioinstruct.train.resume import folder
from bioinstruct.train.resume.state import open_state, state_name
from bioinstruct.train.run import Run
from bioinstruct.train.trainer import Trainer
from bioinstruct.train.weights.full import FullMasters


def train(
    run: Run,
    recipe_name: str,
    command: str,
    ranks: Ranks = ALONE,
    *,
    resume: bool = False,
    profile: tuple[int, int] | None = None,
) -> Path:
    """Run it all.

    Args:
        run: the settings.
        recipe_name: names the default output folder.
        command: what the user typed, noted in run.toml.
        ranks: who trains; all of them call this.
        resume: continue the run in run.out.
        profile: first and last step to trace.

    Returns:
        The output folder.

    Raises:
        ValueError: as for prepare; a folder that holds a run; a run that cannot be continued as
            this one; too many steps that are not finite; a record that does not fit into memory;
            steps to trace that are not taken.
        OSError: files cannot be read or written.
        Stopped: the run was interrupted; its state is saved.
    """
    start_s = time.monotonic()
    out = ranks.from_first(lambda: folder.output_folder(run, recipe_name, resume))
    if resume and ranks.from_first(lambda: folder.is_finished(out)):
        what = outcome_name(run.train.method)
        note(f"the run in {out} is finished; its {what} is in {out / what}")
        return out
    if run.train.tensorboard:
        check_installed()
    if run.train.deterministic:
        _be_deterministic()
    prepared = prepare(dataclasses.replace(run, out=str(out)), ranks)
    check_best(run.train.keep_best, prepared.jobs)
    note(summary(prepared))
    with ExitStack() as stack:
        # only now is something written
        ranks.from_first(lambda: stack.enter_context(folder.held(out)))
        trainer = Trainer(prepared, out, profile)
        step = trainer.take_up() if resume else None
        if profile is not None:
            check_reached(profile, step or 0, prepared.num_steps)
        ranks.from_first(lambda: folder.begin(out, prepared.run, made(prepared, command), step))
        note(f"writing to {out}")
        try:
            _train(prepared, trainer, start_s)
        except KeyboardInterrupt:
            raise Stopped(trainer.hint()) from None
    return out


def _train(prepared: Prepared, trainer: Trainer, start_s: float) -> None:
    rows: dict[str, Row] = {}
    if prepared.jobs and prepared.run.eval.before:
        _score_before(rows, prepared, trainer.out)
    trainer.run()
    _finish(rows, prepared, trainer, start_s)


def _be_deterministic() -> None:
    """Make torch refuse every operation that may give another result the next time."""
    # cuBLAS splits sums by the workspace it finds; of fixed size it always splits them alike
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # no need to fill memory that is about to be written; tests do that
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _score_before(rows: dict[str, Row], prepared: Prepared, out: Path) -> None:
    """Score the untrained model, or take the scores from before the interruption."""
    plain = Llm(prepared.llm.path, prepared.llm.model, prepared.llm.tokenizer, _begun(prepared))

    def take_stored() -> bool:
        stored = stored_row(prepared.jobs, out, "before")
        if stored is not None:
            rows["before"] = stored
        return stored is not None

    if not prepared.ranks.from_first(take_stored):
        prepared.on_first(lambda own: _score(rows, prepared, plain, own, "before"), out)


def _score(
    rows: dict[str, Row],
    prepared: Prepared,
    llm: Llm,
    out: Path,
    stage: str,
    outcome: Path | None = None,
) -> None:
    template = prepared.template.name
    rows[stage] = score_tasks(llm, prepared.jobs, template, out, stage, outcome=outcome)


def _finish(rows: dict[str, Row], prepared: Prepared, trainer: Trainer, start_s: float) -> None:
    """Score what came out and close the run."""
    out, standing = trainer.out, trainer.standing
    if prepared.jobs:

        def score(own: Path) -> None:
            _score(rows, prepared, _tuned(prepared, trainer), own, "after", trainer.kept)

        prepared.on_first(score, out)
        if prepared.ranks.is_first:
            seconds, kept = time.monotonic() - start_s, trainer.kept
            run, jobs = prepared.run, prepared.jobs
            print(write_report(out, run, rows, jobs, seconds=seconds, outcome=kept))
    prepared.ranks.from_first(lambda: folder.finish(out, standing.step))
    what = trainer.outcome.name
    if standing.best_step is not None:
        note(f"the best {what}, of step {standing.best_step}, is in {trainer.best}")
    note(f"the {what} is in {trainer.outcome}")


def _begun(prepared: Prepared) -> Adapters | None:
    """The adapters that belong to the untrained model: PiSSA's hold a part of it."""
    adapters, llm = prepared.adapters, prepared.llm
    if adapters is None or not adapters.taken:
        return None
    begun = Adapters(llm.config, adapters.settings, llm.model.device)
    with torch.no_grad():
        for module, start in zip(begun.modules, adapters.taken, strict=True):
            module.a_RK.copy_(start.a_RK)
            module.b_NR.copy_(start.b_NR)
    return begun


def _tuned(prepared: Prepared, trainer: Trainer) -> Llm:
    """The model with what is best, or with what came out last."""
    llm, masters, standing = prepared.llm, prepared.masters, trainer.standing
    if isinstance(masters, FullMasters):
        masters.read(open_checkpoint(trainer.kept))
        return llm
    step = standing.step if standing.best_step is None else standing.best_step
    state = open_state(folder.states_of(trainer.out) / state_name(step))
    assert prepared.adapters is not None
    tuned = Adapters(llm.config, prepared.adapters.settings, llm.model.device)
    with torch.no_grad():
        tuned.flat_P.copy_(state.read(TRAINED if TRAINED in state.names() else MASTERS))
    return Llm(llm.path, llm.model, llm.tokenizer, tuned)
