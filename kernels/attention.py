"""Causal attention within each document of a pack.

    o_t = sum_{u <= t, same document} softmax_u(q_t . k_u / sqrt(E)) v_u

Backends, chosen by `choose_backend` once and named in the log:
    blocked  our own for CPUs: per document, in blocks of queries against the keys up to the
             block's end, with the query heads of a key head stacked into one GEMM; the backward
             pass recomputes the probabilities.
    sdpa     torch's scaled_dot_product_attention per document; the reference on any device.
    varlen   torch.nn.attention.varlen over the whole pack (CUDA, bfloat16 or float16).
None of them repeats keys and values for grouped-query heads in memory, and none sees a token of
another document, whatever stands beside it.

Shapes   T = packed tokens, L = one document, Q = one block of queries, U = the keys up to its end,
         H = query heads, G = key and value heads, J = H / G, E = head width.
Numerics GEMMs in the input dtype; softmax and its gradient compute in at least float32 and round.
Saved    q, k, v; never a (L, L) matrix.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

BACKENDS = "blocked", "sdpa", "varlen"
QUERY_BLOCK = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 64, torch.float64: 64}
"""Best of 64, 96, 128, 192 on documents of 32 to 1,024 tokens (LOG.md)."""


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


# ---- reference ---------------------------------------------------------------------------------


def attention_reference(
    q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, documents: Documents
) -> Tensor:
    """Compute what attention must compute, by its formula, through plain autograd."""
    wide = torch.promote_types(q_THE.dtype, torch.float32)
    J = q_THE.shape[1] // k_TGE.shape[1]
    outs = [q_THE[:0]]
    for a, b in documents.spans():
        q, k, v = (x[a:b].to(wide).transpose(0, 1) for x in (q_THE, k_TGE, v_TGE))
        s_HLL = q @ k.repeat_interleave(J, 0).transpose(1, 2) * q.shape[-1] ** -0.5
        future = torch.ones(b - a, b - a, dtype=torch.bool, device=q.device).triu(1)
        p_HLL = s_HLL.masked_fill(future, -torch.inf).softmax(-1)
        outs.append((p_HLL @ v.repeat_interleave(J, 0)).transpose(0, 1).to(q_THE.dtype))
    return torch.cat(outs)


# ---- blocked, for CPUs -------------------------------------------------------------------------


@cache
def _future(Q: int, J: int, dtype: torch.dtype) -> Tensor:
    """(J*Q, Q) additive mask of a diagonal block, repeated for the J stacked heads."""
    return torch.full((Q, Q), -torch.inf, dtype=dtype).triu_(1).repeat(J, 1)


def _stack(x_QHE: Tensor, G: int) -> Tensor:
    """(Q, H, E) -> (G, J*Q, E): the query heads of one key head below each other."""
    Q, H, E = x_QHE.shape
    return x_QHE.view(Q, G, H // G, E).permute(1, 2, 0, 3).reshape(G, -1, E)


def _unstack(x: Tensor, Q: int) -> Tensor:
    """(G, J*Q, E) -> (Q, H, E)."""
    G, _, E = x.shape
    return x.view(G, -1, Q, E).permute(2, 0, 1, 3).reshape(Q, -1, E)


def _bmm(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Batched product times scale, which the GEMM applies before it rounds."""
    return torch.baddbmm(a.new_zeros(()), a, b, beta=0, alpha=scale)


def _probabilities(q: Tensor, k_GUE: Tensor, Q: int, scale: float) -> Tensor:
    """(G, J*Q, U) softmax of a query block over the U keys up to its end."""
    s = _bmm(q, k_GUE.transpose(1, 2), scale)
    s[..., -Q:] += _future(Q, q.shape[1] // Q, q.dtype)
    return s.softmax(-1)


def _blocks(
    bounds: tuple[int, ...], dtype: torch.dtype
) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Each document's first and past-the-end token, and those of its query blocks."""
    size = QUERY_BLOCK[dtype]
    for a, b in zip(bounds, bounds[1:], strict=False):
        yield a, b, [(i, min(i + size, b)) for i in range(a, b, size)]


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, bounds: tuple[int, ...]
    ) -> Tensor:
        G, scale = k_TGE.shape[1], q_THE.shape[-1] ** -0.5
        o_THE = torch.empty_like(q_THE, memory_format=torch.contiguous_format)
        for a, b, blocks in _blocks(bounds, q_THE.dtype):
            k_GLE, v_GLE = (x[a:b].transpose(0, 1).contiguous() for x in (k_TGE, v_TGE))
            for i, j in blocks:
                p = _probabilities(_stack(q_THE[i:j], G), k_GLE[:, : j - a], j - i, scale)
                o_THE[i:j] = _unstack(torch.bmm(p, v_GLE[:, : j - a]), j - i)
        ctx.save_for_backward(q_THE, k_TGE, v_TGE)
        ctx.bounds = bounds
        return o_THE

    @staticmethod
    def backward(ctx: Any, do_THE: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_THE, k_TGE, v_TGE = ctx.saved_tensors
        narrow, G, scale = q_THE.dtype, k_TGE.shape[1], q_THE.shape[-1] ** -0.5
        # keys and values gather from many query blocks, so their sums are kept wide
        wide = torch.promote_types(narrow, torch.float32)
        dq_THE, dk_TGE, dv_TGE = (torch.empty(x.shape, dtype=narrow) for x in (q_THE, k_TGE, v_TGE))
        for a, b, blocks in _blocks(ctx.bounds, narrow):
            k_GLE, v_GLE = (x[a:b].transpose(0, 1).contiguous() for x in (k_TGE, v_TGE))
            dk_GLE, dv_GLE = (torch.zeros(k_GLE.shape, dtype=wide) for _ in range(2))
            for i, j in blocks:
                k, v, U = k_GLE[:, : j - a], v_GLE[:, : j - a], j - a
                q, do = _stack(q_THE[i:j], G), _stack(do_THE[i:j], G)
                p = _probabilities(q, k, j - i, scale)
                dv_GLE[:, :U] += torch.bmm(p.transpose(1, 2), do)
                dp = torch.bmm(do, v.transpose(1, 2))
                ds = torch.ops.aten._softmax_backward_data(dp, p, -1, narrow)
                dk_GLE[:, :U] += _bmm(ds.transpose(1, 2), q, scale)
                dq_THE[i:j] = _unstack(_bmm(ds, k, scale), j - i)
            dk_TGE[a:b], dv_TGE[a:b] = dk_GLE.transpose(0, 1), dv_GLE.transpose(0, 1)
        return dq_THE, dk_TGE, dv_TGE, None


# ---- torch's own -------------------------------------------------------------------------------


def _sdpa(q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, documents: Documents) -> Tensor:
    outs = [q_THE[:0]]
    for a, b in documents.spans():
        q, k, v = (x[a:b].transpose(0, 1)[None] for x in (q_THE, k_TGE, v_TGE))
        o = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        outs.append(o[0].transpose(0, 1))
    return torch.cat(outs)


def _varlen(q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, documents: Documents) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = documents.cu_seqlens, documents.max_length
    options: dict[str, Any] = {"window_size": (-1, 0)}  # all of the past, nothing of the future
    if _takes_gqa():
        options["enable_gqa"] = True
    out = varlen_attn(q_THE, k_TGE, v_TGE, cu, cu, longest, longest, **options)
    assert isinstance(out, Tensor)
    return out


@cache
def _takes_gqa() -> bool:
    """Whether this torch's varlen_attn wants grouped heads announced (2.13 does, 2.11 cannot)."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


# ---- choice ------------------------------------------------------------------------------------


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolve "auto" and check that a forced backend can run here.

    Args:
        name: auto, or one of BACKENDS.
        device: where the model lies.
        dtype: the compute dtype.

    Raises:
        ValueError: unknown name, or a backend that this device or dtype rules out.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(
            f"attention = {name!r} is unknown; allowed are auto, {', '.join(BACKENDS)}"
        )
    half = dtype in (torch.bfloat16, torch.float16)
    if name == "auto":
        return "blocked" if device.type == "cpu" else "varlen" if half else "sdpa"
    if name == "varlen" and not (device.type == "cuda" and half):
        raise ValueError("attention = 'varlen' needs a CUDA GPU and bfloat16; use auto or sdpa")
    if name == "blocked" and device.type != "cpu":
        raise ValueError("attention = 'blocked' is for CPUs; use auto, varlen or sdpa")
    return name


def self_test(backend: str, device: torch.device, dtype: torch.dtype) -> float:
    """Run a small pack forward and backward and compare with the formula.

    Returns:
        The largest error of output and gradients, relative to the largest element.

    Raises:
        ValueError: if the error is beyond what the dtype explains.
    """
    generator = torch.Generator().manual_seed(0)
    documents = Documents.of_lengths((5, 1, 130), device)
    shapes = ((136, 6, 64), (136, 2, 64), (136, 2, 64), (136, 6, 64))
    tensors = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
    results = []
    calls: tuple[Callable[[Tensor, Tensor, Tensor, Documents], Tensor], ...] = (
        attention_reference,
        partial(attention, backend=backend),
    )
    for call in calls:
        q, k, v = leaves = [t.clone().requires_grad_() for t in tensors[:3]]
        out = call(q, k, v, documents)
        out.backward(tensors[3])
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    error = max(
        float((ours - exact).abs().max() / exact.abs().max())
        for exact, ours in zip(*results, strict=True)
    )
    if not error < 8 * torch.finfo(dtype).eps:
        raise ValueError(
            f"attention backend {backend} is off by {error:.1e} on {device}; choose another with "
            "--set attention=sdpa"
        )
    return error


def attention(
    q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, documents: Documents, backend: str = "sdpa"
) -> Tensor:
    """Causal attention of packed documents, grouped-query heads included.

    Args:
        q_THE: (T, H, E) queries.
        k_TGE: (T, G, E) keys; H is a multiple of G, and query head h reads key head h // (H / G).
        v_TGE: (T, G, E) values.
        documents: bounds of the documents; they cover exactly T tokens.
        backend: one of BACKENDS, as choose_backend returned it.

    Returns:
        (T, H, E), in q's dtype.

    Raises:
        ValueError: if the shapes do not match.
    """
    T, H, E = q_THE.shape
    G = k_TGE.shape[1]
    if k_TGE.shape != (T, G, E) or v_TGE.shape != k_TGE.shape or H % G:
        raise ValueError(
            f"attention needs q (T, H, E), k and v (T, G, E), H a multiple of G; got "
            f"{tuple(q_THE.shape)}, {tuple(k_TGE.shape)}, {tuple(v_TGE.shape)}"
        )
    if documents.bounds[-1] != T:
        raise ValueError(f"the documents cover {documents.bounds[-1]} tokens, the pack has {T}")
    if backend == "blocked":
        o_THE: Tensor = _Blocked.apply(q_THE, k_TGE, v_TGE, documents.bounds)
        return o_THE
    return (_varlen if backend == "varlen" else _sdpa)(q_THE, k_TGE, v_TGE, documents)
