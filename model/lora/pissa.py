"""PiSSA: adapters that start as the principal part of the weights they adapt.

Of a weight's singular value decomposition the r largest triplets go into A and B, and the rest
stays behind as the frozen weight (Meng, Wang, Zhang 2024, arXiv 2404.02948):

    W = U diag(S) V^T      B0 = U_r diag(S_r / scale)^1/2      A0 = diag(S_r / scale)^1/2 V_r^T
    W_res = W - scale * B0 A0

so that training begins with the model itself, and with the directions in which it does most. W_res
is rounded to the weight's dtype: in float32 that is lost in the noise, in bfloat16 it moves a
weight by at most 2^-9 of its residual, about 0.2 % of the weights' norm at the start.

A file in PEFT's format belongs to the original W. What it has to add is scale * (B A - B0 A0), of
rank 2r. Written as the rows of A and A0 side by side it would be a small difference of two large
products; `difference` factors the small product itself, so that readers in bfloat16 lose nothing.

Shapes   K input and N output features of a projection, R rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor

PREFIX = "pissa_niter_"


class Factors(NamedTuple):
    """B A, of low rank."""

    a_RK: Tensor
    b_NR: Tensor


def principal(weight_NK: Tensor, rank: int, scale: float, init: str, seed: int) -> Factors:
    """Factors of the part of a weight that its largest singular values make.

    Args:
        weight_NK: (N, K), of any float dtype.
        rank: singular triplets to take, at most min(N, K).
        scale: what the factors' product will be multiplied by.
        init: pissa, for the exact decomposition; or pissa_niter_N for one out of random products
            and N subspace iterations (Halko et al. 2011, arXiv 0909.4061), which is far faster.
        seed: of the random products.

    Returns:
        A0 (rank, K) and B0 (N, rank), in at least float32. A row's entry of the largest size is
        positive, whatever sign the library's decomposition gave it.
    """
    wide_NK = weight_NK.to(torch.promote_types(weight_NK.dtype, torch.float32))
    if init.startswith(PREFIX):
        own = [wide_NK.device] if wide_NK.is_cuda else []
        with torch.random.fork_rng(own):
            torch.manual_seed(seed)
            u_NR, s_R, v_KR = torch.svd_lowrank(wide_NK, rank, int(init.removeprefix(PREFIX)))
    else:
        u_NR, s_R, v_RK = torch.linalg.svd(wide_NK, full_matrices=False)
        u_NR, s_R, v_KR = u_NR[:, :rank], s_R[:rank], v_RK[:rank].T
    largest_R = v_KR.gather(0, v_KR.abs().argmax(0, keepdim=True))[0]
    root_R = (s_R / scale).sqrt()
    sign_R = torch.where(largest_R < 0, -1.0, 1.0).to(root_R)
    return Factors((v_KR * (root_R * sign_R)).T.contiguous(), u_NR * (root_R * sign_R))


def subtract(weight_NK: Tensor, part: Factors, scale: float) -> float:
    """Take scale * B A out of a weight, in place, rounding once.

    Returns:
        The norm of what rounding changed: of W - (W_res + scale * B A).
    """
    wide = torch.promote_types(weight_NK.dtype, torch.float32)
    exact_NK = weight_NK.to(wide, copy=True).addmm_(part.b_NR, part.a_RK, alpha=-scale)
    weight_NK.copy_(exact_NK)
    return float(exact_NK.sub_(weight_NK).norm())


def difference(now: Factors, start: Factors) -> Factors:
    """Factors of B A - B0 A0, of twice the rank and of equal size.

    The product of two thin matrices is decomposed through their QR factors, in float64.
    """
    left_Nr = torch.cat([now.b_NR, -start.b_NR], 1).double()
    right_rK = torch.cat([now.a_RK, start.a_RK]).double()
    (q_Nm, r_mr), (q_Kn, r_nr) = torch.linalg.qr(left_Nr), torch.linalg.qr(right_rK.T)
    u_mR, s_R, v_Rn = torch.linalg.svd(r_mr @ r_nr.T, full_matrices=False)
    root_R = s_R.sqrt()
    a_RK, b_NR = (root_R[:, None] * v_Rn) @ q_Kn.T, q_Nm @ (u_mR * root_R)
    # a matrix narrower than twice the rank has fewer singular values: the others are zero
    lacking = len(right_rK) - len(root_R)
    return Factors(
        torch.nn.functional.pad(a_RK, (0, 0, 0, lacking)),
        torch.nn.functional.pad(b_NR, (0, lacking)),
    )
