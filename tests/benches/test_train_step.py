"""The step bench: it runs, its figures fit together, and it refuses to time what is wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bioinstruct.benches import train_step
from bioinstruct.benches.eager import EagerLora, EagerStep
from bioinstruct.benches.train_step import (
    LoraStep,
    attention_products,
    check_gradients,
    frozen_pass,
    gemm_flops,
    gemm_list,
    over_packs,
    run_gemms,
    run_products,
    side_by_side,
)
from bioinstruct.benches.workload import SHAPES, Job, Step, make_step
from bioinstruct.model.adapters import projection_shapes
from bioinstruct.model.augmented_layers import Residual
from bioinstruct.train.step import add_gradient

SCRIPT = Path(train_step.__file__)
CPU = torch.device("cpu")
JOB = Job(device="cpu", model="tiny", documents=3, document_tokens=21, pack_tokens=42, steps=2)


@pytest.fixture
def step() -> Step:
    return make_step(JOB, "float32")


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


# ---- the command -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_line_of_figures(tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "results" / "bench.jsonl"
    done = bench(*JOB.arguments(), "--dtype", dtype, "--out", str(out))
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert out.read_text() == line + "\n"
    row = json.loads(line)
    seconds = row["seconds"]
    assert seconds.keys() == {"lora", "frozen", "eager", "gemms", "attention"}
    assert 0 < row["ratio_frozen_to_all_products"] < row["ratio_frozen_to_gemms"]
    assert all(0 < v["p20"] <= v["median"] <= v["p80"] for v in seconds.values())
    assert row["tokens_per_s"] == pytest.approx(63 / seconds["lora"]["median"])
    assert row["grad_norm"] > 0
    assert min(row[k] for k in row if k.startswith("ratio_")) > 0
    # at least what importing torch takes
    assert row["peak_rss_bytes"] > 100e6
    assert row["peak_gpu_bytes"] is None
    allowed = 1e-5 if dtype == "float32" else 0.1
    assert 0 < row["gradient_error"]["lora"] < allowed
    assert row["dtype"] == dtype
    assert (row["documents"], row["document_tokens"], row["pack_tokens"]) == (3, 21, 42)
    assert {"cpu", "cpu_flags", "threads", "versions", "commit", "command", "date"} <= row.keys()
    assert "gradients against float64" in done.stderr


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--document-tokens", "8", "--pack-tokens", "7"], 1, "--pack-tokens 7 cannot hold"),
        (["--device", "tpu"], 1, "device = 'tpu' is unknown"),
        (["--device", "cuda:99"], 1, "device = 'cuda:99' is not there"),
        (["--model", "llama-9"], 2, "Invalid value for '--model'"),
        (["--documents", "0"], 2, "Invalid value for '--documents'"),
        (["--document-tokens", "1"], 2, "Invalid value for '--document-tokens'"),
        (["--dtype", "int4"], 2, "Invalid value for '--dtype'"),
    ],
)
def test_wrong_options(options: list[str], code: int, sentence: str) -> None:
    done = bench("--model", "tiny", *options)
    assert (done.returncode, done.stdout) == (code, "")
    assert sentence in done.stderr and "Traceback" not in done.stderr


# ---- nothing wrong is timed --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_gradients_pass(dtype: torch.dtype) -> None:
    errors = check_gradients(SHAPES["tiny"], CPU, dtype)
    assert 0 < errors.lora <= 2 * errors.eager + torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "fault",
    [
        lambda grad_P: grad_P.mul_(1.001),
        lambda grad_P: grad_P[5:6].mul_(-1),
        lambda grad_P: grad_P[-1:].fill_(torch.nan),
        lambda grad_P: grad_P.zero_(),
    ],
)
def test_wrong_gradients_stop_the_bench(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[torch.Tensor], Any]
) -> None:
    def faulty(model: Any, adapters: Any, *rest: Any) -> torch.Tensor:
        loss = add_gradient(model, adapters, *rest)
        fault(adapters.grad_P)
        return loss

    monkeypatch.setattr(train_step, "add_gradient", faulty)
    with pytest.raises(ValueError, match="gradients are off by .*; nothing was timed"):
        check_gradients(SHAPES["tiny"], CPU, torch.float32)


def test_a_step_that_does_not_train_stops_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoraStep, "__call__", lambda self: None)
    monkeypatch.setattr(train_step, "run_alone", lambda *_: {})
    with pytest.raises(ValueError, match="the gradient's norm is 0.0"):
        train_step.measure(JOB, "float32")


# ---- the variants are what they say ------------------------------------------------------------


def test_the_variants_see_one_loss(step: Step) -> None:
    """B is zero at the start, so the adapters change nothing yet."""
    eager = EagerLora(step.model, step.adapters)
    eager_loss = sum(float(eager(batch, step.scale).detach()) for batch in step.batches)
    ours = sum(float(add_gradient(step.model, step.adapters, b, step.scale)) for b in step.batches)
    frozen = sum(float(frozen_pass(step, batch)) for batch in step.batches)
    assert frozen == pytest.approx(ours, rel=1e-5)
    assert eager_loss == pytest.approx(ours, rel=1e-5)


def test_ours_and_the_usual_step_move_alike(step: Step) -> None:
    eager = EagerStep(EagerLora(step.model, step.adapters), step.batches, step.scale, train_step.LR)
    lora = LoraStep(step, side_by_side(step, 2))
    before_P = step.adapters.flat_P.clone()
    for _ in range(3):
        lora()
        assert eager() == pytest.approx(lora.grad_norm, rel=1e-3)
    moved_P = step.adapters.flat_P - before_P
    theirs_P = torch.cat([tensor.detach().flatten() for tensor in eager.lora.trained()]) - before_P
    # where a gradient is next to nothing its sign is noise, and Adam takes a whole step either way
    assert float((moved_P - theirs_P).norm() / theirs_P.norm()) < 0.05
    assert float(theirs_P.norm()) > 0


def test_the_frozen_pass_computes_every_input_gradient(
    monkeypatch: pytest.MonkeyPatch, step: Step
) -> None:
    found = []
    call = type(step.model.blocks[0]).forward

    def spy(self: Any, residual: Residual, *rest: Any) -> Residual:
        if self.layer == 0:
            residual.x_TD.register_hook(lambda grad: found.append(grad.abs().sum()))
        return call(self, residual, *rest)

    monkeypatch.setattr(type(step.model.blocks[0]), "forward", spy)
    over_packs(step, side_by_side(step, None), lambda *given: partial(frozen_pass, *given))()
    assert len(found) == len(step.batches) == 2
    assert min(found) > 0
    assert not step.adapters.grad_P.any()


def test_the_list_holds_every_frozen_product(step: Step) -> None:
    gemms = [gemm for batch in step.batches for gemm in gemm_list(step, batch)]
    assert len(gemms) == len(step.batches) * (2 * 4 * 2 + 2)
    config = JOB.config
    weights = sum(N * K for N, K, _ in projection_shapes(config).values()) * config.num_layers
    head = config.vocab_size * config.hidden_size
    assert step.supervised_tokens == 30
    assert gemm_flops(gemms) == 4 * weights * 63 + 4 * head * step.supervised_tokens
    run_gemms(gemms)
    for gemm in gemms:
        assert gemm.left.data_ptr() != gemm.out.data_ptr()
        assert bool(torch.isfinite(gemm.out).all())


def test_the_products_of_attention_are_all_there(step: Step) -> None:
    products = [p for batch in step.batches for p in attention_products(step, batch)]
    config = JOB.config
    # documents of 21 tokens are one block: every pair, six products each way, every head and layer
    pairs = 3 * 21 * 21 * config.num_heads * config.num_layers
    flops = sum(2 * p.left.shape[0] * p.left.shape[1] * p.right[0].numel() for p in products)
    assert flops == 6 * 2 * pairs * config.head_dim
    run_products(products)
    assert all(bool(torch.isfinite(p.out).all()) for p in products)
