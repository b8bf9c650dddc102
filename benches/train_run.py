"""LoRA steps of a whole model with random weights, on the lengths and the text of real records.

    python benches/train_run.py --model llama-7b --steps 100 --pack-tokens 8192
    python benches/train_run.py --device cpu --model tiny --steps 4 --pack-tokens 64

The records are the demo's. No vocabulary comes with a random model, so their text is cut after
every four characters, about what a LLaMA's tokens hold, and each piece is numbered by a hash:
repetitions stay repetitions, and the loss can fall. Steps are planned, packed and collated as the
trainer does it; one pack is one step. Beside tokens per second stand the time of the frozen
products at the rate that this process sustains, as a share of the step's, MFU, and the peak of
memory beside what a formula expected. --profile adds where the time of two steps goes, by kind of
kernel.
"""

import gzip
import json
import math
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from bioinstruct.benches.harness import describe, gpu_state, report, summary
from bioinstruct.benches.kernel_bench import SUSTAIN_S, rates
from bioinstruct.benches.workload import LORA, SHAPES, make_model
from bioinstruct.kernels.heap import keep_freed_memory
from bioinstruct.model.adapters import Adapters, projection_shapes
from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.llm import choose_device, choose_dtype
from bioinstruct.synth import console
from bioinstruct.train import demo
from bioinstruct.train.data.batch import collate
from bioinstruct.train.data.tokens import TokenSet
from bioinstruct.train.plan.planner import Planner
from bioinstruct.train.report.metrics import mfu, peak_memory_bytes, step_flops
from bioinstruct.train.step import Optimizer, train_step
from bioinstruct.train.weights import sharding

RECORDS = Path(demo.__file__).with_name("records.jsonl.gz")
PIECE = 4
LR = 2e-4
WARM_UP = 3  # steps that are not timed
KINDS = {
    "attention": ("flash", "fmha", "attention", "Blocked", "sdpa", "softmax"),
    "products": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "aten::mm", "addmm", "bmm"),
    "optimizer": ("_adamw", "_square_sums", "adamw"),
    "rank-wide passes": ("_shrink", "_gradient_of_a", "_masked_expand", "_sum_parts"),
}
"""Kinds of kernels by parts of their names, the first that fits; the rest is memory-bound ops."""


def pieces(text: str, vocab_size: int) -> list[int]:
    """Numbers of the pieces of a text."""
    starts = range(0, len(text), PIECE)
    return [zlib.crc32(text[i : i + PIECE].encode()) % vocab_size for i in starts]


def real_tokens(config: LlamaConfig, longest: int) -> TokenSet:
    """The demo's records as tokens; those that no pack holds are left out."""
    samples, prompts, places = [], [], []
    with gzip.open(RECORDS, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            record = json.loads(line)
            prompt = pieces(record["instruction"] + record["input"], config.vocab_size)
            answer = pieces(record["output"], config.vocab_size)
            if len(prompt) + len(answer) <= longest:
                samples.append(np.array(prompt + answer, dtype=np.uint32))
                prompts.append(len(prompt))
                places.append(f"{RECORDS.name}:{number + 1}")
    if not samples:
        raise ValueError(f"no record fits in --pack-tokens {longest}; the shortest takes about 30")
    sizes = [len(sample) for sample in samples]
    return TokenSet.laid(np.concatenate(samples), sizes, prompts, places)


def expected_bytes(config: LlamaConfig, num_adapter_weights: int, T: int, itemsize: int) -> int:
    """Weights, adapters with gradient and moments, and what a pack's layers save.

    A layer saves its input and the input of its second norm, both normed inputs, q, k, v and the
    attention's output, gate, up and their product; the loss holds some logits.
    """
    D, F, E = config.hidden_size, config.intermediate_size, config.head_dim
    H, G = config.num_heads, config.num_kv_heads
    saved = 4 * D + (2 * H + 2 * G) * E + 3 * F
    layers = config.num_layers * T * saved * itemsize
    return config.parameter_count() * itemsize + 16 * num_adapter_weights + layers + (256 << 20)


def frozen_flops(config: LlamaConfig, T: int, supervised: int) -> int:
    """Of the frozen products of a step: forward and input gradient."""
    linears = config.num_layers * sum(N * K for N, K, _ in projection_shapes(config).values())
    return 4 * linears * T + 4 * config.vocab_size * config.hidden_size * supervised


@contextmanager
def alone(device: torch.device) -> Iterator[None]:
    """Let this process be all the ranks there are."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


class Training:
    """A model in training.

    Args:
        config: its shape.
        device: where.
        dtype: of its weights.
        pack_tokens: of a pack, which is a step.
        sharded: as train.shard = full has it, among the one rank of this process.
    """

    def __init__(
        self,
        config: LlamaConfig,
        device: torch.device,
        dtype: torch.dtype,
        pack_tokens: int,
        *,
        sharded: bool = False,
    ) -> None:
        self.config, self.device, self.pack_tokens = config, device, pack_tokens
        self.model = make_model(config, device, dtype)
        if sharded:
            sharding.shard(self.model, init_device_mesh(device.type, (1,)), dtype)
        self.adapters = Adapters(config, LORA, device)
        self.adapters.initialise(0)
        self.optimizer = Optimizer(self.adapters)
        self.tokens = real_tokens(config, pack_tokens)
        self.planner = Planner(
            self.tokens.lengths,
            self.tokens.supervised,
            max_tokens=pack_tokens,
            batch_tokens=pack_tokens,
        )

    def step(self, number: int) -> dict[str, Any]:
        """Take a step; its figures."""
        plan = self.planner.plan(number)
        start_s = time.perf_counter()
        batches = [collate(self.tokens, pack, plan.draws, self.device) for pack in plan.packs]
        result = train_step(self.model, self.optimizer, batches, plan.supervised_tokens, LR)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        lengths = [int(self.tokens.lengths[i]) for pack in plan.packs for i in pack]
        return {
            "seconds": time.perf_counter() - start_s,
            "tokens": plan.tokens,
            "supervised": plan.supervised_tokens,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "flops": step_flops(
                self.config, self.adapters.flat_P.numel(), lengths, plan.supervised_tokens
            ),
        }


def figures(training: Training, steps: list[dict[str, Any]], sustain_s: float) -> dict[str, Any]:
    """What a run's steps come to; the first WARM_UP are not timed."""
    timed = steps[WARM_UP:]
    config, device, dtype = training.config, training.device, training.model.dtype
    rate = rates(dtype, device, sustain_s)
    total_s = sum(step["seconds"] for step in timed)
    tokens = sum(step["tokens"] for step in timed)
    floor_s = (
        sum(frozen_flops(config, s["tokens"], s["supervised"]) for s in timed) / rate.flops_per_s
    )
    expected = expected_bytes(
        config, training.adapters.flat_P.numel(), training.pack_tokens, dtype.itemsize
    )
    quarter = max(1, len(steps) // 4)
    return {
        "steps": len(steps),
        "tokens_per_s": tokens / total_s,
        "step_seconds": summary([step["seconds"] for step in timed]),
        "share_of_gemm_floor": floor_s / total_s,
        "mfu": mfu(sum(step["flops"] for step in timed), total_s, device),
        "peak_bytes": peak_memory_bytes(device),
        "expected_bytes": expected,
        "loss_first_quarter": float(np.mean([step["loss"] for step in steps[:quarter]])),
        "loss_last_quarter": float(np.mean([step["loss"] for step in steps[-quarter:]])),
        "smallest_grad_norm": min(step["grad_norm"] for step in steps),
        "rates": rate._asdict(),
    }


def profile(training: Training, first: int) -> dict[str, Any]:
    """Seconds of two steps by kind of kernel; on a GPU what is left of the wall time is gaps."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    on_gpu = training.device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with record(activities=[activity]) as found:
        wall_s = sum(training.step(first + i)["seconds"] for i in range(2))
    seconds = dict.fromkeys([*KINDS, "memory-bound ops"], 0.0)
    for event in found.key_averages():
        own_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds[kind_of(event.key)] += own_us / 1e6
    if on_gpu:
        seconds["gaps"] = max(0.0, wall_s - sum(seconds.values()))
    return {"wall_s": wall_s, "seconds": seconds}


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name."""
    for kind, words in KINDS.items():
        if any(word in kernel for word in words):
            return kind
    return "memory-bound ops"


def run(training: Training, num_steps: int) -> Iterator[list[dict[str, Any]]]:
    """Take the steps; yields all so far after each quarter, so that a cut run leaves figures."""
    steps: list[dict[str, Any]] = []
    progress = console.Progress("training", num_steps)
    marks = {max(WARM_UP + 1, math.ceil(num_steps * k / 4)) for k in range(1, 5)}
    for number in range(num_steps):
        steps.append(training.step(number))
        progress.update(number + 1)
        last = steps[-1]
        if not (math.isfinite(last["loss"]) and last["grad_norm"] > 0):
            raise ValueError(
                f"step {number + 1}: loss {last['loss']}, gradient norm {last['grad_norm']}; "
                "nothing trains, so no time counts"
            )
        if number + 1 in marks:
            yield steps


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto")
@click.option("--model", type=click.Choice(list(SHAPES)), default="llama-7b", show_default=True)
@click.option("--steps", type=click.IntRange(min=WARM_UP + 1), default=100, show_default=True)
@click.option("--pack-tokens", type=click.IntRange(min=2), default=8192, show_default=True)
@click.option("--sustain", type=click.FloatRange(min=0), default=SUSTAIN_S, show_default=True)
@click.option("--shard", type=click.Choice(["none", "full"]), default="none", show_default=True)
@click.option("--profile", "profiled", is_flag=True, help="Where the time of two steps goes.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Append the lines.")
def command(
    device: str,
    dtype: str,
    model: str,
    steps: int,
    pack_tokens: int,
    sustain: float,
    shard: str,
    profiled: bool,
    out: Path | None,
) -> None:
    """Train a model of random weights; a JSON line after each quarter of the steps."""
    place = choose_device(device)
    if place.type == "cpu":
        keep_freed_memory()
    kind = choose_dtype(dtype, place)
    # first: products that share the chip with nothing
    rates(kind, place, sustain)
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
    known = {
        "bench": "train_run",
        "model": model,
        "pack_tokens": pack_tokens,
        "shard": shard,
        "dtype": str(kind).removeprefix("torch."),
    }
    with alone(place) if shard == "full" else nullcontext():
        training = Training(SHAPES[model], place, kind, pack_tokens, sharded=shard == "full")
        known["attention"] = training.model.attention_backend
        for done in run(training, steps):
            row = {**known, "whole": len(done) == steps, **figures(training, done, sustain)}
            if profiled and row["whole"]:
                row["profile"] = profile(training, steps)
            report({**row, **describe(place, ["triton"]), "gpu": gpu_state(place)}, out)


if __name__ == "__main__":
    console.run(command)
