"""What the tests of the trainer share: a cache of their own, a small run's settings, samples."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from bioinstruct.train.data.tokens import TokenSet


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


@pytest.fixture(scope="session")
def random_samples() -> Callable[[Sequence[int]], TokenSet]:
    """Make samples of these lengths, of which the second half is learned."""

    def make(lengths: Sequence[int]) -> TokenSet:
        sizes = [n + 1 for n in lengths]
        return TokenSet.laid(
            np.random.default_rng(0).integers(3, 512, sum(sizes)).astype(np.uint32),
            sizes,
            np.array([max(1, n // 2) for n in lengths]),
            [f"here:{i}" for i in range(len(lengths))],
        )

    return make
