"""What a run would train on and with, found out without reading a weight.

The model's table of contents is read and compared with its shape, its tokenizer is loaded, records
are encoded and planned as in the run itself. What is not there yet is stood in for: a shape of
train/shapes for the weights, four bytes a token for the tokenizer.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bioinstruct.model.adapters import Adapters
from bioinstruct.model.checkpoint import open_checkpoint
from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.llm import check_vocabulary
from bioinstruct.model.templates import Template, get_template, guess_template
from bioinstruct.model.tokenizers.tokenizer import PATTERNS, Tokenizer, load_tokenizer
from bioinstruct.train.data.mixture import files_of
from bioinstruct.train.demo import resolve
from bioinstruct.train.plan import hardware
from bioinstruct.train.plan.hardware import Hardware
from bioinstruct.train.plan.memory import Setup
from bioinstruct.train.plan.policy import settled, setup_of
from bioinstruct.train.plan.prepare import PlannedData, plan_data
from bioinstruct.train.plan.stand_in import ByteCount
from bioinstruct.train.report.scores import prepare_jobs
from bioinstruct.train.run import Run
from bioinstruct.train.shapes import names, read_shape
from bioinstruct.train.weights.base import recomputed_layers

_WEIGHTS = "*.safetensors", "*.bin", "*.pth", "*.gguf"


class Base(NamedTuple):
    """The model that would be tuned."""

    config: LlamaConfig
    checked: str
    """What was compared of its weights."""
    has_weights: bool


@dataclass(frozen=True)
class Outlook:
    """Everything that a dry run prints."""

    run: Run
    base: Base
    tokenizer: Tokenizer
    template: Template
    data: PlannedData
    hardware: Hardware
    setup: Setup
    ranks: int


def look(run: Run) -> Outlook:
    """Check a run and plan it.

    Raises:
        ValueError: whatever prepare would refuse, but for damaged weights.
        OSError: a file cannot be read.
    """
    base = _base(run)
    files_of(run.data)
    prepare_jobs(run)
    device = hardware.find(run.plan.hardware, run.device)
    recomputed_layers(run, base.config)
    tokenizer = _tokenizer(run, base)
    name = guess_template(tokenizer) if run.data.template == "auto" else run.data.template
    template = get_template(name, tokenizer)
    if run.train.method == "lora":
        # also refuses targets and layers that the model lacks, and an adapter that does not fit
        place = "cpu" if run.lora.init_from else "meta"
        started = _started(run, base.config, place)
        run = dataclasses.replace(run, lora=started.settings)
    data = plan_data(run, base.config, tokenizer, template)
    ranks = run.plan.ranks or int(os.environ.get("WORLD_SIZE", "1"))
    run = settled(run, base.config, data.planner, device, ranks)
    setup = setup_of(run, base.config, device, ranks)
    return Outlook(run, base, tokenizer, template, data, device, setup, ranks)


def _started(run: Run, config: LlamaConfig, place: str) -> Adapters:
    if run.lora.init_from:
        return Adapters.starting(config, run.lora, place, run.train.seed)
    return Adapters(config, run.lora, place)


def _base(run: Run) -> Base:
    """Open what stands at model.path, or take the shape."""
    if not run.model.path and not run.model.shape:
        raise ValueError("model.path is not set; give --set model.path=FOLDER")
    path = resolve(run.model.path) if run.model.path else Path()
    if run.model.path and path.exists():
        if (path / "config.json").is_file() and not _any(path, _WEIGHTS):
            config = read_shape(str(path / "config.json"))
            return Base(config, f"{path} holds a config.json and no weights", False)
        checkpoint = open_checkpoint(path)
        wanted = checkpoint.config.tensor_shapes()
        checkpoint.check(wanted)
        return Base(checkpoint.config, f"{path}: all {len(wanted)} tensors are there", True)
    if not run.model.shape:
        raise ValueError(
            f"there is no {path}; give a model's folder, or plan without it: "
            f"--set model.shape=NAME, one of {', '.join(names())}"
        )
    missing = f"nothing at {run.model.path} yet" if run.model.path else "no model.path yet"
    return Base(read_shape(run.model.shape), f"{missing}, its shape is {run.model.shape}", False)


def _any(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in patterns)


def _tokenizer(run: Run, base: Base) -> Tokenizer:
    if run.model.tokenizer:
        path = resolve(run.model.tokenizer)
    else:
        path = resolve(run.model.path) if run.model.path else Path()
        found = path.is_dir() and (_any(path, PATTERNS) or _any(path.resolve().parent, PATTERNS))
        if not base.has_weights and not found:
            return ByteCount()
    tokenizer = load_tokenizer(path)
    check_vocabulary(base.config, tokenizer, path)
    return tokenizer
