"""Which implementation an op runs: its Triton kernels, C (native.py) or its torch operations.

    auto       the default: the kernels for tensors on a GPU once PROVEN, C for those on a CPU where
               it can be compiled, torch's operations else
    reference  torch's operations everywhere
    triton     the kernels everywhere; on a CPU in Triton's interpreter, with TRITON_INTERPRET=1

The environment variable BIOINSTRUCT_KERNELS sets it, `forced` changes it for a while. Triton comes
for Linux only; where it is missing everything runs in torch.

Numerics Kernels compute in float32, so float64 tensors take torch's operations whatever is set. The
         interpreter works on NumPy arrays, in float32 and float16. bfloat16 is wrong there and
         nothing says so (products take the bits for integers, casts truncate): it is refused.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHOICES = "auto", "reference", "triton"
VARIABLE = "BIOINSTRUCT_KERNELS"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = find_spec("triton") is not None
PROVEN = False
"""Whether the kernels' tests have passed on a GPU. Interpreted and compiled ahead of time is not
enough to train with by default; BIOINSTRUCT_KERNELS=triton runs them all the same."""

tl: Any
if HAS_TRITON:
    # fused multiply-adds, whatever a version's own default: 3.9 warns that it is going to change
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import triton
    import triton.language

    tl, jit = triton.language, triton.jit
else:
    # the kernels' definitions are still read, and never called
    tl = SimpleNamespace(constexpr=None)

    def jit(function: Any = None, **_: Any) -> Any:
        """Leave a kernel as it is."""
        return function if function is not None else jit


class Launch(NamedTuple):
    """One kernel call, as `recorded` lists it."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


class _State:
    choice = "auto"
    recording: list[Launch] | None = None


def choose(name: str) -> None:
    """Set the implementation of every op from now on.

    Raises:
        ValueError: not one of CHOICES.
    """
    if name not in CHOICES:
        raise ValueError(f"{VARIABLE} = {name!r} is unknown; allowed are {', '.join(CHOICES)}")
    _State.choice = name


def choice() -> str:
    """The implementation that is set: one of CHOICES."""
    return _State.choice


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Set the implementation within a with block."""
    before = _State.choice
    choose(name)
    try:
        yield
    finally:
        _State.choice = before


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect kernel calls instead of making them: outputs stay unwritten, no GPU is needed."""
    calls: list[Launch] = []
    _State.recording = calls
    try:
        with forced("triton"):
            yield calls
    finally:
        _State.recording = None


def interprets() -> bool:
    """Whether ops on a CPU run their kernels, by Triton's interpreter: in one thread alone."""
    return _State.choice == "triton"


def uses_triton(*tensors: Tensor) -> bool:
    """Whether an op on these tensors runs its kernels.

    Raises:
        ValueError: the kernels are forced and cannot run here.
    """
    if _State.choice == "reference" or any(t.dtype == torch.float64 for t in tensors):
        return False
    on_gpu = all(t.is_cuda for t in tensors)
    if _State.choice == "auto":
        return PROVEN and HAS_TRITON and on_gpu
    if not HAS_TRITON:
        raise ValueError(f"{VARIABLE}=triton needs Triton, which is not installed; use auto")
    if _State.recording is None and not on_gpu:
        _check_interpreter(tensors)
    return True


def _check_interpreter(tensors: tuple[Tensor, ...]) -> None:
    if not INTERPRETED:
        raise ValueError(
            f"{VARIABLE}=triton needs a GPU, or TRITON_INTERPRET=1 to interpret the kernels; "
            "use auto"
        )
    if any(t.dtype == torch.bfloat16 for t in tensors):
        raise ValueError(
            f"{VARIABLE}=triton: Triton's interpreter is wrong in bfloat16; use float32 or float16"
        )


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its tensors; an empty grid runs nothing.

    Args:
        kernel: the jitted function.
        grid: programs along each axis.
        arguments: tensors and numbers.
        constants: what it is compiled for, and num_warps and num_stages.
    """
    if 0 in grid:
        return
    if _State.recording is not None:
        _State.recording.append(Launch(kernel, arguments, constants))
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n, at least 1."""
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


@jit
def dot(a, b, acc, UP: tl.constexpr):
    """acc + a b in float32; UP widens the operands first, as the interpreter needs it."""
    if UP:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


choose(os.environ.get(VARIABLE, "auto"))
