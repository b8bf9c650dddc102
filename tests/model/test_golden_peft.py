"""PEFT's adapters, read and written: against what peft and transformers computed on the same files.

data/peft_golden/make.py made the files, with the versions in its made.json; neither library is
needed here.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bioinstruct.model import Llm
from bioinstruct.model.adapters import CONFIG, TARGETS, WEIGHTS, Adapters, LoraSettings
from bioinstruct.model.config import LlamaConfig

UP_A = "base_model.model.model.layers.3.mlp.up_proj.lora_A.weight"
Q_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def logits(llm: Llm, adapters: Adapters | None, golden: dict[str, np.ndarray]) -> np.ndarray:
    adapted = Llm(llm.path, llm.model, llm.tokenizer, adapters)
    documents = [golden["ids_0"].tolist(), golden["ids_1"].tolist()]
    return torch.cat(adapted.logits(documents)).numpy()


# ---- what peft wrote, and what it read of ours -------------------------------------------------


@pytest.mark.parametrize("name", ["seven", "two", "patterned"])
def test_peft_s_adapters_give_peft_s_logits(
    stories: Llm, peft: Path, golden: dict[str, np.ndarray], name: str
) -> None:
    adapters = Adapters.load(peft / name, stories.config)
    found = logits(stories, adapters, golden)
    assert np.abs(found - golden[name]).max() < 1e-4
    # the numbers would not show a forgotten adapter if it did little
    assert np.abs(golden[name] - golden["plain"]).max() > 1


def test_without_an_adapter(stories: Llm, golden: dict[str, np.ndarray]) -> None:
    assert np.abs(logits(stories, None, golden) - golden["plain"]).max() < 1e-4


def test_patterned_differs_in_every_way(stories: Llm, peft: Path) -> None:
    adapters = Adapters.load(peft / "patterned", stories.config)
    assert adapters.settings.rslora
    assert {m.layer for m in adapters.modules} == {0, 2, 4}
    assert {(len(m.a_RK), round(m.scale, 6)) for m in adapters.modules} == {
        (4, 3.0),
        (4, 4.0),
        (2, round(6 / 2**0.5, 6)),
    }


@pytest.mark.parametrize("scale", [0.99, 1.01])
def test_the_tolerance_sees_a_wrong_scale(
    stories: Llm, peft: Path, golden: dict[str, np.ndarray], scale: float
) -> None:
    adapters = Adapters.load(peft / "seven", stories.config)
    with torch.no_grad():
        for module in adapters.modules:
            module.b_NR.mul_(scale)
    assert np.abs(logits(stories, adapters, golden) - golden["seven"]).max() > 1e-2


def test_settings_are_read(stories: Llm, peft: Path) -> None:
    seven = Adapters.load(peft / "seven", stories.config).settings
    assert (seven.r, seven.alpha, seven.scale, seven.dropout) == (4, 6.0, 1.5, 0.0)
    assert set(seven.targets) == set(TARGETS)
    two = Adapters.load(peft / "two", stories.config)
    assert (two.settings.r, two.settings.scale) == (8, 2.0)
    assert {m.target for m in two.modules} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("name", ["seven", "two", "patterned"])
def test_our_file_holds_what_peft_s_holds(
    stories: Llm, peft: Path, tmp_path: Path, name: str
) -> None:
    Adapters.load(peft / name, stories.config).save(tmp_path, "stories260K")
    ours, theirs = load_file(tmp_path / WEIGHTS), load_file(peft / name / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    # `two` was stored in bfloat16, of which every number is a float32
    assert all(torch.equal(ours[key], theirs[key].float()) for key in ours)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_our_configuration_is_the_one_peft_opened(stories: Llm, peft: Path, tmp_path: Path) -> None:
    Adapters.load(peft / "seven", stories.config).save(tmp_path, "stories260K")
    ours, opened = (folder / CONFIG for folder in (tmp_path, peft / "exported"))
    assert json.loads(ours.read_text()) == json.loads(opened.read_text()), (
        "what we write changed: let peft open it once (tests/data/peft_golden/make.py)"
    )


@pytest.mark.parametrize("name", ["seven", "two", "patterned"])
def test_our_configuration_says_what_peft_s_says(
    stories: Llm, peft: Path, tmp_path: Path, name: str
) -> None:
    Adapters.load(peft / name, stories.config).save(tmp_path, "stories260K")
    ours = json.loads((tmp_path / CONFIG).read_text())
    theirs = json.loads((peft / name / CONFIG).read_text())
    for config in (ours, theirs):
        config["target_modules"] = sorted(config["target_modules"])
    assert ours == {key: theirs[key] for key in ours}


TINY = LlamaConfig(
    vocab_size=5,
    hidden_size=6,
    intermediate_size=10,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    norm_eps=1e-5,
    rope_base=1e4,
    rope_scaling=None,
    max_positions=8,
    tied_embeddings=True,
    bos_id=None,
    eos_ids=(),
)


@given(
    st.lists(st.sampled_from(list(TARGETS)), min_size=1, unique=True),
    st.integers(1, 9),
    st.floats(0.01, 1e4),
    st.floats(0, 0.99),
    st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_what_is_saved_is_what_is_loaded(
    tmp_path_factory: pytest.TempPathFactory,
    targets: list[str],
    r: int,
    alpha: float,
    dropout: float,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    made = LoraSettings(r=r, alpha=alpha, dropout=dropout, targets=tuple(targets))
    adapters = Adapters(TINY, made)
    with torch.no_grad():
        adapters.flat_P.normal_(generator=torch.Generator().manual_seed(seed))
    adapters.save(folder, "base")
    again = Adapters.load(folder, TINY)
    assert torch.equal(again.flat_P, adapters.flat_P)
    assert set(again.settings.targets) == set(targets)
    assert (again.settings.r, again.settings.alpha, again.settings.dropout) == (r, alpha, dropout)


# ---- adapters that are not what we compute -----------------------------------------------------


@pytest.fixture
def seven(peft: Path, tmp_path: Path) -> Path:
    """A copy of a whole adapter, to be broken."""
    return Path(shutil.copytree(peft / "seven", tmp_path / "seven"))


def set_keys(folder: Path, **keys: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    "keys",
    [
        {"lora_dropout": 0.25, "inference_mode": False, "peft_version": "9"},
        {"init_lora_weights": "gaussian", "revision": "main", "task_type": None},
        {"rank_pattern": None, "alpha_pattern": None, "modules_to_save": []},
        {"target_modules": "all-linear"},
        {"a_key_of_tomorrow": None},
    ],
)
def test_settings_that_change_no_logit_are_passed_over(
    stories: Llm, peft: Path, seven: Path, keys: dict[str, Any]
) -> None:
    set_keys(seven, **keys)
    expected = Adapters.load(peft / "seven", stories.config)
    assert torch.equal(Adapters.load(seven, stories.config).flat_P, expected.flat_P)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("bias", "all"),
        ("fan_in_fan_out", True),
        ("use_dora", True),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("exclude_modules", ["q_proj"]),
        ("alora_invocation_tokens", [3, 4]),
    ],
)
def test_settings_that_we_do_not_compute_are_refused(
    stories: Llm, seven: Path, key: str, value: Any
) -> None:
    set_keys(seven, **{key: value})
    with pytest.raises(ValueError, match=f"{CONFIG}: {key} = .* is not supported; allowed is"):
        Adapters.load(seven, stories.config)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq"])
def test_adapters_of_a_changed_base_are_refused(stories: Llm, seven: Path, start: str) -> None:
    """PEFT takes the first A and B of these out of the weights, which we would leave whole."""
    set_keys(seven, init_lora_weights=start)
    with pytest.raises(ValueError, match=f"init_lora_weights = '{start}' means a changed base"):
        Adapters.load(seven, stories.config)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"r": 0}, "lora.r = 0 is out of range; allowed are 1 to 256"),
        ({"r": "many"}, "invalid literal"),
        ({"r": None}, "NoneType"),
        ({"lora_alpha": -1}, "lora.alpha = -1.0 must be a positive number"),
        ({"lora_alpha": float("nan")}, "lora.alpha = nan must be a positive number"),
        ({"lora_dropout": 1}, "lora.dropout = 1.0 must be at least 0 and below 1"),
        ({"target_modules": []}, "lora.targets is empty"),
        ({"target_modules": ["q_prj"]}, "'q_prj' is unknown; did you mean q_proj"),
        ({"target_modules": ["lm_head"]}, "lm_head cannot carry an adapter"),
        ({"r": 8}, r"lora_A.weight has shape \(4, 64\), the model needs \(8, 64\)"),
        ({"target_modules": ["q_proj", "v_proj"]}, "unknown .*; and 45 more|unknown .* more"),
    ],
)
def test_settings_that_are_wrong_are_named(
    stories: Llm, seven: Path, keys: dict[str, Any], sentence: str
) -> None:
    set_keys(seven, **keys)
    with pytest.raises(ValueError, match=sentence):
        Adapters.load(seven, stories.config)


@pytest.mark.parametrize("field", ["r", "lora_alpha", "target_modules"])
def test_settings_that_are_missing_are_named(stories: Llm, seven: Path, field: str) -> None:
    config = json.loads((seven / CONFIG).read_text())
    del config[field]
    (seven / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"lacks the field '{field}'"):
        Adapters.load(seven, stories.config)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop(UP_A), f"does not fit the model: missing {UP_A}"),
        (lambda t: t.update({"extra.weight": torch.ones(1)}), "unknown extra.weight"),
        (lambda t: t.update({UP_A: t[UP_A].T.contiguous()}), r"has shape \(64, 4\)"),
        (lambda t: t[Q_B].view(-1)[7:8].fill_(torch.nan), f"{Q_B} holds values that are not"),
        (lambda t: t[Q_B].view(-1)[7:8].fill_(torch.inf), f"{Q_B} holds values that are not"),
        (lambda t: t.update({Q_B: t[Q_B].int()}), f"{Q_B} holds values that are not"),
        (lambda t: t.clear(), "missing .* and 65 more"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    stories: Llm, seven: Path, change: Callable[[dict[str, Tensor]], Any], sentence: str
) -> None:
    change_tensors(seven, change)
    with pytest.raises(ValueError, match=sentence):
        Adapters.load(seven, stories.config)


def test_an_adapter_of_another_model_is_refused(seven: Path) -> None:
    with pytest.raises(ValueError, match=f"{WEIGHTS} does not fit the model: .* more"):
        Adapters.load(seven, TINY)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is not valid JSON"),
        (b'{"r": 4', "is not valid JSON"),
        (b"\xff\xfe\x00r", "is not valid JSON"),
        (b"[4]", "must hold a JSON object, not list"),
    ],
)
def test_a_broken_configuration_is_named(
    stories: Llm, seven: Path, content: bytes, sentence: str
) -> None:
    (seven / CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match=f"{CONFIG} {sentence}"):
        Adapters.load(seven, stories.config)


@pytest.mark.parametrize("kept_bytes", [0, 4, 1000, 101167])
def test_a_weights_file_cut_short_is_named(stories: Llm, seven: Path, kept_bytes: int) -> None:
    whole = (seven / WEIGHTS).read_bytes()
    (seven / WEIGHTS).write_bytes(whole[:kept_bytes])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is damaged or no safetensors file"):
        Adapters.load(seven, stories.config)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_missing_file_is_named(stories: Llm, seven: Path, name: str) -> None:
    (seven / name).unlink()
    with pytest.raises(ValueError, match=f"has no {name}; give the folder"):
        Adapters.load(seven, stories.config)
