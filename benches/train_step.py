"""One LoRA step against what bounds it and against the usual formula; prints one JSON line.

    python benches/train_step.py --device cpu --model smollm2-135m --documents 4 \
        --document-tokens 512 --steps 6

Four variants of one optimizer step take turns in one process (see harness.py):
    lora    ours: forward, backward, clipping, AdamW
    frozen  the floor: the frozen model's forward and input gradient alone, same loss, no adapters
    eager   the same step by the usual LoRA formula (see eager.py), a pack after the other
    gemms   the frozen model's matrix products alone, one after the other: forward and input
            gradient of every linear, and of the head on the supervised rows
    attention  on a CPU, the products inside attention alone: scores and output, and the gradients
            of probabilities, values, queries and keys, of each block that holds a causal pair
On a CPU the trainer takes several packs at once (train/side_by_side.py); then lora, frozen, gemms
and attention all do, so that the ratios compare like with like.
Peak memory is measured on the lora variant in a process of its own. Before anything is timed, the
gradients of lora and eager are compared with a float64 run of the same model cut to two layers;
where ours are off by more than rounding explains, no time is printed.

Shapes   T packed tokens, S supervised rows, D model width, V vocabulary, K inputs and N outputs of
         a linear.
"""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor
from torch.nn import functional

from bioinstruct.benches.eager import EagerLora, EagerStep
from bioinstruct.benches.harness import (
    alone_row,
    alternate,
    describe,
    median_ratio,
    report,
    run_alone,
    summary,
)
from bioinstruct.benches.workload import (
    LORA,
    Job,
    Step,
    job_options,
    make_batches,
    make_model,
    make_step,
    random_documents,
)
from bioinstruct.kernels import linear_cross_entropy, rmsnorm
from bioinstruct.kernels.attention_blocked import blocks_of
from bioinstruct.model.adapters import Adapters
from bioinstruct.model.augmented_layers import Residual
from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.llama import Block, Llama
from bioinstruct.model.llm import choose_device, choose_dtype
from bioinstruct.synth import console
from bioinstruct.train.data.batch import Batch
from bioinstruct.train.plan.policy import MOST_AT_ONCE
from bioinstruct.train.side_by_side import SideBySide
from bioinstruct.train.step import Optimizer, add_gradient, train_step

LR = 1e-4
CHECKED_LENGTHS = (70, 33, 2)  # of the check's documents; they divide nothing


# ---- correctness -------------------------------------------------------------------------------


class Errors(NamedTuple):
    """Largest error of any adapter's gradient against float64, relative to its largest element."""

    lora: float
    eager: float


def check_gradients(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> Errors:
    """Compare the gradients that are going to be timed with a float64 run.

    Args:
        config: the timed shape; two of its layers and at most 4,096 tokens of its vocabulary run.
        device: the timed device.
        dtype: the timed dtype.

    Raises:
        ValueError: our gradient is zero, not finite, or its error is more than twice the usual
            formula's plus one rounding; the text says by how much.
    """
    layers, vocabulary = min(2, config.num_layers), min(4096, config.vocab_size)
    config = dataclasses.replace(config, num_layers=layers, vocab_size=vocabulary)
    model = make_model(config, device, dtype)
    exact_model = Llama(config, device, torch.float64)
    for name, place in exact_model.destinations().items():
        place.copy_(model.destinations()[name])
    adapters, exact_adapters = (
        Adapters(config, LORA, device, wide) for wide in (torch.float32, torch.float64)
    )
    with torch.no_grad():
        # B too, which starts at zero: dA would be zero and any A right
        adapters.flat_P.normal_(0, 0.05, generator=torch.Generator(device).manual_seed(1))
        exact_adapters.flat_P.copy_(adapters.flat_P)
    tokens = random_documents(config, CHECKED_LENGTHS)
    batches = make_batches(tokens, sum(CHECKED_LENGTHS[:2]), device)
    scale = 1 / int(tokens.supervised.sum())
    exact = _eager_gradients(exact_model, exact_adapters, batches, scale)
    eager = _eager_gradients(model, adapters, batches, scale)
    for batch in batches:
        add_gradient(model, adapters, batch, scale)
    ours = [m.a_RK.grad for m in adapters.modules] + [m.b_NR.grad for m in adapters.modules]
    errors = Errors(_largest_error(ours, exact), _largest_error(eager, exact))
    budget = 2 * errors.eager + torch.finfo(dtype).eps
    if not (errors.lora <= budget and adapters.grad_P.any()):
        raise ValueError(
            f"the LoRA step's gradients are off by {errors.lora:.1e} of the largest element, where "
            f"{budget:.1e} is allowed in {dtype} (the usual formula: {errors.eager:.1e}); nothing "
            "was timed"
        )
    return errors


def _eager_gradients(
    model: Llama, adapters: Adapters, batches: list[Batch], scale: float
) -> list[Tensor | None]:
    lora = EagerLora(model, adapters)
    for batch in batches:
        lora(batch, scale).backward()
    return [tensor.grad for tensor in lora.trained()]


def _largest_error(found: list[Tensor | None], exact: list[Tensor | None]) -> float:
    """NaN where any value is not finite."""
    errors = []
    for a, b in zip(found, exact, strict=True):
        assert a is not None and b is not None
        errors.append((a.double() - b).abs().max() / b.abs().max())
    return float(torch.stack(errors).max())


# ---- variants ----------------------------------------------------------------------------------


class LoraStep:
    """Ours, as the trainer takes it."""

    def __init__(self, step: Step, beside: SideBySide) -> None:
        self.step, self.beside, self.optimizer = step, beside, Optimizer(step.adapters)
        self.grad_norm = 0.0

    def __call__(self) -> None:
        """Take one step."""
        step = self.step
        given = step.model, self.optimizer, step.batches, step.supervised_tokens, LR
        result = train_step(*given, beside=self.beside if self.beside.number > 1 else None)
        self.grad_norm = result.grad_norm


def frozen_pass(step: Step, batch: Batch) -> Tensor:
    """Forward and the gradient of every layer's input, with no adapter; returns the loss."""
    model = step.model
    attend = model.packed_attention(batch.pack.documents)
    rotation = model.rotation(batch.pack.positions_T)
    x_TD = functional.embedding(batch.pack.ids_T, model.embedding_VD)
    residual = Residual(x_TD.requires_grad_())
    for block in model.blocks:
        residual = block(residual, rotation, attend)
    h_TD = rmsnorm(residual.added(), model.norm_D, model.config.norm_eps)
    labelled = batch.rows_S, batch.labels_S
    loss = linear_cross_entropy(h_TD, model.head_VD, *labelled, step.scale)
    loss.backward()
    return loss.detach()


class Gemm(NamedTuple):
    """One matrix product, out = left @ right."""

    left: Tensor
    right: Tensor
    out: Tensor


def gemm_list(step: Step, batch: Batch) -> list[Gemm]:
    """Every frozen matrix product of a pack, in its order; equal shapes share their buffers."""
    model = step.model
    buffers: dict[tuple[int, int], Tensor] = {}

    def buffer(rows: int, columns: int) -> Tensor:
        if (rows, columns) not in buffers:
            fresh = torch.empty(rows, columns, device=model.device, dtype=model.dtype)
            buffers[rows, columns] = fresh.normal_()
        return buffers[rows, columns]

    def product(rows: int, right: Tensor) -> Gemm:
        left, out = buffer(rows, right.shape[0]), buffer(rows, right.shape[1])
        # a square weight would read and write one buffer
        return Gemm(left, right, out if out is not left else torch.empty_like(left))

    weights: list[Tensor] = []
    for block in model.blocks:
        assert isinstance(block, Block)
        weights += [block.qkv_ND, block.o_DM, block.gate_up_2FD, block.down_DF]
    T, S = len(batch.pack.ids_T), len(batch.rows_S)
    gemms = [product(T, w_NK.T) for w_NK in weights]
    gemms += [product(S, model.head_VD.T), product(S, model.head_VD)]
    return gemms + [product(T, w_NK) for w_NK in reversed(weights)]


@torch.inference_mode()
def run_gemms(gemms: list[Gemm]) -> None:
    """Compute them one after the other."""
    for left, right, out in gemms:
        torch.mm(left, right, out=out)


class Attended(NamedTuple):
    """One batched product of attention, out = left @ right."""

    left: Tensor
    right: Tensor
    out: Tensor


def attention_products(step: Step, batch: Batch) -> list[Attended]:
    """Every product inside a pack's attention, block by block; equal shapes share their buffers."""
    config, model = step.model.config, step.model
    G, E = config.num_kv_heads, config.head_dim
    J = config.num_heads // G
    buffers: dict[tuple[int, int], Tensor] = {}

    def buffer(rows: int, columns: int) -> Tensor:
        if (rows, columns) not in buffers:
            fresh = torch.empty(G, rows, columns, device=model.device, dtype=model.dtype)
            buffers[rows, columns] = fresh.normal_()
        return buffers[rows, columns]

    products = []
    for a, i, j, _ in blocks_of(batch.pack.documents.bounds, model.dtype):
        rows, U = (j - i) * J, j - a
        q, k, s = buffer(rows, E), buffer(U, E), buffer(rows, U)
        outs = torch.empty_like(s), torch.empty_like(q), torch.empty_like(k)
        products += [
            Attended(q, k.mT, outs[0]),
            Attended(s, k, outs[1]),
            Attended(s.mT, q, outs[2]),
            Attended(q, k.mT, outs[0]),
            Attended(s, k, outs[1]),
            Attended(s.mT, q, outs[2]),
        ]
    return products * config.num_layers


@torch.inference_mode()
def run_products(products: list[Attended]) -> None:
    """Compute them one after the other."""
    for left, right, out in products:
        torch.bmm(left, right, out=out)


def gemm_flops(gemms: list[Gemm]) -> int:
    """Multiplications and additions of the list."""
    return sum(2 * g.left.shape[0] * g.right.numel() for g in gemms)


# ---- command -----------------------------------------------------------------------------------


def side_by_side(step: Step, packs_at_once: int | None) -> SideBySide:
    """Take so many packs at once; where that is left open, as many as the trainer would."""
    if packs_at_once is None:
        several = min(MOST_AT_ONCE, torch.get_num_threads(), len(step.batches))
        packs_at_once = several if step.model.device.type == "cpu" else 1
    return SideBySide(step.model.config, step.adapters, packs_at_once)


def over_packs(
    step: Step, beside: SideBySide, work: Callable[[Step, Batch], Callable[[], object]]
) -> Callable[[], object]:
    """Make a variant of what each pack's work is; it is prepared now and done at each call."""
    prepared = {id(batch): work(step, batch) for batch in step.batches}
    return lambda: beside(step.batches, lambda _, batch: prepared[id(batch)]())


def measure_alone(job: Job, dtype: str) -> dict[str, Any]:
    """Time the LoRA step, alone in this process, and read the process's peak memory."""
    step = make_step(job, dtype)
    lora = LoraStep(step, side_by_side(step, job.packs_at_once))
    seconds = alternate({"lora": lora}, job.steps, step.model.device)["lora"]
    return alone_row(job.tokens, seconds, lora.grad_norm, step.model.device)


def measure(job: Job, dtype: str) -> dict[str, Any]:
    """Check, then time all variants in turn.

    Raises:
        ValueError: a device or dtype that is not there, wrong gradients, or a failed process.
    """
    device = choose_device(job.device)
    kind = choose_dtype(dtype, device)
    console.note("peak memory of our step, in a process of its own")
    # first, while this process is small
    memory_job = dataclasses.replace(job, steps=1)
    alone = run_alone(__file__, [*memory_job.arguments(), "--dtype", dtype, "--alone"])
    errors = check_gradients(job.config, device, kind)
    console.note(f"gradients against float64: ours {errors.lora:.1e}, usual {errors.eager:.1e}")
    step = make_step(job, dtype)
    beside = side_by_side(step, job.packs_at_once)
    lora = LoraStep(step, beside)
    variants: dict[str, Callable[[], object]] = {
        "lora": lora,
        "frozen": over_packs(step, beside, lambda *given: partial(frozen_pass, *given)),
        "eager": EagerStep(EagerLora(step.model, step.adapters), step.batches, step.scale, LR),
        "gemms": over_packs(step, beside, lambda *given: partial(run_gemms, gemm_list(*given))),
    }
    if device.type == "cpu":
        variants["attention"] = over_packs(
            step, beside, lambda *given: partial(run_products, attention_products(*given))
        )
    seconds = alternate(variants, job.steps, device)
    if not lora.grad_norm > 0:
        raise ValueError(f"the gradient's norm is {lora.grad_norm}; nothing trains, no time counts")
    spread = {name: summary(values) for name, values in seconds.items()}
    return {
        "bench": "train_step",
        "dtype": str(kind).removeprefix("torch."),
        "tokens_per_s": job.tokens / spread["lora"]["median"],
        "ratio_to_frozen": median_ratio(seconds["lora"], seconds["frozen"]),
        "ratio_to_eager": median_ratio(seconds["eager"], seconds["lora"]),
        "ratio_frozen_to_gemms": median_ratio(seconds["frozen"], seconds["gemms"]),
        **_ratio_to_all_products(seconds),
        "peak_rss_bytes": alone["peak_rss_bytes"],
        "peak_gpu_bytes": alone["peak_gpu_bytes"],
        "grad_norm": lora.grad_norm,
        "gradient_error": errors._asdict(),
        "seconds": spread,
        "gemm_gflops_per_s": _flops(step) / spread["gemms"]["median"] / 1e9,
        "attention": step.model.attention_backend,
        **dataclasses.asdict(job),
        "packs_at_once": beside.number,
        **describe(device),
    }


def _flops(step: Step) -> int:
    return sum(gemm_flops(gemm_list(step, batch)) for batch in step.batches)


def _ratio_to_all_products(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The floor over its products, those of attention included, where they were timed."""
    if "attention" not in seconds:
        return {}
    both = [a + b for a, b in zip(seconds["gemms"], seconds["attention"], strict=True)]
    return {"ratio_frozen_to_all_products": median_ratio(seconds["frozen"], both)}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@job_options
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Append the line.")
@click.option("--alone", is_flag=True, hidden=True)
def command(dtype: str, out: Path | None, alone: bool, **options: Any) -> None:
    """Time one LoRA step, its floor and the usual formula; print one JSON line.

    ratio_to_frozen is ours over the floor (1 is the limit), ratio_to_eager the usual formula over
    ours (above 1 we are faster), ratio_frozen_to_gemms the floor over the matrix products of its
    linears, ratio_frozen_to_all_products over these and attention's own.
    """
    job = Job(**options)
    if alone:
        print(json.dumps(measure_alone(job, dtype)))
    else:
        report(measure(job, dtype), out)


if __name__ == "__main__":
    console.run(command)
