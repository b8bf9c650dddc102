"""Compile every kernel for GPUs that need not be here, and say what the compiler made of it.

    python benches/ahead_of_time.py --arch 90 --out results.jsonl

The ops run in bfloat16 at the widths of LLaMA-7B, LLaMA-13B and Llama-3-8B with their launches
recorded instead of made (kernels/dispatch.py), so what is compiled is what training launches, with
the same constants. One JSON line a kernel and architecture: registers a thread, stack frame and
local memory (what spills, in bytes), static and dynamic shared memory. A kernel that spills, or
wants more shared memory than the chip has, ends the command with exit code 1, after all lines.

`--record tests/data/ahead_of_time.json` makes the figures the baseline that a test holds later
compilers and kernels to, for the version of Triton that ran; tests/kernels/with_triton.sh runs this
with another one.
"""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    # decides at import whether kernels are compiled or interpreted
    os.environ.pop("TRITON_INTERPRET", None)

import click  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bioinstruct.benches.halves import layer_calls, leaf, masks  # noqa: E402
from bioinstruct.benches.harness import report  # noqa: E402
from bioinstruct.benches.workload import SHAPES as MODELS  # noqa: E402
from bioinstruct.kernels import (  # noqa: E402
    Branch,
    Dropout,
    Rotation,
    add_rmsnorm,
    linear_cross_entropy,
    lora_linear,
    rmsnorm,
    split_rope,
    swiglu,
)
from bioinstruct.kernels.adamw import adamw_, clip_factor_tensor, global_norm  # noqa: E402
from bioinstruct.kernels.dispatch import HAS_TRITON, Launch, recorded  # noqa: E402
from bioinstruct.kernels.gemm_lora import gemm_lora  # noqa: E402
from bioinstruct.kernels.mirror import Mirror, Place  # noqa: E402
from bioinstruct.model.adapters import TARGETS  # noqa: E402
from bioinstruct.synth import console  # noqa: E402
from bioinstruct.synth.files import write_text  # noqa: E402

SHARED_BYTES = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Shared memory of one block at most, by architecture."""
TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
RANKS = 8, 16, 32, 64
TOKENS = 96


class Shape(NamedTuple):
    """Widths that a kernel's constants depend on."""

    D: int
    F: int
    V: int


SHAPES = Shape(4096, 11008, 32000), Shape(5120, 13824, 32000), Shape(4096, 14336, 128256)


# ---- what training launches --------------------------------------------------------------------


def _run_width(shape: Shape) -> None:
    """Norms, gate and loss forward and backward; the head's width does not matter to its kernel."""
    x, delta, gain = leaf(TOKENS, shape.D), leaf(TOKENS, shape.D), leaf(shape.D)
    h, y = add_rmsnorm(x, delta, gain)
    (h + y + rmsnorm(x, gain)).sum().backward()
    swiglu(leaf(TOKENS, 2 * shape.F)).sum().backward()
    rows = torch.arange(8)
    linear_cross_entropy(leaf(8, 16), torch.zeros(shape.V, 16).bfloat16(), rows, rows).backward()
    with torch.no_grad():
        linear_cross_entropy(leaf(8, 16), torch.zeros(shape.V, 16).bfloat16(), rows, rows)


def _run_lora(R: int, p: float) -> None:
    dropout = masks(TOKENS, p)
    a, b = leaf(R, 4096, dtype=torch.float32), leaf(4096, R, dtype=torch.float32)
    y = lora_linear(leaf(TOKENS, 4096), leaf(4096, 4096).detach(), [Branch(a, b, 0)], 2, dropout)
    y.sum().backward()


def _run_layer(shape: Shape, R: int, p: float) -> None:
    """A layer over augmented buffers, all projections adapted, or only q and down.

    On the meta device: nothing is computed, and the products' memory is not there.
    """
    config = dataclasses.replace(
        MODELS["llama-7b"],
        hidden_size=shape.D,
        intermediate_size=shape.F,
        num_heads=shape.D // 128,
        num_kv_heads=shape.D // 128,
    )
    with torch.device("meta"):
        for adapted in (tuple(TARGETS), ("q_proj", "down_proj")):
            for call in layer_calls(config, TOKENS, R, p, adapted).values():
                call()


def _run_rest() -> None:
    table = Rotation(*(torch.zeros(TOKENS, 64) for _ in range(2)))
    for heads in (4, 2):
        torch.cat(split_rope(leaf(TOKENS, 6 * 128), table, heads), 1).sum().backward()
    zeros = torch.zeros(TOKENS, dtype=torch.int64)
    Dropout(0.1, 2**32 - 1, zeros, zeros).mask(3, 4096, torch.bfloat16)
    p, g, m, v = torch.zeros(4, 4096)
    mirror = Mirror([Place(0, torch.zeros(4, 1024).bfloat16(), 1.0)], 4096)
    mirror.refresh(p)
    for copies in (None, mirror):
        mirror.version = p._version
        adamw_(p, g, m, v, lr=1e-4, step=1, mirror=copies)
    adamw_(p, g, m, v, lr=1e-4, step=1, grad_factor=clip_factor_tensor(p[0], 1.0))
    global_norm(g)


def _run_gemm_lora(R: int, p: float) -> None:
    """Both directions at the tiles for unknown GPUs."""
    sizes = (TOKENS, 4096), (4096, 4096), (TOKENS, R), (4096, R)
    x, w, t, b = (torch.zeros(size).bfloat16() for size in sizes)
    gemm_lora(x, w, t, b)
    gemm_lora(x, w.T, t, b.T.contiguous().T, masks(TOKENS, p))


def launches() -> list[Launch]:
    """The kernels of a training step, each once for every set of constants."""
    with recorded() as calls:
        for shape in SHAPES:
            _run_width(shape)
        for R, p in itertools.product(RANKS, (0.0, 0.1)):
            _run_lora(R, p)
            if R in (16, 64):
                _run_gemm_lora(R, p)
            for shape in SHAPES:
                _run_layer(shape, R, p)
        _run_rest()
    # numbers differ from launch to launch, what is compiled does not
    return list({name_of(call): call for call in calls}.values())


def name_of(call: Launch) -> str:
    """The kernel, its constants, and the types of its tensors."""
    constants = ",".join(f"{key}={value}" for key, value in call.constants.items())
    types = ",".join(TYPES[a.dtype] for a in call.arguments if isinstance(a, Tensor))
    return f"{call.kernel.fn.__name__}[{constants}]({types})"


# ---- compiling ---------------------------------------------------------------------------------


class _Source(NamedTuple):
    signature: dict[str, str]
    constants: dict[tuple[int], Any]
    attributes: dict[tuple[int], list[list[object]]]


def _source(call: Launch) -> _Source:
    """What Triton's launcher would derive from these arguments."""
    source = _Source({}, {}, {})
    values = dict(zip(call.kernel.arg_names, call.arguments, strict=False)) | call.constants
    for i, parameter in enumerate(call.kernel.params):
        value = values[parameter.name]
        fixed = parameter.is_constexpr or (
            type(value) is int and value == 1 and not parameter.do_not_specialize
        )
        if fixed:
            source.signature[parameter.name] = "constexpr"
            source.constants[i,] = value
            continue
        source.signature[parameter.name] = _type(value)
        whole = type(value) is int and value % 16 == 0 and not parameter.do_not_specialize
        if isinstance(value, Tensor) or whole:
            source.attributes[i,] = [["tt.divisibility", 16]]
    return source


def _type(value: object) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int)
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_launch(call: Launch, arch: int) -> dict[str, Any]:
    """Compile one launch for one architecture (80 for sm_80) and report its resources."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_source

    source = ASTSource(call.kernel, *_source(call))
    options = {k: v for k, v in call.constants.items() if k in ("num_warps", "num_stages")}
    compiled = compile_source(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {
        "kernel": name_of(call),
        "arch": arch,
        **_resources(compiled.asm["cubin"]),
        "shared_bytes": compiled.metadata.shared,
        "tensor_cores": "mma" in compiled.asm["ptx"],
    }


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local bytes, as the assembler's own tool reads them off the code."""
    import triton.backends.nvidia

    tool = Path(next(iter(triton.backends.nvidia.__path__))) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return {
        "registers": int(found["REG"]),
        "stack_bytes": int(found["STACK"]),
        "local_bytes": int(found["LOCAL"]),
    }


def faults_of(row: dict[str, Any]) -> Iterator[str]:
    """What makes a row unfit to ship, one sentence each."""
    where = f"{row['kernel']} on sm_{row['arch']}"
    if row["stack_bytes"] or row["local_bytes"]:
        yield f"{where} spills {row['stack_bytes'] + row['local_bytes']} bytes"
    if row["shared_bytes"] > SHARED_BYTES[row["arch"]]:
        limit = SHARED_BYTES[row["arch"]]
        yield f"{where} wants {row['shared_bytes']} bytes of shared memory, the chip has {limit}"


def record(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Put registers and shared memory of rows of one Triton version into a baseline file."""
    baseline = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    table: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        figures = [row["registers"], row["shared_bytes"]]
        table.setdefault(row["kernel"], {})[str(row["arch"])] = figures
    baseline[rows[0]["triton"]] = table
    lines = [
        f"  {json.dumps(version)}: {{\n"
        + ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in kernels.items())
        + "\n  }"
        for version, kernels in sorted(baseline.items())
    ]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def run(archs: Sequence[int], match: str, out: Path | None) -> list[dict[str, Any]]:
    """Compile, print the rows and return them; refuse what is unfit.

    Raises:
        ValueError: Triton is missing, nothing matches, or a kernel is unfit.
    """
    if not HAS_TRITON:
        raise ValueError("ahead_of_time needs Triton, which is not installed (Linux only)")
    import triton

    calls = [call for call in launches() if match in name_of(call)]
    if not calls:
        raise ValueError(f"no kernel's name holds --match {match!r}")
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    for arch in archs or SHARED_BYTES:
        for call in calls:
            row = {"triton": triton.__version__, **compile_launch(call, arch)}
            report(row, out)
            rows.append(row)
            faults += faults_of(row)
    if faults:
        raise ValueError(f"{len(faults)} kernels are unfit: {'; '.join(faults)}")
    return rows


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--arch",
    "archs",
    type=click.Choice([str(arch) for arch in SHARED_BYTES]),
    multiple=True,
    help="90 for sm_90; may be repeated; all when left out.",
)
@click.option("--match", default="", help="Only kernels whose name holds this.")
@click.option("--out", type=click.Path(path_type=Path), help="File to append the lines to.")
@click.option("--record", "baseline", type=click.Path(path_type=Path), help="Baseline to update.")
def command(archs: tuple[str, ...], match: str, out: Path | None, baseline: Path | None) -> None:
    """Compile every kernel for GPUs that need not be here; one JSON line each."""
    if baseline is not None and (archs or match):
        raise click.UsageError("--record takes all kernels: leave --arch and --match out")
    rows = run([int(arch) for arch in archs], match, out)
    if baseline is not None:
        record(rows, baseline)


if __name__ == "__main__":
    console.run(command)
