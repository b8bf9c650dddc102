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
from bioinstruct.benches.kernel_bench import Bench, measure, predict
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
    """Bytes that kernels load and store in Triton's interpreter, each address once a launch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moved = 0
        self.seen: dict[str, list[Any]] = {"load": [], "store": []}
        interpreter = pytest.importorskip("triton.runtime.interpreter")
        builder = type(interpreter.interpreter_builder)
        for kind in self.seen:
            self._watch(monkeypatch, builder, kind)
        launch = dispatch.launch

        def counted(*arguments: Any, **constants: Any) -> None:
            launch(*arguments, **constants)
            self._settle()

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
            self.seen[kind].append((itemsize, addresses))
            return call(this, pointers, *rest)

        monkeypatch.setattr(builder, name, watched)

    def _settle(self) -> None:
        for accesses in self.seen.values():
            for itemsize in {size for size, _ in accesses}:
                touched = [a for size, a in accesses if size == itemsize]
                self.moved += itemsize * len(np.unique(np.concatenate(touched)))
            accesses.clear()


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.skipif(not dispatch.INTERPRETED, reason="counts in Triton's interpreter")
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("rows", [[136], [128, 40, 40]])
def test_the_formula_is_what_the_kernels_move(
    rows: list[int], p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"linear": "counted", "T": 96, "K": 200, "rows": rows, "R": 4, "p": p}
    traffic = Traffic(monkeypatch)
    with dispatch.forced("triton"):
        lora_kernel.variants(shape, torch.float16, CPU)["ours"]()
    assert traffic.moved == lora_kernel.kernel_bytes(shape, 2)
