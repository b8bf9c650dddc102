"""Copies of the flat masters in many places at once: one launch for a whole model.

    place[i][row, column] = factor[i] * flat[first[i] + row * columns[i] + column]

The places are blocks of the augmented buffers, A and B of every projection. A table says for each
tile of masters where it goes; the kernel reads the masters once and writes each place once, where
copying block by block would be hundreds of launches a step. An update by the kernels (adamw.py)
goes by the same table and writes the copies itself, so that nothing is left to do here; what else
changes the masters is seen by their version.

Shapes   P = masters, N = tiles.
Numerics float32 masters, rounded once to the places' dtype.
Bound    Memory: 4*P bytes read, 2*P written in bfloat16; the table 52 bytes a tile.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
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
    first, start, size = tl.load(row), tl.load(row + 1).to(tl.int32), tl.load(row + 2)
    columns, stride, address = tl.load(row + 3).to(tl.int32), tl.load(row + 4), tl.load(row + 5)
    i = start + tl.arange(0, BLOCK)
    x = tl.load(flat_ptr + first + i, mask=i < size, other=0.0) * tl.load(factors_ptr + tile)
    narrow = some_ptr.dtype.element_ty
    place = address.to(tl.pointer_type(narrow)) + i // columns * stride + i % columns
    # compared as a block: the interpreter takes no scalar condition into a mask
    tl.store(place, x.to(narrow), mask=(i < size) & (address + 0 * i != 0))


class Tiles(NamedTuple):
    """Part of a table, whose tiles cover a stretch of the masters."""

    table: Tensor
    """(N, 6) int64: first, where the tile starts after it, size, columns, stride and address."""
    factors: Tensor
    some: Tensor
    """One of the places, for their dtype."""


class Mirror:
    """The table of a model's places, by their addresses: none of them may move.

    Args:
        places: on the masters' device, of one dtype; none overlaps another in the flat buffer.
        size: P; what has no place is covered by tiles that are copied nowhere.
    """

    version = -1
    """Of the masters that the places hold."""

    def __init__(self, places: Sequence[Place], size: int) -> None:
        self.places = sorted(places, key=lambda place: place.first)
        found = list(self._tiles(size))
        device = self.places[0].block.device if places else None
        self.table = torch.tensor([row for row, _ in found], dtype=torch.int64, device=device)
        self.factors = torch.tensor([f for _, f in found], dtype=torch.float32, device=device)
        self._starts = [row[0] + row[1] for row, _ in found]

    def _tiles(self, size: int) -> Iterator[tuple[tuple[int, ...], float]]:
        """Rows of the table and their factors, in the masters' order."""
        end = 0
        for first, block, factor in self.places:
            yield from _cut(end, first - end, (1, 1, 0), 1.0)
            shape = block.shape[1], block.stride(0), block.data_ptr()
            yield from _cut(first, block.numel(), shape, factor)
            end = first + block.numel()
        yield from _cut(end, size - end, (1, 1, 0), 1.0)

    def tiles(self, start: int, end: int) -> Tiles:
        """Those of a stretch that begins and ends where places do."""
        part = slice(*(bisect_left(self._starts, i) for i in (start, end)))
        return Tiles(self.table[part], self.factors[part], self.places[0].block)

    def refresh(self, flat_P: Tensor) -> None:
        """Write every copy anew, if the masters changed since."""
        if self.places and self.version != flat_P._version:
            launch(
                _mirror, (len(self.table),), flat_P, *self.tiles(0, flat_P.numel()), BLOCK=BLOCK,
                num_warps=4,
            )  # fmt: skip
        self.version = flat_P._version


def _cut(
    first: int, size: int, shape: tuple[int, int, int], factor: float
) -> Iterator[tuple[tuple[int, ...], float]]:
    for start in range(0, size, BLOCK):
        yield (first, start, size, *shape), factor
