"""The training run, from settings to files: prepare, score, step, validate, save, score again.

    prepare.py      loads and checks everything
    step.py         one optimizer step
    evaluation.py   validation loss and sample answers
    scores.py       task scores before and after

Ctrl-C and SIGTERM are taken at the next step boundary: the adapter so far is written and the run
ends with exit code 3.

Under torchrun every rank runs this module alike and steps through its own packs; files are written,
answers generated and scored, by the first rank alone.
"""

import json
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from bioinstruct.eval.report import Row
from bioinstruct.model.llm import Llm
from bioinstruct.synth.console import Progress, Stopped, note
from bioinstruct.synth.files import write_text
from bioinstruct.train.dry_run import summary
from bioinstruct.train.evaluation import validate
from bioinstruct.train.metrics import MetricsLog, loss_svg, mfu, peak_memory_bytes, step_flops
from bioinstruct.train.planner import StepPlan, learning_rate
from bioinstruct.train.prepare import Prepared, made, own_batches, prepare
from bioinstruct.train.ranks import ALONE, Ranks
from bioinstruct.train.run import Run, to_toml
from bioinstruct.train.scores import score_tasks, write_report
from bioinstruct.train.step import Optimizer, train_step


def train(run: Run, recipe_name: str, command: str, ranks: Ranks = ALONE) -> Path:
    """Run it all.

    Args:
        run: the settings.
        recipe_name: names the default output folder.
        command: what the user typed, noted in run.toml.
        ranks: who trains; all of them call this.

    Returns:
        The output folder.

    Raises:
        ValueError: as for prepare; a folder that holds a run; a loss that is not finite.
        OSError: files cannot be read or written.
        Stopped: the run was interrupted; the adapter so far is saved.
    """
    start_s = time.monotonic()
    out = ranks.from_first(lambda: _output_folder(run, recipe_name))
    prepared = prepare(run, ranks)
    run = prepared.run  # with the shape of an adapter that is continued
    note(summary(prepared))
    ranks.from_first(lambda: _begin(prepared, out, command))
    note(f"writing to {out}")
    llm, jobs = prepared.llm, prepared.jobs
    rows: dict[str, Row] = {}
    if jobs and run.eval.before:
        plain = Llm(llm.path, llm.model, llm.tokenizer)
        ranks.from_first(lambda: _score(rows, plain, prepared, out, "before"))
    log = MetricsLog(out / "metrics.jsonl" if ranks.is_first else Path(os.devnull))
    try:
        _steps(prepared, out, log)
    finally:
        log.close()
        if ranks.is_first:
            _draw(out)
    if jobs:
        ranks.from_first(lambda: _score(rows, llm, prepared, out, "after"))
        if ranks.is_first:
            print(write_report(out, run, rows, jobs, time.monotonic() - start_s))
    note(f"the adapter is in {out / 'adapter'}")
    return out


def _score(rows: dict[str, Row], llm: Llm, prepared: Prepared, out: Path, stage: str) -> None:
    rows[stage] = score_tasks(llm, prepared.jobs, prepared.template.name, out, stage)


def _begin(prepared: Prepared, out: Path, command: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "run.toml", to_toml(prepared.run, made(prepared, command)))


def _output_folder(run: Run, recipe_name: str) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    out = Path(run.out) if run.out else Path("runs") / f"{recipe_name}-{stamp}"
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file; give a folder")
    if (out / "run.toml").exists() or (out / "metrics.jsonl").exists():
        raise ValueError(f"{out} already holds a run; choose another folder with --set out=FOLDER")
    return out


def _steps(prepared: Prepared, out: Path, log: MetricsLog) -> None:
    run, num_steps = prepared.run, prepared.num_steps
    settings = run.train
    optimizer = Optimizer(
        prepared.adapters,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        ema=settings.ema,
    )
    progress = Progress("training", num_steps)
    with _stop_requests() as asked:
        for step in range(num_steps):
            try:
                row, stop = _step(prepared, optimizer, step, asked)
            except ValueError:
                _save(prepared, out)
                raise
            log.write(row)
            progress.update(step + 1, f"loss {row['loss']:.4f}, {row['tokens_per_s']:.0f} tokens/s")
            last = step + 1 == num_steps
            with optimizer.averaged():
                if not last and stop:
                    _save(prepared, out)
                    raise Stopped(
                        f"stopped after step {step + 1} of {num_steps}; the adapter so far is in "
                        f"{out / 'adapter'}"
                    )
                if last or _due(step, settings.eval_every):
                    validate(prepared, step, out, log)
                if last or _due(step, settings.save_every):
                    _save(prepared, out)
    if optimizer.average_P is not None:
        prepared.adapters.flat_P.copy_(optimizer.average_P)


def _due(step: int, every: int) -> bool:
    return every > 0 and (step + 1) % every == 0


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of breaking off; a second one breaks off."""
    asked: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        note("\nstopping after this step")

    previous = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _step(
    prepared: Prepared, optimizer: Optimizer, step: int, asked: Sequence[int]
) -> tuple[dict[str, Any], bool]:
    """Take one step; return its row of metrics.jsonl, and whether a rank was asked to stop."""
    settings, model, ranks = prepared.run.train, prepared.llm.model, prepared.ranks
    start_s = time.perf_counter()
    plan = prepared.planner.plan(step)
    lr = learning_rate(
        step,
        prepared.num_steps,
        peak=settings.lr,
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
        decay_share=settings.decay_share,
    )
    ranks.begin_step(step + 1)
    batches = own_batches(prepared, prepared.tokens, plan)
    supervised = plan.supervised_tokens
    result = train_step(
        model, optimizer, batches, supervised, lr, settings.seed, ranks, lambda: [len(asked)]
    )
    seconds = time.perf_counter() - start_s
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        raise ValueError(_not_finite(prepared, plan, step))
    lengths = prepared.tokens.lengths[list(plan.draws)].tolist()
    flops = step_flops(
        model.config, prepared.adapters.flat_P.numel(), lengths, plan.supervised_tokens
    )
    row = {
        "step": step + 1,
        "epoch": plan.epoch,
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "tokens": plan.tokens,
        "supervised_tokens": plan.supervised_tokens,
        "tokens_per_s": plan.tokens / seconds,
        "mfu": mfu(flops / ranks.size, seconds, model.device),
        "peak_memory_bytes": peak_memory_bytes(model.device),
    }
    return row, any(result.flags)


def _not_finite(prepared: Prepared, plan: StepPlan, step: int) -> str:
    places = [prepared.tokens.places[i] for pack in plan.packs for i in pack]
    shown = ", ".join(places[:5]) + (f" and {len(places) - 5} more" if len(places) > 5 else "")
    return (
        f"the loss or gradient of step {step + 1} is not a finite number; it changed no weight, "
        f"and the adapter before it is saved. Its records: {shown}. Lower train.lr, or look at them"
    )


def _save(prepared: Prepared, out: Path) -> None:
    base = str(prepared.llm.path)
    prepared.ranks.from_first(lambda: prepared.adapters.save(out / "adapter", base))


def _draw(out: Path) -> None:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    write_text(out / "loss.svg", loss_svg([json.loads(line) for line in lines]))
