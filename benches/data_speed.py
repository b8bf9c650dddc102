"""How fast records become packs: tokenizing, the cache, planning an epoch; prints one JSON line.

Records are taken from files of yours, over and over up to --records; each then has a number in its
input, so that none is met twice. Planning is timed on their lengths, repeated up to --plan.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from bioinstruct.benches.harness import describe, report
from bioinstruct.model.templates import get_template, guess_template
from bioinstruct.model.tokenizers.tokenizer import load_tokenizer
from bioinstruct.synth import console
from bioinstruct.synth.records import read_records, write_records
from bioinstruct.train.data.token_cache import load_tokens
from bioinstruct.train.data.tokens import Limits, TokenSet
from bioinstruct.train.plan.planner import Planner


def make_records(paths: tuple[Path, ...], count: int, out: Path) -> None:
    """Write so many records, all different, to one file."""
    found = [record for path in paths for record in read_records(path) if record.output.strip()]
    if not found:
        raise ValueError("the files hold no record with an output")
    rows = []
    for i in range(count):
        record = found[i % len(found)]
        tail = f" ({i})" if i >= len(found) else ""
        rows.append(
            {
                "instruction": record.instruction,
                "input": record.input + tail,
                "output": record.output,
            }
        )
    write_records(out, rows)


def tokenize(tokenizer: Path, records: Path) -> tuple[TokenSet, dict[str, float]]:
    """Encode a file without a cache and with one; the samples, and seconds of each."""
    words = load_tokenizer(tokenizer)
    template = get_template(guess_template(words), words)
    limits = Limits(1 << 20, "error", "error")
    times = {}
    for name in ("tokenize", "cached"):
        start_s, cpu_s = time.perf_counter(), time.process_time()
        tokens = load_tokens(records, template, words, limits)
        times[f"{name}_s"] = time.perf_counter() - start_s
        times[f"{name}_cpu_s"] = time.process_time() - cpu_s
    return tokens, times


def plan_epoch(tokens: TokenSet, count: int, max_tokens: int, batch: int) -> dict[str, float]:
    """Plan every step of an epoch; its seconds and how full the packs are."""
    lengths = np.minimum(np.resize(tokens.lengths, count), max_tokens)
    start_s, cpu_s = time.perf_counter(), time.process_time()
    planner = Planner(lengths, lengths, max_tokens=max_tokens, batch_samples=batch)
    plans = [planner.plan(step) for step in range(planner.steps_of(0))]
    seconds, cpu = time.perf_counter() - start_s, time.process_time() - cpu_s
    packs = sum(len(plan.packs) for plan in plans)
    full = sum(plan.tokens for plan in plans) / (packs * max_tokens)
    return {"batch": batch, "plan_s": seconds, "plan_cpu_s": cpu, "full": full}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--tokenizer", type=click.Path(path_type=Path, exists=True), required=True)
@click.option(
    "--in", "paths", multiple=True, type=click.Path(path_type=Path, exists=True), required=True
)
@click.option("--records", type=click.IntRange(min=1), default=25_000, show_default=True)
@click.option("--plan", type=click.IntRange(min=1), default=200_000, show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=1), default=4096, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Append the line.")
def command(
    tokenizer: Path, paths: tuple[Path, ...], records: int, plan: int, max_tokens: int, out: Any
) -> None:
    """Time tokenizing and planning on records of yours; print one JSON line."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BIOINSTRUCT_CACHE"] = folder
        made = Path(folder) / "records.jsonl"
        make_records(paths, records, made)
        tokens, times = tokenize(tokenizer, made)
        plans = [plan_epoch(tokens, plan, max_tokens, n) for n in (plan, 2048, 128, 32)]
        row = {
            "bench": "data_speed",
            "records": records,
            "tokens": int(tokens.lengths.sum()),
            **times,
            "max_tokens": max_tokens,
            "planned": plan,
            "plans": plans,
            **describe(torch.device("cpu")),
        }
    report(row, out)


if __name__ == "__main__":
    console.run(command)
