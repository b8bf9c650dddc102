"""Steps that cannot be used, steps that stand out, and memory that runs out."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bioinstruct.kernels import linear_cross_entropy
from bioinstruct.train import step
from bioinstruct.train.culprits import halved
from bioinstruct.train.data.batch import collate
from bioinstruct.train.plan import room
from bioinstruct.train.plan.prepare import Prepared, prepare
from bioinstruct.train.plan.room import halve, try_worst_pack, worst_pack
from bioinstruct.train.resume.standing import ENOUGH, WINDOW, Standing, robust_score
from bioinstruct.train.run import Run, read_run
from bioinstruct.train.trainer import Trainer


@pytest.fixture
def run(small: dict[str, str]) -> Callable[..., Run]:
    def read(**changes: object) -> Run:
        settings = small | {
            "data.max_tokens_per_pack": 1024,
            "train.steps": 6,
            "train.batch_samples": 3,
            "data.samples": 9,
            "train.lr": 1e-3,
            "train.samples": 0,
            "lora.r": 2,
            "lora.dropout": 0.1,
        }
        settings |= {name.replace("__", "."): value for name, value in changes.items()}
        return read_run(None, [f"{key}={value}" for key, value in settings.items()])

    return read


def trainer(prepared: Prepared, out: Path) -> Trainer:
    out.mkdir()
    return Trainer(prepared, out)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def labels_of(prepared: Prepared, sample: int) -> list[int]:
    ids, prompt = prepared.tokens.sample(sample)
    found: list[int] = ids[prompt:].tolist()
    return found


def plant(prepared: Prepared, sample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the final states, and with them the logits, of one record NaN wherever it is packed."""
    wanted = torch.tensor(labels_of(prepared, sample))

    def planted(
        h_TD: Tensor, w_VD: Tensor, rows_S: Tensor, labels_S: Tensor, scale: float = 1.0
    ) -> Tensor:
        if len(labels_S) >= len(wanted):
            windows = labels_S.unfold(0, len(wanted), 1)
            for start in (windows == wanted).all(1).nonzero()[:, 0].tolist():
                mask = torch.zeros(len(h_TD), 1)
                mask[rows_S[start : start + len(wanted)]] = math.nan
                h_TD = h_TD + mask
        return linear_cross_entropy(h_TD, w_VD, rows_S, labels_S, scale)

    monkeypatch.setattr(step, "linear_cross_entropy", planted)


def test_a_nan_in_one_record_changes_no_weight_and_is_named(
    run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """9 records, 3 a step, 2 epochs: the record is met twice, and both steps are skipped."""
    prepared = prepare(run())
    assert len(prepared.tokens) == 9
    bad = 5
    plant(prepared, bad, monkeypatch)
    met = [n for n in range(6) if bad in prepared.planner.plan(n).draws]
    assert len(met) == 2
    stepping, before = trainer(prepared, tmp_path / "out"), []
    take = stepping._step

    def watched(asked: Any) -> Any:
        was, m, v = (t.clone() for t in (prepared.adapters.flat_P, *moments(stepping)))
        taken = take(asked)
        if stepping.standing.step - 1 in met:
            assert torch.equal(prepared.adapters.flat_P, was)
            assert all(torch.equal(*pair) for pair in zip((m, v), moments(stepping), strict=True))
            before.append(stepping.standing.step - 1)
        else:
            assert not torch.equal(prepared.adapters.flat_P, was)
        return taken

    monkeypatch.setattr(stepping, "_step", watched)
    stepping.run()
    assert before == met
    events = [row for row in rows(tmp_path / "out") if "event" in row]
    place = prepared.tokens.places[bad]
    assert events == [{"step": n + 1, "event": "skipped", "records": [place]} for n in met]
    skipped = [row["step"] - 1 for row in rows(tmp_path / "out") if row.get("loss", 0) is None]
    assert skipped == met
    assert stepping.optimizer.updates == 4
    assert not prepared.adapters.grad_P.any()


def moments(stepping: Trainer) -> tuple[Tensor, Tensor]:
    return stepping.optimizer.m_P, stepping.optimizer.v_P


def test_too_many_in_a_row_end_the_run(
    run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(run(train__max_skipped=2))
    start_P = prepared.adapters.flat_P.clone()
    lost = lambda *a, **k: linear_cross_entropy(*a, **k) * math.inf  # noqa: E731
    monkeypatch.setattr(step, "linear_cross_entropy", lost)
    stepping = trainer(prepared, tmp_path / "out")
    with pytest.raises(ValueError, match=r"of the last 2 steps is not a finite number.*json:\d+"):
        stepping.run()
    assert torch.equal(prepared.adapters.flat_P, start_P)
    assert len(rows(tmp_path / "out")) == 4
    assert (tmp_path / "out" / "state" / "step-00000002").is_dir()


def test_a_gradient_alone_that_is_not_finite_is_found_too(
    run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(run(train__steps=1, data__shuffle="false"))
    wanted = torch.tensor(labels_of(prepared, 2))

    def planted(h_TD: Tensor, w_VD: Tensor, rows_S: Tensor, labels_S: Tensor, s: float) -> Tensor:
        loss = linear_cross_entropy(h_TD, w_VD, rows_S, labels_S, s)
        windows = labels_S.unfold(0, min(len(wanted), len(labels_S)), 1)
        if windows.shape[1] == len(wanted) and (windows == wanted).all(1).any():
            loss.register_hook(lambda grad: grad * math.nan)
        return loss

    monkeypatch.setattr(step, "linear_cross_entropy", planted)
    trainer(prepared, tmp_path / "out").run()
    step_row, event, *_ = rows(tmp_path / "out")
    assert step_row["loss"] is not None and step_row["grad_norm"] is None
    assert event["records"] == [prepared.tokens.places[2]]


@given(st.sets(st.integers(0, 40)), st.integers(1, 41))
def test_halving_finds_every_bad_sample(bad: set[int], size: int) -> None:
    asked = []

    def is_bad(samples: Any) -> bool:
        asked.append(samples)
        return bool(bad & set(samples))

    found = halved(list(range(size)), is_bad)
    assert sorted(i for group in found for i in group) == sorted(i for i in bad if i < size)
    assert all(len(group) == 1 for group in found)
    assert len(asked) <= 1 + 2 * max(1, len(found)) * math.ceil(math.log2(size) + 1)


def test_a_sum_that_overflows_is_named_as_a_whole() -> None:
    assert halved([3, 4, 5], lambda group: len(group) > 2) == [[3, 4, 5]]


# ---- spikes ------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(0.1, 10), min_size=3, max_size=40),
    st.floats(0.1, 100),
    st.floats(0.01, 100),
)
def test_the_score_is_invariant_to_scale(seen: list[float], value: float, factor: float) -> None:
    _, score = robust_score(value, seen)
    _, scaled = robust_score(value * factor, [x * factor for x in seen])
    assert scaled == pytest.approx(score, rel=1e-6, abs=1e-6)


def test_the_score_counts_standard_deviations() -> None:
    normal = NormalDist(10, 2)
    seen = [normal.inv_cdf((i + 0.5) / 2001) for i in range(2001)]
    middle, score = robust_score(20.0, seen)
    assert middle == pytest.approx(10)
    assert score == pytest.approx(5, rel=1e-3)


def test_one_spike_does_not_hide_the_next() -> None:
    standing, rng = Standing(1, 1), np.random.default_rng(0)
    for value in 2 + 0.05 * rng.standard_normal(WINDOW):
        assert not standing.see(float(value), 1.0, 8.0)
    for _ in range(3):
        (spike,) = standing.see(9.0, 1.0, 8.0)
        assert (spike.what, spike.value) == ("loss", 9.0)
        assert spike.deviations > 50
    assert not standing.see(2.0, 1.0, 8.0)
    assert len(standing.losses) == WINDOW


def test_early_and_silenced_steps_are_not_reported() -> None:
    standing = Standing(1, 1)
    for i in range(ENOUGH - 1):
        standing.see(2.0 + i % 2, 1.0, 8.0)
    assert not standing.see(99.0, 99.0, 8.0)
    assert not standing.see(99.0, 99.0, 0.0)


def test_a_spike_names_the_record_behind_it(
    run: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels drawn at random make one record's loss the largest, and its step a spike."""
    prepared = prepare(
        run(train__steps=21, train__batch_samples=1, data__samples=27, data__shuffle="false")
    )
    bad = 20
    ids, prompt = prepared.tokens.sample(bad)
    rng = np.random.default_rng(0)
    changed = [prepared.tokens.sample(i)[0].copy() for i in range(len(prepared.tokens))]
    changed[bad][prompt:-1] = rng.integers(3, 512, len(ids) - prompt - 1)
    tokens = dataclasses.replace(
        prepared.tokens,
        arrays=(np.concatenate(changed),),
        files=np.zeros(len(changed), dtype=np.int32),
        starts=np.cumsum([0, *map(len, changed[:-1])]),
    )
    prepared = dataclasses.replace(prepared, tokens=tokens)
    stepping = trainer(prepared, tmp_path / "out")
    stepping.run()
    spikes = [row for row in rows(tmp_path / "out") if row.get("event") == "spike"]
    (loss,) = [row for row in spikes if row["what"] == "loss"]
    assert loss["step"] == bad + 1
    assert loss["records"][0]["record"] == tokens.places[bad]
    assert loss["deviations"] > 10
    assert f"step {bad + 1}: loss" in capsys.readouterr().err


def test_standing_survives_json() -> None:
    standing = Standing(512, 1024)
    for i in range(30):
        standing.see(1 / (i + 1), math.pi * i, 8.0)
    standing.judge(0.1 + 0.2, lower_is_better=True)
    assert Standing.of(json.loads(json.dumps(standing.facts()))) == standing


# ---- memory ------------------------------------------------------------------------------------


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """A device on which packs above so many tokens run out of memory; returns their sizes."""

    def limited(most: int) -> list[int]:
        sizes: list[int] = []
        add = step.add_gradient

        def adding(model: Any, adapters: Any, batch: Any, *rest: Any) -> Any:
            sizes.append(len(batch.pack.ids_T))
            if sizes[-1] > most:
                # what was added before memory ran out must not stay
                adapters.grad_P.add_(1.0)
                raise torch.OutOfMemoryError("CUDA out of memory (planted)")
            return add(model, adapters, batch, *rest)

        monkeypatch.setattr(step, "add_gradient", adding)
        monkeypatch.setattr(room, "add_gradient", adding)
        return sizes

    return limited


def test_packs_are_halved_before_the_first_step(
    run: Callable[..., Run],
    tmp_path: Path,
    small_memory: Callable[[int], list[int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = prepare(run(data__max_tokens_per_pack=4096))
    trainer(plain, tmp_path / "plain").run()
    sizes = small_memory(512)
    prepared = prepare(run(data__max_tokens_per_pack=4096))
    stepping = trainer(prepared, tmp_path / "out")
    stepping.run()
    assert [size > 512 for size in sizes[:4]] == [True, True, True, False]
    assert max(sizes[3:]) <= 512  # no step meets the limit
    assert stepping.standing.max_tokens == 512
    told = capsys.readouterr().err
    for now, then in ((2048, 4096), (1024, 2048), (512, 1024)):
        assert f"packs have {now} tokens from now on, not {then}" in told
    difference = (plain.adapters.flat_P - prepared.adapters.flat_P).norm()
    assert difference < 1e-5 * plain.adapters.flat_P.norm()


def test_memory_that_runs_out_later_repeats_the_step_with_smaller_packs(
    run: Callable[..., Run],
    tmp_path: Path,
    small_memory: Callable[[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = prepare(run(data__max_tokens_per_pack=800))
    trainer(plain, tmp_path / "plain").run()
    prepared = prepare(run(data__max_tokens_per_pack=800))
    stepping = trainer(prepared, tmp_path / "out")
    monkeypatch.setattr(stepping, "_try_room", lambda: None)
    small_memory(700)
    stepping.run()
    longest = int(prepared.tokens.lengths.max())
    assert stepping.standing.max_tokens == longest > 400
    steps = [row["step"] for row in rows(tmp_path / "out") if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    state = json.loads((tmp_path / "out/state/step-00000006/state.json").read_text())
    assert state["facts"]["standing"]["max_tokens"] == stepping.standing.max_tokens
    difference = (plain.adapters.flat_P - prepared.adapters.flat_P).norm()
    assert difference < 1e-5 * plain.adapters.flat_P.norm()


def test_a_record_that_does_not_fit_alone_is_a_sentence(
    run: Callable[..., Run], tmp_path: Path, small_memory: Callable[[int], list[int]]
) -> None:
    prepared = prepare(run())
    small_memory(300)
    longest = int(prepared.tokens.lengths.max())
    with pytest.raises(ValueError, match=f"the longest record has {longest}, so that packs cannot"):
        trainer(prepared, tmp_path / "out").run()


def test_the_probe_changes_nothing(run: Callable[..., Run]) -> None:
    prepared = prepare(run())
    before_P = prepared.adapters.flat_P.clone()
    try_worst_pack(prepared, 0)
    assert torch.equal(prepared.adapters.flat_P, before_P)
    assert not prepared.adapters.grad_P.any()


@pytest.mark.parametrize("start", [0, 2])
def test_the_worst_pack_is_the_largest_of_what_is_left(run: Callable[..., Run], start: int) -> None:
    prepared = prepare(run(train__batch_samples=2))
    planner = prepared.planner
    pack, draws = worst_pack(planner, start)
    per_epoch = planner.steps_of(0)
    every = [p for n in range(start, per_epoch) for p in planner.plan(n).packs]
    assert int(planner.lengths[pack].sum()) == max(int(planner.lengths[p].sum()) for p in every)
    collate(prepared.tokens, pack, draws)


def test_halving_stops_at_the_longest_record(run: Callable[..., Run]) -> None:
    prepared = prepare(run(data__validation=0.3, data__max_tokens_per_pack=600))
    longest = max(
        int(tokens.lengths.max()) for tokens in (prepared.tokens, prepared.validation) if tokens
    )
    assert halve(prepared) == longest > 300
