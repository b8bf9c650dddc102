"""Dropout masks by counter: Philox-4x32 with 7 rounds (Salmon et al., SC 2011), 16-bit lanes.

    key     = (seed, 0)
    counter = (column // 8, site, position in the document, draw number of the sample)
    keep where lane >= q,  q = round(65536 p);  kept values are scaled by 65536 / (65536 - q)

One call yields 4 words of 32 bits, that is 8 lanes of 16 bits, low half first: the masks of 8
neighbouring columns. A mask depends on nothing but these numbers, so packing, micro-batches and
ranks do not change it; it is computed again in the backward pass and never stored. p is rounded to
1/65536.

Shapes   T = packed tokens, K = columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 7
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


@dataclass(frozen=True)
class Dropout:
    """What fixes the dropout masks of one pack, apart from the site.

    Attributes:
        p: probability of dropping, 0 <= p < 1.
        seed: 32-bit key.
        positions_T: (T,) int64, position in its document.
        draws_T: (T,) int64, draw number of the token's sample in the planner's permutation.
    """

    p: float
    seed: int
    positions_T: Tensor
    draws_T: Tensor

    def mask(self, site: int, K: int, dtype: torch.dtype) -> Tensor:
        """Return the (T, K) factors, 0 or the inverse keep rate, of one site (layer x group)."""
        q = round(65536 * self.p)
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
        return keep_TK.to(dtype).mul_(65536 / (65536 - q))


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
