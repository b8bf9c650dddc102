"""The data bench: it runs on real records, and its figures fit together."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bioinstruct.benches.data_speed import command
from bioinstruct.synth.console import note


def test_one_line_of_figures(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIOINSTRUCT_CACHE", str(tmp_path))  # put back after the command sets it
    words = data / "tokenizers" / "stories260K_tok512.model"
    records = data / "bioinstruct_real_sample_32.json"
    arguments = ["--tokenizer", str(words), "--in", str(records), "--records", "50"]
    out = tmp_path / "speed.jsonl"
    done = CliRunner().invoke(command, [*arguments, "--plan", "300", "--out", str(out)])
    assert done.exit_code == 0, note(str(done.exception))
    row = json.loads(out.read_text())
    assert (row["records"], row["planned"]) == (50, 300)
    assert [plan["batch"] for plan in row["plans"]] == [300, 2048, 128, 32]
    assert all(0 < plan["full"] <= 1 for plan in row["plans"])
    assert row["plans"][0]["full"] >= row["plans"][-1]["full"]
