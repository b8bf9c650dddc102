"""The order of a head's rows, which two conventions of the rotary embedding decide.

Meta and llama.cpp turn neighbours (2i, 2i + 1) of a head, Hugging Face (i, i + E/2). The same model
therefore has the rows of its q and k matrices, and of their biases, in two orders.

Letters: N heads, E head width, K input features.
"""

from torch import Tensor


def unpermute_rows(w_NEK: Tensor, num_heads: int) -> Tensor:
    """Bring interleaved rows into Hugging Face's order.

    Args:
        w_NEK: (num_heads * E, K), row 2i of a head holding feature i, row 2i + 1 feature i + E/2.
        num_heads: heads among the rows.

    Returns:
        The same shape, each head's features in Hugging Face's order.
    """
    rows, width = w_NEK.shape
    pairs = w_NEK.reshape(num_heads, rows // num_heads // 2, 2, width)
    return pairs.transpose(1, 2).reshape(rows, width)


def permute_rows(w_NEK: Tensor, num_heads: int) -> Tensor:
    """Undo unpermute_rows: interleave the two halves of each head."""
    rows, width = w_NEK.shape
    halves = w_NEK.reshape(num_heads, 2, rows // num_heads // 2, width)
    return halves.transpose(1, 2).reshape(rows, width)
