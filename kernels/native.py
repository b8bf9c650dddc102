"""Operations of a CPU step in C, compiled when they are first wanted.

Between the matrix products of a step on a CPU stand operations that move more than they compute.
torch takes several passes for each, some through float32 copies, and Python a dozen calls; native.c
has each as one loop that the compiler makes vectors of. It is compiled for this very processor by
the C compiler that is there: $CC, or else the first of cc, gcc and clang. The library is kept in
the cache folder, under a name that holds the hashes of what it was made of and of its own bytes, so
that one which is broken is made anew. Where no compiler is, or it fails, everything runs in
torch's operations, slower: `loaded` says why. BIOINSTRUCT_KERNELS=reference does without.

Threads  The library is linked without a runtime of OpenMP and finds the one that torch has loaded:
         two would fight for the cores. A compiler without OpenMP makes loops of one thread.
Numerics float32 and bfloat16; all arithmetic in float32, sums in an order that depends on the
         processor's vectors, not on the number of threads.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels import dispatch
from bioinstruct.synth.files import cache_folder, replaces

SOURCES = sorted(Path(__file__).parent.glob("*.c"))
CPUINFO = Path("/proc/cpuinfo")
OPTIONS = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}
FLAGS = "-O3", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"
TUNED = ("-march=native",), ()
"""Some of clang's ports refuse the first."""
PARALLEL = ("-fopenmp",), ("-fopenmp-simd",)
"""The second leaves out the threads: Apple's clang has no OpenMP, and a library may ask for
another runtime than the one that torch has loaded."""
COMPILE_S = 120.0
SMALL = 1 << 15
"""Elements below which threads cost more than they bring."""

_P, _L, _F, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
ARGUMENTS = {
    "norm": (_P, _P, _P, _P, _P, _P, _L, _L, _F, _I),
    "norm_back": (_P, _P, _P, _P, _P, _P, _P, _L, _L, _I),
    "gated": (_P, _P, _L, _L, _I),
    "gated_back": (_P, _P, _P, _P, _L, _L, _I),
    "rotate": (_P, _L, _P, _L, _P, _P, _F, _L, _L, _L, _I),
    "heads_first": (_P, _L, _P, _L, _L, _L, _I),
    "tokens_first": (_P, _P, _L, _L, _L, _I),
    "sums_tokens_first": (_P, _P, _L, _L, _L, _I),
    "add_to_sums": (_P, _L, _P, _L, _L),
    "causal_softmax": (_P, _L, _L, _L, _L, _I),
    "causal_softmax_back": (_P, _P, _L, _L, _L, _L, _I),
    "cross_entropy": (_P, _P, _P, _L, _L, _I, _I),
    "expand": (_P, _L, _P, _L, _P, _L, _L, _L, _L, _L, _I),
    "shrink": (_P, _L, _P, _L, _P, _L, _L, _L, _L, _L, _I),
    "add_outer": (_P, _L, _L, _P, _L, _P, _L, _F, _L, _L, _L, _I),
    "dropout_mask": (_P, _P, _P, _L, _L, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32, _F, _I),
    "attention_room": (_L, _L, _L, _L, _L, _I),
    "attention": (_P, _L) * 3 + (_P,) * 5 + (_L, _P) + (_L,) * 7 + (_I,),
    "attention_back": (
        (_P, _L) * 3 + (_P, _P, _L) + (_P,) * 5 + (_L, _P, _P) + (_L,) * 7 + (_I,)
    ),
}  # fmt: skip
RESULTS: dict[str, type[Any]] = {
    "attention_room": _L,
    "expand": _I,
    "shrink": _I,
    "add_outer": _I,
}
"""Of the functions that return something."""


class Unavailable(Exception):
    """The library cannot be had; the text says why."""


class Refused(Unavailable):
    """It cannot be had with these options."""


class Loaded(NamedTuple):
    """What asking for the library came to."""

    library: ctypes.CDLL | None
    """None where everything runs in torch's operations."""
    told: str
    """Its compiler, or why there is none."""

    def __str__(self) -> str:
        return f"{'torch' if self.library is None else 'C'} ({self.told})"


_loaded: dict[torch.dtype, Loaded] = {}
_loading = threading.Lock()  # packs side by side may ask at once


def native(x: Tensor, dtype: torch.dtype | None = None) -> ctypes.CDLL | None:
    """The library for tensors like x, or of another dtype where x is; None for torch's own."""
    dtype = x.dtype if dtype is None else dtype
    if dtype not in OPTIONS or dispatch.choice() != "auto":
        return None
    if x.device.type != "cpu" and not (x.is_meta and _Counting.on):
        return None
    library = (_loaded.get(dtype) or loaded(dtype)).library
    return library if library is None or not x.is_meta else _Silent(library)


def loaded(dtype: torch.dtype) -> Loaded:
    """The library for a dtype on this machine's CPU, compiled at the first call of a process."""
    with _loading:
        if dtype not in _loaded:
            _loaded[dtype] = load(dtype)
        return _loaded[dtype]


class _Counting:
    on = False


class _Silent(ctypes.CDLL):
    """A library whose functions do nothing, for tensors without memory; what counts is counted."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        return function if name == "attention_room" else lambda *_: 0


@contextmanager
def counted() -> Iterator[None]:
    """Let tensors on the meta device allocate what they would on a CPU."""
    _Counting.on = True
    try:
        yield
    finally:
        _Counting.on = False


def operations(device: torch.device, dtype: torch.dtype) -> str:
    """What the operations on a device run in, for people: C, Triton's kernels or torch's own."""
    if device.type == "cpu" and dispatch.choice() == "auto":
        return str(loaded(dtype))
    return "Triton" if dispatch.uses_triton(torch.empty(0, device=device)) else "torch"


def why_slower(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why operations that might run in C run in torch; None where they do not."""
    if device.type != "cpu" or dtype not in OPTIONS or dispatch.choice() != "auto":
        return None
    library, told = loaded(dtype)
    return told if library is None else None


def used() -> str:
    """What the operations on this process's CPU have run in so far; empty where none have."""
    return ", ".join(sorted({str(found) for found in _loaded.values()}))


def addresses(*tensors: Tensor | None) -> tuple[int | None, ...]:
    """Where tensors begin; null for None. Their caller keeps them alive and contiguous."""
    return tuple(None if tensor is None else tensor.data_ptr() for tensor in tensors)


def threads_for(elements: int) -> int:
    """How many threads are to share so many elements."""
    return 1 if elements < SMALL else torch.get_num_threads()


# ---- compiling ----------------------------------------------------------------------------------


def load(dtype: torch.dtype, flags: Sequence[str] = ()) -> Loaded:
    """Load the library for a dtype, compiled where the cache does not have it.

    Args:
        dtype: of its tensors.
        flags: for the compiler, behind all others: tests make the code of other processors.
    """
    if dtype not in OPTIONS:
        return Loaded(None, f"there are none in {str(dtype).removeprefix('torch.')}")
    try:
        compiler = _compiler()
        version = _run((*compiler, "--version"))
        library, parallel = _first_that_loads(compiler, version, (*flags, *OPTIONS[dtype]))
    except Unavailable as reason:
        return Loaded(None, str(reason))
    for name, arguments in ARGUMENTS.items():
        # some are for processors with certain instructions
        if (function := getattr(library, name, None)) is not None:
            function.argtypes, function.restype = arguments, RESULTS.get(name)
    # "gcc (Debian 12.2.0-14) 12.2.0" without what stands in brackets
    short = re.sub(r" *\([^)]*\)", "", (version.splitlines() or [compiler[0]])[0])
    return Loaded(library, short if parallel else f"{short} without OpenMP, so one thread")


def _compiler() -> tuple[str, ...]:
    """The command of the C compiler."""
    if own := os.environ.get("CC", "").strip():
        try:
            command = shlex.split(own)
        except ValueError:  # a quotation mark without its fellow
            command = [own]
        if found := shutil.which(command[0]):
            return found, *command[1:]
        raise Unavailable(f"there is no {command[0]}, which $CC asks for")
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return (found,)
    raise Unavailable("there is no cc, gcc or clang, and $CC names no other")


def _first_that_loads(
    compiler: tuple[str, ...], version: str, options: tuple[str, ...]
) -> tuple[ctypes.CDLL, bool]:
    """The library by the first options that serve, and whether it has threads."""
    reason = Unavailable()
    for tuned in TUNED:
        for parallel in PARALLEL:
            try:
                library = _opened(compiler, version, (*FLAGS, *tuned, *parallel, *options))
            except Refused as error:
                reason = error
            else:
                return library, parallel is PARALLEL[0]
    raise reason


def _opened(compiler: tuple[str, ...], version: str, options: tuple[str, ...]) -> ctypes.CDLL:
    texts = [path.read_text() for path in sorted(SOURCES[0].parent.glob("*.[ch]"))]
    facts = texts, compiler, version, options, _processor()
    made_of = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    if (data := _cached(made_of)) is None:
        data = _compiled(compiler, options)
        with contextlib.suppress(OSError, RuntimeError), replaces(_place(made_of, data)) as path:
            path.write_bytes(data)
    with contextlib.suppress(OSError, RuntimeError):
        return ctypes.CDLL(str(_place(made_of, data)))
    # nothing can be kept there, or not run from there: a copy serves this process, and once loaded
    # it needs no file
    try:
        with tempfile.TemporaryDirectory(prefix="bioinstruct-") as folder:
            path = Path(folder, "native.so")
            path.write_bytes(data)
            return ctypes.CDLL(str(path))
    except OSError as error:
        raise Refused(f"what {compiler[0]} made cannot be loaded ({error})") from None


def _place(made_of: str, data: bytes) -> Path:
    """Where a library is kept."""
    return cache_folder() / f"native-{made_of}-{hashlib.sha256(data).hexdigest()[:16]}.so"


def _cached(made_of: str) -> bytes | None:
    """The library that the cache has; loading one that is cut short would kill the process."""
    with contextlib.suppress(OSError, RuntimeError):
        for path in sorted(cache_folder().glob(f"native-{made_of}-*.so")):
            if _place(made_of, data := path.read_bytes()) == path:
                return data
            path.unlink()
    return None


def _compiled(compiler: tuple[str, ...], options: tuple[str, ...]) -> bytes:
    # nothing of OpenMP at the second step, which would bind a runtime to the library
    undefined = ("-undefined", "dynamic_lookup") if platform.system() == "Darwin" else ()
    try:
        with tempfile.TemporaryDirectory(prefix="bioinstruct-") as folder:
            made, library = [], Path(folder, "native.so")
            for source in SOURCES:
                made.append(str(Path(folder, f"{source.stem}.o")))
                _run((*compiler, *options, "-c", str(source), "-o", made[-1]))
            _run((*compiler, "-shared", *undefined, *made, "-o", str(library), "-lm"))
            return library.read_bytes()
    except OSError as error:
        raise Refused(f"{compiler[0]} made no library ({error.strerror})") from None


def _run(command: Sequence[str]) -> str:
    """What a command prints."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMPILE_S,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or f"no answer within {COMPILE_S:.0f} s"
        raise Unavailable(f"{command[0]} failed: {reason}") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        first = next((line for line in said if "error" in line), said[0])
        raise Refused(f"{command[0]} failed: {first}")
    return done.stdout


_IDENTITY = {
    "vendor_id", "cpu family", "model", "flags",  # x86
    "Features", "CPU implementer", "CPU architecture", "CPU variant", "CPU part",  # Arm
    "cpu", "isa", "features",  # Power, RISC-V, Z
}  # fmt: skip


def _processor() -> str:
    """What -march=native depends on, and nothing that changes with time, as its frequency does."""
    with contextlib.suppress(OSError):
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = {line for line in lines if line.partition(":")[0].strip() in _IDENTITY}
        if kept:
            return repr(sorted(kept))
    return repr(platform.uname()[4:])
