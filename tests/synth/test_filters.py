"""The rules: each drop with its reason, each edge on its side; and files, kept as they were."""

import gzip
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioinstruct.synth.cli import cli
from bioinstruct.synth.filters import (
    KEYWORDS,
    RULES,
    filter_files,
    rouge_threshold,
    sift,
    text_drop,
)
from bioinstruct.synth.records import Record, read_records
from bioinstruct.synth.rouge import rouge_l

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "tests" / "data" / "bioinstruct_real_sample_32.json"
Run = Callable[..., tuple[int, str]]


def record(instruction: str, given: str = "", output: str = "yes") -> Record:
    return Record(instruction, given, output, {}, "file.jsonl", 1)


def rule_of(rules: str, *fields: str) -> str | None:
    drop = text_drop(rules, record(*fields))
    return drop.rule if drop else None


# ---- one record --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "paper", "alpaca"),
    [
        (0, "too-short", "too-short"),
        (2, "too-short", "too-short"),
        (3, None, "too-short"),
        (4, None, None),
        (150, None, None),
        (151, "too-long", "too-long"),
    ],
)
def test_lengths_are_words_between_white_space(
    words: int, paper: str | None, alpaca: str | None
) -> None:
    text = " \n".join(["non-small-cell"] * words)
    assert (rule_of("paper", text), rule_of("alpaca", text)) == (paper, alpaca)
    assert rule_of("strict", text) == paper
    assert rule_of("none", text) is None


@pytest.mark.parametrize("word", KEYWORDS)
@pytest.mark.parametrize("rules", ["paper", "alpaca"])
def test_keywords_are_whole_words_in_any_case(rules: str, word: str) -> None:
    assert rule_of(rules, f"Please explain the {word.upper()}, briefly") == "keyword"
    assert rule_of(rules, f"Please explain the x{word}, briefly") is None
    assert rule_of(rules, "Please explain it in brief", f"the {word}", word) is None


def test_the_list_is_alpacas() -> None:
    assert len(KEYWORDS) == len(set(KEYWORDS)) == 18
    assert rule_of("paper", "Describe imaging, mapping, drawing and profiles") is None


@pytest.mark.parametrize(
    ("given", "output", "rule"),
    [
        ("Fever.", "  FEVER.\n", "echo"),
        ("Straße", "STRASSE", "echo"),
        ("Fever.", "Fever", None),
        ("", "", None),
        (" ", "", None),
    ],
)
def test_outputs_that_repeat_the_input(given: str, output: str, rule: str | None) -> None:
    for rules in ("paper", "alpaca"):
        assert rule_of(rules, "Say what this means", given, output) == rule


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        (("Explain what this genetic map shows", "", "Linkage."), None),
        (("Summarize the following image report", "CT: clear.", "Normal."), None),
        (("Draw a conclusion from the abstract", "...text...", "None."), None),
        (("Describe what the attached image shows", "", "A lung."), "medium"),
        (("Draw a labelled diagram of the heart", "", "Here:"), "medium"),
        (("Listen to what this audio says", "", "Hello"), "medium"),
        (("Name the drug of choice", "", " \n"), "empty"),
        (("Name the drug of choice", "", "name the drug of choice "), "echo"),
        (("Name the drug of choice", "Aspirin", "aspirin"), "echo"),
        (("Name the drug of choice", "<noinput>", "Aspirin"), "placeholder"),
        (("Name the drug of choice", "N/A", "Aspirin"), "placeholder"),
        (("Write a letter to the patient", "", "Dear [Patient Name], you"), "placeholder"),
        (("Write a letter for {insert name}", "", "Dear"), "placeholder"),
        (("Read the note of the patient", "seen on [**2101-3-4**] by Dr", "Fine"), None),
        (("List the diseases in the text", "No disease here.", "none"), None),
        (("Give the dose for a child", "", "I'm sorry, but I cannot provide that."), "refusal"),
        (("Give the dose for a child", "", "I\u2019m unable to help."), "refusal"),
        (("Give the dose for a child", "", "As an AI language model, I"), "refusal"),
        (("Answer as a doctor would", "My dog died", "I'm sorry to hear that. Rest."), None),
        (("Answer as the patient would", "", "I am unable to sleep at night."), None),
        (("\u8bf7\u603b\u7ed3 \u4e0b\u9762\u7684 \u6587\u7ae0", "", "x"), "not-english"),
        (("Translate this for the patient", "", "\u0431\u043e\u043b\u044c"), "not-english"),
        (
            ("Welche Symptome hat der Patient und ist das nicht ein Notfall?", "", "x"),
            "not-english",
        ),
        (("Compare IL-2, IL-6 and IL-10 levels, LA and DES", "", "\u03b2 up"), None),
        (("Expand the symbols \u03b1, \u03b2, \u03b3 and \u03bc", "", "alpha"), None),
    ],
)
def test_strict(fields: tuple[str, ...], rule: str | None) -> None:
    assert rule_of("strict", *fields) == rule
    assert rule_of("none", *fields) is None


@pytest.mark.parametrize("rules", RULES)
def test_a_reason_is_a_sentence_with_what_was_found(rules: str) -> None:
    drop = text_drop(rules, record("Do draw", "", ""))
    assert drop is None if rules == "none" else "has 2 words, under" in drop.reason  # type: ignore[union-attr]


def test_real_records_stay() -> None:
    real = read_records(SAMPLE)
    for rules in ("paper", "alpaca", "none"):
        assert sift(real, rules) == []
    strict = sift(real, "strict")
    assert [real[d.place].input for d in strict] == ["N/A", "N/A"]
    assert {d.drop.rule for d in strict} == {"placeholder"}


def test_what_alpaca_kept_has_nothing_above_its_threshold(shared_data: Path) -> None:
    real = read_records(shared_data / "instructions" / "alpaca52k_random_9k.json.gz")
    assert "rouge" not in {d.drop.rule for d in sift(real, "alpaca")}
    ties = [d.near for d in sift(real, "none")]
    assert len(ties) == 35 and {near and near.score for near in ties} == {0.7}


# ---- many records ------------------------------------------------------------------------------

TIES = {  # F: texts of (L, m, n) words
    0.6999999999999998: (21, 23, 37),
    0.7: (7, 10, 10),
    0.7000000000000001: (7, 7, 13),
}


@pytest.mark.parametrize("score", TIES)
@pytest.mark.parametrize("rules", RULES)
def test_ties_fall_as_the_floats_say(rules: str, score: float) -> None:
    lcs, m, n = TIES[score]
    one = " ".join(f"w{k}" for k in range(m))
    two = " ".join(f"w{k}" if k < lcs else f"x{k}" for k in range(n))
    assert rouge_l(one, two) == score
    found = sift([record(one), record(two)], rules)
    assert bool(found) == (score > 0.7 if rules == "alpaca" else score >= 0.7)
    assert all(d.place == 1 and d.drop.rule == "rouge" for d in found)


def test_what_its_own_text_drops_counts_for_no_other() -> None:
    texts = ["Explain the image of the lung", "Explain the image of the lung", "Explain the lung"]
    found = sift([record(t) for t in texts], "paper")
    assert [(d.place, d.drop.rule, d.near) for d in found] == [
        (0, "keyword", None),
        (1, "keyword", None),
    ]


def test_the_near_one_is_named() -> None:
    old = Record("Name the first symptom of measles", "", "x", {}, "seeds.jsonl", 7)
    (found,) = sift([record("Name the first symptom of mumps")], "paper", against=[old, old])
    assert found.near == ("seeds.jsonl:7", old.instruction, rouge_l("a b c d e f", "a b c d e g"))
    assert found.drop.reason == "ROUGE-L F 0.8333 to the instruction at seeds.jsonl:7"


@settings(deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=8), max_size=15),
    st.sampled_from(RULES),
    st.sampled_from([0.5, 0.7, 0.9]),
)
def test_what_is_kept_is_sound_and_new_and_what_is_dropped_is_not(
    words: list[list[str]], rules: str, rouge: float
) -> None:
    records = [record(" ".join(w)) for w in words]
    dropped = {d.place: d for d in sift(records, rules, rouge=rouge)}
    least = rouge_threshold(rules, rouge)
    kept = [p for p in range(len(records)) if p not in dropped]
    for place, text in enumerate(records):
        before = [records[k].instruction for k in kept if k < place]
        score = max((rouge_l(text.instruction, b) for b in before), default=0.0)
        wrong = text_drop(rules, text)
        assert (place in dropped) == (wrong is not None or score >= least)
        if place in dropped and not wrong:
            near = dropped[place].near
            assert near is not None and near.score >= least and near.instruction in before
    assert sift([records[k] for k in kept], rules, rouge=rouge) == []


@pytest.mark.parametrize(
    ("rules", "rouge", "message"),
    [
        ("papers", 0.7, "rules must be one of paper, alpaca, strict, none, not 'papers'"),
        ("paper", 0.0, "above 0 and at most 1"),
        ("none", 1.5, "above 0 and at most 1"),
        ("alpaca", math.nan, "above 0 and at most 1"),
        ("alpaca", 1.0, "no F is above 1"),
    ],
)
def test_settings_that_mean_nothing(rules: str, rouge: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sift([record("a b c d")], rules, rouge=rouge)


# ---- the command -------------------------------------------------------------------------------


@pytest.fixture
def run(shell: Callable[..., tuple[int, str, str]]) -> Run:
    """The command's exit code and messages."""
    return lambda *args: shell(cli, "filter", *args)[::2]


def rows(*instructions: str) -> list[dict[str, Any]]:
    # fields in another order than ours, no input, and values that are no strings
    return [
        {"id": place, "output": "yes", "tags": ["ä", None, 0.5], "instruction": text}
        for place, text in enumerate(instructions)
    ]


def write(path: Path, values: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(v) + "\n" for v in values))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_filter_keeps_order_and_records_and_accounts_for_all(run: Run, tmp_path: Path) -> None:
    made = rows("Name one cause of fever", "Why", "Name one cause of a fever", "Show me a picture")
    more = rows("State what anaemia is called", "List the signs of shock")
    a, b = write(tmp_path / "a.jsonl", made), write(tmp_path / "b.jsonl", more)
    old = write(tmp_path / "old.jsonl", rows("List all signs of shock", "Why"))
    out = tmp_path / "new" / "out.jsonl"
    code, err = run("--in", a, b, "--against", old, "--out", out)
    gone = tmp_path / "new" / "out.jsonl.dropped.jsonl"
    assert (code, err) == (
        0,
        f"2 of 6 records kept in {out}, 4 dropped (rouge 2, too-short 1, keyword 1); see {gone}\n",
    )
    assert [list(r.items()) for r in read(out)] == [list(made[0].items()), list(more[0].items())]
    dropped = read(gone)
    assert [d["record"] for d in dropped] == [made[1], made[2], made[3], more[1]]
    assert [d["rule"] for d in dropped] == ["too-short", "rouge", "keyword", "rouge"]
    assert [d["where"] for d in dropped] == [f"{a}:2", f"{a}:3", f"{a}:4", f"{b}:2"]
    assert dropped[1]["near"] == {
        "where": f"{a}:1",
        "instruction": "Name one cause of fever",
        "score": rouge_l("Name one cause of fever", "Name one cause of a fever"),
    }
    assert dropped[3]["near"]["where"] == f"{old}:1"
    assert all(d["reason"] for d in dropped)


@pytest.mark.parametrize("spelling", ["one flag", "two flags"])
def test_lists_of_files_in_either_spelling(run: Run, tmp_path: Path, spelling: str) -> None:
    files = [write(tmp_path / f"{n}.jsonl", rows(f"Say {n} three times")) for n in "ab"]
    given = ["--in", *files] if spelling == "one flag" else ["--in", files[0], "--in", files[1]]
    assert run("--rules", "none", *given, "--out", tmp_path / "o.jsonl", "--rouge", "0.9")[0] == 0
    assert len(read(tmp_path / "o.jsonl")) == 2


def test_packed_files_and_arrays(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "in.json.gz"
    source.write_bytes(gzip.compress(json.dumps(rows("Name one cause of fever")).encode()))
    assert run("--in", source, "--out", tmp_path / "out.json.gz")[0] == 0
    out = json.loads(gzip.decompress((tmp_path / "out.json.gz").read_bytes()))
    assert out == rows("Name one cause of fever")
    assert (tmp_path / "out.json.gz.dropped.jsonl").read_text() == ""


def test_two_runs_write_the_same_bytes(run: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", rows("Name a cause", "Name a cause", "Why"))
    for name in ("one", "two"):
        assert run("--in", source, "--out", tmp_path / f"{name}.jsonl")[0] == 0
    for end in ("", ".dropped.jsonl"):
        one, two = (tmp_path / f"{name}.jsonl{end}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_when_nothing_is_kept_the_reasons_are(run: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", rows("Why"))
    code, err = run("--in", source, "--out", tmp_path / "o.jsonl")
    assert code == 0 and err.startswith("0 of 1 records kept")
    assert (tmp_path / "o.jsonl").read_text() == ""
    assert len(read(tmp_path / "o.jsonl.dropped.jsonl")) == 1


@pytest.mark.parametrize("name", ["o.jsonl", "o.jsonl.dropped.jsonl"])
def test_filter_needs_leave_to_overwrite(run: Run, tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "in.jsonl", rows("Name one cause of fever", "Why"))
    (tmp_path / name).write_text("precious")
    args = ["--in", source, "--out", tmp_path / "o.jsonl"]
    code, err = run(*args)
    assert code == 1
    assert err == f"error: {tmp_path / name} exists; choose another name or pass --overwrite\n"
    assert (tmp_path / name).read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["in.jsonl", name])
    assert run(*args, "--overwrite")[0] == 0
    assert len(read(tmp_path / name)) == 1


@pytest.mark.parametrize("role", ["--in", "--against"])
def test_what_is_read_is_not_written(run: Run, tmp_path: Path, role: str) -> None:
    source = write(tmp_path / "a.jsonl", rows("Name one cause of fever"))
    other = write(tmp_path / "b.jsonl", rows("Name one cause of fever"))
    before = source.read_bytes()
    files = ["--in", source] if role == "--in" else ["--in", other, "--against", source]
    code, err = run(*files, "--out", f"{tmp_path}/./a.jsonl", "--overwrite")
    assert code == 1 and "would be read and written; choose another --out" in err
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "in.jsonl is empty"),
        (b"\x00\xff\xfe", "in.jsonl is not UTF-8 text"),
        (b"{", "broken JSON"),
        (b"[]", "in.jsonl holds no records"),
        (b'{"instruction": 1, "output": ""}', "'instruction' must be a string"),
        (b'{"instruction": "x"}', "field 'output' is missing"),
        (gzip.compress(b"{}" * 50)[:-9], "damaged or cut-off gzip file"),
        (None, "No such file or directory"),
    ],
)
@pytest.mark.parametrize("role", ["--in", "--against"])
def test_bad_files_are_one_sentence_and_nothing_is_written(
    run: Run, tmp_path: Path, data: bytes | None, message: str, role: str
) -> None:
    bad = tmp_path / "in.jsonl"
    if data is not None:
        bad.write_bytes(data)
    files = ["--in", bad]
    if role == "--against":
        good = write(tmp_path / "good.jsonl", rows("Name one cause of fever"))
        files = ["--in", good, "--against", bad]
    out = tmp_path / "out" / "o.jsonl"
    code, err = run(*files, "--out", out)
    assert code == 1
    assert message in err and err.startswith("error: ") and err.count("\n") == 1
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "Missing option"),
        (["--in", "IN"], 2, "Missing option '--out'"),
        (["--in", "--out", "o.jsonl"], 2, "--in needs a file"),
        (["IN", "--in", "IN", "--out", "o.jsonl"], 2, "unexpected extra argument"),
        (["--in", "IN", "--out", "o.jsonl", "--rules", "papers"], 2, "'papers' is not one of"),
        (["--in", "IN", "--out", "o.jsonl", "--rouge", "much"], 2, "'much' is not a valid float"),
        (["--in", "IN", "--out", "o.jsonl", "--rouge", "0"], 1, "above 0 and at most 1"),
        (["--in", "IN", "--out", "o.jsonl", "--rouge", "nan"], 1, "above 0 and at most 1"),
        (["--in", "IN", "--out", "o.jsonl", "--rouge", "70"], 1, "above 0 and at most 1"),
        (["--in", "IN", "--out", "o.txt"], 1, "records are written to .jsonl, .json"),
        (["--in", "IN", "--out", "."], 1, "records are written to"),
    ],
)
def test_wrong_usage(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "IN", rows("Name one cause of fever"))
    found, err = run(*args)
    assert (found, message in err) == (code, True), err
    assert [p.name for p in tmp_path.iterdir()] == ["IN"]


def test_filter_imports_no_torch(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", rows("Name one cause of fever"))
    probe = (
        "import sys; from bioinstruct.synth.cli import cli\n"
        "cli.main(sys.argv[1:], standalone_mode=False)\n"
        "assert 'numpy' in sys.modules and 'torch' not in sys.modules\n"
    )
    args = ["filter", "--in", str(source), "--out", str(tmp_path / "out.jsonl")]
    subprocess.run([sys.executable, "-c", probe, *args], check=True, timeout=60)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(run: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", rows("Name one cause of fever"))
    (tmp_path / "locked").mkdir(mode=0o500)
    code, err = run("--in", source, "--out", tmp_path / "locked" / "o.jsonl")
    assert code == 1 and "Permission denied" in err and err.count("\n") == 1


def test_a_failed_second_file_leaves_no_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bioinstruct.synth import filters

    source = write(tmp_path / "in.jsonl", rows("Name one cause of fever"))
    real = filters.write_records

    def failing(path: Path, *args: Any, **more: Any) -> int:
        if path.name == "o.jsonl":
            raise OSError(28, "No space left on device", str(path))
        return real(path, *args, **more)

    monkeypatch.setattr(filters, "write_records", failing)
    with pytest.raises(OSError, match="No space"):
        filter_files([source], tmp_path / "o.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]
