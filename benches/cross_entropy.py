"""The linear cross-entropy over supervised rows, against its two products and the plain formula.

python benches/cross_entropy.py --dry-run
"""

import torch

from bioinstruct.benches.budget import check, normal
from bioinstruct.benches.kernel_bench import Bench, Call, Shape, Work, main
from bioinstruct.kernels import linear_cross_entropy
from bioinstruct.kernels.cross_entropy import linear_cross_entropy_reference


def work(shape: Shape, itemsize: int) -> Work:
    """Every logit is read and its gradient written; the second read comes from cache."""
    T, D, V = shape["T"], shape["D"], shape["V"]
    flops = 4 * T * D * V
    return Work(2 * T * V * itemsize + 3 * T * D * itemsize, flops, flops)


def check_op(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """At the timed vocabulary, on a few rows of a narrow model."""
    rows = torch.arange(5, device=device)
    labels = rows * (shape["V"] // 7)
    h, w = normal((5, 24), (shape["V"], 24))
    w = w.to(device, dtype)
    return check(
        lambda h: linear_cross_entropy(h, w, rows, labels, 0.25),
        lambda h: linear_cross_entropy_reference(h, w.to(h.dtype), rows, labels, 0.25),
        [h],
        dtype,
        device,
    )


def variants(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    """Both losses forward and backward, all rows supervised; and the two products alone."""
    T, D, V = shape["T"], shape["D"], shape["V"]
    h = torch.randn(T, D, device=device, dtype=dtype).requires_grad_()
    w = torch.randn(V, D, device=device, dtype=dtype) * D**-0.5
    rows = torch.arange(T, device=device)
    labels = rows % V
    z, dh = h.new_empty(T, V, requires_grad=False), torch.empty_like(h, requires_grad=False)

    def frozen() -> None:
        torch.mm(h.detach(), w.T, out=z)
        torch.mm(z, w, out=dh)

    def ours() -> None:
        h.grad = None
        linear_cross_entropy(h, w, rows, labels, 1 / T).backward()

    def eager() -> None:
        h.grad = None
        linear_cross_entropy_reference(h, w, rows, labels, 1 / T).backward()

    return {"ours": ours, "frozen": frozen, "eager": eager}


BENCH = Bench(
    name="linear_cross_entropy",
    shapes=[{"T": 8192, "D": 4096, "V": V} for V in (32000, 128256)],
    tiny=[{"T": 7, "D": 24, "V": 101}],
    work=work,
    check=check_op,
    variants=variants,
)

if __name__ == "__main__":
    main(BENCH)
