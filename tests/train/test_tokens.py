"""Records to samples: the supervised part, the limits, the cache."""

import json
from pathlib import Path

import numpy as np
import pytest

from bioinstruct.model import Llm
from bioinstruct.model.templates import TEMPLATES, get_template
from bioinstruct.synth.records import Record, Turn
from bioinstruct.train.tokens import Limits, TokenSet, encode_records, load_tokens

LIMITS = Limits(max_tokens=400, on_empty="error", on_overlong="error")


def record(instruction: str, input_text: str, output: str, line: int = 1) -> Record:
    return Record(instruction, input_text, output, {}, "f.jsonl", line)


def encode(stories: Llm, *records: Record, limits: Limits = LIMITS) -> tuple[TokenSet, list[str]]:
    template = get_template("bioinstruct", stories.tokenizer)
    return encode_records(records, template, stories.tokenizer, limits)


def test_the_supervised_part_is_the_answer_and_its_stop_token(stories: Llm) -> None:
    tokens, notes = encode(stories, record("Say", "it", "once upon"), record("Hi", "", "there"))
    assert notes == []
    assert len(tokens) == 2
    ids, prompt = tokens.sample(0)
    decode = stories.tokenizer.decode
    assert ids[-1] == stories.tokenizer.eos_id
    assert decode(ids[prompt:].tolist()).strip() == "once upon"
    assert decode(ids[:prompt].tolist()).endswith("### Output:\n")
    assert tokens.lengths[0] == len(ids) - 1
    assert tokens.supervised[0] == len(ids) - prompt


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"llama-3", "mistral"}))
def test_last_supervised_token_is_the_stop_token(name: str, smollm2: Path) -> None:
    from bioinstruct.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(smollm2)
    template = get_template(name, tokenizer)
    tokens, _ = encode_records(
        [record("Say <|im_end|>", "</s>", "<|im_end|> now")], template, tokenizer, LIMITS
    )
    ids, prompt = tokens.sample(0)
    stop = template.stop_id(tokenizer)
    assert ids[-1] == stop
    assert stop not in ids[prompt:-1]


def test_empty_outputs(stories: Llm) -> None:
    records = [record("a", "", "x", 1), record("b", "", " ", 2), record("c", "", "", 3)]
    with pytest.raises(
        ValueError, match="2 records with an empty output: f.jsonl:2, f.jsonl:3; set"
    ):
        encode(stories, *records)
    dropped, notes = encode(stories, *records, limits=Limits(400, "drop", "error"))
    assert dropped.places == ["f.jsonl:1"]
    assert notes == ["2 records with an empty output: f.jsonl:2, f.jsonl:3; dropped"]
    kept, _ = encode(stories, *records, limits=Limits(400, "keep", "error"))
    assert len(kept) == 3
    assert kept.supervised[2] >= 1


def test_overlong_records(stories: Llm) -> None:
    records = [record("a", "word " * 100, "x", 1), record("b", "", "x", 2)]
    (longest, _) = encode(stories, *records, limits=Limits(10**6, "error", "error"))
    n = int(longest.lengths[0])
    limit = n - 10
    with pytest.raises(
        ValueError, match=rf"1 records over {limit} tokens: f.jsonl:1 \({n} tokens\)"
    ):
        encode(stories, *records, limits=Limits(limit, "error", "error"))
    dropped, _ = encode(stories, *records, limits=Limits(limit, "error", "drop"))
    assert dropped.places == ["f.jsonl:2"]
    cut, notes = encode(stories, *records, limits=Limits(limit, "error", "truncate"))
    assert cut.lengths[0] == limit
    ids, whole = cut.sample(0)[0], longest.sample(0)[0]
    assert ids.tolist() == whole[10:].tolist()
    assert cut.supervised[0] == longest.supervised[0]
    assert "cut on the left" in notes[0]


def test_an_answer_over_the_limit_is_dropped_not_cut(stories: Llm) -> None:
    records = [record("a", "", "word " * 100, 1), record("b", "", "x", 2)]
    cut, notes = encode(stories, *records, limits=Limits(120, "error", "truncate"))
    assert cut.places == ["f.jsonl:2"]
    assert "dropped where the answer alone is too long" in notes[0]


def test_many_bad_records_are_counted_and_some_shown(stories: Llm) -> None:
    with pytest.raises(
        ValueError, match="40 records with an empty output: .*f.jsonl:5 and 35 more"
    ):
        encode(stories, *(record("a", "", "", i) for i in range(1, 41)))


def test_nothing_left(stories: Llm) -> None:
    with pytest.raises(ValueError, match="no record is left"):
        encode(stories, record("a", "", ""), limits=Limits(400, "drop", "error"))


def test_lacking_bytes_are_reported(smollm2: Path) -> None:
    from bioinstruct.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(smollm2)
    template = get_template("chatml", tokenizer)
    absent = next(chr(c) for c in range(256) if tokenizer.lacking(chr(c)))
    records = [record("a", f"{absent} b", "c", 7)]
    tokens, notes = encode_records(records, template, tokenizer, LIMITS)
    assert len(tokens) == 1
    assert len(notes) == 1
    assert notes[0].startswith("1 records hold bytes the vocabulary lacks")
    assert "f.jsonl:7" in notes[0]


@pytest.fixture
def records_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BIOINSTRUCT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "records.jsonl"
    rows = [{"instruction": f"Say {i}", "input": "", "output": f"word {i}"} for i in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(stories: Llm, path: Path, name: str = "bioinstruct", limits: Limits = LIMITS) -> TokenSet:
    template = get_template(name, stories.tokenizer)
    return load_tokens([path], template, stories.tokenizer, limits)


def test_the_cache_gives_the_same_tokens(
    stories: Llm, records_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(stories, records_file)
    monkeypatch.setattr("bioinstruct.train.tokens.read_records", lambda path: 1 / 0)
    again = load(stories, records_file)
    for name in ("tokens", "offsets", "prompts"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert again.places == first.places
    assert isinstance(again.tokens, np.memmap)


def test_the_cache_sees_changed_bytes_template_and_limits(
    stories: Llm, records_file: Path, tmp_path: Path
) -> None:
    load(stories, records_file)
    load(stories, records_file, name="medtuned")
    load(stories, records_file, limits=Limits(399, "error", "error"))
    records_file.write_text(records_file.read_text().replace("word 3", "word 33"))
    changed = load(stories, records_file)
    assert "33" in stories.tokenizer.decode(changed.sample(3)[0].tolist())
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 4


def test_what_was_reported_is_reported_again_from_the_cache(
    stories: Llm, records_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records_file.write_text('{"instruction": "a", "input": "", "output": ""}\n' * 2 + "{}\n" * 0)
    records_file.write_text(
        records_file.read_text() + '{"instruction": "a", "input": "", "output": "b"}\n'
    )
    for _ in range(2):
        load(stories, records_file, limits=Limits(400, "drop", "error"))
        assert "2 records with an empty output" in capsys.readouterr().err


def test_subsets_keep_samples_whole(stories: Llm, records_file: Path) -> None:
    tokens = load(stories, records_file)
    part = tokens.subset([4, 0])
    assert part.sample(0)[0].tolist() == tokens.sample(4)[0].tolist()
    assert part.sample(1)[1] == tokens.sample(0)[1]
    assert part.places == [tokens.places[4], tokens.places[0]]
    assert len(tokens.subset([])) == 0


CHAT = Record(
    "Why?",
    "",
    "So.",
    {},
    "c.jsonl",
    3,
    (Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Hello."))
    + (Turn("user", "Well?"), Turn("assistant", "Yes.")),
)


def test_every_answer_of_a_conversation_is_learned_once(smollm2: Path) -> None:
    from bioinstruct.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(smollm2)
    template = get_template("chatml", tokenizer)
    limits = {name: Limits(400, "error", "error", name) for name in ("all", "last")}
    tokens = {
        name: encode_records([CHAT], template, tokenizer, limit)[0]
        for name, limit in limits.items()
    }
    assert (len(tokens["all"]), len(tokens["last"])) == (3, 1)
    assert tokens["all"].places == ["c.jsonl:3"] * 3
    whole, _ = tokens["last"].sample(0)
    for i, answer in enumerate(["Hello.", "Yes.", "So."]):
        ids, prompt = tokens["all"].sample(i)
        # each is the conversation so far, to the token
        assert ids.tolist() == whole[: len(ids)].tolist()
        assert tokenizer.decode_continuation(ids[prompt:].tolist()) == answer


def test_a_conversation_needs_a_template_with_turns(stories: Llm) -> None:
    with pytest.raises(ValueError, match="'bioinstruct' cannot write conversations"):
        encode(stories, CHAT)
