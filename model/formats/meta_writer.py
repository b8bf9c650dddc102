"""Writing a model in Meta's form: params.json and one consolidated.00.pth."""

import json
import re
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.formats.meta_files import BLOCK, OUTER, PARAMS
from bioinstruct.model.formats.pickled_writer import PickledFile
from bioinstruct.model.formats.rotary_rows import permute_rows
from bioinstruct.model.formats.written import checked, new_folder
from bioinstruct.model.rope_scaling import Llama3RopeScaling
from bioinstruct.synth.files import write_text

WEIGHTS = "consolidated.00.pth"
_LAYER = re.compile(r"model\.layers\.(\d+)\.([\w.]+)\.weight")
_BLOCK_NAMES = {stem: name for name, (stem, _) in BLOCK.items()}
_OUTER_NAMES = {stem: name for name, (stem, _) in OUTER.items()}


def save_meta(
    folder: Path,
    config: LlamaConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
) -> list[Path]:
    """Write a folder in Meta's form.

    Args:
        folder: where to write; it must not exist yet, or be empty.
        config: the model's shape, of a family that the form can hold.
        tensors: by Hugging Face name.
        dtype: what to store; None keeps each tensor's own.

    Returns:
        The files written.

    Raises:
        ValueError: the folder holds something, or the form cannot hold the model.
        OSError: the disk is full or not writable.
    """
    params = _params(config)
    heads = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}
    with new_folder(folder) as temporary:
        with closing(PickledFile(temporary / WEIGHTS)) as file:
            for name, tensor in checked(config, tensors, dtype):
                layer = _LAYER.fullmatch(name)
                if layer is not None and layer[2] in heads:
                    tensor = permute_rows(tensor, heads[layer[2]])
                file.add(_meta_name(name), tensor)
        write_text(temporary / PARAMS, json.dumps(params, indent=2) + "\n")
    return [folder / WEIGHTS, folder / PARAMS]


def _meta_name(name: str) -> str:
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return _OUTER_NAMES[name]
    return f"layers.{layer[1]}.{_BLOCK_NAMES[layer[2]]}.weight"


def _params(config: LlamaConfig) -> dict[str, Any]:
    if config.qkv_bias or config.qk_norm:
        raise ValueError(
            f"Meta's form cannot hold a model of the family {config.family} (biases, head norms); "
            "convert it to safetensors"
        )
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "max_seq_len": config.max_positions,
    }
    match config.rope_scaling:
        case None:
            return params
        case Llama3RopeScaling(
            factor=factor,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_positions=8192,
        ):
            return params | {"use_scaled_rope": True, "rope_scaling_factor": factor}
        case other:
            raise ValueError(f"Meta's form cannot state the rope scaling {other}")
