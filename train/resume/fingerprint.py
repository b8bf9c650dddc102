"""What determines a run's numbers, in a form that two runs can be compared by.

A resumed run must be the run that was started. Its settings are compared key by key, its records by
a checksum of their tokens, its model by a checksum of samples of its weight files, so that files
may move. What only says where, how often and how fast may change; so may the number of ranks, the
device and the kernels, which change the last bits alone.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bioinstruct.train.data.tokens import TokenSet
from bioinstruct.train.report.provenance import package_version
from bioinstruct.train.run import Run, keys

MAY_CHANGE = frozenset(
    {
        *("out", "device", "attention", "shard"),
        *("model.path", "model.tokenizer", "model.shape", "data.path", "data.max_tokens_per_pack"),
        *("plan.hardware", "plan.mfu", "plan.ranks"),
        *("lora.init_from", "train.save_every", "train.keep", "train.eval_every", "train.samples"),
        *("train.checkpoint_layers", "train.packs_at_once", "train.max_skipped", "train.spikes"),
        *("train.tensorboard", "train.deterministic"),
        *("eval.tasks", "eval.limit", "eval.before", "eval.form", "eval.lexicon", "eval.every"),
    }
)
"""Settings that a resumed run may give other values; files must hold the same."""

_WEIGHTS = (".safetensors", ".bin", ".pth", ".gguf")
_BLOCKS, _BLOCK_BYTES = 256, 4096  # of each weight file, evenly spread


def fingerprint(
    run: Run,
    *,
    tokens: TokenSet,
    validation: TokenSet | None,
    model: Path,
    dtype: torch.dtype,
    num_steps: int,
) -> dict[str, Any]:
    """Return all that a resumed run must share with the run that it continues, fit for JSON."""
    settings = {key: _plain(run, key) for key in keys()}
    return {
        "bioinstruct": package_version("bioinstruct"),
        "settings": {k: v for k, v in settings.items() if k not in MAY_CHANGE},
        "dtype of the weights": str(dtype).removeprefix("torch."),
        "steps": num_steps,
        "training records": _tokens(tokens),
        "validation records": None if validation is None else _tokens(validation),
        "model files": model_checksum(model),
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return "field: old -> new" for everything that two fingerprints do not share."""
    found = []
    before, after = _flat(old), _flat(new)
    for key in [*before, *(k for k in after if k not in before)]:
        if before.get(key) != after.get(key):
            found.append(f"{key}: {_shown(before.get(key))} -> {_shown(after.get(key))}")
    return found


def refuse_changes(old: Mapping[str, Any], new: Mapping[str, Any], out: Path) -> None:
    """Refuse to continue a run as another one.

    Raises:
        ValueError: with everything that changed.
    """
    if changed := differences(old, new):
        raise ValueError(
            f"the run in {out} cannot be resumed, because what determines it has changed: "
            f"{'; '.join(changed)}. Put that back, or start a new run in another folder; only "
            f"these settings may change: {', '.join(sorted(MAY_CHANGE))}"
        )


def _plain(run: Run, key: str) -> Any:
    """A setting's value as JSON gives it back."""
    value: Any = run
    for name in key.split("."):
        value = getattr(value, name)
    if key == "data.validation" and isinstance(value, str):
        return "a file"  # its records are compared instead
    return json.loads(json.dumps(value, default=_without_path))


def _without_path(table: Any) -> dict[str, Any]:
    """A file's settings, but for where it is: its records are compared instead."""
    return {k: v for k, v in dataclasses.asdict(table).items() if k != "path"}


def _tokens(tokens: TokenSet) -> str:
    digest = hashlib.sha256()
    for i in range(len(tokens)):
        ids, prompt = tokens.sample(i)
        digest.update(f"{len(ids)} {prompt}\n".encode())
        digest.update(ids.tobytes())
    total = int(tokens.lengths.sum())
    return f"{len(tokens)} samples of {total} tokens, SHA-256 {digest.hexdigest()[:16]}"


def model_checksum(path: Path) -> str:
    """Return a checksum of the sizes of a model's weight files and of 1 MiB spread over each.

    Args:
        path: a model's folder, or the file of its weights.
    """
    folder = path.parent if path.suffix == ".json" else path  # an index names its neighbours
    inside = [] if folder.is_file() else [p for p in folder.iterdir() if p.suffix in _WEIGHTS]
    files = [folder] if folder.is_file() else sorted(inside)
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            for block in range(_BLOCKS):
                opened.seek(block * size // _BLOCKS)
                digest.update(opened.read(_BLOCK_BYTES))
    return f"SHA-256 {digest.hexdigest()[:16]}"


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    settings = facts.get("settings", {})
    return {**settings, **{k: v for k, v in facts.items() if k != "settings"}}


def _shown(value: Any) -> str:
    return (
        "nothing" if value is None else json.dumps(value) if not isinstance(value, str) else value
    )
