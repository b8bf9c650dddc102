"""The operations of a CPU step in C against torch's own: one JSON line with a ratio for each.

    python benches/cpu_operations.py --dtype bfloat16
    python benches/cpu_operations.py --tiny --rounds 2

They are those of the other benches, forward and backward, at the widths of a model of 135 million
parameters, and each is checked, both ways, before it is timed. Products that are a part of an
operation (attention's, the loss's) count on both sides.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from bioinstruct.benches import attention, cross_entropy, rmsnorm_kernel, rope_kernel, swiglu_kernel
from bioinstruct.benches.harness import alternate, describe, median_ratio, report, summary
from bioinstruct.benches.kernel_bench import Bench, Call, Shape
from bioinstruct.kernels import Dropout, dispatch
from bioinstruct.kernels.native import why_slower
from bioinstruct.model.llm import choose_dtype
from bioinstruct.synth import console

CPU = torch.device("cpu")
OPERATIONS: dict[str, tuple[Bench, dict[str, int]]] = {
    "add_rmsnorm": (rmsnorm_kernel.BENCH, {"T": 512, "D": 576}),
    "swiglu": (swiglu_kernel.BENCH, {"T": 512, "F": 1536}),
    "rope": (rope_kernel.BENCH, {"T": 512, "H": 9, "G": 3, "E": 64}),
    "attention": (attention.BENCH, {"T": 512, "H": 9, "G": 3, "E": 64, "length": 256}),
    "cross_entropy": (cross_entropy.BENCH, {"T": 128, "D": 576, "V": 49152}),
}
"""Each one's bench, and its shape here."""
MASK = {"T": 512, "D": 576}
TINY = {"T": 40, "D": 50, "F": 70, "V": 300, "length": 17}


def in_torch(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same call, without C."""

    def forced() -> Any:
        with dispatch.forced("reference"):
            return call()

    return forced


def checked(bench: Bench, shape: Shape, dtype: torch.dtype) -> Call:
    """The call to time; attention by the backend that both ways have.

    Raises:
        ValueError: what it computes is wrong, in C or in torch.
    """
    bench.check(shape, dtype, CPU)
    in_torch(lambda: bench.check(shape, dtype, CPU))()
    variants = bench.variants(shape, dtype, CPU)
    return variants.get("blocked", variants["ours"])


def checked_mask(shape: Shape, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A call that makes a dropout mask.

    Raises:
        ValueError: C and torch make different ones.
    """
    T = shape["T"]
    dropout = Dropout(0.1, 7, torch.arange(T), torch.full((T,), 3))

    def call() -> Tensor:
        return dropout.mask(2, shape["D"], dtype)

    if not torch.equal(call(), in_torch(call)()):
        raise ValueError("the dropout masks in C are not those of torch")
    return call


def measure(dtype: torch.dtype, rounds: int, *, tiny: bool) -> dict[str, Any]:
    """Check all operations, then time them in turn.

    Args:
        dtype: of the tensors.
        rounds: how often each is timed.
        tiny: small shapes, to try the bench.

    Returns:
        By operation its shape, the seconds both ways, and the ratio of C's to torch's.

    Raises:
        ValueError: there are no operations in C here, or one is wrong.
    """
    if (reason := why_slower(CPU, dtype)) is not None:
        raise ValueError(f"there are no operations in C to time: {reason}")
    shapes = {name: _shape(shape, tiny) for name, (_, shape) in OPERATIONS.items()}
    calls: dict[str, Callable[[], Any]] = {
        name: checked(bench, shapes[name], dtype) for name, (bench, _) in OPERATIONS.items()
    }
    shapes["dropout_mask"] = _shape(MASK, tiny)
    calls["dropout_mask"] = checked_mask(shapes["dropout_mask"], dtype)
    ways = {"c": lambda call: call, "torch": in_torch}
    timed = {f"{name} {w}": way(call) for name, call in calls.items() for w, way in ways.items()}
    seconds = alternate(timed, rounds, CPU)
    return {
        name: _row(shape, seconds[f"{name} c"], seconds[f"{name} torch"])
        for name, shape in shapes.items()
    }


def _shape(shape: Shape, tiny: bool) -> dict[str, int]:
    return {key: TINY[key] if tiny and key in TINY else shape[key] for key in shape}


def _row(shape: Shape, in_c: list[float], others: list[float]) -> dict[str, Any]:
    seconds = {"c": summary(in_c), "torch": summary(others)}
    return {"shape": shape, "seconds": seconds, "ratio": median_ratio(in_c, others)}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto")
@click.option("--rounds", type=click.IntRange(min=1), default=30, show_default=True)
@click.option("--tiny", is_flag=True, help="Small shapes, to try the bench.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Append the line.")
def command(dtype: str, rounds: int, tiny: bool, out: Path | None) -> None:
    """Time a CPU's operations in C against torch's own."""
    kind = choose_dtype(dtype, CPU)
    found = measure(kind, rounds, tiny=tiny)
    row = {"bench": "cpu_operations", "dtype": str(kind).removeprefix("torch."), "tiny": tiny}
    report({**row, "rounds": rounds, "found": found, **describe(CPU)}, out)


if __name__ == "__main__":
    console.run(command)
