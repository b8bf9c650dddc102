"""Copies of the flat masters in many places at once: one launch for a whole model.

    place[i][row, column] = factor[i] * flat[first[i] + row * columns[i] + column]

The places are blocks of the augmented buffers, A and B of every projection. A table says for each
tile of masters where it goes; the kernel reads the masters once and writes each place once, where
copying block by block would be hundreds of launches a step.

Shapes   P = masters, N = tiles.
Numerics float32 masters, rounded once to the places' dtype.
Bound    Memory: 4*P bytes read, 2*P written in bfloat16; the table 56 bytes a tile.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels.dispatch import jit, launch, tl

BLOCK = 1024


class Place(NamedTuple):
    """Where a copy of some masters goes."""

    first: int
    """Place of the first master in the flat buffer."""
    block: Tensor
    """(rows, columns); rows may be strided."""
    factor: float
    """What the copy is multiplied by."""


@jit
def _mirror(flat_ptr, table_ptr, factors_ptr, some_ptr, BLOCK: tl.constexpr):
    tile = tl.program_id(0)
    row = table_ptr + tile * 6
    first, start, size = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    columns, stride, address = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    i = start + tl.arange(0, BLOCK)
    x = tl.load(flat_ptr + first + i, mask=i < size, other=0.0) * tl.load(factors_ptr + tile)
    narrow = some_ptr.dtype.element_ty
    place = address.to(tl.pointer_type(narrow)) + i // columns * stride + i % columns
    tl.store(place, x.to(narrow), mask=i < size)


class Mirror:
    """The table of a model's places, by their addresses: none of them may move.

    Args:
        places: on the masters' device, of one dtype.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = list(places)
        rows, factors = [], []
        for first, block, factor in self.places:
            for start in range(0, block.numel(), BLOCK):
                shape = block.numel(), block.shape[1], block.stride(0), block.data_ptr()
                rows.append((first, start, *shape))
                factors.append(factor)
        device = self.places[0].block.device if places else None
        self.table = torch.tensor(rows, dtype=torch.int64, device=device)
        self.factors = torch.tensor(factors, dtype=torch.float32, device=device)

    def refresh(self, flat_P: Tensor) -> None:
        """Write every copy anew."""
        if not self.places:
            return
        some = self.places[0].block
        launch(
            _mirror, (len(self.table),), flat_P, self.table, self.factors, some, BLOCK=BLOCK,
            num_warps=4,
        )  # fmt: skip
