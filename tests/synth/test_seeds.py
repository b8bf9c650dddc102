"""The packaged seeds keep what they promise, and files of seeds are read strictly."""

import itertools
import json
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from bioinstruct.synth import seeds as module
from bioinstruct.synth.records import read_records
from bioinstruct.synth.seeds import COUNTS, DIFFICULTIES, FACETS, PACKAGED, Seed, read_seeds
from bioinstruct.synth.text import read_text

SEEDS = read_seeds()
BY_ID = {seed.id: seed for seed in SEEDS}
SAMPLE = Path(__file__).parents[1] / "data" / "bioinstruct_real_sample_32.json"
PROMPTS = tuple(PACKAGED.with_name(f"prompt_{form}.txt") for form in ("list", "schema"))
ROUGE_LIMIT = 0.7  # the paper's, for instructions
# the keywords of Self-Instruct and Alpaca: tasks that text alone cannot do
BEYOND_TEXT = re.compile(
    r"(?i)\b(?:images?|graphs?|pictures?|files?|maps?|draw|plot|go to|video|audio|music|flowchart"
    r"|diagram)\b"
)
BRITISH = re.compile(
    r"\w*(?:aemi|oedem|rrhoea|tumour|paediat|haem|colour|oesoph|isation|centre|gynaec|faec|litre"
    r"|favour|fibre|anaesth|behaviour|programme|summaris|organise|recognise|labelled)\w*",
    re.IGNORECASE,
)
IDENTIFIERS = {
    "a name with a title": r"\b(?:Mr|Mrs|Ms|Miss|Dr|Prof)\b\.?\s+[A-Z]",
    "a named person": r"\b[Nn]ame(?:d| is|:)\s+[A-Z]",
    "a date of birth": r"(?i)\b(?:dob|date of birth|born (?:on|in))\b",
    "a whole date": r"\b\d{1,4}([-/.])\d{1,2}\1\d{2,4}\b",
    "a date in words": r"(?i)\b(?:january|february|march|april|may|june|july|august|september"
    r"|october|november|december)\s+\d{1,2}\b|\b\d{1,2}\s+(?:january|february|march|april|june"
    r"|july|august|september|october|november|december)\b",
    "a record number": r"(?i)\b(?:mrn|record (?:no|number)|ssn|accession)\b",
    "a social security number": r"\b\d{3}-\d{2}-\d{4}\b",
    "a telephone number": r"(?<![\d.])(?:\+\d{1,3}[ .-]?)?\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}\b",
    "a mail address": r"\S@\S",
    "an internet address": r"(?i)https?:|www\.",
    "an age over 89": r"\b(?:9\d|1[01]\d)(?:-year-old| years old|-year old)\b",
}
NUMBER = re.compile(r"\d+(?:\.\d+)?")
ITEM = re.compile(r"^\d+[.:] ", re.MULTILINE)  # the number of a list's item
# what outputs work out although the rest of their task is taking over; timelines are all sums
WORKED_OUT = {
    "seed-052": {"3"},  # Tuesday to Friday
    "seed-057": {"170"},  # 2,780 - 2,610 g
    "seed-070": {"10"},  # the points of a nodule
}
SUM = re.compile(r"((?:\(?\d[\d.+\-x/^() ]*[\d)])) = (\d[\d./]*\d|\d)")


def whole(seed: Seed) -> str:
    """Instruction, input and output, as a reader sees them."""
    record = seed.record
    return f"{record.instruction}\n{record.input}\n{record.output}"


def by(*categories: str) -> list[Seed]:
    return [seed for seed in SEEDS if seed.category in categories]


def named(seeds: list[Seed]) -> list[object]:
    return [pytest.param(seed, id=seed.id) for seed in seeds]


def tokens(text: str) -> list[str]:
    """Cut text as the rouge-score package does, without stemming."""
    return re.findall(r"[a-z0-9]+", text.lower())


def common(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence, one bit for each token of first."""
    ones = (1 << len(first)) - 1
    places: dict[str, int] = {}
    for place, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << place
    row = ones
    for token in second:
        hit = row & places.get(token, 0)
        row = ((row + hit) | (row - hit)) & ones
    return len(first) - row.bit_count()


def rouge_l(first: list[str], second: list[str]) -> float:
    return 2 * common(first, second) / max(len(first) + len(second), 1)


def numbers(text: str) -> set[str]:
    """Return the numbers in a text, thousands without their comma."""
    return set(NUMBER.findall(re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)))


def value(expression: str) -> Fraction:
    """Work out +, -, x, /, ^ and brackets; the characters were checked by the caller's pattern."""
    exact = NUMBER.sub(lambda found: f"Fraction('{found[0]}')", expression)
    result = eval(exact.replace("x", "*").replace("^", "**"), {"Fraction": Fraction})
    assert isinstance(result, Fraction | float)
    return Fraction(result)


# --- the packaged file


def test_there_are_eighty_in_the_papers_shares() -> None:
    assert len(SEEDS) == 80
    assert {name: len(by(name)) for name in COUNTS} == COUNTS == dict(qa=18, ie=27, gen=27, other=8)
    assert [seed.id for seed in SEEDS] == [f"seed-{k:03d}" for k in range(1, 81)]


def test_each_line_has_exactly_the_fields() -> None:
    wanted = ["id", "instruction", "input", "output", "category", "facets", "source", "note"]
    for line in PACKAGED.read_text(encoding="ascii").splitlines():
        row = json.loads(line)
        assert list(row) == wanted
        assert list(row["facets"]) == list(FACETS)
        assert all(text == text.strip() != "" for text in row.values() if isinstance(text, str))


def test_the_properties_give_the_fields() -> None:
    seed = BY_ID["seed-079"]
    assert (seed.category, seed.facets["task"]) == ("other", "natural language inference")
    assert seed.source.startswith("invented sentences") and seed.note
    assert seed.record.where == f"{PACKAGED}:79"


def test_they_vary() -> None:
    assert {seed.facets["difficulty"] for seed in SEEDS} == set(DIFFICULTIES)
    assert len({seed.facets["topic"] for seed in SEEDS}) >= 30
    assert len({seed.facets["task"] for seed in SEEDS}) >= 40
    starts = [tokens(seed.record.instruction)[0] for seed in SEEDS]
    assert len(set(starts)) >= 45 and max(map(starts.count, starts)) <= 4
    assert sum("?" in seed.record.instruction for seed in SEEDS) >= 8
    lengths = sorted(len(whole(seed)) for seed in SEEDS)
    assert lengths[-1] >= 4 * lengths[0]


@pytest.mark.parametrize("seed", named(SEEDS))
def test_our_own_filters_would_keep_it(seed: Seed) -> None:
    words = seed.record.instruction.split()
    assert 3 <= len(words) <= 150
    assert not BEYOND_TEXT.search(seed.record.instruction)
    assert seed.record.output.strip().casefold() != seed.record.input.strip().casefold()


@pytest.mark.parametrize("seed", named(SEEDS))
def test_it_is_ascii_in_american_spelling(seed: Seed) -> None:
    assert whole(seed).isascii()
    assert BRITISH.findall(whole(seed)) == []


@pytest.mark.parametrize("seed", named(SEEDS))
def test_it_identifies_nobody(seed: Seed) -> None:
    found = {name for name, pattern in IDENTIFIERS.items() if re.search(pattern, whole(seed))}
    assert not found


def test_the_identifier_patterns_find_what_they_should() -> None:
    texts = (
        "seen by Dr. Example", "a man named Example", "DOB 1 of 2", "on 3/14/2020", "March 14",
        "MRN 12", "123-45-6789", "call 555-010-0199", "a@b.example", "www.example", "a 93-year-old",
    )  # fmt: skip
    for text, pattern in zip(texts, IDENTIFIERS.values(), strict=True):
        assert re.search(pattern, text), (text, pattern)


# --- new, and different from each other


def test_the_lcs_is_the_textbooks() -> None:
    draw = random.Random(0)
    for _ in range(100):
        first, second = (draw.choices("abcd", k=draw.randrange(12)) for _ in range(2))
        table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
        for i, j in itertools.product(range(len(first)), range(len(second))):
            same = table[i][j] + 1 if first[i] == second[j] else 0
            table[i + 1][j + 1] = max(same, table[i][j + 1], table[i + 1][j])
        assert common(first, second) == table[-1][-1]


def near(pairs: Iterator[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(a, b) for a, b in pairs if rouge_l(tokens(a), tokens(b)) >= ROUGE_LIMIT]


def test_no_two_are_near_copies() -> None:
    instructions = (seed.record.instruction for seed in SEEDS)
    assert near(itertools.combinations(instructions, 2)) == []
    texts = (f"{seed.record.instruction} {seed.record.input}" for seed in SEEDS)
    assert near(itertools.combinations(texts, 2)) == []


def test_none_is_near_a_record_of_bioinstruct() -> None:
    theirs = read_records(SAMPLE)
    assert len(theirs) == 32
    ours = [seed.record for seed in SEEDS]
    pairs = list(itertools.product(ours, theirs))
    assert near((a.instruction, b.instruction) for a, b in pairs) == []
    assert (
        near((f"{a.instruction} {a.input}", f"{b.instruction} {b.input}") for a, b in pairs) == []
    )


@pytest.mark.parametrize(
    "name",
    [
        "qa/medqa_usmle_4opt_test.jsonl.gz",
        "qa/medmcqa_dev.jsonl.gz",
        "qa/pubmedqa/ori_pqal.json.gz",
        "gen/meqsum.jsonl.gz",
        "gen/mts_dialog/MTS-Dialog-TrainingSet.csv.gz",
        "gen/mts_dialog/MTS-Dialog-TestSet-1-MEDIQA-Chat-2023.csv.gz",
    ],
)
def test_no_eight_words_in_a_row_come_from_a_benchmark(shared_data: Path, name: str) -> None:
    def runs(text: str) -> set[tuple[str, ...]]:
        words = tokens(text)
        return set(zip(*(words[k:] for k in range(8)), strict=False))

    theirs = runs(read_text(shared_data / name).replace("\\n", " "))
    assert len(theirs) > 10_000
    for seed in SEEDS:
        assert not runs(whole(seed)) & theirs, seed.id


# --- outputs agree with inputs


@pytest.mark.parametrize("seed", named(by("ie", "gen")))
def test_numbers_are_taken_from_the_input(seed: Seed) -> None:
    if seed.facets["task"] == "timeline extraction":
        return  # each of its numbers is a difference of two times
    new = numbers(ITEM.sub("", seed.record.output)) - numbers(seed.record.input)
    assert new == WORKED_OUT.get(seed.id, set())


def test_the_timeline_is_worked_out_right() -> None:
    def minutes(clock: str) -> int:
        hours, rest = clock.split(":")
        return 60 * int(hours) + int(rest)

    (seed,) = (s for s in SEEDS if s.facets["task"] == "timeline extraction")
    pattern = r"(\d\d:\d\d), (\d+) minutes (before|after) arrival"
    found = re.findall(pattern, seed.record.output)
    for clock, away, side in found:
        sign = 1 if side == "after" else -1
        assert minutes(clock) == minutes("07:50") + sign * int(away)
    clocks = [clock for clock, _, _ in found]
    assert len(clocks) == 7 and clocks == sorted(clocks)


@pytest.mark.parametrize("seed", named(SEEDS))
def test_quotations_are_word_for_word(seed: Seed) -> None:
    if "JSON" in seed.record.instruction:
        return  # its quotes are syntax
    quoted = [text for text in re.findall(r'"([^"\n]+)"', seed.record.output) if " " in text]
    given = seed.record.input.casefold()
    assert [text for text in quoted if text.casefold() not in given] == []


def test_json_outputs_are_json() -> None:
    asked = [seed for seed in SEEDS if "JSON" in seed.record.instruction]
    assert len(asked) >= 6
    for seed in asked:
        json.loads(seed.record.output)


def test_choices_are_given_back_as_they_stand() -> None:
    asked = [seed for seed in SEEDS if seed.facets["task"] == "multiple choice"]
    assert len(asked) == 5
    for seed in asked:
        options = re.findall(r"^[A-E]\) .+$", seed.record.input, re.MULTILINE)
        assert [option[0] for option in options] == list("ABCDE")
        lines = seed.record.output.splitlines()
        assert {lines[0], lines[-1].removeprefix("Answer: ")} & set(options), seed.id


def test_every_sum_is_right() -> None:
    found = [(seed.id, *match) for seed in SEEDS for match in SUM.findall(seed.record.output)]
    assert len(found) >= 18
    for name, left, right in found:
        left = left.removeprefix("(") if left.count("(") > left.count(")") else left
        shown = len(right.partition(".")[2])
        exact = value(left) if "/" not in right else value(left) - value(right)
        rounded = round(exact, shown)
        assert rounded == (0 if "/" in right else Fraction(right)), (name, left, right)


def test_word_and_sentence_limits_are_kept() -> None:
    def sentences(text: str) -> int:
        return len(re.split(r"(?<=[.!?])\s+", text))

    limits = {}
    for seed in SEEDS:
        if found := re.search(r"no more than (\d+) words|(\d+) words or fewer", whole(seed)):
            limits[seed.id] = int(found[1] or found[2])
            assert len(seed.record.output.split()) <= limits[seed.id], seed.id
    assert limits == {"seed-052": 90, "seed-062": 120}
    for name, least, most in (("seed-009", 1, 4), ("seed-058", 5, 5), ("seed-067", 1, 2)):
        assert least <= sentences(BY_ID[name].record.output) <= most, name


@pytest.mark.parametrize(
    "seed", named([s for s in SEEDS if s.facets["task"] == "consumer question"])
)
def test_answers_to_the_public_say_when_to_seek_care(seed: Seed) -> None:
    text = seed.record.output.lower()
    assert re.search(r"emergency|right away|911", text)
    assert re.search(r"doctor|clinician|pharmacist|poison control", text)


# --- prompts


@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.stem)
def test_prompts_hold_the_documented_placeholders(path: Path) -> None:
    text = path.read_text(encoding="ascii")
    assert set(re.findall(r"\{(\w+)\}", text)) == {"n", "shown", "first", "seeds", "also"}
    known = ("n", "shown", "first", "seeds", "also")
    assert all(f"{{{name}}}" in (module.__doc__ or "") for name in known)
    assert text.count("{seeds}") == 1
    assert re.findall(r"^(\d)\. ", text, re.MULTILINE) == list("12345678")  # as many as the paper


def test_the_prompts_differ_only_in_the_form_of_the_answer() -> None:
    first, second = (path.read_text().split("The first {shown}") for path in PROMPTS)
    assert first[0] == second[0] and first[1] != second[1]
    assert first[1].endswith("List of {n} tasks:\n\n{seeds}\n")  # the model goes on from here
    (shape,) = re.findall(r"^(\{.+\})\.", second[1], re.MULTILINE)
    assert set(json.loads(shape)["tasks"][0]) == {"instruction", "input", "output"}


# --- reading


def row(number: int, **other: object) -> dict[str, object]:
    return {"instruction": f"Do task {number}", "input": "x", "output": "y"} | other


def write(folder: Path, *rows: object) -> Path:
    path = folder / "seeds.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
    return path


def refusal(path: Path | None) -> str:
    with pytest.raises(ValueError) as caught:
        read_seeds(path)
    return str(caught.value)


def test_plain_records_are_seeds_named_by_place(tmp_path: Path) -> None:
    seeds = read_seeds(write(tmp_path, row(1), row(2, id="mine", category="qa"), row(3, input="")))
    assert [seed.id for seed in seeds] == ["seed-001", "mine", "seed-003"]
    assert [seed.category for seed in seeds] == ["", "qa", ""]
    assert (seeds[0].facets, seeds[0].source, seeds[0].note) == ({}, "", "")


def test_a_copy_of_the_packaged_file_may_be_cut_and_passed(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in PACKAGED.read_text().splitlines()]
    assert [seed.id for seed in read_seeds(write(tmp_path, *rows[70:]))] == list(BY_ID)[70:]


@pytest.mark.parametrize(
    ("third", "message"),
    [
        (row(3, instruction=" "), r":3: 'instruction' is empty"),
        (row(3, output="\n"), r":3: 'output' is empty"),
        (row(3, output=" x "), r":3: 'output' repeats 'input'"),
        (row(3, category="Other"), r":3: 'category' is .Other.;.*gen, other; did you.*'other'"),
        (row(3, category=3), r":3: 'category' must be a text that is not empty, not 3"),
        (row(3, id=""), r":3: 'id' must be a text"),
        (row(3, source=None, note=["a"]), r":3: 'note' must be a text.*\[\"a\"\]"),
        (row(3, facets="hard"), r":3: 'facets' must be an object of texts, not \"hard\""),
        (row(3, facets={"task": 1}), r":3: 'facets' must hold texts; 'task' is 1"),
        (row(3, facets={"difficulty": "hart"}), r":3: 'difficulty'.*did you mean 'hard'"),
        (row(3, id="a"), r":3: id 'a' stands at .*:1 already"),
        (row(1, id="c"), r":3: this instruction with this input stands at .*:1 already"),
        (row(3, id="seed-002"), r":3: id 'seed-002' stands at .*:2 already"),
        ({"instruction": "a"}, r":3: field 'output' is missing"),
        ([1], r":3: a record must be an object"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, third: object, message: str) -> None:
    path = write(tmp_path, row(1, id="a"), row(2), third)
    text = refusal(path)
    assert text.startswith(str(path)) and re.search(message, text), text


def test_all_mistakes_are_counted_and_five_shown(tmp_path: Path) -> None:
    text = refusal(write(tmp_path, *(row(k, output="") for k in range(7))))
    assert text.startswith("7 mistakes in the seeds:") and text.endswith("... and 2 more")
    assert text.count("'output' is empty") == 5


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_than_three_are_refused(tmp_path: Path, count: int) -> None:
    text = refusal(write(tmp_path, *map(row, range(count))))
    assert text.endswith(f"holds {count} seeds; a request shows 3, add some")


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b'{"instruction": ', b"[]", b"\x1f\x8bx"]
)
def test_files_that_hold_no_records_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "seeds.jsonl"
    path.write_bytes(content)
    assert str(path) in refusal(path)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.jsonl"):
        read_seeds(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1:], "17 qa, 27 ie, 27 gen, 8 other seeds where 18 qa"),
        (lambda rows: [rows[0] | {"input": ""}, *rows[1:]], ":1: 'input' is empty"),
        (lambda rows: [rows[0] | {"note": ""}, *rows[1:]], ":1: 'note' must be a text"),
        (lambda rows: [rows[0] | {"facets": {"topic": "a"}}, *rows[1:]], "'facets' lacks 'task'"),
        (lambda rows: [*rows[:79], {k: v for k, v in rows[79].items() if k != "id"}], ":80: 'id'"),
    ],
)  # fmt: skip
def test_a_changed_packaged_file_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: object, message: str
) -> None:
    assert callable(change)
    rows = [json.loads(line) for line in PACKAGED.read_text().splitlines()]
    monkeypatch.setattr(module, "PACKAGED", write(tmp_path, *change(rows)))
    assert message in refusal(None)
