"""Weights on their way into files: checked one by one, and written without being collected.

Whatever is written, memory holds a tensor at a time. A folder is filled under another name and
takes its own when it is whole.
"""

import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bioinstruct.model.config import LlamaConfig

MAX_LISTED = 10  # tensors named in a message, of each kind
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_ENTRY_BYTES = 112  # of a tensor in the table of a .safetensors file, beside its name


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill; on success it takes folder's place, on any error it is removed.

    Args:
        folder: it must not exist yet, or be empty; its parents are created when missing.

    Raises:
        ValueError: the folder holds something.
        OSError: the disk is not writable.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not empty; give a folder that is not there yet")
    target = folder.resolve()  # a link to an empty folder stays a link
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".writing-{target.name}-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def checked(
    config: LlamaConfig, pairs: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield contiguous CPU tensors of the dtype to store; refuse what is not the model's.

    Args:
        config: says which tensors there must be.
        pairs: by Hugging Face name, produced one at a time; memory may be used again for the next.
        dtype: what to store; None keeps each tensor's own.

    Raises:
        ValueError: a tensor is unknown, missing, there twice, of another shape, not finite, or too
            large for the dtype.
    """
    missing = config.tensor_shapes()
    for name, tensor in pairs:
        shape = missing.pop(name, None)
        if shape is None:
            raise ValueError(f"{name}: is no tensor of this model, or was given twice")
        if shape != tuple(tensor.shape):
            raise ValueError(f"{name}: is {tuple(tensor.shape)}, the model needs {shape}")
        stored_dtype = dtype or tensor.dtype
        check_values(name, tensor.detach(), stored_dtype)
        yield name, tensor.detach().to("cpu", stored_dtype).contiguous()
    if missing:
        raise ValueError(f"{some(list(missing))}: the model needs it, but it was not given")


def check_values(what: str, source: Tensor, dtype: torch.dtype) -> None:
    """Refuse numbers that are not finite, or that a dtype cannot hold.

    Raises:
        ValueError: there are some; the message begins with what.
    """
    # both ends in one pass; NaN wins over every number
    low, high = (end.item() for end in source.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{what} holds NaN or infinite values; these weights are damaged")
    if (largest := max(-low, high)) > torch.finfo(dtype).max:
        raise ValueError(
            f"{what} reaches {largest:g}, which {dtype} cannot hold; use a wider dtype"
        )


def some(names: list[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    view: memoryview = tensor.flatten().view(torch.uint8).numpy().data
    return view


class SafetensorsFile:
    """A .safetensors file in the making, written tensor by tensor.

    The table of contents stands in front of the numbers and is known after them, so room is left
    for it; what stays over is blanks, as the format allows.

    Args:
        path: the file; it is overwritten.
        names: of all tensors that the file may get.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self.path, self.size = path, 0
        self._table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        room = 64 + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
        self._room = room + -room % 8  # numbers begin at a multiple of 8
        path.write_bytes(bytes(8 + self._room))

    @property
    def names(self) -> list[str]:
        """The tensors so far."""
        return list(self._table)[1:]

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a contiguous CPU tensor of a float dtype behind the others.

        Raises:
            OSError: the disk is full or not writable.
        """
        start, self.size = self.size, self.size + tensor.nbytes
        entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
        self._table[name] = entry | {"data_offsets": [start, self.size]}
        with self.path.open("ab") as file:
            file.write(raw(tensor))

    def finish(self) -> None:
        """Write the table of contents, and all to the disk.

        Raises:
            OSError: the disk is full or not writable.
        """
        text = json.dumps(self._table, separators=(",", ":")).encode("utf-8")
        assert len(text) <= self._room
        with self.path.open("rb+") as file:
            file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))
            file.flush()
            os.fsync(file.fileno())


class Written(NamedTuple):
    """Where weights have been written."""

    places: dict[str, str]
    """The file of each tensor."""
    size: int
    """Bytes of all tensors."""


def write_safetensors(
    folder: Path, pairs: Iterable[tuple[str, Tensor]], names: Iterable[str], max_bytes: int
) -> Written:
    """Write tensors to one .safetensors file, or to several where they are large.

    Args:
        folder: where to write.
        pairs: as `checked` yields them.
        names: of all of them.
        max_bytes: largest size of a file's tensors, unless a single one is larger.

    Raises:
        OSError: the disk is full or not writable.
    """
    names = list(names)
    files: list[SafetensorsFile] = []
    for name, tensor in pairs:
        if not files or files[-1].size + tensor.nbytes > max_bytes and files[-1].size:
            if files:
                files[-1].finish()
            files.append(SafetensorsFile(folder / f"part-{len(files)}", names))
        files[-1].add(name, tensor)
    files[-1].finish()
    # how many there are is known only now
    count = len(files)
    places: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        ending = f"-{number:05d}-of-{count:05d}" if count > 1 else ""
        file.path.rename(folder / f"model{ending}.safetensors")
        places |= {name: f"model{ending}.safetensors" for name in file.names}
    return Written(places, sum(file.size for file in files))
