"""The local chat server as a fixture, a few seeds, and a run's settings with both."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bioinstruct.synth.pace import Limits


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"synth_{name}", Path(__file__).parent / f"{name}.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SERVER = _load("server")


@pytest.fixture(scope="session")
def server_module() -> ModuleType:
    return SERVER


@pytest.fixture
def server() -> Iterator[Any]:
    with SERVER.running() as running:
        yield running


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    """Twelve seeds in a file."""
    path = tmp_path / "seeds.jsonl"
    rows = [
        {
            "id": f"s{i}",
            "instruction": f"Task number {i}: which finding of kind {i} does the note report?",
            "input": f"The note of case {i} reports finding {i} and nothing else.",
            "output": f"Finding {i}.",
        }
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def local(server: Any, seeds: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run on the local server, at a price and without a cap."""
    return {
        "out": tmp_path / "run",
        "model": "local",
        "base_url": server.url,
        "seeds": seeds,
        "price_in": 1.0,
        "price_out": 2.0,
        "budget": float("inf"),
        "limits": Limits(concurrency=8, timeout_s=30),
    }
