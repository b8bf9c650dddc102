"""The command that looks at checkpoints and writes them anew: its output, its files, its memory."""

import json
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from bioinstruct.kernels import Heads, attention
from bioinstruct.model import Llm, load
from bioinstruct.model.adapters import Adapters, LoraSettings
from bioinstruct.model.checkpoint import SINGLE, open_checkpoint, save_checkpoint
from bioinstruct.model.checkpoint_cli import command, training_bytes
from bioinstruct.model.config import Llama3RopeScaling, LlamaConfig
from bioinstruct.model.llama import Llama, pack_documents
from bioinstruct.model.merging import merged_tensors, streamed_logits
from bioinstruct.model.tokenizers.tokenizer import load_tokenizer

FAMILIES = ("llama", "llama3", "wide_heads", "mistral", "qwen2", "qwen3")


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def weights(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path)
    model = Llama(checkpoint.config)
    checkpoint.load_into(model.destinations())
    return model.destinations()


# ---- inspect -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stories260K", "stories260K_meta", "families/qwen3"])
def test_inspect_says_what_a_model_is(data: Path, name: str) -> None:
    text = run("inspect", data / name).output
    config = open_checkpoint(data / name).config
    assert f"{config.parameter_count():,} in " in text
    assert f"{config.num_layers} layers of width {config.hidden_size}" in text
    assert re.search(rf"family +{config.family}\n", text)
    assert "estimate at 4096 tokens" in text and "by formula, not measured" in text


def test_inspect_shows_tokenizer_and_template(smollm2: Path) -> None:
    text = run("inspect", smollm2).output
    assert "bpe, 49152 tokens" in text
    assert re.search(r"template +chatml", text)
    assert "Q4_1" in text


def test_inspect_lists_what_is_missing(data: Path, tmp_path: Path) -> None:
    config = json.loads((data / "stories260K" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))
    (tmp_path / SINGLE).write_bytes((data / "stories260K" / SINGLE).read_bytes())
    with pytest.raises(ValueError, match="9 missing: model.layers.5"):
        run("inspect", tmp_path)


def test_the_memory_of_a_step_is_what_autograd_keeps(stories: Llm) -> None:
    """Bytes of the distinct storages that a forward pass saves, against the estimate."""
    adapters = Adapters(stories.config, LoraSettings(r=4))
    pack, seen = pack_documents([[1] * 300]), {}

    def pack_hook(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {t.untyped_storage().data_ptr() for t in stories.model.destinations().values()}
    own |= {adapters.flat_P.untyped_storage().data_ptr()}

    def attend(layer: int, heads: Heads) -> torch.Tensor:
        return attention(*heads, pack.documents, "sdpa")  # ours for CPUs keeps more, to be fast

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda t: t):
        stories.model(pack.ids_T, pack.positions_T, attend, adapters)
    kept = sum(size for place, size in seen.items() if place not in own)
    estimate = training_bytes(stories.config, 0, 300, 4) - training_bytes(stories.config, 0, 0, 4)
    assert 0.5 < kept / estimate < 2


# ---- convert -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_twice_is_the_same(data: Path, tmp_path: Path, family: str) -> None:
    run("convert", data / "families" / family, tmp_path / "hf", "--shard-gb", 1e-5)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    run("convert", tmp_path / "hf", tmp_path / "again", "--dtype", "float32")
    before, after = weights(data / "families" / family), weights(tmp_path / "again")
    assert all(torch.equal(before[name], after[name]) for name in before)
    first = open_checkpoint(data / "families" / family).config
    assert open_checkpoint(tmp_path / "again").config == first


@pytest.mark.parametrize("family", ["llama", "llama3", "wide_heads", "mistral"])
def test_meta_s_form_and_back(data: Path, tmp_path: Path, family: str) -> None:
    run("convert", data / "families" / family, tmp_path / "meta", "--to", "meta")
    assert sorted(p.name for p in (tmp_path / "meta").iterdir()) == [
        "consolidated.00.pth",
        "params.json",
    ]
    before, after = weights(data / "families" / family), weights(tmp_path / "meta")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_meta_s_real_file_is_written_as_it_was(data: Path, tmp_path: Path) -> None:
    run("convert", data / "stories260K", tmp_path / "meta", "--to", "meta")
    written = torch.load(tmp_path / "meta" / "consolidated.00.pth")
    original = torch.load(data / "stories260K_meta" / "consolidated.00.pth")
    assert all(torch.equal(original[name], tensor) for name, tensor in written.items())
    assert written.keys() == original.keys() - {"output.weight"}


def test_meta_s_form_cannot_hold_qwen(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot hold a model of the family qwen2"):
        run("convert", data / "families" / "qwen2", tmp_path / "meta", "--to", "meta")
    assert not (tmp_path / "meta").exists()


def test_the_tokenizer_goes_along(data: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_checkpoint(
        source, open_checkpoint(data / "stories260K").config, weights(data / "stories260K")
    )
    tokenizer = data / "tokenizers" / "stories260K_tok512.model"
    (source / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    text = run("convert", source, tmp_path / "out").output
    assert "tokenizer.model" in text
    found = load_tokenizer(tmp_path / "out")
    assert found.fingerprint == load_tokenizer(tokenizer).fingerprint


@pytest.mark.parametrize("form", ["safetensors", "meta"])
def test_nothing_is_overwritten(data: Path, tmp_path: Path, form: str) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ValueError, match="exists and is not empty"):
        run("convert", data / "stories260K", tmp_path, "--to", form)
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


# ---- merge -------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["seven", "two", "patterned"])
def test_merge_adds_the_adapter_and_prints_the_difference(
    data: Path, tmp_path: Path, stories: Llm, adapter: str
) -> None:
    folder = data / "peft_golden" / adapter
    text = run("merge", data / "stories260K", folder, tmp_path / "m").output
    expected = dict(merged_tensors(stories.model, Adapters.load(folder, stories.config)))
    written = load_file(tmp_path / "m" / SINGLE)
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    found = re.search(r"against model and adapter: (\S+) \(largest logit (\S+)\)", text)
    assert found is not None
    assert 0 < float(found[1]) < 1e-4 < 1 < float(found[2])


def test_a_merge_rounded_to_bfloat16_prints_a_larger_difference(data: Path, tmp_path: Path) -> None:
    folder = data / "peft_golden" / "seven"
    text = run("merge", data / "stories260K", folder, tmp_path / "m", "--dtype", "bfloat16").output
    found = re.search(r"and adapter: (\S+) ", text)
    assert found is not None
    assert 1e-3 < float(found[1]) < 1


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_are_the_model_s(data: Path, family: str) -> None:
    checkpoint = open_checkpoint(data / "families" / family)
    model = Llama(checkpoint.config)
    checkpoint.load_into(model.destinations())
    pack = pack_documents([[1, 5, 9, 60], [1, 2]])
    asked: list[str] = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return checkpoint.tensors[name].read()

    streamed = streamed_logits(checkpoint.config, read, pack)
    with torch.inference_mode():
        assert (streamed - model.logits(pack)).abs().max() < 1e-5
    assert sorted(asked) == sorted(checkpoint.config.tensor_shapes())


# ---- GGUF --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "allowed"), [("f32", 0.0), ("f16", 1e-3), ("q8_0", 2e-2)])
def test_exported_gguf_is_read_back(
    data: Path, tmp_path: Path, family: str, kind: str, allowed: float
) -> None:
    source, path = data / "families" / family, tmp_path / "m.gguf"
    tokenizer = data / "tokenizers" / "digits_bpe" / "tokenizer.json"
    if open_checkpoint(source).config.vocab_size < load_tokenizer(tokenizer).vocab_size:
        tokenizer = tiny_words(tmp_path)
    run("export-gguf", source, path, "--type", kind, "--tokenizer", tokenizer)
    before, after = weights(source), weights(path)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (after[name] - tensor).abs().max() <= allowed * tensor.abs().max()
    config, first = open_checkpoint(path).config, open_checkpoint(source).config
    assert (config.num_heads, config.rope_base) == (first.num_heads, first.rope_base)
    if isinstance(first.rope_scaling, Llama3RopeScaling):
        assert config.rope_scaling == first.rope_scaling


def tiny_words(folder: Path) -> Path:
    """A byte-level BPE of 90 tokens, for a model of 96 rows."""
    letters = [chr(code) for code in range(0x21, 0x79)]
    vocab = {text: token for token, text in enumerate([*letters, "ab"])}
    path = folder / "tokenizer.json"
    model = {"type": "BPE", "vocab": vocab, "merges": ["a b"]}
    path.write_text(
        json.dumps(
            {"model": model, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
        )
    )
    return path


def test_the_gguf_package_reads_what_we_export(data: Path, tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "m.gguf", data / "tokenizers" / "stories260K_tok512.model"
    run("export-gguf", data / "stories260K", path, "--type", "q8_0", "--tokenizer", tokenizer)
    reader = gguf.GGUFReader(path)
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    # 172 is no multiple of 32
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert reader.get_field("tokenizer.ggml.model").contents() == "llama"  # type: ignore[union-attr]
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()  # type: ignore[union-attr]
    assert tokens[:3] == ["<unk>", "<s>", "</s>"]
    types = reader.get_field("tokenizer.ggml.token_type").contents()  # type: ignore[union-attr]
    assert types[:4] == [2, 3, 3, 6]
    norm = next(t for t in reader.tensors if t.name == "output_norm.weight")
    assert np.array_equal(norm.data, weights(data / "stories260K")["model.norm.weight"].numpy())


def test_the_tokenizer_of_an_exported_gguf_is_the_same(
    data: Path, tmp_path: Path, stories: Llm
) -> None:
    words = load_tokenizer(data / "tokenizers" / "llama3_bpe" / "tokenizer.json")
    config = LlamaConfig(**vars(stories.config) | {"vocab_size": words.vocab_size + 5})
    model = Llama(config)
    model.randomise(0)
    save_checkpoint(tmp_path / "m", config, merged_tensors(model, None))
    path = tmp_path / "m.gguf"
    source = data / "tokenizers" / "llama3_bpe" / "tokenizer.json"
    run("export-gguf", tmp_path / "m", path, "--tokenizer", source)
    again = load(path, dtype="float32", device="cpu").tokenizer
    text = "Ataxia-telangiectasia: 12345 mg, it's \u03b2-blocker\n\n  x"
    assert again.encode(text) == words.encode(text)
    assert (again.bos_id, again.eos_id, again.adds_bos) == (
        words.bos_id,
        words.eos_id,
        words.adds_bos,
    )
    assert again.control_ids >= words.control_ids


def test_a_tokenizer_without_a_leading_blank_keeps_to_that(data: Path, tmp_path: Path) -> None:
    source = data / "tokenizers" / "stories260k_json" / "tokenizer.json"
    content = json.loads(source.read_text("utf-8"))
    steps = content["normalizer"]["normalizers"]
    content["normalizer"]["normalizers"] = [s for s in steps if s["type"] != "Prepend"]
    bare, path = tmp_path / "tokenizer.json", tmp_path / "m.gguf"
    bare.write_text(json.dumps(content))
    run("export-gguf", data / "stories260K", path, "--tokenizer", bare)
    again = load_tokenizer(path)
    assert again.encode("once upon") == load_tokenizer(bare).encode("once upon")
    assert again.encode("once upon") != load_tokenizer(source).encode("once upon")


def test_weights_too_large_for_float16_are_refused(
    stories: Llm, data: Path, tmp_path: Path
) -> None:
    tensors = {name: t.clone() for name, t in stories.model.destinations().items()}
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 70000
    save_checkpoint(tmp_path / "m", stories.config, tensors)
    tokenizer = data / "tokenizers" / "stories260K_tok512.model"
    with pytest.raises(
        ValueError, match="up_proj.weight reaches 70000, which torch.float16 cannot hold"
    ):
        run("export-gguf", tmp_path / "m", tmp_path / "m.gguf", "--tokenizer", tokenizer)
    assert not (tmp_path / "m.gguf").exists()


# ---- the command line --------------------------------------------------------------------------


def test_the_module_is_a_command(data: Path) -> None:
    command_line = [sys.executable, "-m", "bioinstruct.model.checkpoint"]
    done = subprocess.run(
        [*command_line, "inspect", data / "nothing"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "does not exist" in done.stderr
    assert "Traceback" not in done.stderr
    assert subprocess.run([*command_line, "melt"], capture_output=True).returncode == 2
