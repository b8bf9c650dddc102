"""The residual addition with RMSNorm, forward and backward, against its plain formula.

python benches/rmsnorm_kernel.py --dry-run
"""

import torch
from torch import Tensor

from bioinstruct.benches.budget import check, normal
from bioinstruct.benches.kernel_bench import Bench, Call, Shape, Work, main, passes
from bioinstruct.kernels import add_rmsnorm
from bioinstruct.kernels.rmsnorm import rmsnorm_reference


def work(shape: Shape, itemsize: int) -> Work:
    """Forward x, delta, h, y; backward dy, h, dh, dx; the reciprocal roots and the gain."""
    T, D = shape["T"], shape["D"]
    return Work(8 * T * D * itemsize + 2 * 4 * T + 2 * D * itemsize, 0, 0)


def ours(x_TD: Tensor, delta_TD: Tensor, w_D: Tensor) -> Tensor:
    """Both outputs as one tensor, for the check."""
    h_TD, y_TD = add_rmsnorm(x_TD, delta_TD, w_D)
    return torch.cat((h_TD, y_TD))


def eager(x_TD: Tensor, delta_TD: Tensor, w_D: Tensor) -> Tensor:
    """The plain formula."""
    h_TD = x_TD + delta_TD
    return torch.cat((h_TD, rmsnorm_reference(h_TD, w_D)))


def check_op(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """At the timed width, on a few rows."""
    D = shape["D"]
    return check(ours, eager, normal((5, D), (5, D), (D,)), dtype, device)


def variants(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    """Both forward and backward; the gain is frozen."""
    T, D = shape["T"], shape["D"]
    x, delta = (torch.randn(T, D, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    w = torch.ones(D, device=device, dtype=dtype)

    def plain(x: Tensor, delta: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return x + delta, rmsnorm_reference(x + delta, w)

    return {"ours": passes(add_rmsnorm, x, delta, w), "eager": passes(plain, x, delta, w)}


BENCH = Bench(
    name="add_rmsnorm",
    shapes=[{"T": 8192, "D": D} for D in (4096, 5120, 8192)],
    tiny=[{"T": 7, "D": 100}],
    work=work,
    check=check_op,
    variants=variants,
)

if __name__ == "__main__":
    main(BENCH)
