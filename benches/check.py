"""Whether the kernels are right on this device, before anything is timed there.

    python benches/check.py tests --file tests/kernels/test_triton.py
    python benches/check.py repeat
    python benches/check.py offsets
    python benches/check.py sanitizer --tool racecheck

tests      a file of the kernels' tests, unchanged, in every dtype that the device has; counts them
repeat     every op ten times on the same inputs: outputs and gradients must be the same bits
offsets    every op on a pack of more than 2^31 elements: its last rows must be what they are on
           their own, and the adapters' gradients those of these rows
sanitizer  NVIDIA's compute-sanitizer over the tests of the sums; skipped, and said so, without it
One JSON line a test file, op or tool; the exit code is 1 where one is wrong, after all lines.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import torch
from torch import Tensor

from bioinstruct.benches.cases import LARGE, TAIL, TINY, Case, Found, Place, cases, run
from bioinstruct.benches.harness import describe, gpu_state, report
from bioinstruct.model.llm import choose_device, choose_dtype
from bioinstruct.synth import console

ROOT = Path(__file__).parents[1]
RUNS = 10
OFFSET = 2**31
SANITIZED = "test_swiglu or test_add_rmsnorm or test_lora_linear or test_gemm_lora"
Row = dict[str, Any]


# ---- tests -------------------------------------------------------------------------------------


def tests(file: str, match: str, prefix: tuple[str, ...] = ()) -> Row:
    """Run a file of tests, or those of its tests whose names fit, and count the results.

    Args:
        file: relative to the repository.
        match: pytest's -k.
        prefix: a program that runs Python under it.
    """
    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.xml")
        command = [*prefix, sys.executable, "-m", "pytest", file, "-q", "-p", "no:cacheprovider"]
        command += ["-k", match] * bool(match) + [f"--junitxml={result}"]
        done = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=sys.stderr
        )
        counts = _counts(result)
    right = done.returncode == 0 and counts["tests"] > counts["skipped"]
    seconds = time.perf_counter() - start_s
    return {"file": file, "match": match, **counts, "seconds": seconds, "right": right}


def _counts(result: Path) -> dict[str, int]:
    """What pytest wrote of its suite; all 0 where it was killed before."""
    names = "tests", "failures", "errors", "skipped"
    if not result.exists():
        return dict.fromkeys(names, 0)
    suites = list(ElementTree.parse(result).getroot().iter("testsuite"))
    return {name: sum(int(suite.get(name, 0)) for suite in suites) for name in names}


def sanitizer(tool: str, match: str) -> Row:
    """Run the tests of the sums under compute-sanitizer, if it is there."""
    program = shutil.which("compute-sanitizer")
    if program is None or not torch.cuda.is_available():
        missing = "compute-sanitizer is not installed" if program is None else "no CUDA GPU"
        return {"tool": tool, "right": True, "skipped_because": missing}
    prefix = program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"
    return {"tool": tool, **tests("tests/kernels/test_triton.py", match or SANITIZED, prefix)}


# ---- ops ---------------------------------------------------------------------------------------


def repeat(case: Case, place: Place, T: int) -> Row:
    """Whether RUNS runs give the same bits."""
    first = _tensors(run(case, place, T, alone=False))
    for again in range(1, RUNS):
        found = _tensors(run(case, place, T, alone=False))
        if not all(torch.equal(a, b) for a, b in zip(first, found, strict=True)):
            return {"op": case.name, "runs": again + 1, "right": False}
    return {"op": case.name, "runs": RUNS, "right": bool(all(_finite(x) for x in first))}


def offsets(case: Case, place: Place, elements: int) -> Row:
    """Whether the last rows of a pack beyond this many elements are what they are on their own."""
    T = elements // case.elements + TAIL + 1
    large = run(case, place, T, alone=False)
    small = run(case, place, T, alone=True)
    pairs = zip(_tensors(large), _tensors(small), strict=True)
    error = max(_error(a, b) for a, b in pairs)
    # the library may take another kernel for another number of rows; sums run in another order
    allowed = 4 * torch.finfo(place.dtype).eps
    learns = any(bool(x.any()) for x in small.rows)
    right = learns and error <= allowed and all(_finite(x) for x in _tensors(large))
    return {"op": case.name, "T": T, "elements": T * case.elements, "error": error, "right": right}


def _tensors(found: Found) -> list[Tensor]:
    return [found.output, *found.rows, *found.shared]


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def _error(a: Tensor, b: Tensor) -> float:
    scale = float(b.abs().max())
    return float((a.double() - b.double()).abs().max()) / (scale or 1.0)


def each_op(part: Callable[[Case, Place, int], Row], place: Place, size: int) -> Iterator[Row]:
    """A row for every op; one that fails has its sentence in it."""
    for case in cases(place):
        try:
            yield part(case, place, size)
        except (RuntimeError, ValueError) as error:
            yield {"op": case.name, "right": False, "failure": str(error).splitlines()[0]}
        if place.device.type == "cuda":
            torch.cuda.empty_cache()


# ---- command -----------------------------------------------------------------------------------


def rows_of(
    part: str, *, file: str, tool: str, match: str, place: Place, tiny: bool
) -> Iterator[Row]:
    """The rows of one part."""
    if part == "tests":
        yield tests(file, match)
    elif part == "sanitizer":
        yield sanitizer(tool, match)
    elif part == "repeat":
        yield from each_op(repeat, place, 200 if tiny else 8192)
    else:
        yield from each_op(offsets, place, 4096 if tiny else OFFSET)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("part", type=click.Choice(["tests", "repeat", "offsets", "sanitizer"]))
@click.option("--file", default="tests/kernels/test_triton.py", show_default=True)
@click.option("--tool", type=click.Choice(["racecheck", "memcheck"]), default="racecheck")
@click.option("--match", default="", help="Only tests that fit pytest's -k.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto")
@click.option("--tiny", is_flag=True, help="Small packs, to try this on a CPU.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Append the lines.")
def command(
    part: str,
    file: str,
    tool: str,
    match: str,
    device: str,
    dtype: str,
    tiny: bool,
    out: Path | None,
) -> None:
    """Check the kernels on this device; one JSON line a result."""
    where = choose_device(device)
    place = Place(where, choose_dtype(dtype, where), TINY if tiny else LARGE)
    wrong = []
    for row in rows_of(part, file=file, tool=tool, match=match, place=place, tiny=tiny):
        kind = str(place.dtype).removeprefix("torch.")
        known = {"bench": "check", "part": part, "dtype": kind, "tiny": tiny}
        report({**known, **row, **describe(where, ["triton"]), "gpu": gpu_state(where)}, out)
        if not row["right"]:
            wrong.append(str(row.get("op") or row.get("file") or row.get("tool")))
    if wrong:
        raise ValueError(f"check {part}: {len(wrong)} wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    console.run(command)
