"""What run_all.py runs: the jobs of each stage, the most valuable first.

check  the kernels' tests, repeatability, large offsets, the sanitizer
probe  the questions that decide which form of a product is taken
bench  every op, the decoder layer, the step, at the shapes of LLaMA-7B, Llama-3-8B and LLaMA-13B
train  whole models in training, with transformers + peft beside them

A job is one process with a limit of its own. Its lines go to a file of its script's name.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bioinstruct.benches import (
    attention,
    cross_entropy,
    layer,
    lora_kernel,
    rmsnorm_kernel,
    rope_kernel,
    swiglu_kernel,
)
from bioinstruct.benches.kernel_bench import Bench
from bioinstruct.benches.peers_step import PEERS

HERE = Path(__file__).parent
STAGES = "check", "probe", "bench", "train"
TEST_FILES = (
    "test_triton",
    "test_augmented_model",
    "test_gemm_lora",
    "test_attention",
    "test_ops",
    "test_dropout",
    "test_adamw",
)
BENCHES: dict[str, Bench] = {
    "lora_kernel": lora_kernel.BENCH,
    "layer": layer.BENCH,
    "rmsnorm_kernel": rmsnorm_kernel.BENCH,
    "swiglu_kernel": swiglu_kernel.BENCH,
    "rope_kernel": rope_kernel.BENCH,
    "cross_entropy": cross_entropy.BENCH,
    "attention": attention.BENCH,
}


class Job(NamedTuple):
    """One process."""

    name: str
    """Unique in its stage."""
    script: str
    """Of this folder, without .py."""
    arguments: tuple[str, ...]
    limit_s: float
    """After which it is killed; what it has flushed stays."""
    needs: tuple[str, ...] = ()
    """Packages without which it is left out."""


def jobs(stage: str, *, tiny: bool, rounds: int) -> list[Job]:
    """The jobs of a stage.

    Args:
        stage: one of STAGES.
        tiny: small shapes, to rehearse on a CPU.
        rounds: how often each variant is timed.
    """
    made = {"check": _check, "probe": _probe, "bench": _bench, "train": _train}[stage]
    return list(made(tiny, str(rounds)))


def _check(tiny: bool, rounds: str) -> Iterator[Job]:
    small = ("--tiny",) * tiny
    for part, limit_s in (("repeat", 120), ("offsets", 240)):
        yield Job(part, "check", (part, *small), limit_s)
    for file in TEST_FILES:
        path = Path("tests", "kernels", f"{file}.py")
        if (HERE.parent / path).exists() and (not tiny or file == "test_triton"):
            quick = ("--match", "allocates") if tiny else ()
            arguments = ("tests", "--file", str(path), *quick, *small)
            yield Job(f"tests {file}", "check", arguments, 300)
    for tool in ("racecheck", "memcheck"):
        yield Job(tool, "check", ("sanitizer", "--tool", tool, *small), 240)


def _probe(tiny: bool, rounds: str) -> Iterator[Job]:
    common = ("--rounds", rounds, *("--tiny",) * tiny)
    yield Job("gemm", "probe", ("gemm", *common), 240)
    for question in ("extended", "skinny", "addmm"):
        yield Job(question, "probe", (question, *common), 90)
    first = ("--tiny",) if tiny else ("--match", '"llama-7b o", "T": 8192')
    yield Job("linear", "lora_kernel", ("--rounds", rounds, *first, "--resume"), 120)
    first = ("--tiny",) if tiny else ("--match", '"length": 256')
    yield Job("attention", "attention", ("--rounds", rounds, *first, "--resume"), 120)


def _bench(tiny: bool, rounds: str) -> Iterator[Job]:
    common = ("--rounds", rounds, "--resume")
    if tiny:
        for script in BENCHES:
            yield Job(script, script, (*common, "--tiny"), 60)
        yield Job("step tiny", "train_step", _step("tiny", 3, 21, 1), 60)
        return
    # what has a target, at the main size, before everything else
    for match in ('"T": 8192, "R": 16, "p": 0.0, ', '"T": 8192, "R": 16, "p": 0.05, '):
        yield Job(f"layer {match}", "layer", (*common, "--match", match), 150)
    for linear in ("llama-7b", "llama-3-8b", "llama-13b"):
        match = f'"{linear}'
        yield Job(f"linears of {linear}", "lora_kernel", (*common, "--match", match), 300)
    for script in ("rmsnorm_kernel", "swiglu_kernel", "rope_kernel", "cross_entropy", "attention"):
        yield Job(script, script, common, 120)
    yield Job("step llama-7b", "train_step", _step("llama-7b", 32, 256, 10), 240)
    yield Job("step llama-3-8b", "train_step", _step("llama-3-8b", 32, 256, 10), 240)
    yield Job("all layers", "layer", common, 600)


def _step(model: str, documents: int, length: int, steps: int) -> tuple[str, ...]:
    return (
        *("--model", model, "--documents", str(documents), "--document-tokens", str(length)),
        *("--pack-tokens", str(documents * length), "--steps", str(steps)),
    )


def _train(tiny: bool, rounds: str) -> Iterator[Job]:
    if tiny:
        small = ("--model", "tiny", "--steps", "4", "--pack-tokens", "300", "--sustain", "0")
        yield Job("tiny", "train_run", (*small, "--profile"), 60)
        yield Job("tiny sharded", "train_run", (*small, "--shard", "full"), 60)
        yield Job("demo", "demo_run", ("--tiny",), 120)
        yield Job(
            "peers tiny", "peers_step", (*_step("tiny", 2, 16, 1), "--rounds", "1"), 60, PEERS
        )
        return
    for model in ("llama-7b", "llama-3-8b"):
        yield Job(model, "train_run", ("--model", model, "--steps", "100", "--profile"), 180)
        options = ("--dtype", "bfloat16", "--checkpointing", "--rounds", "1")
        yield Job(f"peers {model}", "peers_step", (*_step(model, 32, 256, 5), *options), 300, PEERS)
    # weights gathered from shards before each block computes, against the first line above
    sharded = ("--model", "llama-7b", "--steps", "20", "--shard", "full", "--profile")
    yield Job("llama-7b sharded", "train_run", sharded, 150)
    yield Job("demo", "demo_run", (), 300)
