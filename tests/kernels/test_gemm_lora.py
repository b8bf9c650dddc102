"""The product with the low-rank update in its accumulator, and the table that chooses its tiles."""

import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bioinstruct.benches.ahead_of_time import SHARED_BYTES
from bioinstruct.benches.budget import check, normal
from bioinstruct.kernels import Branch, Dropout, dispatch, gemm_choices, lora_linear
from bioinstruct.kernels.augmented import Augmented, augmented_linear
from bioinstruct.kernels.gemm_choices import CANDIDATES, DEFAULT, GemmConfig, Measured, nearest
from bioinstruct.kernels.gemm_lora import gemm_lora, gemm_lora_reference, takes_product
from bioinstruct.kernels.lora import lora_linear_reference

pytest.importorskip("triton", reason="Triton is not installed (it comes for Linux only)")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SMALL = GemmConfig(32, 32, 16, 2, 4, 2)


def masks(M: int) -> Dropout:
    positions = torch.arange(M, device=DEVICE)
    return Dropout(0.3, 4242424242, positions % 7, positions // 7 + 2**31 - 2)


def near(y: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert y.dtype == dtype
    if y.numel():
        error = (y.double() - exact).abs().max() / exact.abs().max()
        # one rounding of y; float32 products may sum in any order
        assert error <= (8e-7 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("M", "N", "K", "R"), [(0, 8, 8, 1), (1, 1, 1, 1), (5, 63, 17, 4), (100, 257, 63, 24)]
)
def test_gemm_lora(
    M: int, N: int, K: int, R: int, transposed: bool, dropped: bool, dtype: torch.dtype
) -> None:
    x, w, t, b = (z.to(DEVICE, dtype) for z in normal((M, K), (N, K), (M, R), (N, R)))
    if transposed:  # the backward pass: W and A as they lie
        w, b = w.T.contiguous().T, b.T.contiguous().T
    dropout = masks(M) if dropped else None
    exact = gemm_lora_reference(x.double(), w, t.double(), b, dropout, 3)
    with dispatch.forced("triton"):
        y = gemm_lora(x, w, t, b, dropout, 3, SMALL)
    near(y, exact, dtype)


@pytest.mark.parametrize("R", [1, 8, 16, 64])
def test_the_default_tiles_at_every_rank(R: int) -> None:
    x, w, t, b = (z.float().to(DEVICE) for z in normal((130, 40), (70, 40), (130, R), (70, R)))
    with dispatch.forced("triton"):
        y = gemm_lora(x, w, t, b)
    near(y, gemm_lora_reference(*(z.double() for z in (x, w, t, b))), torch.float32)


def test_strided_rows_and_wide_masters() -> None:
    wide, w, b = (z.float().to(DEVICE) for z in normal((9, 40), (12, 20), (12, 3)))
    x, t = wide[:, 8:28], wide[:, 30:33]
    with dispatch.forced("triton"):
        y = gemm_lora(x.half(), w.half(), t.half(), b, config=SMALL)
        rows = gemm_lora(x, w, t, b, config=SMALL)
    exact = gemm_lora_reference(x.double(), w.double(), t.double(), b.double())
    near(rows, exact, torch.float32)
    assert (y.double() - exact).abs().max() < 1e-2 * exact.abs().max()


def test_a_wrong_shape_is_named() -> None:
    x, w, t = torch.zeros(4, 8), torch.zeros(6, 8), torch.zeros(4, 65)
    with pytest.raises(ValueError, match=r"gemm_lora needs x \(M, K\).*got .*\(4, 65\)"):
        gemm_lora(x, w, t, torch.zeros(6, 65))
    with pytest.raises(ValueError, match="got"):
        gemm_lora(x, w, torch.zeros(4, 2), torch.zeros(5, 2))


# ---- the table ---------------------------------------------------------------------------------

ROW = Measured(8192, 4096, 4096, CANDIDATES[2], 300e-6, 350e-6)


def test_the_table_holds_no_gpu_that_has_not_run() -> None:
    """Empty, or with rows whose raw lines stand beside it."""
    results = Path(gemm_choices.__file__).parents[1] / "benches" / "results"
    measured = {
        json.loads(line)["device"]
        for file in results.glob("*.jsonl")
        for line in file.read_text().splitlines()
    }
    assert set(gemm_choices.load()) <= measured


def test_unknown_gpus_take_the_default_which_fits_the_smallest_chips() -> None:
    assert gemm_choices.config_for(torch.device("cpu"), 8192, 4096, 4096) == DEFAULT
    assert gemm_choices._found("NVIDIA Abacus", 128, 4096, 4096) is None
    assert DEFAULT.shared_bytes() <= 99 * 1024 == min(SHARED_BYTES.values())


def test_a_row_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    gemm_choices.record([ROW], "NVIDIA Abacus", path)
    other = ROW._replace(M=2048, seconds=340e-6, library_seconds=345e-6)
    gemm_choices.record([other], "NVIDIA Abacus", path)
    gemm_choices.record([ROW], "NVIDIA Counter", path)
    gemm_choices.record([ROW._replace(seconds=1.0)], "NVIDIA Counter", path)
    table = gemm_choices.load(path)
    assert table == {
        "NVIDIA Abacus": [other, ROW],
        "NVIDIA Counter": [ROW._replace(seconds=1.0)],
    }
    assert ROW.wins and not other.wins


@pytest.mark.parametrize(
    ("M", "N", "found"),
    [(8192, 4096, 8192), (4100, 4096, 8192), (16384, 4096, 8192), (2100, 4096, 2048),
     (4095, 4096, 2048), (1000, 4096, None), (16385, 4096, None), (8192, 4104, None)],
)  # fmt: skip
def test_the_nearest_row_is_taken(M: int, N: int, found: int | None) -> None:
    row = nearest([ROW._replace(M=2048), ROW], M, N, 4096)
    assert (None if row is None else row.M) == found


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"NVIDIA Abacus": [{"M": 1}]}', '{"NVIDIA Abacus": [3]}']
)
def test_a_damaged_table_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="table.json: the rows of GPU .* are not what"):
        gemm_choices.load(path)


# ---- the linears that ask it -------------------------------------------------------------------


def linear(form: str, rows: list[int], dropped: bool) -> list[str]:
    """Check a linear in one of its two forms against float64; names of the kernels that ran."""
    T, K, R = 20, 24, 4
    (weight,) = (w.to(DEVICE) for w in normal((sum(rows), K), seed=1))
    dropout = masks(T) if dropped else None
    names: list[str] = []

    def branches(masters: Sequence[Tensor]) -> list[Branch]:
        starts = accumulate((0, *rows[:-1]))
        pairs = zip(masters[::2], masters[1::2], starts, strict=True)
        return [Branch(a, b, start, number=i) for i, (a, b, start) in enumerate(pairs)]

    def ours(x: Tensor, *masters: Tensor) -> Tensor:
        own = branches(masters)
        if form == "augmented_linear":
            return augmented_linear(x, Augmented(weight.to(x.dtype), own), 0.5, dropout, 2)
        return lora_linear(x, weight.to(x.dtype), own, 0.5, dropout, 2)

    def reference(x: Tensor, *masters: Tensor) -> Tensor:
        own = weight.to(x.dtype), branches(masters), 0.5, dropout, 2
        return lora_linear_reference(x, *own)

    def run(kernel: Any, *arguments: Any, **constants: Any) -> None:
        names.append(kernel.fn.__name__)
        launch(kernel, *arguments, **constants)

    launch = dispatch.launch
    inputs = [0.3 * x for x in normal((T, K), *(s for n in rows for s in ((R, K), (n, R))))]
    with pytest.MonkeyPatch.context() as patch, dispatch.forced("triton"):
        patch.setattr("bioinstruct.kernels.gemm_lora.launch", run)
        check(ours, reference, inputs, torch.float32, DEVICE, roundings=2)
    return names


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("form", ["lora_linear", "augmented_linear"])
@pytest.mark.parametrize("rows", [[40], [16, 24]])
def test_the_table_decides_who_computes_a_linear(
    rows: list[int], form: str, dropped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert linear(form, rows, dropped) == []  # nothing is known of this device
    slow = ROW._replace(seconds=1.0, config=SMALL)
    monkeypatch.setattr(gemm_choices, "measured", lambda *_: slow)
    assert linear(form, rows, dropped) == []
    asked = []

    def known(_: torch.device, M: int, N: int, K: int) -> Measured:
        asked.append((M, N, K))
        return ROW._replace(config=SMALL)

    monkeypatch.setattr(gemm_choices, "measured", known)
    # the plain form adds the branches of a group to their own columns
    forward = form == "augmented_linear" or len(rows) == 1
    assert linear(form, rows, dropped) == ["_gemm_lora"] * (1 + forward)
    assert set(asked) == {(20, 24, 40)} | ({(20, 40, 24)} if forward else set())


def test_ranks_that_the_kernel_does_not_take_are_the_librarys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gemm_choices, "measured", lambda *_: ROW)
    x, w = torch.zeros(2, 3), torch.zeros(4, 3)
    assert [takes_product(x, w, R) for R in (0, 1, 64, 65)] == [False, True, True, False]
