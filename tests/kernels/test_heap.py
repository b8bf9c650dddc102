"""The allocator's settings: what is freed is used again, without new pages from the system."""

import ctypes
import subprocess
import sys

import pytest

from bioinstruct.kernels import heap

FAULTS = """
import resource, sys, torch
from bioinstruct.kernels.heap import keep_freed_memory
if "kept" in sys.argv:
    assert keep_freed_memory()
def step():
    parts = [torch.ones(1 << 20) for _ in range(10)]
    return parts[0] + parts[1]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments: str) -> int:
    command = [sys.executable, "-c", FAULTS, *arguments]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc's mallopt")
def test_freed_memory_is_used_again() -> None:
    # 200 MB in all: 50,000 pages where every step maps its own
    assert 10 * faults("kept") < faults()


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: object())
    assert not heap.keep_freed_memory()
