"""A checkpoint is read and rewritten without being held: what each command keeps is bounded."""

import sys
from pathlib import Path

import pytest

from bioinstruct.benches.checkpoint_memory import in_its_own_process, make, shape

MB = 10**6
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="RssAnon is Linux's own count"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 154 MB in one file, and an adapter."""
    path = tmp_path_factory.mktemp("model")
    config = shape(layers=4, width=1024, vocab_size=16000)
    assert 150 * MB < 2 * config.parameter_count() < 160 * MB
    make(path, config)
    return path


@pytest.fixture(scope="module")
def empty(folder: Path) -> int:
    """What the imports alone take."""
    return in_its_own_process("import", folder)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        # 1.2 times its size
        ("load", 185 * MB),
        # a file of the output, all of the model, would be 154 MB
        ("convert", 60 * MB),
        ("convert to meta", 60 * MB),
        ("export-gguf q8_0", 120 * MB),
        # the adapter, and for the check of the logits a layer and a part of the head in float32
        ("merge", 220 * MB),
    ],
)
def test_what_a_command_keeps(folder: Path, empty: int, name: str, most: int) -> None:
    assert in_its_own_process(name, folder) - empty < most
