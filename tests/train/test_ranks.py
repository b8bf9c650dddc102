"""Dealing, one rank alone, and what the environment may ask for."""

import os
import subprocess
import sys
from typing import TypeVar, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bioinstruct.model.adapters import Adapters, LoraSettings
from bioinstruct.model.llm import Llm
from bioinstruct.train.ranks.process import ALONE, Ranks, deal, joined
from bioinstruct.train.weights.base import check_alike

T = TypeVar("T")

COSTS = st.lists(st.integers(1, 1000).map(float), max_size=60)


@given(COSTS, st.integers(1, 9))
def test_every_pack_is_dealt_once_and_the_hands_are_even(costs: list[float], size: int) -> None:
    hands = deal(costs, size)
    assert sorted(pack for hand in hands for pack in hand) == list(range(len(costs)))
    assert len(hands) == size
    assert max(map(len, hands)) == -(-len(costs) // size)
    assert hands == deal(costs, size)
    for hand in hands:
        assert [costs[i] for i in hand] == sorted((costs[i] for i in hand), reverse=True)


def test_costs_are_levelled() -> None:
    hands = deal([9.0, 8.0, 7.0, 3.0, 2.0, 1.0], 3)
    assert hands == [[0, 5], [1, 4], [2, 3]]


def test_alone_everything_is_the_identity() -> None:
    x = torch.arange(5.0)
    ALONE.sum_(x)
    assert x.tolist() == [0, 1, 2, 3, 4]
    assert ALONE.total([1.5, 2.0]) == [1.5, 2.0]
    assert not ALONE.any_(False)
    assert ALONE.any_(True)
    assert ALONE.gather("a") == ["a"]
    assert ALONE.from_first(lambda: 7) == 7


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined("cpu") as ranks:
        assert (ranks.rank, ranks.size, ranks.is_first) == (0, 1, True)
        assert ranks.device == torch.device("cpu")


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan"])
def test_a_timeout_must_be_a_time(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("BIOINSTRUCT_RANK_TIMEOUT_S", text)
    sentence = f"RANK_TIMEOUT_S = '{text}' must be a number"
    with pytest.raises(ValueError, match=sentence), joined("cpu"):
        pass


def test_ranks_that_start_with_different_adapters_are_refused(stories: Llm) -> None:
    class Pair(Ranks):
        """Two ranks, of which the other says what it is told to."""

        said = ""

        def gather(self, value: T) -> list[T]:
            return [value, cast(T, self.said or value)]

    adapters = Adapters(stories.config, LoraSettings(r=2))
    adapters.initialise(0)
    pair = Pair(0, 2)
    check_alike(adapters, pair)
    pair.said = "another digest"
    with pytest.raises(ValueError, match="ranks 0 and 1 start with different numbers"):
        check_alike(adapters, pair)


@pytest.mark.parametrize(
    ("last", "code"),
    [("pass", 0), ("sys.exit(3)", 3), ("sys.exit('a sentence')", 1), ("raise KeyError('x')", 1)],
)
def test_a_rank_ends_at_once_with_its_code(last: str, code: int) -> None:
    """What the interpreter would do at its end, as the last line of the output, does not come."""
    script = (
        "import atexit, sys\n"
        "from bioinstruct.train.ranks.process import to_its_end\n"
        "atexit.register(print, 'shut down')\n"
        f"def work():\n    print('worked')\n    {last}\n"
        "to_its_end(work)\n"
    )
    environment = {**os.environ, "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (code, "worked\n")
    assert ("KeyError" in ended.stderr) == ("KeyError" in last)
