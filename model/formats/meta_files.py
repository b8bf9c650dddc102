"""Meta's own form of LLaMA: params.json beside consolidated.00.pth, 01, ...

The files are the parts of one model on as many GPUs: every matrix is cut, along its rows where its
outputs were spread and along its columns where its inputs were. They are put together here tensor
by tensor, as each is read. Three things differ from a Hugging Face folder:

    names       layers.7.attention.wq.weight is model.layers.7.self_attn.q_proj.weight
    embedding   cut along its columns in LLaMA 1 and 2, along its rows in Llama 3
    rotary      Meta turns neighbours (2i, 2i+1) of a head, Hugging Face (i, i + H/2), so the rows
                of q and k stand interleaved

params.json leaves sizes to be computed (multiple_of, ffn_dim_multiplier) or open (vocab_size -1),
so they are taken from the tensors; and it does not state the context, which follows the release.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.fields import Fields, build
from bioinstruct.model.formats.pickled import read_pickled
from bioinstruct.model.formats.rotary_rows import unpermute_rows
from bioinstruct.model.formats.stored import StoredTensor
from bioinstruct.model.rope_scaling import Llama3RopeScaling
from bioinstruct.model.tokenizers.tokenizer_config import read_json

PARAMS = "params.json"
SHARDS = "consolidated.*.pth"
# Hugging Face's name, and the dimension along which the parts lie (None: all are equal)
BLOCK: dict[str, tuple[str, int | None]] = {
    "attention_norm": ("input_layernorm", None),
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "ffn_norm": ("post_attention_layernorm", None),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
}
EMBEDDING = "tok_embeddings.weight"
OUTER: dict[str, tuple[str, int | None]] = {
    EMBEDDING: ("model.embed_tokens.weight", 1),
    "norm.weight": ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
}
_BLOCK = re.compile(r"layers\.(\d+)\.([\w.]+)\.weight")
_SIZED = frozenset({"multiple_of", "ffn_dim_multiplier", "hidden_dim", "max_batch_size"})
_KNOWN = _SIZED | {
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "vocab_size",
    "norm_eps",
    "rope_theta",
    "use_scaled_rope",
    "rope_scaling_factor",
    "max_seq_len",
    "tied",
}
LLAMA3_WORDS = 128_000  # tokens of Llama 3 in front of its control tokens
LLAMA32_WIDTH = 3072  # of Llama 3.2's larger text model


def meta_shards(folder: Path) -> list[Path]:
    """Return the parts of a model in Meta's form, in their order; none where there are none.

    Raises:
        ValueError: a number is missing between them.
    """
    files = sorted(folder.glob(SHARDS))
    wanted = [f"consolidated.{number:02d}.pth" for number in range(len(files))]
    for file, name in zip(files, wanted, strict=True):
        if file.name != name:
            raise ValueError(f"{folder}: {name} is missing beside {file.name}; copy it there too")
    return files


def read_meta(files: Sequence[Path]) -> tuple[LlamaConfig, dict[str, StoredTensor]]:
    """Open a model in Meta's form: its shape, and its tensors by Hugging Face name.

    Args:
        files: all parts, in order.

    Raises:
        ValueError: params.json is missing or says what is not computed here, or the parts do not
            hold the same tensors.
    """
    parts = [read_pickled(file) for file in files]
    for file, part in zip(files, parts, strict=True):
        if odd := sorted(part.keys() ^ parts[0].keys()):
            raise ValueError(f"{file}: {odd[0]} is in this part or in {files[0].name}, not in both")
    params = _params(files[0].with_name(PARAMS))
    width = params.integer("dim")
    # LLaMA 1 also stored the rotary frequencies, which follow from params.json
    names = [name for name in parts[0] if not name.endswith("rope.freqs")]
    whole = {
        name: _joined(files[0].parent, name, [part[name] for part in parts], width)
        for name in names
    }
    config = _config(params, {name: stored.shape for name, stored in whole.items()}, len(files))
    heads = {"attention.wq": config.num_heads, "attention.wk": config.num_kv_heads}
    tensors = {}
    for name, stored in whole.items():
        block = _BLOCK.fullmatch(name)
        if block is not None and block[2] in heads:
            stored = stored._replace(read=partial(_unpermuted, stored, heads[block[2]]))
        tensors[_hf_name(name)] = stored
    return config, tensors


def _unpermuted(stored: StoredTensor, num_heads: int) -> Tensor:
    return unpermute_rows(stored.read(), num_heads)


def _place(name: str) -> tuple[str, int | None] | None:
    """Hugging Face's name of a tensor, and the dimension of its cut; None for an unknown one."""
    block = _BLOCK.fullmatch(name)
    if block is None:
        return OUTER.get(name)
    if block[2] not in BLOCK:
        return None
    stem, dim = BLOCK[block[2]]
    return f"model.layers.{block[1]}.{stem}.weight", dim


def _hf_name(name: str) -> str:
    place = _place(name)
    return name if place is None else place[0]  # an unknown tensor is reported under its own name


def _joined(folder: Path, name: str, parts: list[StoredTensor], width: int) -> StoredTensor:
    """One tensor out of its parts."""
    if len(parts) == 1:
        return parts[0]
    if len({part.shape for part in parts}) > 1:
        shapes = ", ".join(str(part.shape) for part in parts)
        raise ValueError(f"{folder}: {name} has parts of different shapes: {shapes}")
    shape = list(parts[0].shape)
    place = _place(name)
    dim = None if place is None else place[1]
    if name == EMBEDDING and shape[1:] == [width]:
        dim = 0
    if dim is None or dim >= len(shape):
        return parts[0]._replace(read=partial(_equal, folder, name, parts))
    shape[dim] *= len(parts)
    loadable = all(part.loadable for part in parts)
    return StoredTensor(tuple(shape), parts[0].dtype, loadable, partial(_concatenated, parts, dim))


def _concatenated(parts: list[StoredTensor], dim: int) -> Tensor:
    return torch.cat([part.read() for part in parts], dim)


def _equal(folder: Path, name: str, parts: list[StoredTensor]) -> Tensor:
    one, *others = [part.read() for part in parts]
    if any(not torch.equal(one, other) for other in others):
        raise ValueError(f"{folder}: {name} differs between the parts; they are of several models")
    return one


def _params(path: Path) -> Fields:
    if not path.is_file():
        raise ValueError(f"{path}: is missing; copy it from where the weights came from")
    fields = Fields(read_json(path), str(path))
    for key in fields.mapping:
        if key not in _KNOWN:
            fields.refuse(key, "such a setting is not computed here")
    return fields


def _config(params: Fields, shapes: Mapping[str, tuple[int, ...]], parts: int) -> LlamaConfig:
    width, heads = params.integer("dim"), params.integer("n_heads")
    kv_heads = params.integer("n_kv_heads", heads)
    if heads < 1 or (width % heads and not params.has("head_dim")):
        params.refuse("n_heads", f"it must divide dim, {width}")
    head_dim = params.integer("head_dim", width // heads)
    rows = _size(shapes, "layers.0.attention.wq.weight", params)
    if rows < heads * head_dim:
        raise ValueError(
            f"{Path(params.source).parent}: holds {parts} of "
            f"{parts * heads * head_dim // max(1, rows)} parts (consolidated.NN.pth); copy the "
            "others there too"
        )
    vocab_size = _size(shapes, EMBEDDING, params)
    if params.integer("vocab_size", -1) not in (-1, vocab_size):
        params.refuse("vocab_size", f"the embedding has {vocab_size} rows")
    llama3 = vocab_size >= LLAMA3_WORDS
    return build(
        LlamaConfig,
        params.source,
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=_size(shapes, "layers.0.feed_forward.w1.weight", params),
        num_layers=params.integer("n_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=params.number("norm_eps"),
        rope_base=params.number("rope_theta", 10000.0),
        rope_scaling=_scaling(params),
        max_positions=_context(params, llama3),
        tied_embeddings=params.boolean("tied", "output.weight" not in shapes),
        bos_id=LLAMA3_WORDS if llama3 else 1,
        # Llama 3: end of text, of message, of turn
        eos_ids=(LLAMA3_WORDS + 1, LLAMA3_WORDS + 8, LLAMA3_WORDS + 9) if llama3 else (2,),
    )


def _size(shapes: Mapping[str, tuple[int, ...]], name: str, params: Fields) -> int:
    """Rows of a tensor."""
    if name not in shapes:
        raise ValueError(f"{Path(params.source).parent}: {name} is missing from its weights")
    return shapes[name][0]


def _scaling(params: Fields) -> Llama3RopeScaling | None:
    """Llama 3.1's stretch; the factor, which most files leave out, is greater in the small 3.2."""
    if not params.boolean("use_scaled_rope", False):
        return None
    factor = 32.0 if params.integer("dim") <= LLAMA32_WIDTH else 8.0
    return build(
        Llama3RopeScaling,
        params.source,
        factor=params.number("rope_scaling_factor", factor),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=8192,
    )


def _context(params: Fields, llama3: bool) -> int:
    """Longest document: as stated, else that of the release."""
    if params.has("max_seq_len"):
        return params.integer("max_seq_len")
    if params.boolean("use_scaled_rope", False):
        return 131072
    if llama3:
        return 8192
    if params.number("rope_theta", 10000.0) >= 1e6:  # Code Llama
        return 16384
    return 2048 if params.number("norm_eps") < 5e-6 else 4096  # LLaMA 1, Llama 2
