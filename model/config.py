"""What a checkpoint says about its own shape, as one checked, immutable value.

formats/config_json.py, gguf_config.py and meta_files.py read it. The families that are computed
differ from LLaMA by little:

    mistral  its attention may have a window; documents are then refused above it, where it acts
    qwen2    q, k and v have a bias
    qwen3    every head of q and k is normed before it is rotated

Tensors carry Hugging Face's names; matrices are (out, in), as torch's linear layers store them.
Letters: D hidden_size, F intermediate_size, Q num_heads * head_dim, K num_kv_heads * head_dim.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

from bioinstruct.model.fields import require, shown
from bioinstruct.model.rope_scaling import (
    LinearRopeScaling,
    Llama3RopeScaling,
    RopeScaling,
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
