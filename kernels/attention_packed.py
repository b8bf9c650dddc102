"""Causal attention of a whole pack on a GPU: what torch and other packages offer, as backends.

    varlen    torch.nn.attention.varlen (FlashAttention 2's kernels, in torch itself)
    flash3    flash_attn_interface, FlashAttention 3's package (Hopper)
    flash2    flash_attn, FlashAttention 2's package
    xformers  xformers.ops with a block-diagonal causal mask
    flex      torch's flex_attention with a block mask of the documents, compiled by torch.compile

All take bounds as cu_seqlens or as a mask made of them; none repeats k and v for grouped heads. A
package that is missing, or does not load, is named with what to install.

FlashAttention 2 indexes a float32 buffer of (T + 128 * documents) * H * E elements (E rounded up to
32) with 32 bits in its backward pass; a pack beyond that is taken in parts, which changes no
result. With torch.use_deterministic_algorithms(True) the gradients are the same bits every time,
where a backend can do that: torch's own read that switch themselves, flash2 and flash3 are told.

Shapes   T = packed tokens, H = query heads, G = key and value heads, J = H / G, E = head width.
"""

import importlib
import inspect
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from bioinstruct.kernels.dispatch import cdiv
from bioinstruct.kernels.documents import Documents

INDEX_LIMIT = 2**31
PACKAGES = {
    # backend: module, what to install
    "varlen": ("torch.nn.attention.varlen", "torch 2.11 or newer"),
    "flash3": ("flash_attn_interface", "FlashAttention 3 (the hopper folder of flash-attention)"),
    "flash2": ("flash_attn", "flash-attn (pip install 'bioinstruct[flash]')"),
    "xformers": ("xformers.ops", "xformers (pip install 'bioinstruct[xformers]')"),
    "flex": ("torch.nn.attention.flex_attention", "torch 2.11 or newer"),
}


def why_missing(backend: str) -> str | None:
    """Say what to install for a backend whose package does not load here; None where it does."""
    module, wanted = PACKAGES[backend]
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and module.startswith(error.name):
            return f"{module} is not installed; it needs {wanted}"
        return f"{module} does not load here ({error}); it needs {wanted}"
    except Exception as error:  # a wheel built for another torch or CUDA fails in ways of its own
        return f"{module} does not load here ({error}); it needs {wanted} built for this torch"
    return None


# ---- FlashAttention ----------------------------------------------------------------------------


def index_parts(documents: Documents, num_heads: int, width: int) -> list[tuple[int, int]]:
    """First and past-the-end document of parts that 32 bits can index.

    Raises:
        ValueError: one document alone is too long.
    """
    room = INDEX_LIMIT // (num_heads * 32 * cdiv(width, 32))
    parts, first, used = [], 0, 0
    for i, (a, b) in enumerate(documents.spans()):
        tokens = b - a + 128
        if tokens >= room:
            raise ValueError(
                f"a document of {b - a} tokens is too long for FlashAttention 2 with {num_heads} "
                f"heads of width {width}, at most {room - 129}; use attention = 'flex' or 'sdpa'"
            )
        if used + tokens >= room:
            parts.append((first, i))
            first, used = i, 0
        used += tokens
    return [*parts, (first, len(documents.bounds) - 1)]


Call = Callable[[Tensor, Tensor, Tensor, Documents], Tensor]


def _in_parts(call: Call, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, of: Documents) -> Tensor:
    parts = index_parts(of, q_THE.shape[1], q_THE.shape[2])
    if len(parts) == 1:
        return call(q_THE, k_TGE, v_TGE, of)
    outs = []
    for first, end in parts:
        tokens = slice(of.bounds[first], of.bounds[end])
        outs.append(call(q_THE[tokens], k_TGE[tokens], v_TGE[tokens], of.part(first, end)))
    return torch.cat(outs)


def varlen(q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, documents: Documents) -> Tensor:
    """Torch's own."""
    attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    options: dict[str, Any] = {"window_size": (-1, 0)}  # all of the past, nothing of the future
    # 2.13 wants grouped heads announced, 2.11 cannot be told
    if "enable_gqa" in inspect.signature(attend).parameters:
        options["enable_gqa"] = q_THE.shape[1] != k_TGE.shape[1]

    def call(q: Tensor, k: Tensor, v: Tensor, part: Documents) -> Tensor:
        cu, longest = part.cu_seqlens, part.max_length
        return _tensor(attend(q, k, v, cu, cu, longest, longest, **options))

    return _in_parts(call, q_THE, k_TGE, v_TGE, documents)


def _flash(module: str, q: Tensor, k: Tensor, v: Tensor, part: Documents) -> Tensor:
    attend = importlib.import_module(module).flash_attn_varlen_func
    cu, longest = part.cu_seqlens, part.max_length
    options = {"causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
    return _tensor(attend(q, k, v, cu, cu, longest, longest, **options))


def _tensor(out: Any) -> Tensor:
    """The output alone, where a version gives the log-sum-exp as well."""
    found = out[0] if isinstance(out, tuple) else out
    assert isinstance(found, Tensor)
    return found


def flash2(q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, documents: Documents) -> Tensor:
    """The package flash-attn."""
    module = PACKAGES["flash2"][0]
    return _in_parts(lambda *x: _flash(module, *x), q_THE, k_TGE, v_TGE, documents)


def flash3(q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, documents: Documents) -> Tensor:
    """FlashAttention 3, in the same parts."""
    module = PACKAGES["flash3"][0]
    return _in_parts(lambda *x: _flash(module, *x), q_THE, k_TGE, v_TGE, documents)


# ---- masks -------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _causal_mask(bounds: tuple[int, ...]) -> Any:
    masks = importlib.import_module("xformers.ops.fmha.attn_bias")
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    return masks.BlockDiagonalCausalMask.from_seqlens(lengths)


def xformers(q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, documents: Documents) -> Tensor:
    """The package xformers; grouped heads are a fifth dimension of stride 0."""
    attend = importlib.import_module("xformers.ops").memory_efficient_attention
    (T, H, E), G = q_THE.shape, k_TGE.shape[1]
    q = q_THE.view(T, G, H // G, E)[None]
    k, v = (x[None, :, :, None].expand(1, T, G, H // G, E) for x in (k_TGE, v_TGE))
    mask = _causal_mask(documents.bounds)
    return _tensor(attend(q, k, v, attn_bias=mask)).reshape(T, H, E)


@lru_cache(maxsize=2)
def block_mask(bounds: tuple[int, ...], device: torch.device) -> Any:
    """flex_attention's mask: a token sees the past of its own document."""
    flex_attention = importlib.import_module("torch.nn.attention.flex_attention")
    tokens, ends = torch.arange(bounds[-1], device=device), torch.tensor(bounds[1:], device=device)
    document_T = torch.searchsorted(ends, tokens, right=True)

    def sees(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_T[query] == document_T[key])

    sizes = None, None, bounds[-1], bounds[-1]
    # made by a compiled program on a GPU, or (T, T) booleans would be laid out first
    compiled = device.type == "cuda"
    return flex_attention.create_block_mask(sees, *sizes, device=device, _compile=compiled)


@cache
def _flex_attention(device: str) -> Any:
    attend = importlib.import_module("torch.nn.attention.flex_attention").flex_attention
    return torch.compile(attend, dynamic=True) if device == "cuda" else attend


def flex(q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, documents: Documents) -> Tensor:
    """torch's flex_attention; on a CPU its plain formula, without gradients."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THE, k_TGE, v_TGE))
    attend = _flex_attention(q.device.type)
    mask = block_mask(documents.bounds, q.device)
    grouped = q_THE.shape[1] != k_TGE.shape[1]
    out = attend(q, k, v, block_mask=mask, enable_gqa=grouped)
    return _tensor(out)[0].transpose(0, 1)


CALLS: dict[str, Call] = {
    "flash3": flash3,
    "varlen": varlen,
    "flash2": flash2,
    "xformers": xformers,
    "flex": flex,
}
"""In the order in which they are tried."""
