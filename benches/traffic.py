"""What an op does to memory, pass by pass, without running it.

    passes(lambda: layer(x).backward(dy))

The op is called on the meta device with its launches recorded (kernels/dispatch.py) while torch's
own calls are watched, so the list is what the code does, not what it is meant to do. The bytes of a
kernel come from a formula of its launch: what it loads and stores, every address once, and nothing
for what it reads back of its own. A test holds the formulas to the loads and stores of Triton's
interpreter.

A library product multiplies an inner dimension rounded up to the STEP_K of a tile. Views cost
nothing, nor do buffers that nobody fills. A pass takes the longer of its arithmetic and its bytes
(kernel_bench.ASSUMED), and a launch.

Shapes   as in the kernels: T tokens, K or D or F columns, N output features, R ranks, H heads,
         C column blocks, P row splits.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bioinstruct.benches.kernel_bench import ASSUMED, Work
from bioinstruct.kernels.dispatch import Launch, cdiv, recorded

STEP_K = 64
WRITE_ONLY = "copy_", "fill_", "zero_"
"""torch's calls that do not read their first argument."""
NARROW = "_shrink", "_shrink_dy", "_gradient_of_a", "_masked_expand"
"""The rank-wide passes that stand alone (skinny.py)."""


class Pass(NamedTuple):
    """One kernel, library product or copy."""

    name: str
    moved_bytes: int
    """Read and written."""
    flops: int = 0
    """Of a product; those of a kernel hide behind its bytes."""

    @property
    def is_bound_by_arithmetic(self) -> bool:
        """Whether its arithmetic takes longer than its bytes."""
        return self.flops * ASSUMED.bytes_per_s > self.moved_bytes * ASSUMED.flops_per_s


def total(found: Iterable[Pass], floor: Iterable[Pass]) -> Work:
    """Sum passes up, and those of the frozen op."""
    work, frozen = _summed(found), _summed(floor)
    return work._replace(
        floor_flops=frozen.flops, floor_bytes=frozen.moved_bytes, floor_launches=frozen.launches
    )


def _summed(found: Iterable[Pass]) -> Work:
    found = list(found)
    by_bytes = [p for p in found if not p.is_bound_by_arithmetic]
    return Work(
        moved_bytes=sum(p.moved_bytes for p in by_bytes),
        flops=sum(p.flops for p in found if p.is_bound_by_arithmetic),
        floor_flops=0,
        launches=len(found),
        narrow_bytes=sum(p.moved_bytes for p in by_bytes if p.name in NARROW),
    )


# ---- kernels -----------------------------------------------------------------------------------


def kernel_bytes(launch: Launch) -> int:
    """What a launch loads and stores."""
    values = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.constants
    return int(FORMULAS[launch.kernel.fn.__name__](SimpleNamespace(**values)))


def _counters(v: Any) -> Any:
    """Position and draw number of every token, where there is a mask."""
    return 16 * v.T if v.DROP else 0


def _rmsnorm_fwd(v: Any) -> Any:
    T, i = len(v.r_ptr), v.y_ptr.itemsize
    return i * v.D * ((4 if v.ADD else 2) * T + 1) + 4 * T


def _rmsnorm_bwd(v: Any) -> Any:
    T, i = len(v.r_ptr), v.dx_ptr.itemsize
    return i * v.D * ((4 if v.ADD else 3) * T + 1) + 4 * T


def _norm_t(v: Any) -> Any:
    i = v.y_ptr.itemsize
    wide = (4 if v.ADD else 2) * v.T + 1 + v.R + v.L
    return i * (v.D * wide + v.T * (2 * v.R + v.L)) + 4 * v.T + _counters(v)


def _norm_sums(v: Any) -> Any:
    T, i = len(v.r_ptr), v.dy_ptr.itemsize
    return i * (v.D * (2 * T + 1) + (2 * T * v.R if v.DROP else 0)) + 8 * T


def _norm_bwd_da(v: Any) -> Any:
    i = v.dx_ptr.itemsize
    wide = (4 if v.ADD else 3) * v.T + 1 + (v.R if v.DROP else 0)
    return i * (v.D * wide + v.T * v.R) + 8 * v.T + 4 * v.da_ptr.numel() + _counters(v)


def _swiglu_fwd(v: Any) -> Any:
    return 3 * v.h_ptr.itemsize * v.h_ptr.numel()


def _swiglu_bwd(v: Any) -> Any:
    return (6 if v.AGAIN else 5) * v.dh_ptr.itemsize * v.dh_ptr.numel()


def _swiglu_t(v: Any) -> Any:
    return v.h_ptr.itemsize * (v.F * (3 * v.T + v.R) + 2 * v.T * v.R) + _counters(v)


def _swiglu_bwd_lora(v: Any) -> Any:
    i, ranks = v.dh_ptr.itemsize, v.GATE + v.UPS
    wide = 5 * v.T + ranks + (v.R if v.DROP else 0)
    parts = sum(x.numel() for x in (v.ds_parts, v.db_parts, v.da_parts, v.c_parts))
    return i * (v.F * wide + v.T * (v.R + ranks)) + 4 * (v.T + parts) + _counters(v)


def _rotate(v: Any) -> Any:
    return 4 * v.T * v.half * v.heads * v.src_ptr.itemsize + 8 * v.T * v.half


def _turn_back_lora(v: Any) -> Any:
    i, N = v.src_ptr.itemsize, v.db_parts.shape[1]
    tables = 8 * v.T * v.half if v.TURN else 0
    parts = v.ds_parts.numel() + v.db_parts.numel()
    return i * (2 * v.T * N + N * v.R + v.T * v.R) + tables + 4 * parts


def _shrink(v: Any) -> Any:
    return v.x_ptr.itemsize * (v.T * v.K + v.R * (v.K + v.T)) + _counters(v)


def _shrink_dy(v: Any) -> Any:
    parts = v.ds_ptr.numel() + v.db_ptr.numel()
    return v.dy_ptr.itemsize * v.T * (v.N + v.R) + v.b_ptr.itemsize * v.N * v.R + 4 * parts


def _gradient_of_a(v: Any) -> Any:
    normed = 4 * v.T + v.x_ptr.itemsize * v.K if v.NORM else 0
    wide = v.x_ptr.itemsize * v.T * (v.K + v.R)
    return wide + normed + 4 * v.da_ptr.numel() + _counters(v)


def _masked_expand(v: Any) -> Any:
    wide = (2 if v.ADD else 1) * v.T * v.K
    return v.g_ptr.itemsize * (wide + v.R * (v.T + v.K)) + 16 * v.T


def _sum_parts(v: Any) -> Any:
    moved = v.size * (v.parts_ptr.itemsize * v.P + (2 if v.ADD else 1) * v.out_ptr.itemsize)
    if v.TWO:
        two = v.parts2_ptr.itemsize * v.P2 + (2 if v.ADD2 else 1) * v.out2_ptr.itemsize
        moved += v.size2 * two
    return moved


FORMULAS: dict[str, Callable[[Any], Any]] = {
    function.__name__: function
    for function in (
        _rmsnorm_fwd, _rmsnorm_bwd, _norm_t, _norm_sums, _norm_bwd_da, _swiglu_fwd, _swiglu_bwd,
        _swiglu_t, _swiglu_bwd_lora, _rotate, _turn_back_lora, _shrink, _shrink_dy, _gradient_of_a,
        _masked_expand, _sum_parts,
    )
}  # fmt: skip


# ---- torch's own calls -------------------------------------------------------------------------


class _Watch(TorchDispatchMode):
    """Collects what torch itself does."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Pass] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name.split(".")[0] in ("mm", "addmm", "addmm_"):
            self.found.append(_product(name, args, out))
        elif not _is_view(func) and name != "scalar_tensor" and (moved := _moved(name, args, out)):
            self.found.append(Pass(name, moved))
        return out


def _is_view(func: Any) -> bool:
    """Whether a call gives back what it got, or memory that it does not write."""
    aliases = [r.alias_info for r in func._schema.returns]
    shares = any(a is not None and not a.is_write for a in aliases)
    return shares or func._schema.name.removeprefix("aten::").startswith(("empty", "new_empty"))


def _product(name: str, args: Sequence[Any], out: Tensor) -> Pass:
    left, right = args[-2:]
    (M, K), N = left.shape, right.shape[1]
    tensors = left, right, out, *([out] if name != "mm" else [])
    moved = sum(t.numel() * t.itemsize for t in tensors)
    return Pass(f"{name} {M} x {K} x {N}", moved, 2 * M * N * STEP_K * cdiv(K, STEP_K))


def _moved(name: str, args: Sequence[Any], out: Any) -> int:
    reads = list(_tensors(args))[name in WRITE_ONLY :]
    return sum(t.numel() * t.itemsize for t in (*reads, *_tensors(out)))


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def passes(call: Callable[[], object]) -> list[Pass]:
    """What a call on the meta device would do: kernels first, then torch's own calls."""
    watch = _Watch()
    with recorded() as launches, watch:
        call()
    found = [Pass(x.kernel.fn.__name__, kernel_bytes(x)) for x in launches]
    return found + watch.found
