"""A model's shape out of config.json and GGUF headers: what is read, what is refused."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bioinstruct.model.config import LinearRopeScaling, Llama3RopeScaling, LlamaConfig
from bioinstruct.model.formats.config_json import config_from_hf, config_to_hf
from bioinstruct.model.formats.gguf_config import config_from_gguf

LLAMA2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA31_8B = LLAMA2_7B | {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA3_ROPE,
    "max_position_embeddings": 131072,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}
LLAMA32_1B = LLAMA31_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "rope_scaling": LLAMA3_ROPE | {"factor": 32.0},
    "tie_word_embeddings": True,
}
SMOLLM2_GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,  # 1e-5 in float32
    "llama.vocab_size": 49152,
    "llama.rope.dimension_count": 64,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def from_gguf(**changes: Any) -> LlamaConfig:
    metadata = {k: v for k, v in (SMOLLM2_GGUF | changes).items() if v is not None}
    return config_from_gguf(metadata, "m.gguf", tied_embeddings=True)


@st.composite
def configs(draw: st.DrawFn) -> LlamaConfig:
    """Any valid configuration."""
    size = st.integers(1, 10**6)
    positive = st.floats(1e-12, 1e9)
    factor = st.floats(1, 1e4)
    kv_heads = draw(st.integers(1, 16))
    vocab_size = draw(size)
    low = draw(st.floats(0.1, 10))
    llama3 = st.builds(
        Llama3RopeScaling,
        factor=factor,
        low_freq_factor=st.just(low),
        high_freq_factor=st.floats(low + 0.1, 20),
        original_max_positions=size,
    )
    token = st.integers(0, vocab_size - 1)
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=draw(size),
        intermediate_size=draw(size),
        num_layers=draw(st.integers(1, 200)),
        num_heads=kv_heads * draw(st.integers(1, 16)),
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 256)),
        norm_eps=draw(positive),
        rope_base=draw(positive),
        rope_scaling=draw(st.none() | st.builds(LinearRopeScaling, factor=factor) | llama3),
        max_positions=draw(size),
        tied_embeddings=draw(st.booleans()),
        bos_id=draw(st.none() | token),
        eos_ids=tuple(draw(st.lists(token, max_size=3, unique=True))),
    )


# ---- config.json -------------------------------------------------------------------------------


def test_a_real_file_is_read(data: Path) -> None:
    path = data / "stories260K" / "config.json"
    config = config_from_hf(json.loads(path.read_text()), str(path))
    assert config == LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_layers=5,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
        norm_eps=1e-5,
        rope_base=10000.0,
        rope_scaling=None,
        max_positions=512,
        tied_embeddings=True,
        bos_id=1,
        eos_ids=(2,),
    )


def test_absent_keys_are_hugging_faces_defaults() -> None:
    config = config_from_hf(LLAMA2_7B, "config.json")
    assert (config.num_kv_heads, config.head_dim, config.norm_eps) == (32, 128, 1e-6)
    assert (config.rope_base, config.rope_scaling, config.max_positions) == (10000.0, None, 2048)
    assert (config.tied_embeddings, config.bos_id, config.eos_ids) == (False, 1, (2,))


@pytest.mark.parametrize(
    ("mapping", "count"),
    # the parameter counts that these models are known by
    [(LLAMA2_7B, 6_738_415_616), (LLAMA31_8B, 8_030_261_248), (LLAMA32_1B, 1_235_814_400)],
)
def test_parameter_counts_are_the_published_ones(mapping: dict[str, Any], count: int) -> None:
    assert config_from_hf(mapping, "config.json").parameter_count() == count


@given(configs())
def test_written_and_read_again_is_the_same(config: LlamaConfig) -> None:
    written = json.loads(json.dumps(config_to_hf(config)))
    assert config_from_hf(written, "config.json") == config


@given(configs())
def test_both_spellings_of_the_rotary_embedding_are_equal(config: LlamaConfig) -> None:
    written = config_to_hf(config)
    old = {k: v for k, v in written.items() if k != "rope_parameters"}
    new = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling")}
    assert config_from_hf(old, "old") == config_from_hf(new, "new") == config


def test_the_oldest_spelling_says_type() -> None:
    mapping = LLAMA2_7B | {"rope_scaling": {"type": "linear", "factor": 4}}
    scaling = config_from_hf(mapping, "config.json").rope_scaling
    assert scaling == LinearRopeScaling(factor=4.0)


def test_several_ends_and_no_start_are_kept() -> None:
    mapping = LLAMA2_7B | {"bos_token_id": None, "eos_token_id": [7, 5]}
    config = config_from_hf(mapping, "config.json")
    assert (config.bos_id, config.eos_ids) == (None, (7, 5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "architectures is .*Llama.*; of mistral, only"),
        ({"model_type": "gemma"}, "config.json: model_type is 'gemma'; only llama, mistral, qwen2"),
        ({"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'; only llama"),
        ({"architectures": ["MixtralForCausalLM"]}, "architectures is .*Mixtral.*; of llama, only"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is .*Sequence"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'; of llama"),
        ({"model_type": None, "architectures": None}, "neither model_type nor architectures"),
        ({"attention_bias": True}, "attention_bias is True; only False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .*; take the model's unq"),
        ({"vocab_size": None}, "config.json: the key vocab_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64'; it must be a whole number"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0; it must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be a whole number"),
        ({"num_hidden_layers": 0}, "config.json: num_layers is 0; it must be above 0"),
        ({"hidden_size": -4096}, "hidden_size is -4096"),
        ({"num_attention_heads": 0}, "hidden_size is 4096; without head_dim"),
        ({"num_attention_heads": 33}, "hidden_size is 4096; without head_dim .*, 33"),
        ({"num_key_value_heads": 5}, "num_kv_heads 5 does not divide num_heads 32"),
        ({"head_dim": 63}, "head_dim is 63; .* must be even"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; it must be a number"),
        ({"rms_norm_eps": math.nan}, "norm_eps is nan"),
        ({"rms_norm_eps": 0}, "norm_eps is 0.0"),
        ({"rope_theta": math.inf}, "rope_base is inf"),
        ({"rope_theta": 10**400}, "rope_theta is 1000.*; it must be a number of ordinary size"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
        ({"bos_token_id": [1, 2]}, "bos_token_id is .*; it must be one token id"),
        ({"bos_token_id": "<s>"}, "bos_token_id is '<s>'; it must be a token id"),
        ({"eos_token_id": [2, 2.5]}, "eos_token_id is .*; it must be a token id"),
        ({"eos_token_id": 32000}, "special token 32000 is outside the vocabulary of 32000"),
        ({"eos_token_id": -1}, "special token -1 is outside"),
        ({"rope_scaling": "llama3"}, "config.json: rope_scaling: expected named settings"),
        ({"rope_scaling": {"type": "yarn"}}, "type is 'yarn'; known types are default, linear, ll"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters: rope_type is 'dynamic'"),
        ({"rope_parameters": {"rope_type": 3}}, "rope_type is 3; it must be a string"),
        (
            {"rope_parameters": {"full_attention": {}}},
            "full_attention is .*; rope type default has",
        ),
        ({"rope_scaling": {"type": "linear"}}, "the key factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5; it must be finite"),
        ({"rope_scaling": {"type": "linear", "factor": math.nan}}, "factor is nan"),
        ({"rope_scaling": {"factor": 2.0}}, "factor is 2.0; rope type default has no such key"),
        ({"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "low_freq_factor < high_freq"),
        ({"rope_scaling": LLAMA3_ROPE | {"beta_fast": 32}}, "beta_fast is 32; rope type llama3"),
        (
            {"rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": 0}},
            "original_max_position_embeddings is 0",
        ),
        (
            {"rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": None}},
            "the key original_max_position_embeddings is missing",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            "partial_rotary_factor is 0.25; only whole heads",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            r"rope_theta is given twice and differs \(10000.0, 500000.0\)",
        ),
        (
            {"rope_scaling": LLAMA3_ROPE, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling and rope_parameters contradict",
        ),
    ],
)
def test_bad_files_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        config_from_hf(LLAMA2_7B | changes, "config.json")
    assert str(caught.value).startswith("config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mapping", [[], "llama", None, 3])
def test_other_json_is_refused(mapping: Any) -> None:
    with pytest.raises(ValueError, match="config.json: expected named settings"):
        config_from_hf(mapping, "config.json")


# ---- rotary scaling ----------------------------------------------------------------------------


def test_llama3_frequencies_are_those_of_transformers() -> None:
    # transformers 5.23.0, head_dim 16, the scaling of Llama 3.1
    golden = [
        1,
        0.193922758,
        0.0376060307,
        0.00729266508,
        0.000524846022,
        3.42810235e-05,
        6.64786967e-06,
        1.28917316e-06,
    ]
    scaling = Llama3RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )
    divisors = scaling.divisors(16, 5e5)
    found = [5e5 ** (-2 * i / 16) / d for i, d in enumerate(divisors)]
    assert found == pytest.approx(golden, rel=1e-6)


@given(factor=st.floats(1, 100), half=st.integers(1, 128), base=st.floats(10, 1e6))
def test_llama3_divisors_grow_from_one_to_the_factor(factor: float, half: int, base: float) -> None:
    scaling = Llama3RopeScaling(
        factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )
    divisors = scaling.divisors(2 * half, base)
    assert all(b >= a * (1 - 1e-12) for a, b in pairwise(divisors))  # but for rounding
    assert divisors[0] == 1.0  # a turn of 2 pi positions is far below the context
    assert divisors[-1] <= factor * (1 + 1e-12)


# ---- GGUF headers ------------------------------------------------------------------------------


def test_a_gguf_header_is_read() -> None:
    config = from_gguf()
    assert config.parameter_count() == 134_515_008
    assert (config.head_dim, config.num_kv_heads, config.max_positions) == (64, 3, 8192)
    assert (config.rope_base, config.rope_scaling) == (100000.0, None)
    assert (config.bos_id, config.eos_ids) == (1, (2,))
    # the decimal that float32 came from, so that it equals the Hugging Face folder's
    assert config.norm_eps == 1e-5


def test_gguf_defaults() -> None:
    config = from_gguf(
        **{
            "llama.attention.head_count_kv": None,
            "llama.rope.freq_base": None,
            "llama.vocab_size": None,
            "tokenizer.ggml.tokens": ["a", "b", "c"],
            "tokenizer.ggml.bos_token_id": None,
            "tokenizer.ggml.eot_token_id": 0,
        }
    )
    assert (config.num_kv_heads, config.rope_base, config.vocab_size) == (9, 10000.0, 3)
    assert (config.bos_id, config.eos_ids) == (None, (2, 0))


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scale_linear": 2.0}, 2.0),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        ({"llama.rope.scaling.type": "linear"}, None),
        ({"llama.rope.scaling.factor": 0.0}, None),
    ],
)
def test_gguf_linear_scaling(changes: dict[str, Any], factor: float | None) -> None:
    expected = None if factor is None else LinearRopeScaling(factor=factor)
    assert from_gguf(**changes).rope_scaling == expected


@pytest.mark.parametrize("mapping", [LLAMA31_8B, LLAMA32_1B])
def test_gguf_divisors_tell_the_released_scaling(mapping: dict[str, Any]) -> None:
    config = config_from_hf(mapping, "config.json")
    assert config.rope_scaling is not None
    metadata = SMOLLM2_GGUF | {
        "llama.rope.freq_base": config.rope_base,
        "llama.attention.key_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
    }
    divisors = config.rope_scaling.divisors(config.head_dim, config.rope_base)
    rounded = [d * (1 + 1e-6) for d in divisors]
    found = config_from_gguf(metadata, "m", tied_embeddings=True, rope_divisors=rounded)
    assert found.rope_scaling == config.rope_scaling
    metadata["llama.rope.scaling.factor"] = 2.0
    with pytest.raises(ValueError, match="scales its rotary frequencies twice"):
        config_from_gguf(metadata, "m", tied_embeddings=True, rope_divisors=rounded)


def test_gguf_divisors_of_one_change_nothing() -> None:
    ones = [1.0] * 32
    config = config_from_gguf(SMOLLM2_GGUF, "m", tied_embeddings=True, rope_divisors=ones)
    assert config.rope_scaling is None


@pytest.mark.parametrize(
    "divisors", [[2.0] * 32, [1.0] * 31 + [8.0], [math.nan] * 32, [2.0], [0.0]]
)
def test_other_gguf_divisors_are_refused(divisors: list[float]) -> None:
    with pytest.raises(ValueError, match="m: its rope_freqs.weight is not that of Llama 3.1"):
        config_from_gguf(SMOLLM2_GGUF, "m", tied_embeddings=True, rope_divisors=divisors)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "general.architecture",
            "phi3",
            "general.architecture is 'phi3'; only llama, qwen2, qwen3",
        ),
        ("general.architecture", None, "the key general.architecture is missing"),
        ("llama.block_count", None, "the key llama.block_count is missing"),
        ("llama.context_length", None, "the key llama.context_length is missing"),
        ("llama.vocab_size", None, "the key llama.vocab_size is missing"),
        ("llama.attention.layer_norm_rms_epsilon", None, "rms_epsilon is missing"),
        ("llama.attention.head_count", [9, 9], "head_count is .*; it must be a whole number"),
        ("llama.embedding_length", 575, "embedding_length is 575; without .*key_length"),
        ("llama.rope.dimension_count", 32, "dimension_count is 32; it must be .* a head, 64"),
        ("llama.attention.value_length", 128, "value_length is 128; it must be"),
        ("llama.expert_count", 8, "expert_count is 8; a mixture of experts"),
        ("llama.rope.scaling.type", "yarn", "scaling.type is 'yarn'; known types are none, linear"),
        ("llama.rope.scaling.factor", 0.5, "rope scaling factor is 0.5"),
        ("tokenizer.ggml.eos_token_id", 49152, "special token 49152 is outside"),
    ],
)
def test_bad_gguf_headers_are_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        from_gguf(**{key: value})
    assert str(caught.value).startswith("m.gguf: ")
