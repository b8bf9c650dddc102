"""Full fine-tuning on one rank: gradients of all weights, masters, decay, files, resuming."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bioinstruct.kernels import linear_cross_entropy
from bioinstruct.kernels.cross_entropy import linear_cross_entropy_reference
from bioinstruct.model import Llm, load
from bioinstruct.model.llama import Llama
from bioinstruct.train.data.batch import Batch, collate, empty_batch
from bioinstruct.train.data.tokens import TokenSet
from bioinstruct.train.main import command
from bioinstruct.train.ranks.process import ALONE, Ranks
from bioinstruct.train.run import Run, TrainSettings, read_run
from bioinstruct.train.step import Optimizer, add_gradient, summed_loss, train_step
from bioinstruct.train.weights import base
from bioinstruct.train.weights.full import WholeWeights, decays

LENGTHS = (23, 8, 40)


@pytest.fixture
def batch(random_samples: Callable[[Sequence[int]], TokenSet]) -> Batch:
    return collate(random_samples(LENGTHS), [0, 1, 2], {0: 0, 1: 1, 2: 2})


def copy_of(llm: Llm, dtype: torch.dtype = torch.float32) -> Llama:
    model = Llama(llm.config, dtype=dtype)
    for name, place in model.destinations().items():
        place.copy_(llm.model.destinations()[name])
    return model


def test_the_gradient_of_every_weight_by_finite_differences(stories: Llm, batch: Batch) -> None:
    """Each parameter's gradient against the slope of the loss along it, in float64."""
    model = copy_of(stories, torch.float64)
    weights = WholeWeights(model)
    add_gradient(model, None, batch, 1.0)
    generator = torch.Generator().manual_seed(2)
    start, eps = 0, 1e-5
    for parameter in weights.parameters:
        place = slice(start, start := start + parameter.numel())
        direction = torch.randn(parameter.numel(), generator=generator, dtype=torch.float64)
        losses = []
        for sign in (1, -1):
            weights.flat_P[place].add_(direction, alpha=sign * eps)
            losses.append(summed_loss(model, None, batch))
            weights.flat_P[place].sub_(direction, alpha=sign * eps)
        slope = float(weights.grad_P[place] @ direction)
        assert slope == pytest.approx((losses[0] - losses[1]) / (2 * eps), rel=2e-6, abs=1e-8)


def test_the_head_gradient_is_the_references(batch: Batch) -> None:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    h_TD, w_VD = leaf(71, 24), leaf(512, 24)
    given = batch.rows_S, batch.labels_S, 0.3
    linear_cross_entropy_reference(h_TD, w_VD, *given).backward()
    wanted = h_TD.grad, w_VD.grad
    h_TD.grad = w_VD.grad = None
    linear_cross_entropy(h_TD, w_VD, *given).backward()
    for found, reference in zip((h_TD.grad, w_VD.grad), wanted, strict=True):
        assert found is not None
        assert reference is not None
        assert torch.allclose(found, reference, rtol=1e-10, atol=1e-12)


def test_layers_that_compute_twice_give_the_same_gradient(stories: Llm, batch: Batch) -> None:
    gradients = []
    for layers in (0, 3, stories.config.num_layers):
        model = copy_of(stories)
        model.recomputed_layers = layers
        weights = WholeWeights(model)
        add_gradient(model, None, batch, 0.1)
        gradients.append(weights.grad_P)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_an_empty_pack_adds_nothing(stories: Llm) -> None:
    model = copy_of(stories)
    weights = WholeWeights(model)
    assert add_gradient(model, None, empty_batch(), 1.0) == 0
    assert not weights.grad_P.any()


def test_in_float32_masters_and_gradients_are_the_models_own(stories: Llm, batch: Batch) -> None:
    model = copy_of(stories)
    weights = WholeWeights(model)
    add_gradient(model, None, batch, 1.0)
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.untyped_storage().data_ptr() == weights.flat_P.untyped_storage().data_ptr()
        assert (
            parameter.grad.untyped_storage().data_ptr()
            == weights.grad_P.untyped_storage().data_ptr()
        )
    assert weights.flat_P.numel() == stories.config.parameter_count()


def test_in_bfloat16_masters_keep_what_the_copies_round_away(stories: Llm, batch: Batch) -> None:
    model = copy_of(stories, torch.bfloat16)
    weights = WholeWeights(model)
    before_P = weights.flat()
    result = train_step(model, Optimizer(weights), [batch], len(batch.rows_S), 1e-6)
    assert np.isfinite(result.loss)
    moved = (weights.flat_P != before_P).float().mean()
    copies = torch.cat([p.detach().flatten() for p in weights.parameters])
    assert weights.flat_P.dtype == torch.float32
    assert moved > 0.6  # rows of the embedding that no token uses have no gradient
    assert torch.equal(copies, weights.flat_P.bfloat16())
    assert all(p.grad is None for p in model.parameters())


def test_matrices_decay_and_gains_do_not(stories: Llm) -> None:
    model = copy_of(stories)
    weights = WholeWeights(model)
    before = {p: p.detach().clone() for p in model.parameters()}
    Optimizer(weights, weight_decay=0.5).step(0.1)
    for parameter, old in before.items():
        kept = 0.95 if decays(parameter) else 1.0
        assert torch.allclose(parameter, kept * old, rtol=1e-6)
    assert {p.ndim for p in before if not decays(p)} == {1}


@pytest.fixture
def settings(small: dict[str, str], tmp_path: Path) -> dict[str, str]:
    return small | {
        "train.method": "full",
        "train.batch_samples": "8",
        "train.lr": "1e-3",
        "train.steps": "6",
        "train.samples": "1",
        "out": str(tmp_path / "out"),
    }


def call(settings: dict[str, str], *flags: str) -> None:
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    CliRunner().invoke(command, [*sets, *flags], catch_exceptions=False, standalone_mode=False)


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_a_run_writes_a_model_that_load_reads(
    settings: dict[str, str], tmp_path: Path, data: Path
) -> None:
    call(settings)
    out = tmp_path / "out"
    assert losses(out)[-1] < losses(out)[0]
    assert not (out / "adapter").exists()
    words = settings["model.tokenizer"]
    tuned = load(out / "model", dtype="float32", device="cpu", tokenizer=words)
    plain = load(data / "stories260K", dtype="float32", device="cpu", tokenizer=words)
    assert len(tuned.generate(["The gene"], max_new_tokens=8)) == 1
    ids = tuned.tokenizer.encode("The gene", bos=True)
    assert not torch.allclose(tuned.logits([ids])[0], plain.logits([ids])[0], atol=1e-2)
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_a_resumed_run_ends_bitwise_equal(settings: dict[str, str], tmp_path: Path) -> None:
    call(settings)
    half = {**settings, "out": str(tmp_path / "half"), "train.save_every": "3"}
    call({**half, "train.keep": "9"})
    for name in ("step-00000006", "finished"):
        place = tmp_path / "half" / "state" / name
        place.rename(tmp_path / name)
    call({**half, "train.keep": "9"}, "--resume")
    assert losses(tmp_path / "half") == losses(tmp_path / "out")
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("half", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_the_report_names_the_model_that_was_scored(
    settings: dict[str, str], tmp_path: Path
) -> None:
    corpus, out = tmp_path / "small.tsv", tmp_path / "out"
    corpus.write_text("Ataxia\tB-Disease\nis\tO\nrare\tO\n\nNo\tO\ndisease\tO\n\n")
    call(settings | {"eval.tasks": f'["ncbi-disease={corpus}"]', "train.steps": "1"})
    report = (out / "report.md").read_text()
    assert "trained: all weights" in report and "what was scored: `model/`" in report
    row = json.loads((out / "eval-after" / "results.json").read_text())["rows"][0]
    assert (row["model"], row["adapter"]) == (str(out / "model"), None)


def test_a_configuration_that_asks_for_too_much_is_refused_before_memory_is(
    settings: dict[str, str], tmp_path: Path, data: Path
) -> None:
    shutil.copytree(data / "stories260K", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 1 << 30}))
    with pytest.raises(ValueError, match="wrong shape: .*mlp.gate_proj.weight is"):
        call(settings | {"model.path": str(tmp_path / "model")})


def test_lora_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match=r"settings of \[lora\] have no effect"):
        read_run(None, ["train.method=full", "lora.r=8"])


def test_more_layers_than_there_are_is_an_error(settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="checkpoint_layers = 9, but the model has 5 layers"):
        call({**settings, "train.checkpoint_layers": "9"})


class Told(Ranks):
    """Several ranks of whom this one hears nothing else."""

    def any_(self, flag: bool) -> bool:
        return flag


@pytest.mark.parametrize(
    ("shard", "method", "free", "ranks", "mode"),
    [
        ("auto", "lora", 1e5, ALONE, "none"),
        ("full", "lora", 1e5, ALONE, "none"),
        ("auto", "lora", 1e7, Told(size=2), "none"),
        ("auto", "lora", 1e6, Told(size=2), "full"),
        ("auto", "full", 5e6, Told(size=2), "full"),
        ("auto", "full", 7e6, Told(size=2), "none"),
        ("none", "full", 1e5, Told(size=2), "none"),
        ("hybrid", "full", 1e9, Told(size=2), "hybrid"),
    ],
)
def test_weights_are_sharded_where_they_do_not_fit(
    stories: Llm,
    shard: str,
    method: str,
    free: float,
    ranks: Ranks,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base, "free_bytes", lambda ranks: free)
    run = Run(shard=shard, train=TrainSettings(method=method))
    assert base.shard_mode(run, stories.config, torch.float32, ranks) == mode


def test_the_free_memory_of_a_rank_is_its_part() -> None:
    assert base.free_bytes(Ranks(size=4, local_size=4)) <= base.available_bytes()
    assert base.available_bytes() > 1e6
