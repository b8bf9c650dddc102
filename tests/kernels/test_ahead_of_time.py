"""Every kernel compiles for every architecture, without a GPU, and stays within its means."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bioinstruct.benches import ahead_of_time
from bioinstruct.benches.ahead_of_time import SHARED_BYTES, faults_of, record

triton = pytest.importorskip("triton", reason="Triton is not installed (it comes for Linux only)")
SCRIPT = Path(ahead_of_time.__file__)


def compile_all(*options: str) -> subprocess.CompletedProcess[str]:
    # the tests' own process may interpret its kernels, so another one compiles them
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def rows() -> Sequence[dict[str, Any]]:
    done = compile_all()
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_kernels_stay_within_their_baseline(
    rows: Sequence[dict[str, Any]], arch: int, data: Path
) -> None:
    baseline = json.loads((data / "ahead_of_time.json").read_text())
    if triton.__version__ not in baseline:
        pytest.skip(f"no baseline of Triton {triton.__version__}; record one (ahead_of_time.py)")
    recorded = baseline[triton.__version__]
    found = {row["kernel"]: row for row in rows if row["arch"] == arch}
    assert found.keys() == recorded.keys()
    for name, row in found.items():
        assert (row["stack_bytes"], row["local_bytes"]) == (0, 0)
        assert row["shared_bytes"] <= SHARED_BYTES[arch]
        assert row["tensor_cores"] == ("BLOCK_R" in name), name
        registers, shared_bytes = recorded[name][str(arch)]
        assert row["registers"] <= registers, name
        assert row["shared_bytes"] <= shared_bytes, name


@pytest.mark.slow
def test_every_kernel_is_compiled(rows: Sequence[dict[str, Any]]) -> None:
    assert {row["kernel"].split("[")[0] for row in rows} == {
        "_adamw", "_gemm_lora", "_gradient_of_a", "_mask", "_masked_expand", "_mirror",
        "_norm_bwd_da", "_norm_sums", "_norm_t", "_rmsnorm_bwd", "_rmsnorm_dw", "_rmsnorm_fwd",
        "_rotate", "_shrink", "_shrink_dy", "_softmax_gradient", "_square_sums", "_sum_parts",
        "_swiglu_bwd", "_swiglu_bwd_lora", "_swiglu_fwd", "_swiglu_t", "_turn_back_lora",
    }  # fmt: skip


ROW = {
    "triton": "1.0",
    "kernel": "_k",
    "arch": 89,
    "registers": 255,
    "stack_bytes": 0,
    "local_bytes": 0,
    "shared_bytes": 101_376,
}


def test_a_fit_kernel_has_no_fault() -> None:
    assert list(faults_of(ROW)) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stack_bytes": 8}, "_k on sm_89 spills 8 bytes"),
        ({"local_bytes": 4}, "_k on sm_89 spills 4 bytes"),
        ({"shared_bytes": 101_377}, "wants 101377 bytes of shared memory, the chip has 101376"),
    ],
)
def test_unfit_kernels_are_named(change: dict[str, int], sentence: str) -> None:
    (fault,) = faults_of({**ROW, **change})
    assert sentence in fault


def test_a_baseline_keeps_other_versions(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    record([ROW, {**ROW, "arch": 90}], path)
    record([{**ROW, "triton": "2.0", "registers": 8}], path)
    assert json.loads(path.read_text()) == {
        "1.0": {"_k": {"89": [255, 101_376], "90": [255, 101_376]}},
        "2.0": {"_k": {"89": [8, 101_376]}},
    }


def test_a_name_that_fits_nothing_is_refused() -> None:
    done = compile_all("--match", "nothing")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no kernel's name holds --match 'nothing'" in done.stderr


def test_a_part_is_no_baseline(tmp_path: Path) -> None:
    done = compile_all("--arch", "90", "--record", str(tmp_path / "x.json"))
    assert done.returncode == 2
    assert not os.listdir(tmp_path)
