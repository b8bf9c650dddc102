"""The same decisions as the rouge-score package, on real questions with planted edits and ties.

The package's own figures stand in tests/data/rouge_golden.json. To take them again, with
BIOINSTRUCT_DATA set and rouge-score 0.1.2 installed: python tests/synth/test_rouge_golden.py
"""

import gzip
import hashlib
import json
import os
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from bioinstruct.synth.near_copies import near_copies
from bioinstruct.synth.rouge import RougeIndex, rouge_l

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "data" / "rouge_golden.json"
MEDMCQA = "qa/medmcqa_dev.jsonl.gz"
SCORED_FROM = 0.6  # the golden file lists the pairs with at least this F
TIE = 0.7
NUMBERS = {"pubmedqa": 600, "medmcqa": 2000}


def questions(name: str, shared: Path | None) -> list[str]:
    if name == "medmcqa":
        assert shared is not None
        text = gzip.decompress((shared / MEDMCQA).read_bytes()).decode()
        return [json.loads(line)["question"] for line in text.splitlines()]
    path = ROOT / "train" / "demo" / "pubmedqa-ori_pqal.json.gz"
    return [row["QUESTION"] for row in json.loads(gzip.decompress(path.read_bytes())).values()]


def edited(text: str, draw: random.Random, vocabulary: list[str]) -> str:
    """A near copy: one edit for every three to twelve words."""
    words = text.split()
    for _ in range(max(1, len(words) // draw.randint(3, 12))):
        place, kind = draw.randrange(len(words)), draw.randrange(4)
        if kind == 0:
            words[place] = draw.choice(vocabulary)
        elif kind == 1:
            words.insert(place, draw.choice(vocabulary))
        elif kind == 2 and len(words) > 2:
            del words[place]
        else:
            words[place] = words[place].upper() + ","
    return " ".join(words)


def tied(number: int, draw: random.Random) -> tuple[str, str]:
    """Two texts of m + n = 20 k words with an LCS of 7 k: F is 0.7 but for rounding."""
    k = draw.randint(1, 4)
    m = draw.randint(7 * k, 13 * k)
    one = [f"w{number}x{place}" for place in range(20 * k - m)]
    two = sorted(draw.sample(range(len(one)), 7 * k))
    words = [one[place] for place in two]
    for fresh in range(m - 7 * k):
        words.insert(draw.randrange(len(words) + 1), f"f{number}x{fresh}")
    return " ".join(one), " ".join(words)


def planted(name: str, shared: Path | None) -> list[str]:
    """Real questions, of which every fifth is an edited copy of an earlier one, and ties."""
    draw, number = random.Random(0), NUMBERS[name]
    real = questions(name, shared)[:number]
    vocabulary = sorted({word for text in real for word in text.split()})
    texts: list[str] = []
    for place, text in enumerate(real[: number - number // 10]):
        copy = place % 5 == 4
        texts.append(edited(draw.choice(texts), draw, vocabulary) if copy else text)
    for pair in range(number // 20):
        texts += tied(pair, draw)
    draw.shuffle(texts)
    return texts


def digest(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(GOLDEN.read_text())
    return loaded


@pytest.fixture(params=NUMBERS)
def case(request: pytest.FixtureRequest, golden: dict[str, Any]) -> tuple[list[str], Any]:
    name = request.param
    shared = request.getfixturevalue("shared_data") if name == "medmcqa" else None
    texts = planted(name, shared)
    assert digest(texts) == golden[name]["sha256"], "these are not the texts that were scored"
    return texts, golden[name]


def test_every_score_from_06_has_rouge_scores_bits(case: tuple[list[str], Any]) -> None:
    texts, wanted = case
    assert len(wanted["pairs"]) > len(texts) // 10
    for one, two, score in wanted["pairs"]:
        assert rouge_l(texts[one], texts[two]).hex() == score
        assert rouge_l(texts[two], texts[one]).hex() == score


def kept(texts: list[str], wanted: Any, threshold: float) -> list[int]:
    """What a loop over rouge-score keeps."""
    near: dict[int, list[int]] = {}
    for one, two, score in wanted["pairs"]:
        if float.fromhex(score) >= threshold:
            near.setdefault(two, []).append(one)
    stays: set[int] = set()
    for place in range(len(texts)):
        if not stays & set(near.get(place, [])):
            stays.add(place)
    return sorted(stays)


@pytest.mark.parametrize(
    "threshold", [0.6, 0.65, TIE, 0.7000000000000001, 0.7000000000000002, 0.75, 0.9, 1.0]
)
def test_the_same_texts_stay(case: tuple[list[str], Any], threshold: float) -> None:
    texts, wanted = case
    near = near_copies(texts, threshold)
    assert [p for p, found in enumerate(near) if found is None] == kept(texts, wanted, threshold)


def test_the_index_takes_the_same_decisions(case: tuple[list[str], Any]) -> None:
    texts, wanted = case
    index, stays = RougeIndex(TIE), []
    for place, text in enumerate(texts):
        if not index.is_near(text):
            index.add(text)
            stays.append(place)
    assert stays == kept(texts, wanted, TIE)


def test_ties_fall_on_both_sides(case: tuple[list[str], Any]) -> None:
    _, wanted = case
    scores = [float.fromhex(score) for _, _, score in wanted["pairs"]]
    assert scores.count(TIE) >= 5 and scores.count(0.7000000000000001) >= 5


def _score(texts: list[str]) -> dict[str, object]:
    from rouge_score import rouge_scorer, tokenize  # type: ignore[import-not-found]

    words = [tokenize.tokenize(text, None) for text in texts]
    pairs = []
    for one, two in combinations(range(len(texts)), 2):
        score = rouge_scorer._score_lcs(words[one], words[two]).fmeasure
        if score >= SCORED_FROM:
            pairs.append([one, two, float(score).hex()])
    return {"sha256": digest(texts), "pairs": pairs}


if __name__ == "__main__":
    data = Path(os.environ["BIOINSTRUCT_DATA"])
    scored = {name: _score(planted(name, data)) for name in NUMBERS}
    GOLDEN.write_text(json.dumps(scored, separators=(",", ":")) + "\n")
