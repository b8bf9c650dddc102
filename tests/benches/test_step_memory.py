"""The memory bench: it runs, in both ways, and its figures fit together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bioinstruct.benches import step_memory

SCRIPT = Path(step_memory.__file__)


@pytest.mark.parametrize("options", [("--fixed",), ("--method", "full")])
def test_one_line_of_figures(options: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "memory.jsonl"
    job = ["--device", "cpu", "--model", "tiny", "--documents", "2", "--document-tokens", "64"]
    job += ["--checkpoint-layers", "1"]
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            *job,
            *options,
            "--checkpoint-layers",
            "1",
            "--out",
            str(out),
        ],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert out.read_text() == done.stdout
    row = json.loads(done.stdout)
    assert row["ratio"] == row["predicted_bytes"] / row["measured_bytes"]
    assert row["allocator"] == ("fixed" if options == ("--fixed",) else "default")
    # the weights of the shape at least
    assert row["predicted_bytes"] > step_memory.shape("tiny").parameter_count() * 2


def test_an_unknown_shape() -> None:
    with pytest.raises(ValueError, match="'huge' is neither a file nor a shape that ships"):
        step_memory.shape("huge")
