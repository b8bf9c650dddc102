"""The benches of single ops: they run, refuse what is wrong, and count what the kernels move."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bioinstruct.benches import (
    attention,
    campaign,
    cross_entropy,
    kernel_bench,
    layer,
    lora_kernel,
    rmsnorm_kernel,
    rope_kernel,
    run_all,
    swiglu_kernel,
)
from bioinstruct.benches.budget import check, normal
from bioinstruct.benches.halves import layer_calls
from bioinstruct.benches.kernel_bench import Bench, measure, predict
from bioinstruct.benches.traffic import kernel_bytes
from bioinstruct.kernels import dispatch, rmsnorm
from bioinstruct.kernels.rmsnorm import rmsnorm_reference

CPU = torch.device("cpu")
MODULES = (
    lora_kernel,
    layer,
    rmsnorm_kernel,
    swiglu_kernel,
    rope_kernel,
    cross_entropy,
    attention,
)
BENCHES = [module.BENCH for module in MODULES]
each_bench = pytest.mark.parametrize("bench", BENCHES, ids=lambda bench: bench.name)


@each_bench
def test_tiny_shapes_are_measured(bench: Bench) -> None:
    for shape in bench.tiny:
        row = measure(bench, shape, torch.float32, CPU, 1)
        assert json.loads(json.dumps(row)) == row
        assert 0 <= row["error_share"] <= 1
        assert {"ours", "eager", "copy"} <= row["seconds"].keys()
        assert not any("predicted" in key for key in row)


@each_bench
def test_a_dry_run_predicts_and_measures_nothing(bench: Bench) -> None:
    for shape in bench.shapes:
        row = predict(bench, shape, 2)
        assert json.loads(json.dumps(row))["assumed"]["gpu"] == "H200"
        assert "seconds" not in row
        for variant in row["predictions"].values():
            assert variant["predicted_seconds"] > 0
            ratio = variant["predicted_ratio_to_frozen"]
            assert ratio is None or 0.8 < ratio < 3


TARGETS = {
    "llama-7b o": (1.12, 1.16),
    "llama-7b gate_up": (1.065, 1.10),
    "llama-7b down": (1.09, 1.13),
}


@pytest.mark.parametrize("linear", TARGETS)
@pytest.mark.parametrize("dropped", [False, True])
def test_the_augmented_form_is_predicted_to_reach_its_target(linear: str, dropped: bool) -> None:
    (shape,) = (
        s
        for s in lora_kernel.BENCH.shapes
        if (s["linear"], s["T"], s["R"], s["p"] > 0) == (linear, 8192, 16, dropped)
    )
    found = predict(lora_kernel.BENCH, shape, 2)["predictions"]
    assert found["augmented"]["predicted_ratio_to_frozen"] <= TARGETS[linear][dropped]
    fused = found["fused"]["predicted_ratio_to_frozen"]
    assert 1 < fused < found["augmented"]["predicted_ratio_to_frozen"]
    order = ["augmented", "ours", "eager", "eager32"]
    seconds = [found[name]["predicted_seconds"] for name in order]
    assert seconds == sorted(seconds)


def test_all_run_in_one_command(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(run_all.__file__)), "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in tmp_path.iterdir()} == set(campaign.BENCHES)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == sum(len(bench.shapes) for bench in BENCHES)


def test_the_benches_are_all_there() -> None:
    assert list(campaign.BENCHES.values()) == BENCHES


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.parametrize("choice", ["reference", "triton"])
@pytest.mark.parametrize("shape", layer.BENCH.tiny, ids=lambda shape: f"p={shape['p']}")
def test_the_variants_of_a_layer_have_one_gradient(shape: Any, choice: str) -> None:
    if choice == "triton" and not dispatch.INTERPRETED:
        pytest.skip("runs in Triton's interpreter")
    with dispatch.forced(choice):
        case = layer.Case(shape, torch.float32, CPU)
        calls = case.variants()
        found = {}
        for name, call in calls.items():
            case.adapters.grad_P.zero_()
            case.x_TD.grad = None
            call()
            found[name] = case.x_TD.grad, case.adapters.grad_P.clone()
    dx, gradient = found["ours"]
    assert dx is not None and gradient.abs().max() > 0
    # its adapters are copies, with gradients of their own
    assert not found["eager"][1].any()
    for name in found.keys() - {"ours", "frozen", "gemms"}:
        torch.testing.assert_close(found[name][0], dx, rtol=1e-3, atol=1e-5 * float(dx.abs().max()))
    for name in found.keys() - {"ours", "frozen", "gemms", "eager"}:
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name][1], gradient, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize(
    "fault",
    [
        lambda y: y * 1.01,
        lambda y: torch.cat((y[:-1], y[-1:] * torch.nan)),
        lambda y: y[:-1],
        lambda y: y.double(),
        lambda y: y.detach() + 0 * y,
    ],
)
def test_wrong_results_are_not_timed(fault: Callable[[torch.Tensor], torch.Tensor]) -> None:
    inputs = normal((5, 8), (8,))
    check(rmsnorm, rmsnorm_reference, inputs, torch.float32, CPU)
    with pytest.raises(ValueError, match="is off by|is not|, not"):
        check(lambda *x: fault(rmsnorm(*x)), rmsnorm_reference, inputs, torch.float32, CPU)


def test_a_failed_check_stops_the_lora_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    op = lora_kernel.lora_linear
    monkeypatch.setattr(lora_kernel, "lora_linear", lambda *a: op(*a) * 1.01)
    monkeypatch.setattr(kernel_bench, "alternate", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(ValueError, match="is off by"):
        measure(lora_kernel.BENCH, lora_kernel.TINY[0], torch.float32, CPU, 1)


class Traffic:
    """Bytes that each launch loads and stores in Triton's interpreter, every address once.

    What a launch reads back of its own is in a cache, and does not count.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: list[tuple[dispatch.Launch, int]] = []
        self._seen: dict[str, dict[int, set[int]]] = {"load": {}, "store": {}}
        interpreter = pytest.importorskip("triton.runtime.interpreter")
        builder = type(interpreter.interpreter_builder)
        for kind in self._seen:
            self._watch(monkeypatch, builder, kind)
        launch = dispatch.launch

        def counted(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
            launch(kernel, grid, *arguments, **constants)
            self.launches.append((dispatch.Launch(kernel, arguments, constants), self._settled()))

        for name, module in list(sys.modules.items()):
            if name.startswith("bioinstruct.kernels.") and hasattr(module, "launch"):
                monkeypatch.setattr(module, "launch", counted)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, builder: Any, kind: str) -> None:
        name = f"create_masked_{kind}"
        call = getattr(builder, name)

        def watched(this: Any, pointers: Any, *rest: Any) -> Any:
            mask = rest[0] if kind == "load" else rest[1]
            itemsize = pointers.get_element_ty().primitive_bitwidth // 8
            addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
            found = set(np.unique(addresses).tolist())
            if kind == "load":
                found -= self._seen["store"].get(itemsize, set())
            self._seen[kind].setdefault(itemsize, set()).update(found)
            return call(this, pointers, *rest)

        monkeypatch.setattr(builder, name, watched)

    def _settled(self) -> int:
        moved = 0
        for by_size in self._seen.values():
            moved += sum(itemsize * len(addresses) for itemsize, addresses in by_size.items())
            by_size.clear()
        return moved


in_the_interpreter = pytest.mark.skipif(
    not dispatch.INTERPRETED, reason="counts in Triton's interpreter"
)


def check_formulas(traffic: Traffic, expected: set[str]) -> None:
    for launch, moved in traffic.launches:
        name = launch.kernel.fn.__name__
        assert (name, kernel_bytes(launch)) == (name, moved), launch.constants
    assert {launch.kernel.fn.__name__ for launch, _ in traffic.launches} == expected


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@in_the_interpreter
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("rows", [[136], [128, 40, 40]])
def test_the_formulas_of_a_linear_are_what_its_kernels_move(
    rows: list[int], p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"linear": "counted", "T": 96, "K": 200, "rows": rows, "R": 4, "p": p}
    traffic = Traffic(monkeypatch)
    with dispatch.forced("triton"):
        calls = lora_kernel.variants(shape, torch.float16, CPU)
        calls["ours"]()
        calls["augmented"]()
    masked = {"_masked_expand"} if p else set()
    check_formulas(traffic, {"_shrink", "_shrink_dy", "_gradient_of_a", "_sum_parts"} | masked)


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@in_the_interpreter
@pytest.mark.parametrize("R", [4, 24])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_formulas_of_a_layer_are_what_its_kernels_move(
    p: float, R: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {**layer.BENCH.tiny[0], "p": p, "R": R}
    with dispatch.forced("triton"):
        calls = layer.Case(shape, torch.float16, CPU).variants()
        traffic = Traffic(monkeypatch)
        calls["augmented"]()
    alone = {"_rotate", "_shrink", "_shrink_dy", "_sum_parts", "_gradient_of_a", "_swiglu_t"}
    masked = {"_masked_expand"} if p else set()
    few = {"_norm_t", "_norm_sums", "_norm_bwd_da", "_turn_back_lora", "_swiglu_bwd_lora"}
    # three ranks of 24 are more than the kernels of norm and rotation take; two are not
    many = {"_norm_t", "_norm_bwd_da", "_norm_sums", "_rmsnorm_fwd", "_rmsnorm_bwd", "_swiglu_bwd"}
    check_formulas(traffic, alone | masked | (few if R == 4 else many))


def test_a_prediction_is_what_the_layers_own_code_launches() -> None:
    """halves.py puts a layer together as model/augmented_layers.py does."""
    if not dispatch.INTERPRETED:
        pytest.skip("recorded in Triton's interpreter")
    shape = {**layer.BENCH.tiny[0], "p": 0.1}
    config = layer.config_of(shape)
    with dispatch.forced("triton"):
        calls = layer.Case(shape, torch.float32, CPU).variants()
    with dispatch.recorded() as made:
        calls["augmented"]()
    with torch.device("meta"):
        parts = layer_calls(config, shape["T"], shape["R"], shape["p"])
    with dispatch.recorded() as predicted:
        for part in parts.values():
            part()
    names = [sorted(launch.kernel.fn.__name__ for launch in found) for found in (made, predicted)]
    assert names[0] == names[1]
