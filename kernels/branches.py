"""The products of a LoRA branch: one dimension is a rank, the others are wide.

    y += s m,    s = y m,    g += scale s^T y

On processors with instructions for pairs of bfloat16 products they run in C (branches.c), where
library products would reach two thirds of the rate (LOG.md); else as library products.

The wide matrices' elements of a row lie side by side.

Shapes   T = packed tokens, R = ranks of a branch or of a group, N = columns of the wide matrix.
Numerics Products in the dtype of s and y, sums in float32, rounded once.
"""

import ctypes

import torch
from torch import Tensor

from bioinstruct.kernels.native import native, threads_for


def branch_library(x: Tensor, *inner: int) -> ctypes.CDLL | None:
    """The library, where it has these products for tensors like x and inner dimensions.

    Those come in pairs there.
    """
    if x.dtype != torch.bfloat16 or any(n % 2 for n in inner):
        return None
    library = native(x)
    return library if library is not None and hasattr(library, "expand") else None


def add_product(library: ctypes.CDLL | None, y_TN: Tensor, s_TR: Tensor, m_RN: Tensor) -> None:
    """y += s m, where m may be a transposed view."""
    if library is None:
        y_TN.addmm_(s_TR, m_RN)
        return
    (T, R), N = s_TR.shape, y_TN.shape[1]
    y, s, m, threads = y_TN.data_ptr(), s_TR.data_ptr(), m_RN.data_ptr(), threads_for(T * N)
    strides = y_TN.stride(0), s_TR.stride(0), *m_RN.stride()
    _check(library.expand(y, strides[0], s, strides[1], m, *strides[2:], T, R, N, threads))


def product_into(library: ctypes.CDLL | None, s_TR: Tensor, y_TN: Tensor, m_NR: Tensor) -> None:
    """s = y m, where s may be some columns of a tensor and m a transposed view."""
    if library is None:
        torch.mm(y_TN, m_NR, out=s_TR)
        return
    (T, R), N = s_TR.shape, y_TN.shape[1]
    s, y, m, threads = s_TR.data_ptr(), y_TN.data_ptr(), m_NR.data_ptr(), threads_for(T * N)
    strides = s_TR.stride(0), y_TN.stride(0), *m_NR.stride()
    _check(library.shrink(s, strides[0], y, strides[1], m, *strides[2:], T, R, N, threads))


def add_outer(
    library: ctypes.CDLL | None, g_RN: Tensor, s_TR: Tensor, y_TN: Tensor, scale: float = 1.0
) -> None:
    """g += scale s^T y, where g, in float32 at least, may be a transposed view."""
    if library is None or g_RN.dtype != torch.float32:
        _add_library_product(g_RN, s_TR, y_TN, scale)
        return
    (T, R), N = s_TR.shape, y_TN.shape[1]
    g, s, y, threads = g_RN.data_ptr(), s_TR.data_ptr(), y_TN.data_ptr(), threads_for(T * N)
    left, right = (s, s_TR.stride(0)), (y, y_TN.stride(0))
    _check(library.add_outer(g, *g_RN.stride(), *left, *right, scale, T, R, N, threads))


def _check(status: int) -> None:
    if status:
        raise MemoryError("no memory for the pairs of a branch's operands")


def _add_library_product(g_RN: Tensor, s_TR: Tensor, y_TN: Tensor, scale: float) -> None:
    # the product in the layout of g
    left, right, total = (s_TR, y_TN, g_RN) if g_RN.stride(1) == 1 else (y_TN, s_TR, g_RN.T)
    if total.dtype == left.dtype:
        total.addmm_(left.T, right, alpha=scale)
    else:
        total.add_(torch.mm(left.T, right), alpha=scale)
