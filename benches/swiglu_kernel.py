"""SwiGLU, forward and backward, against its plain formula.

python benches/swiglu_kernel.py --dry-run
"""

import torch

from bioinstruct.benches.budget import check, normal
from bioinstruct.benches.kernel_bench import Bench, Call, Shape, Work, main, passes
from bioinstruct.kernels import swiglu
from bioinstruct.kernels.swiglu import swiglu_reference


def work(shape: Shape, itemsize: int) -> Work:
    """Forward gate, up, h; backward dh, gate, up and their gradients."""
    return Work(8 * shape["T"] * shape["F"] * itemsize, 0, 0)


def check_op(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """At the timed width, on a few rows."""
    return check(swiglu, swiglu_reference, normal((5, 2 * shape["F"])), dtype, device)


def variants(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    """Both forward and backward."""
    x = torch.randn(shape["T"], 2 * shape["F"], device=device, dtype=dtype).requires_grad_()
    return {"ours": passes(swiglu, x), "eager": passes(swiglu_reference, x)}


BENCH = Bench(
    name="swiglu",
    shapes=[{"T": 8192, "F": F} for F in (11008, 13824, 14336)],
    tiny=[{"T": 7, "F": 100}],
    work=work,
    check=check_op,
    variants=variants,
)

if __name__ == "__main__":
    main(BENCH)
