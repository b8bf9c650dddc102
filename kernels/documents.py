"""Where the documents of a pack begin and end: the only truth about a pack's layout."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Where the documents of a pack begin and end.

    Attributes:
        bounds: token offsets, from 0 to T; document i is bounds[i] to bounds[i + 1].
        cu_seqlens: the same as int32 on the device.
    """

    bounds: tuple[int, ...]
    cu_seqlens: Tensor

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "Documents":
        """Lay documents of these lengths one after the other."""
        bounds = [0]
        for length in lengths:
            bounds.append(bounds[-1] + length)
        return cls(tuple(bounds), torch.tensor(bounds, dtype=torch.int32, device=device))

    @property
    def max_length(self) -> int:
        """Length of the longest document, in tokens."""
        return max((b - a for a, b in self.spans()), default=0)

    def spans(self) -> list[tuple[int, int]]:
        """First and past-the-end token of each document."""
        return list(zip(self.bounds, self.bounds[1:], strict=False))

    def part(self, first: int, end: int) -> "Documents":
        """Documents first to end - 1 as a pack of their own."""
        start = self.bounds[first]
        bounds = tuple(bound - start for bound in self.bounds[first : end + 1])
        return Documents(bounds, self.cu_seqlens[first : end + 1] - start)
