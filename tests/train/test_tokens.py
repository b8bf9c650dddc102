"""Records to samples: the supervised part, the limits, parts and unions of them."""

from pathlib import Path

import pytest

from bioinstruct.model import Llm
from bioinstruct.model.templates import TEMPLATES, get_template
from bioinstruct.synth.records import Record, Turn
from bioinstruct.train.data.tokens import Limits, TokenSet, encode_records

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
    from bioinstruct.model.tokenizers.tokenizer import load_tokenizer

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
    with pytest.raises(
        ValueError, match="no record is left: 1 records with an empty output: f.*dropped"
    ):
        encode(stories, record("a", "", ""), limits=Limits(400, "drop", "error"))


def test_lacking_bytes_are_reported(smollm2: Path) -> None:
    from bioinstruct.model.tokenizers.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(smollm2)
    template = get_template("chatml", tokenizer)
    absent = next(chr(c) for c in range(256) if tokenizer.lacking(chr(c)))
    records = [record("a", f"{absent} b", "c", 7)]
    tokens, notes = encode_records(records, template, tokenizer, LIMITS)
    assert len(tokens) == 1
    assert len(notes) == 1
    assert notes[0].startswith("1 records hold bytes the vocabulary lacks")
    assert "f.jsonl:7" in notes[0]


def test_subsets_keep_samples_whole(stories: Llm) -> None:
    rows = [
        Record(f"Say {i}", "", f"word {i}", {"category": "ab"[i % 2]}, "f", i) for i in range(9)
    ]
    tokens, _ = encode(stories, *rows)
    part = tokens.subset([4, 0, 4])
    assert part.sample(0)[0].tolist() == tokens.sample(4)[0].tolist()
    assert part.sample(1)[1] == tokens.sample(0)[1]
    assert part.places == [tokens.places[i] for i in (4, 0, 4)]
    assert [part.categories.names[i] for i in part.categories.ids] == ["a", "a", "a"]
    assert len(tokens.subset([])) == 0


def test_records_on_one_line_are_told_apart(stories: Llm) -> None:
    tokens, _ = encode(stories, record("a", "", "x"), record("b", "", "y"), record("c", "", "z", 2))
    one = "f.jsonl:1 (record 1)", "f.jsonl:1 (record 2)", "f.jsonl:2"
    assert tokens.places == list(one)
    assert tokens.records.tolist() == [0, 1, 2]


def test_joined_sets_keep_samples_and_labels(stories: Llm) -> None:
    def one(i: int, source: str | None) -> Record:
        extra: dict[str, object] = {"category": f"c{i % 2}"} | (
            {"source": source} if source else {}
        )
        return Record(f"Say {i}", "", f"word {i}", extra, f"file{i}", 1)

    sets = [
        encode(stories, one(0, "x"), one(1, None))[0],
        encode(stories, one(2, None), one(3, "x"))[0],
    ]
    both = TokenSet.joined(sets)
    for i in range(4):
        assert both.sample(i)[0].tolist() == sets[i // 2].sample(i % 2)[0].tolist()
    assert [both.sources.names[i] for i in both.sources.ids] == ["x", "file1", "file2", "x"]
    assert [both.categories.names[i] for i in both.categories.ids] == ["c0", "c1", "c0", "c1"]
    assert len(set(both.sources.names)) == len(both.sources.names)


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
    from bioinstruct.model.tokenizers.tokenizer import load_tokenizer

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
