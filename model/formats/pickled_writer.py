"""A file like those of torch.save, written tensor by tensor; torch.save wants all at once.

It is a zip archive, nothing in it compressed:

    NAME/data/0, 1, ...   the numbers of each tensor, little-endian, at multiples of 64 bytes
    NAME/data.pkl         a pickled table: name -> how to build the tensor out of data/N
    NAME/byteorder        "little"
    NAME/version          "3"

In the pickle a tensor is the call of `torch._utils._rebuild_tensor_v2`, and its numbers are a
"persistent id" that names data/N: these two are the format, which torch.load reads since 1.6.
"""

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from bioinstruct.model.formats.written import raw

_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
ALIGNMENT = 64
_LOCAL_HEADER, _ZIP64_FIELD, _FIELD = 30, 20, 4  # bytes in front of a member's data


class _Numbers(NamedTuple):
    """The numbers of a tensor, which lie in data/KEY."""

    key: str
    dtype: torch.dtype
    size: int


class _Table(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Numbers):
            return "storage", _STORAGES[obj.dtype], obj.key, "cpu", obj.size
        return None


class _Entry:
    """Stands for a tensor in the table."""

    def __init__(self, numbers: _Numbers, tensor: Tensor) -> None:
        hooks: OrderedDict[str, Any] = OrderedDict()
        self.built = (numbers, 0, tuple(tensor.shape), tensor.stride(), False, hooks)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_tensor_v2, self.built


class PickledFile:
    """A file of named tensors in the making.

    Args:
        path: the file; it is overwritten.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
        self._table: dict[str, _Entry] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a contiguous CPU tensor of a float dtype.

        Raises:
            OSError: the disk is full or not writable.
        """
        numbers = _Numbers(str(len(self._table)), tensor.dtype, tensor.numel())
        self._write(f"data/{numbers.key}", raw(tensor))
        self._table[name] = _Entry(numbers, tensor)

    def close(self) -> None:
        """Write the table, and all to the disk.

        Raises:
            OSError: the disk is full or not writable.
        """
        if self._zip.fp is None:
            return
        table = io.BytesIO()
        _Table(table, protocol=2).dump(self._table)
        self._write("data.pkl", table.getbuffer())
        self._write("byteorder", memoryview(b"little"))
        self._write("version", memoryview(b"3\n"))
        self._zip.close()
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())

    def _write(self, name: str, content: memoryview) -> None:
        member = zipfile.ZipInfo(f"{self.path.stem}/{name}")
        assert self._zip.fp is not None
        start = self._zip.fp.tell() + _LOCAL_HEADER + len(member.filename) + _ZIP64_FIELD + _FIELD
        padding = -start % ALIGNMENT
        # a field of the archive that readers pass over, as torch writes it
        member.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
        with self._zip.open(member, "w", force_zip64=True) as file:
            file.write(content)
