"""The campaign: every check, probe, bench and training run, each in a process of its own.

    python benches/run_all.py --stage check --budget-minutes 6 --out results/h200
    python benches/run_all.py --stage bench --budget-minutes 8 --out results/h200 --resume
    python benches/run_all.py --device cpu --tiny --out /tmp/rehearsal
    python benches/run_all.py --dry-run

Jobs run in the order of campaign.py, the most valuable first. A job that fails, hangs or crashes
costs only itself: it is killed at its limit, or when the budget ends, and the lines that it had
flushed stay. jobs.jsonl in --out keeps what ran, how it ended, and the GPU's clocks, power and
temperature before and after; with --resume, jobs that ended well and shapes that have a line are
left out. On a GPU the kernels are forced on. Exit code 0: all jobs have ended well, now or before,
or were left out for want of a package; 1: some failed (they are named); 3: the budget ended first,
and --resume goes on.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import click
import torch

from bioinstruct.benches.campaign import BENCHES, HERE, STAGES, Job, jobs
from bioinstruct.benches.harness import gpu_state, report
from bioinstruct.benches.kernel_bench import predict
from bioinstruct.kernels.dispatch import VARIABLE
from bioinstruct.model.llm import choose_device
from bioinstruct.synth import console
from bioinstruct.train.report.provenance import commit

LEAST_S = 5.0
"""A job is not begun with less of the budget than this."""
LOG = "jobs.jsonl"


class Campaign:
    """Jobs into a folder, within a budget.

    Args:
        out: the folder.
        device: auto, cpu, cuda or cuda:N.
        budget_s: of all jobs together.
    """

    def __init__(self, out: Path, device: str, budget_s: float) -> None:
        self.out, self.log, self.device = out, out / LOG, device
        self.ends_s = time.monotonic() + budget_s
        out.mkdir(parents=True, exist_ok=True)
        self.place = choose_device(device)
        self.environment = dict(os.environ)
        if self.place.type == "cuda":
            self.environment[VARIABLE] = "triton"

    def ended_well(self) -> set[tuple[str, str]]:
        """Stage and name of the jobs that have."""
        if not self.log.exists():
            return set()
        rows = map(json.loads, self.log.read_text(encoding="utf-8").splitlines())
        return {(row["stage"], row["job"]) for row in rows if row["exit_code"] == 0}

    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self.ends_s - time.monotonic()

    def run(self, stage: str, job: Job) -> bool:
        """Run a job to its end or its limit, and log it; whether it did not fail."""
        missing = [name for name in job.needs if importlib.util.find_spec(name) is None]
        if missing:
            why = f"{', '.join(missing)} not installed"
            report({"stage": stage, "job": job.name, "exit_code": None, "left_out": why}, self.log)
            return True
        limit_s = min(job.limit_s, self.left_s())
        choices = ("--choices", str(self.out / "gemm_choices.json")) if job.name == "gemm" else ()
        command = [
            *(sys.executable, str(HERE / f"{job.script}.py"), *job.arguments, *choices),
            *("--device", self.device, "--out", str(self.out / f"{job.script}.jsonl")),
        ]
        before, start_s = gpu_state(self.place), time.monotonic()
        code = _run_limited(command, self.environment, limit_s)
        row = {
            "stage": stage,
            "job": job.name,
            "exit_code": code,
            "seconds": time.monotonic() - start_s,
            "limit_s": limit_s,
            "gpu_before": before,
            "gpu_after": gpu_state(self.place),
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        report(row, self.log)
        return code == 0


def _run_limited(command: list[str], environment: dict[str, str], limit_s: float) -> int | None:
    """Exit code of a process group of its own, None where it was killed at its limit."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
    )
    try:
        return process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            # what the job itself has started must not hold the GPU either
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_stages(campaign: Campaign, stages: list[str], *, tiny: bool, rounds: int) -> None:
    """Run what has not ended well yet.

    Raises:
        ValueError: jobs failed.
        Stopped: the budget ended before the jobs did.
    """
    known, failed, waiting = campaign.ended_well(), [], []
    for stage in stages:
        for job in jobs(stage, tiny=tiny, rounds=rounds):
            if (stage, job.name) in known:
                continue
            if campaign.left_s() < LEAST_S:
                waiting.append(job.name)
            elif not campaign.run(stage, job):
                failed.append(job.name)
    if waiting:
        raise console.Stopped(
            f"the budget ended before {len(waiting)} jobs ({', '.join(waiting)}); the same command "
            "with --resume goes on" + (f"; failed: {', '.join(failed)}" if failed else "")
        )
    if failed:
        raise ValueError(f"{len(failed)} jobs failed: {', '.join(failed)}")


def dry_run(out: Path | None) -> None:
    """Bytes, FLOPs and predicted times of every bench, and nothing else."""
    for script, bench in BENCHES.items():
        for shape in bench.shapes:
            place = None if out is None else out / f"{script}.jsonl"
            report(predict(bench, shape, 2), place)


def _check_folder(out: Path, resume: bool) -> None:
    if (out / LOG).exists() and not resume:
        raise ValueError(f"--out {out} holds a campaign already; add --resume or name another")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--stage", "stages", type=click.Choice(STAGES), multiple=True, help="All when left out."
)
@click.option("--budget-minutes", type=click.FloatRange(min=0), default=30.0, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N")
@click.option("--tiny", is_flag=True, help="Small shapes, to rehearse on a CPU.")
@click.option("--dry-run", "dry", is_flag=True, help="Only bytes, FLOPs and predicted times.")
@click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--resume", is_flag=True, help="Go on with what --out holds.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of files.")
def command(
    stages: tuple[str, ...],
    budget_minutes: float,
    device: str,
    tiny: bool,
    dry: bool,
    rounds: int,
    resume: bool,
    out: Path | None,
) -> None:
    """Run the campaign, or some stages of it."""
    if dry:
        dry_run(out)
        return
    if out is None:
        raise click.UsageError("--out is missing: the folder that the lines go to")
    if choose_device(device).type == "cpu" and not tiny:
        raise ValueError("the campaign's shapes are for a GPU; rehearse with --device cpu --tiny")
    _check_folder(out, resume)
    torch.set_num_threads(1)
    campaign = Campaign(out, device, 60 * budget_minutes)
    run_stages(campaign, list(stages or STAGES), tiny=tiny, rounds=rounds)


if __name__ == "__main__":
    console.run(command)
