"""The flat buffer and PEFT's files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bioinstruct.model import Llm
from bioinstruct.model.adapters import TARGETS, Adapters, LoraSettings


def made(stories: Llm, seed: int = 0, **settings: object) -> Adapters:
    adapters = Adapters(stories.config, LoraSettings(r=4, alpha=6.0, **settings))  # type: ignore[arg-type]
    adapters.initialise(seed)
    with torch.no_grad():
        adapters.flat_P.add_(0.1)
    return adapters


@pytest.mark.parametrize("targets", [("q_proj",), ("v_proj", "down_proj"), tuple(TARGETS)])
def test_saved_and_loaded_is_equal(stories: Llm, tmp_path: Path, targets: tuple[str, ...]) -> None:
    adapters = made(stories, targets=targets)
    adapters.save(tmp_path, "base")
    loaded = Adapters.load(tmp_path, stories.config)
    assert torch.equal(loaded.flat_P, adapters.flat_P)
    assert loaded.settings.scale == adapters.settings.scale == 1.5
    assert set(loaded.settings.targets) == set(targets)


def test_file_has_pefts_names_shapes_and_meaning(stories: Llm, tmp_path: Path) -> None:
    made(stories, targets=("q_proj", "up_proj")).save(tmp_path, "my/base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.3.mlp.up_proj.lora_{}.weight"
    assert tensors[key.format("A")].shape == (4, 64)
    assert tensors[key.format("B")].shape == (172, 4)
    assert len(tensors) == 5 * 2 * 2
    assert all(t.dtype == torch.float32 for t in tensors.values())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["bias"]) == (4, 6.0, "none")
    assert config["target_modules"] == ["q_proj", "up_proj"]
    assert config["base_model_name_or_path"] == "my/base"


def test_initialisation_is_pefts_and_seeded(stories: Llm) -> None:
    settings = LoraSettings(r=64)
    one, two, three = (Adapters(stories.config, settings) for _ in range(3))
    for adapters, seed in ((one, 1), (two, 1), (three, 2)):
        adapters.initialise(seed)
    assert torch.equal(one.flat_P, two.flat_P)
    assert not torch.equal(one.flat_P, three.flat_P)
    for module in one.modules:
        bound = module.a_RK.shape[1] ** -0.5
        assert module.a_RK.abs().max() <= bound
        # the variance of the uniform distribution that kaiming with a = sqrt(5) amounts to
        assert float(module.a_RK.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not module.b_NR.any()


def test_masters_are_views_of_one_buffer(stories: Llm) -> None:
    adapters = made(stories)
    with torch.no_grad():
        adapters.flat_P.zero_()
    assert not any(m.a_RK.any() or m.b_NR.any() for m in adapters.modules)
    assert sum(m.a_RK.numel() + m.b_NR.numel() for m in adapters.modules) == len(adapters.flat_P)


@pytest.fixture
def folder(stories: Llm, tmp_path: Path) -> Path:
    made(stories).save(tmp_path, "base")
    return tmp_path


def load(stories: Llm, folder: Path) -> Adapters:
    return Adapters.load(folder, stories.config)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bias": "all"}, "bias = 'all' is not supported; allowed is 'none'"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"use_rslora": True}, "use_rslora = True is not supported"),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA' is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern = .* is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["query"]}, "'query' is unknown"),
        ({"target_modules": ".*"}, "must be a list"),
        ({"r": "x"}, "adapter_config.json: "),
        ({"r": 8}, r"lora_A.weight has shape \(4, 64\), the model needs \(8, 64\)"),
        ({"target_modules": ["q_proj"]}, "unknown base_model"),
    ],
)
def test_configurations_that_we_do_not_compute(
    stories: Llm, folder: Path, change: dict[str, object], sentence: str
) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=sentence):
        load(stories, folder)


def test_fields_that_peft_may_leave_out_or_null(stories: Llm, folder: Path) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for key in ("use_dora", "bias", "fan_in_fan_out", "task_type"):
        del config[key]
    config |= {"modules_to_save": [], "rank_pattern": None, "target_modules": "all-linear"}
    path.write_text(json.dumps(config))
    assert len(load(stories, folder).modules) == 35


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_and_broken_files(stories: Llm, folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\x00\x01 nothing")
    with pytest.raises(ValueError, match=name):
        load(stories, folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"has no {name}"):
        load(stories, folder)


def test_wrong_tensors_come_in_one_list(stories: Llm, folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    keys = sorted(tensors)
    del tensors[keys[0]]
    tensors[keys[1]] = torch.full_like(tensors[keys[1]], torch.nan)
    tensors["extra"] = torch.zeros(1)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="not finite numbers; missing .*; unknown extra"):
        load(stories, folder)


def test_a_full_disk_leaves_the_old_adapter(
    stories: Llm, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "adapter_model.safetensors").read_bytes()

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        made(stories, seed=1).save(folder, "base")
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
