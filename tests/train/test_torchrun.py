"""Two real processes under torchrun: they stop after the same step, and resume, also alone."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
MAIN = ROOT / "train" / "main.py"


@pytest.fixture
def settings(small: dict[str, str]) -> list[str]:
    values = small | {
        "train.steps": "12",
        "train.batch_samples": "3",
        "train.samples": "0",
        "lora.r": "2",
    }
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def torchrun(arguments: list[str], script: Path = MAIN) -> subprocess.Popen[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, "--master-port", str(port), str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def alone(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, str(MAIN), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def wait_for_steps(process: subprocess.Popen[str], out: Path, count: int) -> None:
    path, deadline_s = out / "metrics.jsonl", time.monotonic() + 180
    while time.monotonic() < deadline_s and process.poll() is None:
        if path.is_file() and path.read_text().count('"loss"') >= count:
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate()[1])


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("to_one_worker", [False, True], ids=["torchrun", "one worker"])
def test_a_signal_stops_all_ranks_after_the_same_step(
    settings: list[str],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    to_one_worker: bool,
) -> None:
    """SIGTERM to torchrun, or to its second worker alone; then on with two ranks, or with one."""
    straight, out = tmp_path_factory.getbasetemp() / "one-rank", tmp_path / "out"
    if not straight.exists():
        alone([*settings, "--set", f"out={straight}"])
    process = torchrun([*settings, "--set", f"out={out}"])
    wait_for_steps(process, out, 2)
    os.kill(workers_of(process)[1] if to_one_worker else process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert f"continue with: torchrun --nproc-per-node 2 {MAIN} {out}/run.toml --resume" in err
    assert "Traceback" not in err.split("continue with")[0]
    if to_one_worker:
        assert "exitcode  : 3" in err
    (state,) = (out / "state").glob("step-*")
    step = int(state.name.removeprefix("step-"))
    assert f"stopped after step {step} of 12" in err
    assert (out / "metrics.jsonl").read_text().count('"loss"') == step
    if to_one_worker:
        alone([str(out / "run.toml"), "--resume"])
    else:
        process = torchrun([str(out / "run.toml"), "--resume"])
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert losses(out) == pytest.approx(losses(straight), rel=1e-6)
    name = "adapter/adapter_model.safetensors"
    one, other = load_file(straight / name), load_file(out / name)
    flat, again = (torch.cat([t[k].flatten() for k in sorted(t)]) for t in (one, other))
    assert (flat - again).norm() < 1e-5 * flat.norm()


@pytest.mark.slow
def test_shards_of_two_ranks_are_resumed_by_one(settings: list[str], tmp_path: Path) -> None:
    """All weights train, each rank writes its rows of them; one process goes on from step 10."""
    more = ["train.method=full", "train.lr=1e-4", "train.steps=12", "train.save_every=5"]
    assert settings[-1] == "lora.r=2"  # which would have no effect here
    both = [*settings[:-2], *(part for value in more for part in ("--set", value))]
    straight, out = tmp_path / "straight", tmp_path / "out"
    alone([*both, "--set", f"out={straight}"])
    process = torchrun([*both, "--set", "shard=full", "--set", f"out={out}"])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    # as a kill after step 11 would leave it
    (out / "state" / "finished").unlink()
    shutil.rmtree(out / "state" / "step-00000012")
    parts = [path.name for path in (out / "state" / "step-00000010").iterdir()]
    assert sorted(parts) == ["rank-00000.safetensors", "rank-00001.safetensors", "state.json"]
    alone([str(out / "run.toml"), "--set", "shard=none", "--resume"])
    assert losses(out) == pytest.approx(losses(straight), rel=1e-6)
    one, other = (load_file(run / "model" / "model.safetensors") for run in (straight, out))
    flat, again = (torch.cat([t[k].flatten() for k in sorted(t)]) for t in (one, other))
    assert (flat - again).norm() < 1e-5 * flat.norm()


@pytest.mark.slow
def test_trouble_on_one_rank_is_met_by_both(settings: list[str], tmp_path: Path) -> None:
    """A NaN is named wherever its record was; a rank without memory makes all packs smaller."""
    values = settings[1::2] + ["data.samples=9", "train.steps=6", "data.max_tokens_per_pack=1024"]
    process = torchrun([str(tmp_path), *values], ROOT / "tests" / "train" / "trouble_job.py")
    output, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    told = json.loads(output.splitlines()[-1])
    nan, plain, memory = told["nan"], told["nothing"], told["memory"]
    assert nan["updates"] == 4
    assert nan["masters"][0] == nan["masters"][1]
    rows = [json.loads(line) for line in (tmp_path / "nan/metrics.jsonl").read_text().splitlines()]
    events = [row for row in rows if "event" in row]
    assert [event["records"] for event in events] == [[nan["place"]]] * 2
    assert memory["max_tokens"] == [512, 512]
    assert memory["updates"] == plain["updates"] == 6
    one, other = (torch.tensor(run["masters"][0]) for run in (plain, memory))
    assert (one - other).norm() < 1e-5 * one.norm()
