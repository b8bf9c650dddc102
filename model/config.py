"""What a checkpoint says about its own shape, as one checked, immutable value.

Two kinds of file are read: the config.json of a Hugging Face folder, and the key-value header of a
GGUF file. A setting that would change the model's function and that this model does not compute
is refused by name; one that changes nothing (use_cache, initializer_range, ...) is passed over.
The families that are computed differ from LLaMA by little:

    mistral  its attention may have a window; documents are then refused above it, where it acts
    qwen2    q, k and v have a bias
    qwen3    every head of q and k is normed before it is rotated

Tensors carry Hugging Face's names; matrices are (out, in), as torch's linear layers store them.
Letters: D hidden_size, F intermediate_size, Q num_heads * head_dim, K num_kv_heads * head_dim.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bioinstruct.model.fields import Fields, build, require, shown
from bioinstruct.model.rope_scaling import (
    LinearRopeScaling,
    Llama3RopeScaling,
    RopeScaling,
    rope_from_gguf,
    rope_from_hf,
    rope_to_hf,
)

__all__ = ["LinearRopeScaling", "Llama3RopeScaling", "LlamaConfig", "RopeScaling"]


class Family(NamedTuple):
    """How one kind of model differs from LLaMA."""

    architecture: str
    """Hugging Face's name of its class."""
    qkv_bias: bool = False
    qk_norm: bool = False
    interleaved: bool = False
    """Whether GGUF files hold the rows of q and k interleaved."""
    positions: int = 2048
    """Longest document where a config.json does not say."""
    bos_id: int | None = None
    eos_id: int | None = None


FAMILIES = {
    "llama": Family("LlamaForCausalLM", interleaved=True, bos_id=1, eos_id=2),
    "mistral": Family("MistralForCausalLM", interleaved=True, positions=131072, bos_id=1, eos_id=2),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, positions=32768),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, positions=32768),
}
GGUF_FAMILIES = ("llama", "qwen2", "qwen3")  # Mistral's files say llama

# settings of other LLaMA-like models, and the one value that is this model
_HF_FIXED: Mapping[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
}


# no model comes near; a damaged file must not ask for tables without end
MAX_SIZE = 2**31
MOST = {"num_layers": 4096, "head_dim": 65536}


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape and constants of one model: LLaMA 1, 2, 3, 3.1, 3.2, Mistral, Qwen 2 and 3."""

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
    family: str = "llama"
    """Which of FAMILIES it is."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            limit = MOST.get(field.name, MAX_SIZE)
            if field.type is int:
                rule = f"{field.name} is {shown(value)}; it must be above 0, at most {limit}"
                require(0 < value <= limit, rule)
            if field.type is float:
                rule = f"{field.name} is {shown(value)}; it must be above 0 and finite"
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

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have a bias."""
        return FAMILIES[self.family].qkv_bias

    @property
    def qk_norm(self) -> bool:
        """Whether every head of q and k is normed."""
        return FAMILIES[self.family].qk_norm

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any], source: str) -> "LlamaConfig":
        """Read the content of a Hugging Face config.json, absent keys as its own class has them.

        Args:
            mapping: the parsed JSON object.
            source: the file's name, for messages.

        Raises:
            ValueError: a key is missing or of the wrong type, or the model is no plain LLaMA.
        """
        fields = Fields(mapping, source)
        family = _hf_family(fields)
        own = FAMILIES[family]
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
            num_kv_heads=_kv_heads(fields, family, heads),
            head_dim=_hf_head_dim(fields, family),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_base=rope_base,
            rope_scaling=rope_scaling,
            max_positions=_positions(fields, family),
            tied_embeddings=fields.boolean("tie_word_embeddings", False),
            bos_id=_one_id(fields, "bos_token_id", own.bos_id),
            eos_ids=fields.ids("eos_token_id", own.eos_id),
            family=family,
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
        arch = _gguf_family(fields)
        heads = fields.integer(f"{arch}.attention.head_count")
        head_dim = _head_dim(
            fields,
            f"{arch}.attention.key_length",
            f"{arch}.embedding_length",
            f"{arch}.attention.head_count",
        )
        for key in (f"{arch}.rope.dimension_count", f"{arch}.attention.value_length"):
            if fields.integer(key, head_dim) != head_dim:
                fields.refuse(key, f"it must be the width of a head, {head_dim}")
        rope_base = _single(fields, f"{arch}.rope.freq_base", 10000.0)
        return build(
            cls,
            source,
            vocab_size=_gguf_vocab_size(fields, arch),
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
            bos_id=_one_id(fields, "tokenizer.ggml.bos_token_id", None),
            eos_ids=_gguf_eos_ids(fields),
            family=arch,
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the content of a config.json that transformers 4 and 5 read alike."""
        scaling = rope_to_hf(self.rope_scaling)
        return {
            "architectures": [FAMILIES[self.family].architecture],
            "model_type": self.family,
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
            # a window that the checkpoint had is the end of max_position_embeddings
            **_WITHOUT[self.family],
            "tie_word_embeddings": self.tied_embeddings,
            "bos_token_id": self.bos_id,
            "eos_token_id": _one_or_list(self.eos_ids),
        }

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every weight's Hugging Face name and shape, in the order of the forward pass."""
        D, F = self.hidden_size, self.intermediate_size
        Q, K = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        bias = {"self_attn.q_proj": Q, "self_attn.k_proj": K, "self_attn.v_proj": K}
        norm = ("self_attn.q_norm", "self_attn.k_norm")
        block: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (D,),
            "self_attn.q_proj.weight": (Q, D),
            "self_attn.k_proj.weight": (K, D),
            "self_attn.v_proj.weight": (K, D),
            **{f"{name}.bias": (size,) for name, size in bias.items() if self.qkv_bias},
            **{f"{name}.weight": (self.head_dim,) for name in norm if self.qk_norm},
            "self_attn.o_proj.weight": (D, Q),
            "post_attention_layernorm.weight": (D,),
            "mlp.gate_proj.weight": (F, D),
            "mlp.up_proj.weight": (F, D),
            "mlp.down_proj.weight": (D, F),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, D)}
        for layer in range(self.num_layers):
            shapes |= {f"model.layers.{layer}.{n}": shape for n, shape in block.items()}
        shapes["model.norm.weight"] = (D,)
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, D)
        return shapes

    def parameter_count(self) -> int:
        """Return the number of weights; tied embeddings count once."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())


# what a family's config.json says so that transformers computes what is computed here
_WITHOUT: Mapping[str, Mapping[str, object]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False, "attention_bias": False},
}


def _hf_family(fields: Fields) -> str:
    """Name of the model's family; refuse what is computed otherwise."""
    if not (fields.has("model_type") or fields.has("architectures")):
        raise ValueError(
            f"{fields.source}: names neither model_type nor architectures; it is no config.json of "
            "a Hugging Face model"
        )
    named = fields.mapping.get("architectures")
    by_class = [name for name, own in FAMILIES.items() if [own.architecture] == named]
    family = fields.text("model_type", by_class[0] if by_class else "llama")
    if family not in FAMILIES:
        fields.refuse("model_type", f"only {', '.join(FAMILIES)} are computed here")
    if fields.has("architectures") and by_class != [family]:
        expected = [FAMILIES[family].architecture]
        fields.refuse("architectures", f"of {family}, only {expected} is computed here")
    for key, value in _HF_FIXED.items():
        if fields.has(key) and fields.mapping[key] != value:
            fields.refuse(key, f"only {value!r} is computed here")
    if fields.has("quantization_config"):
        fields.refuse("quantization_config", "take the model's unquantized weights")
    return family


def _gguf_family(fields: Fields) -> str:
    arch = fields.text("general.architecture")
    if arch not in GGUF_FAMILIES:
        fields.refuse("general.architecture", f"only {', '.join(GGUF_FAMILIES)} are computed here")
    if fields.integer(f"{arch}.expert_count", 0) > 0:
        fields.refuse(f"{arch}.expert_count", "a mixture of experts is not computed here")
    return arch


def _kv_heads(fields: Fields, family: str, heads: int) -> int:
    if family == "llama":
        return fields.integer("num_key_value_heads", heads)
    return fields.integer("num_key_value_heads")


def _hf_head_dim(fields: Fields, family: str) -> int:
    if family == "qwen3":
        return fields.integer("head_dim", 128)
    return _head_dim(fields, "head_dim", "hidden_size", "num_attention_heads")


def _positions(fields: Fields, family: str) -> int:
    """Longest document: the context, or the attention's window where that is shorter."""
    context = fields.integer("max_position_embeddings", FAMILIES[family].positions)
    if family == "llama":
        return context
    absent = 4096 if family == "mistral" and "sliding_window" not in fields.mapping else context
    window = fields.integer("sliding_window", absent)
    kinds = fields.mapping.get("layer_types")
    sliding = isinstance(kinds, list) and "sliding_attention" in kinds
    acts = family == "mistral" or sliding or fields.boolean("use_sliding_window", False)
    return min(context, window) if acts else context


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


def _gguf_vocab_size(fields: Fields, arch: str) -> int:
    tokens = fields.mapping.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return fields.integer(f"{arch}.vocab_size")
    return fields.integer(f"{arch}.vocab_size", len(tokens))


def _gguf_eos_ids(fields: Fields) -> tuple[int, ...]:
    # a chat model's turns may end by another token than its documents
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return tuple(dict.fromkeys(token for key in keys for token in fields.ids(key, None)))


def _single(fields: Fields, key: str, *default: float) -> float:
    """A positive number; the header's are float32: 9.99999974e-06 there was 1e-05 before."""
    value = fields.number(key, *default)
    if not 0 < value < 1e38:
        fields.refuse(key, "it must be above 0 and finite")
    return float(str(np.float32(value)))
