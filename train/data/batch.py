"""A pack of samples as the tensors that the model and the loss take.

Shapes   T packed input tokens, S supervised rows.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bioinstruct.kernels import Documents
from bioinstruct.model.llama import Pack
from bioinstruct.train.data.tokens import TokenSet


class Batch(NamedTuple):
    """One forward and backward pass."""

    pack: Pack
    rows_S: Tensor
    """(S,) int64: rows whose next token is supervised."""
    labels_S: Tensor
    """(S,) int64: that next token."""
    draws_T: Tensor
    """(T,) int64: draw number of each token's sample, for the dropout masks."""


def collate(
    tokens: TokenSet,
    samples: Sequence[int],
    draws: Mapping[int, int],
    device: torch.device | str = "cpu",
) -> Batch:
    """Lay samples one after the other.

    Args:
        tokens: all samples.
        samples: numbers of those in this pack; none gives empty_batch.
        draws: their draw numbers.
        device: where the tensors go.
    """
    if not samples:
        return empty_batch(device)
    ids, labels, rows, lengths, start = [], [], [], [], 0
    for i in samples:
        sample, prompt = tokens.sample(i)
        length = len(sample) - 1
        ids.append(sample[:-1])
        labels.append(sample[prompt:])
        rows.append(np.arange(start + prompt - 1, start + length))
        lengths.append(length)
        start += length
    positions = np.concatenate([np.arange(n) for n in lengths])
    numbers = np.repeat(np.array([draws[i] for i in samples], dtype=np.int64), lengths)

    def tensor(values: np.ndarray[tuple[int, ...], np.dtype[np.integer]]) -> Tensor:
        return _sent(torch.from_numpy(values.astype(np.int64)), device)

    laid = Documents.of_lengths(lengths)
    documents = Documents(laid.bounds, _sent(laid.cu_seqlens, device))
    return Batch(
        Pack(tensor(np.concatenate(ids)), tensor(positions), documents),
        tensor(np.concatenate(rows)),
        tensor(np.concatenate(labels)),
        tensor(numbers),
    )


def _sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on its way to a device; the host does not wait, for which memory is pinned."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def empty_batch(device: torch.device | str = "cpu") -> Batch:
    """A pack of one token of which nothing is learned: its gradient is zero everywhere.

    A rank whose packs are used up takes it where all ranks must compute side by side.
    """
    none, zero = torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(1, device=device)
    token = zero.to(torch.int64)
    return Batch(Pack(token, token, Documents.of_lengths([1], device)), none, none, token)
