"""The products of a LoRA branch: one dimension is a rank, the others are wide.

    y += s m,    s = y m,    g += scale s^T y

On processors with instructions for pairs of bfloat16 products they run in C (branches.c), where
library products would reach a third to two thirds of their rate; else as library products.

Shapes   T = packed tokens, R = ranks of a branch or of a group, N = columns of the wide matrix.
Numerics Products in the dtype of s and y, sums in float32, rounded once.
"""

import ctypes

import torch
from torch import Tensor

from bioinstruct.kernels.native import addresses, native, threads_for

LANES = 16
"""Columns of an instruction; what it reads is padded to a multiple of them."""


def add_product(y_TN: Tensor, s_TR: Tensor, m_RN: Tensor) -> None:
    """y += s m, where m may be a transposed view."""
    library, (T, R), N = _library(y_TN, s_TR, m_RN), s_TR.shape, y_TN.shape[1]
    if library is None:
        y_TN.addmm_(s_TR, m_RN)
        return
    pairs, width = _pairs(library, m_RN)
    (y, s, m), threads = addresses(y_TN, s_TR, pairs), threads_for(T * N)
    library.expand(y, y_TN.stride(0), s, s_TR.stride(0), m, width, T, R, N, threads)


def product_into(s_TR: Tensor, y_TN: Tensor, m_NR: Tensor) -> None:
    """s = y m, where s may be some columns of a tensor and m a transposed view."""
    library, (T, R), N = _library(s_TR, y_TN, m_NR), s_TR.shape, y_TN.shape[1]
    if library is None:
        torch.mm(y_TN, m_NR, out=s_TR)
        return
    pairs, width = _pairs(library, m_NR)
    (s, y, m), threads = addresses(s_TR, y_TN, pairs), threads_for(T * N)
    library.shrink(s, s_TR.stride(0), y, y_TN.stride(0), m, width, T, R, N, threads)


def add_outer(g_RN: Tensor, s_TR: Tensor, y_TN: Tensor, scale: float = 1.0) -> None:
    """g += scale s^T y, where g, in float32 at least, may be a transposed view."""
    library, (T, R), N = _library(s_TR, y_TN), s_TR.shape, y_TN.shape[1]
    if library is None or g_RN.dtype != torch.float32:
        _add_library_product(g_RN, s_TR, y_TN, scale)
        return
    pairs, width = _paired_rows(library, s_TR)
    g, s, y = addresses(g_RN, pairs, y_TN)
    threads = threads_for(T * N)
    library.add_outer(g, *g_RN.stride(), s, width, y, y_TN.stride(0), scale, T, R, N, threads)


def _add_library_product(g_RN: Tensor, s_TR: Tensor, y_TN: Tensor, scale: float) -> None:
    # the product in the layout of g
    left, right, total = (s_TR, y_TN, g_RN) if g_RN.stride(1) == 1 else (y_TN, s_TR, g_RN.T)
    if total.dtype == left.dtype:
        total.addmm_(left.T, right, alpha=scale)
    else:
        total.add_(torch.mm(left.T, right), alpha=scale)


def _library(*operands: Tensor) -> ctypes.CDLL | None:
    """The library, where it has these products and takes these operands."""
    if operands[0].dtype != torch.bfloat16:
        return None
    library = native(operands[0])
    if library is None or not hasattr(library, "expand"):
        return None
    # an inner dimension comes in pairs
    even = all(not n % 2 for x in operands for n in x.shape[-1:])
    dense = all(x.stride(-1) == 1 for x in operands[:2]) and 1 in operands[-1].stride()
    return library if even and dense else None


def _padded(n: int) -> int:
    return -(-n // LANES) * LANES


def _pairs(library: ctypes.CDLL, m: Tensor) -> tuple[Tensor, int]:
    """Neighbouring rows of m as pairs, and how many of them a row has room for."""
    if m.stride(1) == 1:
        return _paired_rows(library, m)
    rows, columns = m.shape
    width = _padded(columns)
    pairs = m.new_empty(rows * width)
    library.pair_columns(pairs.data_ptr(), width, m.data_ptr(), m.stride(1), columns, rows)
    return pairs, width


def _paired_rows(library: ctypes.CDLL, m: Tensor) -> tuple[Tensor, int]:
    rows, columns = m.shape
    width = _padded(columns)
    pairs = m.new_empty((rows + rows % 2) * width)
    library.pair_rows(pairs.data_ptr(), width, m.data_ptr(), m.stride(0), rows, columns)
    return pairs, width
