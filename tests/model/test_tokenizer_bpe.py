"""tiktoken's merging is exactly the list of merges; contradictory vocabularies are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from bioinstruct.model.tokenizers import bpe_tokenizer
from bioinstruct.model.tokenizers.bpe_files import GPT2_DIGITS, ByteVocabulary, from_gguf
from bioinstruct.model.tokenizers.bpe_tokenizer import ByteBPE
from bioinstruct.model.tokenizers.byte_alphabet import byte_alphabet
from bioinstruct.model.tokenizers.tokenizer import load_tokenizer

SOURCE = Path("vocabulary")
BASE = ByteVocabulary(
    tokens={"a": 5, "b": 3, "c": 4, "ab": 9},
    controls={"<eos>": 0},
    merges=[("a", "b")],
    pattern=r"[\s\S]+",
    whole_words=False,
    nfc=False,
    bos_id=None,
    eos_id=0,
    adds_bos=False,
)


def by_the_list(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """BPE as it is defined: join the first pair of the list, leftmost, until none is there."""
    parts = list(word)
    while True:
        there = [
            (merges.index(pair), at)
            for at, pair in enumerate(zip(parts, parts[1:], strict=False))
            if pair in merges
        ]
        if not there:
            return parts
        at = min(there)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]


@st.composite
def merge_lists(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Any list of merges of pieces that exist, even one no training gives, in any order."""
    pieces, merges = ["a", "b", "c"], []
    for _ in range(draw(st.integers(0, 14))):
        pair = draw(st.sampled_from(pieces)), draw(st.sampled_from(pieces))
        if pair not in merges and len("".join(pair)) < 10:
            merges.append(pair)
            pieces.append("".join(pair))
    return draw(st.permutations(merges)) if draw(st.booleans()) else merges


def vocabulary(merges: list[tuple[str, str]], extra: tuple[str, ...] = ()) -> ByteVocabulary:
    texts = dict.fromkeys(["a", "b", "c", *map("".join, merges), *extra])
    # ids that say nothing of the order
    tokens = {text: 3 + (7 * place) % 101 for place, text in enumerate(texts)}
    return replace(BASE, tokens=tokens, merges=merges)


@given(merge_lists(), st.lists(st.text("abc", min_size=1, max_size=24), min_size=1, max_size=8))
@settings(max_examples=400)
def test_merging_equals_its_definition(merges: list[tuple[str, str]], words: list[str]) -> None:
    chosen = vocabulary(merges)
    tokenizer = ByteBPE(SOURCE, chosen)
    for word in [*words, *chosen.tokens]:
        expected = [chosen.tokens[part] for part in by_the_list(word, merges)]
        assert tokenizer.encode(word) == expected, word
        # the rare path, for words with lacking bytes, and the reference agree as well
        assert tokenizer.encode(f"{word[:1]}\x01{word[1:]}!") == expected
        order = {pair: place for place, pair in enumerate(merges)}
        assert bpe_tokenizer.merge(word, order)[0] == by_the_list(word, merges)


def test_all_merges_of_smollm2_make_their_token(smollm2: Path) -> None:
    merges = from_gguf(smollm2).merges
    order = {pair: place for place, pair in enumerate(merges)}
    made = bpe_tokenizer._made(order)
    assert {text: place for text, (_, _, place) in made.items()} == {
        left + right: place for place, (left, right) in enumerate(merges)
    }


def test_a_word_that_is_a_token_is_taken_whole_only_where_the_vocabulary_says_so() -> None:
    base = vocabulary([("b", "c")], extra=("abcabc",))
    plain = [base.tokens[part] for part in ("a", "bc", "a", "bc")]
    assert ByteBPE(SOURCE, base).encode("abcabc") == plain
    whole = ByteBPE(SOURCE, replace(base, whole_words=True))
    assert whole.encode("abcabc") == [base.tokens["abcabc"]]
    # and not inside of a longer word
    assert whole.encode("abcabca") == [*plain, base.tokens["a"]]


def test_the_byte_alphabet_is_that_of_gpt2() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert [alphabet[char] for char in "!~\u0120\u010a\u0100\u0143"] == [33, 126, 32, 10, 0, 173]


def test_nfc_is_applied_and_declared() -> None:
    folder = Path(__file__).parent.parent / "data" / "tokenizers" / "llama3_bpe"
    plain = load_tokenizer(folder)
    assert plain.lossless and plain.encode("e\u0301") != plain.encode("\u00e9")
    tokenizer = ByteBPE(
        SOURCE, replace(BASE, nfc=True, tokens={"\u00c3": 1, "\u00a9": 2}, merges=[])
    )
    assert not tokenizer.lossless
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9") == [1, 2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a   1", ["a", "   ", "1"]),
        ("a   b", ["a", "  ", " b"]),
        ("12 34", ["1", "2", " ", "3", "4"]),
        (" \u0663", [" ", "\u0663"]),
        ("it's 'll", ["it", "'s", " '", "ll"]),
        ("x\n\n  y", ["x", "\n\n ", " y"]),
        ("x  ", ["x", "  "]),
    ],
)
def test_digits_are_words_of_their_own(text: str, words: list[str]) -> None:
    assert regex.findall(GPT2_DIGITS, text) == words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merges": [("a", "x")]}, "merge 0 joins 'a' and 'x', but 'x' is no token"),
        ({"merges": [("b", "c")]}, "merge 0 joins 'b' and 'c', but 'bc' is no token"),
        ({"merges": [("a", "b")] * 2}, "merge 1 joins 'a' and 'b' once more"),
        ({"tokens": {"a": 0}}, "the tokens 'a' and '<eos>' have the same id 0"),
        ({"tokens": {"a": -1}}, "the token 'a' has the id -1, which is no id"),
        ({"tokens": {"a": 10**12}, "merges": []}, "has the id 1000000000000, which is no id"),
        ({"tokens": {}, "controls": {}, "merges": []}, "the vocabulary is empty"),
        ({"tokens": {"a b": 1}}, "the token 'a b' holds ' ', which is not in the alphabet"),
        ({"tokens": {"\u2581the": 1}}, "so this is no byte-level BPE vocabulary"),
        ({"pattern": "(unclosed"}, "the pattern that splits words cannot be read"),
        (
            {"whole_words": True, "tokens": BASE.tokens | {"abc": 1}},
            "the token 'abc' stands outside the merges in a way that is not supported",
        ),
    ],
)
def test_a_contradictory_vocabulary_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^vocabulary: .*{message}".replace("(", r"\(")):
        ByteBPE(SOURCE, replace(BASE, **change))


def test_a_missing_end_token_is_refused_when_asked_for() -> None:
    tokenizer = ByteBPE(SOURCE, replace(BASE, eos_id=None))
    assert tokenizer.encode("ab") == [9]
    with pytest.raises(ValueError, match="vocabulary has no end-of-sequence token"):
        tokenizer.encode("ab", eos=True)
    with pytest.raises(ValueError, match="vocabulary has no beginning-of-sequence token"):
        tokenizer.encode("ab", bos=True)
