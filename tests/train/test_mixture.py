"""Laws of the mixture: nothing lost, nothing twice but by its weight, nested, apart, seeded."""

import collections
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bioinstruct.model import Llm
from bioinstruct.model.templates import get_template
from bioinstruct.train.data.mixture import Mixture, Records, drawn, load_mixture, subset, weighted
from bioinstruct.train.data.tokens import Limits
from bioinstruct.train.plan.planner import Planner
from bioinstruct.train.run import DataSettings, MixFile, Run, TrainSettings

KINDS = "QA", "IE"
LIMITS = Limits(max_tokens=400, on_empty="error", on_overlong="error")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two files of Alpaca records with categories and one of conversations."""
    for name, count in (("a", 20), ("b", 10)):
        rows = [
            {
                "instruction": f"{name} {i}",
                "input": "",
                "output": "x",
                "category": KINDS[i % 2],
            }
            for i in range(count)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    turns = [{"from": r, "value": r} for r in ("human", "gpt") * 2]
    chats = [{"conversations": turns, "source": f"chat{i % 2}"} for i in range(6)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return [str(tmp_path / name) for name in ("a.json", "b.json", "c.jsonl")]


def mix(
    stories: Llm, template: str = "bioinstruct", train_seed: int = 0, **data: object
) -> Mixture:
    run = Run(data=DataSettings(**data), train=TrainSettings(seed=train_seed))  # type: ignore[arg-type]
    return load_mixture(run, get_template(template, stories.tokenizer), stories.tokenizer, LIMITS)


def counts(mixture: Mixture) -> collections.Counter[str]:
    return collections.Counter(place.rpartition("/")[2] for place in mixture.tokens.places)


def test_files_of_path_are_taken_once_and_whole(stories: Llm, files: list[str]) -> None:
    tokens, validation = mix(stories, path=tuple(files[:2]))
    assert validation is None
    found = collections.Counter(tokens.places)
    assert len(found) == 30
    assert set(found.values()) == {1}
    assert tokens.sources.names == tuple(files[:2])
    assert np.bincount(tokens.sources.ids).tolist() == [20, 10]
    assert np.bincount(tokens.categories.ids).tolist() == [15, 15]


@pytest.mark.parametrize(
    ("weight", "copies"), [(1.0, {1: 20}), (2.0, {2: 20}), (2.3, {2: 14, 3: 6}), (0.25, {1: 5})]
)
def test_a_weight_is_whole_copies_and_a_drawn_fraction(
    stories: Llm, files: list[str], weight: float, copies: dict[int, int]
) -> None:
    both = mix(stories, path=(files[1],), mix=(MixFile(path=files[0], weight=weight),))
    found = counts(both)
    assert collections.Counter(n for p, n in found.items() if p.startswith("a.json")) == copies
    assert [n for p, n in found.items() if p.startswith("b.json")] == [1] * 10


def test_categories_and_caps(stories: Llm, files: list[str]) -> None:
    one = MixFile(path=files[0], categories=("QA",), cap=4)
    found = mix(stories, mix=(one, MixFile(path=files[1])))
    assert len(found.tokens) == 14
    first = found.tokens.subset(range(4))
    assert [first.categories.names[i] for i in first.categories.ids] == ["QA"] * 4
    assert len(mix(stories, mix=(one,), categories=("QA",)).tokens) == 4
    larger = mix(stories, mix=(dataclasses.replace(one, cap=7),))
    assert set(counts(mix(stories, mix=(one,)))) < set(counts(larger))
    assert len(mix(stories, mix=(dataclasses.replace(one, cap=99),)).tokens) == 10


@pytest.mark.parametrize("validation", [0.0, 0.2])
def test_subsets_are_nested_and_validated_on_the_same_records(
    stories: Llm, files: list[str], validation: float
) -> None:
    made = {"mix": (MixFile(path=files[0], weight=1.5),), "path": (files[1],)}
    whole = mix(stories, validation=validation, **made)
    sizes = sorted({1, 7, 20, len(whole.tokens)})
    parts = [mix(stories, validation=validation, samples=n, **made) for n in sizes]
    assert [len(part.tokens) for part in parts] == sizes
    for small, large in zip(parts, parts[1:], strict=False):
        assert not counts(small) - counts(large)
        assert (small.validation is None) == (validation == 0)
        if small.validation and large.validation:
            assert small.validation.places == large.validation.places
    assert counts(parts[-1]) == counts(whole)
    other = mix(stories, validation=validation, samples=7, train_seed=1, **made)
    again = mix(stories, validation=validation, samples=7, train_seed=5, seed=0, **made)
    assert counts(other) != counts(parts[1]) == counts(again)


def test_no_record_is_on_both_sides_of_the_split(stories: Llm, files: list[str]) -> None:
    twice = (MixFile(path=files[0], weight=2.0), MixFile(path=files[0], categories=("IE",)))
    tokens, validation = mix(stories, mix=twice, validation=0.3)
    assert validation is not None
    assert not set(tokens.places) & set(validation.places)
    assert len(set(tokens.places)) + len(set(validation.places)) == 20
    # every training record of IE stands there from both tables
    found = collections.Counter(tokens.places)
    assert set(found.values()) == {2, 3}


def test_the_answers_of_a_conversation_stay_together(stories: Llm, files: list[str]) -> None:
    for settings in (
        {"samples": 3},
        {"mix": (MixFile(path=files[2], weight=1.5),), "path": ()},
        {"mix": (MixFile(path=files[2], cap=4),), "path": ()},
        {"validation": 0.34},
    ):
        found = mix(stories, "llama-2-chat", **{"path": (files[2],), **settings})
        assert set(n % 2 for n in counts(found).values()) == {0}
    sources = found.tokens.sources
    assert set(sources.names) == {"chat0", "chat1"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"categories": ("RE",)}, "data.categories: no record has the category 'RE'; .* IE, QA$"),
        ({"samples": 31}, "data.samples = 31, but the mixture has 30 records to train on; lower"),
        ({"path": ("absent.json",)}, "data.path: there is no file absent.json"),
        ({"path": ()}, "data.path is not set"),
        ({"validation": 0.99}, r"data.validation = 0.99 of 30 records leaves none"),
    ],
)
def test_refusals(
    stories: Llm, files: list[str], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mix(stories, **{"path": tuple(files[:2]), **settings})


def test_refusals_of_mix(stories: Llm, files: list[str]) -> None:
    with pytest.raises(ValueError, match=r"data.mix: there is no file absent"):
        mix(stories, mix=(MixFile(path="absent"),))
    with pytest.raises(ValueError, match=r"data.mix of .*c.jsonl: categories: .* the records lack"):
        mix(stories, "llama-2-chat", mix=(MixFile(path=files[2], categories=("QA",)),))
    with pytest.raises(ValueError, match="the weights of data.mix leave no record"):
        mix(stories, mix=(MixFile(path=files[0], weight=0.001),))


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.01, 3.5), min_size=4, max_size=4),
    samples=st.integers(1, 3),
    held=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_nothing_is_lost_and_nothing_twice_but_by_its_weight(
    sizes: list[int], weights: list[float], samples: int, held: int, seed: int
) -> None:
    places = [f"{i}:{j}" for i, n in enumerate(sizes) for j in range(n) for _ in range(samples)]
    bounds = np.cumsum([0, *(n * samples for n in sizes)])
    out = np.array([int(place.partition(":")[2]) < held for place in places])
    numbers = np.array([int(place.partition(":")[2]) for place in places])
    records = Records.of(numbers, bounds)
    entries = weighted(records, bounds, weights, out, seed)
    chosen = records.samples(entries)
    found = collections.Counter(places[i] for i in chosen)
    for i, (n, w) in enumerate(zip(sizes, weights, strict=False)):
        own = [found.get(f"{i}:{j}", 0) for j in range(held, n)]
        assert set(own) <= {math.floor(w) * samples, (math.floor(w) + 1) * samples}
        extra = round((w - math.floor(w)) * len(own))
        assert sum(own) == (math.floor(w) * len(own) + extra) * samples
        assert not any(found.get(f"{i}:{j}", 0) for j in range(min(held, n)))
    # each entry is a record's samples, whole and in order
    assert [places[i] for i in chosen[::samples]] == [
        places[i] for i in chosen[samples - 1 :: samples]
    ]
    if len(entries):
        small, large = sorted((1 + seed % len(entries), len(entries)))
        few = collections.Counter(subset(entries, small, seed).tolist())
        assert not few - collections.Counter(subset(entries, large, seed).tolist())


@given(count=st.integers(0, 50), wanted=st.integers(0, 60), seed=st.integers(0, 9))
def test_draws_are_nested_and_of_their_size(count: int, wanted: int, seed: int) -> None:
    chosen = drawn(count, wanted, seed, 7)
    assert chosen.sum() == min(count, wanted)
    assert (chosen <= drawn(count, wanted + 1, seed, 7)).all()


def test_an_epoch_of_a_mixture_draws_every_entry_once(stories: Llm, files: list[str]) -> None:
    tokens, _ = mix(stories, path=(files[1],), mix=(MixFile(path=files[0], weight=2.5),))
    planner = Planner(tokens.lengths, tokens.supervised, max_tokens=400, batch_samples=7)
    plans = [planner.plan(step) for step in range(planner.steps_of(0))]
    drawn_samples = sorted(i for plan in plans for pack in plan.packs for i in pack)
    assert (
        drawn_samples
        == list(range(len(tokens)))
        == sorted(d for p in plans for d in p.draws.values())
    )
