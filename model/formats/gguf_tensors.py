"""The weights of a GGUF file, turned back into what Hugging Face's folder of the model holds.

After its key-value header (gguf_header.py) the file lists its tensors: a name, the dimensions with
the fastest first, a type number and an offset into the data, which begin at the next multiple of
`general.alignment`. Three things differ from a Hugging Face folder:

    names       blk.7.attn_q.weight is model.layers.7.self_attn.q_proj.weight
    numbers     rows are quantized in blocks; the gguf package turns them into float32 here
    rotary      llama.cpp turns neighbours (2i, 2i+1) of a head, Hugging Face (i, i + H/2), so the
                rows of q and k stand interleaved in the file

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
Letters: N heads, H head width, K input features.
"""

import math
import re
import struct
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bioinstruct.model.config import FAMILIES, LlamaConfig
from bioinstruct.model.formats.gguf_config import config_from_gguf
from bioinstruct.model.formats.rotary_rows import unpermute_rows
from bioinstruct.model.formats.stored import StoredTensor, check_start
from bioinstruct.model.gguf_header import ARRAY, NUMBERS, TEXT, gguf_parts, read_metadata

BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE = "rope_freqs.weight"
MAX_DIMS = 4  # of ggml's tensors


class _Entry(NamedTuple):
    """A line of the file's tensor table."""

    shape: tuple[int, ...]  # (out, in), slowest dimension first
    kind: int
    offset: int  # from the start of the data


def read_gguf(path: Path) -> tuple[LlamaConfig, dict[str, StoredTensor]]:
    """Return the model's shape and its tensors by Hugging Face name.

    Raises:
        ValueError: the file is no whole GGUF file of a LLaMA, or the gguf package is not there.
    """
    first, *others = gguf_parts(path)
    metadata, tensors = _read_part(first)
    count = metadata.get("split.count", 1)
    if count not in (0, 1 + len(others)):
        raise ValueError(
            f"{first}: is one of {count} parts; give the first part under its own name, "
            f"NAME-00001-of-{count:05d}.gguf, with the others beside it"
        )
    for other in others:
        _, part = _read_part(other)
        if twice := sorted(part.keys() & tensors.keys()):
            raise ValueError(f"{other}: {twice[0]} is in this part and in another")
        tensors |= part
    rope = tensors.pop(_ROPE, None)
    if rope is not None and not rope.loadable:
        raise ValueError(f"{path}: {_ROPE} is {rope.dtype}; it must hold plain numbers")
    config = config_from_gguf(
        metadata,
        str(first),
        tied_embeddings="output.weight" not in tensors,
        rope_divisors=None if rope is None else rope.read().flatten().tolist(),
    )
    return config, {_hf_name(name): _unpermuted(name, t, config) for name, t in tensors.items()}


def _read_part(path: Path) -> tuple[dict[str, object], dict[str, StoredTensor]]:
    """The metadata and the tensors of one file, by the names in it."""
    check_start(path)
    _gguf(path)
    metadata = read_metadata(path)
    data = np.memmap(path, dtype=np.uint8, mode="r")
    try:
        table, start = _tensor_table(data.data)
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise ValueError(
            f"{path}: its table of tensors is cut short or damaged ({error}); download or copy "
            "the file again"
        ) from None
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"{path}: general.alignment is {alignment!r}; it must be a number above 0")
    start += -start % alignment
    return metadata, {name: _stored(path, data, start, name, e) for name, e in table.items()}


def _unpermuted(name: str, stored: StoredTensor, config: LlamaConfig) -> StoredTensor:
    block = _BLOCK.fullmatch(name)
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    if block is None or block[2] not in heads or not FAMILIES[config.family].interleaved:
        return stored
    return stored._replace(read=lambda: unpermute_rows(stored.read(), heads[block[2]]))


def _hf_name(name: str) -> str:
    block = _BLOCK.fullmatch(name)
    if block is None or block[2] not in BLOCK_NAMES:
        return OUTER_NAMES.get(name, name)  # an unknown tensor is reported under its own name
    return f"model.layers.{block[1]}.{BLOCK_NAMES[block[2]]}.{block[3]}"


def _stored(
    path: Path, data: np.ndarray[Any, Any], start: int, name: str, entry: _Entry
) -> StoredTensor:
    gguf = _gguf(path)
    try:
        kind = gguf.GGMLQuantizationType(entry.kind)
    except ValueError:
        # sizes of types of the future are unknown; the complaint waits until the tensor is wanted
        return StoredTensor(entry.shape, f"type {entry.kind}", False, _never)
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks, odd = divmod(entry.shape[-1], per_block)
    row_bytes = blocks * block_bytes
    rows = math.prod(entry.shape[:-1])
    begin, end = start + entry.offset, start + entry.offset + rows * row_bytes
    if odd or end > len(data):
        raise ValueError(
            f"{path}: the tensor {name} {entry.shape} of type {kind.name} ends at byte {end} of "
            f"{len(data)}; the file is cut short or damaged, download or copy it again"
        )
    raw = data[begin:end].reshape(rows, row_bytes)
    read = partial(_dequantized, raw, kind, entry.shape)
    return StoredTensor(entry.shape, kind.name, _can_dequantize(kind), read)


def _dequantized(raw: np.ndarray[Any, Any], kind: Any, shape: tuple[int, ...]) -> Tensor:
    from gguf import quants

    numbers = np.require(quants.dequantize(raw, kind), requirements=["C", "W"])
    return torch.from_numpy(numbers).view(shape)


@cache
def _can_dequantize(kind: Any) -> bool:
    from gguf import GGML_QUANT_SIZES, quants

    try:  # the package has no list of what it can do; one block of zeros tells
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _never() -> Tensor:
    raise AssertionError("a tensor that is not loadable was read")


def _tensor_table(data: memoryview) -> tuple[dict[str, _Entry], int]:
    """Return the table by tensor name, and the offset behind it."""
    (count,) = struct.unpack_from("<Q", data, 8)
    offset = _end_of_metadata(data)
    table = {}
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", data, offset)
        name = data[offset + 8 : offset + 8 + length].tobytes().decode()
        (num_dims,) = struct.unpack_from("<I", data, offset + 8 + length)
        if name in table or not 1 <= num_dims <= MAX_DIMS:
            raise IndexError(f"{name!r} stands there twice, or has {num_dims} dimensions")
        offset += 12 + length
        *dims, kind, begin = struct.unpack_from(f"<{num_dims}QIQ", data, offset)
        offset += 8 * num_dims + 12
        table[name] = _Entry(tuple(reversed(dims)), kind, begin)
    return table, offset


def _end_of_metadata(data: memoryview) -> int:
    # read_metadata has checked every length on the way
    (count,) = struct.unpack_from("<Q", data, 16)
    offset = 24
    for _ in range(count):
        offset = _skip(data, offset, TEXT)
        (kind,) = struct.unpack_from("<I", data, offset)
        offset = _skip(data, offset + 4, kind)
    return offset


def _skip(data: memoryview, offset: int, kind: int) -> int:
    """Return the offset behind a value of the given type."""
    if kind == TEXT:
        (length,) = struct.unpack_from("<Q", data, offset)
        return offset + 8 + int(length)
    if kind != ARRAY:
        return offset + struct.calcsize(NUMBERS[kind])
    inner, count = struct.unpack_from("<IQ", data, offset)
    offset += 12
    if inner in NUMBERS:
        return offset + int(count) * struct.calcsize(NUMBERS[inner])
    for _ in range(count):
        offset = _skip(data, offset, inner)
    return offset


def _gguf(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise ValueError(
            f'{path}: reading GGUF needs the gguf package: pip install "bioinstruct[demo]"'
        ) from None
    return gguf
