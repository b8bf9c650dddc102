"""What we export: against what transformers computed on the same files, and the laws of merging.

data/peft_golden/make.py made the numbers, with the versions in its made.json; transformers is not
needed here.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bioinstruct.model import Llm, load
from bioinstruct.model.adapters import Adapters
from bioinstruct.model.checkpoint import SINGLE, open_checkpoint, save_checkpoint
from bioinstruct.model.llama import Llama, pack_documents
from bioinstruct.model.merging import merged_tensors


@pytest.fixture
def seven(stories: Llm, peft: Path) -> Adapters:
    """Seven adapted projections with B that is not zero."""
    return Adapters.load(peft / "seven", stories.config)


def reopened(folder: Path, dtype: torch.dtype = torch.float32) -> Llama:
    checkpoint = open_checkpoint(folder)
    model = Llama(checkpoint.config, dtype=dtype)
    checkpoint.load_into(model.destinations())
    return model


def logits(
    model: Llama, golden: dict[str, np.ndarray], adapters: Adapters | None = None
) -> np.ndarray:
    pack = pack_documents([golden["ids_0"].tolist(), golden["ids_1"].tolist()])
    with torch.no_grad():
        return model.logits(pack, adapters).numpy()


def exact_merge(model: Llama, adapters: Adapters) -> dict[str, Tensor]:
    """W + s B A in float64."""
    tensors = {name: t.double() for name, t in model.destinations().items()}
    for m in adapters.modules:
        name = f"model.layers.{m.layer}.{m.path}.weight"
        update = m.b_NR.detach().double() @ m.a_RK.detach().double()
        tensors[name] = tensors[name] + adapters.settings.scale * update
    return tensors


# ---- what transformers opened ------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [10_000_000, 300_000])
def test_the_plain_export_gives_transformers_logits(
    stories: Llm, golden: dict[str, np.ndarray], tmp_path: Path, max_shard_bytes: int
) -> None:
    tensors = merged_tensors(stories.model, None)
    folder = tmp_path / "plain"
    save_checkpoint(folder, stories.config, tensors, max_shard_bytes=max_shard_bytes)
    model, places = reopened(folder), stories.model.destinations()
    assert all(torch.equal(tensor, places[n]) for n, tensor in model.destinations().items())
    assert np.abs(logits(model, golden) - golden["plain"]).max() < 1e-4


def test_the_merged_export_gives_transformers_logits(
    stories: Llm, golden: dict[str, np.ndarray], seven: Adapters, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "merged", stories.config, merged_tensors(stories.model, seven))
    found = logits(reopened(tmp_path / "merged"), golden)
    assert np.abs(found - golden["merged"]).max() < 1e-4
    # peft, with the adapter beside the model
    assert np.abs(found - golden["seven"]).max() < 1e-4
    assert np.abs(found - golden["plain"]).max() > 1


def test_the_configuration_is_the_one_transformers_opened(
    stories: Llm, peft: Path, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "plain", stories.config, merged_tensors(stories.model, None))
    ours, opened = (folder / "config.json" for folder in (tmp_path / "plain", peft / "exported"))
    assert json.loads(ours.read_text()) == json.loads(opened.read_text()), (
        "what we write changed: let transformers open it once (tests/data/peft_golden/make.py)"
    )


def test_the_weights_file_is_as_transformers_wants_it(
    stories: Llm, data: Path, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "plain", stories.config, merged_tensors(stories.model, None))
    ours, theirs = load_file(tmp_path / "plain" / SINGLE), load_file(data / "stories260K" / SINGLE)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with safe_open(tmp_path / "plain" / SINGLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # refused there without it


def test_versions_and_errors_are_on_record(peft: Path) -> None:
    made = json.loads((peft / "made.json").read_text())
    assert {"transformers", "peft", "torch"} <= made["versions"].keys()
    assert {"seven", "exported seven", "plain", "merged", "smollm2"} <= made[
        "our_largest_errors"
    ].keys()
    assert max(made["our_largest_errors"].values()) < 1e-4


@pytest.mark.slow
def test_smollm2_gives_transformers_logits(smollm2: Path, peft: Path) -> None:
    stored = np.load(peft / "smollm2.npz")
    llm = load(smollm2, dtype="float32", device="cpu")
    found = torch.cat(llm.logits([stored["ids_0"].tolist(), stored["ids_1"].tolist()]))
    # two programs differ by 6e-5 at most, and CPUs round differently
    assert np.abs(found[:, ::768].numpy() - stored["logits"]).max() < 2e-4


# ---- laws of merging ---------------------------------------------------------------------------


def test_merging_adds_the_product_and_rounds_once(stories: Llm, seven: Adapters) -> None:
    exact = exact_merge(stories.model, seven)
    merged = dict(merged_tensors(stories.model, seven))
    assert list(merged) == list(stories.config.tensor_shapes())
    adapted = {f"model.layers.{m.layer}.{m.path}.weight" for m in seven.modules}
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        if name in adapted:
            assert float((tensor - exact[name]).abs().max()) < 1e-6
            assert float((tensor - stories.model.destinations()[name]).abs().max()) > 1e-3
        else:
            assert torch.equal(tensor, stories.model.destinations()[name])


def test_merging_into_bfloat16_rounds_the_sum_alone(seven: Adapters, data: Path) -> None:
    model = reopened(data / "stories260K", torch.bfloat16)
    exact = exact_merge(model, seven)
    for name, tensor in merged_tensors(model, seven):
        assert tensor.dtype == torch.bfloat16
        # half a unit in the last place is 2^-8 at most; the rest is float32's own rounding
        error = (tensor.double() - exact[name]).abs()
        assert bool((error <= 2**-8 * exact[name].abs() + 1e-6).all())


def test_merging_leaves_the_model_as_it_was(stories: Llm, seven: Adapters) -> None:
    before = {name: t.clone() for name, t in stories.model.destinations().items()}
    adapters_before = seven.flat_P.clone()
    merged = dict(merged_tensors(stories.model, seven))
    for name, tensor in merged.items():
        assert torch.equal(stories.model.destinations()[name], before[name])
        assert not tensor.requires_grad
    assert torch.equal(seven.flat_P, adapters_before)


def test_an_adapter_of_zeros_changes_no_bit(stories: Llm, seven: Adapters) -> None:
    with torch.no_grad():
        for module in seven.modules:
            module.b_NR.zero_()
    places = stories.model.destinations()
    assert all(torch.equal(places[n], t) for n, t in merged_tensors(stories.model, seven))


def test_the_adapter_of_some_projections_is_merged_there_alone(
    stories: Llm, peft: Path, golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    two = Adapters.load(peft / "two", stories.config)
    save_checkpoint(tmp_path / "merged", stories.config, merged_tensors(stories.model, two))
    model, places = reopened(tmp_path / "merged"), stories.model.destinations()
    assert np.abs(logits(model, golden) - golden["two"]).max() < 1e-4
    changed = {n for n, t in model.destinations().items() if not torch.equal(t, places[n])}
    assert changed == {
        f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(5) for p in ("q", "v")
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_export_in_another_dtype_is_the_rounded_model(
    stories: Llm, tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = tmp_path / "half"
    save_checkpoint(folder, stories.config, merged_tensors(stories.model, None), dtype=dtype)
    stored = load_file(folder / SINGLE)
    places = stories.model.destinations()
    assert all(torch.equal(tensor, places[name].to(dtype)) for name, tensor in stored.items())
    said = json.loads((folder / "config.json").read_text())["torch_dtype"]
    assert said == str(dtype).removeprefix("torch.")
