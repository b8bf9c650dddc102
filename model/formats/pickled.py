"""Weights that torch.save wrote: pytorch_model*.bin and Meta's consolidated.NN.pth.

Such a file is a Python pickle, a program for a small machine that could call anything. It is run by
torch's restricted unpickler (weights_only), which knows tensors and plain containers and stops at
any other name; and its numbers stay on disk, mapped into memory, until they are asked for.
"""

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bioinstruct.model.fields import shown
from bioinstruct.model.formats.stored import StoredTensor, check_start

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_pickled(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file by name; no code in it is run.

    Raises:
        ValueError: the file is missing or damaged, or holds anything but named tensors.
    """
    content = _load(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {shown(content)}; it must be a table of named tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{path}: {shown(name)} is a {type(tensor).__name__}; the file must hold named "
                "tensors and nothing else (training states are not read)"
            )
    return {name: _stored(tensor) for name, tensor in content.items()}


def _stored(tensor: Tensor) -> StoredTensor:
    plain = tensor.layout == torch.strided and tensor.dtype in _FLOATS
    dtype = str(tensor.dtype).removeprefix("torch.")
    return StoredTensor(tuple(tensor.shape), dtype, plain, lambda: tensor)


def _load(path: Path) -> Any:
    check_start(path, pickled=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of storages that older versions wrote
            # what versions before 1.6 wrote is no zip archive, and cannot be mapped
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"the Python object {found[1]}" if found else "something that is no tensor"
        raise ValueError(
            f"{path}: holds {what}, which might run code when opened; nothing was run; get the "
            "model from a source you trust, as safetensors"
        ) from None
    # a pickle of junk fails in whatever the junk happens to spell
    except Exception as error:
        reason = str(error).split("\n")[0][:200]
        raise ValueError(
            f"{path}: not a whole PyTorch file ({reason}); it is cut short or damaged, download "
            "or copy it again"
        ) from None
