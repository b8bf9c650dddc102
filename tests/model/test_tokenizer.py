"""Laws that every tokenizer obeys, and ids equal to an independent implementation's."""

import json
import os
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from bioinstruct.model.tokenizers.bpe_files import LLAMA3
from bioinstruct.model.tokenizers.tokenizer import Tokenizer, load_tokenizer

TOKENIZERS = Path(__file__).parent.parent / "data" / "tokenizers"
SHIPPED = {
    "stories260k": load_tokenizer(TOKENIZERS / "stories260K_tok512.model"),
    "digits_bpe": load_tokenizer(TOKENIZERS / "digits_bpe"),
    "llama3_bpe": load_tokenizer(TOKENIZERS / "llama3_bpe"),
    "stories260k_json": load_tokenizer(TOKENIZERS / "stories260k_json"),
}
MARKERS = [
    *["<s>", "</s>", "<unk>", "<0x0A>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "[INST]"],
    *["\u2581", " ", "  ", "\n", "\t", "\u00a0", "1", " 23", "a", "'s", "!", "\x04", "\U0001f600"],
]
texts = st.text(max_size=30) | st.lists(st.sampled_from(MARKERS), max_size=12).map("".join)
shipped = st.sampled_from(sorted(SHIPPED)).map(SHIPPED.__getitem__)


def golden(name: str) -> list[dict[str, object]]:
    return list(json.loads((TOKENIZERS / f"golden_{name}.json").read_text("utf-8"))["rows"])


def without_lacking(tokenizer: Tokenizer, text: str) -> str:
    """What a byte-level vocabulary can give back of a text."""
    lacking = tokenizer.lacking(text)
    return bytes(b for b in text.encode() if b not in lacking).decode("utf-8", "replace")


@pytest.mark.parametrize("name", SHIPPED)
def test_ids_equal_the_independent_implementation(name: str) -> None:
    rows = golden(name)
    assert len(rows) >= 40
    for row in rows:
        assert SHIPPED[name].encode(str(row["text"])) == row["ids"], row["text"]


def test_smollm2_ids_equal_the_independent_implementation(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (49152, 1, 2)
    assert not tokenizer.adds_bos
    for row in golden("smollm2"):
        text = str(row["text"])
        assert tokenizer.encode(text) == row["ids"], text
        assert tokenizer.decode(tokenizer.encode(text)) == without_lacking(tokenizer, text)


def test_llama_3_s_own_file_gives_the_ids_of_meta_s_class() -> None:
    """The ids stand here, the vocabulary does not: its licence is Meta's own."""
    name = os.environ.get("BIOINSTRUCT_LLAMA3")
    if not name:
        pytest.skip("needs Llama 3's tokenizer.model: set BIOINSTRUCT_LLAMA3 to the file")
    tokenizer = load_tokenizer(Path(name))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.adds_bos) == (128256, 128000, True)
    for row in golden("llama3"):
        text = str(row["text"])
        assert tokenizer.encode(text) == row["ids"], text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_llama_3_s_ids_are_the_words_of_its_split() -> None:
    """Without the file: no text has more tokens than bytes, or fewer than words."""
    for row in golden("llama3"):
        text, ids = str(row["text"]), row["ids"]
        assert isinstance(ids, list)
        assert len(regex.findall(LLAMA3, text)) <= len(ids) <= len(text.encode())
        assert all(0 <= token < 128000 for token in ids)


def test_smollm2_lacks_21_bytes(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.lacking("".join(map(chr, range(128)))) == [4, 6, 19, 20, 22, 29]
    assert tokenizer.lacking("plain text, \u00e9\u764c\U0001f600") == []
    # tag characters, as in the flags of England and Scotland, begin with a byte that is there
    assert tokenizer.lacking("\U000e0067\U0005ffff") == [0xF1]


def test_smollm2_gives_back_all_shipped_records(smollm2: Path, data: Path) -> None:
    check_records(load_tokenizer(smollm2), data)


@pytest.mark.parametrize("name", ["digits_bpe", "llama3_bpe"])
def test_all_shipped_records_come_back(name: str, data: Path) -> None:
    check_records(SHIPPED[name], data)


def test_llama_sentencepiece_gives_back_all_shipped_records(shared_data: Path, data: Path) -> None:
    path = shared_data / "tokenizers" / "mistral_instruct_tokenizer_240323.model.v3"
    tokenizer = load_tokenizer(path)
    assert tokenizer.kind == "sentencepiece" and tokenizer.lossless and tokenizer.adds_bos
    check_records(tokenizer, data)
    for row in golden("smollm2"):
        text = str(row["text"])
        assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


def check_records(tokenizer: Tokenizer, data: Path) -> None:
    records = json.loads((data / "bioinstruct_real_sample_32.json").read_text("utf-8"))
    assert len(records) == 32
    for text in (value for record in records for value in record.values() if value):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode_continuation(tokenizer.encode_continuation(text)) == text


@given(shipped, texts)
@settings(max_examples=400)
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    back = tokenizer.decode(tokenizer.encode(text))
    if tokenizer.kind == "bpe":
        assert back == without_lacking(tokenizer, text)
    elif tokenizer.lossless:
        assert back == text
    else:
        # this model removes blanks at the ends and in runs, and says so
        assert back.replace(" ", "") == text.replace(" ", "")


@given(shipped, texts, texts)
@settings(max_examples=300)
def test_a_continuation_adds_its_text_and_nothing_else(
    tokenizer: Tokenizer, before: str, after: str
) -> None:
    # a text before it that leaves no ids would make the continuation the start
    start, added = tokenizer.encode("x" + before), tokenizer.encode_continuation(after)
    if not tokenizer.lacking(before + after):
        assert tokenizer.decode(start + added) == tokenizer.decode(start) + after
    assert tokenizer.decode_continuation(added) == without_lacking(tokenizer, after)


@given(shipped, texts)
@settings(max_examples=400)
def test_no_text_is_encoded_to_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    ids = {*tokenizer.encode(text), *tokenizer.encode_continuation(text)}
    assert not ids & tokenizer.control_ids


@pytest.mark.parametrize("name", SHIPPED)
def test_control_tokens_are_rendered_as_nothing(name: str) -> None:
    tokenizer = SHIPPED[name]
    ids = tokenizer.encode("a cough", bos=True, eos=True)
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
    assert ids[1:-1] == tokenizer.encode("a cough")
    assert tokenizer.decode(ids) == "a cough"
    assert {tokenizer.token_bytes(token) for token in tokenizer.control_ids} == {b""}


def test_control_tokens_are_found_by_name() -> None:
    assert SHIPPED["stories260k"].control_id("</s>") == 2
    assert SHIPPED["stories260k"].control_id("<|im_end|>") is None
    assert SHIPPED["digits_bpe"].control_id("<|im_end|>") == 2
    # a piece of the vocabulary is no control token
    assert SHIPPED["digits_bpe"].control_id("a") is None


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("token", [-1, 10**6])
def test_an_id_outside_the_vocabulary_is_refused(name: str, token: int) -> None:
    with pytest.raises(ValueError, match=f"token id {token} lies outside the vocabulary of .*"):
        SHIPPED[name].decode([token])


@pytest.mark.parametrize("name", SHIPPED)
def test_half_a_surrogate_pair_is_refused(name: str) -> None:
    for encode in (SHIPPED[name].encode, SHIPPED[name].encode_continuation):
        with pytest.raises(ValueError, match=r"lone surrogate U\+D83D at character 2"):
            encode("ab\ud83d")


def test_half_a_character_is_decoded_to_the_replacement_character() -> None:
    tokenizer = SHIPPED["llama3_bpe"]
    ids = tokenizer.encode("\U0001f9ec")
    assert len(ids) > 1 and tokenizer.decode(ids[:1]) == "\ufffd"


def test_lacking_bytes_are_named_and_left_out() -> None:
    tokenizer = SHIPPED["digits_bpe"]
    assert tokenizer.lacking("a\x04\x04b \x1d") == [0x04, 0x1D]
    assert tokenizer.encode("\x04\x1d") == []
    # the neighbours of a lacking byte become adjacent, as in the reference implementation
    assert tokenizer.encode("-\x04-") == tokenizer.encode("--")
    assert SHIPPED["llama3_bpe"].lacking("".join(map(chr, range(0x500)))) == []
    assert SHIPPED["stories260k"].lacking("".join(map(chr, range(0x500)))) == []


def test_the_fingerprint_tells_tokenizers_apart(tmp_path: Path) -> None:
    prints = {tokenizer.fingerprint for tokenizer in SHIPPED.values()}
    assert len(prints) == len(SHIPPED) and all(len(one) == 64 for one in prints)
    again = load_tokenizer(TOKENIZERS / "digits_bpe" / "tokenizer.json")
    assert again.fingerprint == SHIPPED["digits_bpe"].fingerprint
    # without its settings the same vocabulary begins and ends sequences otherwise
    copy = tmp_path / "tokenizer.json"
    copy.write_bytes((TOKENIZERS / "digits_bpe" / "tokenizer.json").read_bytes())
    assert load_tokenizer(copy).fingerprint not in prints


@pytest.mark.parametrize("name", ["digits_bpe", "llama3_bpe"])
def test_a_run_of_blanks_too_long_for_the_matcher_is_refused(name: str) -> None:
    assert SHIPPED[name].decode(SHIPPED[name].encode(" " * 400_000)) == " " * 400_000
    for text in (" " * 600_000, "x" + "\n" * 600_000 + "x"):
        with pytest.raises(ValueError, match="a run of more than 500000 blanks"):
            SHIPPED[name].encode(text)


@given(shipped, st.lists(st.integers(0, 511), max_size=20))
def test_any_ids_decode(tokenizer: Tokenizer, ids: list[int]) -> None:
    whole, inner = tokenizer.decode(ids), tokenizer.decode_continuation(ids)
    # only the blank that sentencepiece puts before a text is taken away
    assert whole == (inner.removeprefix(" ") if tokenizer.kind == "sentencepiece" else inner)
