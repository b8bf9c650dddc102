"""LoRA adapters: which weights have one, where their masters lie, and PEFT's file format.

All masters lie in one flat float32 buffer with a flat gradient beside it, so that the optimizer,
the norm and the finiteness check see two vectors, whatever the number of layers. A is initialised
as PEFT does it, uniform within +-1/sqrt(K) (kaiming with a = sqrt(5)), from a generator of its own;
B starts at zero.

On disk: `adapter_model.safetensors` (float32, B unscaled) and `adapter_config.json` with PEFT's
names and meaning: W' = W + scale * B A, scale = alpha / r.

Shapes   K input and N output features of a projection, R rank, P = all adapter parameters.
"""

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bioinstruct.kernels import Branch
from bioinstruct.model.config import LlamaConfig
from bioinstruct.synth.files import replaces, write_text

GROUPS = ("qkv", "o", "gate_up", "down")
"""Projections that share an input are one fused weight and one call."""
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
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_STARTS = ("gaussian", "orthogonal", "eva")  # PEFT's other ones take the first A and B out of W
_KEY = "base_model.model.model.layers.{layer}.{path}.lora_{which}.weight"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """What defines an adapter beside its numbers."""

    r: int = 16
    """Rank, 1 to 256."""
    alpha: float = 32.0
    """The branches are scaled by alpha / r."""
    dropout: float = 0.0
    """Probability of dropping an input of the branches in training, 0 <= dropout < 1."""
    targets: tuple[str, ...] = tuple(TARGETS)
    """Adapted projections, by PEFT's names."""

    def __post_init__(self) -> None:
        if not 1 <= self.r <= 256:
            raise ValueError(f"lora.r = {self.r} is out of range; allowed are 1 to 256")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"lora.alpha = {self.alpha} must be a positive number")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout = {self.dropout} must be at least 0 and below 1")
        if not self.targets:
            raise ValueError(f"lora.targets is empty; allowed are {', '.join(TARGETS)}")
        for target in self.targets:
            _check_target(target)

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.r


def _check_target(target: str) -> None:
    if target in ("lm_head", "embed_tokens"):
        raise ValueError(f"lora.targets: {target} cannot carry an adapter; leave it out")
    if target not in TARGETS:
        close = difflib.get_close_matches(target, TARGETS, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(
            f"lora.targets: {target!r} is unknown; {hint}allowed are {', '.join(TARGETS)}"
        )


@dataclass(frozen=True)
class Module:
    """The adapter of one projection: views of the flat buffer."""

    layer: int
    target: str
    a_RK: Tensor
    b_NR: Tensor
    start: int
    """First row of this projection in its group's fused weight."""

    @property
    def path(self) -> str:
        """Its place in the layer, as Hugging Face names it."""
        return TARGETS[self.target][1]

    @property
    def name(self) -> str:
        """The tensor that it adapts, by its Hugging Face name."""
        return f"model.layers.{self.layer}.{self.path}.weight"


class Adapters:
    """All adapters of a model, as views of one flat buffer.

    Args:
        config: the model's shape.
        settings: rank, scale and targets.
        device: where the masters lie.
        dtype: of the masters; float32 but for float64 oracles.
    """

    def __init__(
        self,
        config: LlamaConfig,
        settings: LoraSettings,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.settings = settings
        shapes = projection_shapes(config)
        chosen = [target for target in TARGETS if target in settings.targets]
        sizes = [settings.r * sum(shapes[target][:2]) for target in chosen]
        total = config.num_layers * sum(sizes)
        self.flat_P = torch.zeros(total, device=device, dtype=dtype)
        self.grad_P = torch.zeros_like(self.flat_P)
        self.modules: list[Module] = []
        self._groups: dict[tuple[int, str], list[Branch]] = {}
        offset = 0
        for layer in range(config.num_layers):
            for target in chosen:
                N, K, start = shapes[target]
                a_RK = self._view(offset, settings.r, K)
                b_NR = self._view(offset + a_RK.numel(), N, settings.r)
                offset += a_RK.numel() + b_NR.numel()
                self.modules.append(Module(layer, target, a_RK, b_NR, start))
                group = self._groups.setdefault((layer, TARGETS[target][0]), [])
                group.append(Branch(a_RK, b_NR, start))
        assert offset == total

    def _view(self, offset: int, rows: int, columns: int) -> Tensor:
        """A leaf whose data and gradient are parts of the flat buffers; autograd adds in place."""
        part = slice(offset, offset + rows * columns)
        view = self.flat_P[part].view(rows, columns).requires_grad_()
        view.grad = self.grad_P[part].view(rows, columns)
        return view

    def branches(self, layer: int, group: str) -> Sequence[Branch]:
        """The adapters of one fused weight, in the order of its rows; may be empty."""
        return self._groups.get((layer, group), ())

    def initialise(self, seed: int) -> None:
        """Draw A uniformly within +-1/sqrt(K) and set B to zero."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for module in self.modules:
                bound = module.a_RK.shape[1] ** -0.5
                a_RK = torch.empty(module.a_RK.shape).uniform_(-bound, bound, generator=generator)
                module.a_RK.copy_(a_RK)
                module.b_NR.zero_()

    def save(self, folder: Path, base_model: str) -> None:
        """Write PEFT's two files, then read them back and compare.

        Args:
            folder: created when missing; existing adapter files are replaced.
            base_model: what the adapter was trained on, noted in the configuration.

        Raises:
            OSError: the folder cannot be written to, or the disk is full.
        """
        tensors = {key: tensor.detach().float().cpu().contiguous() for key, tensor in self._named()}
        with replaces(folder / WEIGHTS) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
            written = safetensors.torch.load_file(temporary)
            if any(not torch.equal(written[key], tensor) for key, tensor in tensors.items()):
                raise OSError(f"{folder / WEIGHTS} read back differently than it was written")
        write_text(folder / CONFIG, json.dumps(_peft_config(self.settings, base_model), indent=2))

    def _named(self) -> list[tuple[str, Tensor]]:
        return [
            (_KEY.format(layer=m.layer, path=m.path, which=which), tensor)
            for m in self.modules
            for which, tensor in (("A", m.a_RK), ("B", m.b_NR))
        ]

    @classmethod
    def load(
        cls, folder: Path, config: LlamaConfig, device: torch.device | str = "cpu"
    ) -> "Adapters":
        """Read an adapter in PEFT's format.

        Raises:
            ValueError: missing files, settings this model does not compute, or tensors that are
                missing, unknown, of the wrong shape or not finite; all in one list.
        """
        settings = _read_settings(folder)
        adapters = cls(config, settings, device)
        path = folder / WEIGHTS
        if not path.is_file():
            raise ValueError(f"{folder} has no {WEIGHTS}; give the folder that holds it")
        try:
            tensors = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
        adapters._fill(tensors, path)
        return adapters

    def _fill(self, tensors: dict[str, Tensor], path: Path) -> None:
        wanted = dict(self._named())
        wrong = [f"missing {key}" for key in wanted if key not in tensors]
        wrong += [f"unknown {key}" for key in tensors if key not in wanted]
        for key in wanted.keys() & tensors.keys():
            got, shape = tensors[key], tuple(wanted[key].shape)
            if tuple(got.shape) != shape:
                wrong.append(f"{key} has shape {tuple(got.shape)}, the model needs {shape}")
            elif not got.is_floating_point() or not bool(torch.isfinite(got).all()):
                wrong.append(f"{key} holds values that are not finite numbers")
        if wrong:
            rest = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ValueError(f"{path} does not fit the model: {'; '.join(sorted(wrong)[:5])}{rest}")
        with torch.no_grad():
            for key, place in wanted.items():
                place.copy_(tensors[key])


def projection_shapes(config: LlamaConfig) -> dict[str, tuple[int, int, int]]:
    """(N, K, first row in the group's weight) of every projection of a layer."""
    D, F, E = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * E, config.num_kv_heads * E
    return {
        "q_proj": (q, D, 0),
        "k_proj": (kv, D, q),
        "v_proj": (kv, D, q + kv),
        "o_proj": (D, q, 0),
        "gate_proj": (F, D, 0),
        "up_proj": (F, D, F),
        "down_proj": (D, F, 0),
    }


def _peft_config(settings: LoraSettings, base_model: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": settings.r,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": sorted(settings.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "layers_to_transform": None,
    }


def _read_settings(folder: Path) -> LoraSettings:
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG}; give the folder of a PEFT adapter")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(config).__name__}")
    # settings that change what the adapter computes, and the one value of each that we compute
    computed = {
        "peft_type": "LORA",
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "layers_to_transform": None,
        "alora_invocation_tokens": None,
    }
    for key, value in computed.items():
        found = config.get(key, value)
        if found != value and not (not found and not value):
            raise ValueError(f"{path}: {key} = {found!r} is not supported; allowed is {value!r}")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _STARTS:
        raise ValueError(
            f"{path}: init_lora_weights = {start!r} means a changed base model; let peft convert "
            "it to plain LoRA (save_pretrained, path_initial_model_for_weight_conversion)"
        )
    try:
        targets = config["target_modules"]
        if targets == "all-linear":
            targets = list(TARGETS)
        if not isinstance(targets, list):
            raise ValueError(f"target_modules = {targets!r} must be a list of {', '.join(TARGETS)}")
        return LoraSettings(
            r=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            dropout=float(config.get("lora_dropout", 0.0)),
            targets=tuple(targets),
        )
    except KeyError as error:
        raise ValueError(f"{path} lacks the field {error}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
