"""Causal attention of packed documents in C: what the backend "blocked" runs if it can.

    s = q k^T / sqrt(E),   p = softmax(s),   o = p v
    dv = p^T do,   ds = p * (do v^T - rowsum(do * o)),   dq = ds k / sqrt(E),   dk likewise

After Dao 2023 (FlashAttention-2, arXiv 2307.08691), laid out for one core's vectors and caches. The
query heads that share a key head lie below each other (row = token * J + head). A block of queries
takes the keys up to its end in panels, and of the diagonal's panels each six rows compute the keys
that they see and at most 15 more. Heads are read and written where they lie, in rows of any
stride; what is packed anew is a key head's k and v, and a block's q and do.

Float32 needs AVX2, bfloat16 AVX512-BF16, and E a multiple of 16 up to 256; else the backend runs
attention_blocked.py.

Shapes   T = packed tokens, H = query heads, G = key and value heads, J = H / G, E = head width.
Numerics Products of elements with sums in float32; softmax and its gradient in float32;
         probabilities and scores' gradients are rounded to the input dtype for the next product.
         Results do not depend on the number of threads.
Saved    q, k, v and o, and for each row the largest score and the log2 of the sum: 8 T H bytes.
Bound    FLOPs: 2 T E H (T + 1) forward and 5 T E H (T + 1) backward for one document.
Threads  share key heads and blocks of queries forward, and only documents' key heads backward, as
         dk and dv of a key head are sums in one order.
"""

import ctypes
import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels.attention_blocked import Blocked
from bioinstruct.kernels.native import addresses, native

BLOCK_ROWS = {torch.bfloat16: 96, torch.float32: 48}
"""Queries times J of a block; a token's J where that is more. 24 to 96 words make no difference."""
PANEL = 64
"""Slots of a document are a multiple of it; attention.c's panels are no wider."""
WIDTHS = range(16, 257, 16)
SMALL = 1 << 15
"""Scores below which threads cost more than they bring."""


class Plan(NamedTuple):
    """How the documents of a pack are laid out and cut."""

    documents: Tensor
    """(documents, 3): first token, end, first slot."""
    blocks: Tensor
    """(blocks, 2): document, first query in it."""
    slots: int
    longest: int


@lru_cache(maxsize=64)
def _plan(bounds: tuple[int, ...], queries: int) -> Plan:
    documents: list[tuple[int, int, int]] = []
    blocks: list[tuple[int, int]] = []
    slots = longest = 0
    for a, b in zip(bounds, bounds[1:], strict=False):
        blocks += [(len(documents), i) for i in range(0, b - a, queries)]
        documents.append((a, b, slots))
        slots += -(-(b - a) // PANEL) * PANEL
        longest = max(longest, b - a)
    return Plan(_table(documents), _table(blocks), slots, longest)


def _table(rows: list[tuple[int, int, int]] | list[tuple[int, int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def empty(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    """A buffer for C to fill."""
    return like.new_empty(shape, dtype=dtype)


class InC(torch.autograd.Function):
    """(q_THE, k_TGE, v_TGE, bounds) -> o_THE."""

    @staticmethod
    def forward(
        ctx: Any, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, bounds: tuple[int, ...]
    ) -> Tensor:
        library = library_for(q_THE, k_TGE, v_TGE)
        assert library is not None
        (T, H, E), G = q_THE.shape, k_TGE.shape[1]
        q, k, v = (_side_by_side(x) for x in (q_THE, k_TGE, v_TGE))
        queries = max(1, BLOCK_ROWS[q.dtype] // (H // G))
        plan = _plan(bounds, queries)
        workers = _workers(plan, G * len(plan.blocks), H)
        o_THE = empty(q, T, H, E, dtype=q.dtype)
        sums = empty(q, 2, G, T * H // G, dtype=torch.float32)
        floats = library.attention_room(plan.slots, plan.longest, queries * H // G, E, G, workers)
        room = empty(q, floats, dtype=torch.float32)
        library.attention(
            *_placed(q, k, v), *addresses(o_THE, sums[0], sums[1], room),
            plan.documents.data_ptr(), len(plan.documents), plan.blocks.data_ptr(),
            len(plan.blocks), T, plan.slots, queries, G, H // G, E, workers,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, o_THE, sums)
        ctx.library, ctx.plan, ctx.queries = library, plan, queries
        return o_THE

    @staticmethod
    def backward(ctx: Any, do_THE: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, o_THE, sums = ctx.saved_tensors
        library, plan, queries = ctx.library, ctx.plan, ctx.queries
        (T, H, E), G = q.shape, k.shape[1]
        do_THE = _side_by_side(do_THE)
        workers = _workers(plan, G * len(plan.documents), H)
        d_THE = empty(q, T, H + 2 * G, E, dtype=q.dtype)
        dq_THE, dk_TGE, dv_TGE = d_THE.split((H, G, G), 1)
        floats = library.attention_room(0, plan.longest, queries * H // G, E, G, workers)
        room = empty(q, floats, dtype=torch.float32)
        library.attention_back(
            *_placed(q, k, v), o_THE.data_ptr(), *_placed(do_THE),
            *addresses(sums[0], sums[1], dq_THE, dk_TGE, dv_TGE), d_THE.stride(0),
            *addresses(room, plan.documents), len(plan.documents), T, plan.longest, queries,
            G, H // G, E, workers,
        )  # fmt: skip
        return dq_THE, dk_TGE, dv_TGE, None


def _side_by_side(x_THE: Tensor) -> Tensor:
    """x, or a copy of it where the heads of a token do not lie side by side."""
    plain = x_THE.stride(2) == 1 and x_THE.stride(1) == x_THE.shape[2]
    return x_THE if plain else x_THE.contiguous()


def _placed(*tensors: Tensor) -> tuple[int, ...]:
    """Where each begins and how far its rows are apart."""
    return tuple(number for x in tensors for number in (x.data_ptr(), x.stride(0)))


def _workers(plan: Plan, tasks: int, heads: int) -> int:
    small = math.prod((plan.longest, plan.slots, heads)) < SMALL
    return 1 if small else max(1, min(tasks, torch.get_num_threads()))


def library_for(q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor) -> ctypes.CDLL | None:
    """The library, where it has attention for these heads on this processor."""
    kinds = {(x.device, x.dtype) for x in (q_THE, k_TGE, v_TGE)}
    fits = len(kinds) == 1 and q_THE.shape[2] in WIDTHS
    library = native(q_THE) if fits else None
    return library if hasattr(library, "attention") else None


def blocked(q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """The backend "blocked": in C, or by library products."""
    heads = q_THE, k_TGE, v_TGE
    function = Blocked if library_for(*heads) is None else InC
    o_THE: Tensor = function.apply(*heads, bounds)
    return o_THE
