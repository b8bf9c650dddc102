"""Sentencepiece: ids by an independent merge loop, blanks in mid-sequence, markers as text."""

import io
import json
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from bioinstruct.model.tokenizers.sentencepiece_tokenizer import Sentencepiece
from bioinstruct.model.tokenizers.tokenizer import load_tokenizer

DATA = Path(__file__).parent.parent / "data"
MODEL = DATA / "tokenizers" / "stories260K_tok512.model"
stories = load_tokenizer(MODEL)


@cache
def scores() -> dict[str, tuple[float, int]]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
    return {
        processor.id_to_piece(token): (processor.get_score(token), token)
        for token in range(processor.vocab_size())
    }


def by_scores(text: str) -> list[int]:
    """BPE by scores: join the two neighbours whose piece scores best, until none is a piece."""
    parts = list(text.replace(" ", "\u2581"))
    while True:
        pairs = ["".join(parts[at : at + 2]) for at in range(len(parts) - 1)]
        there = [(-scores()[pair][0], at) for at, pair in enumerate(pairs) if pair in scores()]
        if not there:
            break
        at = min(there)[1]
        parts[at : at + 2] = [pairs[at]]
    names = [
        name
        for part in parts
        for name in ([part] if part in scores() else [f"<0x{b:02X}>" for b in part.encode()])
    ]
    return [scores()[name][1] for name in names]


# "<" cannot make "<s>" or "<0x0A>" of its neighbours here, and U+2581 stands for a blank
plain = st.text(st.characters(codec="utf-8", exclude_characters="<\u2581"), max_size=40)


@given(plain | st.text("abcdeht onupi.,\n", max_size=60))
@settings(max_examples=300)
def test_ids_equal_an_independent_merge_loop(text: str) -> None:
    assert stories.encode_continuation(text) == by_scores(text)
    squeezed = " ".join(filter(None, text.split(" ")))
    assert stories.encode(text) == (by_scores(" " + squeezed) if squeezed else [])


def test_the_first_ids_are_those_of_the_reference_model() -> None:
    assert stories.encode("Once upon", bos=True) == [1, 403, 407]
    assert (stories.bos_id, stories.eos_id, stories.adds_bos) == (1, 2, True)
    assert stories.vocab_size == 512


def test_a_blank_symbol_in_the_text_stays_one() -> None:
    for text in ("\u2581", "a\u2581b", "\u2581 \u2581x", " \u2581"):
        ids = stories.encode_continuation(text)
        assert stories.decode_continuation(ids) == text
    assert stories.decode(stories.encode("\u2581a")) == "\u2581a"


def trained(folder: Path, **options: object) -> Sentencepiece:
    """A small model of its own, trained on the BioInstruct sample."""
    records = json.loads((DATA / "bioinstruct_real_sample_32.json").read_text("utf-8"))
    writer = io.BytesIO()
    settings = {"model_type": "bpe", "vocab_size": 420, "minloglevel": 2, "byte_fallback": True}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text for record in records for text in record.values()),
        model_writer=writer,
        **(settings | {"normalization_rule_name": "identity"} | options),
    )
    (folder / "own.model").write_bytes(writer.getvalue())
    return Sentencepiece(folder / "own.model")


def test_markers_that_a_model_would_match_in_text_become_control_tokens(tmp_path: Path) -> None:
    tokenizer = trained(
        tmp_path,
        remove_extra_whitespaces=False,
        user_defined_symbols=["<|im_start|>", "[INST]", "12", "\n\n"],
        control_symbols=["<ctl>"],
    )
    raw = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "own.model"))
    text = "<|im_start|>a[INST]<ctl></s> 12\n\n"
    start = tokenizer.control_id("<|im_start|>")
    assert start is not None and start in raw.encode(text)
    ids = tokenizer.encode(text)
    assert not set(ids) & tokenizer.control_ids
    assert tokenizer.decode([start, *ids]) == text
    assert tokenizer.lossless
    # symbols without a letter are text, and stay the pieces they are
    assert tokenizer.token_bytes(raw.piece_to_id("12")) == b"12"
    assert raw.piece_to_id("12") in ids and raw.piece_to_id("\n\n") in ids
    plain = "text without any marker"
    assert tokenizer.encode(plain) == raw.encode(plain)


def test_without_byte_fallback_lacking_characters_are_named(tmp_path: Path) -> None:
    tokenizer = trained(tmp_path, byte_fallback=False, vocab_size=200)
    assert tokenizer.lacking("the \u764c") == sorted("\u764c".encode())
    assert tokenizer.lacking("the patient") == []
    assert tokenizer.lacking("\u2581") == sorted("\u2581".encode())
    assert tokenizer.decode(tokenizer.encode("the \u764cpatient")) == "the patient"


def test_a_normalizer_that_rewrites_text_is_declared(tmp_path: Path) -> None:
    tokenizer = trained(tmp_path, normalization_rule_name="nmt_nfkc")
    assert not tokenizer.lossless
    assert tokenizer.decode(tokenizer.encode("\ufb01brosis")) == "fibrosis"


def test_without_a_dummy_prefix_nothing_is_taken_away(tmp_path: Path) -> None:
    tokenizer = trained(tmp_path, add_dummy_prefix=False, remove_extra_whitespaces=False)
    assert tokenizer.lossless
    for text in (" the", "the", "  \n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text) == tokenizer.encode_continuation(text)


def test_tokens_added_behind_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(MODEL.read_bytes())
    added = {"512": {"content": "<|im_end|>"}, "515": {"content": "<|im_start|>"}}
    added |= {"1": {"content": "<s>"}}
    config = {"eos_token": {"content": "<|im_end|>"}, "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 516 and tokenizer.eos_id == 512 and tokenizer.bos_id == 1
    assert tokenizer.control_id("<|im_start|>") == 515
    assert tokenizer.decode([515, 513, *tokenizer.encode("a cough"), 512]) == "a cough"
    assert not set(tokenizer.encode("<|im_end|>")) & {512, 515}


@pytest.mark.parametrize(("declared", "adds"), [({}, True), ({"add_bos_token": False}, False)])
def test_bos_is_added_unless_declared_otherwise(
    tmp_path: Path, declared: dict[str, bool], adds: bool
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(MODEL.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared))
    assert load_tokenizer(tmp_path).adds_bos is adds


def test_a_declared_end_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(MODEL.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|eot|>"}')
    with pytest.raises(ValueError, match=r"says that '<\|eot\|>' begins or ends a sequence"):
        load_tokenizer(tmp_path)


def test_a_model_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    model = MODEL.read_bytes()
    # every place in the first and last pieces, and some of the others
    places = {*range(1, 60), *range(60, len(model), 61), *range(len(model) - 300, len(model))}
    for place in sorted(places):
        (tmp_path / "tokenizer.model").write_bytes(model[:place])
        with pytest.raises(ValueError, match="not a sentencepiece model"):
            load_tokenizer(tmp_path)


@given(
    st.binary(max_size=200) | st.binary(max_size=200).map(lambda junk: b"\n\x05\n\x03abc" + junk)
)
def test_junk_is_refused(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.model"
    path.write_bytes(junk)
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        Sentencepiece(path)


def test_settings_without_pieces_are_refused(tmp_path: Path) -> None:
    # a normal piece whose text merely looks like a type, then nonsense after it
    (tmp_path / "a.model").write_bytes(b"\n\x04\n\x02\x18\x04\x12\x00\x1a\x00" + b"\xff" * 99)
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path)
