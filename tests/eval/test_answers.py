"""Answers read and laid onto sentences; the alignment against an oracle written the plain way."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bioinstruct.eval.answers import (
    Tagged,
    align_tokens,
    place_list,
    place_tagged,
    read_choice,
    read_list,
    read_tagged,
)

SENTENCE = "a breast cancer and breast cancer , not ovarian cancer ( OC ) or OC"
TOKENS = SENTENCE.split()
WORDS = st.lists(st.sampled_from(["a", "b", "ab", "ba", "("]), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        ("breast cancer\nOC", ["breast cancer", "OC"]),
        ("  breast cancer \n\n OC\n", ["breast cancer", "OC"]),
        ("- breast cancer\n* OC\n\u2022 OC", ["breast cancer", "OC", "OC"]),
        ("1. breast cancer\n2) OC\n10. OC", ["breast cancer", "OC", "OC"]),
        ("\"breast cancer\"\n'OC'\n`OC`\n\u201cOC\u201d", ["breast cancer", "OC", "OC", "OC"]),
        ("none", []),
        ("None.", []),
        ("- none", []),
        ('"NONE"', []),
        ("none\nnone", []),
        ("lung cancer", ["lung cancer"]),
        ("(OC)", ["(OC)"]),
        ("breast cancer, OC", ["breast cancer, OC"]),
        ("", None),
        (" \n\t\n", None),
        ("none\nOC", None),
        ("OC\nnone", None),
        ("The sentence mentions the diseases breast cancer and ovarian cancer, that is, OC.", None),
        ("OC\n" + "cancer " * 20, None),
    ],
)
def test_read_list(text: str, mentions: list[str] | None) -> None:
    assert read_list(text, TOKENS) == mentions


def test_a_mention_that_looks_like_a_bullet_is_kept_where_the_sentence_holds_it() -> None:
    tokens = ["1.", "p", "deletion", "-", "5", "'", "x", "'"]
    assert read_list("1. p deletion\n- 5\n' x '", tokens) == ["1. p deletion", "- 5", "' x '"]


def test_none_fits_a_sentence_shorter_than_the_word() -> None:
    assert read_list("none", ["."]) == []
    assert read_list("long", ["."]) is None


@pytest.mark.parametrize(
    ("mentions", "spans", "hallucinated"),
    [
        (["breast cancer"], [(1, 3)], 0),
        (["breast cancer", "breast cancer"], [(1, 3), (4, 6)], 0),
        (["breast cancer", "breast cancer", "breast cancer"], [(1, 3), (4, 6)], 1),
        (["ovarian cancer", "breast cancer"], [(8, 10), (1, 3)], 0),
        (["ovarian cancer", "breast cancer", "OC"], [(8, 10), (1, 3), (11, 12)], 0),
        (["OC", "OC"], [(11, 12), (14, 15)], 0),
        (["breast cancer", "cancer"], [(1, 3), (5, 6)], 0),
        (["cancer", "breast cancer"], [(2, 3), (4, 6)], 0),
        (["breast  cancer", "(OC)", "( OC )"], [(1, 3), (10, 13)], 1),
        (["Breast cancer"], [], 1),
        (["reast cancer"], [], 1),
        (["cancer andbreast"], [(2, 5)], 0),
        (["can", "cer"], [], 2),
        (["", "lung cancer", "OC"], [(11, 12)], 2),
        ([], [], 0),
    ],
)
def test_place_list(mentions: list[str], spans: list[tuple[int, int]], hallucinated: int) -> None:
    placed = place_list(mentions, TOKENS)
    assert placed.spans == spans
    assert len(placed.hallucinated) == hallucinated


@given(WORDS, st.lists(WORDS, max_size=5))
def test_placed_mentions_are_in_the_sentence_and_apart(
    tokens: list[str], mentions: list[list[str]]
) -> None:
    asked = [" ".join(words) for words in mentions]
    placed = place_list(asked, tokens)
    assert len(placed.spans) + len(placed.hallucinated) == len(asked)
    covered = [i for start, end in placed.spans for i in range(start, end)]
    assert len(covered) == len(set(covered))
    found = sorted("".join(tokens[start:end]) for start, end in placed.spans)
    assert sorted(found + ["".join(h.split()) for h in placed.hallucinated]) == sorted(
        "".join(a.split()) for a in asked
    )


@given(st.data())
def test_mentions_that_cannot_be_confused_come_back_where_they_were(data: st.DataObject) -> None:
    tokens = [f"w{i}." for i in range(data.draw(st.integers(1, 12)))]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(tokens)), max_size=6)))
    spans = [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    answer = "\n".join(" ".join(tokens[a:b]) for a, b in spans) or "none"
    mentions = read_list(answer, tokens)
    assert mentions is not None
    assert place_list(mentions, tokens) == (spans, [])


def test_read_tagged() -> None:
    text = "Ataxia : B\n: : O\na:b : I\nc: B-Disease\n\nd :O\nthe end"
    found = read_tagged(text)
    assert found == Tagged(["Ataxia", ":", "a:b", "c", "d"], ["B", "O", "I", "B", "O"], 1)


@pytest.mark.parametrize("text", ["", "none", "Ataxia B", "Ataxia : X", "breast cancer : B"])
def test_read_tagged_gives_up(text: str) -> None:
    assert read_tagged(text) is None


def _common(one: tuple[str, ...], two: tuple[str, ...]) -> int:
    @cache
    def longest(i: int, j: int) -> int:
        if i == len(one) or j == len(two):
            return 0
        if one[i] == two[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    return longest(0, 0)


@given(WORDS, WORDS)
def test_alignment_is_a_longest_common_subsequence(predicted: list[str], tokens: list[str]) -> None:
    at = align_tokens(predicted, tokens)
    matched = [(predicted[p], t) for p, t in enumerate(at) if t >= 0]
    assert all(word == tokens[t] for word, t in matched)
    positions = [t for _, t in matched]
    assert positions == sorted(set(positions))
    assert len(positions) == _common(tuple(predicted), tuple(tokens))


@given(WORDS, st.integers(0, 8))
def test_an_answer_that_is_cut_off_is_aligned_from_the_left(tokens: list[str], cut: int) -> None:
    assert align_tokens(tokens[:cut], tokens) == list(range(min(cut, len(tokens))))


def _placed(pairs: str, tokens: str) -> tuple[list[tuple[int, int]], int]:
    found = read_tagged("\n".join(pair.replace("/", " : ") for pair in pairs.split()))
    assert found is not None
    placed = place_tagged(found, tokens.split())
    return placed.spans, len(placed.hallucinated)


@pytest.mark.parametrize(
    ("pairs", "tokens", "expected"),
    [
        ("a/B b/I c/O", "a b c", ([(0, 2)], 0)),
        # repeated tokens keep their own tags: a table from token to tag would lose one of them
        ("x/B y/O x/O", "x y x", ([(0, 1)], 0)),
        ("x/O y/O x/B", "x y x", ([(2, 3)], 0)),
        # a token left out is O and shifts nothing
        ("b/B c/O", "a b c", ([(1, 2)], 0)),
        # a made-up token inside a mention spoils it, outside of one it does not
        ("a/B z/I c/O", "a b c", ([], 1)),
        ("z/O a/B b/I", "a b c", ([(0, 2)], 0)),
        ("z/B a/O", "a b c", ([], 1)),
        # two halves of a mention with a token of the sentence between them left out
        ("a/B c/I", "a b c", ([], 1)),
        # I without B begins a mention
        ("a/O b/I c/I", "a b c", ([(1, 3)], 0)),
        ("a/B b/B c/I", "a b c", ([(0, 1), (1, 3)], 0)),
        ("a/B a/B a/B", "a", ([(0, 1)], 2)),
    ],
)
def test_place_tagged(pairs: str, tokens: str, expected: tuple[list[tuple[int, int]], int]) -> None:
    assert _placed(pairs, tokens) == expected


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("yes", "yes"),
        (" No.", "no"),
        ("MAYBE", "maybe"),
        ("Yes, because the trial says so.", "yes"),
        ("**no**", "no"),
        ("yes\nno", "yes"),
        ("Yes: no harm was seen", "yes"),
        ("The answer is yes", "yes"),
        ("Answer: No", "no"),
        ("My final answer is 'maybe'.", "maybe"),
        ("The correct answer is: no.", "no"),
        ("", None),
        ("not", None),
        ("None", None),
        ("Nothing", None),
        ("yesterday", None),
        ("yes/no/maybe", None),
        ("yes, no or maybe", None),
        ("yes or no", None),
        ("yes, no", None),
        ("Yes | No", None),
        ("Yes, no, or maybe?", None),
        ("Yes, no harm was seen.", "yes"),
        ("no and nothing else", "no"),
        ("The answer is unclear", None),
        ("I think yes", None),
        ("Unclear. Maybe.", None),
        ("answers yes", None),
    ],
)
def test_read_choice(text: str, choice: str | None) -> None:
    assert read_choice(text, ("yes", "no", "maybe")) == choice
