"""Which form and which tiles a product with a low-rank update takes, from measurements.

gemm_choices.json holds, by the GPU's name, one row a measured shape: the fastest tiles of
gemm_lora, their time, and the time of the library's product over an augmented buffer in the same
process. `benches/probe.py` measures and writes it. It is empty until a GPU has run: a GPU or a
shape that is not in it takes the library's product, and gemm_lora, where asked for by name, takes
DEFAULT, whose tiles fit the 99 KiB of shared memory of the smallest chips (sm_89, sm_120).

Shapes   M rows, N columns, K the inner dimension.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bioinstruct.kernels.dispatch import cdiv
from bioinstruct.synth.files import write_text

FILE = Path(__file__).with_suffix(".json")
MARGIN = 0.985
"""gemm_lora takes a shape where it needs at most this share of the library's time."""


class GemmConfig(NamedTuple):
    """Tiles of gemm_lora and how a program runs them."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, itemsize: int = 2) -> int:
        """Shared memory of the tiles in flight."""
        return self.num_stages * (self.BLOCK_M + self.BLOCK_N) * self.BLOCK_K * itemsize


DEFAULT = GemmConfig(128, 128, 32, 8, 8, 4)
CANDIDATES = (
    DEFAULT,
    GemmConfig(128, 128, 64, 8, 8, 3),
    GemmConfig(128, 256, 64, 8, 8, 3),
    GemmConfig(128, 256, 64, 8, 8, 4),
    GemmConfig(256, 128, 64, 8, 8, 3),
    GemmConfig(64, 128, 64, 8, 4, 4),
    GemmConfig(64, 256, 32, 8, 4, 4),
)
"""What is timed for the table; the compiler has checked them for spills."""


class Measured(NamedTuple):
    """One row of the table."""

    M: int
    N: int
    K: int
    config: GemmConfig
    seconds: float
    """Of gemm_lora with these tiles."""
    library_seconds: float
    """Of the library's product with K + R columns."""

    @property
    def wins(self) -> bool:
        """Whether gemm_lora takes this shape."""
        return self.seconds <= MARGIN * self.library_seconds


def load(path: Path = FILE) -> dict[str, list[Measured]]:
    """Read a table.

    Raises:
        ValueError: it is damaged; the text names the file and the GPU.
        OSError: it cannot be read.
    """
    table: dict[str, list[Measured]] = {}
    gpu = "(none)"
    try:
        for gpu, rows in json.loads(path.read_text(encoding="utf-8")).items():
            table[gpu] = [
                Measured(**{**row, "config": GemmConfig(**row["config"])}) for row in rows
            ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path}: the rows of GPU {gpu} are not what benches/probe.py writes ({error}); "
            "measure them again, or make the file hold {}"
        ) from error
    return table


def record(rows: Sequence[Measured], gpu: str, path: Path) -> None:
    """Put one GPU's rows into a table; those of other GPUs and other shapes stay."""
    table = load(path) if path.exists() else {}
    merged = {(row.M, row.N, row.K): row for row in [*table.get(gpu, []), *rows]}
    table[gpu] = [merged[key] for key in sorted(merged)]
    lines = [
        f"  {json.dumps(name)}: [\n"
        + ",\n".join(f"    {json.dumps(_plain(row))}" for row in found)
        + "\n  ]"
        for name, found in sorted(table.items())
    ]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _plain(row: Measured) -> dict[str, Any]:
    return {**row._asdict(), "config": row.config._asdict()}


def nearest(rows: Sequence[Measured], M: int, N: int, K: int) -> Measured | None:
    """The row of this N and K whose M is nearest by ratio, within a factor of 2; None without."""
    fitting = [row for row in rows if (row.N, row.K) == (N, K) and M <= 2 * row.M <= 4 * M]
    return min(fitting, key=lambda row: max(row.M / M, M / row.M), default=None)


@cache
def _table() -> dict[str, list[Measured]]:
    return load()


@cache
def _found(gpu: str, tokens: int, N: int, K: int) -> Measured | None:
    return nearest(_table().get(gpu, ()), 64 * tokens, N, K)


def measured(device: torch.device, M: int, N: int, K: int) -> Measured | None:
    """What the table knows of a product on this device, or None."""
    if device.type != "cuda" or not M:
        return None
    # packs differ by a few tokens; their choice does not
    return _found(torch.cuda.get_device_name(device), cdiv(M, 64), N, K)


def takes(device: torch.device, M: int, N: int, K: int) -> bool:
    """Whether gemm_lora was measured to be the faster one here; False where nothing is known."""
    row = measured(device, M, N, K)
    return row is not None and row.wins


def config_for(device: torch.device, M: int, N: int, K: int) -> GemmConfig:
    """Tiles for a product on this device: measured ones, else DEFAULT."""
    row = measured(device, M, N, K)
    return DEFAULT if row is None else row.config
