"""How the next token is drawn from a model's logits.

    repetition penalty   logits of tokens that are there already: divided by it where positive, else
                         multiplied                      (Keskar et al. 2019, arXiv 1909.05858)
    temperature          softmax(logits / temperature); 0 takes the likeliest token
    top-k                only the k likeliest tokens
    top-p                only the likeliest tokens that together reach p   (arXiv 1904.09751)
    min-p                only tokens of at least min_p times the largest probability  (2407.01082)

in this order; what is left is scaled to 1 again.

Shapes   B sequences, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of a draw; the defaults take the likeliest token."""

    temperature: float = 0.0
    """0 for greedy decoding."""
    top_k: int = 0
    """0 for all tokens."""
    top_p: float = 1.0
    """Above 0; 1 for all tokens."""
    min_p: float = 0.0
    """0 to 1; 0 for all tokens."""
    repetition_penalty: float = 1.0
    """Above 0; 1 for none, above 1 against repetition."""
    seed: int = 0
    """Sequence i draws from (seed, i)."""

    def __post_init__(self) -> None:
        rules = {
            "temperature": (0 <= self.temperature < math.inf, "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {rule}")


def penalised(logits_BV: Tensor, seen: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Logits after the repetition penalty.

    Args:
        logits_BV: (B, V).
        seen: the tokens that each sequence holds.
        penalty: 1 changes nothing.
    """
    if penalty == 1:
        return logits_BV
    changed_BV = logits_BV.clone()
    for row_V, tokens in zip(changed_BV, seen, strict=True):
        ids = torch.tensor(sorted(set(tokens)), device=row_V.device)
        ids = ids[ids < len(row_V)]
        own = row_V[ids]
        row_V[ids] = torch.where(own > 0, own / penalty, own * penalty)
    return changed_BV


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) probabilities that the next tokens are drawn with; temperature above 0."""
    p_BV = (logits_BV / sampling.temperature).softmax(-1)
    if not (sampling.top_k or sampling.top_p < 1 or sampling.min_p):
        return p_BV
    sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
    kept_BV = torch.ones_like(sorted_BV, dtype=torch.bool)
    if sampling.top_k:
        kept_BV[:, sampling.top_k :] = False
    sorted_BV = _scaled(sorted_BV, kept_BV)
    if sampling.top_p < 1:
        # a token stays if those before it do not reach p yet
        kept_BV &= sorted_BV.cumsum(-1) - sorted_BV < sampling.top_p
        sorted_BV = _scaled(sorted_BV, kept_BV)
    kept_BV &= sorted_BV >= sampling.min_p * sorted_BV[:, :1]
    sorted_BV = _scaled(sorted_BV, kept_BV)
    return torch.zeros_like(p_BV).scatter_(-1, order_BV, sorted_BV)


def _scaled(p_BV: Tensor, kept_BV: Tensor) -> Tensor:
    left_BV = p_BV * kept_BV
    return left_BV / left_BV.sum(-1, keepdim=True)


def choose(
    logits_BV: Tensor,
    seen: Sequence[Sequence[int]],
    sampling: Sampling,
    generators: Sequence[torch.Generator],
) -> list[int]:
    """Draw the next token of every sequence.

    Args:
        logits_BV: (B, V) float32.
        seen: the tokens that each sequence holds, prompt and answer.
        sampling: how to draw.
        generators: one a sequence, on the CPU.
    """
    logits_BV = penalised(logits_BV, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return [int(i) for i in logits_BV.argmax(-1)]
    p_BV = probabilities(logits_BV, sampling).cpu()
    return [
        int(torch.multinomial(p, 1, generator=g)) for p, g in zip(p_BV, generators, strict=True)
    ]
