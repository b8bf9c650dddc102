"""How the rotary embedding is stretched to longer contexts, as checkpoints state it.

Pair i of a head of width H turns by p * base^(-2i/H) / d_i at position p, with divisors d_i:

    none      d_i = 1
    linear    d_i = factor                                     (Chen et al. 2023, arXiv 2306.15595)
    llama3    1 / d_i = (1 - k_i) / factor + k_i                (Llama 3.1, arXiv 2407.21783)
              k_i = (L / w_i - low) / (high - low), held within 0 and 1,
              w_i = 2 pi base^(2i/H) the wavelength, L the context of the pre-training

Hugging Face files state the rule, in two spellings; GGUF files state linear's rule and llama3's
divisors. A rule that is not listed above is refused: it would change every activation.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bioinstruct.model.fields import Fields, build, require


def _require_factor(factor: float) -> None:
    require(1 <= factor < math.inf, f"rope scaling factor is {factor}; it must be finite and >= 1")


@dataclass(frozen=True, kw_only=True)
class LinearRopeScaling:
    """Every rotary frequency divided by one factor."""

    factor: float
    """How many times longer the context becomes, at least 1."""

    def __post_init__(self) -> None:
        _require_factor(self.factor)

    def divisors(self, head_dim: int, rope_base: float) -> list[float]:
        """Return d_i, what each of the head_dim / 2 frequencies is divided by."""
        return [self.factor] * (head_dim // 2)


@dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Slow rotary frequencies divided by a factor, fast ones kept, those between blended."""

    factor: float
    """How many times longer the context becomes, at least 1."""
    low_freq_factor: float
    """Wavelengths above original_max_positions / low_freq_factor are stretched in full."""
    high_freq_factor: float
    """Wavelengths below original_max_positions / high_freq_factor stay; > low_freq_factor."""
    original_max_positions: int
    """Context of the pre-training, in tokens."""

    def __post_init__(self) -> None:
        low, high = self.low_freq_factor, self.high_freq_factor
        _require_factor(self.factor)
        require(
            0 < low < high < math.inf,
            f"llama3 rope scaling needs 0 < low_freq_factor < high_freq_factor, not {low}, {high}",
        )
        require(
            self.original_max_positions > 0,
            f"original_max_position_embeddings is {self.original_max_positions}; it must be > 0",
        )

    def divisors(self, head_dim: int, rope_base: float) -> list[float]:
        """Return d_i, what each of the head_dim / 2 frequencies is divided by."""
        return [self._divisor(rope_base ** (2 * i / head_dim)) for i in range(head_dim // 2)]

    def _divisor(self, period: float) -> float:
        turns = self.original_max_positions / (2 * math.pi * period)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        return 1 / ((1 - kept) / self.factor + kept)


RopeScaling = LinearRopeScaling | Llama3RopeScaling

# a GGUF file holds llama3's divisors only; these released models have them
RELEASED_SCALINGS = tuple(
    Llama3RopeScaling(
        factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )
    for factor in (8.0, 32.0)  # Llama 3.1 and 3.3, Llama 3.2
)

# what each type of a Hugging Face file needs, besides the keys that any type may carry
_HF_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
}
_HF_COMMON_KEYS = frozenset(
    {
        "rope_type",
        "type",
        "rope_theta",
        "partial_rotary_factor",
        "original_max_position_embeddings",
    }
)


def rope_from_hf(fields: Fields) -> tuple[float, RopeScaling | None]:
    """Return the rotary base and its scaling out of a config.json, whichever spelling it has.

    Raises:
        ValueError: an unknown type or key, or two spellings that contradict each other.
    """
    spelled = [k for k in ("rope_scaling", "rope_parameters") if fields.has(k)]
    parts = [Fields(fields.mapping[key], f"{fields.source}: {key}") for key in spelled]
    bases = {f.number("rope_theta") for f in (fields, *parts) if f.has("rope_theta")}
    scalings = {_scaling_from_hf(part) for part in parts}
    if len(bases) > 1:
        raise ValueError(
            f"{fields.source}: rope_theta is given twice and differs "
            f"({', '.join(map(str, sorted(bases)))}); keep the right one"
        )
    if len(scalings) > 1:
        raise ValueError(
            f"{fields.source}: rope_scaling and rope_parameters contradict each other; "
            "keep the right one"
        )
    return bases.pop() if bases else 10000.0, scalings.pop() if scalings else None


def rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Return what config.json says under rope_scaling."""
    match scaling:
        case None:
            return None
        case LinearRopeScaling():
            return {"rope_type": "linear", "factor": scaling.factor}
        case Llama3RopeScaling():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
            }


def rope_from_gguf(
    fields: Fields,
    head_dim: int,
    rope_base: float,
    divisors: Sequence[float] | None,
    arch: str = "llama",
) -> RopeScaling | None:
    """Return the scaling that a GGUF header and its rope_freqs.weight state.

    Args:
        fields: the header.
        head_dim: width of a head.
        rope_base: base of the rotary frequencies.
        divisors: the (head_dim / 2,) numbers of rope_freqs.weight, None without that tensor.
        arch: the header's general.architecture, with which its keys begin.

    Raises:
        ValueError: an unknown type, or divisors of no released model.
    """
    stated = _linear_from_gguf(fields, arch)
    if divisors is None or all(d == 1 for d in divisors):
        return stated
    for scaling in RELEASED_SCALINGS:
        expected = scaling.divisors(head_dim, rope_base)
        if len(divisors) == len(expected) and all(
            # the file's are float32 results of float32 steps
            math.isclose(found, wanted, rel_tol=1e-4)
            for found, wanted in zip(divisors, expected, strict=True)
        ):
            require(stated is None, f"{fields.source}: scales its rotary frequencies twice")
            return scaling
    raise ValueError(
        f"{fields.source}: its rope_freqs.weight is not that of Llama 3.1 or 3.2 (factor 8 or 32 "
        "over 8192 positions); use the model's Hugging Face folder, which states the rule itself"
    )


def _scaling_from_hf(part: Fields) -> RopeScaling | None:
    type_key = "rope_type" if part.has("rope_type") else "type"
    kind = part.text(type_key, "default")
    if kind not in _HF_KEYS:
        part.refuse(type_key, f"known types are {', '.join(_HF_KEYS)}")
    for key in part.mapping:
        if part.has(key) and key not in _HF_KEYS[kind] | _HF_COMMON_KEYS:
            part.refuse(key, f"rope type {kind} has no such key")
    if part.number("partial_rotary_factor", 1.0) != 1:
        part.refuse("partial_rotary_factor", "only whole heads (1.0) are rotated")
    if kind == "default":
        return None
    values: dict[str, float] = {key: part.number(key) for key in sorted(_HF_KEYS[kind])}
    if kind == "linear":
        return build(LinearRopeScaling, part.source, **values)
    original = part.integer("original_max_position_embeddings")
    return build(Llama3RopeScaling, part.source, original_max_positions=original, **values)


def _linear_from_gguf(fields: Fields, arch: str) -> LinearRopeScaling | None:
    # llama.cpp takes linear where a factor stands without a type; older files call it scale_linear
    key = f"{arch}.rope.scaling"
    kind = fields.text(f"{key}.type", "linear")
    if kind not in ("none", "linear"):
        fields.refuse(f"{key}.type", "known types are none, linear")
    older = fields.number(f"{arch}.rope.scale_linear", 1.0)
    factor = fields.number(f"{key}.factor", older)
    if kind == "none" or factor in (0, 1):
        return None
    return build(LinearRopeScaling, fields.source, factor=factor)
