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

Ours moves, beyond the frozen products: x read for t and for dA, dy read for ds and dB, y and dx
read and written where the branch is added, the rank's own tensors and the float32 parts of split
sums; with dropout G is written, and dx is not read and written again beyond that product.
"""

from typing import Any

import torch
from torch import Tensor

from bioinstruct.benches.budget import check, normal
from bioinstruct.benches.graph_split import graph_split
from bioinstruct.benches.kernel_bench import Bench, Call, Shape, Work, main
from bioinstruct.kernels import Branch, Dropout, dispatch, lora_linear
from bioinstruct.kernels.augmented import Augmented, augmented_linear
from bioinstruct.kernels.lora import lora_linear_reference
from bioinstruct.kernels.rows import with_room
from bioinstruct.kernels.skinny import row_split

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


def kernel_bytes(shape: Shape, itemsize: int) -> int:
    """What our kernels load and store once each, forward and backward, beside library products."""
    T, K, R = int(shape["T"]), int(shape["K"]), int(shape["R"])
    rows: list[int] = shape["rows"]
    ranks = R * len(rows)
    total = itemsize * (T * K + ranks * K + T * ranks)  # shrink: x and A read, t written
    for N in rows:
        columns, (splits, _) = -(-N // 128), row_split(T, -(-N // 128), 32)
        total += itemsize * (T * N + T * R) + 4 * N * R  # shrink_dy: dy, t and B read
        total += 2 * 4 * R * (columns * T + splits * N)  # the parts written and read
        total += itemsize * T * R + 2 * 4 * N * R  # ds written, dB added to
    splits, _ = row_split(T, -(-K // 128), 32)
    total += itemsize * (T * K + T * ranks)  # gradient_of_a: x and ds read
    total += 2 * 4 * splits * ranks * K + 2 * 4 * ranks * K  # parts, then dA added to
    if shape["p"]:
        # masked_expand: ds and A read, G written; tokens' counters, 16 bytes, three times
        total += itemsize * (T * ranks + ranks * K + T * K) + 3 * 16 * T
    return total


def work(shape: Shape, itemsize: int) -> Work:
    """Kernels as above; the products add the branch to y, and to dx without dropout, in place."""
    T, K, N = shape["T"], shape["K"], sum(shape["rows"])
    # adding in place reads and writes the result once more; reading G rides in the product
    in_place = 2 * itemsize * T * N + (itemsize if shape["p"] else 2 * itemsize) * T * K
    floor = 4 * T * N * K
    return Work(kernel_bytes(shape, itemsize) + in_place, floor + _branch_flops(shape), floor)


def _branch_flops(shape: Shape) -> int:
    """t, ds, dA and dB, and the branch's share of y and dx."""
    T, K, N, R = shape["T"], shape["K"], sum(shape["rows"]), shape["R"]
    return int(6 * T * (K * R * len(shape["rows"]) + N * R))


def rival_work(shape: Shape, itemsize: int) -> dict[str, Work]:
    """Augmented as we wrote it; the eager formulas as upper bounds, pass by pass, nothing cached.

    eager reads x, y and their gradients once for each of its operations on them: 12*T*K + 20*T*N
    bytes in bfloat16, 10*T*K more with dropout; PEFT's float32 adapters 32*T*K more again. manual
    moves 10*T*K + 10*T*N. A projection of a group does its own passes over x. split is taken to
    reach TRITON_SHARE of the library's rate.
    """
    T, K, N = shape["T"], shape["K"], sum(shape["rows"])
    floor, flops = 4 * T * N * K, _branch_flops(shape)
    # B of one projection meets the ranks of all: zeros, but multiplied
    off_diagonal = 2 * T * N * shape["R"] * (len(shape["rows"]) - 1)
    added = itemsize * T * K if shape["p"] else 0
    each = T * K * len(shape["rows"]) * itemsize // 2
    wide = T * N * itemsize // 2
    moved = {
        "eager": (22 if shape["p"] else 12) * each + 20 * wide,
        "eager32": 54 * each + 20 * wide,
        "manual": 10 * each + 10 * wide,
    }
    works = {name: Work(count, floor + flops, floor) for name, count in moved.items()}
    # t, ds with dB and dA read x, dy and x; with dropout the masked x is written and read
    passes = (8 if shape["p"] else 4) * each + 2 * wide
    works["split"] = Work(passes, int((floor + flops) / TRITON_SHARE), floor)
    whole = floor + flops + off_diagonal
    return {"augmented": Work(kernel_bytes(shape, itemsize) + added, whole, floor), **works}


class _Inputs:
    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        T, K, rows, R = shape["T"], shape["K"], shape["rows"], shape["R"]
        generator = torch.Generator(device).manual_seed(0)

        def random(*size: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(size, device=device, dtype=dtype).normal_(
                0, std, generator=generator
            )

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
    buffer = Augmented(given.w, given.branches)
    x_room = with_room(given.w, given.x.shape, buffer.room).copy_(given.x.detach())
    dy_room = with_room(given.w, given.dy.shape, buffer.room).copy_(given.dy)
    x_room.requires_grad_()

    def augmented() -> None:
        x_room.grad = None
        augmented_linear(x_room, buffer, SCALE, given.dropout, SITE).backward(dy_room)

    y, dx = torch.empty_like(given.dy), torch.empty_like(given.x, requires_grad=False)

    def backward(op: Any, branches: list[Branch]) -> None:
        given.x.grad = None
        op(given.x, given.w, branches, SCALE, given.dropout, SITE).backward(given.dy)

    def frozen() -> None:
        torch.mm(given.x.detach(), given.w.T, out=y)
        torch.mm(given.dy, given.w, out=dx)

    def manual() -> None:
        with dispatch.forced("reference"):
            backward(lora_linear, given.branches)

    return {
        "ours": lambda: backward(lora_linear, given.branches),
        "augmented": augmented,
        "frozen": frozen,
        "eager": lambda: backward(lora_linear_reference, narrow),
        "eager32": lambda: backward(eager_in_float32, given.branches),
        "manual": manual,
        "split": lambda: backward(graph_split, given.branches),
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
