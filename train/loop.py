"""The training run, from settings to files; every stage is a function.

    prepare   load model and tokenizer, encode the records, plan the steps; changes nothing on disk
              but the token cache
    dry_run   print what would be done
    train     prepare, score, step, validate, save, score again

Ctrl-C and SIGTERM are taken at the next step boundary: the adapter so far is written and the run
ends with exit code 3.
"""

import dataclasses
import json
import math
import os
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from bioinstruct.eval.report import Row
from bioinstruct.eval.runner import Job
from bioinstruct.kernels.attention import self_test
from bioinstruct.model.adapters import Adapters
from bioinstruct.model.generate import generate
from bioinstruct.model.llm import Llm, load
from bioinstruct.model.templates import Template, decode_answer, get_template
from bioinstruct.synth.console import Progress, Stopped, note
from bioinstruct.synth.files import write_text
from bioinstruct.train.batch import collate
from bioinstruct.train.demo import resolve
from bioinstruct.train.metrics import MetricsLog, loss_svg, mfu, peak_memory_bytes, step_flops
from bioinstruct.train.mixture import files_of, load_mixture
from bioinstruct.train.planner import Planner, StepPlan, learning_rate
from bioinstruct.train.provenance import commit, device_name, package_version
from bioinstruct.train.run import Run, to_toml
from bioinstruct.train.scores import prepare_jobs, score_tasks, write_report
from bioinstruct.train.step import Optimizer, summed_loss, train_step
from bioinstruct.train.tokens import Limits, TokenSet

SAMPLE_TOKENS = 64
_PACKAGES = ("bioinstruct", "torch", "numpy", "safetensors", "sentencepiece", "tiktoken")


@dataclass(frozen=True)
class Prepared:
    """A run that has been checked and is ready to step."""

    run: Run
    llm: Llm
    """Model and tokenizer; its adapters are the ones that train."""
    template: Template
    tokens: TokenSet
    validation: TokenSet | None
    planner: Planner
    num_steps: int
    jobs: list[Job]
    """Tasks to score before and after training."""

    @property
    def adapters(self) -> Adapters:
        """What trains."""
        assert self.llm.adapters is not None
        return self.llm.adapters


def prepare(run: Run) -> Prepared:
    """Load, check and plan everything that a run needs.

    Raises:
        ValueError: missing settings, files that are missing, damaged or do not fit each other,
            records that the settings refuse.
        OSError: a file cannot be read.
    """
    if not run.model.path:
        raise ValueError("model.path is not set; give --set model.path=FOLDER")
    files_of(run.data)
    jobs = prepare_jobs(run)
    note(f"loading {run.model.path}")
    llm = load(
        resolve(run.model.path),
        dtype=run.model.dtype,
        device=run.device,
        tokenizer=resolve(run.model.tokenizer) if run.model.tokenizer else None,
        attention=run.attention,
    )
    model = llm.model
    error = self_test(model.attention_backend, model.device, model.dtype)
    name = llm.default_template() if run.data.template == "auto" else run.data.template
    note(
        f"{llm.config.parameter_count():,} parameters, {_plain(model.dtype)} on {model.device}, "
        f"attention {model.attention_backend} (self-test error {error:.0e}), template {name}"
    )
    template = get_template(name, llm.tokenizer)
    limit = min(run.data.max_tokens_per_pack, llm.config.max_positions)
    limits = Limits(limit, run.data.on_empty, run.data.on_overlong, run.data.turns)
    tokens, validation = load_mixture(run, template, llm.tokenizer, limits)
    planner = Planner(
        tokens.lengths,
        tokens.supervised,
        max_tokens=run.data.max_tokens_per_pack,
        batch_samples=_batch_samples(run),
        batch_tokens=run.train.batch_tokens,
        seed=run.train.seed,
        shuffle=run.data.shuffle,
    )
    num_steps = run.train.steps or planner.num_steps(run.train.epochs)
    llm.adapters = Adapters.starting(llm.config, run.lora, model.device, run.train.seed)
    run = dataclasses.replace(run, lora=llm.adapters.settings)
    return Prepared(run, llm, template, tokens, validation, planner, num_steps, jobs)


def _batch_samples(run: Run) -> int | None:
    if run.train.batch_tokens is not None:
        return None
    return run.train.batch_samples or 32


def dry_run(run: Run) -> None:
    """Check a run and print what it would do; only the token cache is written."""
    prepared = prepare(run)
    tokens, planner = prepared.tokens, prepared.planner
    first = planner.plan(0)
    print(_summary(prepared))
    fill = first.tokens / (len(first.packs) * planner.max_tokens)
    print(f"step 1: {len(first.packs)} packs, {first.tokens} tokens, {fill:.1%} of the packs' room")
    ids, prompt = tokens.sample(0)
    decode = prepared.llm.tokenizer.decode
    print(f"first sample, {tokens.places[0]}; supervised part between the lines:")
    print(
        f"{decode(ids[:prompt].tolist())}\n{'-' * 40}\n{decode(ids[prompt:].tolist())}\n{'-' * 40}"
    )
    print(f"its last supervised token is {int(ids[-1])}, {prepared.template.stop!r}")


def _summary(prepared: Prepared) -> str:
    tokens, run = prepared.tokens, prepared.run
    held = len(prepared.validation) if prepared.validation else 0
    supervised = tokens.supervised.sum() / tokens.lengths.sum()
    return (
        f"{len(tokens)} samples, {tokens.lengths.sum():,} tokens, {supervised:.1%} supervised, "
        f"{held} held out; {prepared.num_steps} steps; LoRA r={run.lora.r} "
        f"alpha={run.lora.alpha:g} on {', '.join(run.lora.targets)}: "
        f"{prepared.adapters.flat_P.numel():,} trained parameters"
    )


def train(run: Run, recipe_name: str, command: str) -> Path:
    """Run it all.

    Args:
        run: the settings.
        recipe_name: names the default output folder.
        command: what the user typed, noted in run.toml.

    Returns:
        The output folder.

    Raises:
        ValueError: as for prepare; a folder that holds a run; a loss that is not finite.
        OSError: files cannot be read or written.
        Stopped: the run was interrupted; the adapter so far is saved.
    """
    start_s = time.monotonic()
    out = _output_folder(run, recipe_name)
    prepared = prepare(run)
    run = prepared.run  # with the shape of an adapter that is continued
    note(_summary(prepared))
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "run.toml", to_toml(run, _made(prepared, command)))
    note(f"writing to {out}")
    llm, jobs, template = prepared.llm, prepared.jobs, prepared.template.name
    rows: dict[str, Row] = {}
    if jobs and run.eval.before:
        plain = Llm(llm.path, llm.model, llm.tokenizer)
        rows["before"] = score_tasks(plain, jobs, template, out, "before")
    log = MetricsLog(out / "metrics.jsonl")
    try:
        _steps(prepared, out, log)
    finally:
        log.close()
        _draw(out)
    if jobs:
        rows["after"] = score_tasks(llm, jobs, template, out, "after")
        print(write_report(out, run, rows, jobs, time.monotonic() - start_s))
    note(f"the adapter is in {out / 'adapter'}")
    return out


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
                row = _step(prepared, optimizer, step)
            except ValueError:
                _save(prepared, out)
                raise
            log.write(row)
            progress.update(step + 1, f"loss {row['loss']:.4f}, {row['tokens_per_s']:.0f} tokens/s")
            last = step + 1 == num_steps
            with optimizer.averaged():
                if not last and asked:
                    _save(prepared, out)
                    raise Stopped(
                        f"stopped after step {step + 1} of {num_steps}; the adapter so far is in "
                        f"{out / 'adapter'}"
                    )
                if last or _due(step, settings.eval_every):
                    _validate(prepared, step, out, log)
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


def _step(prepared: Prepared, optimizer: Optimizer, step: int) -> dict[str, Any]:
    """Take one step and return its row of metrics.jsonl."""
    settings, model = prepared.run.train, prepared.llm.model
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
    batches = (collate(prepared.tokens, pack, plan.draws, model.device) for pack in plan.packs)
    result = train_step(model, optimizer, batches, plan.supervised_tokens, lr, settings.seed)
    seconds = time.perf_counter() - start_s
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        raise ValueError(_not_finite(prepared, plan, step))
    lengths = prepared.tokens.lengths[list(plan.draws)].tolist()
    flops = step_flops(
        model.config, prepared.adapters.flat_P.numel(), lengths, plan.supervised_tokens
    )
    return {
        "step": step + 1,
        "epoch": plan.epoch,
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "tokens": plan.tokens,
        "supervised_tokens": plan.supervised_tokens,
        "tokens_per_s": plan.tokens / seconds,
        "mfu": mfu(flops, seconds, model.device),
        "peak_memory_bytes": peak_memory_bytes(model.device),
    }


def _not_finite(prepared: Prepared, plan: StepPlan, step: int) -> str:
    places = [prepared.tokens.places[i] for pack in plan.packs for i in pack]
    shown = ", ".join(places[:5]) + (f" and {len(places) - 5} more" if len(places) > 5 else "")
    return (
        f"the loss or gradient of step {step + 1} is not a finite number; it changed no weight, "
        f"and the adapter before it is saved. Its records: {shown}. Lower train.lr, or look at them"
    )


def _validate(prepared: Prepared, step: int, out: Path, log: MetricsLog) -> None:
    """Write the validation loss, and sample answers beside the references."""
    model, held = prepared.llm.model, prepared.validation
    if held is not None and len(held):
        planner = Planner(
            held.lengths,
            held.supervised,
            max_tokens=prepared.planner.max_tokens,
            batch_samples=len(held),
            shuffle=False,
        )
        plan = planner.plan(0)
        batches = [collate(held, pack, plan.draws, model.device) for pack in plan.packs]
        total = sum(summed_loss(model, prepared.adapters, batch) for batch in batches)
        loss = total / plan.supervised_tokens
        log.write({"step": step + 1, "val_loss": loss, "val_tokens": plan.supervised_tokens})
        note(f"validation loss {loss:.4f} after step {step + 1}")
    _write_samples(prepared, step, out)


def _write_samples(prepared: Prepared, step: int, out: Path) -> None:
    source = prepared.validation or prepared.tokens
    count = min(prepared.run.train.samples, len(source))
    if not count:
        return
    llm, template = prepared.llm, prepared.template
    pairs = [source.sample(i) for i in range(count)]
    room = llm.config.max_positions - max(prompt for _, prompt in pairs)
    if room < 1:
        return
    completions = generate(
        llm.model,
        [ids[:prompt].tolist() for ids, prompt in pairs],
        max_new_tokens=min(SAMPLE_TOKENS, room),
        end_ids=[template.stop_id(llm.tokenizer)],
        adapters=prepared.adapters,
        num_tokens=llm.tokenizer.vocab_size,
    )
    with (out / "samples.jsonl").open("a", encoding="utf-8") as file:
        for i, ((ids, prompt), completion) in enumerate(zip(pairs, completions, strict=True)):
            row = {
                "step": step + 1,
                "record": source.places[i],
                "prompt": llm.tokenizer.decode(ids[:prompt].tolist()),
                "answer": decode_answer(template, llm.tokenizer, completion.ids),
                "reference": decode_answer(template, llm.tokenizer, ids[prompt:].tolist()),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _save(prepared: Prepared, out: Path) -> None:
    prepared.adapters.save(out / "adapter", str(prepared.llm.path))


def _draw(out: Path) -> None:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    write_text(out / "loss.svg", loss_svg([json.loads(line) for line in lines]))


def _made(prepared: Prepared, command: str) -> dict[str, Any]:
    """How the run was made, for run.toml."""
    model = prepared.llm.model
    return {
        "command": command,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit() or "",
        "library": str(Path(__file__).parent),
        **{name: package_version(name) or "" for name in _PACKAGES},
        "python": platform.python_version(),
        "dtype": _plain(model.dtype),
        "device": str(model.device),
        "device_name": device_name(model.device),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "attention": model.attention_backend,
        "template": prepared.template.name,
        "tokenizer": prepared.llm.tokenizer.fingerprint,
        "steps": prepared.num_steps,
        "samples": len(prepared.tokens),
    }


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
