"""Every form of checkpoint, of every family of model, loads to the logits of transformers.

data/families/make.py made the models. The other forms of them are written here, by code that shares
nothing with what reads them: torch.save, the gguf package, and Meta's layout by its definition.
"""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bioinstruct.model.checkpoint import open_checkpoint
from bioinstruct.model.llama import Llama, pack_documents

FAMILIES = ("llama", "llama3", "wide_heads", "mistral", "qwen2", "qwen3")
META_NAMES = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


# ---- the forms, written independently ----------------------------------------------------------


class Source:
    """A model as transformers saved it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = load_file(folder / "model.safetensors")

    @property
    def head_dim(self) -> int:
        heads = self.config["num_attention_heads"]
        return int(self.config.get("head_dim") or self.config["hidden_size"] // heads)

    @property
    def rope(self) -> dict[str, float]:
        return dict(self.config["rope_parameters"])

    def write_config(self, out: Path) -> None:
        (out / "config.json").write_text(json.dumps(self.config))

    def halves(self) -> list[dict[str, Tensor]]:
        names = sorted(self.tensors)
        parts = names[::2], names[1::2]
        return [{name: self.tensors[name] for name in part} for part in parts]


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Put features i and i + E/2 of each head side by side."""
    order = [i for pair in range(head_dim // 2) for i in (pair, pair + head_dim // 2)]
    heads = rows.split(head_dim)
    return torch.cat([head[order] for head in heads])


def indexed(out: Path, names: list[str], parts: list[dict[str, Tensor]], index: str) -> None:
    places = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    (out / index).write_text(json.dumps({"weight_map": places}))


def safetensors_shards(source: Source, out: Path) -> None:
    source.write_config(out)
    names = ["a.safetensors", "b.safetensors"]
    for name, part in zip(names, source.halves(), strict=True):
        save_file(part, out / name)
    indexed(out, names, source.halves(), "model.safetensors.index.json")


def bin_file(source: Source, out: Path) -> None:
    source.write_config(out)
    torch.save(source.tensors, out / "pytorch_model.bin")


def old_bin_file(source: Source, out: Path) -> None:
    source.write_config(out)
    torch.save(source.tensors, out / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def bin_shards(source: Source, out: Path) -> None:
    source.write_config(out)
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for name, part in zip(names, source.halves(), strict=True):
        torch.save(part, out / name)
    indexed(out, names, source.halves(), "pytorch_model.bin.index.json")


def meta_tensors(source: Source) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in source.tensors.items():
        if name.startswith("model.layers."):
            _, _, layer, *middle, last = name.split(".")
            stem = ".".join(middle)
            if stem in ("self_attn.q_proj", "self_attn.k_proj"):
                tensor = interleaved(tensor, source.head_dim)
            tensors[f"layers.{layer}.{META_NAMES[stem]}.{last}"] = tensor
        else:
            outer = {
                "model.embed_tokens.weight": "tok_embeddings.weight",
                "model.norm.weight": "norm.weight",
                "lm_head.weight": "output.weight",
            }
            tensors[outer[name]] = tensor
    return tensors


def meta_params(source: Source) -> dict[str, object]:
    config = source.config
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "multiple_of": 256,
        "ffn_dim_multiplier": 1.3,
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": -1,
        "rope_theta": source.rope["rope_theta"],
    }
    if source.rope["rope_type"] == "llama3":
        params |= {"use_scaled_rope": True, "rope_scaling_factor": source.rope["factor"]}
    if source.head_dim * config["num_attention_heads"] != config["hidden_size"]:
        params["head_dim"] = source.head_dim
    return params


def meta(parts: int, embedding_dim: int) -> Callable[[Source, Path], None]:
    """Write Meta's form: column-parallel layers cut by rows, row-parallel ones by columns."""

    def cut(name: str, tensor: Tensor) -> list[Tensor]:
        if name.startswith("tok_embeddings"):
            return list(tensor.chunk(parts, embedding_dim))
        if any(part in name for part in ("wq", "wk", "wv", "w1", "w3", "output")):
            return list(tensor.chunk(parts, 0))
        if any(part in name for part in ("wo", "w2")):
            return list(tensor.chunk(parts, 1))
        return [tensor] * parts

    def write(source: Source, out: Path) -> None:
        pieces = {name: cut(name, tensor) for name, tensor in meta_tensors(source).items()}
        for part in range(parts):
            file = {name: tensors[part].clone() for name, tensors in pieces.items()}
            file["rope.freqs"] = torch.ones(4)
            torch.save(file, out / f"consolidated.{part:02d}.pth")
        (out / "params.json").write_text(json.dumps(meta_params(source)))

    return write


def gguf_file(parts: int) -> Callable[[Source, Path], None]:
    """Write a GGUF model of float32 numbers with the gguf package."""

    def write(source: Source, out: Path) -> None:
        config = source.config
        arch = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
        small = 10_000 if parts > 1 else 0
        writer = gguf.GGUFWriter(out / "model.gguf", arch, split_max_size=small)
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_key_length(source.head_dim)
        writer.add_value_length(source.head_dim)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(source.rope["rope_theta"])
        writer.add_vocab_size(config["vocab_size"])
        if source.rope["rope_type"] == "llama3":
            writer.add_tensor("rope_freqs.weight", llama3_divisors(source))
        for name, tensor in source.tensors.items():
            writer.add_tensor(*gguf_tensor(source, arch, name, tensor))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write


def gguf_tensor(source: Source, arch: str, name: str, tensor: Tensor) -> tuple[str, np.ndarray]:
    if name.startswith("model.layers."):
        _, _, layer, *middle, last = name.split(".")
        stem = ".".join(middle)
        if arch == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = interleaved(tensor, source.head_dim)
        name = f"blk.{layer}.{GGUF_NAMES[stem]}.{last}"
    else:
        outer = {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight",
        }
        name = outer[name]
    return name, tensor.float().numpy()


def llama3_divisors(source: Source) -> np.ndarray:
    rope, E = source.rope, source.head_dim
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, E, 2) / E)
    original = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


FORMS: dict[str, Callable[[Source, Path], None]] = {
    "safetensors shards": safetensors_shards,
    "bin": bin_file,
    "bin of torch 1.5": old_bin_file,
    "bin shards": bin_shards,
    "Meta": meta(1, 1),
    "Meta 2 parts": meta(2, 1),
    "Meta 4 parts": meta(4, 1),
    "Meta 4 parts, embedding by rows": meta(4, 0),
    "GGUF": gguf_file(1),
    "GGUF in parts": gguf_file(2),
}


# ---- the table ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(data: Path) -> dict[str, np.ndarray]:
    return dict(np.load(data / "families" / "golden.npz"))


def error(path: Path, family: str, golden: dict[str, np.ndarray]) -> float:
    checkpoint = open_checkpoint(path)
    model = Llama(checkpoint.config)
    checkpoint.load_into(model.destinations())
    documents = [golden["ids_0"].tolist(), golden["ids_1"].tolist()]
    with torch.inference_mode():
        logits = model.logits(pack_documents(documents))
    return float(np.abs(logits.numpy() - golden[family]).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gives_transformers_logits(
    data: Path, golden: dict[str, np.ndarray], family: str
) -> None:
    assert error(data / "families" / family, family, golden) < 5e-5
    assert np.abs(golden[family]).max() > 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_form_gives_the_same_logits(
    data: Path, golden: dict[str, np.ndarray], tmp_path: Path, family: str, form: str
) -> None:
    if form.startswith("Meta") and family.startswith("qwen"):
        pytest.skip("Meta's form has no biases and no head norms")
    FORMS[form](Source(data / "families" / family), tmp_path)
    assert error(tmp_path, family, golden) < 5e-5


def test_a_model_of_two_gguf_parts_is_opened_by_either(
    data: Path, golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    gguf_file(2)(Source(data / "families" / "llama"), tmp_path)
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) > 2
    for file in (files[0], files[-1]):
        assert error(file, "llama", golden) < 5e-5
    files[1].unlink()
    with pytest.raises(ValueError, match=f"{files[1].name}: there is no such file"):
        open_checkpoint(files[0])
