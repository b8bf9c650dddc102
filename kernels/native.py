"""Operations of a CPU step in C, compiled when they are first wanted.

Between the matrix products of a step on a CPU stand operations that move more than they compute.
torch takes several passes for each, some through float32 copies, and Python a dozen calls; native.c
has each as one loop that the compiler makes vectors of. It is compiled for this very processor by
the C compiler that is there ($CC, else cc, gcc or clang), into the cache folder, under a name that
holds the hashes of source, compiler and processor. Where there is none, or it fails, everything
runs in torch's operations, slower: `why_not` says why. BIOINSTRUCT_KERNELS=reference does without.

Numerics float32 and bfloat16; all arithmetic in float32, sums in an order that depends on the
         processor's vectors, not on the number of threads.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import torch
from torch import Tensor

from bioinstruct.kernels import dispatch
from bioinstruct.synth.files import cache_folder

SOURCES = sorted(Path(__file__).parent.glob("*.c"))
OPTIONS = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}
FLAGS = (
    "-O3", "-march=native", "-std=gnu11", "-fPIC", "-fvisibility=hidden",
    "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
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
    "expand": (_P, _L, _P, _L, _P, _L, _L, _L, _L, _I),
    "shrink": (_P, _L, _P, _L, _P, _L, _L, _L, _L, _I),
    "add_outer": (_P, _L, _L, _P, _L, _P, _L, _F, _L, _L, _L, _I),
    "pair_rows": (_P, _L, _P, _L, _L, _L),
    "pair_columns": (_P, _L, _P, _L, _L, _L),
    "dropout_mask": (_P, _P, _P, _L, _L, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32, _F, _I),
}


class Unavailable(Exception):
    """The library cannot be had; the text says why."""


_loaded: dict[torch.dtype, ctypes.CDLL | str] = {}
_loading = threading.Lock()  # packs side by side may ask at once


def native(x: Tensor, dtype: torch.dtype | None = None) -> ctypes.CDLL | None:
    """The library for tensors like x, or of another dtype where x is; None for torch's own."""
    dtype = x.dtype if dtype is None else dtype
    if x.device.type != "cpu" or dtype not in OPTIONS or dispatch.choice() != "auto":
        return None
    found = _loaded.get(dtype) or _load_once(dtype)
    return found if isinstance(found, ctypes.CDLL) else None


def why_not(dtype: torch.dtype) -> str | None:
    """Why there is no library for a dtype; None where there is one."""
    if dtype not in OPTIONS:
        return f"there is none in {dtype}"
    found = _load_once(dtype)
    return found if isinstance(found, str) else None


def addresses(*tensors: Tensor | None) -> tuple[int | None, ...]:
    """Where tensors begin; null for None. Their caller keeps them alive and contiguous."""
    return tuple(None if tensor is None else tensor.data_ptr() for tensor in tensors)


def threads_for(elements: int) -> int:
    """How many threads are to share so many elements."""
    return 1 if elements < SMALL else torch.get_num_threads()


def _load_once(dtype: torch.dtype) -> ctypes.CDLL | str:
    with _loading:
        if dtype not in _loaded:
            _loaded[dtype] = _load(dtype)
        return _loaded[dtype]


def _load(dtype: torch.dtype) -> ctypes.CDLL | str:
    """The library, or why there is none."""
    try:
        compiler = _compiler()
        for parallel in ("-fopenmp", "-fopenmp-simd"):  # the second one for one thread alone
            with contextlib.suppress(OSError):
                library = ctypes.CDLL(str(_built(compiler, (*OPTIONS[dtype], parallel))))
                break
        else:
            raise Unavailable("the compiled library cannot be loaded")
    except Unavailable as reason:
        return str(reason)
    for name, arguments in ARGUMENTS.items():
        # some are for processors with certain instructions
        if (function := getattr(library, name, None)) is not None:
            function.argtypes, function.restype = arguments, None
    return library


def _compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    raise Unavailable("there is no C compiler (cc, gcc or clang; $CC may name one)")


def _built(compiler: str, options: tuple[str, ...]) -> Path:
    """The library's file, compiled unless the cache has it."""
    version = _run((compiler, "--version"))
    facts = *(source.read_text() for source in SOURCES), *FLAGS, *options, version, _processor()
    name = f"native-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.so"
    folder = cache_folder()
    if (path := folder / name).is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            _compile(compiler, options, Path(work))
            # a name that is there is whole: processes that compile at once rename the same bytes
            os.replace(Path(work, "native.so"), path)
    except OSError as error:
        raise Unavailable(f"{folder} cannot be written to ({error.strerror})") from None
    return path


def _compile(compiler: str, options: tuple[str, ...], work: Path) -> None:
    library = str(work / "native.so")
    made = [str(work / f"{source.stem}.o") for source in SOURCES]
    for source, target in zip(SOURCES, made, strict=True):
        _run((compiler, *FLAGS, *options, "-c", str(source), "-o", target))
    # linked without OpenMP's runtime: torch has loaded one, and two would fight for the cores
    undefined = ("-undefined", "dynamic_lookup") if platform.system() == "Darwin" else ()
    _run((compiler, "-shared", *undefined, *made, "-o", library, "-lm"))


def _run(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=COMPILE_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        told = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise Unavailable(f"{command[0]} failed: {told[0] if told else error}") from None
    return done.stdout


def _processor() -> str:
    """What -march=native depends on."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        kept = {line for line in lines if line.startswith(("flags", "model", "Features", "CPU "))}
        return repr(sorted(line for line in kept if not line.startswith("model name")))
    return repr(platform.uname()[4:])
