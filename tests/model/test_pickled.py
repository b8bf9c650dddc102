"""PyTorch's pickled files and Meta's form: the real one, and every way to break one."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bioinstruct.model import Llm, load
from bioinstruct.model.checkpoint import open_checkpoint, save_checkpoint
from bioinstruct.model.checkpoint_cli import command
from bioinstruct.model.formats.config_json import config_to_hf
from bioinstruct.model.formats.pickled import read_pickled
from bioinstruct.model.formats.pickled_writer import PickledFile
from bioinstruct.model.llama import Llama

Q = "layers.3.attention.wq.weight"


def loaded(path: Path) -> Llama:
    checkpoint = open_checkpoint(path)
    model = Llama(checkpoint.config)
    checkpoint.load_into(model.destinations())
    return model


@pytest.fixture
def folder(data: Path, tmp_path: Path) -> Path:
    """A copy of a real model in Meta's form, to be broken."""
    return Path(shutil.copytree(data / "stories260K_meta", tmp_path / "meta"))


def change(folder: Path, edit: Callable[[dict[str, Any]], Any], name: str = "00") -> None:
    path = folder / f"consolidated.{name}.pth"
    tensors = {key: t.clone() for key, t in torch.load(path).items()}
    edit(tensors)
    torch.save(tensors, path)


def set_params(folder: Path, **keys: Any) -> None:
    path = folder / "params.json"
    params = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({k: v for k, v in params.items() if v is not None}))


# ---- Meta's form -------------------------------------------------------------------------------


def test_meta_s_real_file_is_the_model_of_the_other_form(stories: Llm, data: Path) -> None:
    model = loaded(data / "stories260K_meta")
    ours = model.destinations()
    assert all(torch.equal(ours[n], t) for n, t in stories.model.destinations().items())
    config = model.config
    assert (config.max_positions, config.bos_id, config.eos_ids) == (512, 1, (2,))


def test_meta_s_real_file_gives_the_reference_logits(data: Path) -> None:
    tokenizer = data / "tokenizers" / "stories260K_tok512.model"
    llm = load(data / "stories260K_meta", dtype="float32", device="cpu", tokenizer=tokenizer)
    golden = np.load(data / "stories260K" / "stories260K_golden.npz")
    logits = llm.logits([golden["ids"].tolist()])[0].numpy()
    assert np.abs(logits[:8] - golden["logits_first8"]).max() < 5e-5
    assert np.abs(logits[-1] - golden["logits_last"]).max() < 5e-5


@pytest.mark.parametrize(
    ("keys", "context", "factor"),
    [
        ({"max_seq_len": None}, 4096, None),
        ({"max_seq_len": None, "norm_eps": 1e-6}, 2048, None),
        ({"max_seq_len": None, "rope_theta": 1e6}, 16384, None),
        ({"max_seq_len": None, "use_scaled_rope": True}, 131072, 32.0),
        ({"use_scaled_rope": True, "rope_scaling_factor": 8}, 512, 8.0),
    ],
)
def test_context_and_stretch_follow_the_release(
    folder: Path, keys: dict[str, Any], context: int, factor: float | None
) -> None:
    set_params(folder, **keys)
    config = open_checkpoint(folder).config
    assert config.max_positions == context
    assert getattr(config.rope_scaling, "factor", None) == factor


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"dim": None}, "params.json: the key dim is missing"),
        ({"dim": "64"}, "params.json: dim is '64'; it must be a whole number"),
        ({"n_heads": 7}, "n_heads is 7; it must divide dim, 64"),
        ({"n_heads": 0}, "n_heads is 0; it must divide"),
        ({"vocab_size": 500}, "vocab_size is 500; the embedding has 512 rows"),
        ({"moe": {"num_experts": 8}}, "moe is .*; such a setting is not computed here"),
        ({"n_layers": 6}, "9 missing: model.layers.5"),
        ({"n_layers": 4}, "9 unknown: model.layers.4"),
        ({"norm_eps": None}, "the key norm_eps is missing"),
        ({"n_kv_heads": 8}, r"k_proj.weight is \(32, 64\), expected \(64, 64\)"),
    ],
)
def test_params_that_do_not_fit(folder: Path, keys: dict[str, Any], sentence: str) -> None:
    set_params(folder, **keys)
    with pytest.raises(ValueError, match=sentence):
        loaded(folder)


@pytest.mark.parametrize(
    ("content", "sentence"), [(None, "is missing"), (b"{", "not valid JSON"), (b"[]", "expected")]
)
def test_params_that_are_broken(folder: Path, content: bytes | None, sentence: str) -> None:
    (folder / "params.json").unlink()
    if content is not None:
        (folder / "params.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"params.json.* {sentence}"):
        open_checkpoint(folder)


@pytest.fixture
def two(folder: Path) -> Path:
    """The same model in two parts."""
    whole = torch.load(folder / "consolidated.00.pth")
    for part in range(2):
        rows = {}
        for name, tensor in whole.items():
            along = 1 if any(k in name for k in ("wo", "w2", "tok_emb")) else 0
            cut = tensor.ndim == 2
            rows[name] = (tensor.chunk(2, along)[part] if cut else tensor).clone()
        torch.save(rows, folder / f"consolidated.{part:02d}.pth")
    return folder


def test_two_parts_are_one_model(two: Path, stories: Llm) -> None:
    ours = loaded(two).destinations()
    assert all(torch.equal(ours[n], t) for n, t in stories.model.destinations().items())
    # either part stands for the whole
    assert open_checkpoint(
        two / "consolidated.01.pth"
    ).names() == stories.config.tensor_shapes() | {"lm_head.weight": (512, 64)}


def test_a_part_that_is_missing_is_counted(two: Path) -> None:
    (two / "consolidated.01.pth").unlink()
    with pytest.raises(ValueError, match=r"holds 1 of 2 parts \(consolidated.NN.pth\); copy the"):
        open_checkpoint(two)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda t: t.pop(Q), f"{Q} is in this part or in consolidated.00.pth, not in both"),
        (lambda t: t.update({Q: t[Q][:30]}), f"{Q} has parts of different shapes"),
        (lambda t: t["norm.weight"].add_(1), "norm.weight differs between the parts"),
        (lambda t: t[Q].view(-1)[3:4].fill_(torch.nan), "q_proj.weight holds NaN"),
        (lambda t: t.update({Q: t[Q].int()}), "of a type that is not read"),
    ],
)
def test_parts_that_do_not_belong_together(
    two: Path, edit: Callable[[dict[str, Any]], Any], sentence: str
) -> None:
    change(two, edit, "01")
    with pytest.raises(ValueError, match=sentence):
        loaded(two)


# ---- what we write -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mapped", [True, False])
def test_torch_reads_what_we_write(tmp_path: Path, dtype: torch.dtype, mapped: bool) -> None:
    tensors = {f"layer.{n}": torch.arange(n * 3.0).view(n, 3).to(dtype) for n in (1, 2, 7, 50)} | {
        "one": torch.ones(5, dtype=dtype)
    }
    path = tmp_path / "consolidated.00.pth"
    with closing(PickledFile(path)) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor)
    read = torch.load(path, weights_only=True, mmap=mapped)
    assert list(read) == list(tensors)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        whole = path.read_bytes()
        for number, tensor in enumerate(tensors.values()):
            data = tensor.view(torch.uint8).numpy().tobytes()
            assert archive.read(f"consolidated.00/data/{number}") == data
            if len(data) > 30:
                assert whole.index(data) % 64 == 0


@pytest.mark.parametrize("form", [["convert", "--to", "meta"], ["convert"], ["export-gguf"]])
def test_no_form_is_written_with_weights_that_are_not_finite(
    stories: Llm, data: Path, tmp_path: Path, form: list[str]
) -> None:
    tensors = {name: t.clone() for name, t in stories.model.destinations().items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(data / "stories260K" / "config.json", tmp_path)
    words = data / "tokenizers" / "stories260K_tok512.model"
    shutil.copy(words, tmp_path / "tokenizer.model")
    flags = [form[0], str(tmp_path), str(tmp_path / "out"), *form[1:]]
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight holds NaN"):
        command.main(flags, standalone_mode=False)
    assert not (tmp_path / "out").exists()


# ---- hostile and broken pickles ----------------------------------------------------------------


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def saved(content: Any, path: Path, *, zipped: bool) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, zipped: bool) -> None:
    target = tmp_path / "owned"
    saved({"a": torch.ones(2), "b": Evil(target)}, tmp_path / "m.bin", zipped=zipped)
    with pytest.raises(ValueError, match="holds the Python object .*system.*; nothing was run"):
        read_pickled(tmp_path / "m.bin")
    assert not target.exists()


def test_a_plain_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    target = tmp_path / "owned"
    (tmp_path / "m.bin").write_bytes(pickle.dumps({"a": Evil(target)}, protocol=2))
    with pytest.raises(ValueError, match="m.bin: "):
        read_pickled(tmp_path / "m.bin")
    assert not target.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([torch.ones(1)], "must be a table of named tensors"),
        ({"model": {"w": torch.ones(1)}}, "'model' is a dict; the file must hold named tensors"),
        ({"epoch": 3, "w": torch.ones(1)}, "'epoch' is a int"),
        ({7: torch.ones(1)}, "7 is a Tensor"),
    ],
)
def test_what_is_no_table_of_tensors(
    tmp_path: Path, content: Any, sentence: str, zipped: bool
) -> None:
    saved(content, tmp_path / "m.bin", zipped=zipped)
    with pytest.raises(ValueError, match=sentence):
        read_pickled(tmp_path / "m.bin")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0.01, 0.5, 0.99])
def test_a_file_cut_short(tmp_path: Path, zipped: bool, keep: float) -> None:
    path = tmp_path / "m.bin"
    saved({"w": torch.ones(64, 64)}, path, zipped=zipped)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(ValueError, match="m.bin: (not a whole PyTorch|holds the Python obj)"):
        read_pickled(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_claim_of_ten_gigabytes_in_a_small_file(tmp_path: Path, zipped: bool) -> None:
    """A storage said to hold 2.5e9 numbers; only the size in the pickle is changed."""
    path, claim = tmp_path / "m.bin", 2_500_000_000
    saved({"w": torch.ones(11)}, path, zipped=zipped)
    small, large = b"K\x0b", b"\x8a\x05" + claim.to_bytes(5, "little")
    if zipped:
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content.replace(small, large))
    else:
        path.write_bytes(path.read_bytes().replace(small, large))
    with pytest.raises(ValueError, match="m.bin: not a whole PyTorch file"):
        read_pickled(path)


@pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x02", b"PK\x03\x04" + bytes(50)])
def test_junk(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.bin").write_bytes(content)
    with pytest.raises(ValueError, match="m.bin: "):
        read_pickled(tmp_path / "m.bin")


def test_tensors_of_other_kinds_are_reported_where_they_are_wanted(
    stories: Llm, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "m", stories.config, stories.model.destinations())
    tensors: dict[str, Tensor] = {
        name: stored.read() for name, stored in open_checkpoint(tmp_path / "m").tensors.items()
    }
    tensors["model.norm.weight"] = torch.ones(64).to_sparse()
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="of a type that is not read: model.norm.weight"):
        loaded(tmp_path / "m")


def test_an_index_cannot_lead_out_of_its_folder(stories: Llm, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(stories.config)))
    index = {"weight_map": {"w": "../secret.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="weight_map holds '../secret.bin'"):
        open_checkpoint(tmp_path)
