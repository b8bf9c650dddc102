"""Rows with room: a (T, K) tensor whose rows have free columns behind them, in the same memory.

Whoever makes the input of a LoRA linear leaves room for t behind each row, and whoever makes the
gradient of its output room for ds, so that one library product can read both (augmented.py).

Shapes   T = packed tokens, K = columns.
"""

from collections.abc import Sequence

from torch import Tensor


def with_dense_rows(x: Tensor) -> Tensor:
    """Return x, copied where the elements of a row do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def with_room(like: Tensor, shape: Sequence[int], room: int) -> Tensor:
    """Return an unwritten (T, K) tensor like `like`, with room columns behind each row."""
    T, K = shape
    return like.new_empty(T, K + room)[:, :K]


def extended(x_TK: Tensor, room: int) -> Tensor | None:
    """(T, K + room): x and the room behind its rows; None unless all its storage is just these."""
    T, K = x_TK.shape
    whole = T * (K + room) * x_TK.itemsize == x_TK.untyped_storage().nbytes()
    if not room or not whole or x_TK.storage_offset() or x_TK.stride() != (K + room, 1):
        return None
    # through .data: autograd is not to see that the room, which is not x's, gets written
    return x_TK.data.as_strided((T, K + room), (K + room, 1))
