"""Causal attention of packed documents by library products, for CPUs: the backend "blocked".

    s = q k^T / sqrt(E),   p = softmax(s),   o = p v
    dv = p^T do,   ds = p * (do v^T - rowsum(p * do v^T)),   dq = ds k / sqrt(E),   dk likewise

A document is taken in blocks of queries against the keys up to the block's end, so that of the
upper triangle only the blocks on the diagonal are computed. The query heads that share a key head
lie below each other (row = token * J + head), so that a key head is one product with J times the
rows, and k and v are never repeated. Scores become probabilities, and their gradients the scores'
gradients, in place, in buffers that all blocks share.

Shapes   T = packed tokens, Q = one block of queries, U = the keys up to its end, H = query heads,
         G = key and value heads, J = H / G, E = head width.
Numerics Products in the input dtype; softmax and its gradient compute in at least float32 and
         round; dk and dv gather from many blocks, so they are summed in at least float32.
Saved    q, k, v, and the probabilities of documents up to SAVED_TOKENS: H * L * (L + Q) / 2
         elements of a document of L tokens. Those of longer documents are computed again.
Bound    FLOPs: 4 T E H U forward and 8 T E H U backward, and 2 T E H U more without saved p.
"""

import math
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels.native import addresses, native, threads_for

QUERY_BLOCK = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 64, torch.float64: 64}
"""Best of 64, 96, 128, 192, 256 on documents of 90 to 1,024 tokens (LOG.md)."""
SAVED_TOKENS = 512
"""A product and a softmax less in the backward pass are worth the memory up to here (LOG.md)."""


class Block(NamedTuple):
    """Queries i to j - 1 of the document that begins at token a."""

    a: int
    i: int
    j: int
    saved: bool
    """Whether its probabilities are saved."""


def blocks_of(bounds: tuple[int, ...], dtype: torch.dtype) -> list[Block]:
    """The blocks of all documents, in their order."""
    size = QUERY_BLOCK[dtype]
    return [
        Block(a, i, min(i + size, b), b - a <= SAVED_TOKENS)
        for a, b in zip(bounds, bounds[1:], strict=False)
        for i in range(a, b, size)
    ]


@cache
def _future(Q: int, J: int, dtype: torch.dtype) -> Tensor:
    """(Q * J, Q) additive mask of a diagonal block, a row for each head of a token."""
    return torch.full((Q, Q), -torch.inf, dtype=dtype).triu_(1).repeat_interleave(J, 0)


def forget_masks() -> None:
    """Drop the masks kept so far: those made on the meta device serve no other."""
    _future.cache_clear()


def _heads_first(x_THE: Tensor, G: int) -> Tensor:
    """(T, H, E) -> (G, T * J, E), contiguous."""
    T, H, E = x_THE.shape
    library = native(x_THE)
    if library is None or x_THE.stride(2) != 1 or x_THE.stride(1) != E:
        return x_THE.reshape(T, G, H // G * E).transpose(0, 1).contiguous().view(G, T * H // G, E)
    out = x_THE.new_empty(G, T * H // G, E)
    x, to = addresses(x_THE, out)
    library.heads_first(x, x_THE.stride(0), to, T, G, H // G * E, threads_for(out.numel()))
    return out


def _tokens_first(x: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """(G, T * J, E) -> (T, H, E), contiguous."""
    G, (T, H, E) = len(x), shape
    out_THE = x.new_empty(shape, dtype=dtype)
    if (library := native(out_THE)) is not None:
        call = library.tokens_first if x.dtype == dtype else library.sums_tokens_first
        call(*addresses(x, out_THE), T, G, H // G * E, threads_for(x.numel()))
        return out_THE
    out_THE.view(T, G, H // G * E).copy_(x.view(G, T, H // G * E).transpose(0, 1))
    return out_THE


class _Scratch:
    """A buffer whose first elements serve as a tensor of any of these shapes."""

    def __init__(self, like: Tensor, shapes: Iterable[tuple[int, ...]]) -> None:
        self.flat = like.new_empty(max(map(math.prod, shapes), default=0))

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        return self.flat[: math.prod(shape)].view(shape)


def _product(a: Tensor, b: Tensor, out: Tensor, scale: float = 1.0) -> Tensor:
    """out = scale * a b; the product applies the scale before it rounds."""
    return torch.baddbmm(a.new_zeros(()), a, b, beta=0, alpha=scale, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor, scale: float, scratch: _Scratch) -> None:
    """total += scale * a b, where total may be wider than the two."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b, alpha=scale)
        return
    part = _product(a, b, scratch(total.shape), scale)
    if (library := native(part)) is not None:
        G, elements = len(part), part[0].numel()
        library.add_to_sums(total.data_ptr(), total.stride(0), part.data_ptr(), G, elements)
    else:
        total += part


def _probabilities(q: Tensor, k_GUE: Tensor, queries: int, out: Tensor) -> Tensor:
    """(G, Q * J, U) softmax of a query block over the U keys up to its end."""
    _product(q, k_GUE.transpose(1, 2), out, q.shape[-1] ** -0.5)
    (G, _, U), J = out.shape, q.shape[1] // queries
    if (library := native(out)) is not None:
        library.causal_softmax(out.data_ptr(), G, queries, J, U, threads_for(out.numel()))
        return out
    out[..., -queries:] += _future(queries, J, q.dtype)
    return torch.softmax(out, -1, out=out)


def _scores_gradient(ds: Tensor, p: Tensor, queries: int) -> None:
    """Make of the gradient of p that of the scores, in place."""
    (G, rows, U), library = p.shape, native(p)
    if library is None:
        torch._softmax_backward_data(ds, p, -1, p.dtype, grad_input=ds)
        return
    tensors = addresses(ds, p)
    library.causal_softmax_back(*tensors, G, queries, rows // queries, U, threads_for(p.numel()))


class Blocked(torch.autograd.Function):
    """(q_THE, k_TGE, v_TGE, bounds) -> o_THE."""

    @staticmethod
    def forward(
        ctx: Any, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, bounds: tuple[int, ...]
    ) -> Tensor:
        G, J = k_TGE.shape[1], q_THE.shape[1] // k_TGE.shape[1]
        blocks = blocks_of(bounds, q_THE.dtype)
        shapes = [(G, (j - i) * J, j - a) for a, i, j, _ in blocks]
        q, k_GTE, v_GTE = (_heads_first(x, G) for x in (q_THE, k_TGE, v_TGE))
        o, saved = torch.empty_like(q), []
        scratch = _Scratch(q, (s for s, b in zip(shapes, blocks, strict=True) if not b.saved))
        for shape, (a, i, j, keep) in zip(shapes, blocks, strict=True):
            rows = slice(i * J, j * J)
            room = q.new_empty(shape) if keep else scratch(shape)
            p = _probabilities(q[:, rows], k_GTE[:, a:j], j - i, room)
            torch.bmm(p, v_GTE[:, a:j], out=o[:, rows])
            if keep:
                saved.append(p)
        ctx.save_for_backward(q, k_GTE, v_GTE, *saved)
        ctx.blocks, ctx.shapes, ctx.heads = blocks, shapes, (q_THE.shape, k_TGE.shape)
        return _tokens_first(o, q_THE.shape, q.dtype)

    @staticmethod
    def backward(ctx: Any, do_THE: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k_GTE, v_GTE, *saved = ctx.saved_tensors
        q_shape, k_shape = ctx.heads
        G, J, scale = k_shape[1], q_shape[1] // k_shape[1], q_shape[2] ** -0.5
        narrow, probabilities = q.dtype, iter(saved)
        do, dq = _heads_first(do_THE, G), torch.empty_like(q)
        wide = torch.promote_types(narrow, torch.float32)
        dk_GTE, dv_GTE = (torch.zeros_like(k_GTE, dtype=wide) for _ in range(2))
        blocks: list[tuple[tuple[int, ...], Block]]
        blocks = list(zip(ctx.shapes, ctx.blocks, strict=True))
        scores = _Scratch(q, ctx.shapes)
        again = _Scratch(q, (shape for shape, block in blocks if not block.saved))
        sums = _Scratch(q, ((G, U, q_shape[2]) for _, _, U in ctx.shapes))
        for shape, (a, i, j, kept) in blocks:
            rows, keys = slice(i * J, j * J), slice(a, j)
            if kept:
                p = next(probabilities)
            else:
                p = _probabilities(q[:, rows], k_GTE[:, keys], j - i, again(shape))
            _add_product(dv_GTE[:, keys], p.transpose(1, 2), do[:, rows], 1.0, sums)
            ds = torch.bmm(do[:, rows], v_GTE[:, keys].transpose(1, 2), out=scores(shape))
            _scores_gradient(ds, p, j - i)
            _add_product(dk_GTE[:, keys], ds.transpose(1, 2), q[:, rows], scale, sums)
            _product(ds, k_GTE[:, keys], dq[:, rows], scale)
        dk_TGE, dv_TGE = (_tokens_first(x, k_shape, narrow) for x in (dk_GTE, dv_GTE))
        return _tokens_first(dq, q_shape, narrow), dk_TGE, dv_TGE, None
