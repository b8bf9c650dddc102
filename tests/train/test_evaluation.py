"""What is measured while training, what is kept as best, and when a run ends early."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bioinstruct.train import evaluation
from bioinstruct.train.data.batch import collate
from bioinstruct.train.evaluation import validation_losses
from bioinstruct.train.loop import train
from bioinstruct.train.plan.prepare import prepare
from bioinstruct.train.report import tensorboard_log
from bioinstruct.train.report.profiling import check_reached, read_steps
from bioinstruct.train.resume.standing import Standing
from bioinstruct.train.run import Run, read_run
from bioinstruct.train.step import summed_loss


@pytest.fixture
def run(data: Path, small: dict[str, str], tmp_path: Path) -> Callable[..., Run]:
    """Settings of a run on real records of two files and three categories."""
    records = json.loads((data / "bioinstruct_real_sample_32.json").read_text())
    short = [r for r in records if len(r["instruction"] + r["input"] + r["output"]) < 560]
    for i, record in enumerate(short):
        record["category"] = ("qa", "ie", "")[i % 3]
    for name, part in (("one", short[:7]), ("two", short[7:12])):
        text = "".join(json.dumps(record) + "\n" for record in part)
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "held.jsonl").write_text((tmp_path / "two.jsonl").read_text())

    def read(**changes: object) -> Run:
        settings = small | {
            "data.path": f'["{tmp_path}/one.jsonl", "{tmp_path}/two.jsonl"]',
            "data.on_overlong": "error",
            "data.validation": 0.5,
            "train.steps": 6,
            "train.batch_samples": 2,
            "train.lr": 1e-3,
            "train.samples": 0,
            "train.eval_every": 1,
            "lora.r": 2,
            "out": tmp_path / "out",
        }
        settings |= {name.replace("__", "."): value for name, value in changes.items()}
        return read_run(None, [f"{key}={value}" for key, value in settings.items()])

    return read


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_losses_of_groups_are_those_of_their_records(run: Callable[..., Run]) -> None:
    prepared = prepare(run())
    held = prepared.validation
    assert held is not None
    losses = validation_losses(prepared, held)
    assert len(losses) > 2
    draws = dict.fromkeys(range(len(held)), 0)
    alone = [
        summed_loss(prepared.llm.model, prepared.adapters, collate(held, [i], draws))
        for i in range(len(held))
    ]
    for group in losses:
        members = [
            i
            for i in range(len(held))
            if held.sources.names[held.sources.ids[i]] == group.source
            and held.categories.names[held.categories.ids[i]] == group.category
        ]
        assert group.loss == pytest.approx(sum(alone[i] for i in members), rel=1e-5)
        assert group.tokens == int(held.supervised[members].sum())
    assert sum(group.tokens for group in losses) == int(held.supervised.sum())


def test_the_row_tells_the_loss_by_source_and_category(
    run: Callable[..., Run], tmp_path: Path
) -> None:
    out = train(run(train__steps=1), "test", "test")
    (row,) = [row for row in rows(out) if "val_loss" in row]
    assert set(row["val_loss_by_source"]) == {f"{tmp_path}/one.jsonl", f"{tmp_path}/two.jsonl"}
    assert set(row["val_loss_by_category"]) == {"qa", "ie", "none"}
    for table in (row["val_loss_by_source"], row["val_loss_by_category"]):
        assert min(table.values()) <= row["val_loss"] <= max(table.values())


def test_the_best_adapter_is_kept_and_a_run_that_waits_ends(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Validation losses 3, 2, 2.5, 2.5: the second is best, and two later ones are enough."""
    told, saved = iter([3.0, 2.0, 2.5, 2.5, 0.0]), []
    real = evaluation.validate

    def validate(prepared: Any, *rest: Any) -> float:
        real(prepared, *rest)
        saved.append(prepared.adapters.flat_P.clone())
        return next(told)

    monkeypatch.setattr(evaluation, "validate", validate)
    out = train(run(train__keep_best="val_loss", train__patience=2), "test", "test")
    assert [row["step"] for row in rows(out) if "loss" in row] == [1, 2, 3, 4]
    assert "stopping early: val_loss has not been better than 2 (step 2)" in capsys.readouterr().err
    for folder, flat_P in (("adapter-best", saved[1]), ("adapter", saved[3])):
        tensors = load_file(out / folder / "adapter_model.safetensors")
        total = sum(float(t.double().sum()) for t in tensors.values())
        assert total == pytest.approx(float(flat_P.double().sum()), abs=1e-6)
    states = sorted(path.name for path in (out / "state").iterdir())
    # of states there are the best and the newest; train.keep = 2
    assert states == ["finished", "lock", "step-00000002", "step-00000004"]
    capsys.readouterr()
    assert train(run(train__keep_best="val_loss", train__patience=2), "t", "t", resume=True) == out
    assert "is finished" in capsys.readouterr().err


def test_tasks_are_scored_while_training_and_say_what_is_best(
    run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "small.tsv"
    corpus.write_text("Ataxia\tB-Disease\nis\tO\nrare\tO\n\nNo\tO\ndisease\tO\n\n")
    changes = {
        "eval__tasks": f'["ncbi-disease={corpus}"]',
        "eval__every": 2,
        "train__keep_best": "ncbi-disease:recall",
        "train__steps": 4,
    }
    real, asked = evaluation.score, []

    def score(*arguments: Any) -> dict[str, dict[str, float]]:
        asked.append(real(*arguments))
        return {"ncbi-disease": {"f1": 0.9 - len(asked) / 10, "recall": len(asked) / 10}}

    monkeypatch.setattr(evaluation, "score", score)
    out = train(run(**changes), "test", "test")
    found = [row for row in rows(out) if "scores" in row]
    assert [row["step"] for row in found] == [2, 4]
    assert set(found[0]["scores"]["ncbi-disease"]) == {"f1", "precision", "recall"}
    state = json.loads((out / "state" / "step-00000004" / "state.json").read_text())
    assert state["facts"]["standing"]["best_step"] == 4
    assert (out / "eval-step-2" / "results.json").is_file()
    name = "adapter_model.safetensors"
    best, last = (load_file(out / f / name) for f in ("adapter-best", "adapter"))
    assert all(torch.equal(best[key], last[key]) for key in last)
    results = json.loads((out / "eval-after" / "results.json").read_text())
    assert results["versions"]["operations"].startswith(("C (", "torch ("))
    assert results["rows"][0]["system"] == "after tuning"
    assert results["rows"][0]["adapter"] == str(out / "adapter-best")
    assert "what was scored: `adapter-best/`" in (out / "report.md").read_text()


def test_scores_from_before_an_interruption_are_not_made_again(
    run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed while it scored the tuned model scores that alone."""
    corpus = tmp_path / "small.tsv"
    corpus.write_text("Ataxia\tB-Disease\nis\tO\nrare\tO\n\nNo\tO\ndisease\tO\n\n")
    asked = run(eval__tasks=f'["ncbi-disease={corpus}"]', train__steps=1)
    from bioinstruct.train import loop

    real, stages = loop.score_tasks, []

    def score(*arguments: Any, outcome: Path | None) -> Any:
        stages.append(arguments[-1])
        if stages == ["before", "after"]:
            raise KeyboardInterrupt
        return real(*arguments, outcome=outcome)

    monkeypatch.setattr(loop, "score_tasks", score)
    with pytest.raises(Exception, match="stopped after step 1 of 1.*--resume"):
        train(asked, "test", "test")
    out = train(asked, "test", "test", resume=True)
    assert stages == ["before", "after", "after"]
    report = (out / "report.md").read_text()
    assert "before tuning" in report and "after tuning" in report


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train__keep_best": "val_los"}, "train.keep_best = 'val_los' is unknown"),
        ({"train__patience": 2}, "train.patience needs train.keep_best"),
        ({"eval__every": 2}, "eval.every needs eval.tasks"),
        (
            {"train__keep_best": "val_loss", "data__validation": 0.0},
            "needs data.validation and train.eval_every",
        ),
        (
            {"train__keep_best": "ncbi-disease", "eval__tasks": '["ncbi-disease=x"]'},
            "needs eval.every",
        ),
        (
            {
                "train__keep_best": "ncbi-disease:f2",
                "eval__tasks": '["ncbi-disease=x"]',
                "eval__every": 1,
            },
            "ncbi-disease has no score 'f2'",
        ),
    ],
)
def test_settings_without_effect_are_refused(
    run: Callable[..., Run], changes: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    corpus = tmp_path / "x"
    corpus.write_text("Ataxia\tB-Disease\nis\tO\n\n")
    with pytest.raises(ValueError, match=sentence):
        changed = {
            k: v.replace("=x", f"={corpus}") if isinstance(v, str) else v
            for k, v in changes.items()
        }
        train(run(**changed), "test", "test")


def test_a_score_that_is_not_a_number_is_never_best() -> None:
    standing = Standing(1, 1)
    assert not standing.judge(float("nan"), lower_is_better=True)
    assert standing.judge(2.0, lower_is_better=True)
    assert not standing.judge(2.0, lower_is_better=True)
    assert standing.judge(1.0, lower_is_better=True)
    assert standing.since_best == 0


# ---- logs --------------------------------------------------------------------------------------


def test_a_trace_of_steps_opens_as_json(run: Callable[..., Run]) -> None:
    out = train(run(train__steps=4), "test", "test", profile=(2, 3))
    trace = json.loads((out / "profile-2-3.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "aten::mm" in names
    steps = [event for event in trace["traceEvents"] if event.get("name") == "step"]
    assert len(steps) == 2


@pytest.mark.parametrize(("steps", "taken"), [((5, 9), 0), ((2, 3), 2)])
def test_a_trace_of_steps_that_are_not_taken_is_refused(steps: tuple[int, int], taken: int) -> None:
    sentence = f"--profile {steps[0]}:{steps[1]} would trace nothing: .* steps {taken + 1} to 4"
    with pytest.raises(ValueError, match=sentence):
        check_reached(steps, taken, 4)
    check_reached((3, 9), 2, 4)


@pytest.mark.parametrize("text", ["", "3", "3:", "a:b", "0:2", "4:3", "1:2:3", "-1:2"])
def test_a_trace_needs_two_steps(text: str) -> None:
    with pytest.raises(ValueError, match=f"--profile '{text}' must be a:b"):
        read_steps(text)


def test_without_tensorboard_the_setting_is_refused(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        train(run(train__tensorboard="true"), "test", "test")


def test_tensorboard_shows_the_rows(run: Callable[..., Run]) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = train(run(train__steps=2, train__tensorboard="true"), "test", "test")
    shown = EventAccumulator(str(out / tensorboard_log.FOLDER))
    shown.Reload()
    for name in ("loss", "grad_norm", "val_loss", "val_loss_by_category/qa"):
        scalars = shown.Scalars(name)
        assert [s.step for s in scalars] == [1, 2]
    losses = [row["loss"] for row in rows(out) if "loss" in row]
    assert [s.value for s in shown.Scalars("loss")] == pytest.approx(losses)


def test_numbers_of_a_row() -> None:
    row = {"step": 3, "loss": 1.5, "mfu": None, "scores": {"task": {"f1": 0.5}}, "event": "x"}
    assert tensorboard_log.numbers(row) == {"loss": 1.5, "scores/task/f1": 0.5}


def test_deterministic_mode_is_turned_on(run: Callable[..., Run]) -> None:
    torch.use_deterministic_algorithms(False)
    train(run(train__steps=1, train__deterministic="true"), "test", "test")
    assert torch.are_deterministic_algorithms_enabled()
