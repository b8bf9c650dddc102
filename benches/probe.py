"""Six questions to a GPU, each with the answer that was expected before it was asked.

    python benches/probe.py gemm --choices choices.json
    python benches/probe.py --device cpu --tiny extended

gemm      what share of the library's rate a Triton product with the update in its accumulator
          reaches, by tiles; --choices writes the fastest for each shape (kernels/gemm_choices.py)
extended  what R more columns of K, or of N, or a strided weight, cost a library product
skinny    what the rank-wide passes cost, as a share of the copy bandwidth
addmm     what reading C costs a library product
linear    the LoRA linear in all its forms: lora_kernel.py
attention the attention backends: attention.py
Times are of both directions' shapes of LLaMA-7B, in turn, in one process. One JSON line a case; the
prediction stands in it, and was written before any GPU had run.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor

from bioinstruct.benches.harness import describe, gpu_state, median_ratio, report, summary
from bioinstruct.benches.kernel_bench import Call, rates, time_variants
from bioinstruct.kernels import skinny
from bioinstruct.kernels.dispatch import uses_triton
from bioinstruct.kernels.gemm_choices import CANDIDATES, GemmConfig, Measured, record
from bioinstruct.kernels.gemm_lora import gemm_lora
from bioinstruct.model.llm import choose_device, choose_dtype
from bioinstruct.synth import console

SHAPES = [
    # M, N, K of y = x W^T: linears of LLaMA-7B, then their input gradients
    (8192, 4096, 4096),
    (8192, 12288, 4096),
    (8192, 22016, 4096),
    (8192, 4096, 11008),
    (8192, 4096, 12288),
    (8192, 4096, 22016),
]
TINY = [(48, 40, 24), (48, 24, 40)]
RANK = 16
PREDICTIONS = {
    "gemm": "Triton reaches 0.90 to 0.97 of the library's rate; at 0.985 it takes the shape",
    "extended": "K + r costs 1 to 2 %, N + r 0 to 12 %, a strided weight nothing",
    "skinny": "16 to 19 us for each pass over 8192 x 4096 bfloat16: 0.85 of the copy bandwidth",
    "addmm": "at most 6 us more than without C at 8192 x 4096 x 4096",
}
Row = dict[str, Any]
Variants = dict[str, Call]


class Probe(NamedTuple):
    """Where and how the questions are asked."""

    device: torch.device
    dtype: torch.dtype
    rounds: int
    sets: int
    sustain_s: float

    def random(self, *shape: int) -> Tensor:
        """Normal numbers: on zeros a chip runs at a higher clock."""
        return torch.randn(shape, device=self.device).to(self.dtype)

    def timed(self, make: Callable[[], Variants]) -> dict[str, list[float]]:
        """Seconds of the variants, each going round its sets of inputs."""
        made = [make() for _ in range(self.sets)]
        return time_variants(made, self.rounds, self.device).seconds


def _row(question: str, seconds: Mapping[str, list[float]], base: str, **shape: Any) -> Row:
    return {
        "bench": "probe",
        "question": question,
        **shape,
        "prediction": PREDICTIONS[question],
        "seconds": {name: summary(values) for name, values in seconds.items()},
        f"ratio_to_{base}": {
            name: median_ratio(values, seconds[base])
            for name, values in seconds.items()
            if name != base
        },
    }


# ---- questions ---------------------------------------------------------------------------------


def fitting(device: torch.device) -> list[GemmConfig]:
    """Tiles that run on this device; all on a CPU, where none is launched."""
    if device.type != "cuda":
        return list(CANDIDATES)
    found = []
    for tiles in CANDIDATES:
        x, t = (torch.zeros(256, width, device=device).bfloat16() for width in (256, RANK))
        try:
            gemm_lora(x, x, t, t, config=tiles)
            found.append(tiles)
        except Exception as error:  # triton's own kinds: too much shared memory, a failed compile
            console.note(f"without {tiles}: {str(error).splitlines()[0]}")
    return found


def gemm(probe: Probe, shapes: list[tuple[int, int, int]]) -> Iterator[tuple[Row, Measured | None]]:
    """Library product over K + R columns, against gemm_lora by tiles."""
    for M, N, K in shapes:
        tiles = {f"tiles {i}": config for i, config in enumerate(fitting(probe.device))}

        def make(M: int = M, N: int = N, K: int = K, tiles: Any = tiles) -> Variants:
            x, w, y = probe.random(M, K + RANK), probe.random(N, K + RANK), probe.random(M, N)
            parts = x[:, :K], w[:, :K], x[:, K:], w[:, K:]
            library = {"library": lambda: torch.mm(x, w.T, out=y)}
            ours = {n: partial(gemm_lora, *parts, config=config) for n, config in tiles.items()}
            return {**library, **ours}

        seconds = probe.timed(make)
        row = _row("gemm", seconds, "library", M=M, N=N, K=K, R=RANK)
        row["tiles"] = {name: config._asdict() for name, config in tiles.items()}
        median = {name: row["seconds"][name]["median"] for name in seconds}
        best = min(tiles, key=lambda name: median[name])
        found = Measured(M, N, K, tiles[best], median[best], median["library"])
        yield row, found if uses_triton(probe.random(1)) else None


def extended(probe: Probe, shapes: list[tuple[int, int, int]]) -> Iterator[Row]:
    """More columns of K, more rows of W, and W as a part of a wider buffer."""
    for M, N, K in shapes[:1] + shapes[3:4]:

        def make(M: int = M, N: int = N, K: int = K) -> Variants:
            def product(n: int, k: int) -> Call:
                x, w, y = probe.random(M, k), probe.random(n, k), probe.random(M, n)
                return lambda: torch.mm(x, w.T, out=y)

            wide, y, x = probe.random(N + 64, K + 64), probe.random(M, N), probe.random(M, K)
            dy, dx = probe.random(M, N), probe.random(M, K)
            return {
                "plain": product(N, K),
                **{f"K + {r}": product(N, K + r) for r in (8, 16, 64)},
                "N + 64": product(N + 64, K),
                "strided W, forward": lambda: torch.mm(x, wide[:N, :K].T, out=y),
                "strided W, backward": lambda: torch.mm(dy, wide[:N, :K], out=dx),
            }

        yield _row("extended", probe.timed(make), "plain", M=M, N=N, K=K)


def skinny_passes(probe: Probe, shapes: list[tuple[int, int, int]]) -> Iterator[Row]:
    """The passes over x and dy, in kernels where they run and in library products."""
    rate = rates(probe.dtype, probe.device, probe.sustain_s)
    M, N, K = shapes[0]
    for R in (RANK, 64):

        def make(R: int = R) -> Variants:
            x, a, b = probe.random(M, K), probe.random(R, K), probe.random(N, R)
            t, dy = probe.random(M, R), probe.random(M, N)
            target = torch.empty_like(x)
            calls: Variants = {
                "copy": lambda: target.copy_(x),
                "library t": lambda: torch.mm(x, a.T),
                "library ds": lambda: torch.mm(dy, b),
                "library dA": lambda: torch.mm(t.T, x),
            }
            if uses_triton(x):
                ds = torch.empty_like(t)
                calls["t"] = lambda: skinny.shrink(x, a, t, 1.0)
                calls["ds and dB"] = lambda: skinny.shrink_dy(dy, b.float(), t, ds, 1.0)
                calls["dA"] = lambda: skinny.gradient_of_a(t, skinny.Source(x))
            return calls

        row = _row("skinny", probe.timed(make), "copy", M=M, N=N, K=K, R=R)
        yield {**row, "read_bytes": M * K * probe.dtype.itemsize, "rates": rate._asdict()}


def addmm(probe: Probe, shapes: list[tuple[int, int, int]]) -> Iterator[Row]:
    """The library product with and without C."""
    for M, N, K in shapes[:4]:

        def make(M: int = M, N: int = N, K: int = K) -> Variants:
            x, w, y = probe.random(M, K), probe.random(N, K), probe.random(M, N)
            return {
                "without C": lambda: torch.mm(x, w.T, out=y),
                "with C": lambda: y.addmm_(x, w.T, beta=0.5),
            }

        yield _row("addmm", probe.timed(make), "without C", M=M, N=N, K=K)


QUESTIONS = {"extended": extended, "skinny": skinny_passes, "addmm": addmm}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("question", type=click.Choice(["gemm", *QUESTIONS]))
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto")
@click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--sustain", type=click.FloatRange(min=0), default=2.0, show_default=True)
@click.option("--tiny", is_flag=True, help="Small shapes, to try the questions on a CPU.")
@click.option("--choices", type=click.Path(path_type=Path, dir_okay=False), help="Table to write.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Append the lines.")
def command(
    question: str,
    device: str,
    dtype: str,
    rounds: int,
    sustain: float,
    tiny: bool,
    choices: Path | None,
    out: Path | None,
) -> None:
    """Ask a GPU one question; one JSON line a case."""
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    probe = Probe(place, kind, rounds, 3 if place.type == "cuda" else 1, 0 if tiny else sustain)
    shapes = TINY if tiny else SHAPES
    machine = {
        "dtype": str(kind).removeprefix("torch."),
        "tiny": tiny,
        **describe(place, ["triton"]),
    }

    def write(row: Row) -> None:
        report({**row, **machine, "gpu": gpu_state(place)}, out)

    if question != "gemm":
        for row in QUESTIONS[question](probe, shapes):
            write(row)
        return
    for row, found in gemm(probe, shapes):
        write(row)
        if found is not None and choices is not None and place.type == "cuda":
            record([found], torch.cuda.get_device_name(place), choices)


if __name__ == "__main__":
    console.run(command)
