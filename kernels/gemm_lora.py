"""A matrix product with the low-rank update in its accumulator, all in one Triton kernel.

    y = x W^T + t B^T                    forward,  t = s (m*x) A^T comes from skinny.shrink
    y = x W^T + m * (t B^T)              with a mask m of y's columns: the gradient of the input,
                                         where x is dy, W^T is W, t is ds and B^T is A

The readable reference of "LoRA inside the GEMM": a tile of t B^T starts the accumulator, then the
tiles of x W^T are added, and y is rounded and written once. Training uses the library's product
over an augmented buffer instead (augmented.py), unless a measured table says otherwise for a GPU
and a shape (gemm_choices.py); the benches take it as the formula of graph-split rivals.

Shapes   M rows, N columns of y, K and R the two inner dimensions.
Numerics One float32 accumulator for both products, one rounding of y.
Bound    FLOPs: 2 M N (K + R). Each input tile is read once for every tile of y beside it, from L2
         mostly: programs walk y in groups of GROUP row tiles, so that neighbours share tiles of W.
"""

import torch
from torch import Tensor

from bioinstruct.kernels.dispatch import (
    INTERPRETED,
    cdiv,
    dot,
    jit,
    launch,
    next_power_of_2,
    tl,
    uses_triton,
)
from bioinstruct.kernels.dropout import Dropout, keep_lanes
from bioinstruct.kernels.gemm_choices import GemmConfig, config_for, takes

MAX_RANK = 64

# ---- reference ---------------------------------------------------------------------------------


def gemm_lora_reference(
    x_MK: Tensor,
    w_NK: Tensor,
    t_MR: Tensor,
    b_NR: Tensor,
    dropout: Dropout | None = None,
    site: int = 0,
) -> Tensor:
    """Compute what gemm_lora must compute."""
    update_MN = t_MR @ b_NR.to(t_MR.dtype).T
    if dropout is not None:
        update_MN = update_MN * dropout.mask(site, len(w_NK), t_MR.dtype)
    return x_MK @ w_NK.to(x_MK.dtype).T + update_MN


# ---- kernel ------------------------------------------------------------------------------------


@jit(do_not_specialize=["seed", "site", "q"])
def _gemm_lora(
    x_ptr, w_ptr, t_ptr, b_ptr, y_ptr, positions_ptr, draws_ptr, M, N, K, R,
    x_stride, w_n, w_k, t_stride, b_n, b_r, y_stride, scale, seed, site, q,
    DROP: tl.constexpr, UP: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # tiles in groups of GROUP rows of tiles, column by column within a group
    columns = tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * columns)
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP, GROUP)
    place = tl.program_id(0) % (GROUP * columns)
    first_m = (group * GROUP + place % height) * BLOCK_M
    first_n = place // height * BLOCK_N
    m = (first_m + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    n = (first_n + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
    r = tl.arange(0, BLOCK_R)
    narrow = y_ptr.dtype.element_ty
    t = tl.load(t_ptr + m * t_stride + r[None, :], mask=(m < M) & (r[None, :] < R), other=0.0)
    b = tl.load(b_ptr + n * b_n + r[:, None] * b_r, mask=(n < N) & (r[:, None] < R), other=0.0)
    acc = dot(t, b.to(narrow), tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), UP)
    if DROP:
        positions = tl.load(positions_ptr + m, mask=m < M, other=0)
        draws = tl.load(draws_ptr + m, mask=m < M, other=0)
        keep = keep_lanes(seed, site, positions, draws, first_n // 8, q, BLOCK_N // 8)
        acc = tl.where(keep, acc * scale, 0.0)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + m * x_stride + k[None, :], mask=(m < M) & (k[None, :] < K), other=0.0)
        w = tl.load(w_ptr + n * w_n + k[:, None] * w_k, mask=(n < N) & (k[:, None] < K), other=0.0)
        acc = dot(x, w, acc, UP)
    tl.store(y_ptr + m * y_stride + n, acc.to(narrow), mask=(m < M) & (n < N))


# ---- public ------------------------------------------------------------------------------------


def takes_product(x_MK: Tensor, w_NK: Tensor, R: int) -> bool:
    """Whether a measured table prefers gemm_lora for this product and its update of rank R."""
    return 0 < R <= MAX_RANK and takes(x_MK.device, len(x_MK), *w_NK.shape)


def gemm_lora(
    x_MK: Tensor,
    w_NK: Tensor,
    t_MR: Tensor,
    b_NR: Tensor,
    dropout: Dropout | None = None,
    site: int = 0,
    config: GemmConfig | None = None,
) -> Tensor:
    """Return x W^T + t B^T, the second product masked where a dropout is given; no gradients.

    Args:
        x_MK: (M, K) with dense rows, which may be strided.
        w_NK: (N, K), any strides: a transposed view is the product of the backward pass.
        t_MR: (M, R) in x's dtype with dense rows, R at most MAX_RANK.
        b_NR: (N, R), any strides and float dtype; rounded to x's.
        dropout: masks of y's columns for the second product, or None.
        site: of the mask.
        config: tiles; by default what the table holds for this GPU and shape.

    Returns:
        (M, N), in x's dtype.

    Raises:
        ValueError: shapes that do not match, or a rank beyond MAX_RANK.
    """
    (M, K), N, R = x_MK.shape, len(w_NK), t_MR.shape[1]
    if w_NK.shape != (N, K) or t_MR.shape != (M, R) or b_NR.shape != (N, R) or R > MAX_RANK:
        raise ValueError(
            f"gemm_lora needs x (M, K), w (N, K), t (M, R), b (N, R), R at most {MAX_RANK}; got "
            f"{tuple(x_MK.shape)}, {tuple(w_NK.shape)}, {tuple(t_MR.shape)}, {tuple(b_NR.shape)}"
        )
    if not uses_triton(x_MK, w_NK, t_MR, b_NR):
        return gemm_lora_reference(x_MK, w_NK, t_MR, b_NR, dropout, site)
    y_MN = torch.empty(M, N, dtype=x_MK.dtype, device=x_MK.device)
    tiles = config or config_for(x_MK.device, M, N, K)
    some, numbers = (x_MK, x_MK), (1.0, 0, 0, 0)
    if dropout is not None:
        some = dropout.positions_T, dropout.draws_T
        q = dropout.dropped
        numbers = 65536 / (65536 - q), dropout.seed, site, q
    grid = (cdiv(M, tiles.BLOCK_M) * cdiv(N, tiles.BLOCK_N),)
    launch(
        _gemm_lora, grid, x_MK, w_NK, t_MR, b_NR, y_MN, *some, M, N, K, R,
        x_MK.stride(0), *w_NK.stride(), t_MR.stride(0), *b_NR.stride(), y_MN.stride(0), *numbers,
        DROP=dropout is not None, UP=INTERPRETED, BLOCK_R=max(16, next_power_of_2(R)),
        **tiles._asdict(),
    )  # fmt: skip
    return y_MN
