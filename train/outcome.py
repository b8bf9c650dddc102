"""What a run leaves for use: an adapter, or a whole model where all weights trained.

    adapter/   PEFT's two files
    model/     Hugging Face's folder: safetensors (in shards where they are large), config.json and
               the tokenizer's files where the base model has such; in the compute dtype

A folder that is there already is replaced once the new one is whole.
"""

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from bioinstruct.model.checkpoint import save_checkpoint
from bioinstruct.model.tokenizers.tokenizer_config import copy_tokenizer
from bioinstruct.synth.console import note
from bioinstruct.train.plan.prepare import Prepared
from bioinstruct.train.weights.full import FullMasters


def outcome_name(method: str) -> str:
    """Name of the folder, by what trained."""
    return "adapter" if method == "lora" else "model"


def save_outcome(prepared: Prepared, folder: Path) -> None:
    """Write the adapter or the model as it is now; all ranks call this.

    Raises:
        ValueError, OSError: on all ranks, when the first one cannot write.
    """
    adapters, masters = prepared.adapters, prepared.masters
    if adapters is not None:
        base = str(prepared.llm.path)
        prepared.ranks.from_first(lambda: adapters.save(folder, base))
        return
    assert isinstance(masters, FullMasters)
    pairs = masters.named(masters.flat())
    failed: list[Exception] = []
    if prepared.ranks.is_first:
        try:
            _write(prepared, folder, pairs)
        except (ValueError, OSError) as error:
            failed.append(error)
    # tensors are put together by all ranks, so all go through to the last
    for _ in pairs:
        pass
    prepared.ranks.from_first(lambda: _raise(failed))


def _raise(failed: list[Exception]) -> None:
    for error in failed:
        raise error


def _write(prepared: Prepared, folder: Path, pairs: Iterator[tuple[str, Tensor]]) -> None:
    llm, mark = prepared.llm, secrets.token_hex(4)
    new, old = (folder.with_name(f".{kind}-{folder.name}-{mark}") for kind in ("new", "old"))
    save_checkpoint(new, llm.config, pairs, dtype=llm.model.dtype)
    source = llm.tokenizer.source
    copied = copy_tokenizer(source.parent, new)
    if not copied:
        note(f"{folder} has no tokenizer of its own; name {source} (tokenizer=, model.tokenizer)")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
