"""What the benches of single ops share: bytes and FLOPs by formula, the check, the timing, the row.

A bench gives its shapes and, for each, what it must move and multiply, a check against float64 and
the variants to time: ours first, then what it is compared with. `copy`, a plain copy of as many
bytes as ours must move, and the frozen library products, where an op has them, are the floors.
With --dry-run only the formulas are printed, with the time they predict for the machine in
ASSUMED; a prediction is never mixed with a measurement. A check that fails stops the bench before
anything is timed.

On a GPU a call is captured as a CUDA graph, so that gaps between launches do not hide the kernel,
and replayed CALLS times between two readings of the clock.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor

from bioinstruct.benches.harness import alternate, describe, median_ratio, report, summary
from bioinstruct.model.llm import choose_device, choose_dtype
from bioinstruct.synth import console

CALLS = 10
Call = Callable[[], object]
Shape = Mapping[str, Any]


class Machine(NamedTuple):
    """What a prediction takes for granted."""

    gpu: str
    flops_per_s: float
    """Of bfloat16 products, sustained."""
    bytes_per_s: float
    """Read plus written by a copy."""


ASSUMED = Machine("H200", 790e12, 4.3e12)


class Work(NamedTuple):
    """What an op, forward and backward, has to do at least."""

    moved_bytes: int
    """Beyond the library products: read and written by our kernels."""
    flops: int
    """Of the library products; small ones of a rank's width included."""
    floor_flops: int
    """Of the frozen products alone; 0 for an op without any."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One op's bench."""

    name: str
    """Of the op."""
    shapes: Sequence[Shape]
    """Timed on a GPU, and printed by --dry-run."""
    tiny: Sequence[Shape]
    """To try the bench on a CPU."""
    work: Callable[[Shape, int], Work]
    """(shape, bytes of an element) -> what has to be done."""
    check: Callable[[Shape, torch.dtype, torch.device], float]
    """Share of its error allowance that the op uses; ValueError where it is beyond."""
    variants: Callable[[Shape, torch.dtype, torch.device], dict[str, Call]]
    """What to time, by name: "ours", perhaps "frozen", and rivals."""
    rival_work: Callable[[Shape, int], dict[str, Work]] = lambda *_: {}
    """The work of other variants, by name, where a formula for it is known."""


def predict(bench: Bench, shape: Shape, itemsize: int) -> dict[str, Any]:
    """Bytes, FLOPs and the time they take on the assumed machine; nothing runs."""
    works = {"ours": bench.work(shape, itemsize), **bench.rival_work(shape, itemsize)}
    return {
        "bench": bench.name,
        **shape,
        "assumed": ASSUMED._asdict(),
        "predictions": {name: _prediction(work) for name, work in works.items()},
    }


def _prediction(work: Work) -> dict[str, Any]:
    seconds = work.flops / ASSUMED.flops_per_s + work.moved_bytes / ASSUMED.bytes_per_s
    floor_s = work.floor_flops / ASSUMED.flops_per_s
    return {
        **work._asdict(),
        "predicted_seconds": seconds,
        "predicted_ratio_to_frozen": seconds / floor_s if floor_s else None,
    }


def measure(
    bench: Bench, shape: Shape, dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Check, then time the variants in turn.

    Raises:
        ValueError: the op is wrong; nothing was timed.
    """
    used = bench.check(shape, dtype, device)
    work = bench.work(shape, dtype.itemsize)
    variants = bench.variants(shape, dtype, device)
    variants["copy"] = _copy(work.moved_bytes, device)
    calls = CALLS if device.type == "cuda" else 1
    ready = {name: _repeated(call, calls, device) for name, call in variants.items()}
    seconds = {
        name: [s / calls for s in values]
        for name, values in alternate(ready, rounds, device).items()
    }
    ours = seconds["ours"]
    ratios = {
        f"ratio_to_{name}": median_ratio(ours, values)
        for name, values in seconds.items()
        if name != "ours"
    }
    return {
        "bench": bench.name,
        **shape,
        "dtype": str(dtype).removeprefix("torch."),
        "error_share": used,
        "moved_bytes": work.moved_bytes,
        "flops": work.flops,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        **ratios,
        **describe(device, ["triton"]),
    }


def passes(op: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> Call:
    """One forward and backward pass of an op, with a gradient of ones for each of its outputs."""
    leaves = [x for x in inputs if x.requires_grad]

    def call() -> None:
        found = op(*inputs)
        outputs = (found,) if isinstance(found, Tensor) else tuple(found)
        torch.autograd.grad(outputs, leaves, [ones[y.shape] for y in outputs])

    with torch.no_grad():
        first = op(*inputs)
    shaped = (first,) if isinstance(first, Tensor) else first
    ones = {y.shape: torch.ones_like(y) for y in shaped}
    return call


def _copy(moved_bytes: int, device: torch.device) -> Call:
    source = torch.zeros(max(1, moved_bytes // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _repeated(call: Call, calls: int, device: torch.device) -> Call:
    """The call, several times; as one graph on a GPU."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles the kernels and fills the allocator's pools
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph.replay


def main(bench: Bench) -> None:
    """Run a bench's command line."""

    @click.command(
        context_settings={"help_option_names": ["-h", "--help"]},
        help=f"Time {bench.name}, forward and backward; one JSON line a shape.",
    )
    @click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N")
    @click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto")
    @click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True)
    @click.option("--tiny", is_flag=True, help="Small shapes, to try the bench on a CPU.")
    @click.option("--dry-run", is_flag=True, help="Only bytes, FLOPs and predicted times.")
    @click.option(
        "--out", type=click.Path(path_type=Path, dir_okay=False), help="Append the lines."
    )
    def command(
        device: str, dtype: str, rounds: int, tiny: bool, dry_run: bool, out: Path | None
    ) -> None:
        for shape in bench.tiny if tiny else bench.shapes:
            if dry_run:
                report(predict(bench, shape, 2), out)
                continue
            place = choose_device(device)
            report(measure(bench, shape, choose_dtype(dtype, place), place, rounds), out)

    console.run(command)
