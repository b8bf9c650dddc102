"""Shared fixtures. What the environment decides is set before any kernel module is imported."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
import torch
from hypothesis import settings

# with a workspace of fixed size cuBLAS is deterministic, and poisoned_empty below lets it run
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# kernels are made when their modules are imported, to be interpreted where there is no GPU; which
# tests run them is the tests' own choice (dispatch.forced), so that the others see the CPU's path
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from bioinstruct.model import Llm, load  # noqa: E402
from bioinstruct.synth import console  # noqa: E402
from bioinstruct.train.demo import fetch  # noqa: E402


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name bytes by their number: gzip's hold the time, and all processes must agree on names."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


# a busy machine is no failure; what is slow shows among the durations that make test prints
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")
# a shell that starts the suite in the background has it ignore Ctrl-C, and so all its children
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# the models of most tests are so small that a second thread only waits for the first
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_empty() -> Iterator[None]:
    """Fill every torch.empty with NaN, so that an unwritten output cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def shell(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Call a command as a shell would: its exit code, its output, its messages."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the tests' own handler stays

    def call(command: click.Command, *args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            console.run(command, [str(a) for a in args])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def data() -> Path:
    """The small real files that stand in the repository."""
    return Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def stories(data: Path) -> Llm:
    """A real LLaMA of 260,032 parameters with its tokenizer, in float32 on the CPU."""
    tokenizer = data / "tokenizers" / "stories260K_tok512.model"
    return load(data / "stories260K", dtype="float32", device="cpu", tokenizer=tokenizer)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The larger real files, which the repository does not hold: the folder BIOINSTRUCT_DATA."""
    folder = os.environ.get("BIOINSTRUCT_DATA")
    if not folder:
        pytest.skip("needs the larger real data: set BIOINSTRUCT_DATA to their folder")
    path = Path(folder).resolve()
    assert path.is_dir(), f"BIOINSTRUCT_DATA={folder} is not a folder"
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo's model, fetched on first use: BIOINSTRUCT_SMOLLM2, else the demo's cache."""
    if own := os.environ.get("BIOINSTRUCT_SMOLLM2"):
        assert Path(own).is_file(), f"BIOINSTRUCT_SMOLLM2={own} is not a file"
        return Path(own)
    try:
        return fetch.fetch_model()
    except fetch.IndexUnavailable as error:
        pytest.skip(str(error))
