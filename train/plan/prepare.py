"""A run, checked and loaded: model, tokenizer, samples, plan; nothing is written but the cache.

Everything that a user can get wrong shows here, before a step is taken or a folder is made.
"""

import dataclasses
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from bioinstruct.eval.runner import Job
from bioinstruct.kernels.attention import self_test
from bioinstruct.kernels.heap import keep_freed_memory
from bioinstruct.kernels.native import operations, why_slower
from bioinstruct.model.adapters import Adapters
from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.llm import Llm
from bioinstruct.model.templates import Template, get_template
from bioinstruct.model.tokenizers.tokenizer import Tokenizer
from bioinstruct.synth.console import note
from bioinstruct.train.data.batch import Batch, collate
from bioinstruct.train.data.mixture import files_of, load_mixture
from bioinstruct.train.data.tokens import Limits, TokenSet
from bioinstruct.train.plan import hardware
from bioinstruct.train.plan.planner import Planner, StepPlan, evened
from bioinstruct.train.plan.policy import settled
from bioinstruct.train.ranks.process import ALONE, Ranks, deal
from bioinstruct.train.report.metrics import step_flops
from bioinstruct.train.report.provenance import commit, device_name, package_version
from bioinstruct.train.report.scores import prepare_jobs
from bioinstruct.train.run import Run
from bioinstruct.train.weights.base import load_base, masters_of, recomputed_layers
from bioinstruct.train.weights.masters import Masters

T = TypeVar("T")
_PACKAGES = ("bioinstruct", "torch", "numpy", "safetensors", "sentencepiece", "tiktoken")


@dataclass(frozen=True)
class Prepared:
    """A run that has been checked and is ready to step."""

    run: Run
    llm: Llm
    """Model and tokenizer; its adapters are the ones that train."""
    template: Template
    tokens: TokenSet
    validation: TokenSet | None
    planner: Planner
    num_steps: int
    jobs: list[Job]
    """Tasks to score before and after training."""
    masters: Masters
    """What trains."""
    ranks: Ranks = ALONE

    @property
    def adapters(self) -> Adapters | None:
        """The adapters, where it is they that train."""
        return self.masters.adapters

    def on_first(self, work: Callable[[Path], T], out: Path) -> T:
        """Let the first rank do what computes with the model and writes into a folder.

        Where the model is spread over the ranks all of them must compute: the others do the same,
        and what they write is thrown away.

        Args:
            work: called with the folder.
            out: the first rank's folder.

        Raises:
            ValueError, OSError: what work raised, on every rank.
        """
        if not self.masters.is_sharded:
            return self.ranks.from_first(lambda: work(out))
        if self.ranks.is_first:
            return work(out)
        with tempfile.TemporaryDirectory() as folder:
            return work(Path(folder))


def prepare(run: Run, ranks: Ranks = ALONE) -> Prepared:
    """Load, check and plan everything that a run needs.

    Args:
        run: the settings.
        ranks: who trains; alone, the device is the one that the settings name.

    Raises:
        ValueError: missing settings, files that are missing, damaged or do not fit each other,
            records that the settings refuse.
        OSError: a file cannot be read.
    """
    if not run.model.path:
        raise ValueError("model.path is not set; give --set model.path=FOLDER")
    files_of(run.data)
    jobs = prepare_jobs(run)
    note(f"loading {run.model.path}")
    llm = load_base(run, ranks)
    model = llm.model
    if model.device.type == "cpu":
        keep_freed_memory()
    error = self_test(model.attention_backend, model.device, model.dtype)
    name = llm.default_template() if run.data.template == "auto" else run.data.template
    note(
        f"{llm.config.parameter_count():,} parameters, {_plain(model.dtype)} on {model.device}, "
        f"attention {model.attention_backend} (self-test error {error:.0e}), template {name}"
    )
    if (reason := why_slower(model.device, model.dtype)) is not None:
        note(
            "its operations run in torch, not in C, and a step takes about a fifth longer: "
            f"{reason}; install a C compiler (gcc, say), or have $CC name one that works"
        )
    template = get_template(name, llm.tokenizer)
    # the first rank encodes, the others find the cache
    data = ranks.first_then_all(lambda: plan_data(run, llm.config, llm.tokenizer, template))
    run = _settled(run, llm, data.planner, ranks)
    masters = masters_of(run, llm, ranks)
    if masters.adapters is not None:
        run = dataclasses.replace(run, lora=masters.adapters.settings)
    return Prepared(run, llm, template, *data, jobs, masters, ranks)


def _settled(run: Run, llm: Llm, planner: Planner, ranks: Ranks) -> Run:
    """Choose what the run leaves to the memory of its devices, alike on all ranks."""
    device = hardware.find("auto", run.device)
    run = ranks.from_first(lambda: settled(run, llm.config, planner, device, ranks.size))
    llm.model.recomputed_layers = recomputed_layers(run, llm.config)
    return run


class PlannedData(NamedTuple):
    """What a run trains on, and in which steps."""

    tokens: TokenSet
    validation: TokenSet | None
    planner: Planner
    num_steps: int


def plan_data(
    run: Run, config: LlamaConfig, tokenizer: Tokenizer, template: Template
) -> PlannedData:
    """Encode and mix the records, and plan the steps.

    Raises:
        ValueError: as for load_mixture.
    """
    limit = min(run.data.max_tokens_per_pack, config.max_positions)
    limits = Limits(limit, run.data.on_empty, run.data.on_overlong, run.data.turns)
    tokens, validation = load_mixture(run, template, tokenizer, limits)
    planner = Planner(
        tokens.lengths,
        tokens.supervised,
        max_tokens=run.data.max_tokens_per_pack,
        batch_samples=_batch_samples(run),
        batch_tokens=run.train.batch_tokens,
        seed=run.train.seed,
        shuffle=run.data.shuffle,
    )
    return PlannedData(
        tokens, validation, planner, run.train.steps or planner.num_steps(run.train.epochs)
    )


def own_packs(prepared: Prepared, tokens: TokenSet, plan: StepPlan) -> list[list[int]]:
    """Return this rank's packs of a step, dealt by their FLOPs.

    Where several are taken at once they are laid anew, so that no thread waits for another.
    """
    packs, number = deal_packs(prepared, tokens, plan.packs), prepared.run.train.packs_at_once
    assert isinstance(number, int)
    if number == 1:
        return packs
    costs = {i: _cost(prepared.llm.config, tokens, [i]) for pack in packs for i in pack}
    return evened(packs, number, costs, tokens.lengths, prepared.planner.max_tokens)


def _cost(config: LlamaConfig, tokens: TokenSet, pack: list[int]) -> float:
    """FLOPs of a pack."""
    supervised = int(tokens.supervised[pack].sum())
    return step_flops(config, 0, tokens.lengths[pack].tolist(), supervised)


def deal_packs(prepared: Prepared, tokens: TokenSet, packs: Sequence[list[int]]) -> list[list[int]]:
    """Return those of these packs that are this rank's, dealt by their FLOPs.

    Where the model is spread over the ranks, all get as many: some are empty.
    """
    costs = [_cost(prepared.llm.config, tokens, pack) for pack in packs]
    hands = deal(costs, prepared.ranks.size)
    own = [packs[number] for number in hands[prepared.ranks.rank]]
    if prepared.masters.is_sharded:
        own += [[]] * (max(map(len, hands)) - len(own))
    return own


def own_batches(prepared: Prepared, tokens: TokenSet, plan: StepPlan) -> Iterator[Batch]:
    """Yield this rank's packs of a step as tensors."""
    for pack in own_packs(prepared, tokens, plan):
        yield collate(tokens, pack, plan.draws, prepared.llm.model.device)


def _batch_samples(run: Run) -> int | None:
    if run.train.batch_tokens is not None:
        return None
    return run.train.batch_samples or 32


def made(prepared: Prepared, command: str) -> dict[str, Any]:
    """How the run was made, for run.toml."""
    model = prepared.llm.model
    return {
        "command": command,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit() or "",
        "library": str(Path(__file__).parents[1]),
        **{name: package_version(name) or "" for name in _PACKAGES},
        "python": platform.python_version(),
        "dtype": _plain(model.dtype),
        "device": str(model.device),
        "device_name": device_name(model.device),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "attention": model.attention_backend,
        "operations": operations(model.device, model.dtype),
        "template": prepared.template.name,
        "tokenizer": prepared.llm.tokenizer.fingerprint,
        "steps": prepared.num_steps,
        "samples": len(prepared.tokens),
        "ranks": prepared.ranks.size,
    }


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
