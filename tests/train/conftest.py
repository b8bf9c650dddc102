"""What the tests of the trainer share: a cache of their own and the settings of a small run."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIOINSTRUCT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small(data: Path) -> dict[str, str]:
    """A run on a real small model and real records; its length and its rates are each test's."""
    return {
        "model.path": str(data / "stories260K"),
        "model.tokenizer": str(data / "tokenizers" / "stories260K_tok512.model"),
        "model.dtype": "float32",
        "device": "cpu",
        "data.path": str(data / "bioinstruct_real_sample_32.json"),
        "data.on_overlong": "drop",
        "data.max_tokens_per_pack": "512",
    }
