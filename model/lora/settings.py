"""What defines a LoRA adapter beside its numbers: ranks, scales, and the projections that have one.

    W' = W + scale * B A       scale = alpha / r           (Hu et al. 2021, arXiv 2106.09685)
                               scale = alpha / sqrt(r)     (rsLoRA: Kalajdzievski 2023, 2312.03732)

Single modules may differ from the rest: `rank_pattern` and `alpha_pattern` name them by PEFT's
rule. A pattern is a regular expression for a module's whole name ("model.layers.3.mlp.up_proj") or
for its end after a dot ("up_proj"); the first pattern that matches counts. One that searches for
ever, as somebody else's file may hold, is given up.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import regex  # what tiktoken itself depends on; unlike re it can be told to give up

TARGETS = {
    "q_proj": ("qkv", "self_attn.q_proj"),
    "k_proj": ("qkv", "self_attn.k_proj"),
    "v_proj": ("qkv", "self_attn.v_proj"),
    "o_proj": ("o", "self_attn.o_proj"),
    "gate_proj": ("gate_up", "mlp.gate_proj"),
    "up_proj": ("gate_up", "mlp.up_proj"),
    "down_proj": ("down", "mlp.down_proj"),
}
"""PEFT's name of each projection -> its group and its path in a layer."""
MAX_RANK = 256
PATIENCE_S = 1.0
T = TypeVar("T", int, float)


def module_path(layer: int, target: str) -> str:
    """Name of a projection's module, as Hugging Face and PEFT spell it."""
    return f"model.layers.{layer}.{TARGETS[target][1]}"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """What defines an adapter, and how it starts and trains."""

    r: int = 16
    """Rank, 1 to 256."""
    alpha: float = 32.0
    """The branches are scaled by alpha / r."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead, so that high ranks do not learn less."""
    dropout: float = 0.0
    """Probability of dropping an input of the branches in training, 0 <= dropout < 1."""
    dropout_per_module: bool = False
    """A mask for each projection, as PEFT draws it, instead of one for those that share an input;
    slower on a GPU."""
    targets: tuple[str, ...] = tuple(TARGETS)
    """Adapted projections, by PEFT's names."""
    layers: tuple[int, ...] = ()
    """Adapted layers, counted from 0; empty: all."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Pattern of a module's name -> its rank, where it is not r."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Pattern of a module's name -> its alpha, where it is not alpha."""
    init: str = "kaiming"
    """How a new adapter starts: kaiming (A uniform, B zero), pissa (A and B are the r largest
    singular triplets of each weight, which keeps the rest; arXiv 2404.02948), or pissa_niter_N (the
    same by N subspace iterations, far faster). A PiSSA adapter is saved with twice the rank, for
    the unchanged model; weight decay would pull at the model's own weights."""
    init_from: str = ""
    """Folder of a PEFT adapter to continue, with its rank, scale and targets; empty: a new one."""
    plus_ratio: float = 1.0
    """LoRA+ (Hayou et al. 2024, arXiv 2402.12354): rate of B over the rate of A, at least 1."""

    def __post_init__(self) -> None:
        for name, rank in {"r": self.r, **_keyed("rank_pattern", self.rank_pattern)}.items():
            if not 1 <= rank <= MAX_RANK:
                raise ValueError(f"lora.{name} = {rank} is out of range; allowed are 1 to 256")
        alphas = {"alpha": self.alpha, **_keyed("alpha_pattern", self.alpha_pattern)}
        for name, alpha in alphas.items():
            if not (math.isfinite(alpha) and alpha > 0):
                raise ValueError(f"lora.{name} = {alpha} must be a positive number")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout = {self.dropout} must be at least 0 and below 1")
        if self.dropout_per_module and not self.dropout:
            raise ValueError("lora.dropout_per_module has no effect without lora.dropout; set both")
        if not (math.isfinite(self.plus_ratio) and self.plus_ratio >= 1):
            raise ValueError(f"lora.plus_ratio = {self.plus_ratio} must be a number of 1 or more")
        if not self.targets:
            raise ValueError(f"lora.targets is empty; allowed are {', '.join(TARGETS)}")
        for target in self.targets:
            _check_target(target)
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            _check_pattern(pattern)
        self._check_init()

    def _check_init(self) -> None:
        if not regex.fullmatch(r"kaiming|pissa|pissa_niter_\d{1,3}", self.init):
            raise ValueError(
                f"lora.init = {self.init!r} is unknown; allowed are kaiming, pissa and "
                "pissa_niter_N, such as pissa_niter_4"
            )
        if self.init == "kaiming":
            return
        if self.init_from:
            raise ValueError(
                f"lora.init = {self.init!r} contradicts lora.init_from, which starts from the "
                "adapter there; leave one of them out"
            )
        if self.dropout:
            raise ValueError(
                f"lora.dropout = {self.dropout} would drop parts of the model itself, which "
                f"lora.init = {self.init!r} moves into the branches; set lora.dropout = 0"
            )
        if (rank := max(self.r, *self.rank_pattern.values(), 0)) > MAX_RANK // 2:
            raise ValueError(
                f"lora.init = {self.init!r} saves adapters of twice the rank, and {rank} is more "
                f"than half of {MAX_RANK}; allowed are ranks from 1 to {MAX_RANK // 2}"
            )

    def doubled(self) -> "LoraSettings":
        """Settings of a plain adapter with twice the ranks and the same scales."""
        more = math.sqrt(2) if self.rslora else 2.0
        return dataclasses.replace(
            self,
            init=LoraSettings.init,
            r=2 * self.r,
            alpha=more * self.alpha,
            rank_pattern={key: 2 * rank for key, rank in self.rank_pattern.items()},
            alpha_pattern={key: more * alpha for key, alpha in self.alpha_pattern.items()},
        )

    @property
    def scale(self) -> float:
        """What branches are scaled by where no pattern says otherwise."""
        return self._scaled(self.alpha, self.r)

    def rank_of(self, path: str) -> int:
        """Rank of a module, by its whole name."""
        return _matching(self.rank_pattern, path, self.r)

    def scale_of(self, path: str) -> float:
        """What the branch of a module is scaled by."""
        return self._scaled(_matching(self.alpha_pattern, path, self.alpha), self.rank_of(path))

    def _scaled(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def continuing(self, found: "LoraSettings") -> "LoraSettings":
        """Settings to go on with an adapter: its own shape, this run's way of training.

        Args:
            found: the settings of the adapter's file.

        Raises:
            ValueError: this run asks for another shape than the file has.
        """
        training = "dropout", "dropout_per_module", "init_from", "plus_ratio"
        default = LoraSettings()
        for own in dataclasses.fields(self):
            asked, has = getattr(self, own.name), getattr(found, own.name)
            free = own.name in training or asked == getattr(default, own.name)
            if not free and _plain(asked) != _plain(has):
                raise ValueError(
                    f"lora.{own.name} = {asked!r} contradicts lora.init_from: the adapter in "
                    f"{self.init_from} has {has!r}; leave lora.{own.name} out"
                )
        return dataclasses.replace(found, **{name: getattr(self, name) for name in training})


def _plain(value: object) -> object:
    # the order of targets and layers means nothing
    return sorted(value) if isinstance(value, tuple) else value


def _keyed(name: str, pattern: Mapping[str, T]) -> dict[str, T]:
    return {f"{name}.{key}": value for key, value in pattern.items()}


def _matching(pattern: Mapping[str, T], path: str, otherwise: T) -> T:
    for key, value in pattern.items():
        if matches(rf"(.*\.)?({key})", path):
            return value
    return otherwise


def matches(pattern: str, path: str) -> bool:
    """Whether a regular expression matches the whole name of a module.

    Raises:
        ValueError: it is none, or takes longer than a second.
    """
    try:
        return regex.fullmatch(pattern, path, timeout=PATIENCE_S) is not None
    except TimeoutError:
        raise ValueError(f"lora: the pattern {pattern!r} searches without end") from None


def _check_pattern(pattern: str) -> None:
    try:
        regex.compile(rf"(.*\.)?({pattern})$")
    except regex.error as error:
        raise ValueError(f"lora: the pattern {pattern!r} cannot be read: {error}") from None


def _check_target(target: str) -> None:
    if target in ("lm_head", "embed_tokens"):
        raise ValueError(f"lora.targets: {target} cannot carry an adapter; leave it out")
    if "norm" in target:
        raise ValueError(f"lora.targets: {target} cannot be trained yet; leave it out")
    if target not in TARGETS:
        close = difflib.get_close_matches(target, TARGETS, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(
            f"lora.targets: {target!r} is unknown; {hint}allowed are {', '.join(TARGETS)}"
        )
