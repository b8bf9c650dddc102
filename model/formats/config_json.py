"""The config.json of a Hugging Face folder: read into a LlamaConfig, and written.

A setting that would change the model's function and that this model does not compute is refused by
name; one that changes nothing (use_cache, initializer_range, ...) is passed over.
"""

from collections.abc import Mapping
from typing import Any

from bioinstruct.model.config import FAMILIES, LlamaConfig
from bioinstruct.model.fields import Fields, build
from bioinstruct.model.rope_scaling import rope_from_hf, rope_to_hf

# settings of other LLaMA-like models, and the one value that is this model
_FIXED: Mapping[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
}

# what a family's config.json says so that transformers computes what is computed here
_WITHOUT: Mapping[str, Mapping[str, object]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False, "attention_bias": False},
}


def config_from_hf(mapping: Mapping[str, Any], source: str) -> LlamaConfig:
    """Read the content of a Hugging Face config.json, absent keys as its own class has them.

    Args:
        mapping: the parsed JSON object.
        source: the file's name, for messages.

    Raises:
        ValueError: a key is missing or of the wrong type, or the model is no plain LLaMA.
    """
    fields = Fields(mapping, source)
    family = _family(fields)
    own = FAMILIES[family]
    heads = fields.integer("num_attention_heads")
    rope_base, rope_scaling = rope_from_hf(fields)
    return build(
        LlamaConfig,
        source,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_kv_heads(fields, family, heads),
        head_dim=_head_dim(fields, family),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        max_positions=_positions(fields, family),
        tied_embeddings=fields.boolean("tie_word_embeddings", False),
        bos_id=fields.one_id("bos_token_id", own.bos_id),
        eos_ids=fields.ids("eos_token_id", own.eos_id),
        family=family,
    )


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """Return the content of a config.json that transformers 4 and 5 read alike."""
    scaling = rope_to_hf(config.rope_scaling)
    return {
        "architectures": [FAMILIES[config.family].architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        # the first two are what version 4 reads, the third is version 5's
        "rope_theta": config.rope_base,
        "rope_scaling": scaling,
        "rope_parameters": {
            "rope_theta": config.rope_base,
            **(scaling or {"rope_type": "default"}),
        },
        # a window that the checkpoint had is the end of max_position_embeddings
        **_WITHOUT[config.family],
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": _one_or_list(config.eos_ids),
    }


def _family(fields: Fields) -> str:
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
    for key, value in _FIXED.items():
        if fields.has(key) and fields.mapping[key] != value:
            fields.refuse(key, f"only {value!r} is computed here")
    if fields.has("quantization_config"):
        fields.refuse("quantization_config", "take the model's unquantized weights")
    return family


def _kv_heads(fields: Fields, family: str, heads: int) -> int:
    if family == "llama":
        return fields.integer("num_key_value_heads", heads)
    return fields.integer("num_key_value_heads")


def _head_dim(fields: Fields, family: str) -> int:
    if family == "qwen3":
        return fields.integer("head_dim", 128)
    return fields.share("head_dim", "hidden_size", "num_attention_heads")


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


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    if not ids:
        return None
    return ids[0] if len(ids) == 1 else list(ids)
