"""What trains, as the optimizer sees it: masters and their gradient, in one order.

The optimizer's state is flat: one vector of gradients and two of moments, the same layout for LoRA
and for full fine-tuning, on one rank and on a shard. A Part says which stretch of them belongs to
which masters, and how these learn: at a multiple of the rate (LoRA+), with weight decay or without.

    LoraMasters    the adapters; masters and gradient are each one buffer already
    full.py        all weights of a model that each rank holds whole
    sharding.py    all weights of a model whose ranks hold a part each

Shapes   P = what this rank updates.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels.adamw import global_norm
from bioinstruct.model.adapters import Adapters
from bioinstruct.train.ranks.process import Ranks
from bioinstruct.train.resume.state import Piece, whole


class Part(NamedTuple):
    """Masters that learn alike."""

    place: slice
    """Their stretch of the gradient and of the moments."""
    master_P: Tensor
    """(P,) view of the masters themselves."""
    rate: float = 1.0
    """Multiple of the learning rate."""
    decays: bool = True


class Masters:
    """Masters that every rank holds whole.

    Args:
        grad_P: (P,) where backward passes add their gradients.
        parts: of the masters, one after the other as in grad_P.
    """

    is_sharded = False
    """Whether ranks hold a part of the model each, so that all must compute side by side."""

    def __init__(self, grad_P: Tensor, parts: Iterable[Part]) -> None:
        self.grad_P, self.parts = grad_P, list(parts)

    @property
    def adapters(self) -> Adapters | None:
        """The adapters, where it is they that train."""
        return None

    def before_pack(self, is_last: bool) -> None:
        """Called before each pack of a step."""

    def sum_gradient(self, ranks: Ranks) -> None:
        """Add the other ranks' gradients, where the backward passes have not done so."""
        ranks.sum_(self.grad_P)

    def gradient_norm(self) -> Tensor:
        """Norm of the whole summed gradient, equal on all ranks: a float64 scalar, not read."""
        return global_norm(self.grad_P)

    def changed(self) -> None:
        """Called when the masters have new values: copies that compute take them over."""

    def flat(self) -> Tensor:
        """A copy of the masters, (P,)."""
        return torch.cat([part.master_P for part in self.parts])

    def set_flat(self, flat_P: Tensor) -> None:
        """Give the masters these values."""
        for part in self.parts:
            part.master_P.copy_(flat_P[part.place])
        self.changed()

    def pieces(self, flat_P: Tensor) -> dict[str, Piece]:
        """This rank's rows of each tensor in a vector of this layout: views, by name."""
        return {name: whole(tensor) for name, tensor in self.named(flat_P)}

    @property
    def num_writers(self) -> int:
        """How many ranks hold rows that no rank before them holds: those write the states."""
        return 1

    def check_recovers(self) -> None:
        """Refuse to go on after one rank has broken off in the middle of its packs.

        Raises:
            ValueError: the other ranks wait for it in a collective and cannot be told.
        """
        if self.is_sharded:
            raise ValueError(
                "memory ran out on a rank while the others waited for its weights; set "
                "data.max_tokens_per_pack lower, train.checkpoint_layers higher, or take more GPUs"
            )

    def named(self, flat_P: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Take a vector of this layout apart: (name, whole tensor), the same on all ranks.

        It may be the masters, the gradient or a moment. Where ranks hold a part each, every one
        of them must go through all tensors, for each is put together by all.
        """
        raise AssertionError("each kind of masters has its own names")


class LoraMasters(Masters):
    """The adapters of a frozen model; with LoRA+ all B learn at a multiple of the rate of all A."""

    def __init__(self, adapters: Adapters, *, is_sharded: bool = False) -> None:
        self.is_sharded = is_sharded
        flat_P, num_a = adapters.flat_P, adapters.num_a
        ratio = adapters.settings.plus_ratio
        stretches = [(slice(None), 1.0)]
        if ratio != 1:
            stretches = [(slice(num_a), 1.0), (slice(num_a, None), ratio)]
        parts = [Part(place, flat_P[place], rate) for place, rate in stretches]
        super().__init__(adapters.grad_P, parts)
        self._adapters = adapters

    @property
    def adapters(self) -> Adapters:
        return self._adapters

    def named(self, flat_P: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield "flat", flat_P
