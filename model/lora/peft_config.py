"""PEFT's adapter_config.json: what an adapter's numbers mean, read and written.

Settings that change what an adapter computes are read where this project computes them, and refused
by name where it does not; those that only say how it was trained are passed over.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regex

from bioinstruct.model.lora.settings import TARGETS, LoraSettings, matches, module_path

CONFIG = "adapter_config.json"
_STARTS = ("gaussian", "orthogonal", "eva")  # PEFT's other ones take the first A and B out of W
# settings that change what the adapter computes, and the one value of each that we compute
_COMPUTED: Mapping[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "use_dora": False,
    "use_qalora": False,
    "modules_to_save": None,
    "exclude_modules": None,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}
_LATER = {
    "modules_to_save": "whole embeddings, heads or norms are not trained here yet",
    "trainable_token_indices": "embeddings are not trained here yet",
}


def to_peft(settings: LoraSettings, base_model: str) -> dict[str, Any]:
    """Return the content of an adapter_config.json."""
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
        "use_rslora": settings.rslora,
        "use_dora": False,
        "rank_pattern": settings.rank_pattern,
        "alpha_pattern": settings.alpha_pattern,
        "modules_to_save": None,
        "layers_to_transform": list(settings.layers) or None,
    }


def read_settings(folder: Path, num_layers: int) -> LoraSettings:
    """Read the adapter_config.json of a folder.

    Args:
        folder: of the adapter.
        num_layers: of the model; a regular expression may choose among its modules.

    Raises:
        ValueError: no such file, broken JSON, or settings that are not computed here.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG}; give the folder of a PEFT adapter")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(config).__name__}")
    _refuse(config, path)
    try:
        targets, layers = _chosen(config, num_layers)
        return LoraSettings(
            r=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            rslora=bool(config.get("use_rslora")),
            dropout=float(config.get("lora_dropout") or 0.0),
            targets=targets,
            layers=layers,
            rank_pattern={k: int(v) for k, v in _pattern(config, "rank_pattern").items()},
            alpha_pattern={k: float(v) for k, v in _pattern(config, "alpha_pattern").items()},
        )
    except KeyError as error:
        raise ValueError(f"{path} lacks the field {error}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from None


def _refuse(config: Mapping[str, Any], path: Path) -> None:
    for key, value in _COMPUTED.items():
        found = config.get(key, value)
        if found != value and not (not found and not value):
            why = f" ({_LATER[key]})" if key in _LATER else ""
            raise ValueError(
                f"{path}: {key} = {found!r} is not supported; allowed is {value!r}{why}"
            )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _STARTS:
        raise ValueError(
            f"{path}: init_lora_weights = {start!r} means a changed base model; let peft convert "
            "it to plain LoRA (save_pretrained, path_initial_model_for_weight_conversion)"
        )


def _pattern(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{key} = {found!r} must be an object of patterns and numbers")
    return found


def _chosen(config: Mapping[str, Any], num_layers: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The targets and layers that target_modules and layers_to_transform choose."""
    named = config["target_modules"]
    if named == "all-linear":
        named = list(TARGETS)
    if isinstance(named, str):
        return _matched(named, num_layers)
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"target_modules = {named!r} must be a list of {', '.join(TARGETS)}")
    # PEFT takes a path's end as well: self_attn.q_proj
    known = {path: target for target, (_, path) in TARGETS.items()}
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers or []
    if not all(type(layer) is int and 0 <= layer < num_layers for layer in layers):
        raise ValueError(
            f"layers_to_transform = {layers!r} must be layers from 0 to {num_layers - 1}"
        )
    if layers and config.get("layers_pattern") not in (None, [], "", "layers", ["layers"]):
        raise ValueError(f"layers_pattern = {config['layers_pattern']!r} must be layers")
    targets = [str(known.get(name, name)) for name in named]
    return tuple(dict.fromkeys(targets)), tuple(dict.fromkeys(layers))


def _matched(expression: str, num_layers: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The targets and layers whose modules' names a regular expression matches in whole."""
    try:
        regex.compile(expression)
    except regex.error as error:
        raise ValueError(f"target_modules = {expression!r} cannot be read: {error}") from None
    every = [(layer, target) for layer in range(num_layers) for target in TARGETS]
    found = {(i, target) for i, target in every if matches(expression, module_path(i, target))}
    layers = sorted({layer for layer, _ in found})
    targets = tuple(t for t in TARGETS if t in {target for _, target in found})
    if not found:
        raise ValueError(f"target_modules = {expression!r} matches no projection of the model")
    if len(found) != len(layers) * len(targets):
        raise ValueError(
            f"target_modules = {expression!r} takes other projections in some layers than in "
            "others; only the same projections in each adapted layer are supported"
        )
    return targets, () if len(layers) == num_layers else tuple(layers)
