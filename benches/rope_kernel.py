"""The split of a fused qkv row with its rotation, forward and backward, against the plain formula.

    python benches/rope_kernel.py --dry-run

On a GPU ours turns queries and keys in place, again and again in the same buffer: rotations keep
lengths, so the numbers stay in range.
"""

import torch
from torch import Tensor

from bioinstruct.benches.budget import check, normal
from bioinstruct.benches.kernel_bench import Bench, Call, Shape, Work, main, passes
from bioinstruct.kernels import Rotation, split_rope
from bioinstruct.kernels.rope import rope_reference


def work(shape: Shape, itemsize: int) -> Work:
    """Forward reads and writes q and k; backward all three; the tables are read three times."""
    T, H, G, E = shape["T"], shape["H"], shape["G"], shape["E"]
    heads = 2 * (H + G) + 2 * (H + 2 * G)
    return Work(heads * T * E * itemsize + 3 * 2 * 4 * T * E // 2, 0, 0)


def rotation(T: int, E: int, device: torch.device) -> Rotation:
    """Tables of one document of T tokens."""
    angles_TE = torch.arange(T)[:, None] * 1e4 ** -(torch.arange(0, E, 2).double() / E)
    return Rotation(angles_TE.cos().float().to(device), angles_TE.sin().float().to(device))


def eager(qkv_TN: Tensor, table: Rotation, H: int, G: int) -> tuple[Tensor, ...]:
    """The plain formula."""
    heads = qkv_TN.view(len(qkv_TN), H + 2 * G, -1)
    q, k, v = heads.split((H, G, G), 1)
    return rope_reference(q, table), rope_reference(k, table), v


def check_op(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """On a few rows."""
    H, G, E = shape["H"], shape["G"], shape["E"]
    table = rotation(37, E, device)
    return check(
        lambda x: torch.cat(split_rope(x, table, H), 1),
        lambda x: torch.cat(eager(x, table, H, G), 1),
        normal((37, (H + 2 * G) * E)),
        dtype,
        device,
    )


def variants(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    """Both forward and backward."""
    T, H, G, E = shape["T"], shape["H"], shape["G"], shape["E"]
    table = rotation(T, E, device)
    x = torch.randn(T, (H + 2 * G) * E, device=device, dtype=dtype).requires_grad_()
    return {
        "ours": passes(lambda x: split_rope(x, table, H), x),
        "eager": passes(lambda x: eager(x, table, H, G), x),
    }


BENCH = Bench(
    name="split_rope",
    shapes=[{"T": 8192, "H": H, "G": G, "E": 128} for H, G in ((32, 32), (32, 8))],
    tiny=[{"T": 7, "H": 6, "G": 2, "E": 16}],
    work=work,
    check=check_op,
    variants=variants,
)

if __name__ == "__main__":
    main(BENCH)
