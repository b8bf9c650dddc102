"""What several tests of the model share."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def peft(data: Path) -> Path:
    """Adapters that peft wrote, and what it computed with them."""
    return data / "peft_golden"


@pytest.fixture(scope="session")
def golden(peft: Path) -> dict[str, np.ndarray]:
    """Token ids and logits by transformers and peft."""
    return dict(np.load(peft / "golden.npz"))
