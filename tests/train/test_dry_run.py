"""The dry run: what it prints, what it refuses, and what it does without weights or tokenizer."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bioinstruct.model.tokenizers.tokenizer import Tokenizer
from bioinstruct.train import main
from bioinstruct.train.plan import hardware
from bioinstruct.train.plan.dry_run import dry_run
from bioinstruct.train.plan.memory import MARGIN, estimate, fewest_recomputed
from bioinstruct.train.plan.outlook import look
from bioinstruct.train.plan.policy import packs_of, worst_of
from bioinstruct.train.plan.prepare import prepare
from bioinstruct.train.plan.stand_in import ByteCount
from bioinstruct.train.report.metrics import step_flops
from bioinstruct.train.run import Run, read_run
from bioinstruct.train.shapes import names, read_shape

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "train" / "recipes"


@pytest.fixture
def records(data: Path) -> str:
    return f"data.path={data / 'bioinstruct_real_sample_32.json'}"


def planned(recipe: Path | None, *flags: str) -> Run:
    return read_run(recipe, flags)


def small_run(data: Path, records: str, *flags: str) -> Run:
    """A run on the small real model, which has weights and a tokenizer."""
    words = data / "tokenizers" / "stories260K_tok512.model"
    own = [f"model.path={data / 'stories260K'}", f"model.tokenizer={words}", records]
    own += ["data.max_tokens_per_pack=512", "data.on_overlong=truncate", "device=cpu"]
    return read_run(None, [*own, *flags])


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_read_and_names_what_ships(recipe: Path) -> None:
    run = planned(recipe)
    config = read_shape(run.model.shape)
    assert run.data.max_tokens_per_pack <= max(config.max_positions, 2048)
    device = hardware.find(run.plan.hardware, run.device)
    assert device.peak_flops
    text = recipe.read_text()
    assert recipe.name in text  # the command that runs it
    assert "ours" in text.lower()
    if not text.startswith("# Ours"):
        assert "# paper" in text


def test_there_are_recipes_for_all_that_the_papers_tuned() -> None:
    found = {path.stem for path in RECIPES.glob("*.toml")}
    sizes = ("7b", "13b")
    assert {f"bioinstruct-llama{g}-{size}" for g in (1, 2) for size in sizes} <= found
    assert {f"medtuned-llama2-{size}{kind}" for size in sizes for kind in ("", "-lora")} <= found
    assert {"strong-8b", "card-24gb", "eight-gpus", "two-nodes"} <= found


@pytest.mark.parametrize(
    ("name", "weights", "lines"),
    [
        (
            "bioinstruct-llama2-7b",
            6_738_415_616,
            [r"LoRA r=8 alpha=16 dropout=0.05 on q_proj, v_proj: 4,194,304 trained", "2 ranks"],
        ),
        ("medtuned-llama2-13b", 13_015_864_320, ["all 13,015,864,320 parameters", "8 ranks"]),
    ],
)
def test_a_recipe_plans_without_gpu_weights_or_tokenizer(
    name: str, weights: int, lines: list[str], records: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run(planned(RECIPES / f"{name}.toml", records))
    printed = capsys.readouterr().out
    for line in [
        f"{weights:,} parameters",
        "there is room for packs of up to T = ",
        "the weights were not checked",
        "none was found: 4 bytes count as a token",
        r"expected peak \d+\.\d\d GiB with \d+ of \d\d layers recomputed; fits A100",
        r"kept for the backward pass",
        r"at an assumed MFU of 0.4 on \d x A100",
        r"\d+ samples, [\d,]+ tokens, \d+\.\d% supervised",
        r"packs a step, \d+\.\d% full",
        "### Output:",
        *lines,
    ]:
        assert re.search(line, printed), line


def test_a_checkpoint_is_checked_without_reading_it(
    data: Path, records: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run(small_run(data, records, "train.steps=4"))
    printed = capsys.readouterr().out
    assert "all 47 tensors are there" in printed
    assert "not checked" not in printed
    assert re.search(r"4 steps of 32 samples, 4 epochs", printed)
    assert "no time is reckoned for this machine's CPU" in printed
    assert "its last supervised token is 2, 'end-of-sequence token'" in printed
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(
        (data / "stories260K" / "model.safetensors").read_bytes()
    )
    config = json.loads((data / "stories260K" / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))
    with pytest.raises(ValueError, match="9 missing|missing: .*layers.5"):
        dry_run(small_run(data, records, f"model.path={broken}"))


def test_the_answer_is_marked_on_a_terminal(
    data: Path,
    records: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = small_run(data, records)
    outlook = look(run)
    number = outlook.data.planner.plan(0).packs[0][0]
    ids, prompt = outlook.data.tokens.sample(number)
    answer = outlook.tokenizer.decode(ids[prompt:].tolist())
    dry_run(run)
    assert f"{'-' * 40}\n{answer}\n{'-' * 40}" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    dry_run(run)
    assert f"\x1b[32m\x1b[1m{answer}\x1b[0m" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["model.path=absent"], "there is no absent; .* model.shape=NAME, one of llama-1-13b"),
        (["model.path=", "model.shape=llama-9"], "model.shape = 'llama-9' is neither a file nor"),
        (["model.path="], "model.path is not set"),
        (["plan.hardware=A100"], "plan.hardware = 'A100' is unknown; allowed are auto, cpu, A100-"),
        (["data.path=absent.json"], "data.path: there is no file absent.json"),
        (["lora.layers=[5]"], "lora.layers names layer 5; the model has 0 to 4"),
        (["train.checkpoint_layers=6"], "train.checkpoint_layers = 6, but the model has 5 layers"),
        (["data.template=chatml"], "needs the control token"),
        (["data.on_overlong=error", "data.max_tokens_per_pack=64"], "records over 64 tokens"),
        (["eval.tasks=pubmedqa=absent"], "absent"),
    ],
)
def test_what_would_stop_a_run_stops_its_plan(
    flags: list[str], message: str, data: Path, records: str
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        dry_run(small_run(data, records, *flags))


def test_a_gpu_can_be_planned_for_where_none_is(data: Path, records: str) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="device = 'cuda' is not here to plan for; name a GPU in"):
        look(small_run(data, records, "device=cuda"))
    outlook = look(small_run(data, records, "device=cuda", "plan.hardware=H200-141GB"))
    assert (outlook.setup.device, outlook.setup.backend) == ("cuda", "varlen")
    assert outlook.setup.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (["plan.hardware=A100-40GB"], r"does NOT fit .*\n.*\n *it fits with train.checkpoint_laye"),
        (["plan.hardware=RTX4090-24GB", "plan.ranks=4", "shard=none"], "set shard = full"),
        (["plan.hardware=RTX4090-24GB", "plan.ranks=1"], "spread it over more devices"),
        (["plan.hardware=RTX4090-24GB", "plan.ranks=4"], "gathered from shards"),
    ],
)
def test_the_plan_says_what_would_fit(
    flags: list[str], advice: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data.parent.parent / "train" / "demo" / "records.jsonl.gz"
    base = ["model.shape=llama-2-13b", "data.samples=150", f"data.path={path}"]
    dry_run(planned(None, *base, "data.template=bioinstruct", "train.batch_samples=150", *flags))
    assert re.search(advice, capsys.readouterr().out)


def test_part_filled_packs_come_with_what_would_fill_them(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data.parent.parent / "train" / "demo" / "records.jsonl.gz"
    base = ["model.shape=llama-2-7b", f"data.path={path}", "data.template=bioinstruct"]
    base += ["data.samples=2500"]
    base += ["plan.hardware=H100-80GB", "plan.ranks=8"]
    dry_run(planned(None, *base, "train.batch_samples=64"))
    printed = capsys.readouterr().out
    found = re.search(r"to fill them: train.batch_samples = ([\d,]+) fills them to", printed)
    assert found
    assert "fewer packs a step than ranks" in printed
    dry_run(planned(None, *base, f"train.batch_samples={found[1].replace(',', '')}"))
    printed = capsys.readouterr().out
    assert "to fill them" not in printed
    share = re.search(r"(\d+\.\d)% full", printed)
    assert share
    assert float(share[1]) >= 98


def test_layers_left_to_the_plan_are_the_fewest_that_fit(
    data: Path, records: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_run(data, records, "train.checkpoint_layers=auto")
    assert look(run).run.train.checkpoint_layers == 0
    prepared = prepare(run)
    assert prepared.run.train.checkpoint_layers == prepared.llm.model.recomputed_layers == 0
    setup, worst = look(run).setup, worst_of(packs_of(prepared.planner))
    for most in (1, 3):
        room = int(estimate(setup, worst, most).peak / (1 - MARGIN)) + 1
        layers = fewest_recomputed(setup, worst, room)
        assert layers is not None
        assert 0 < layers <= most
        here = dataclasses.replace(hardware.find("auto", "cpu"), memory_bytes=room)
        monkeypatch.setattr(hardware, "find", lambda name, device, here=here: here)
        assert look(run).run.train.checkpoint_layers == layers
        prepared = prepare(run)
        assert prepared.run.train.checkpoint_layers == layers
        assert prepared.llm.model.recomputed_layers == layers
    for value in ("all", "-1"):
        with pytest.raises(ValueError, match="must be auto or a whole number of at least 0"):
            small_run(data, records, f"train.checkpoint_layers={value}")


def test_packs_at_once_left_to_the_plan_are_the_most_that_fit(
    data: Path,
    records: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def chosen(*flags: str) -> int | str:
        return look(small_run(data, records, *flags)).run.train.packs_at_once

    assert chosen() == 1  # the tests have one thread
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert chosen() == 3
    assert chosen("train.batch_samples=1") == 1
    assert chosen("train.method=full", "train.packs_at_once=2") == 1
    assert "train.packs_at_once = 2 is for adapters on a CPU" in capsys.readouterr().err
    assert chosen("device=cuda", "plan.hardware=H100-80GB") == 1
    dry_run(small_run(data, records))
    assert "0 of 5 layers recomputed and 3 packs side by side; fits" in capsys.readouterr().out
    prepared = prepare(small_run(data, records))
    assert prepared.run.train.packs_at_once == 3
    setup, worst = look(small_run(data, records)).setup, worst_of(packs_of(prepared.planner))
    peaks = [estimate(dataclasses.replace(setup, packs_at_once=n), worst).peak for n in range(1, 4)]
    for most, peak in enumerate(peaks, 1):
        here = dataclasses.replace(
            hardware.find("auto", "cpu"), memory_bytes=int(peak / (1 - MARGIN)) + 1
        )
        monkeypatch.setattr(hardware, "find", lambda name, device, here=here: here)
        assert chosen() == most
    for value in ("two", "0"):
        with pytest.raises(ValueError, match="must be auto or a whole number of at least 1"):
            small_run(data, records, f"train.packs_at_once={value}")


def test_flops_and_time_are_those_of_the_stated_convention(data: Path, records: str) -> None:
    run = small_run(data, records, "plan.hardware=H100-80GB", "train.epochs=2")
    outlook = look(run)
    tokens = outlook.data.tokens
    planner = outlook.data.planner
    trained = 12345
    per_step = [
        step_flops(
            outlook.base.config,
            trained,
            tokens.lengths[list(planner.plan(step).draws)].tolist(),
            planner.plan(step).supervised_tokens,
        )
        for step in range(planner.steps_of(0))
    ]
    whole = step_flops(
        outlook.base.config, trained, tokens.lengths.tolist(), int(tokens.supervised.sum())
    )
    assert sum(per_step) == pytest.approx(whole)


def test_shapes_have_the_sizes_that_their_makers_state() -> None:
    counts = {name: read_shape(name).parameter_count() for name in names()}
    assert counts == {
        "llama-1-7b": 6_738_415_616,
        "llama-1-13b": 13_015_864_320,
        "llama-2-7b": 6_738_415_616,
        "llama-2-13b": 13_015_864_320,
        "llama-3-8b": 8_030_261_248,
        "llama-3.1-8b": 8_030_261_248,
        "llama-3.2-1b": 1_235_814_400,
    }


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_counted_bytes_can_be_shown_again(text: str) -> None:
    words: Tokenizer = ByteCount()
    ids = words.encode(text, bos=True, eos=True)
    assert len(ids) == 2 + -(-len(text.encode()) // 4)
    assert words.decode(ids) == text
    assert ByteCount().decode(np.array(ids, dtype=np.uint32).tolist()) == text


def test_a_dry_run_writes_nothing_but_the_cache(
    records: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main.command.main(
        [str(RECIPES / "medtuned-llama2-7b.toml"), "--dry-run", "--set", records],
        standalone_mode=False,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
