"""The pulses of ranks, as threads of one process on a real store."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is documented

from bioinstruct.train.ranks import watch
from bioinstruct.train.ranks.watch import Watch


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    for name, value in {"BEAT_S": 0.05, "SILENCE_S": 2.0, "TROUBLED_SILENCE_S": 0.5}.items():
        monkeypatch.setattr(watch, name, value)
    monkeypatch.setattr(watch, "GRACE_S", 0.1)
    yield
    del server


class Ended:
    """Takes note of the exit that a watch would make."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.happened = threading.Event()

    def __call__(self, code: int) -> None:
        self.code = code
        self.happened.set()


def fall_silent(lost: Watch) -> None:
    """What a kill does: no further pulse, and no farewell."""
    lost._is_over.set()
    lost._thread.join()


def until(condition: Callable[[], object]) -> None:
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


@pytest.mark.parametrize(("dead", "speaker"), [(2, 0), (0, 2)])
def test_a_silent_rank_is_named_by_one_voice(
    dead: int, speaker: int, store: None, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = [Ended() for _ in range(3)]
    ranks = [Watch(rank, 3, end) for rank, end in enumerate(ends)]
    for rank in ranks:
        rank.begin_step(5)
    fall_silent(ranks[dead])
    others = [i for i in range(3) if i != dead]
    for i in others:
        assert ends[i].happened.wait(60)
        assert ends[i].code == 1
    until(lambda: ranks[others[0]]._lost())
    lost = ranks[others[0]]._lost()
    assert lost["rank"] == dead
    assert lost["by"] == (dead - 1) % 3
    assert speaker in (0, lost["by"])
    for i in others:
        fall_silent(ranks[i])
    err = capsys.readouterr().err
    assert f"error: rank {dead} (process " in err
    assert "died in step 5" in err


def test_trouble_shortens_the_patience_and_gives_the_verdict(store: None) -> None:
    ends = [Ended(), Ended()]
    ranks = [Watch(rank, 2, end) for rank, end in enumerate(ends)]
    ranks[1].begin_step(7)
    fall_silent(ranks[1])
    start_s = time.monotonic()
    verdict = ranks[0].verdict()
    assert verdict is not None
    assert "rank 1 (process " in verdict
    assert "died in step 7, silent for 1 s" in verdict or "silent for 0 s" in verdict
    assert time.monotonic() - start_s < 30
    fall_silent(ranks[0])


def test_an_error_is_announced_with_its_sentence(store: None) -> None:
    ends = [Ended(), Ended()]
    ranks = [Watch(rank, 2, end) for rank, end in enumerate(ends)]
    ranks[1].begin_step(3)
    ranks[1].announce("the disk is full")
    assert ends[0].happened.wait(60)
    assert ranks[0].verdict() == "rank 1 failed in step 3: the disk is full"
    assert ends[1].code is None
    for rank in ranks:
        rank.close()


def test_a_rank_that_has_finished_is_not_lost(store: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [Ended(), Ended()]
    ranks = [Watch(rank, 2, end) for rank, end in enumerate(ends)]
    ranks[1].close()
    monkeypatch.setattr(watch, "SILENCE_S", 0.3)
    assert not ends[0].happened.wait(1.5)
    assert not ranks[0]._lost()
    ranks[0].close()


def test_a_second_attempt_does_not_hear_of_the_first(
    store: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Watch(0, 2, Ended())
    first.announce("gone")
    fall_silent(first)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = Watch(0, 2, Ended())
    assert not again._lost()
    again.close()
