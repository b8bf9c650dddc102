"""Model weights between files and memory: opened, checked, streamed into place, written.

A checkpoint is a Hugging Face folder (model.safetensors or pytorch_model.bin, or shards of them and
their index, beside a config.json), one such file with config.json beside it, a folder in Meta's
form, or a GGUF file, in parts or whole. Whatever it is, its tensors are known here by their Hugging
Face names and (out, in) shapes. A folder that holds safetensors and pickles is taken by the former.

Loading first compares all names, shapes and types with what the model wants and reports every
difference at once; then it copies tensor by tensor into the model's own memory, one conversion of
dtype on the way. Writing goes to a folder of another name that takes its place when complete.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.fields import shown
from bioinstruct.model.formats.config_json import config_from_hf, config_to_hf
from bioinstruct.model.formats.meta_files import SHARDS, meta_shards, read_meta
from bioinstruct.model.formats.pickled import read_pickled
from bioinstruct.model.formats.stored import StoredTensor, check_start, read_safetensors
from bioinstruct.model.formats.written import (
    check_values,
    checked,
    new_folder,
    some,
    write_safetensors,
)
from bioinstruct.model.gguf_header import gguf_parts
from bioinstruct.synth.files import write_text

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIN = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Rows(NamedTuple):
    """Where some rows of a weight belong."""

    shape: tuple[int, ...]
    """Of the whole weight."""
    start: int
    """The first of its rows that is wanted."""
    destination: Tensor
    """As many rows as are wanted; of any float dtype, strides and device."""


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk whose shape is known and whose numbers are not read yet."""

    path: Path
    """The file that was opened: the weights, or the index of their shards."""
    config: LlamaConfig
    """The model's shape."""
    tensors: Mapping[str, StoredTensor]
    """What the files hold, by Hugging Face name."""

    def names(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor in the files, by Hugging Face name."""
        return {name: stored.shape for name, stored in self.tensors.items()}

    @torch.no_grad()
    def load_into(self, destinations: Mapping[str, Tensor]) -> None:
        """Copy every weight to its place.

        Args:
            destinations: by Hugging Face name, tensors of the weights' shapes, of any float
                dtype, strides and device; they may be parts of larger buffers. None for lm_head
                where the embeddings are tied.

        Raises:
            ValueError: before the first copy, a list of all tensors that are missing, of another
                shape, unknown, or of a type that is no plain number; during it, a weight that is
                not finite or too large for its destination.
        """
        whole = {name: Rows(tuple(place.shape), 0, place) for name, place in destinations.items()}
        self.load_rows(whole)

    @torch.no_grad()
    def load_rows(self, places: Mapping[str, Rows]) -> None:
        """Copy a part of every weight to its place; the rest of the files is not read.

        Args:
            places: by Hugging Face name, as for load_into.

        Raises:
            ValueError: as load_into; values are looked at where they are copied.
        """
        self.check({name: rows.shape for name, rows in places.items()})
        for name, stored in self.tensors.items():
            if name in places and places[name].destination.numel():
                _, start, destination = places[name]
                source = stored.read()[start : start + len(destination)]
                check_values(f"{self.path}: {name}", source, destination.dtype)
                destination.copy_(source)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names, shapes and types with what a model wants; no number is read but tied ones.

        Args:
            shapes: by Hugging Face name; without lm_head where the embeddings are tied.

        Raises:
            ValueError: as load_into, before the first copy.
        """
        wrong_shape, wrong_type = [], []
        for name, stored in self.tensors.items():
            if name not in shapes:
                continue
            if stored.shape != shapes[name]:
                wrong_shape.append(f"{name} is {stored.shape}, expected {shapes[name]}")
            if not stored.loadable:
                wrong_type.append(f"{name} is {stored.dtype}")
        found = {
            "missing": [name for name in shapes if name not in self.tensors],
            "of the wrong shape": wrong_shape,
            "of a type that is not read": wrong_type,
            "unknown": [name for name in self.tensors if self._unknown(name, shapes)],
        }
        if any(found.values()):
            raise ValueError(f"{self.path}: does not fit the model\n" + _listed(found))
        if HEAD in self.tensors and HEAD not in shapes:
            self._check_tied()

    def _unknown(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        # writers of 2023 also stored the rotary frequencies, which follow from the config
        known = name in shapes or name.endswith("rotary_emb.inv_freq")
        return not known and not (name == HEAD and self.config.tied_embeddings)

    def _check_tied(self) -> None:
        head, embedding = self.tensors[HEAD], self.tensors[EMBEDDING]
        equal = head.loadable and head.shape == embedding.shape
        if not equal or not torch.equal(head.read().double(), embedding.read().double()):
            raise ValueError(
                f"{self.path}: its configuration ties the embeddings, but {HEAD} differs from "
                f"{EMBEDDING}; set tie_word_embeddings to false if both were trained"
            )


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model folder, or one of the files that hold weights, and read the table of contents.

    Raises:
        ValueError: there is no model, more than one, or a file of it is missing or damaged.
    """
    file = _find_weights(path)
    if file.suffix == ".gguf":
        # dequantizing needs an optional package
        from bioinstruct.model.formats.gguf_tensors import read_gguf

        return Checkpoint(file, *read_gguf(file))
    if file.match(SHARDS):
        return Checkpoint(file, *read_meta(meta_shards(file.parent)))
    config_path = file.parent / "config.json"
    config = config_from_hf(_read_object(config_path), str(config_path))
    tensors = _read_shards(file) if file.suffix == ".json" else _read_file(file)
    return Checkpoint(file, config, tensors)


def _read_file(path: Path) -> dict[str, StoredTensor]:
    return read_pickled(path) if path.suffix == ".bin" else read_safetensors(path)


def save_checkpoint(
    folder: Path,
    config: LlamaConfig,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Write a Hugging Face folder: weights (in shards where they are large), index, config.json.

    Args:
        folder: where to write; it must not exist yet, or be empty.
        config: the model's shape; it says which tensors there must be.
        tensors: by Hugging Face name, or pairs that may be produced one at a time.
        dtype: what to store; None keeps each tensor's own.
        max_shard_bytes: largest size of a file, unless a single tensor is larger.

    Returns:
        The files written.

    Raises:
        ValueError: the folder holds something, or the tensors are not the model's.
        OSError: the disk is full or not writable.
    """
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    with new_folder(folder) as temporary:
        weights = checked(config, pairs, dtype)
        first = next(weights)
        shapes = config.tensor_shapes()
        written = write_safetensors(temporary, chain([first], weights), shapes, max_shard_bytes)
        names = list(dict.fromkeys(written.places.values()))
        if len(names) > 1:
            index = {"metadata": {"total_size": written.size}, "weight_map": written.places}
            write_text(temporary / INDEX, _json(index))
            names.append(INDEX)
        stored = {"torch_dtype": str(first[1].dtype).removeprefix("torch.")}
        write_text(temporary / "config.json", _json(config_to_hf(config) | stored))
    return [folder / name for name in [*names, "config.json"]]


def _find_weights(path: Path) -> Path:
    """Return the one file that path stands for: weights, or the index of their shards."""
    if not path.exists():
        raise ValueError(f"{path}: does not exist; give a model folder or a file of weights")
    if not path.is_dir():
        if path.name.endswith(_SUFFIXES) or path.match(SHARDS):
            return path
        check_start(path)
        raise ValueError(
            f"{path}: is no model folder and no file of weights ({', '.join(_SUFFIXES)}, {SHARDS})"
        )
    gguf = sorted(path.glob("*.gguf"))
    gguf = gguf_parts(gguf[0])[:1] if gguf and gguf == gguf_parts(gguf[0]) else gguf
    tiers = (
        [path / name for name in (SINGLE, INDEX) if (path / name).exists()] + gguf,
        [path / name for name in (BIN, BIN_INDEX) if (path / name).exists()],
        meta_shards(path)[:1],
    )
    for candidates in filter(None, tiers):
        if len(candidates) > 1:
            names = ", ".join(file.name for file in candidates)
            raise ValueError(f"{path}: holds several models ({names}); give the path of one")
        return candidates[0]
    _refuse_folder(path)


_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf")


def _refuse_folder(folder: Path) -> NoReturn:
    files = sorted(file.name for file in folder.iterdir())
    wanted = f"expected {SINGLE}, {INDEX}, {BIN}, {BIN_INDEX}, {SHARDS} or a .gguf file"
    if "adapter_model.safetensors" in files:
        raise ValueError(f"{folder}: holds an adapter, not a model; give the adapter's base model")
    if shards := [name for name in files if name.endswith((".safetensors", ".bin"))]:
        raise ValueError(f"{folder}: holds {some(shards)} without an index; {wanted}")
    raise ValueError(f"{folder}: holds no weights; {wanted}")


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    places = _read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index}: weight_map is {shown(places)}; it must name each tensor's file")
    files = sorted({_plain_name(index, place) for place in places.values()})
    if missing := [name for name in files if not (index.parent / name).exists()]:
        raise ValueError(f"{index}: names {some(missing)}, which is not there; download it too")
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        shard = _read_file(index.parent / name)
        if absent := [t for t, place in places.items() if place == name and t not in shard]:
            raise ValueError(f"{index}: {some(absent)} should be in {name}, but is not")
        if twice := sorted(shard.keys() & tensors.keys()):
            raise ValueError(f"{index}: {some(twice)} is in {name} and in another shard")
        tensors |= shard
    return tensors


def _plain_name(index: Path, place: object) -> str:
    plain = isinstance(place, str) and 0 < len(place) < 256 and "\0" not in place
    if not (isinstance(place, str) and plain and Path(place).name == place):
        raise ValueError(f"{index}: weight_map holds {shown(place)}; it must be a file beside it")
    return place


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: is missing; copy the model's own file there")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8
        raise ValueError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {shown(content)}; it must be a JSON object")
    return content


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _listed(found: Mapping[str, list[str]]) -> str:
    return "\n".join(f"  {len(v)} {what}: {some(v)}" for what, v in found.items() if v)


if __name__ == "__main__":  # python -m bioinstruct.model.checkpoint
    from bioinstruct.model.checkpoint_cli import main

    main()
