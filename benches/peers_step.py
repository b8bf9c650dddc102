"""Our LoRA step beside that of transformers + peft: tokens per second and peak memory.

    python benches/peers_step.py --device cpu --documents 4 --document-tokens 512 --steps 3

A bench only: the project needs neither library, so both are asked for by name, in whatever
environment runs this. The same step (SmolLM2's shape, the same documents, r = 16 on all seven
projections, clipping, AdamW) is taken by whole processes that alternate with ours, in float32 and
in bfloat16, the peer once with all documents in one batch and once with a document at a time
(accumulating gradients), because the one may be faster and the other smaller. Its own settings are
those of its trainer: fused AdamW, no KV cache, float32 adapters; documents of one length, so that
it pads nothing. First a small model with the same weights goes through both: where loss or
gradients differ, nothing is timed.
"""

import dataclasses
import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from torch import Tensor, nn

from bioinstruct.benches import train_step
from bioinstruct.benches.harness import (
    alone_row,
    alternate,
    describe,
    median_ratio,
    report,
    run_alone,
    summary,
)
from bioinstruct.benches.workload import LORA, Job, Step, job_options, make_step, random_documents
from bioinstruct.model.adapters import Module
from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.formats.config_json import config_to_hf
from bioinstruct.model.llm import DTYPES, choose_device
from bioinstruct.synth import console
from bioinstruct.train.data.tokens import TokenSet
from bioinstruct.train.step import add_gradient

PEERS = ("transformers", "peft")
CHECK = Job(device="cpu", model="tiny", documents=3, document_tokens=50, pack_tokens=100, steps=1)
ALLOWED_ERROR = 1e-5  # of the largest element, in float32


class Peer:
    """transformers + peft on documents of one length.

    Args:
        config: the model's shape.
        device: where it runs.
        dtype: of the frozen weights; peft keeps its adapters in float32.
        checkpointing: whether activations are computed again, as its trainer does by default.
    """

    def __init__(
        self,
        config: LlamaConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        checkpointing: bool = False,
    ) -> None:
        transformers, peft = (importlib.import_module(name) for name in PEERS)
        settings = transformers.LlamaConfig.from_dict(config_to_hf(config) | {"use_cache": False})
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)  # or it is made in float32 first, which costs memory
        base = transformers.LlamaForCausalLM(settings)
        torch.set_default_dtype(torch.float32)
        lora = peft.LoraConfig(
            r=LORA.r,
            lora_alpha=LORA.alpha,
            target_modules=list(LORA.targets),
            task_type="CAUSAL_LM",
        )
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
        self.attention = str(base.config._attn_implementation)
        self.model = peft.get_peft_model(base.to(device), lora).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=train_step.LR, weight_decay=0.0, fused=True
        )
        self.grad_norm = 0.0

    def add_gradient(self, ids_BL: Tensor, labels_BL: Tensor, share: float) -> float:
        """Add a batch's gradient; labels are shifted already, share is its part of the step."""
        loss = self.model(input_ids=ids_BL, labels=labels_BL, shift_labels=labels_BL).loss * share
        loss.backward()
        return float(loss.detach())

    def step(self, ids_BL: Tensor, labels_BL: Tensor, batch_documents: int) -> None:
        """Take one optimizer step, batch_documents at a time."""
        self.optimizer.zero_grad()
        for ids, labels in zip(
            ids_BL.split(batch_documents), labels_BL.split(batch_documents), strict=True
        ):
            self.add_gradient(ids, labels, len(ids) / len(ids_BL))
        self.grad_norm = float(nn.utils.clip_grad_norm_(self.trained, 1.0))
        self.optimizer.step()

    def adapter(self, module: Module, which: str) -> Tensor:
        """Its A or B of the projection that a module of ours adapts."""
        layer, path = module.layer, module.path
        name = f"base_model.model.model.layers.{layer}.{path}.lora_{which}.default.weight"
        found: Tensor = self.model.get_parameter(name)
        return found


def peer_batch(tokens: TokenSet, device: torch.device) -> tuple[Tensor, Tensor]:
    """(documents, length) token ids and shifted labels, -100 where not supervised."""
    ids, labels = [], []
    for i in range(len(tokens)):
        sample, prompt = tokens.sample(i)
        sample_L = torch.from_numpy(sample.astype(np.int64)).to(device)
        ids.append(sample_L[:-1])
        labels.append(sample_L[1:].clone())
        labels[-1][: prompt - 1] = -100
    return torch.stack(ids), torch.stack(labels)


def check_peer() -> dict[str, float]:
    """Take the same small step in both programs, in float32, and compare.

    Returns:
        The largest difference of a gradient, relative to the largest element of its tensor.

    Raises:
        ValueError: loss or gradients differ, so the two do not compute the same step.
    """
    step = make_step(CHECK, "float32")
    peer = Peer(CHECK.config, step.model.device, torch.float32)
    with torch.no_grad():
        step.adapters.flat_P.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
        copy_weights(step, peer)
    documents = random_documents(CHECK.config, CHECK.lengths)
    peer_loss = peer.add_gradient(*peer_batch(documents, step.model.device), 1.0)
    losses = [float(add_gradient(step.model, step.adapters, b, step.scale)) for b in step.batches]
    errors = [
        _error(tensor.grad, peer.adapter(module, which).grad)
        for module in step.adapters.modules
        for which, tensor in (("A", module.a_RK), ("B", module.b_NR))
    ]
    error, loss = max(errors), sum(losses)
    if not (error <= ALLOWED_ERROR and abs(loss - peer_loss) <= ALLOWED_ERROR * peer_loss):
        raise ValueError(
            f"the two programs do not take the same step: loss {loss:.6f} and {peer_loss:.6f}, "
            f"gradients apart by {error:.1e} of the largest element; nothing was timed"
        )
    return {"gradient_error": error}


def copy_weights(step: Step, peer: Peer) -> None:
    """Give the peer our weights and adapters."""
    theirs = peer.model.get_base_model().state_dict()
    for name, weight in step.model.destinations().items():
        # peft puts an adapted projection's own weight one level down
        below = f"{name.removesuffix('.weight')}.base_layer.weight"
        theirs[name if name in theirs else below].copy_(weight)
    for module in step.adapters.modules:
        peer.adapter(module, "A").copy_(module.a_RK)
        peer.adapter(module, "B").copy_(module.b_NR)


def _error(ours: Tensor | None, theirs: Tensor | None) -> float:
    assert ours is not None and theirs is not None
    return float((ours - theirs).abs().max() / theirs.abs().max())


def measure_peer(
    job: Job, dtype: str, batch_documents: int, *, checkpointing: bool
) -> dict[str, Any]:
    """Time the peer's step, alone in this process, and read the process's peak memory."""
    device = choose_device(job.device)
    documents = random_documents(job.config, job.lengths)
    ids_BL, labels_BL = peer_batch(documents, device)
    peer = Peer(job.config, device, DTYPES[dtype], checkpointing=checkpointing)
    calls = {"peer": lambda: peer.step(ids_BL, labels_BL, batch_documents)}
    seconds = alternate(calls, job.steps, device)["peer"]
    return alone_row(job.tokens, seconds, peer.grad_norm, device) | {"attention": peer.attention}


class Variant(NamedTuple):
    """A program and its options: what one process runs."""

    ours: bool
    dtype: str
    script: str
    arguments: list[str]


def variants_of(
    job: Job, dtypes: Sequence[str], *, checkpointing: bool = False
) -> dict[str, Variant]:
    """What takes turns, by name; with checkpointing the peer's also with it."""
    variants = {}
    for dtype in dtypes:
        shared = [*job.arguments(), "--dtype", dtype]
        ours = Variant(True, dtype, train_step.__file__, [*shared, "--alone"])
        variants[f"ours {dtype}"] = ours
        for batch in sorted({1, job.documents}):
            peer = Variant(False, dtype, __file__, [*shared, "--peer-batch", str(batch)])
            variants[f"peer {dtype}, {batch} a batch"] = peer
            if checkpointing:
                again = peer._replace(arguments=[*peer.arguments, "--checkpointing"])
                variants[f"peer {dtype}, {batch} a batch, checkpointing"] = again
    return variants


def measure(
    job: Job, dtypes: Sequence[str], rounds: int, *, checkpointing: bool = False
) -> dict[str, Any]:
    """Check, then run whole processes in turn.

    Raises:
        ValueError: a library is missing, the programs do not compute the same, or one fails.
    """
    device = choose_device(job.device)
    for name in PEERS:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"{name} is not installed here; this bench compares with it: install transformers "
                "and peft beside this project in an environment of their own"
            )
    checked = run_alone(__file__, ["--check"])
    variants = variants_of(job, dtypes, checkpointing=checkpointing)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for number in range(rounds):
        for name, variant in variants.items():
            console.note(f"round {number + 1} of {rounds}: {name}")
            rows[name].append(run_alone(variant.script, variant.arguments))
    return {
        "bench": "peers_step",
        **compare(variants, rows),
        **checked,
        "rounds": rounds,
        **dataclasses.asdict(job),
        **describe(device, PEERS),
    }


def compare(
    variants: Mapping[str, Variant], rows: Mapping[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Speed and memory of ours against the peer's, and each variant's own figures.

    Args:
        variants: what ran, by name.
        rows: what each process reported, one row a round.
    """
    speed = {name: [row["tokens_per_s"] for row in found] for name, found in rows.items()}
    on_gpu = any(row["peak_gpu_bytes"] for found in rows.values() for row in found)
    key = "peak_gpu_bytes" if on_gpu else "peak_rss_bytes"
    peak = {name: max(row[key] for row in found) for name, found in rows.items()}

    def fastest(ours: bool, dtype: str | None) -> list[float]:
        """The better of a program's variants, round by round."""
        of_it = [
            speed[n] for n, v in variants.items() if v.ours == ours and dtype in (None, v.dtype)
        ]
        return [max(values) for values in zip(*of_it, strict=True)]

    dtypes = list(dict.fromkeys(v.dtype for v in variants.values()))
    own = {v.dtype: peak[n] for n, v in variants.items() if v.ours}
    return {
        "ratio_tokens_per_s": median_ratio(fastest(True, None), fastest(False, None)),
        "ratio_tokens_per_s_by_dtype": {
            d: median_ratio(fastest(True, d), fastest(False, d)) for d in dtypes
        },
        "ratio_peak_bytes": {n: own[v.dtype] / peak[n] for n, v in variants.items() if not v.ours},
        "variants": {
            n: {
                "tokens_per_s": summary(speed[n]),
                key: peak[n],
                "grad_norm": rows[n][-1]["grad_norm"],
                "attention": rows[n][-1].get("attention"),
            }
            for n in variants
        },
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@job_options
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(list(DTYPES)),
    multiple=True,
    default=list(DTYPES),
    show_default=True,
    help="May be given twice.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Append the line.")
@click.option("--checkpointing", is_flag=True, help="The peer also with activation checkpointing.")
@click.option("--check", is_flag=True, hidden=True)
@click.option("--peer-batch", type=click.IntRange(min=1), hidden=True)
def command(
    dtypes: tuple[str, ...],
    rounds: int,
    out: Path | None,
    checkpointing: bool,
    check: bool,
    peer_batch: int | None,
    **options: Any,
) -> None:
    """Time one LoRA step of ours and of transformers + peft; print one JSON line.

    ratio_tokens_per_s compares the faster variant of each (above 1 we are faster);
    ratio_peak_bytes is our peak memory over that of each of the peer's variants, in one dtype.
    """
    if check:
        print(json.dumps(check_peer()))
        return
    job = Job(**options)
    if peer_batch is not None:
        print(json.dumps(measure_peer(job, dtypes[0], peer_batch, checkpointing=checkpointing)))
    else:
        report(measure(job, dtypes, rounds, checkpointing=checkpointing), out)


if __name__ == "__main__":
    console.run(command)
