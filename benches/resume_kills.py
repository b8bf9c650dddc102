"""A run killed many times, with kill -9 at random moments, against the same run left alone.

    python benches/resume_kills.py --kills 25

trains a real small model on real records, saving a state after every step, so that many kills fall
into a save; each is followed by `--resume`. In the end the adapters must be equal byte by byte, and
every row of metrics.jsonl but for times and memory. Prints one JSON line: kills, the step after
which each came and the one it was resumed from, how many fell into a save, and what is equal.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
TIMED = ("tokens_per_s", "peak_memory_bytes", "mfu")
PATIENCE_S = 600.0


def settings(out: Path, steps: int) -> list[str]:
    """The command of the run."""
    values = {
        "model.path": DATA / "stories260K",
        "model.tokenizer": DATA / "tokenizers" / "stories260K_tok512.model",
        "model.dtype": "float32",
        "device": "cpu",
        "data.path": DATA / "bioinstruct_real_sample_32.json",
        "data.on_overlong": "drop",
        "data.max_tokens_per_pack": 512,
        "data.validation": 0.2,
        "train.steps": steps,
        "train.batch_samples": 2,
        "train.ema": 0.9,
        "train.eval_every": 10,
        "train.samples": 1,
        "train.save_every": 1,
        "train.keep_best": "val_loss",
        "lora.r": 8,
        "lora.dropout": 0.1,
        "out": out,
    }
    flags = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, str(ROOT / "train" / "main.py"), *flags, "--resume"]


def steps_taken(out: Path) -> int:
    """Steps in metrics.jsonl."""
    path = out / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count('"grad_norm"') if path.is_file() else 0


def killed(command: list[str], out: Path, step: int, delay_s: float) -> dict[str, Any]:
    """Start the run, kill it some time after a step, and say what was left."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=errors, stderr=errors, env=environment)
        deadline_s = time.monotonic() + PATIENCE_S
        while steps_taken(out) < step and process.poll() is None:
            if time.monotonic() > deadline_s:
                process.kill()
            time.sleep(0.001)
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
        errors.seek(0)
        said = errors.read()
    resumed = re.search(r"resuming after step (\d+) of", said)
    return {
        "after_step": steps_taken(out),
        "resumed_from": int(resumed[1]) if resumed else 0,
        "in_a_save": any(out.rglob(".writing-*")),  # each resume deletes those before it
        "killed": process.returncode == -signal.SIGKILL,
    }


def rows(out: Path) -> list[dict[str, Any]]:
    """All rows without times and memory."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]


def whole_run(command: list[str]) -> None:
    """Run to the end."""
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    if done.returncode:
        raise SystemExit(done.stderr.decode())


@click.command()
@click.option("--kills", default=25, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(kills: int, seed: int) -> None:
    """Kill a run again and again and compare it with one left alone."""
    draw, steps = random.Random(seed), 2 * kills + 2
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BIOINSTRUCT_CACHE"] = f"{folder}/cache"
        alone, out = Path(folder) / "alone", Path(folder) / "killed"
        whole_run(settings(alone, steps))
        told = []
        for kill in range(kills):
            # two steps on from the last kill, and then anywhere in a step or the save after it
            command = settings(out, steps)
            told.append(killed(command, out, 2 * kill + 1, draw.uniform(0, 0.15)))
            print(json.dumps(told[-1]), file=sys.stderr, flush=True)
        whole_run(settings(out, steps))
        names = ("adapter", "adapter-best")
        equal = [
            (alone / n / "adapter_model.safetensors").read_bytes()
            == (out / n / "adapter_model.safetensors").read_bytes()
            for n in names
        ]
        result = {
            "kills": sum(t["killed"] for t in told),
            "in_a_save": sum(t["in_a_save"] for t in told),
            "steps": steps,
            "resumed_from": [t["resumed_from"] for t in told],
            "killed_after": [t["after_step"] for t in told],
            "adapters_equal": all(equal),
            "metrics_equal": rows(alone) == rows(out),
        }
    print(json.dumps(result))
    if not (result["adapters_equal"] and result["metrics_equal"]):
        raise SystemExit("the runs differ")


if __name__ == "__main__":
    main()
