"""Dropout masks by counter: Philox-4x32 with 7 rounds (Salmon et al., SC 2011), 16-bit lanes.

    key     = (seed, 0)
    counter = (column // 8, site, position in the document, draw number of the sample)
    keep where lane >= q,  q = round(65536 p);  kept values are scaled by 65536 / (65536 - q)

One call yields 4 words of 32 bits, that is 8 lanes of 16 bits, low half first: the masks of 8
neighbouring columns. A mask depends on nothing but these numbers, so packing, micro-batches and
ranks do not change it; it is computed again in the backward pass and never stored. p is rounded to
1/65536.

Shapes   T = packed tokens, K = columns.
Bound    The kernel: writing T*K factors; about 10 instructions an element for the 7 rounds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bioinstruct.kernels.dispatch import cdiv, jit, launch, tl, uses_triton
from bioinstruct.kernels.native import addresses, native, threads_for

ROUNDS = 7
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF

# ---- kernel ------------------------------------------------------------------------------------


@jit
def keep_lanes(seed, site, positions, draws, first, q, EIGHTHS: tl.constexpr):
    """(T, 8 * EIGHTHS) bool, for tokens (T, 1) and columns from 8 * first on."""
    column = first + tl.arange(0, EIGHTHS)[None, :]
    # every counter in its full shape, so that the rounds are plain elementwise operations
    zero = (positions * 0 + column * 0).to(tl.uint32)
    c0 = zero + column.to(tl.uint32)
    c1 = zero + site.to(tl.uint32)
    c2 = zero + positions.to(tl.uint32)
    c3 = zero + draws.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3, 7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    lanes = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(lanes, (positions.shape[0], EIGHTHS * 8)) >= q


@jit(do_not_specialize=["seed", "site"])
def _mask(
    positions_ptr, draws_ptr, mask_ptr, seed, site, T, K, q, scale,
    BLOCK_T: tl.constexpr, EIGHTHS: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    positions = tl.load(positions_ptr + t, mask=t < T, other=0)
    draws = tl.load(draws_ptr + t, mask=t < T, other=0)
    first = tl.program_id(1) * EIGHTHS
    keep = keep_lanes(seed, site, positions, draws, first, q, EIGHTHS)
    k = first * 8 + tl.arange(0, EIGHTHS * 8)[None, :]
    factor = tl.where(keep, scale, 0.0).to(mask_ptr.dtype.element_ty)
    tl.store(mask_ptr + t * K + k, factor, mask=(t < T) & (k < K))


# ---- public ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dropout:
    """What fixes the dropout masks of one pack, apart from the site.

    Attributes:
        p: probability of dropping, 0 <= p < 1.
        seed: 32-bit key.
        positions_T: (T,) int64, position in its document.
        draws_T: (T,) int64, draw number of the token's sample in the planner's permutation.
        per_module: a mask for each projection, as PEFT draws it, instead of one for those that
            share an input.
    """

    p: float
    seed: int
    positions_T: Tensor
    draws_T: Tensor
    per_module: bool = False

    def site_of(self, group: int, number: int) -> int:
        """Site of the mask of one projection of a group; the group's, unless drawn per module."""
        return group + ((1 + number) << 24) if self.per_module else group

    @property
    def dropped(self) -> int:
        """q: how many of the 65,536 values of a lane are dropped."""
        return round(65536 * self.p)

    def mask(self, site: int, K: int, dtype: torch.dtype) -> Tensor:
        """Return the (T, K) factors, 0 or the inverse keep rate, of one site (layer x group)."""
        q = self.dropped
        scale = 65536 / (65536 - q)
        if dtype != torch.float64 and uses_triton(self.positions_T, self.draws_T):
            T = len(self.positions_T)
            mask_TK = torch.empty(T, K, dtype=dtype, device=self.positions_T.device)
            tensors = self.positions_T, self.draws_T, mask_TK
            constants = {"BLOCK_T": 8, "EIGHTHS": 32, "num_warps": 4}
            grid = cdiv(T, 8), cdiv(K, 256)
            launch(_mask, grid, *tensors, self.seed, site, T, K, q, scale, **constants)
            return mask_TK
        library = native(self.positions_T, dtype)
        if library is not None:
            T = len(self.positions_T)
            mask_TK = torch.empty(T, K, dtype=dtype)
            counters = self.positions_T.contiguous(), self.draws_T.contiguous()
            places = addresses(mask_TK, *counters)
            library.dropout_mask(*places, T, K, self.seed, site, q, scale, threads_for(T * K))
            return mask_TK
        columns = torch.arange((K + 7) // 8, device=self.positions_T.device)
        words = philox(
            (
                columns[None, :],
                torch.tensor(site, device=columns.device),
                self.positions_T[:, None],
                self.draws_T[:, None],
            ),
            (self.seed, 0),
        )
        lanes = [half for word in words for half in (word & 0xFFFF, word >> 16)]
        keep_TK = torch.stack(lanes, dim=-1).flatten(1)[:, :K] >= q
        return keep_TK.to(dtype).mul_(scale)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int], rounds: int = ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32 of broadcastable int64 counters below 2^32; returns four int64 words below 2^32.

    int64 products wrap modulo 2^64, and masking after the shift gives the unsigned high word.
    """
    c0, c1, c2, c3 = (c & _LOW for c in counter)
    k0, k1 = (k & _LOW for k in key)
    for _ in range(rounds):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (product1 >> 32 & _LOW) ^ c1 ^ k0, (product0 >> 32 & _LOW) ^ c3 ^ k1
        c1, c3 = product1 & _LOW, product0 & _LOW
        k0, k1 = k0 + _WEYL[0] & _LOW, k1 + _WEYL[1] & _LOW
    return c0, c1, c2, c3
