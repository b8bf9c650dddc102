"""Predicted and real peak memory of a training step, beside each other; prints one JSON line.

The prediction is train/plan/memory.py's, made from the shape alone. The step then runs for real
with random weights. On a GPU its peak is the allocator's. On a CPU it is the process's resident
peak beyond what it had before the model, in a process of its own; there glibc keeps freed blocks
below a threshold that it raises as it goes, so besides its default the threshold can be fixed,
which shows what the step itself holds.
"""

import gc
import json
import os
from pathlib import Path
from typing import Any

import click
import torch

from bioinstruct.benches.harness import describe, report, run_alone
from bioinstruct.benches.workload import LORA, SHAPES, make_batches, random_documents
from bioinstruct.kernels.attention import choose_backend
from bioinstruct.model.adapters import Adapters
from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.llama import Llama
from bioinstruct.model.llm import choose_device, choose_dtype
from bioinstruct.synth import console
from bioinstruct.train import shapes
from bioinstruct.train.data.tokens import TokenSet
from bioinstruct.train.plan.memory import Pack, Setup, estimate
from bioinstruct.train.step import Optimizer, train_step
from bioinstruct.train.weights.full import WholeWeights

THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
"""glibc's variable: blocks of so many bytes and more go back to the system when freed."""


def shape(name: str) -> LlamaConfig:
    """A shape of the benches or of train/shapes."""
    return SHAPES[name] if name in SHAPES else shapes.read_shape(name)


def run_step(
    config: LlamaConfig,
    tokens: TokenSet,
    method: str,
    dtype: torch.dtype,
    device: torch.device,
    recomputed: int,
) -> None:
    """Make a random model and take one optimizer step over one pack of all documents."""
    model = Llama(config, device, dtype)
    model.attention_backend = choose_backend("auto", device, dtype)
    model.randomise(0)
    model.recomputed_layers = recomputed
    if method == "full":
        optimizer = Optimizer(WholeWeights(model))
    else:
        adapters = Adapters(config, LORA, device)
        adapters.initialise(0)
        optimizer = Optimizer(adapters)
    batches = make_batches(tokens, int(tokens.lengths.sum()), device)
    train_step(model, optimizer, batches, int(tokens.supervised.sum()), 1e-5)


def measured_bytes(device: torch.device, **options: Any) -> int:
    """Peak of a step beyond what the process held before it."""
    # what is made once by any step belongs to the process
    tiny = random_documents(SHAPES["tiny"], [64])
    run_step(SHAPES["tiny"], tiny, "lora", options["dtype"], device, 0)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run_step(device=device, **options)
        return torch.cuda.max_memory_allocated(device) - before
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run_step(device=device, **options)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure(job: dict[str, Any], fixed: bool) -> dict[str, Any]:
    """Predict and measure one step.

    Raises:
        ValueError: a device or dtype that is not there.
    """
    device = choose_device(job["device"])
    dtype = choose_dtype(job["dtype"], device)
    config, lengths = shape(job["model"]), [job["document_tokens"]] * job["documents"]
    tokens = random_documents(config, lengths)
    setup = Setup(
        config=config,
        lora=None if job["method"] == "full" else LORA,
        dtype=dtype,
        device=device.type,
        backend=choose_backend("auto", device, dtype),
    )
    pack = Pack(sum(lengths), int(tokens.supervised.sum()), max(lengths))
    memory = estimate(setup, pack, job["checkpoint_layers"])
    predicted = memory.peak - memory.own
    real = measured_bytes(
        device,
        config=config,
        tokens=tokens,
        method=job["method"],
        dtype=dtype,
        recomputed=job["checkpoint_layers"],
    )
    return {
        "bench": "step_memory",
        "predicted_bytes": predicted,
        "measured_bytes": real,
        "ratio": predicted / real,
        "allocator": "fixed" if fixed else "default",
        **job,
        "dtype": str(dtype).removeprefix("torch."),
        **describe(device),
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N")
@click.option("--model", default="smollm2-135m", show_default=True, help="A shape by name.")
@click.option("--method", type=click.Choice(["lora", "full"]), default="lora", show_default=True)
@click.option("--documents", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--document-tokens", type=click.IntRange(min=2), default=512, show_default=True)
@click.option("--checkpoint-layers", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True
)
@click.option("--fixed", is_flag=True, help="Let glibc return every freed block to the system.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Append the line.")
@click.option("--alone", is_flag=True, hidden=True)
def command(fixed: bool, out: Path | None, alone: bool, **job: Any) -> None:
    """Predict and measure the peak memory of one step; print one JSON line."""
    if alone:
        print(json.dumps(measure(job, fixed)))
        return
    if fixed:
        os.environ[THRESHOLD] = str(1 << 18)
    options = [text for k, v in job.items() for text in (f"--{k.replace('_', '-')}", str(v))]
    report(run_alone(__file__, [*options, "--alone", *["--fixed"] * fixed]), out)


if __name__ == "__main__":
    console.run(command)
