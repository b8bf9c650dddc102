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


def test_patterns_choose_ranks_and_scales_as_peft_does(stories: Llm, tmp_path: Path) -> None:
    settings = LoraSettings(
        r=4,
        alpha=6.0,
        rank_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 3, "model.layers.0.mlp.up_proj": 8},
        alpha_pattern={"mlp.*_proj": 1.0, "model.layers.2.self_attn.o_proj": 12.0},
    )
    adapters = Adapters(stories.config, settings)
    found = {(m.layer, m.target): (len(m.a_RK), m.scale) for m in adapters.modules}
    assert found[1, "q_proj"] == (2, 3.0)
    assert found[0, "q_proj"] == found[4, "q_proj"] == (3, 2.0)
    assert found[0, "up_proj"] == (8, 1 / 8)
    assert found[1, "up_proj"] == found[2, "down_proj"] == (4, 1 / 4)
    assert found[2, "o_proj"] == (4, 3.0)
    assert found[3, "o_proj"] == found[0, "v_proj"] == (4, 1.5)
    adapters.save(tmp_path, "base")
    again = Adapters.load(tmp_path, stories.config)
    assert [(len(m.a_RK), m.scale) for m in again.modules] == list(found.values())


@pytest.mark.parametrize("group", ["qkv", "o", "gate_up", "down"])
def test_branches_of_one_scale_do_what_each_module_s_scale_says(stories: Llm, group: str) -> None:
    adapters = made(stories, rank_pattern={"k_proj": 2}, alpha_pattern={"v_proj|up_proj": 3.0})
    modules = [m for m in adapters.modules if m.layer == 2 and TARGETS[m.target][0] == group]
    branches = adapters.branches(2, group)
    assert len(branches) == len(modules)
    for module, branch in zip(modules, branches, strict=True):
        delta = adapters.settings.scale * branch.factor * branch.b_NR @ branch.a_RK
        assert torch.allclose(delta, module.scale * module.b_NR @ module.a_RK, atol=1e-6)


def test_rslora_divides_by_the_root_of_the_rank(stories: Llm) -> None:
    settings = LoraSettings(r=16, alpha=8.0, rslora=True, rank_pattern={"q_proj": 4})
    scales = {m.target: m.scale for m in Adapters(stories.config, settings).modules}
    assert scales["q_proj"] == 4.0
    assert scales["v_proj"] == settings.scale == 2.0


@pytest.mark.parametrize(
    ("chosen", "targets", "layers"),
    [
        ({"target_modules": ["self_attn.q_proj", "v_proj"]}, {"q_proj", "v_proj"}, set(range(5))),
        ({"target_modules": r".*self_attn\.(q|v)_proj"}, {"q_proj", "v_proj"}, set(range(5))),
        ({"target_modules": r".*\.[13]\..*down_proj"}, {"down_proj"}, {1, 3}),
        ({"layers_to_transform": [4, 0]}, set(TARGETS), {0, 4}),
        ({"layers_to_transform": 2}, set(TARGETS), {2}),
    ],
)
def test_modules_are_chosen_as_peft_chooses_them(
    stories: Llm, folder: Path, chosen: dict[str, object], targets: set[str], layers: set[int]
) -> None:
    config = json.loads((folder / "adapter_config.json").read_text()) | chosen
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {
        key: t
        for key, t in tensors.items()
        if int(key.split(".")[4]) in layers and key.split(".")[6] in targets
    }
    save_file(kept, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = load(stories, folder)
    assert {m.target for m in found.modules} == targets
    assert {m.layer for m in found.modules} == layers
    found.save(folder / "again", "base")
    assert torch.equal(load(stories, folder / "again").flat_P, found.flat_P)


def test_a_layer_that_the_model_lacks_is_refused(stories: Llm) -> None:
    with pytest.raises(ValueError, match="lora.layers names layer 5; the model has 0 to 4"):
        Adapters(stories.config, LoraSettings(layers=(1, 5)))


def test_an_adapter_is_continued_with_its_own_shape(stories: Llm, folder: Path) -> None:
    asked = LoraSettings(init_from=str(folder), dropout=0.1, plus_ratio=4.0, r=4)
    going_on = Adapters.starting(stories.config, asked, "cpu", 0)
    assert torch.equal(going_on.flat_P, load(stories, folder).flat_P)
    settings = going_on.settings
    assert (settings.r, settings.alpha, settings.dropout, settings.plus_ratio) == (4, 6.0, 0.1, 4.0)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"r": 8}, "lora.r = 8 contradicts lora.init_from: the adapter in .* has 4"),
        ({"alpha": 1.0}, "lora.alpha = 1.0 contradicts"),
        ({"targets": ("q_proj",)}, "lora.targets = .* contradicts"),
        ({"rslora": True}, "leave lora.rslora out"),
    ],
)
def test_a_continued_adapter_cannot_be_given_another_shape(
    stories: Llm, folder: Path, asked: dict[str, object], sentence: str
) -> None:
    settings = LoraSettings(init_from=str(folder), **asked)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=sentence):
        Adapters.starting(stories.config, settings, "cpu", 0)


def load(stories: Llm, folder: Path) -> Adapters:
    return Adapters.load(folder, stories.config)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bias": "all"}, "bias = 'all' is not supported; allowed is 'none'"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA' is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, r"lora_A.weight has shape \(4, 64\), .* needs \(2, 64\)"),
        ({"rank_pattern": [2]}, r"rank_pattern = \[2\] must be an object"),
        ({"rank_pattern": {"q_proj": 0}}, r"lora.rank_pattern.q_proj = 0 is out of range"),
        ({"alpha_pattern": {"(q": 2}}, r"the pattern '\(q' cannot be read"),
        ({"alpha_pattern": {"q_proj": -1}}, "lora.alpha_pattern.q_proj = -1.0 must be a positive"),
        ({"layers_to_transform": [5]}, r"layers_to_transform = \[5\] must be layers from 0 to 4"),
        ({"layers_to_transform": ["1"]}, "must be layers from 0 to 4"),
        (
            {"layers_to_transform": [1], "layers_pattern": "h"},
            "layers_pattern = 'h' must be layers",
        ),
        ({"trainable_token_indices": [7]}, "embeddings are not trained here yet"),
        (
            {"target_modules": ["q_proj", "input_layernorm"]},
            "input_layernorm cannot be trained yet",
        ),
        ({"target_modules": "(q"}, r"target_modules = '\(q' cannot be read"),
        ({"target_modules": "h.0.q"}, "'h.0.q' matches no projection"),
        ({"target_modules": r".*(0.*q|1.*k)_proj"}, "other projections in some layers"),
        ({"target_modules": 3}, "must be a list of q_proj"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["query"]}, "'query' is unknown"),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_the_masters_follow_them(stories: Llm, dtype: torch.dtype) -> None:
    adapters = made(stories, rank_pattern={"k_proj": 2}, alpha_pattern={"v_proj": 3.0})
    for _ in range(2):
        for group in ("qkv", "gate_up", "down"):
            copies = adapters.copies(1, group, dtype)
            branches = adapters.branches(1, group)
            assert copies is not None
            stacked = torch.cat([branch.a_RK for branch in branches])
            assert torch.equal(copies.a_RK, stacked.to(dtype))
            gradients = [branch.a_RK.grad for branch in branches]
            assert torch.equal(copies.a_grad_RK, torch.cat(gradients))  # type: ignore[arg-type]
            scale, rank = adapters.settings.scale, 0
            for copy, branch in zip(copies.branches, branches, strict=True):
                exact = branch.b_NR * (scale * branch.factor)
                torch.testing.assert_close(copy.b_NR, exact.to(dtype), rtol=1e-6, atol=0)
                assert copy.grad_NR is branch.b_NR.grad
                assert copy[2:] == (pytest.approx(scale * branch.factor), branch.start, rank)
                rank += len(branch.a_RK)
        with torch.no_grad():
            adapters.grad_P.normal_()
            adapters.flat_P.mul_(-2.5)


def test_a_twin_has_the_same_masters_and_a_gradient_of_its_own(stories: Llm) -> None:
    adapters = made(stories, rank_pattern={"k_proj": 2})
    before = adapters.copies(0, "qkv", torch.float32)
    twin = adapters.twin()
    with torch.no_grad():
        adapters.grad_P.fill_(3.0)
        adapters.flat_P.normal_()
    assert not twin.grad_P.any()
    for own, other in zip(adapters.modules, twin.modules, strict=True):
        assert torch.equal(own.a_RK, other.a_RK) and torch.equal(own.b_NR, other.b_NR)
        assert other.b_NR.grad is not None
        other.b_NR.grad.fill_(1.0)
    assert twin.grad_P[: twin.num_a].sum() == 0 and twin.grad_P[twin.num_a :].min() == 1
    assert bool((adapters.grad_P == 3).all())
    copies = twin.copies(0, "qkv", torch.float32)
    assert before is not None and copies is not None
    assert torch.equal(copies.a_RK, torch.cat([m.a_RK for m in adapters.modules[:3]]))


def test_a_layer_without_adapters_has_no_copies(stories: Llm) -> None:
    assert made(stories, targets=("q_proj",)).copies(0, "down", torch.float32) is None
