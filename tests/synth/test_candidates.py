"""Candidates out of a model's text, the rules on them, the draws of seeds."""

import itertools
import json
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bioinstruct.synth import draws
from bioinstruct.synth.answers import Candidate, candidates
from bioinstruct.synth.sieve import Sieve
from bioinstruct.synth.totals import Text

TASK = {"instruction": "Name the finding.", "input": "A note.", "output": "Fever."}
LISTED = "4. Instruction: Name it.\n4. Input: A note.\n4. Output: Fever.\nAnd rash.\n\n"


def problems(content: str, form: str = "schema", finish: str = "stop") -> list[str]:
    return [c.problem for c in candidates(Text(content, finish, ""), form)]


def test_tasks_of_a_schema() -> None:
    text = json.dumps({"tasks": [TASK, TASK | {"input": ""}]})
    assert candidates(Text(text, "stop", ""), "schema") == [
        Candidate("Name the finding.", "A note.", "Fever."),
        Candidate("Name the finding.", "", "Fever."),
    ]


@given(st.integers(0, 400))
def test_a_cut_text_keeps_every_whole_task(at: int) -> None:
    parts = [json.dumps(TASK | {"output": f'{i} ] , }} \\ " end'}) for i in range(4)]
    text = f'{{"tasks": [{", ".join(parts)}]}}'
    cut = text[: min(at, len(text) - 1)]
    found = candidates(Text(cut, "length", ""), "schema")
    assert sum(not c.problem for c in found) == sum(part in cut for part in parts)
    assert [c.problem for c in found if c.problem] in (["truncated"], [])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "malformed"),
        ("no json", "malformed"),
        ('{"tasks": []}', "empty"),
        ('{"tasks": [1]}', "malformed"),
        ('{"tasks": [{"instruction": "a"}]}', "malformed"),
        ('{"tasks": [{"instruction": 1, "input": "", "output": ""}]}', "malformed"),
        (json.dumps({"tasks": [TASK | {"output": " "}]}), "empty"),
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("[" * 100_000, "malformed"),
        ('```json\n{"tasks": [' + json.dumps(TASK) + "]}\n```", ""),
        ("[" + json.dumps(TASK) + "]", ""),
        (json.dumps({"tasks": [TASK | {"input": "p <0.05, CK-MB [U/L] 3, \u03b1-blocker"}]}), ""),
    ],
)
def test_what_is_wrong_with_a_text(content: str, said: str) -> None:
    assert problems(content) == [said]


def test_a_refusal_in_its_own_field() -> None:
    (only,) = candidates(Text("", "stop", "No."), "schema")
    assert (only.problem, only.output) == ("refusal", "No.")


@pytest.mark.parametrize(
    "text",
    [
        LISTED + LISTED.replace("4.", "5."),
        "Sure!\n\n" + LISTED + LISTED.replace("4.", "5."),
        LISTED.removeprefix("4. Instruction: ") + LISTED.replace("4.", "5."),
        LISTED.replace("4. Instruction:", "**4. Instruction:**")
        + LISTED.replace("4. I", "5. I", 1),
        LISTED.replace("4. Input", "Input").replace("4. Output", "Output") + LISTED,
    ],
)
def test_lists(text: str) -> None:
    item = Candidate("Name it.", "A note.", "Fever.\nAnd rash.")
    assert candidates(Text(text, "stop", ""), "list") == [item, item]
    assert problems(text, "list", "length") == ["", "truncated"]


def test_broken_lists() -> None:
    assert problems("nothing", "list") == ["empty"]
    assert problems("4. Instruction: Name it.\n5. Instruction: x\n", "list") == ["malformed"] * 2


def sieve(rules: str) -> Sieve:
    return Sieve(rules, 0.7, ["a b c d e f g h i j"])


@pytest.mark.parametrize(
    ("instruction", "paper", "alpaca", "strict", "none"),
    [
        ("Two words", "too-short", "too-short", "too-short", ""),
        ("Just three words", "", "too-short", "", ""),
        ("Describe the image given here", "keyword", "keyword", "", ""),
        # L = 7 of 10 and 10 tokens: F is 0.7 in floats
        ("a b c d e f g x y z", "rouge", "", "rouge", "rouge"),
        ("a b c d e f v x y z", "", "", "", ""),
    ],
)
def test_rules(instruction: str, paper: str, alpaca: str, strict: str, none: str) -> None:
    item = Candidate(instruction, "in", "out")
    found = [sieve(rules)(item).rule for rules in ("paper", "alpaca", "strict", "none")]
    assert found == [paper, alpaca, strict, none]


def test_broken_candidates_meet_no_rule() -> None:
    assert sieve("none")(Candidate("", "", "x", "truncated")) == ("truncated", None)


def test_what_is_accepted_counts_against_the_next() -> None:
    judge, item = sieve("paper"), Candidate("Name all findings of the note.", "in", "out")
    assert [judge(item).rule, judge(item).rule] == ["", "rouge"]


@pytest.mark.parametrize("num_seeds", [3, 4, 5, 7])
def test_permuted_draws_show_every_triple_once(num_seeds: int) -> None:
    made = list(draws.draws("permuted", 5, num_seeds))
    assert len(made) == math.comb(num_seeds, 3)
    assert {tuple(sorted(t)) for t in made} == set(itertools.combinations(range(num_seeds), 3))


def test_permuted_draws_are_balanced() -> None:
    made = list(itertools.islice(draws.draws("permuted", 0, 81), 27 * 20))
    # a triple that came before is passed over, and its seeds with it
    assert set(Counter(itertools.chain(*made)).values()) <= {19, 20, 21}


def test_uniform_draws_are_uniform() -> None:
    made = list(itertools.islice(draws.draws("uniform", 0, 10), 4000))
    assert all(len(set(t)) == 3 for t in made)
    counts = Counter(itertools.chain(*made))
    assert all(abs(counts[i] - 1200) < 150 for i in range(10))


UNIFORM = [(47, 26, 59), (44, 30, 21)]
PERMUTED = [(49, 43, 21), (42, 14, 59)]


def test_draws_are_the_same_for_ever() -> None:
    # another value here means that old runs could not be resumed
    assert list(itertools.islice(draws.draws("uniform", 0, 80), 2)) == UNIFORM
    assert list(itertools.islice(draws.draws("permuted", 0, 80), 2)) == PERMUTED
