"""What a LLaMA checkpoint says about its own shape, as one checked, immutable value.

Two kinds of file are read: the config.json of a Hugging Face folder, and the key-value header of a
GGUF file. A setting that would change the model's function and that this model does not compute
is refused by name; one that changes nothing (use_cache, initializer_range, ...) is passed over.

Tensors carry Hugging Face's names; matrices are (out, in), as torch's linear layers store them.
Letters: D hidden_size, F intermediate_size, Q num_heads * head_dim, K num_kv_heads * head_dim.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bioinstruct.model.fields import Fields, build, require
from bioinstruct.model.rope_scaling import (
    LinearRopeScaling,
    Llama3RopeScaling,
    RopeScaling,
    rope_from_gguf,
    rope_from_hf,
    rope_to_hf,
)

__all__ = ["LinearRopeScaling", "Llama3RopeScaling", "LlamaConfig", "RopeScaling"]

# settings of other LLaMA-like models, and the one value that is this model
_HF_FIXED: Mapping[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
}


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape and constants of one LLaMA model (1, 2, 3, 3.1, 3.2 and relatives)."""

    vocab_size: int
    """Rows of the embedding."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width between the feed-forward projections."""
    num_layers: int
    """Transformer blocks."""
    num_heads: int
    """Query heads of a block."""
    num_kv_heads: int
    """Key and value heads of a block; divides num_heads."""
    head_dim: int
    """Width of one head, even; num_heads * head_dim need not equal hidden_size."""
    norm_eps: float
    """Added to the mean square inside every RMSNorm."""
    rope_base: float
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None
    """How the rotary frequencies are stretched; None leaves them."""
    max_positions: int
    """Longest document the model was made for, in tokens."""
    tied_embeddings: bool
    """True where the output projection is the embedding itself."""
    bos_id: int | None
    """Token that starts a document, where there is one."""
    eos_ids: tuple[int, ...]
    """Tokens that end an answer, the first being the usual one; may be empty."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float):
                rule = f"{field.name} is {value}; it must be above 0 and finite"
                require(0 < value < math.inf, rule)
        heads, kv_heads = self.num_heads, self.num_kv_heads
        require(heads % kv_heads == 0, f"num_kv_heads {kv_heads} does not divide num_heads {heads}")
        require(
            self.head_dim % 2 == 0,
            f"head_dim is {self.head_dim}; rotary embedding turns pairs, so it must be even",
        )
        for token in (*self.eos_ids, *(() if self.bos_id is None else (self.bos_id,))):
            require(
                0 <= token < self.vocab_size,
                f"special token {token} is outside the vocabulary of {self.vocab_size}",
            )

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any], source: str) -> "LlamaConfig":
        """Read the content of a Hugging Face config.json, absent keys as its LlamaConfig has them.

        Args:
            mapping: the parsed JSON object.
            source: the file's name, for messages.

        Raises:
            ValueError: a key is missing or of the wrong type, or the model is no plain LLaMA.
        """
        fields = Fields(mapping, source)
        _refuse_other_models(fields)
        heads = fields.integer("num_attention_heads")
        rope_base, rope_scaling = rope_from_hf(fields)
        return build(
            cls,
            source,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=fields.integer("num_key_value_heads", heads),
            head_dim=_head_dim(fields, "head_dim", "hidden_size", "num_attention_heads"),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_base=rope_base,
            rope_scaling=rope_scaling,
            max_positions=fields.integer("max_position_embeddings", 2048),
            tied_embeddings=fields.boolean("tie_word_embeddings", False),
            bos_id=_one_id(fields, "bos_token_id", 1),
            eos_ids=fields.ids("eos_token_id", 2),
        )

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        source: str,
        *,
        tied_embeddings: bool,
        rope_divisors: Sequence[float] | None = None,
    ) -> "LlamaConfig":
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
        _refuse_other_gguf(fields)
        heads = fields.integer("llama.attention.head_count")
        head_dim = _head_dim(
            fields,
            "llama.attention.key_length",
            "llama.embedding_length",
            "llama.attention.head_count",
        )
        for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
            if fields.integer(key, head_dim) != head_dim:
                fields.refuse(key, f"it must be the width of a head, {head_dim}")
        rope_base = _shortest(fields.number("llama.rope.freq_base", 10000.0))
        return build(
            cls,
            source,
            vocab_size=_gguf_vocab_size(fields),
            hidden_size=fields.integer("llama.embedding_length"),
            intermediate_size=fields.integer("llama.feed_forward_length"),
            num_layers=fields.integer("llama.block_count"),
            num_heads=heads,
            num_kv_heads=fields.integer("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            norm_eps=_shortest(fields.number("llama.attention.layer_norm_rms_epsilon")),
            rope_base=rope_base,
            rope_scaling=rope_from_gguf(fields, head_dim, rope_base, rope_divisors),
            max_positions=fields.integer("llama.context_length"),
            tied_embeddings=tied_embeddings,
            bos_id=_one_id(fields, "tokenizer.ggml.bos_token_id", None),
            eos_ids=_gguf_eos_ids(fields),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the content of a config.json that transformers 4 and 5 read alike."""
        scaling = rope_to_hf(self.rope_scaling)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "max_position_embeddings": self.max_positions,
            # the first two are what version 4 reads, the third is version 5's
            "rope_theta": self.rope_base,
            "rope_scaling": scaling,
            "rope_parameters": {
                "rope_theta": self.rope_base,
                **(scaling or {"rope_type": "default"}),
            },
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": self.tied_embeddings,
            "bos_token_id": self.bos_id,
            "eos_token_id": _one_or_list(self.eos_ids),
        }

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every weight's Hugging Face name and shape, in the order of the forward pass."""
        D, F = self.hidden_size, self.intermediate_size
        Q, K = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        block: dict[str, tuple[int, ...]] = {
            "input_layernorm": (D,),
            "self_attn.q_proj": (Q, D),
            "self_attn.k_proj": (K, D),
            "self_attn.v_proj": (K, D),
            "self_attn.o_proj": (D, Q),
            "post_attention_layernorm": (D,),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, D)}
        for layer in range(self.num_layers):
            shapes |= {f"model.layers.{layer}.{n}.weight": shape for n, shape in block.items()}
        shapes["model.norm.weight"] = (D,)
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, D)
        return shapes

    def parameter_count(self) -> int:
        """Return the number of weights; tied embeddings count once."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())


def _refuse_other_models(fields: Fields) -> None:
    if not (fields.has("model_type") or fields.has("architectures")):
        raise ValueError(
            f"{fields.source}: names neither model_type nor architectures; it is no config.json of "
            "a Hugging Face model"
        )
    if fields.text("model_type", "llama") != "llama":
        fields.refuse("model_type", "only llama is computed here")
    if fields.has("architectures") and fields.mapping["architectures"] != ["LlamaForCausalLM"]:
        fields.refuse("architectures", "only ['LlamaForCausalLM'] is computed here")
    for key, value in _HF_FIXED.items():
        if fields.has(key) and fields.mapping[key] != value:
            fields.refuse(key, f"only {value!r} is computed here")
    if fields.has("quantization_config"):
        fields.refuse("quantization_config", "take the model's unquantized weights")


def _refuse_other_gguf(fields: Fields) -> None:
    if fields.text("general.architecture") != "llama":
        fields.refuse("general.architecture", "only llama is computed here")
    if fields.integer("llama.expert_count", 0) > 0:
        fields.refuse("llama.expert_count", "a mixture of experts is not computed here")
    if fields.integer("split.count", 1) > 1:
        fields.refuse("split.count", "merge the parts first (llama-gguf-split --merge)")


def _head_dim(fields: Fields, key: str, hidden_key: str, heads_key: str) -> int:
    if fields.has(key):
        return fields.integer(key)
    hidden, heads = fields.integer(hidden_key), fields.integer(heads_key)
    if heads <= 0 or hidden % heads:
        fields.refuse(hidden_key, f"without {key} it must be a multiple of {heads_key}, {heads}")
    return hidden // heads


def _one_id(fields: Fields, key: str, default: int | None) -> int | None:
    ids = fields.ids(key, default)
    if len(ids) > 1:
        fields.refuse(key, "it must be one token id or null")
    return ids[0] if ids else None


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    if not ids:
        return None
    return ids[0] if len(ids) == 1 else list(ids)


def _gguf_vocab_size(fields: Fields) -> int:
    tokens = fields.mapping.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return fields.integer("llama.vocab_size")
    return fields.integer("llama.vocab_size", len(tokens))


def _gguf_eos_ids(fields: Fields) -> tuple[int, ...]:
    # a chat model's turns may end by another token than its documents
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return tuple(dict.fromkeys(token for key in keys for token in fields.ids(key, None)))


def _shortest(value: float) -> float:
    # the header's numbers are float32: 9.99999974e-06 there was 1e-05 before
    return float(str(np.float32(value)))
