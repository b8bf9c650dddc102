"""The bench of operations in C: it runs, and times nothing that is wrong or not there."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from bioinstruct.benches import cpu_operations
from bioinstruct.kernels import Dropout, native
from bioinstruct.kernels.native import Loaded

FLOAT = torch.float32
NAMES = {*cpu_operations.OPERATIONS, "dropout_mask"}
needs_c = pytest.mark.skipif(
    native.loaded(FLOAT).library is None, reason=f"needs C: {native.loaded(FLOAT).told}"
)


@needs_c
def test_it_prints_a_ratio_for_each_operation() -> None:
    arguments = ["--tiny", "--rounds", "2", "--dtype", "float32"]
    done = CliRunner().invoke(cpu_operations.command, arguments)
    row = json.loads(done.stdout)
    assert row["operations"].startswith("C (") and row["tiny"] and row["rounds"] == 2
    assert row["found"].keys() == NAMES
    for found in row["found"].values():
        assert found["ratio"] > 0 and found["seconds"].keys() == {"c", "torch"}
    assert row["found"]["swiglu"]["shape"] == {"T": 40, "F": 70}


@needs_c
def test_wrong_masks_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Dropout.mask

    def wrong(self: Dropout, site: int, K: int, dtype: torch.dtype) -> Tensor:
        return made(self, site + (cpu_operations.dispatch.choice() == "auto"), K, dtype)

    monkeypatch.setattr(Dropout, "mask", wrong)
    with pytest.raises(ValueError, match="the dropout masks in C are not those of torch"):
        cpu_operations.measure(FLOAT, 1, tiny=True)


@needs_c
def test_wrong_operations_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    library = native.loaded(FLOAT).library

    class Faulty:
        def __getattr__(self, name: str) -> object:
            return getattr(library, name)

        def gated(self, *arguments: int) -> None:
            # half of the rows
            tokens, features, threads = arguments[2:]
            library.gated(*arguments[:2], tokens // 2, features, threads)  # type: ignore[union-attr]

    monkeypatch.setitem(native._loaded, FLOAT, Loaded(Faulty(), "faulty"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="error|nan|is off by"):
        cpu_operations.measure(FLOAT, 1, tiny=True)


def test_without_a_compiler_there_is_nothing_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(native._loaded, FLOAT, Loaded(None, "there is none"))
    with pytest.raises(ValueError, match="no operations in C to time: there is none"):
        cpu_operations.measure(FLOAT, 1, tiny=True)
