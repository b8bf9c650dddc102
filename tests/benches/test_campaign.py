"""The GPU campaign, rehearsed: every stage, what a failed job costs, and the report of it all."""

import json
import runpy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from bioinstruct.benches import (
    campaign,
    check,
    harness,
    kernel_bench,
    probe,
    report,
    run_all,
    train_run,
)
from bioinstruct.benches.campaign import STAGES, Job, jobs
from bioinstruct.benches.cases import TINY, Case, Place, cases
from bioinstruct.benches.run_all import Campaign, run_stages
from bioinstruct.benches.workload import SHAPES
from bioinstruct.kernels import gemm_choices
from bioinstruct.synth.console import Stopped

CPU = torch.device("cpu")
PLACE = Place(CPU, torch.float32, TINY)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the rehearsal -----------------------------------------------------------------------------


@pytest.mark.slow
def test_all_four_stages_run_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each job's own command line, here in one process; another test starts real ones."""

    def run_here(command: list[str], environment: dict[str, str], limit_s: float) -> int:
        monkeypatch.setattr(sys, "argv", command[1:])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(command[1], run_name="__main__")
        return int(ended.value.code or 0)

    monkeypatch.setattr(run_all, "_run_limited", run_here)
    monkeypatch.setattr(
        run_all.importlib.util, "find_spec", lambda name: None if name == "peft" else object()
    )
    run_stages(Campaign(tmp_path, "cpu", 600), list(STAGES), tiny=True, rounds=1)
    log = lines(tmp_path / "jobs.jsonl")
    assert [row["exit_code"] for row in log[:-1]] == [0] * (len(log) - 1)
    assert log[-1]["left_out"] == "peft not installed"
    assert {row["stage"] for row in log} == set(STAGES)
    found = {
        row["bench"] for path in tmp_path.glob("*.jsonl") for row in lines(path) if "bench" in row
    }
    assert found == {
        "check",
        "probe",
        "train_step",
        "train_run",
        "demo_run",
        *(bench.name for bench in campaign.BENCHES.values()),
    }
    assert {row["question"] for row in lines(tmp_path / "probe.jsonl")} == set(probe.PREDICTIONS)
    assert not (tmp_path / "gemm_choices.json").exists()
    # none of it is a measurement of a GPU
    assert report.read(tmp_path) == []
    # once more: nothing is left to do
    monkeypatch.setattr(run_all, "_run_limited", lambda *_: pytest.fail("it ran again"))
    run_stages(Campaign(tmp_path, "cpu", 600), list(STAGES), tiny=True, rounds=1)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("tiny", [False, True])
def test_jobs_are_named_once_and_their_scripts_are_there(stage: str, tiny: bool) -> None:
    found = jobs(stage, tiny=tiny, rounds=20)
    assert found
    assert len({job.name for job in found}) == len(found)
    for job in found:
        assert (campaign.HERE / f"{job.script}.py").exists()
        assert 0 < job.limit_s <= 600


def test_every_match_of_the_campaign_holds_a_shape() -> None:
    for stage in ("probe", "bench"):
        for job in jobs(stage, tiny=False, rounds=20):
            if "--match" in job.arguments:
                match = job.arguments[job.arguments.index("--match") + 1]
                shapes = [json.dumps(shape) for shape in campaign.BENCHES[job.script].shapes]
                assert any(match in text for text in shapes), match


# ---- what a failed job costs -------------------------------------------------------------------


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A campaign of three scripts: one writes a line and hangs, one crashes, one ends well."""
    begin = "import sys, time, os\nout = sys.argv[sys.argv.index('--out') + 1]\n"
    line = "open(out, 'a').write('{}\\n')\n"
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "hangs.py").write_text(begin + line + "time.sleep(600)\n")
    (folder / "crashes.py").write_text(begin + "os.abort()\n")
    (folder / "ends.py").write_text(begin + line)
    limits = {"hangs": 3.0, "crashes": 20.0, "ends": 20.0}
    monkeypatch.setattr(run_all, "HERE", folder)
    monkeypatch.setattr(
        run_all, "jobs", lambda *_, **__: [Job(n, n, (), s) for n, s in limits.items()]
    )
    return folder


def test_a_job_that_hangs_or_crashes_costs_only_itself(tmp_path: Path, scripts: Path) -> None:
    out = tmp_path / "out"
    start_s = time.monotonic()
    with pytest.raises(ValueError, match="2 jobs failed: hangs, crashes"):
        run_stages(Campaign(out, "cpu", 60), ["probe"], tiny=True, rounds=1)
    assert time.monotonic() - start_s < 60
    log = lines(out / "jobs.jsonl")
    assert [row["exit_code"] for row in log] == [None, -6, 0]
    assert log[0]["seconds"] >= 3 >= log[0]["limit_s"]
    # what it had flushed stays
    assert lines(out / "hangs.jsonl") == lines(out / "ends.jsonl") == [{}]
    (scripts / "hangs.py").write_text("")
    (scripts / "crashes.py").write_text("")
    run_stages(Campaign(out, "cpu", 60), ["probe"], tiny=True, rounds=1)
    # the one that had ended well did not run again
    assert lines(out / "ends.jsonl") == [{}]
    assert [row["job"] for row in lines(out / "jobs.jsonl")[3:]] == ["hangs", "crashes"]


def test_the_budget_ends_before_the_jobs(tmp_path: Path, scripts: Path) -> None:
    with pytest.raises(Stopped, match=r"before 3 jobs \(hangs, crashes, ends\); .* --resume"):
        run_stages(Campaign(tmp_path / "out", "cpu", 1), ["probe"], tiny=True, rounds=1)


def test_a_job_gets_no_more_than_what_is_left(tmp_path: Path, scripts: Path) -> None:
    campaign_ = Campaign(tmp_path / "out", "cpu", 0.5)
    assert not campaign_.run("probe", Job("hangs", "hangs", (), 300))
    assert lines(tmp_path / "out" / "jobs.jsonl")[0]["limit_s"] <= 0.5


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--tiny"], 2, "--out is missing"),
        (["--device", "cpu", "--out", "OUT/new"], 1, "rehearse with --device cpu --tiny"),
        (
            ["--device", "cpu", "--tiny", "--out", "OUT"],
            1,
            "holds a campaign already; add --resume",
        ),
        (["--stage", "lunch", "--out", "OUT"], 2, "Invalid value for '--stage'"),
    ],
)
def test_wrong_options(options: list[str], code: int, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "jobs.jsonl").write_text("")
    arguments = [option.replace("OUT", str(tmp_path)) for option in options]
    found = CliRunner().invoke(run_all.command, arguments)
    text = found.output + str(found.exception)
    assert sentence in text
    assert (found.exit_code or 1) == code


# ---- single parts ------------------------------------------------------------------------------


def test_shapes_that_have_a_line_are_left_out(tmp_path: Path) -> None:
    bench, out = campaign.BENCHES["swiglu_kernel"], tmp_path / "x.jsonl"
    shape = bench.tiny[0]
    assert not kernel_bench._is_known(bench, shape, out)
    out.write_text(json.dumps(kernel_bench.predict(bench, shape, 2)) + "\n")
    assert not kernel_bench._is_known(bench, shape, out)
    with out.open("a") as file:
        file.write(json.dumps({"bench": bench.name, **shape, "seconds": {}}) + "\n")
    assert kernel_bench._is_known(bench, shape, out)
    assert not kernel_bench._is_known(bench, {**shape, "T": 8}, out)
    assert not kernel_bench._is_known(campaign.BENCHES["layer"], shape, out)


def test_rates_are_those_of_this_process() -> None:
    rate = kernel_bench.rates(torch.float32, CPU, 0.0)
    assert rate.flops_per_s > 1e6 and rate.bytes_per_s > 1e6
    assert kernel_bench.rates(torch.float32, CPU, 0.0) is rate


def test_variants_go_round_their_sets() -> None:
    calls: list[str] = []
    made = [{n: lambda n=n, i=i: calls.append(f"{n}{i}") for n in "ab"} for i in range(3)]
    found = kernel_bench.time_variants(made, 1, CPU)
    assert calls == ["a0", "a1", "a2", "b0", "b1", "b2"] * 2
    assert found.seconds.keys() == {"a", "b"} and not found.not_captured


def test_every_op_repeats_and_stands_large_offsets() -> None:
    for case in cases(PLACE):
        assert check.repeat(case, PLACE, 100)["right"], case.name
        row = check.offsets(case, PLACE, 5000)
        assert row["right"] and row["elements"] > 5000, row


def test_faults_are_seen() -> None:
    count = iter(range(1000))
    drifting = Case("drifting", ((4,),), (), lambda _, x: x * (1 + next(count)))
    assert not check.repeat(drifting, PLACE, 70)["right"]
    wrapping = Case("wrapping", ((4,),), (), lambda i, x: torch.cat((x[:1], x[:-1])) * 2)
    assert not check.offsets(wrapping, PLACE, 400)["right"]
    idle = Case("idle", ((4,),), (), lambda _, x: x * 0)
    assert not check.offsets(idle, PLACE, 400)["right"]
    lost = Case("lost", ((4,),), (), lambda _, x: x * torch.nan)
    assert not check.repeat(lost, PLACE, 70)["right"]
    assert not check.offsets(lost, PLACE, 400)["right"]


def test_an_op_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> dict[str, Any]:
        raise RuntimeError("out of memory\nand more")

    rows = list(check.each_op(fails, PLACE, 1))
    assert {row["failure"] for row in rows} == {"out of memory"}
    assert not any(row["right"] for row in rows)


def test_a_missing_sanitizer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.shutil, "which", lambda _: None)
    row = check.sanitizer("racecheck", "")
    assert row["right"] and row["skipped_because"] == "compute-sanitizer is not installed"


def test_tests_are_counted_and_their_failures_seen(tmp_path: Path) -> None:
    path = tmp_path / "test_some.py"
    path.write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    row = check.tests(str(path), "")
    assert (row["tests"], row["failures"], row["right"]) == (2, 1, False)
    assert check.tests(str(path), "test_a")["right"]
    # a name that fits nothing proves nothing
    assert not check.tests(str(path), "test_c")["right"]


def test_the_gpu_s_state_is_what_nvidia_smi_says(monkeypatch: pytest.MonkeyPatch) -> None:
    values = ["1980", "2619", "512.3", "700.00", "48", "0x0", "580.1"]

    def smi(command: list[str], **_: object) -> SimpleNamespace:
        assert command[0] == "nvidia-smi" and command[-2:] == ["-i", "1"]
        return SimpleNamespace(returncode=0, stdout=(", ".join(values) + "\n").encode())

    monkeypatch.setattr(harness.subprocess, "run", smi)
    state = harness.gpu_state(torch.device("cuda:1"))
    assert state == dict(zip(harness.GPU_FIELDS, values, strict=True))
    assert harness.gpu_state(CPU) is None
    monkeypatch.setattr(harness.subprocess, "run", lambda *_, **__: 1 / 0)
    assert harness.gpu_state(CPU) is None


def test_a_training_run_s_figures_fit_together() -> None:
    training = train_run.Training(SHAPES["tiny"], CPU, torch.float32, 200)
    (first, last) = (list(done) for done in train_run.run(training, 5))
    assert len(last) == 5 and len(first) < 5
    row = train_run.figures(training, last, 0.0)
    assert row["steps"] == 5 and row["mfu"] is None
    timed = last[train_run.WARM_UP :]
    assert row["tokens_per_s"] == pytest.approx(
        sum(s["tokens"] for s in timed) / sum(s["seconds"] for s in timed)
    )
    assert all(step["tokens"] <= 200 for step in last)
    assert row["smallest_grad_norm"] > 0


def test_kinds_of_kernels() -> None:
    names = {
        "nvjet_tst_256x128": "products",
        "flash_fwd_splitkv": "attention",
        "_shrink_dy": "rank-wide passes",
        "_adamw": "optimizer",
        "_rmsnorm_fwd": "memory-bound ops",
    }
    assert {name: train_run.kind_of(name) for name in names} == names


# ---- the report --------------------------------------------------------------------------------


def test_the_readme_of_the_benches_is_made_of_their_results() -> None:
    folder = Path(report.__file__).parent
    text = report.render(report.read(folder / "results"))
    assert (folder / "README.md").read_text() == text, "run python benches/report.py"


def test_without_a_gpu_nothing_is_called_measured() -> None:
    text = report.render([])
    assert "**No GPU has run these benches yet.**" in text
    assert text.count("not measured") == len(report.TARGETS)
    assert "reached" not in text.replace("reached or", "")


def line(**more: Any) -> dict[str, Any]:
    shape = {"linear": "llama-7b o", "T": 8192, "R": 16, "p": 0.0}
    return {
        "bench": "lora_linear",
        "device": "NVIDIA Abacus",
        "commit": "c0ffee",
        "versions": {"torch": "2.11", "triton": "3.6.0"},
        "gpu": {"driver_version": "580"},
        **shape,
        **more,
    }


def seconds(**medians: float) -> dict[str, dict[str, float]]:
    return {name: {"median": value} for name, value in medians.items()}


def test_measured_stands_beside_predicted() -> None:
    slow = line(seconds=seconds(ours=1.3, augmented=1.2, frozen=1.0, eager=1.4, eager32=1.5))
    text = report.render([slow])
    assert "## NVIDIA Abacus" in text and "driver 580, commit c0ffee" in text
    assert "| o, 4096 x 4096 | <= 1.12 | 1.119 | 1.200 | missed by 0.080 |" in text
    assert "| o over the eager formula, float32 adapters | >= 1.45 | 1.667 | 1.250 | missed" in text
    assert "ours 1.300, augmented 1.200, eager 1.400, eager32 1.500" in text
    fast = line(seconds=seconds(ours=1.3, augmented=1.1, frozen=1.0))
    assert "| 1.119 | 1.100 | reached |" in report.render([slow, fast])


def test_checks_and_training_are_reported() -> None:
    ran = line(
        bench="train_run",
        model="llama-7b",
        whole=True,
        tokens_per_s=21_500.0,
        share_of_gemm_floor=0.84,
        mfu=0.58,
        peak_bytes=44e9,
        expected_bytes=43e9,
        loss_first_quarter=10.0,
        loss_last_quarter=8.0,
    )
    wrong = line(bench="check", part="offsets", op="rope", right=False)
    tested = line(bench="check", part="tests", file="t.py", right=True, tests=9, skipped=2)
    text = report.render([ran, wrong, tested])
    assert (
        "| llama-7b | 21,500 | 0.840 | 0.580 | 44.0 GB (43.0 expected) | 10.000 to 8.000 |" in text
    )
    assert "| offsets: rope | WRONG |" in text and "| tests: t.py | right, 7 tests |" in text


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"device": "cpu"}\n{"dev\n')
    with pytest.raises(ValueError, match=r"x.jsonl:2 is no JSON object; remove the line"):
        report.read(tmp_path)


def test_the_table_of_choices_is_empty_without_a_gpu() -> None:
    assert probe.fitting(CPU) == list(gemm_choices.CANDIDATES)
