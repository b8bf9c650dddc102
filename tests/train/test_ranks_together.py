"""Several real processes under torchrun: the same numbers as alone, and the end when one dies."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from bioinstruct.train.main import command
from bioinstruct.train.ranks.process import ALONE

HERE = Path(__file__).parent
Found = dict[str, dict[str, Any]]


def torchrun(script: str, *arguments: str, ranks: int, **more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*command, "--nproc-per-node", str(ranks), str(HERE / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **more},
    )


@pytest.fixture(scope="module")
def job() -> ModuleType:
    """The module that torchrun runs, to run it alone."""
    spec = importlib.util.spec_from_file_location("ranks_job", HERE / "ranks_job.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def alone(job: ModuleType) -> Found:
    tokens = job.records()
    return {str(tuple(case)): job.run(case, ALONE, tokens) for case in job.cases(1)}


def together(ranks: int, folder: Path) -> Found:
    process = torchrun("ranks_job.py", str(folder / "found.pt"), ranks=ranks)
    _, err = process.communicate(timeout=1800)
    assert process.returncode == 0, err
    found: Found = torch.load(folder / "found.pt")
    return found


def compare(job: ModuleType, alone: Found, found: Found, ranks: int) -> None:
    assert len(found) == len(job.cases(ranks))
    for case in job.cases(ranks):
        one, many = alone[str(("none", *case[1:]))], found[str(tuple(case))]
        bound, end = (1e-6, 1e-5) if case.dtype == torch.float32 else (1e-9, 1e-9)
        assert one["losses"][-1] < 0.9 * one["losses"][0], case
        apart = (many["losses"] - one["losses"]).abs().max() / one["losses"].max()
        assert apart <= bound, case
        difference = (many["masters"] - one["masters"]).norm() / one["masters"].norm()
        assert difference <= end, case
        assert many["masters are equal"], case
        counts = {k.removeprefix("count "): int(n) for k, n in many.items() if k[:5] == "count"}
        assert counts == expected(case, int(many["packs"][1])), case


def expected(case: Any, packs: int) -> dict[str, int]:
    """Collectives of a step in which the busiest rank takes so many packs; the model has 5 layers.

    Always two all-reduces: loss and gradient, or, where FSDP sums the gradient, loss and norm.
    """
    counts = {"allreduce_": 2}
    if case.shard != "none":
        counts["_allgather_base_"] = packs * (5 + 1 + 5)
    if case.shard != "none" and case.method == "full":
        counts["_reduce_scatter_base_"] = packs * (5 + 1)
        # copies on several machines are summed in the last pack
        counts["allreduce_"] += (5 + 1) * (case.shard == "hybrid")
    return counts


@pytest.mark.slow
def test_two_ranks_train_like_one(job: ModuleType, alone: Found, tmp_path: Path) -> None:
    compare(job, alone, together(2, tmp_path), 2)


@pytest.mark.slow
@pytest.mark.skipif("BIOINSTRUCT_RANKS" not in os.environ, reason="needs BIOINSTRUCT_RANKS=4 or so")
def test_more_ranks_train_like_one(job: ModuleType, alone: Found, tmp_path: Path) -> None:
    ranks = int(os.environ["BIOINSTRUCT_RANKS"])
    compare(job, alone, together(ranks, tmp_path), ranks)


@pytest.fixture
def settings(small: dict[str, str], tmp_path: Path) -> list[str]:
    values = small | {
        "train.batch_samples": "4",
        "train.steps": "6",
        "train.samples": "0",
        "out": str(tmp_path / "out"),
    }
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def losses_and_weights(out: Path) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = load_file(out / "model" / "model.safetensors")
    weights = torch.cat([found[name].flatten() for name in sorted(found)])
    return torch.tensor([row["loss"] for row in rows if "loss" in row]), weights


@pytest.mark.slow
def test_a_run_of_sharded_weights_is_resumed_by_one_process(
    settings: list[str], tmp_path: Path
) -> None:
    """Two ranks with half the weights each write a state; one process takes it up."""
    more = ["train.method=full", "train.lr=3e-4", "train.save_every=3", "train.keep=9"]
    settings += [part for setting in more for part in ("--set", setting)]
    main = str(HERE.parents[1] / "train" / "main.py")
    process = torchrun(main, *settings, "--set", "shard=full", ranks=2)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    shutil.rmtree(tmp_path / "out" / "state" / "step-00000006")
    (tmp_path / "out" / "state" / "finished").unlink()
    runner = CliRunner()
    runner.invoke(command, [*settings, "--resume"], catch_exceptions=False, standalone_mode=False)
    straight = [*settings, "--set", f"out={tmp_path / 'straight'}"]
    runner.invoke(command, straight, catch_exceptions=False, standalone_mode=False)
    losses, weights = losses_and_weights(tmp_path / "out")
    wanted_losses, wanted = losses_and_weights(tmp_path / "straight")
    assert len(losses) == 6
    assert (losses - wanted_losses).abs().max() <= 1e-6 * wanted_losses.max()
    assert (weights - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("kill", "died in step 3, silent for"),
        ("raise", "rank 1 failed in step 3: nothing more to learn"),
    ],
)
def test_a_lost_rank_ends_the_job_and_is_named(
    how: str, sentence: str, settings: list[str], tmp_path: Path
) -> None:
    process = torchrun("dying_rank.py", *settings, ranks=2, HOW=how)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank 1 ")
    assert sentence in line
    steps = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert len(steps) == 2
