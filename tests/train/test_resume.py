"""A run that was killed or stopped goes on as if nothing had happened, or says why it cannot."""

import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bioinstruct.model.llama import Llama
from bioinstruct.synth.console import Stopped
from bioinstruct.train import trainer
from bioinstruct.train.main import command
from bioinstruct.train.resume import folder
from bioinstruct.train.resume.fingerprint import MAY_CHANGE, differences, model_checksum
from bioinstruct.train.resume.state import RECORD, steps_of
from bioinstruct.train.run import keys

ROOT = Path(__file__).parents[2]
# kernels.attention is also a function
kernels = importlib.import_module("bioinstruct.kernels.attention")
MAIN = ROOT / "train" / "main.py"
TIMED = ("tokens_per_s", "peak_memory_bytes", "mfu")


@pytest.fixture(autouse=True)  # one for all tests: their runs have the same samples
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path_factory.getbasetemp() / "resume-cache"
    monkeypatch.setenv("BIOINSTRUCT_CACHE", str(cache))


@pytest.fixture
def settings(small: dict[str, str]) -> dict[str, str]:
    """A run of 20 steps with all that has a state."""
    return small | {
        "data.validation": "0.2",
        "train.steps": "20",
        "train.batch_samples": "2",
        "train.packs_at_once": "2",
        "train.lr": "1e-3",
        "train.warmup_steps": "3",
        "train.ema": "0.9",
        "train.eval_every": "8",
        "train.samples": "1",
        "train.save_every": "3",
        "train.keep_best": "val_loss",
        "lora.r": "2",
        "lora.dropout": "0.1",
    }


def flags(settings: dict[str, str]) -> list[str]:
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def call(settings: dict[str, str], out: Path, *more: str) -> None:
    command.main([*flags(settings), "--set", f"out={out}", *more], standalone_mode=False)


def rows(path: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMED} for row in lines]


def assert_same_run(one: Path, other: Path) -> None:
    """Adapters bit by bit, and all rows other than times and memory."""
    for kind in ("adapter", "adapter-best"):
        name = f"{kind}/adapter_model.safetensors"
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert rows(one / name) == rows(other / name)
    states = [sorted((run / "state").glob("step-*"))[-1] for run in (one, other)]
    first, second = (load_file(state / "rank-00000.safetensors") for state in states)
    assert first.keys() == second.keys() == {f"{k}.flat" for k in ("masters", "m", "v", "average")}
    assert all(first[key].equal(second[key]) for key in first)


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a signal come during this step, counted from 1."""
    take, taken = trainer.train_step, [0]

    def stepping(*arguments: object) -> object:
        taken[0] += 1
        if taken[0] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "train_step", stepping)


@pytest.fixture
def straight(settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without an interruption; taken once."""
    out = tmp_path_factory.getbasetemp() / "straight"
    if not (out / "state" / "finished").exists():
        call(settings, out)
    return out


@pytest.mark.parametrize("step", [1, 8, 19])
def test_stopping_and_resuming_changes_nothing(
    settings: dict[str, str],
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    """Also where an evaluation was due after the step: it is made up for."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_after(step, patch)
        with pytest.raises(Stopped, match=f"after step {step} of 20.*run.toml --resume"):
            call(settings, out)
    assert steps_of(out / "state")[-1] == step
    command.main([str(out / "run.toml"), "--resume"], standalone_mode=False)
    assert_same_run(straight, out)
    told = (out / "run.toml").read_text()
    assert f"after step {step}, 1 ranks" in told


@pytest.mark.parametrize("asked", ["auto", "blocked"])
def test_a_resumed_run_keeps_its_attention(
    settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """What auto takes is timed, so it may take another one the next time."""
    more = {"train.steps": "4"}
    seen: list[str] = []
    step = trainer.train_step

    def watched(model: Llama, *rest: object, **named: object) -> object:
        seen.append(model.attention_backend)
        return step(model, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "_probed", lambda _: "sdpa")
    call(settings | more, tmp_path / "straight")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(Stopped):
            call(settings | more, out)
    monkeypatch.setattr(kernels, "_probed", lambda _: "blocked")
    monkeypatch.setattr(trainer, "train_step", watched)
    call(settings | more | {"attention": asked}, out, "--resume")
    # who names one means it
    assert seen == [{"auto": "sdpa", "blocked": "blocked"}[asked]] * 2
    if asked == "auto":
        assert_same_run(tmp_path / "straight", out)


def test_an_attention_that_cannot_run_here_is_told(
    settings: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run that was begun on a GPU goes on without one."""
    more = {"train.steps": "4", "train.samples": "0"}
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(Stopped):
            call(settings | more, tmp_path / "out")
    (path,) = (tmp_path / "out" / "state").glob(f"step-*/{RECORD}")
    record = json.loads(path.read_text())
    record["facts"]["attention"] = "flash3"
    record["facts"]["operations"] = "C (tcc 1.0)"
    path.write_text(json.dumps(record))
    call(settings | more, tmp_path / "out", "--resume")
    told = capsys.readouterr().err
    assert "'flash3' cannot run here" in told
    assert re.search(
        r"operations ran in C \(tcc 1.0\), and now in (C|torch) \(.*: equal up to", told
    )


def test_pissa_resumes_too(
    settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its adapters hold a part of the weights, which a resumed run takes out of them again."""
    more = {"lora.init": "pissa", "train.steps": "4", "lora.dropout": "0", "train.samples": "0"}
    call(settings | more, tmp_path / "straight")
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(Stopped):
            call(settings | more, tmp_path / "out")
    call(settings | more, tmp_path / "out", "--resume")
    for kind in ("adapter", "adapter-best"):
        name = f"{kind}/adapter_model.safetensors"
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert rows(tmp_path / "straight/metrics.jsonl") == rows(tmp_path / "out/metrics.jsonl")


def start(settings: dict[str, str], out: Path, *more: str) -> subprocess.Popen[str]:
    arguments = [*flags(settings), "--set", f"out={out}", "--resume", *more]
    return subprocess.Popen(
        [sys.executable, str(MAIN), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def steps_taken(out: Path) -> int:
    path = out / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return sum('"loss"' in line for line in text.splitlines())


def kill_after(process: subprocess.Popen[str], out: Path, step: int, delay_s: float) -> bool:
    """Kill a run some time after a step; False where it had ended before."""
    deadline_s = time.monotonic() + 120
    while steps_taken(out) < step and process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.002)
    time.sleep(delay_s)
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_three_kills_change_nothing(
    settings: dict[str, str], straight: Path, tmp_path: Path
) -> None:
    """kill -9 at random moments; a state is written after every step, so also during that."""
    out, random_ = tmp_path / "out", random.Random(0)
    busy = {**settings, "train.save_every": "1", "train.keep": "1"}
    killed = 0
    for step in (5, 11, 16):
        killed += kill_after(start(busy, out), out, step, random_.uniform(0, 0.1))
        assert len(steps_of(out / "state")) in (1, 2, 3)
    assert killed == 3
    (out / "adapter" / ".writing-x").write_text("what a kill leaves")
    process = start(busy, out)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert re.search(r"resuming after step \d+ of 20", err)
    assert_same_run(straight, out)
    assert not list(out.rglob(".writing-*"))


def test_rows_after_the_state_are_kept_aside(
    settings: dict[str, str], straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    finished_at(straight, out, 18)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')
    call(settings, out, "--resume")
    assert_same_run(straight, out)
    cut = (out / "metrics.cut.jsonl").read_text().splitlines()
    assert cut[-1] == '{"step": 21, "lo'
    assert [json.loads(line)["step"] for line in cut[:-1]] == [19, 20, 20]


def test_rows_of_an_evaluation_that_is_made_again_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = [{"step": 1, "loss": 2.0}, {"step": 1, "val_loss": 3.0}, {"step": 2, "loss": 1.0}]
    late = [{"step": 2, "val_loss": 2.0}, {"step": 2, "scores": {}}, {"step": 3, "loss": 1.0}]
    text = "".join(json.dumps(row) + "\n" for row in kept + late)
    path.write_text(text)
    assert folder.cut_rows(path, 2, without=folder.EVALUATED) == 3
    assert rows(path) == kept
    assert rows(tmp_path / "metrics.cut.jsonl") == late
    assert folder.cut_rows(path, 2) == 0
    assert folder.cut_rows(path, 1) == 1
    assert rows(tmp_path / "metrics.cut.jsonl") == [*late, kept[-1]]
    assert folder.cut_rows(tmp_path / "nothing.jsonl", 0) == 0


def finished_at(straight: Path, out: Path, step: int) -> None:
    """A copy of a finished run as it was when its newest state was that of this step."""
    shutil.copytree(straight, out)
    (out / "state" / "finished").unlink()
    for later in steps_of(out / "state"):
        if later > step:
            shutil.rmtree(out / "state" / f"step-{later:08d}")


CHANGES = [
    ({"train.lr": "2e-3"}, r"train\.lr: 0\.001 -> 0\.002"),
    ({"lora.r": "4"}, r"lora\.r: 2 -> 4"),
    ({"train.steps": "30"}, r"train\.steps: 20 -> 30"),
    ({"data.shuffle": "false"}, r"data\.shuffle: true -> false"),
    ({"data.validation": "0.3"}, r"data\.validation: 0\.2 -> 0\.3.*training records: \d+ samples"),
    ({"train.ema": "0"}, r"train\.ema: 0\.9 -> 0\.0"),
    ({"model.dtype": "bfloat16"}, r"dtype of the weights: float32 -> bfloat16"),
]


@pytest.mark.parametrize(("changes", "sentence"), CHANGES)
def test_another_run_is_refused(
    settings: dict[str, str],
    straight: Path,
    tmp_path: Path,
    changes: dict[str, str],
    sentence: str,
) -> None:
    out = tmp_path / "out"
    finished_at(straight, out, 18)
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=sentence) as caught:
        call(settings | changes, out, "--resume")
    assert "only these settings may change: " in str(caught.value)
    assert (out / "metrics.jsonl").read_bytes() == before


def test_other_records_or_weights_are_refused(
    settings: dict[str, str], straight: Path, tmp_path: Path, data: Path
) -> None:
    out = tmp_path / "out"
    finished_at(straight, out, 18)
    records = json.loads(Path(settings["data.path"]).read_text())
    records[3]["output"] += " Indeed."
    changed = tmp_path / "records.json"
    changed.write_text(json.dumps(records, indent=1))
    with pytest.raises(ValueError, match=r"records: \d+ samples of \d+ tokens, SHA-256 \w+ -> "):
        call(settings | {"data.path": str(changed)}, out, "--resume")
    model = tmp_path / "model"
    shutil.copytree(data / "stories260K", model)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"model files: SHA-256 \w+ -> SHA-256"):
        call(settings | {"model.path": str(model)}, out, "--resume")


def test_files_may_move_and_settings_without_effect_may_change(
    settings: dict[str, str], straight: Path, tmp_path: Path, data: Path
) -> None:
    out = tmp_path / "elsewhere"
    finished_at(straight, out, 18)
    moved = tmp_path / "records.json"
    shutil.copyfile(settings["data.path"], moved)
    model = tmp_path / "model"
    shutil.copytree(data / "stories260K", model)
    more = {"data.path": str(moved), "model.path": str(model), "train.keep": "5"}
    call(settings | more, out, "--resume")
    kept = [row for row in rows(out / "metrics.jsonl") if "record" not in row]
    assert kept == rows(straight / "metrics.jsonl")


def test_what_may_change_is_a_setting() -> None:
    assert set(keys()) >= MAY_CHANGE


def test_a_finished_run_is_left_alone(
    settings: dict[str, str], straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def times() -> list[float]:
        return [path.stat().st_mtime for path in sorted(straight.rglob("*"))]

    before = times()
    call(settings, straight, "--resume")
    assert times() == before
    assert "is finished; its adapter is in" in capsys.readouterr().err


def test_resuming_without_a_state_starts_at_step_0(
    settings: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new"
    call(settings | {"train.steps": "2"}, out, "--resume")
    assert "holds no state yet; starting at step 0" in capsys.readouterr().err
    assert [row["step"] for row in rows(out / "metrics.jsonl") if "loss" in row] == [1, 2]


def test_resuming_needs_a_folder(settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="--resume needs the folder of the run"):
        command.main([*flags(settings), "--resume"], standalone_mode=False)


def test_two_processes_do_not_share_a_folder(
    settings: dict[str, str], straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    finished_at(straight, out, 18)
    before = (out / "metrics.jsonl").read_bytes()
    with folder.held(out), pytest.raises(ValueError, match="another process is at work in"):
        call(settings, out, "--resume")
    assert (out / "metrics.jsonl").read_bytes() == before
    with folder.held(out):
        pass  # it was let go of


def test_a_damaged_state_is_set_aside(
    settings: dict[str, str],
    straight: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    (out / "state" / "finished").unlink()
    newest = out / "state" / "step-00000020"
    content = bytearray((newest / "rank-00000.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "rank-00000.safetensors").write_bytes(content)
    call(settings, out, "--resume")
    told = capsys.readouterr().err
    assert "is damaged" in told
    assert "resuming after step 18 of 20" in told
    assert (out / "state" / "damaged-step-00000020").is_dir()
    assert_same_run(straight, out)


def test_without_a_usable_state_nothing_is_touched(
    settings: dict[str, str], straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    finished_at(straight, out, 20)
    for step in steps_of(out / "state"):
        (out / "state" / f"step-{step:08d}" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="no state in .* can be used: .*not of format 1"):
        call(settings, out, "--resume")
    assert rows(out / "metrics.jsonl") == rows(straight / "metrics.jsonl")


def test_a_state_that_cannot_be_written_ends_the_run(
    settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full while the second state is written: the first one stays whole."""
    import safetensors.torch

    save, written = safetensors.torch.save_file, [0]

    def fail(*arguments: object, **named: object) -> None:
        written[0] += "rank-" in str(arguments[1])
        if written[0] == 2:
            raise OSError(28, "No space left on device")
        save(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    out = tmp_path / "out"
    with pytest.raises(OSError, match="No space left"):
        call(settings | {"train.keep_best": "", "train.eval_every": "0"}, out)
    assert steps_of(out / "state") == [3]


def test_differences_are_told_field_by_field() -> None:
    old = {"settings": {"a": 1, "b": "x"}, "steps": 5, "validation records": None}
    new = {"settings": {"a": 1, "b": "y", "c": [2]}, "steps": 6, "validation records": "3 samples"}
    assert differences(old, old) == []
    assert differences(old, new) == [
        "b: x -> y",
        "steps: 5 -> 6",
        "validation records: nothing -> 3 samples",
        "c: nothing -> [2]",
    ]


def test_a_model_is_known_by_its_weight_files(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(data / "stories260K", folder)
    whole = model_checksum(folder)
    assert whole == model_checksum(data / "stories260K")
    (folder / "notes.txt").write_text("nothing about the weights")
    assert whole == model_checksum(folder)
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b" ")
    assert whole != model_checksum(folder)
