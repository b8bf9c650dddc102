"""Writing a model and its tokenizer as one GGUF file, for llama.cpp and what is built on it.

Matrices are stored as float32, float16 or q8_0 (blocks of 32 signed bytes and a float16 scale);
vectors stay float32. The rows of q and k are interleaved as llama.cpp wants them for LLaMA, and the
stretch of Llama 3.1's rotary embedding becomes a tensor of divisors. Tensors are written one at a
time, after a table whose sizes follow from their shapes.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bioinstruct.model.config import FAMILIES, LlamaConfig
from bioinstruct.model.formats.gguf_tensors import BLOCK_NAMES, OUTER_NAMES
from bioinstruct.model.formats.rotary_rows import permute_rows
from bioinstruct.model.formats.written import check_values
from bioinstruct.model.rope_scaling import LinearRopeScaling, Llama3RopeScaling
from bioinstruct.model.tokenizers.tokenizer import GgufWords, Tokenizer
from bioinstruct.synth.files import replaces

KINDS = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0"}
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}  # llama.cpp's LLAMA_FTYPE
UNUSED = 5  # type of a token that only fills the embedding's rows
_BLOCK = {hf: own for own, hf in BLOCK_NAMES.items()}
_OUTER = {hf: own for own, hf in OUTER_NAMES.items()}
_ROPE = "rope_freqs.weight"
MAX_NUMBERS = 1 << 22  # of a tensor that are in memory as float32


def save_gguf(
    path: Path,
    config: LlamaConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: Tokenizer,
    kind: str,
) -> None:
    """Write one GGUF file.

    Args:
        path: the file; it must not exist yet.
        config: the model's shape.
        tensors: by Hugging Face name, in the order of config.tensor_shapes().
        tokenizer: the model's.
        kind: f32 | f16 | q8_0.

    Raises:
        ValueError: the file exists, the gguf package is not there, the tokenizer or the rope
            scaling has no form in GGUF, or a weight is too large for float16.
        OSError: the disk is full or not writable.
    """
    if path.exists():
        raise ValueError(f"{path} exists; choose another name")
    gguf = _gguf()
    words = tokenizer.gguf_words()
    arch = config.family if config.family != "mistral" else "llama"
    with replaces(path) as temporary, closing(gguf.GGUFWriter(temporary, arch)) as writer:
        _add_shape(gguf, writer, config)
        _add_words(writer, tokenizer, words, config.vocab_size)
        writer.add_file_type(FILE_TYPES[kind])
        stretch = _divisors(config)
        if stretch is not None:
            writer.add_tensor_info(_ROPE, stretch.shape, stretch.dtype, stretch.nbytes)
        plan = config.tensor_shapes()
        types = {name: _type(gguf, shape, kind) for name, shape in plan.items()}
        for name, shape in plan.items():
            size, float32 = _bytes(gguf, shape, types[name]), np.dtype(np.float32)
            writer.add_tensor_info(_gguf_name(name), shape, float32, size, types[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if stretch is not None:
            writer.write_tensor_data(stretch)
        for (name, tensor), expected in zip(tensors, plan, strict=True):
            assert name == expected
            # block scales are float16 too
            held = torch.float32 if types[name].name == "F32" else torch.float16
            check_values(name, tensor.detach(), held)
            ordered = _ordered(name, tensor, config)
            writer.write_tensor_data(_Stored(gguf, ordered, types[name]))


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ValueError(
            'writing GGUF needs the gguf package: pip install "bioinstruct[demo]"'
        ) from None
    return gguf


def _add_shape(gguf: Any, writer: Any, config: LlamaConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_base)
    if isinstance(config.rope_scaling, LinearRopeScaling):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)


def _add_words(writer: Any, tokenizer: Tokenizer, words: GgufWords, rows: int) -> None:
    missing = range(len(words.texts), rows)
    writer.add_tokenizer_model(words.model)
    if words.pre is not None:
        writer.add_tokenizer_pre(words.pre)
    writer.add_token_list([*words.texts, *(f"[PAD{token}]" for token in missing)])
    writer.add_token_types([*words.types, *(UNUSED for _ in missing)])
    if words.scores is not None:
        writer.add_token_scores([*words.scores, *(-10000.0 for _ in missing)])
    if words.merges is not None:
        writer.add_token_merges(words.merges)
    if words.space_prefix is not None:
        writer.add_add_space_prefix(words.space_prefix)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    if tokenizer.eos_id is not None:
        writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_add_bos_token(tokenizer.adds_bos)


def _divisors(config: LlamaConfig) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    if not isinstance(config.rope_scaling, Llama3RopeScaling):
        return None
    divisors = config.rope_scaling.divisors(config.head_dim, config.rope_base)
    return np.array(divisors, dtype=np.float32)


def _type(gguf: Any, shape: tuple[int, ...], kind: str) -> Any:
    types = gguf.GGMLQuantizationType
    if len(shape) == 1 or kind == "f32":
        return types.F32
    # rows that are no whole number of blocks stay wider
    return types.Q8_0 if kind == "q8_0" and shape[-1] % 32 == 0 else types.F16


def _bytes(gguf: Any, shape: tuple[int, ...], kind: Any) -> int:
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // int(per_block) * int(block_bytes)


def _gguf_name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    _, _, layer, *stem, last = name.split(".")
    return f"blk.{layer}.{_BLOCK['.'.join(stem)]}.{last}"


def _ordered(name: str, tensor: Tensor, config: LlamaConfig) -> Tensor:
    """The rows of a tensor as llama.cpp wants them."""
    heads: Mapping[str, int] = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    part = name.split(".")[-2]
    if part in heads and FAMILIES[config.family].interleaved:
        return permute_rows(tensor, heads[part])
    return tensor


class _Stored:
    """What gguf's writer asks of an array, `nbytes` and `tofile`, without ever being one: the rows
    are turned into the file's type a few at a time."""

    def __init__(self, gguf: Any, tensor: Tensor, kind: Any) -> None:
        self.nbytes = _bytes(gguf, tuple(tensor.shape), kind)
        self._gguf, self._tensor, self._kind = gguf, tensor.detach(), kind

    def tofile(self, file: Any) -> None:
        width = self._tensor.shape[-1]
        for rows in self._tensor.reshape(-1, width).split(max(1, MAX_NUMBERS // width)):
            wide = np.ascontiguousarray(rows.to("cpu", torch.float32).numpy())
            file.write(np.asarray(self._gguf.quants.quantize(wide, self._kind)).data)
