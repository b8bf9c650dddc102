"""Weights that still lie in their files: shapes first, numbers one tensor at a time.

A file's table of contents is read when it is opened; the numbers stay on disk, mapped into memory,
until read() asks for them. So a model can be checked whole before the first number moves, and
filling it takes little more than the memory of the model itself: pages of the mapped file are the
file's own and the system drops them when memory runs short.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


class StoredTensor(NamedTuple):
    """One tensor of a weights file."""

    shape: tuple[int, ...]
    dtype: str  # as its file spells it: BF16, Q4_1
    loadable: bool  # False for integers, float8 and whatever else does not stand for itself
    read: Callable[[], Tensor]  # a CPU tensor of a float dtype; it may be the mapped file itself


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one .safetensors file by name.

    Raises:
        ValueError: the file is missing, cut short, or no safetensors file at all.
    """
    try:
        file: Any = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        # only now: a sound file starts with a length, which may look like anything
        check_start(path)
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); it is cut short or damaged, "
            "download or copy it again"
        ) from None
    return {name: _stored(file, name) for name in file.keys()}  # noqa: SIM118  not a dict


def check_start(path: Path, *, pickled: bool = False) -> None:
    """Refuse a file whose first bytes show that something else was saved under its name.

    Args:
        path: the file.
        pickled: whether PyTorch's pickled files are what is expected.

    Raises:
        ValueError: the file is missing or empty, a Git LFS pointer, a web page, or a pickle.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; the download may be incomplete")
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError(f"{path}: the file is empty; download or copy it again")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path}: a Git LFS pointer stands in for the weights; run `git lfs pull` in its folder"
        )
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise ValueError(
            f"{path}: a web page was saved in place of the weights; the download needs a direct "
            "link, and for gated models a login"
        )
    # a zip archive and protocols 2 to 5 of pickle
    starts = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    if start.startswith(starts) and not pickled:
        raise ValueError(
            f"{path}: holds pickled weights under a name that says otherwise; rename it to "
            "pytorch_model.bin (Meta's files: consolidated.00.pth beside their params.json)"
        )


def _stored(file: Any, name: str) -> StoredTensor:
    view = file.get_slice(name)
    dtype = view.get_dtype()
    read = partial(file.get_tensor, name)
    return StoredTensor(tuple(view.get_shape()), dtype, dtype in _FLOATS, read)
