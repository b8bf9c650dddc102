"""Who answers a signal: the loop between steps, the console after it, nobody on the way out."""

import os
import signal
from collections.abc import Iterator

import pytest

from bioinstruct.train.ranks.stops import SIGNALS, stop_requests


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_is_collected_and_its_handler_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    told: list[int] = []
    with stop_requests(lambda: told.append(1)) as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
    assert asked == [signal.SIGTERM, signal.SIGUSR1]
    assert len(told) == 2


def test_without_a_signal_the_handlers_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), stop_requests():
        raise RuntimeError("a full disk, say")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_rank_that_failed_outlives_the_signal_that_torchrun_sends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The collective of a rank that died may fail before torchrun says so."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "here")
    with pytest.raises(RuntimeError), stop_requests() as asked:
        raise RuntimeError("connection closed by peer")
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked == [signal.SIGTERM]
