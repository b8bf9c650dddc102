"""The command line: a whole small run, its files, and every wrong input in one sentence."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from bioinstruct.kernels import native
from bioinstruct.synth.console import Stopped
from bioinstruct.train.main import command

ROOT = Path(__file__).parents[2]
MAIN = ROOT / "train" / "main.py"


@pytest.fixture
def settings(small: dict[str, str], tmp_path: Path) -> dict[str, str]:
    return small | {
        "data.on_overlong": "truncate",
        "data.validation": "0.1",
        "train.steps": "4",
        "train.batch_samples": "4",
        "train.lr": "1e-3",
        "lora.r": "4",
        "out": str(tmp_path / "out"),
    }


def flags(settings: dict[str, str]) -> list[str]:
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def call(settings: dict[str, str], *more: str) -> None:
    """Run the command in this process; errors come as they are."""
    command.main([*flags(settings), *more], standalone_mode=False)


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_writes_what_is_promised(
    settings: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(settings, "--set", "train.eval_every=2")
    out = tmp_path / "out"
    metrics = rows(out / "metrics.jsonl")
    steps = [row for row in metrics if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    fields = (
        "step epoch loss lr grad_norm tokens supervised_tokens tokens_per_s mfu peak_memory_bytes"
    )
    assert all(set(row) == set(fields.split()) for row in steps)
    assert all(row["mfu"] is None and row["grad_norm"] > 0 for row in steps)  # type: ignore[operator]
    assert [row["step"] for row in metrics if "val_loss" in row] == [2, 4]
    assert len(rows(out / "samples.jsonl")) == 2 * 3
    assert (out / "loss.svg").read_text().startswith("<svg")
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    assert all(t.abs().max() > 0 for t in tensors.values())
    made = tomllib.loads((out / "run.toml").read_text())["made"]
    assert made["steps"] == 4
    assert made["torch"] == torch.__version__
    in_c = made["operations"].startswith("C (")
    assert in_c or made["operations"].startswith("torch (")
    assert ("a step takes about a fifth longer" in capsys.readouterr().err) != in_c


def test_a_run_without_a_compiler_says_what_that_costs(
    settings: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    call(settings, "--dry-run")
    assert "a fifth longer" not in capsys.readouterr().err
    call(settings)
    why = "there is no cc, gcc or clang, and $CC names no other"
    told = f"a step takes about a fifth longer: {why}; install a C compiler"
    assert capsys.readouterr().err.count(told) == 1
    made = tomllib.loads((tmp_path / "out" / "run.toml").read_text())["made"]
    assert made["operations"] == f"torch ({why})"


def test_run_toml_repeats_the_run_bitwise(settings: dict[str, str], tmp_path: Path) -> None:
    call(settings, "--set", "lora.dropout=0.1")
    again = tmp_path / "again"
    recipe = str(tmp_path / "out" / "run.toml")
    command.main([recipe, "--set", f"out={again}"], standalone_mode=False)
    name = "adapter/adapter_model.safetensors"
    assert (again / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    timed = ("tokens_per_s", "peak_memory_bytes")
    one, two = (
        [{k: v for k, v in row.items() if k not in timed} for row in rows(f / "metrics.jsonl")]
        for f in (tmp_path / "out", again)
    )
    assert one == two


def test_an_adapter_of_peft_s_is_continued(
    settings: dict[str, str], data: Path, tmp_path: Path
) -> None:
    start = data / "peft_golden" / "patterned"
    del settings["lora.r"]
    more = {"lora.init_from": str(start), "lora.plus_ratio": "4", "train.schedule": "wsd"}
    call(settings | more)
    before = load_file(start / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    moved = [float((after[key] - before[key]).abs().max()) for key in before]
    assert min(moved) > 0 and max(moved) < 0.1
    told = tomllib.loads((tmp_path / "out" / "run.toml").read_text())["lora"]
    assert (told["r"], told["rslora"], told["layers"]) == (4, True, [0, 2, 4])
    assert told["rank_pattern"]["up_proj"] == 2
    # what the run wrote down can be said again
    recipe, again = str(tmp_path / "out" / "run.toml"), tmp_path / "again"
    command.main([recipe, "--set", f"out={again}"], standalone_mode=False)
    repeated = load_file(again / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(after[key], repeated[key]) for key in after)


def test_a_continued_adapter_keeps_its_rank(settings: dict[str, str], data: Path) -> None:
    more = {"lora.init_from": str(data / "peft_golden" / "seven"), "lora.r": "8"}
    with pytest.raises(ValueError, match="lora.r = 8 contradicts lora.init_from"):
        call(settings | more)


def test_a_start_by_pissa_is_saved_for_the_unchanged_model(
    settings: dict[str, str], tmp_path: Path
) -> None:
    call(settings | {"lora.init": "pissa", "lora.plus_ratio": "2"})
    out = tmp_path / "out"
    recipe, again, adapter = str(out / "run.toml"), tmp_path / "again", out / "adapter"
    command.main([recipe, "--set", f"out={again}"], standalone_mode=False)
    name = "adapter/adapter_model.safetensors"
    assert (again / name).read_bytes() == (out / name).read_bytes()
    # continued by a step that moves nothing, on the model as it is in its file
    still = {"lora.init_from": str(adapter), "train.steps": "1", "train.lr": "1e-12"}
    del settings["lora.r"]
    call(settings | still | {"out": str(tmp_path / "still")})
    losses = [
        next(row["val_loss"] for row in rows(folder / "metrics.jsonl") if "val_loss" in row)
        for folder in (out, tmp_path / "still")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_average_is_what_is_saved(settings: dict[str, str], tmp_path: Path) -> None:
    call(settings)
    call(settings | {"train.ema": "0.9", "out": str(tmp_path / "average")})
    name = "adapter/adapter_model.safetensors"
    plain, average = (load_file(tmp_path / run / name) for run in ("out", "average"))
    ups = [key for key in plain if "lora_B" in key]
    # B starts at zero, so its average lags behind it
    assert all(average[key].norm() < plain[key].norm() for key in ups)
    assert all(average[key].any() for key in ups)


def test_conversations_train(settings: dict[str, str], tmp_path: Path) -> None:
    turns = [{"role": r, "content": f"{r} speaks"} for r in ("user", "assistant") * 2]
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(4)))
    chat = {"data.path": str(data), "data.template": "llama-2-chat", "data.validation": "0.25"}
    call(settings | chat | {"train.epochs": "1"})
    metrics = rows(tmp_path / "out" / "metrics.jsonl")
    assert all(float(str(row["loss"])) > 0 for row in metrics if "loss" in row)
    told = tomllib.loads((tmp_path / "out" / "run.toml").read_text())
    assert told["made"]["samples"] == 6  # two answers of three conversations; one is held out


def test_dry_run_writes_no_run(
    settings: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(settings, "--dry-run")
    printed = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert "4 steps" in printed
    assert "its last supervised token is 2" in printed


def test_save_every_writes_the_adapter_early(
    settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Path] = []
    monkeypatch.setattr(
        "bioinstruct.model.adapters.Adapters.save", lambda self, folder, base: saved.append(folder)
    )
    call(settings, "--set", "train.save_every=1")
    assert saved == [tmp_path / "out" / "adapter"] * 4


def test_tasks_are_scored_before_and_after(
    settings: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "small.tsv"
    corpus.write_text("Ataxia\tB-Disease\nis\tO\nrare\tO\n\nNo\tO\ndisease\tO\n\n")
    tasks = f'["ncbi-disease={corpus}"]'
    call(settings, "--set", f"eval.tasks={tasks}", "--set", f"eval.lexicon={corpus}")
    report = (tmp_path / "out" / "report.md").read_text()
    for text in ("before tuning", "after tuning", "training lexicon, case folded", "100.0"):
        assert text in report
    assert "the tuned model is not above the baseline" in capsys.readouterr().out
    for stage in ("before", "after"):
        assert (tmp_path / "out" / f"eval-{stage}" / "results.json").is_file()
    # what PiSSA takes out of the weights is there when the untrained model answers
    other = {"lora.init": "pissa", "out": str(tmp_path / "pissa")}
    call(settings | other, "--set", f"eval.tasks={tasks}")
    samples = "eval-before/samples_ncbi-disease.jsonl"
    assert (tmp_path / "pissa" / samples).read_text() == (tmp_path / "out" / samples).read_text()


def test_an_interruption_before_the_first_state_says_so(
    settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bioinstruct.train.loop.score_tasks", interrupted)
    corpus = tmp_path / "small.tsv"
    corpus.write_text("Ataxia\tB-Disease\nis\tO\n\n")
    with pytest.raises(Stopped, match="after step 0 of 4; no state was saved yet; continue with"):
        call(settings | {"eval.tasks": f'["ncbi-disease={corpus}"]'})


def bad_json(data: Path, tmp: Path) -> dict[str, str]:
    (tmp / "bad.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n')
    return {"data.path": str(tmp / "bad.jsonl")}


def missing_field(data: Path, tmp: Path) -> dict[str, str]:
    (tmp / "bad.jsonl").write_text('{"instruction": "a", "ouput": "b"}\n')
    return {"data.path": str(tmp / "bad.jsonl")}


def wrong_type(data: Path, tmp: Path) -> dict[str, str]:
    (tmp / "bad.jsonl").write_text('{"instruction": "a", "output": 3}\n')
    return {"data.path": str(tmp / "bad.jsonl")}


def empty_file(data: Path, tmp: Path) -> dict[str, str]:
    (tmp / "bad.jsonl").write_text("")
    return {"data.path": str(tmp / "bad.jsonl")}


def binary_file(data: Path, tmp: Path) -> dict[str, str]:
    (tmp / "bad.jsonl").write_bytes(bytes(range(256)) * 40)
    return {"data.path": str(tmp / "bad.jsonl")}


def cut_gzip(data: Path, tmp: Path) -> dict[str, str]:
    whole = gzip.compress(b'{"instruction": "a", "output": "b"}\n' * 500)
    (tmp / "bad.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    return {"data.path": str(tmp / "bad.jsonl.gz")}


def cut_weights(data: Path, tmp: Path) -> dict[str, str]:
    shutil.copytree(data / "stories260K", tmp / "cut")
    weights = tmp / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500_000])
    return {"model.path": str(tmp / "cut")}


def no_weights(data: Path, tmp: Path) -> dict[str, str]:
    (tmp / "hollow").mkdir()
    return {"model.path": str(tmp / "hollow")}


def other_vocabulary(data: Path, tmp: Path) -> dict[str, str]:
    # SmolLM2-like vocabularies are larger than the 512 rows of stories260K
    return {"model.tokenizer": str(data / "tokenizers" / "llama3_bpe")}


def existing_run(data: Path, tmp: Path) -> dict[str, str]:
    (tmp / "out").mkdir()
    (tmp / "out" / "run.toml").write_text("")
    return {}


def overlong(data: Path, tmp: Path) -> dict[str, str]:
    return {"data.on_overlong": "error"}


BAD: list[tuple[Callable[[Path, Path], dict[str, str]], str]] = [
    (bad_json, r"bad\.jsonl:3:1: broken JSON.*begins in line 2"),
    (missing_field, r"bad\.jsonl:1.*output"),
    (wrong_type, r"bad\.jsonl:1.*output"),
    (empty_file, r"bad\.jsonl.*empty"),
    (binary_file, r"bad\.jsonl"),
    (cut_gzip, r"bad\.jsonl\.gz"),
    (cut_weights, r"model\.safetensors"),
    (no_weights, r"hollow"),
    (other_vocabulary, r"tokenizer has \d+ tokens but the model .* has 512"),
    (existing_run, r"already holds a run"),
    (overlong, r"records over 512 tokens: .*json:\d+"),
    (lambda d, t: {"data.path": str(t / "nowhere.jsonl")}, "there is no file .*nowhere"),
    (lambda d, t: {"model.path": str(t / "nowhere")}, "nowhere"),
    (lambda d, t: {"data.template": "chatml"}, "chatml.*needs the control token"),
    (lambda d, t: {"data.template": "alpacca"}, "no template is called 'alpacca'"),
    (lambda d, t: {"device": "gpu"}, "device = 'gpu' is unknown"),
    (lambda d, t: {"attention": "flash9"}, "attention = 'flash9' is unknown"),
    (lambda d, t: {"data.validation": "0.99"}, "leaves none to train on"),
    (lambda d, t: {"eval.tasks": f"pubmedqa={t}/x"}, "x"),
    (lambda d, t: {"eval.tasks": f"pubmedq={t}/x"}, "did you mean pubmedqa"),
    (lambda d, t: {"train.stepz": "1"}, r"did you mean train\.steps"),
]


@pytest.mark.parametrize(("spoil", "sentence"), BAD)
def test_wrong_input_is_one_sentence_and_writes_nothing(
    spoil: Callable[[Path, Path], dict[str, str]],
    sentence: str,
    settings: dict[str, str],
    data: Path,
    tmp_path: Path,
) -> None:
    changed = {**settings, **spoil(data, tmp_path)}
    existed = (tmp_path / "out").exists()
    with pytest.raises((ValueError, OSError), match=sentence) as caught:
        call(changed)
    assert "\n" not in str(caught.value)
    assert existed or not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.toml"], "there is no recipe nowhere.toml"),
        (["--sett", "a=1"], "No such option"),
    ],
)
def test_wrong_usage(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 2
    assert sentence in result.output


def test_a_loss_that_is_not_finite_names_the_records(
    settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bioinstruct.train.step import StepResult

    monkeypatch.setattr(
        "bioinstruct.train.trainer.train_step", lambda *a: StepResult(float("nan"), 1.0)
    )
    sentence = r"the last 3 steps is not a finite number .*sample_32.json:\d+"
    with pytest.raises(ValueError, match=sentence):
        call(settings)


def run_main(settings: dict[str, str], **options: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(MAIN), *flags(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,  # type: ignore[call-overload]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        ({"train.lrr": "1"}, 1, "error: --set: unknown key train.lrr; did you mean train.lr?"),
        ({"data.path": "/nowhere"}, 1, "error: data.path: there is no file /nowhere"),
    ],
)
def test_exit_codes_of_the_script(
    settings: dict[str, str], changes: dict[str, str], code: int, sentence: str
) -> None:
    process = run_main({**settings, **changes})
    _, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert err.strip().splitlines()[-1] == sentence
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_adapter_and_exits_with_3(
    settings: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    process = run_main({**settings, "train.steps": "100000"})
    metrics = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert "the adapter so far is in" in err.splitlines()[-1]
    assert f"continue with: python {MAIN} {tmp_path}/out/run.toml --resume" in err
    assert "Traceback" not in err
    assert load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert (tmp_path / "out" / "loss.svg").is_file()


def test_stopped_is_raised_between_steps(
    settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bioinstruct.train import trainer

    take = trainer.train_step

    def interrupted(*arguments: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return take(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "train_step", interrupted)
    with pytest.raises(Stopped, match="stopped after step 1 of 4"):
        call(settings)
    assert len(rows(tmp_path / "out" / "metrics.jsonl")) == 1
