"""LoRA adapters: which weights have one, where their masters lie, and PEFT's file format.

All masters lie in one flat float32 buffer with a flat gradient beside it, so that the optimizer,
the norm and the finiteness check see two vectors, whatever the number of layers. All A come
first, then all B, because LoRA+ gives them different learning rates. A is initialised as PEFT does
it, uniform within +-1/sqrt(K) (kaiming with a = sqrt(5)), from a generator of its own, and B starts
at zero; or both are taken out of the weights (lora/pissa.py).

On disk: `adapter_model.safetensors` (float32, B unscaled) and `adapter_config.json` with PEFT's
names and meaning (lora/settings.py, lora/peft_config.py).

Shapes   K input and N output features of a projection, R rank, P = all adapter parameters.
"""

import copy
import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bioinstruct.kernels import Branch, Copies
from bioinstruct.kernels.lora_copied import CopiedB
from bioinstruct.kernels.mirror import Mirror
from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.lora.peft_config import CONFIG, read_settings, to_peft
from bioinstruct.model.lora.pissa import Factors, difference, principal, subtract
from bioinstruct.model.lora.settings import TARGETS, LoraSettings, module_path
from bioinstruct.synth.files import replaces, write_text

__all__ = ["CONFIG", "GROUPS", "TARGETS", "WEIGHTS", "Adapters", "LoraSettings", "Module"]

GROUPS = ("qkv", "o", "gate_up", "down")
"""Projections that share an input are one fused weight and one call."""
WEIGHTS = "adapter_model.safetensors"
_KEY = "base_model.model.model.layers.{layer}.{path}.lora_{which}.weight"


@dataclass(frozen=True)
class Module:
    """The adapter of one projection: views of the flat buffer."""

    layer: int
    target: str
    a_RK: Tensor
    b_NR: Tensor
    start: int
    """First row of this projection in its group's fused weight."""
    scale: float
    """What B A is multiplied by."""

    @property
    def path(self) -> str:
        """Its place in the layer, as Hugging Face names it."""
        return TARGETS[self.target][1]

    @property
    def name(self) -> str:
        """The tensor that it adapts, by its Hugging Face name."""
        return f"{module_path(self.layer, self.target)}.weight"


class _Narrow:
    """The masters in a compute dtype, each B times its scale; made new when they have changed."""

    def __init__(self, a_P: Tensor, b_P: Tensor) -> None:
        self.a_P, self.b_P, self.version = a_P, b_P, -1

    def part(self, module: Module, num_a: int) -> Tensor:
        """B of one module."""
        first = int(module.b_NR.storage_offset()) - num_a
        return self.b_P[first : first + module.b_NR.numel()].view(module.b_NR.shape)


_narrowing = threading.Lock()  # adapters and their twins may ask at once


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
        if beyond := [layer for layer in settings.layers if not 0 <= layer < config.num_layers]:
            raise ValueError(
                f"lora.layers names layer {beyond[0]}; the model has 0 to {config.num_layers - 1}"
            )
        shapes = projection_shapes(config)
        layers = sorted(set(settings.layers)) or range(config.num_layers)
        chosen = [(i, target) for i in layers for target in TARGETS if target in settings.targets]
        ranks = [settings.rank_of(module_path(*place)) for place in chosen]
        sizes = [shapes[target] for _, target in chosen]
        self.num_a = sum(R * K for R, (_, K, _) in zip(ranks, sizes, strict=True))
        """Numbers of all A together, which are the first of the flat buffer."""
        num_b = sum(R * N for R, (N, _, _) in zip(ranks, sizes, strict=True))
        self.flat_P = torch.zeros(self.num_a + num_b, device=device, dtype=dtype)
        self.grad_P = torch.zeros_like(self.flat_P)
        self.modules: list[Module] = []
        self.taken: list[Factors] = []
        """With PiSSA, what each module's A and B began as, which the model's weights now lack."""
        self.mirror: Mirror | None = None
        """Copies of the masters that the model computes with, where it keeps some (kernels)."""
        self._groups: dict[tuple[int, str], list[Module]] = {}
        self._narrow: dict[torch.dtype, _Narrow] = {}
        self._copies: dict[torch.dtype, dict[tuple[int, str], Copies]] = {}
        start_a, start_b = 0, self.num_a
        for place, R, (N, K, start) in zip(chosen, ranks, sizes, strict=True):
            a_RK, b_NR = self._view(start_a, R, K), self._view(start_b, N, R)
            start_a, start_b = start_a + R * K, start_b + N * R
            scale = settings.scale_of(module_path(*place))
            self._add(Module(*place, a_RK, b_NR, start, scale))

    def _view(self, offset: int, rows: int, columns: int) -> Tensor:
        """A leaf whose data and gradient are parts of the flat buffers; autograd adds in place."""
        part = slice(offset, offset + rows * columns)
        view = self.flat_P[part].view(rows, columns).requires_grad_()
        view.grad = self.grad_P[part].view(rows, columns)
        return view

    def twin(self) -> "Adapters":
        """The same masters, with a gradient of their own."""
        other = copy.copy(self)
        other.grad_P = torch.zeros_like(self.grad_P)
        other.modules, other._groups, other._copies = [], {}, {}
        for m in self.modules:
            a_RK, b_NR = (other._view(int(x.storage_offset()), *x.shape) for x in (m.a_RK, m.b_NR))
            other._add(replace(m, a_RK=a_RK, b_NR=b_NR))
        return other

    def _add(self, module: Module) -> None:
        self.modules.append(module)
        self._groups.setdefault((module.layer, TARGETS[module.target][0]), []).append(module)

    @property
    def version(self) -> int:
        """A number that grows with every change of the masters."""
        return self.flat_P._version

    def ranks(self, layer: int, group: str) -> int:
        """Sum of the ranks of one fused weight's adapters."""
        return sum(len(m.a_RK) for m in self._groups.get((layer, group), ()))

    def branches(self, layer: int, group: str) -> Sequence[Branch]:
        """The adapters of one fused weight, in the order of its rows; may be empty.

        They are to be scaled by settings.scale, and by their factor where a pattern gives a module
        another scale.
        """
        modules, common = self._groups.get((layer, group), ()), self.settings.scale
        return [
            Branch(m.a_RK, m.b_NR, m.start, m.scale / common, _number(m.target)) for m in modules
        ]

    def copies(self, layer: int, group: str, dtype: torch.dtype) -> Copies | None:
        """The adapters of one fused weight in a compute dtype; None where it has none.

        All masters are rounded in one pass, when they are first asked for since they changed.
        """
        narrow = self._narrow.get(dtype)
        if narrow is None or narrow.version != self.version:
            with _narrowing:
                narrow = self._narrowed(dtype)
        if dtype not in self._copies:
            found = {place: self._copied(group, narrow) for place, group in self._groups.items()}
            self._copies[dtype] = found
        return self._copies[dtype].get((layer, group))

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _narrowed(self, dtype: torch.dtype) -> _Narrow:
        """The masters of now in a compute dtype, in the memory that held them before."""
        a_P, b_P = self.flat_P.split((self.num_a, len(self.flat_P) - self.num_a))
        own = self._narrow.setdefault(
            dtype, _Narrow(a_P.to(dtype), torch.empty_like(b_P, dtype=dtype))
        )
        if own.version == self.version:
            return own  # by another thread
        own.a_P.copy_(a_P)
        own.b_P.copy_(b_P * self.settings.scale)
        for m in self.modules:
            if m.scale != self.settings.scale:
                own.part(m, self.num_a).copy_(m.b_NR * m.scale)
        own.version = self.version
        return own

    def _copied(self, modules: Sequence[Module], narrow: _Narrow) -> Copies:
        first, K = int(modules[0].a_RK.storage_offset()), modules[0].a_RK.shape[1]
        # the A of a group stand one after the other, and are equally wide
        ranks = sum(len(m.a_RK) for m in modules)
        a_RK, a_grad_RK = (
            flat[first : first + ranks * K].view(ranks, K) for flat in (narrow.a_P, self.grad_P)
        )
        branches, rank = [], 0
        for m in modules:
            assert m.b_NR.grad is not None
            b_NR = narrow.part(m, self.num_a)
            branches.append(CopiedB(b_NR, m.b_NR.grad, m.scale, m.start, rank))
            rank += len(m.a_RK)
        return Copies(a_RK, a_grad_RK, branches, modules[0].a_RK)

    @classmethod
    def starting(
        cls,
        config: LlamaConfig,
        asked: LoraSettings,
        device: torch.device | str,
        seed: int,
        weights: Mapping[str, Tensor] | None = None,
    ) -> "Adapters":
        """Adapters that are ready to train: new ones, or those of asked.init_from.

        Args:
            config: the model's shape.
            asked: the run's settings.
            device: where the masters lie.
            seed: of what is drawn.
            weights: the model's own, by Hugging Face name; PiSSA, and nothing else, changes them.

        Raises:
            ValueError: as for load; or asked contradicts the adapter that it continues; or PiSSA is
                to take more out of a weight than there is.
        """
        if asked.init_from:
            found = cls.load(Path(asked.init_from), config, device)
            found.settings = asked.continuing(found.settings)
            return found
        new = cls(config, asked, device)
        if asked.init == LoraSettings.init:
            new.initialise(seed)
        else:
            assert weights is not None
            new.take_principal(weights, seed)
        return new

    @torch.no_grad()
    def take_principal(self, weights: Mapping[str, Tensor], seed: int) -> float:
        """Move the principal part of every adapted weight into its A and B (PiSSA).

        The same weights, settings and seed give the same numbers again, so that a run can resume.

        Args:
            weights: the model's, by Hugging Face name; what is taken is subtracted in place.
            seed: of the random products of pissa_niter_N.

        Returns:
            How far rounding moved the weights: the norm of the changes over that of the weights.

        Raises:
            ValueError: a rank is larger than a side of its weight.
        """
        init, changed, whole = self.settings.init, 0.0, 0.0
        for module in self.modules:
            weight_NK, rank = weights[module.name], len(module.a_RK)
            if rank > min(weight_NK.shape):
                raise ValueError(
                    f"lora.init = {init!r} cannot take {rank} singular values out of "
                    f"{module.name}, which has {min(weight_NK.shape)}; lower lora.r"
                )
            whole += float(weight_NK.norm(dtype=torch.float32)) ** 2
            part = principal(weight_NK, rank, module.scale, init, seed)
            changed += subtract(weight_NK, part, module.scale) ** 2
            module.a_RK.copy_(part.a_RK)
            module.b_NR.copy_(part.b_NR)
            self.taken.append(Factors(module.a_RK.clone(), module.b_NR.clone()))
        return math.sqrt(changed / whole)

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

        What was taken out of the weights (PiSSA) is subtracted: the files belong to the model as it
        was loaded, and have twice the rank.

        Args:
            folder: created when missing; existing adapter files are replaced.
            base_model: what the adapter was trained on, noted in the configuration.

        Raises:
            OSError: the folder cannot be written to, or the disk is full.
        """
        own = {key: tensor.detach() for key, tensor in self._named(self._added())}
        tensors = {key: tensor.float().cpu().contiguous() for key, tensor in own.items()}
        with replaces(folder / WEIGHTS) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
            written = safetensors.torch.load_file(temporary)
            if any(not torch.equal(written[key], tensor) for key, tensor in tensors.items()):
                raise OSError(f"{folder / WEIGHTS} read back differently than it was written")
        settings = self.settings.doubled() if self.taken else self.settings
        write_text(folder / CONFIG, json.dumps(to_peft(settings, base_model), indent=2))

    @torch.no_grad()
    def _added(self) -> list[Factors]:
        """What each module adds to the weights as they were loaded."""
        own = [Factors(module.a_RK, module.b_NR) for module in self.modules]
        if not self.taken:
            return own
        return [difference(now, start) for now, start in zip(own, self.taken, strict=True)]

    def _named(self, added: Sequence[Factors]) -> list[tuple[str, Tensor]]:
        return [
            (_KEY.format(layer=m.layer, path=m.path, which=which), tensor)
            for m, part in zip(self.modules, added, strict=True)
            for which, tensor in zip("AB", part, strict=True)
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
        settings = read_settings(folder, config.num_layers)
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
        wanted = dict(self._named(self._added()))
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


def _number(target: str) -> int:
    """Which projection of its group a target is."""
    group = TARGETS[target][0]
    return [name for name, (own, _) in TARGETS.items() if own == group].index(target)


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
