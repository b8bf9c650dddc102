"""Causal attention within each document of a pack.

    o_t = sum_{u <= t, same document} softmax_u(q_t . k_u / sqrt(E)) v_u

Backends, chosen by `choose_backend` once and named in the log:
    blocked  our own for CPUs, in C (attention_in_c.py) or by library products
             (attention_blocked.py)
    sdpa     torch's scaled_dot_product_attention, document by document; runs on any device
    flash3, varlen, flash2, xformers, flex
             a whole pack in one call on a GPU (attention_packed.py), tried in this order
None of them repeats keys and values for grouped-query heads in memory, and none sees a token of
another document, whatever stands beside it. On a GPU a backend is first held against the formula;
on a CPU a short probe, in the CPU time of one thread, decides between our blocks and torch's own.

Shapes   T = packed tokens, L = one document, H = query heads, G = key and value heads, J = H / G,
         E = head width.
Numerics Products in the input dtype; softmax and its gradient compute in at least float32 and
         round.
"""

import time
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from bioinstruct.kernels import attention_packed
from bioinstruct.kernels.attention_in_c import blocked
from bioinstruct.kernels.documents import Documents

BACKENDS = "blocked", "sdpa", *attention_packed.CALLS
PROBE_TOKENS = 256
PROBE_MARGIN = 2.0
"""torch's own is taken where ours needs this many times its CPU time. Far from 1, so that a busy
machine does not tip the choice: two runs of one recipe must add the same numbers in one order."""


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


# ---- torch's own, a document at a time ----------------------------------------------------------


def _sdpa(q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, documents: Documents) -> Tensor:
    outs = [q_THE[:0]]
    for a, b in documents.spans():
        q, k, v = (x[a:b].transpose(0, 1)[None] for x in (q_THE, k_TGE, v_TGE))
        o = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        outs.append(o[0].transpose(0, 1))
    return torch.cat(outs)


# ---- choice ------------------------------------------------------------------------------------


def why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why a backend cannot run here; None where it may, which only its test can tell."""
    if backend == "sdpa":
        return None
    if backend == "blocked":
        return None if device.type == "cpu" else "it is for CPUs"
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "it needs a CUDA GPU and bfloat16"
    if backend == "flash3" and torch.cuda.get_device_capability(device)[0] != 9:
        return "it needs a Hopper GPU"
    return attention_packed.why_missing(backend)


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolve "auto" and check that a forced backend can run here.

    Args:
        name: auto, or one of BACKENDS.
        device: where the model lies.
        dtype: the compute dtype.

    Raises:
        ValueError: unknown name, or a backend that this device or dtype rules out, whose package
            is missing, or that fails its test.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(
            f"attention = {name!r} is unknown; allowed are auto, {', '.join(BACKENDS)}"
        )
    if name == "auto":
        return _probed(dtype) if device.type == "cpu" else _first_right(device, dtype)
    reason = why_not(name, device, dtype)
    if reason is not None:
        raise ValueError(f"attention = {name!r} cannot run here: {reason}; use auto or sdpa")
    if device.type == "cuda":
        self_test(name, device, dtype)
    return name


def _first_right(device: torch.device, dtype: torch.dtype) -> str:
    """The first backend for GPUs that is there and right."""
    for backend in attention_packed.CALLS:
        if why_not(backend, device, dtype) is None:
            try:
                self_test(backend, device, dtype)
            except ValueError:
                continue
            return backend
    return "sdpa"


@cache
def _probed(dtype: torch.dtype) -> str:
    """The faster one on this CPU, forward and backward, on a document of PROBE_TOKENS."""
    documents = Documents.of_lengths((PROBE_TOKENS,))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(PROBE_TOKENS, heads, 64, generator=generator).to(dtype).requires_grad_()
        for heads in (6, 2, 2)
    )

    def cpu_s(backend: str) -> float:
        start_s = time.thread_time()
        torch.autograd.grad(attention(q, k, v, documents, backend).sum(), (q, k, v))
        return time.thread_time() - start_s

    threads = torch.get_num_threads()
    # threads that wait for each other burn time that has nothing to do with the work
    torch.set_num_threads(1)
    with torch.enable_grad():
        rounds = [(cpu_s("blocked"), cpu_s("sdpa")) for _ in range(6)]
    torch.set_num_threads(threads)
    ours_s, torchs_s = (min(times) for times in zip(*rounds, strict=True))
    return "sdpa" if ours_s > PROBE_MARGIN * torchs_s else "blocked"


def self_test(backend: str, device: torch.device, dtype: torch.dtype) -> float:
    """Run a small pack forward and backward and compare with the formula.

    Returns:
        The largest error of output and gradients, relative to the largest element.

    Raises:
        ValueError: it fails, or its error is beyond what the dtype explains.
    """
    generator = torch.Generator().manual_seed(0)
    documents = Documents.of_lengths((5, 1, 130), device)
    shapes = ((136, 6, 64), (136, 2, 64), (136, 2, 64), (136, 6, 64))
    tensors = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
    exact = _passes(attention_reference, tensors, documents)
    try:
        ours = _passes(partial(attention, backend=backend), tensors, documents)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as failure:
        # a package of another version may lack a function or refuse an argument
        reason = str(failure).splitlines()[0]
        raise ValueError(
            f"attention backend {backend} fails on {device} ({reason}); choose another with --set "
            "attention=sdpa"
        ) from failure
    error = max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, exact, strict=True)
    )
    if not error < 8 * torch.finfo(dtype).eps:
        raise ValueError(
            f"attention backend {backend} is off by {error:.1e} on {device}; choose another with "
            "--set attention=sdpa"
        )
    return error


def _passes(
    call: Callable[[Tensor, Tensor, Tensor, Documents], Tensor],
    tensors: list[Tensor],
    documents: Documents,
) -> list[Tensor]:
    """Output and gradients of q, k and v."""
    leaves = [t.clone().requires_grad_() for t in tensors[:3]]
    with torch.enable_grad():
        out = call(leaves[0], leaves[1], leaves[2], documents)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


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
        return blocked(q_THE, k_TGE, v_TGE, documents.bounds)
    # an empty pack is nothing that the packages were made for
    call = _sdpa if backend == "sdpa" or not T else attention_packed.CALLS[backend]
    return call(q_THE, k_TGE, v_TGE, documents)
