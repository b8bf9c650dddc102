"""States on disk: whole or not there; rows written by some ranks and read by others."""

import json
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bioinstruct.train.resume import state
from bioinstruct.train.resume.state import (
    Keep,
    Piece,
    Saver,
    clear_unfinished,
    newest_state,
    open_state,
    snapshot,
    steps_of,
    whole,
    write_state,
)


def write(folder: Path, step: int, keep: Keep | None = None, **tensors: torch.Tensor) -> None:
    pieces = {name: whole(tensor) for name, tensor in tensors.items()}
    write_state(folder, snapshot(step, pieces, {"step twice": 2 * step}), keep or Keep(9))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    a, b = torch.randn(7, 3), torch.randn(5, dtype=torch.float64)
    write(tmp_path, 3, a=a, b=b)
    found = newest_state(tmp_path)
    assert found is not None
    assert (found.step, found.facts, found.names()) == (3, {"step twice": 6}, {"a", "b"})
    assert torch.equal(found.read("a"), a)
    assert torch.equal(found.read("a", 2, 5), a[2:5])
    assert torch.equal(found.read("b"), b)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    """Rows of a tensor, how the writers and how the readers share them."""
    rows = draw(st.integers(1, 12))
    edges = st.lists(st.integers(0, rows), max_size=3).map(lambda e: [0, *sorted(e), rows])
    return rows, draw(edges), draw(edges)


@given(cuts())
def test_rows_may_be_shared_out_anew(
    tmp_path_factory: pytest.TempPathFactory, shares: tuple[int, list[int], list[int]]
) -> None:
    """Also ranks that hold no row; each reader gets exactly its rows."""
    rows, written, read = shares
    folder = tmp_path_factory.mktemp("states")
    tensor, size = torch.arange(rows * 2.0).view(rows, 2), len(written) - 1
    parts = [snapshot(1, {"t": Piece(tensor[a:b], a, rows)}, {}) for a, b in pairwise(written)]
    others = [
        threading.Thread(
            target=write_state, args=(folder, part, Keep(1)), kwargs=dict(rank=r, size=size)
        )
        for r, part in enumerate(parts)
        if r
    ]
    for thread in others:
        thread.start()
    write_state(folder, parts[0], Keep(1), rank=0, size=size)
    for thread in others:
        thread.join()
    found = open_state(folder / "step-00000001")
    found.check()
    for a, b in pairwise(read):
        if a < b:
            assert torch.equal(found.read("t", a, b), tensor[a:b])


def test_a_snapshot_is_a_copy(tmp_path: Path) -> None:
    tensor = torch.ones(3)
    taken = snapshot(1, {"t": whole(tensor)}, {})
    tensor.zero_()
    assert taken.pieces["t"].rows.tolist() == [1, 1, 1]


def test_facts_must_be_json() -> None:
    with pytest.raises(ValueError, match="JSON"):
        snapshot(1, {}, {"loss": float("nan")})


@pytest.mark.parametrize(
    ("keep", "left"), [(Keep(1), [5]), (Keep(2), [4, 5]), (Keep(2, best=1), [1, 4, 5])]
)
def test_the_newest_and_the_best_stay(tmp_path: Path, keep: Keep, left: list[int]) -> None:
    for step in range(1, 6):
        write(tmp_path, step, keep, t=torch.ones(1))
    assert steps_of(tmp_path) == left
    assert len(list(tmp_path.iterdir())) == len(left)


def test_old_states_stay_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1, Keep(1), t=torch.ones(1))

    def fail(folder: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(state, "_flush", fail)
    with pytest.raises(OSError, match="Input/output"):
        write(tmp_path, 2, Keep(1), t=torch.ones(1))
    assert steps_of(tmp_path) == [1]
    assert clear_unfinished(tmp_path) == [tmp_path / ".writing-step-00000002"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_rank_that_does_not_write_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "_OTHERS_S", 0.1)
    taken = snapshot(1, {"t": whole(torch.ones(1))}, {})
    with pytest.raises(OSError, match="rank-00001.safetensors did not come within"):
        write_state(tmp_path, taken, Keep(1), rank=0, size=2)
    assert steps_of(tmp_path) == []


@pytest.mark.parametrize("harm", ["cut", "changed", "gone", "no record", "no json"])
def test_a_damaged_state_gives_way_to_the_one_before(
    tmp_path: Path, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        write(tmp_path, step, t=torch.full((100,), float(step)))
    newest = tmp_path / "step-00000002"
    file, record = newest / "rank-00000.safetensors", newest / "state.json"
    content = file.read_bytes()
    if harm == "cut":
        file.write_bytes(content[:-1])
    elif harm == "changed":
        file.write_bytes(content[:-1] + b"\x01")
    elif harm == "gone":
        file.unlink()
    elif harm == "no record":
        record.unlink()
    else:
        record.write_text(record.read_text()[:-9])
    found = newest_state(tmp_path)
    assert found is not None
    assert found.step == 1
    assert "the state before it is used" in capsys.readouterr().err
    assert (tmp_path / "damaged-step-00000002").is_dir()


def test_missing_rows_are_a_sentence(tmp_path: Path) -> None:
    write(tmp_path, 1, t=torch.ones(4))
    record = tmp_path / "step-00000001" / "state.json"
    facts = json.loads(record.read_text())
    facts["parts"]["rank-00000.safetensors"]["pieces"]["t"] = [2, 6]
    record.write_text(json.dumps(facts))
    found = open_state(tmp_path / "step-00000001")
    with pytest.raises(ValueError, match="lacks rows of t"):
        found.read("t")
    with pytest.raises(ValueError, match="lacks rows of u"):
        found.read("u")


def test_a_saver_writes_beside_and_tells_errors_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, release, told = Saver(tmp_path), threading.Event(), []

    def before() -> None:
        release.wait(10)
        told.append("before")

    saver.save(snapshot(1, {"t": whole(torch.ones(1))}, {}), Keep(1), before)
    assert steps_of(tmp_path) == []  # it returned while the thread waits
    release.set()
    saver.wait()
    assert steps_of(tmp_path) == [1]

    def fail() -> None:
        raise OSError(28, "No space left on device")

    saver.save(snapshot(2, {"t": whole(torch.ones(1))}, {}), Keep(1), fail)
    with pytest.raises(OSError, match="No space left"):
        saver.save(snapshot(3, {"t": whole(torch.ones(1))}, {}), Keep(1), before)
    saver.wait()
    assert steps_of(tmp_path) == [1]
