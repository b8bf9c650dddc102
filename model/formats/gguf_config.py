"""The shape of a model out of the key-value header of its GGUF file."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.fields import Fields, build
from bioinstruct.model.rope_scaling import rope_from_gguf

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral's files say llama


def config_from_gguf(
    metadata: Mapping[str, Any],
    source: str,
    *,
    tied_embeddings: bool,
    rope_divisors: Sequence[float] | None = None,
) -> LlamaConfig:
    """Read the key-value header of a GGUF file.

    Args:
        metadata: the header's keys and values.
        source: the file's name, for messages.
        tied_embeddings: whether the file has no output.weight of its own.
        rope_divisors: the (head_dim / 2,) numbers of its rope_freqs.weight, None without.

    Raises:
        ValueError: a key is missing or of the wrong type, or the model is no plain LLaMA.
    """
    fields = Fields(metadata, source)
    arch = _family(fields)
    heads = fields.integer(f"{arch}.attention.head_count")
    head_dim = fields.share(
        f"{arch}.attention.key_length",
        f"{arch}.embedding_length",
        f"{arch}.attention.head_count",
    )
    for key in (f"{arch}.rope.dimension_count", f"{arch}.attention.value_length"):
        if fields.integer(key, head_dim) != head_dim:
            fields.refuse(key, f"it must be the width of a head, {head_dim}")
    rope_base = _single(fields, f"{arch}.rope.freq_base", 10000.0)
    return build(
        LlamaConfig,
        source,
        vocab_size=_vocab_size(fields, arch),
        hidden_size=fields.integer(f"{arch}.embedding_length"),
        intermediate_size=fields.integer(f"{arch}.feed_forward_length"),
        num_layers=fields.integer(f"{arch}.block_count"),
        num_heads=heads,
        num_kv_heads=fields.integer(f"{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        norm_eps=_single(fields, f"{arch}.attention.layer_norm_rms_epsilon"),
        rope_base=rope_base,
        rope_scaling=rope_from_gguf(fields, head_dim, rope_base, rope_divisors, arch),
        max_positions=fields.integer(f"{arch}.context_length"),
        tied_embeddings=tied_embeddings,
        bos_id=fields.one_id("tokenizer.ggml.bos_token_id", None),
        eos_ids=_eos_ids(fields),
        family=arch,
    )


def _family(fields: Fields) -> str:
    arch = fields.text("general.architecture")
    if arch not in ARCHITECTURES:
        fields.refuse("general.architecture", f"only {', '.join(ARCHITECTURES)} are computed here")
    if fields.integer(f"{arch}.expert_count", 0) > 0:
        fields.refuse(f"{arch}.expert_count", "a mixture of experts is not computed here")
    return arch


def _vocab_size(fields: Fields, arch: str) -> int:
    tokens = fields.mapping.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return fields.integer(f"{arch}.vocab_size")
    return fields.integer(f"{arch}.vocab_size", len(tokens))


def _eos_ids(fields: Fields) -> tuple[int, ...]:
    # a chat model's turns may end by another token than its documents
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return tuple(dict.fromkeys(token for key in keys for token in fields.ids(key, None)))


def _single(fields: Fields, key: str, *default: float) -> float:
    """A positive number; the header's are float32: 9.99999974e-06 there was 1e-05 before."""
    value = fields.number(key, *default)
    if not 0 < value < 1e38:
        fields.refuse(key, "it must be above 0 and finite")
    return float(str(np.float32(value)))
