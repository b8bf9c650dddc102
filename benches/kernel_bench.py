"""What the benches of single ops share: bytes and FLOPs by formula, the check, the timing, the row.

A bench gives its shapes and, for each, what it must move and multiply, a check against float64 and
the variants to time: ours first, then what it is compared with. `copy`, a plain copy of as many
bytes as ours must move, and the frozen library products, where an op has them, are the floors.
With --dry-run only the formulas are printed, with the time they predict for the machine in
ASSUMED; a prediction is never mixed with a measurement. A check that fails stops the bench before
anything is timed.

Every variant is made SETS times, with tensors of its own, and its calls go round, so that none
finds its inputs in a cache. On a GPU a round of calls is captured as a CUDA graph, so that gaps
between launches do not hide the kernel; a variant that cannot be captured is called as it is, and
its row says so. Fractions are of rates measured in the same process: a copy of COPY_BYTES, and
products that run for --sustain seconds, at the clock that the chip keeps up.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor

from bioinstruct.benches.harness import (
    alternate,
    describe,
    gpu_state,
    median_ratio,
    report,
    seconds_of,
    summary,
)
from bioinstruct.model.llm import choose_device, choose_dtype
from bioinstruct.synth import console

SETS, ROUNDS = 3, 4  # on a GPU: input sets of a variant, and calls of each in a graph
COPY_BYTES = 512 << 20
SUSTAIN_S = 10.0
Call = Callable[[], object]
Shape = Mapping[str, Any]


class Machine(NamedTuple):
    """What a prediction takes for granted."""

    gpu: str
    flops_per_s: float
    """Of bfloat16 products, sustained."""
    bytes_per_s: float
    """Read plus written by a copy."""
    launch_s: float
    """Of each kernel, beside its work."""
    narrow_share: float
    """What the rank-wide passes that stand alone reach of the copy's rate."""


ASSUMED = Machine("H200", 790e12, 4.3e12, 2e-6, 0.85)


class Work(NamedTuple):
    """What an op, forward and backward, has to do at least."""

    moved_bytes: int
    """Beyond the library products: read and written by our kernels."""
    flops: int
    """Of the library products; small ones of a rank's width included."""
    floor_flops: int
    """Of the frozen products alone; 0 for an op without any."""
    floor_bytes: int = 0
    """What the frozen op moves beside its products."""
    launches: int = 0
    """Kernels and products; 0 where only their work is predicted."""
    floor_launches: int = 0
    """Of the frozen op."""
    narrow_bytes: int = 0
    """Of moved_bytes, those of rank-wide passes that stand alone."""


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
    slowed = work.moved_bytes + work.narrow_bytes * (1 / ASSUMED.narrow_share - 1)
    seconds = _seconds(work.flops, slowed, work.launches)
    floor_s = _seconds(work.floor_flops, work.floor_bytes, work.floor_launches)
    return {
        **work._asdict(),
        "predicted_seconds": seconds,
        "predicted_ratio_to_frozen": seconds / floor_s if floor_s else None,
    }


def _seconds(flops: int, moved_bytes: float, launches: int) -> float:
    arithmetic_s = flops / ASSUMED.flops_per_s
    return arithmetic_s + moved_bytes / ASSUMED.bytes_per_s + launches * ASSUMED.launch_s


class Rates(NamedTuple):
    """What this device does for long, in one dtype."""

    flops_per_s: float
    """Of a library product, for as long as --sustain says."""
    bytes_per_s: float
    """Read plus written by a copy."""


@cache
def rates(dtype: torch.dtype, device: torch.device, sustain_s: float) -> Rates:
    """Measure them once in a process: products first until the time is up, the last half counts."""
    on_gpu = device.type == "cuda"
    width, copied = (8192, COPY_BYTES) if on_gpu else (128, 1 << 20)
    a, b, c = (torch.randn(width, width, device=device).to(dtype) for _ in range(3))
    calls = 10 if on_gpu else 1
    seconds: list[float] = []
    while sum(seconds) < sustain_s or len(seconds) < 2:
        seconds.append(seconds_of(lambda: [torch.mm(a, b, out=c) for _ in range(calls)], device))
    late = summary(seconds[len(seconds) // 2 :])["median"] / calls
    source = torch.zeros(3, copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source[0])
    copies = [seconds_of(partial(target.copy_, source[i % 3]), device) for i in range(12)]
    return Rates(2 * width**3 / late, 2 * copied / summary(copies)["median"])


class Timed(NamedTuple):
    """Times of the variants."""

    seconds: dict[str, list[float]]
    """Of a call, one value a round, by name."""
    not_captured: dict[str, str]
    """Variants that ran without a graph on a GPU, and why."""


def time_variants(made: Sequence[Mapping[str, Call]], rounds: int, device: torch.device) -> Timed:
    """Time variants in turn, each going round its sets.

    Args:
        made: the variants once for every set of inputs.
        rounds: how often each is timed.
        device: where they run.
    """
    ready: dict[str, Call] = {}
    why: dict[str, str] = {}
    calls = len(made) * (ROUNDS if device.type == "cuda" else 1)
    for name in made[0]:
        in_turn = [variants[name] for variants in made] * (calls // len(made))
        ready[name] = _all(in_turn)
        if device.type == "cuda":
            try:
                ready[name] = _captured(in_turn, device)
            except (RuntimeError, ValueError) as error:
                why[name] = str(error).splitlines()[0]
                torch.cuda.synchronize(device)
    seconds = alternate(ready, rounds, device)
    return Timed({name: [s / calls for s in values] for name, values in seconds.items()}, why)


def _all(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def measure(
    bench: Bench,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    sustain_s: float = 0.0,
) -> dict[str, Any]:
    """Check, then time the variants in turn.

    Raises:
        ValueError: the op is wrong; nothing was timed.
    """
    used = bench.check(shape, dtype, device)
    work = bench.work(shape, dtype.itemsize)
    rate = rates(dtype, device, sustain_s)
    sets = SETS if device.type == "cuda" else 1
    made = [
        {**bench.variants(shape, dtype, device), "copy": _copy(work.moved_bytes, device)}
        for _ in range(sets)
    ]
    seconds, not_captured = time_variants(made, rounds, device)
    ours = seconds["ours"]
    ratios = {
        f"ratio_to_{name}": median_ratio(ours, values)
        for name, values in seconds.items()
        if name != "ours"
    }
    ours_s = summary(ours)["median"]
    return {
        "bench": bench.name,
        **shape,
        "dtype": str(dtype).removeprefix("torch."),
        "error_share": used,
        "moved_bytes": work.moved_bytes,
        "flops": work.flops,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        **ratios,
        "fraction_of_copy": work.moved_bytes / ours_s / rate.bytes_per_s,
        "fraction_of_gemm_rate": work.flops / ours_s / rate.flops_per_s,
        "rates": rate._asdict(),
        "not_captured": not_captured,
        **describe(device, ["triton"]),
        "gpu": gpu_state(device),
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


def _captured(calls: Sequence[Call], device: torch.device) -> Call:
    """The calls as one graph, which holds their tensors."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls[: 3 * SETS]:  # compiles the kernels and fills the allocator's pools
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _is_known(bench: Bench, shape: Shape, out: Path) -> bool:
    """Whether a file holds a measurement of this shape on this machine's kind of device."""
    if not out.exists():
        return False
    for line in out.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        same = all(row.get(key) == value for key, value in shape.items())
        if same and row.get("bench") == bench.name and "seconds" in row:
            return True
    return False


def main(bench: Bench) -> None:
    """Run a bench's command line."""

    @click.command(
        context_settings={"help_option_names": ["-h", "--help"]},
        help=f"Time {bench.name}, forward and backward; one JSON line a shape.",
    )
    @click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N")
    @click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto")
    @click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True)
    @click.option("--match", default="", help="Only shapes whose JSON text holds this.")
    @click.option(
        "--sustain",
        type=click.FloatRange(min=0),
        help=f"Seconds of products before their rate counts; {SUSTAIN_S:g} on a GPU.",
    )
    @click.option("--tiny", is_flag=True, help="Small shapes, to try the bench on a CPU.")
    @click.option("--dry-run", is_flag=True, help="Only bytes, FLOPs and predicted times.")
    @click.option("--resume", is_flag=True, help="Leave out shapes that --out holds a time of.")
    @click.option(
        "--out", type=click.Path(path_type=Path, dir_okay=False), help="Append the lines."
    )
    def command(
        device: str,
        dtype: str,
        rounds: int,
        match: str,
        sustain: float | None,
        tiny: bool,
        dry_run: bool,
        resume: bool,
        out: Path | None,
    ) -> None:
        # in deterministic mode torch would fill every new tensor, and that would be timed
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
        shapes = [s for s in (bench.tiny if tiny else bench.shapes) if match in json.dumps(s)]
        if not shapes:
            raise ValueError(f"no shape of {bench.name} holds --match {match!r}")
        for shape in shapes:
            if dry_run:
                report(predict(bench, shape, 2), out)
                continue
            if resume and out is not None and _is_known(bench, shape, out):
                console.note(f"{bench.name} {json.dumps(shape)} stands in {out} already")
                continue
            place = choose_device(device)
            for_s = sustain if sustain is not None else SUSTAIN_S * (place.type == "cuda")
            kind = choose_dtype(dtype, place)
            report(measure(bench, shape, kind, place, rounds, for_s), out)

    console.run(command)
