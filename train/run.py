"""The settings of a run: one frozen value, from defaults, a recipe file and --set flags.

defaults < RECIPE.toml < --set key=value. A --set value is read as TOML, else as a string. Every
section below is a TOML table and every field a key; unknown keys are refused with a suggestion. The
run writes the resolved settings to `run.toml`, which is itself a recipe for the same run.

A path that starts with `demo:` stands for something the project brings: `demo:smollm2` is the demo
model (taken from the package index on first use), `demo:FILE` a file in train/demo.
"""

import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bioinstruct.model.lora.settings import LoraSettings
from bioinstruct.train import toml_tables

SCHEDULES = "cosine", "linear", "constant", "wsd"
RECORD_TABLE = "made"
"""The table of run.toml that says how the run was made; it sets nothing."""


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} = {value} must be greater than 0, and finite")


def _not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} = {value} must be 0 or more")


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        close = difflib.get_close_matches(value, allowed, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"{name} = {value!r} is unknown; {hint}allowed are {', '.join(allowed)}")


def _auto_or_number(name: str, value: int | str, least: int) -> None:
    if isinstance(value, str) and value != "auto" or isinstance(value, int) and value < least:
        raise ValueError(f"{name} = {value!r} must be auto or a whole number of at least {least}")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    path: str = ""
    """Folder, .safetensors or .gguf file of the base model."""
    tokenizer: str = ""
    """File or folder of the tokenizer; empty: found in the model's folder, then its parent."""
    dtype: str = "auto"
    """Compute dtype: auto | float32 | bfloat16."""
    shape: str = ""
    """A shape of train/shapes by name, or a config.json: what --dry-run plans with while there is
    nothing at model.path yet."""

    def __post_init__(self) -> None:
        _one_of("model.dtype", self.dtype, ("auto", "float32", "bfloat16"))


@dataclass(frozen=True, kw_only=True)
class MixFile:
    """A file of records that is not simply taken once and whole: a table of [[data.mix]]."""

    path: str
    """The file, of any form that data.path takes."""
    weight: float = 1.0
    """Times that its records stand in an epoch; 1.5 is each once and a random half once more."""
    cap: int | None = None
    """Take so many of its records at most, drawn at random."""
    categories: tuple[str, ...] = ()
    """Take records of these categories only; empty: all."""

    def __post_init__(self) -> None:
        name = f"data.mix of {self.path or 'a file without path'}"
        if not self.path:
            raise ValueError("data.mix: path is empty; name a file of records")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"{name}: weight = {self.weight} must be a number above 0")
        if self.cap is not None:
            _positive(f"{name}: cap", self.cap)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    path: tuple[str, ...] = ()
    """Files of Alpaca, `messages` or ShareGPT records: .json or .jsonl, plain or .gz."""
    validation: float | str = 0.0
    """Share of the records held out, or a file of records; 0 for none."""
    template: str = "auto"
    """Prompt template by name, or a .txt file; auto takes the one that fits the vocabulary."""
    max_tokens_per_pack: int = 4096
    """Tokens of one forward and backward pass; no record may be longer."""
    shuffle: bool = True
    """Draw the records of an epoch in random order."""
    turns: str = "all"
    """Which of a conversation's answers are learned: all | last."""
    on_empty: str = "error"
    """Records with an empty output: error | drop | keep (they teach the stop token alone)."""
    on_overlong: str = "error"
    """Records over the limit: error | drop | truncate (from the prompt's left)."""
    mix: tuple[MixFile, ...] = ()
    """More files, each with a weight, a cap or categories of its own."""
    categories: tuple[str, ...] = ()
    """Use records of these categories only, by their field `category`; empty: all."""
    samples: int | None = None
    """Train on so many records of the mixture, drawn at random: with the same seed a smaller
    number's are among a larger number's."""
    seed: int | None = None
    """Of the held-out share, weights, caps and samples; train.seed when not given."""

    def __post_init__(self) -> None:
        if isinstance(self.validation, float) and not 0 <= self.validation < 1:
            raise ValueError(
                f"data.validation = {self.validation} must be a share below 1, or a file"
            )
        _positive("data.max_tokens_per_pack", self.max_tokens_per_pack)
        _one_of("data.turns", self.turns, ("all", "last"))
        _one_of("data.on_empty", self.on_empty, ("error", "drop", "keep"))
        _one_of("data.on_overlong", self.on_overlong, ("error", "drop", "truncate"))
        if self.samples is not None:
            _positive("data.samples", self.samples)
        if self.seed is not None and not 0 <= self.seed < 1 << 32:
            raise ValueError(f"data.seed = {self.seed} must be 0 or more and below 2^32")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    batch_samples: int | None = None
    """Records of one optimizer step; 32 when batch_tokens is not given either."""
    batch_tokens: int | None = None
    """Tokens of one optimizer step, at most, instead of batch_samples."""
    epochs: float = 3.0
    """Passes over the records."""
    steps: int | None = None
    """Optimizer steps; wins over epochs."""
    lr: float = 2e-4
    """Peak learning rate."""
    schedule: str = "cosine"
    """cosine | linear | constant | wsd (constant, then linear), after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    decay_share: float = 0.2
    """Share of all steps over which wsd falls, at the end; above 0, at most 1."""
    weight_decay: float = 0.0
    """Decoupled decay: of the adapters, or of the matrices where all weights train."""
    clip: float = 1.0
    """Largest gradient norm; 0 for no limit."""
    ema: float = 0.0
    """Below 1: keep an average of what trains, which is what is validated, saved and scored; the
    share that it keeps of itself at a step, say 0.99; 0 for no average."""
    seed: int = 0
    """Of initialisation, order, dropout and the validation split."""
    save_every: int = 0
    """Write a state to resume from, and the adapter, every so many steps; 0: at the end alone."""
    keep: int = 2
    """States kept, the newest; the best one stays besides."""
    keep_best: str = ""
    """Keep what is best by this in adapter-best or model-best: val_loss, or a task of eval.tasks,
    by its main score or as TASK:SCORE; empty: none."""
    patience: int = 0
    """Stop after so many evaluations without a better keep_best; 0: never."""
    eval_every: int = 0
    """Validation loss and sample answers every so many steps; 0 for the end alone."""
    samples: int = 3
    """Sample answers written at each evaluation."""
    method: str = "lora"
    """What trains: lora | full (all weights)."""
    checkpoint_layers: int | str = 0
    """Layers, from the first on, that keep only their input and compute the rest again in the
    backward pass: less memory, at most half as much work again with LoRA; auto: the fewest with
    which the largest pack should fit."""
    packs_at_once: int | str = "auto"
    """Packs that a CPU takes side by side, each with a share of its threads: faster, and the memory
    of so many packs; auto: 4, but no more than there are threads, or than fit. A GPU takes one."""
    max_skipped: int = 3
    """A step whose loss or gradient is not finite is skipped; end after so many in a row."""
    spikes: float = 10.0
    """Report a loss or gradient norm so many robust deviations above the last steps' median, with
    the records behind it; 0: never."""
    deterministic: bool = False
    """Refuse operations whose results change from run to run on a GPU; they are slower."""
    tensorboard: bool = False
    """Write TensorBoard's files too, into OUT/tensorboard."""

    def __post_init__(self) -> None:
        if self.batch_samples is not None and self.batch_tokens is not None:
            raise ValueError(
                "train.batch_samples and train.batch_tokens are both given; give one of them"
            )
        for name in ("batch_samples", "batch_tokens", "steps"):
            value = getattr(self, name)
            if value is not None:
                _positive(f"train.{name}", value)
        for name in ("epochs", "lr", "keep", "max_skipped"):
            _positive(f"train.{name}", getattr(self, name))
        for name in ("warmup_steps", "weight_decay", "clip", "save_every", "eval_every", "samples"):
            _not_negative(f"train.{name}", getattr(self, name))
        for name in ("patience", "spikes"):
            _not_negative(f"train.{name}", getattr(self, name))
        _auto_or_number("train.checkpoint_layers", self.checkpoint_layers, 0)
        _auto_or_number("train.packs_at_once", self.packs_at_once, 1)
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"train.seed = {self.seed} must be 0 or more and below 2^32")
        if not 0 <= self.ema < 1:
            raise ValueError(f"train.ema = {self.ema} must be at least 0 and below 1")
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"train.decay_share = {self.decay_share} must be above 0, at most 1")
        _one_of("train.schedule", self.schedule, SCHEDULES)
        _one_of("train.method", self.method, ("lora", "full"))


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    tasks: tuple[str, ...] = ()
    """Tasks scored before and after training, each NAME=PATH; see `bioinstruct-eval tasks`."""
    limit: int | None = None
    """Examples of each task, a seeded random subset; all of them when not given."""
    before: bool = True
    """Score the untrained model too."""
    form: str = "list"
    """Answer form of NER tasks: list | medtuned."""
    lexicon: str = ""
    """CoNLL file whose mentions make the lexicon baseline of NER tasks."""
    every: int = 0
    """Score the tasks every so many steps too; 0: never."""

    def __post_init__(self) -> None:
        _not_negative("eval.every", self.every)
        if self.limit is not None:
            _positive("eval.limit", self.limit)
        for task in self.tasks:
            if not all(task.partition("=")):
                raise ValueError(f"eval.tasks: {task!r} must be NAME=PATH")
        _one_of("eval.form", self.form, ("list", "medtuned"))


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What --dry-run and the choice of memory policy assume about the hardware."""

    hardware: str = "auto"
    """A GPU of train/plan/hardware.py by name, as in A100-40GB, or cpu; auto: what is here."""
    mfu: float = 0.4
    """Share of the GPU's peak at which the time is reckoned."""
    ranks: int = 0
    """GPUs in all; 0: as many as this launch has processes."""

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise ValueError(f"plan.mfu = {self.mfu} must be above 0, at most 1")
        _not_negative("plan.ranks", self.ranks)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that determines a run."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    attention: str = "auto"
    """Attention backend; auto takes the one that fits the device."""
    device: str = "auto"
    """auto | cpu | cuda | cuda:N."""
    shard: str = "auto"
    """How weights are spread over ranks: auto | none (each holds all of them) | full (each holds a
    part, FSDP2) | hybrid (a part within a machine, machines alike)."""
    out: str = ""
    """Folder of the results; empty: runs/<recipe>-<time>."""
    plan: PlanSettings = field(default_factory=PlanSettings)

    def __post_init__(self) -> None:
        _one_of("shard", self.shard, ("auto", "none", "full", "hybrid"))
        if self.train.method == "full" and self.lora != LoraSettings():
            raise ValueError(
                "train.method = 'full' trains all weights, so settings of [lora] have no effect; "
                "leave them out"
            )
        self._check_evaluations()

    def _check_evaluations(self) -> None:
        """Refuse settings of the evaluation that would have no effect."""
        best, tasks = self.train.keep_best, [task.partition("=")[0] for task in self.eval.tasks]
        if self.train.patience and not best:
            raise ValueError("train.patience needs train.keep_best, which says what better is")
        if self.eval.every and not tasks:
            raise ValueError("eval.every needs eval.tasks, which names what is scored")
        if not best:
            return
        _one_of("train.keep_best", best.partition(":")[0], ("val_loss", *tasks))
        if best == "val_loss" and not (self.data.validation and self.train.eval_every):
            raise ValueError(
                "train.keep_best = 'val_loss' needs data.validation and train.eval_every"
            )
        if best != "val_loss" and not self.eval.every:
            raise ValueError(f"train.keep_best = {best!r} needs eval.every")


def read_run(recipe: Path | None, overrides: Sequence[str]) -> Run:
    """Merge defaults, a recipe file and --set flags.

    Args:
        recipe: TOML file, or None.
        overrides: "key=value", dotted keys.

    Raises:
        ValueError: no such file, broken TOML, unknown keys, wrong types or values.
    """
    table: dict[str, Any] = {}
    if recipe is not None:
        try:
            table = tomllib.loads(recipe.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{recipe} is not valid TOML: {error}") from None
        table.pop(RECORD_TABLE, None)
    flags = [toml_tables.put(table, override) for override in overrides]

    def place(name: str) -> str:
        """Where the value of a dotted key was given, for an error message."""
        flag = any(f"{key}.".startswith(f"{name.split('[')[0]}.") for key in flags)
        return "--set" if flag or recipe is None else str(recipe)

    run: Run = toml_tables.Reader(Run, _ELSEWHERE, place).build(Run, table)
    return run


# what other trainers call these keys
_ELSEWHERE = {
    "learning_rate": ["train.lr"],
    "batch_size": ["train.batch_samples"],
    "max_grad_norm": ["train.clip"],
    "lr_scheduler_type": ["train.schedule"],
    "max_seq_length": ["data.max_tokens_per_pack"],
    "base_model": ["model.path"],
    "lora_alpha": ["lora.alpha"],
    "target_modules": ["lora.targets"],
    "rank": ["lora.r"],
    "use_rslora": ["lora.rslora"],
    "loraplus_lr_ratio": ["lora.plus_ratio"],
    "max_samples": ["data.samples"],
    "datasets": ["data.mix"],
    "gradient_checkpointing": ["train.checkpoint_layers"],
}


def keys() -> list[str]:
    """All dotted keys of a run."""
    return toml_tables.keys(Run)


def to_toml(run: Run, made: Mapping[str, Any]) -> str:
    """Write the resolved settings, and how the run was made, as a recipe."""
    rows = ["", f"[{RECORD_TABLE}]", *(toml_tables.line(k, v) for k, v in made.items())]
    return "\n".join([*toml_tables.lines_of(run), *rows]) + "\n"
