"""What the benches share: turns, statistics, rows, processes, and the documents they time."""

import json
import time
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from bioinstruct.benches import peers_step
from bioinstruct.benches.harness import (
    CPU_FLAGS,
    alternate,
    describe,
    median_ratio,
    report,
    run_alone,
    summary,
)
from bioinstruct.benches.workload import (
    SHAPES,
    Job,
    job_options,
    make_batches,
    random_documents,
)

CPU = torch.device("cpu")


def test_variants_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    seconds = alternate({name: lambda n=name: calls.append(n) for name in "abc"}, 2, CPU)
    assert calls == list("abc") * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_what_is_timed_is_the_call() -> None:
    (seconds,) = alternate({"sleep": lambda: time.sleep(0.02)}, 1, CPU)["sleep"]
    assert 0.02 <= seconds < 1


def test_a_drifting_host_does_not_change_a_ratio() -> None:
    drift = [1.0, 1.7, 3.1, 0.6, 5.0]
    assert median_ratio([1.2 * d for d in drift], drift) == pytest.approx(1.2)
    with pytest.raises(ValueError, match="shorter|longer"):
        median_ratio([1.0], [1.0, 2.0])


def test_summary() -> None:
    assert summary([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}
    assert summary([2.0]) == {"median": 2.0, "p20": 2.0, "p80": 2.0}


def test_a_row_is_printed_and_appended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a" / "rows.jsonl"
    report({"x": 1}, out)
    report({"x": 2}, out)
    report({"x": 3}, None)
    assert capsys.readouterr().out == '{"x": 1}\n{"x": 2}\n{"x": 3}\n'
    assert out.read_text() == '{"x": 1}\n{"x": 2}\n'


def test_a_row_without_a_number_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        report({"x": float("nan")}, None)
    assert capsys.readouterr().out == ""


def test_the_machine_is_described() -> None:
    row = describe(CPU, ["no-such-package"])
    assert json.loads(json.dumps(row)) == row
    assert row["device"] == "cpu" and row["cpu"]
    assert set(row["cpu_flags"]) <= set(CPU_FLAGS)
    assert row["threads"] == torch.get_num_threads()
    assert row["operations"].startswith(("C (", "torch ("))
    assert row["versions"]["torch"] == torch.__version__
    assert row["versions"]["no-such-package"] is None


def test_another_process_returns_its_last_line(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('noise')\nprint('{\"args\": %d}' % len(sys.argv))\n")
    assert run_alone(str(script), ["a", "b"]) == {"args": 3}


def test_a_process_that_fails_is_named(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit(7)\n")
    with pytest.raises(ValueError, match="script.py -x ended with exit code 7"):
        run_alone(str(script), ["-x"])


# ---- documents ---------------------------------------------------------------------------------


@given(st.lists(st.integers(2, 40), min_size=1, max_size=8), st.integers(40, 90))
@settings(max_examples=50, deadline=None)
def test_documents_and_packs(lengths: list[int], pack_tokens: int) -> None:
    tokens = random_documents(SHAPES["tiny"], lengths)
    assert tokens.lengths.tolist() == lengths
    assert tokens.supervised.tolist() == [n // 2 for n in lengths]
    assert int(tokens.arrays[0].max()) < SHAPES["tiny"].vocab_size
    batches = make_batches(tokens, pack_tokens, CPU)
    spans = [b - a for batch in batches for a, b in batch.pack.documents.spans()]
    assert spans == lengths
    assert max(len(batch.pack.ids_T) for batch in batches) <= pack_tokens
    for batch in batches:
        ends = batch.pack.documents.bounds[1:]
        # the second half of each, up to its last row
        assert set(ends) <= {int(row) + 1 for row in batch.rows_S}
        inner = [row for row in batch.rows_S.tolist() if row + 1 not in ends]
        following = batch.pack.ids_T[[row + 1 for row in inner]]
        labels = dict(zip(batch.rows_S.tolist(), batch.labels_S.tolist(), strict=True))
        assert following.tolist() == [labels[row] for row in inner]


def test_a_pack_that_holds_no_document_is_refused() -> None:
    with pytest.raises(ValueError, match="--pack-tokens 15 cannot hold a document of 16 tokens"):
        Job(device="cpu", model="tiny", documents=1, document_tokens=16, pack_tokens=15, steps=1)


@pytest.mark.parametrize("pack_tokens", [None, 64])
def test_a_job_survives_its_options(pack_tokens: int | None) -> None:
    job = Job(
        device="cpu",
        model="tiny",
        documents=3,
        document_tokens=32,
        pack_tokens=pack_tokens,
        steps=5,
    )
    found: list[Job] = []
    command = click.command()(job_options(lambda **options: found.append(Job(**options))))
    CliRunner().invoke(command, job.arguments(), catch_exceptions=False)
    assert found == [job]
    assert (job.tokens, job.lengths) == (96, [32, 32, 32])


def test_the_timed_shapes_have_the_parameters_of_their_model_cards() -> None:
    counts = {name: config.parameter_count() for name, config in SHAPES.items() if name != "tiny"}
    assert counts == {
        "llama-7b": 6_738_415_616,
        "llama-13b": 13_015_864_320,
        "llama-3-8b": 8_030_261_248,
        "smollm2-135m": 134_515_008,
    }


# ---- beside transformers and peft --------------------------------------------------------------


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_step.importlib.util, "find_spec", lambda name: None)
    job = Job(device="cpu", model="tiny", documents=1, document_tokens=8, pack_tokens=None, steps=1)
    with pytest.raises(ValueError, match="transformers is not installed here"):
        peers_step.measure(job, ["float32"], 1)


def test_every_program_runs_in_every_dtype() -> None:
    job = Job(device="cpu", model="tiny", documents=4, document_tokens=8, pack_tokens=None, steps=1)
    variants = peers_step.variants_of(job, ["float32", "bfloat16"])
    assert list(variants) == [
        "ours float32",
        "peer float32, 1 a batch",
        "peer float32, 4 a batch",
        "ours bfloat16",
        "peer bfloat16, 1 a batch",
        "peer bfloat16, 4 a batch",
    ]
    assert all(job.arguments() == v.arguments[: len(job.arguments())] for v in variants.values())


def rows(tokens_per_s: list[float], peak: int) -> list[dict[str, Any]]:
    return [
        {"tokens_per_s": s, "peak_rss_bytes": peak, "peak_gpu_bytes": None, "grad_norm": 1.0}
        for s in tokens_per_s
    ]


def test_the_faster_of_each_is_compared_and_memory_in_one_dtype() -> None:
    job = Job(device="cpu", model="tiny", documents=2, document_tokens=8, pack_tokens=None, steps=1)
    variants = peers_step.variants_of(job, ["float32", "bfloat16"])
    figures = [([10, 20], 4), ([4, 8], 8), ([5, 10], 16), ([6, 12], 2), ([8, 16], 5), ([1, 2], 20)]
    found = peers_step.compare(
        variants,
        {name: rows(*figure) for name, figure in zip(variants, figures, strict=True)},
    )
    assert found["ratio_tokens_per_s"] == pytest.approx(10 / 8)
    assert found["ratio_tokens_per_s_by_dtype"] == pytest.approx(
        {"float32": 10 / 5, "bfloat16": 6 / 8}
    )
    assert found["ratio_peak_bytes"] == pytest.approx(
        {
            "peer float32, 1 a batch": 4 / 8,
            "peer float32, 2 a batch": 4 / 16,
            "peer bfloat16, 1 a batch": 2 / 5,
            "peer bfloat16, 2 a batch": 2 / 20,
        }
    )
