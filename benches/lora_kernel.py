"""The LoRA linear against the frozen product alone and against the usual formulas.

    python benches/lora_kernel.py --dry-run
    python benches/lora_kernel.py --device cpu --tiny

Variants, each forward and backward:
    ours       lora_linear with its kernels (on a CPU its torch operations)
    augmented  augmented_linear on an x and a dy with room: one product each way
    frozen     the floor: y = x W^T and dx = dy W by the library
    eager      PEFT's formula under plain autograd, adapters in the activations' dtype
    eager32    the same with float32 adapters, x cast to float32 for them: PEFT's default
    manual     one autograd function that adds the branches in place by library products
    split      the graph split at the rank-wide tensors, the update in the GEMM (graph_split.py)

A prediction knows one form more, `fused`: the passes taken into the norms, the rotation and the
gate of a layer, of which it holds what the adapters add (halves.py); gate_up and down are one part
there and have one figure. That form is timed by layer.py. What our own forms move is counted from
the launches that their code makes (traffic.py); of the other formulas every pass over memory
counts, nothing cached.
"""

from typing import Any

import torch
from torch import Tensor

from bioinstruct.benches.budget import check, normal
from bioinstruct.benches.graph_split import graph_split
from bioinstruct.benches.halves import layer_passes
from bioinstruct.benches.kernel_bench import Bench, Call, Shape, Work, main
from bioinstruct.benches.traffic import passes, total
from bioinstruct.benches.workload import SHAPES as MODELS
from bioinstruct.kernels import Branch, Dropout, dispatch, lora_linear
from bioinstruct.kernels.augmented import Augmented, augmented_linear
from bioinstruct.kernels.lora import lora_linear_reference
from bioinstruct.kernels.rows import with_room

LINEARS = {
    # name: K, rows of each projection of the group
    "llama-7b o": (4096, [4096]),
    "llama-7b gate_up": (4096, [11008, 11008]),
    "llama-7b down": (11008, [4096]),
    "llama-7b qkv": (4096, [4096, 4096, 4096]),
    "llama-3-8b qkv": (4096, [4096, 1024, 1024]),
    "llama-3-8b gate_up": (4096, [14336, 14336]),
    "llama-3-8b down": (14336, [4096]),
    "llama-13b o": (5120, [5120]),
    "llama-13b gate_up": (5120, [13824, 13824]),
    "llama-13b down": (13824, [5120]),
    "llama-13b qkv": (5120, [5120, 5120, 5120]),
}
TOKENS = 8192, 2048, 16384
TYPES = {2: torch.bfloat16, 4: torch.float32}
SCALE, SITE = 2.0, 3
TRITON_SHARE = 0.95
"""What a Triton product is predicted to reach of the library's rate; the probe measures it."""


def shapes() -> list[Shape]:
    """Ranks 16 and 64 with and without dropout; what has a target comes first."""
    return [
        {"linear": name, "T": T, "K": K, "rows": rows, "R": R, "p": p}
        for T in TOKENS
        for R, p in ((16, 0.0), (16, 0.05), (64, 0.0), (64, 0.05))
        for name, (K, rows) in LINEARS.items()
    ]


TINY: list[Shape] = [
    {"linear": "tiny", "T": 33, "K": 40, "rows": [24, 8, 8], "R": 4, "p": p} for p in (0.0, 0.1)
]


def _on_meta(shape: Shape, itemsize: int) -> "_Inputs":
    return _Inputs(shape, TYPES[itemsize], torch.device("meta"))


def floor(shape: Shape, itemsize: int) -> Work:
    """Of the frozen products."""
    found = passes(_on_meta(shape, itemsize).frozen())
    return total(found, found)


def work(shape: Shape, itemsize: int) -> Work:
    """Of lora_linear."""
    given = _on_meta(shape, itemsize)
    found = passes(lambda: given.backward(lora_linear, given.branches))
    return total(found, passes(given.frozen()))


def rival_work(shape: Shape, itemsize: int) -> dict[str, Work]:
    """Augmented and fused as their code does it; the other formulas as upper bounds."""
    given = _on_meta(shape, itemsize)
    works = {"augmented": total(passes(given.augmented()), passes(given.frozen()))}
    if itemsize == 2 and shape["linear"].split()[0] in MODELS:
        works["fused"] = fused_work(shape)
    return works | formulas(shape, itemsize)


def fused_work(shape: Shape) -> Work:
    """The frozen products of the group's part of a layer, and what adapters add to that part."""
    model, group = shape["linear"].split()
    given = MODELS[model], shape["T"], shape["R"], shape["p"]
    part = {"gate_up": "mlp", "down": "mlp"}.get(group, group)
    plain = layer_passes(*given, ())[part]
    work = total(layer_passes(*given)[part], plain)
    products = sum(x.is_bound_by_arithmetic for x in plain)
    return work._replace(
        moved_bytes=work.moved_bytes - work.floor_bytes,
        launches=work.launches - work.floor_launches + products,
        floor_bytes=0,
        floor_launches=products,
    )


def formulas(shape: Shape, itemsize: int) -> dict[str, Work]:
    """Of the rivals, pass by pass.

    eager reads x, y and their gradients once for each of its operations on them: 12*T*K + 20*T*N
    bytes in bfloat16, 10*T*K more with dropout; PEFT's float32 adapters 32*T*K more again. manual
    moves 10*T*K + 10*T*N. A projection of a group does its own passes over x. split is taken to
    reach TRITON_SHARE of the library's rate.
    """
    T, K, N, count = shape["T"], shape["K"], sum(shape["rows"]), len(shape["rows"])
    each, wide = T * K * count * itemsize // 2, T * N * itemsize // 2
    frozen, dropped = floor(shape, itemsize), 1 if shape["p"] else 0

    def moving(moved_bytes: int, launches: int) -> Work:
        launches = frozen.launches + count * launches
        return frozen._replace(moved_bytes=moved_bytes, launches=launches)

    # t, ds with dB and dA read x, dy and x; with dropout the masked x is written and read
    split = moving((4 + 4 * dropped) * each + 2 * wide, 5 + dropped)
    return {
        "eager": moving((12 + 10 * dropped) * each + 20 * wide, 10 + 2 * dropped),
        "eager32": moving(54 * each + 20 * wide, 14),
        "manual": moving(10 * each + 10 * wide, 8),
        "split": split._replace(flops=int(frozen.flops / TRITON_SHARE)),
    }


class _Inputs:
    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        T, K, rows, R = shape["T"], shape["K"], shape["rows"], shape["R"]
        generator = None
        if device.type != "meta":
            generator = torch.Generator(device).manual_seed(0)

        def random(*size: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            empty = torch.empty(size, device=device, dtype=dtype)
            return empty.normal_(0, std, generator=generator)

        self.x, self.dy = random(T, K).requires_grad_(), random(T, sum(rows))
        self.w = random(sum(rows), K, std=K**-0.5)
        self.branches, start = [], 0
        for N in rows:
            a, b = (
                random(*size, std=0.02, dtype=torch.float32).requires_grad_()
                for size in ((R, K), (N, R))
            )
            a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
            self.branches.append(Branch(a, b, start))
            start += N
        self.dropout = masks(shape, device)

    def backward(self, op: Any, branches: list[Branch]) -> None:
        """Run one formula forward and backward; the input's gradient is dropped."""
        self.x.grad = None
        op(self.x, self.w, branches, SCALE, self.dropout, SITE).backward(self.dy)

    def frozen(self) -> Call:
        """The products alone."""
        x, w, dy = self.x.detach(), self.w, self.dy
        y, dx = torch.empty_like(dy), torch.empty_like(x)

        def call() -> None:
            torch.mm(x, w.T, out=y)
            torch.mm(dy, w, out=dx)

        return call

    def augmented(self) -> Call:
        """Over a buffer, x and dy with room."""
        buffer = Augmented(self.w, self.branches)
        x = with_room(self.w, self.x.shape, buffer.room).copy_(self.x.detach())
        dy = with_room(self.w, self.dy.shape, buffer.room).copy_(self.dy)
        x.requires_grad_()

        def call() -> None:
            y = augmented_linear(x, buffer, SCALE, self.dropout, SITE)
            torch.autograd.grad(y, x, dy)

        return call


def masks(shape: Shape, device: torch.device) -> Dropout | None:
    """Masks of one document as long as the pack."""
    positions = torch.arange(shape["T"], device=device)
    return Dropout(shape["p"], 1, positions, torch.zeros_like(positions)) if shape["p"] else None


def check_linear(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """Output and gradients of the group's layout at a width that is quick in float64."""
    rows = [min(N, 96 + 32 * i) for i, N in enumerate(shape["rows"])]
    small = {**shape, "T": min(shape["T"], 100), "K": min(shape["K"], 136), "rows": rows}
    (weight,) = normal((sum(rows), small["K"]), seed=1)
    dropout = masks(small, device)

    def call(op: Any) -> Any:
        def f(x: Tensor, *masters: Tensor) -> Tensor:
            starts = [sum(rows[:i]) for i in range(len(rows))]
            pairs = zip(masters[::2], masters[1::2], starts, strict=True)
            branches = [Branch(a, b, start) for a, b, start in pairs]
            w = weight.to(x.device, dtype).to(x.dtype)
            return op(x, w, branches, SCALE, dropout, SITE)  # type: ignore[no-any-return]

        return f

    sizes = [s for N in rows for s in ((shape["R"], small["K"]), (N, shape["R"]))]
    inputs = [0.3 * x for x in normal((small["T"], small["K"]), *sizes)]
    ours, reference = call(lora_linear), call(lora_linear_reference)
    return check(ours, reference, inputs, dtype, device, roundings=2)


def variants(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    """Those of the module's docstring."""
    given = _Inputs(shape, dtype, device)
    narrow = [
        Branch(a.detach().to(dtype), b.detach().to(dtype), s) for a, b, s, *_ in given.branches
    ]
    for branch in narrow:
        branch.a_RK.requires_grad_()
        branch.b_NR.requires_grad_()

    def manual() -> None:
        with dispatch.forced("reference"):
            given.backward(lora_linear, given.branches)

    return {
        "ours": lambda: given.backward(lora_linear, given.branches),
        "augmented": given.augmented(),
        "frozen": given.frozen(),
        "eager": lambda: given.backward(lora_linear_reference, narrow),
        "eager32": lambda: given.backward(eager_in_float32, given.branches),
        "manual": manual,
        "split": lambda: given.backward(graph_split, given.branches),
    }


def eager_in_float32(
    x_TK: Tensor,
    w_NK: Tensor,
    branches: list[Branch],
    scale: float,
    dropout: Dropout | None,
    site: int,
) -> Tensor:
    """PEFT's default: adapters and dropout in float32, the sum rounded once."""
    wide = x_TK.float()
    if dropout is not None:
        wide = wide * dropout.mask(site, x_TK.shape[1], torch.float32)
    updates = [scale * ((wide @ a_RK.T) @ b_NR.T) for a_RK, b_NR, *_ in branches]
    return (torch.mm(x_TK, w_NK.T) + torch.cat(updates, 1)).to(x_TK.dtype)


BENCH = Bench(
    name="lora_linear",
    shapes=shapes(),
    tiny=TINY,
    work=work,
    check=check_linear,
    variants=variants,
    rival_work=rival_work,
)

if __name__ == "__main__":
    main(BENCH)
