"""The demo, as a user runs it: time, tokens per second, and the scores before and after.

    python benches/demo_run.py
    python benches/demo_run.py --device cpu --tiny

It is the command of `make demo` in a process of its own, into a folder that is thrown away. One
JSON line: the wall time, the median of the steps' tokens per second, the first and the last loss,
and the table of scores as the run printed it. --tiny takes a model of 260,000 weights that comes
with the tests, two steps, and two questions of the task whose prompts it holds.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from bioinstruct.benches.harness import describe, gpu_state, report
from bioinstruct.model.llm import choose_device
from bioinstruct.synth import console
from bioinstruct.train.demo import RECIPE

ROOT = Path(__file__).parents[1]
SMALL = ROOT / "tests" / "data"
TINY = {
    "model.path": SMALL / "stories260K",
    "model.tokenizer": SMALL / "tokenizers" / "stories260K_tok512.model",
    "data.template": "alpaca",
    "data.on_overlong": "drop",
    "data.max_tokens_per_pack": 512,
    "train.steps": 2,
    "train.warmup_steps": 1,
    "eval.tasks": "ncbi-disease=demo:ncbi-disease-test.tsv.gz",
    "eval.limit": 2,
}


def run(device: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Run the demo with these settings changed; its figures.

    Raises:
        ValueError: it failed; what it said stands on stderr.
    """
    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        changed = {**settings, "device": device, "out": out}
        command = [sys.executable, str(ROOT / "train" / "main.py"), str(RECIPE)]
        command += [part for key, value in changed.items() for part in ("--set", f"{key}={value}")]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=folder
        )
        if done.returncode:
            raise ValueError(f"the demo ended with code {done.returncode}: see above")
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "tokens_per_s" in row]
    return {
        "seconds": time.perf_counter() - start_s,
        "steps": len(steps),
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in steps),
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "scores": done.stdout.strip(),
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N")
@click.option(
    "--model", help="Folder of the demo's model, where the package index is out of reach."
)
@click.option("--tiny", is_flag=True, help="A small model and few steps, to try this on a CPU.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Append the line.")
def command(device: str, model: str | None, tiny: bool, out: Path | None) -> None:
    """Run the demo; one JSON line."""
    settings: dict[str, Any] = dict(TINY) if tiny else {}
    if model:
        settings["model.path"] = model
    place = choose_device(device)
    row = {"bench": "demo_run", "tiny": tiny, **run(device, settings)}
    report({**row, **describe(place, ["triton"]), "gpu": gpu_state(place)}, out)


if __name__ == "__main__":
    console.run(command)
