"""What a model's text says, and where in the sentence it says it.

A mention is a span of token positions, so an answer has to be laid onto the sentence. Comparing
strings instead loses repeated tokens (12.7 % of them on NCBI-disease) and lets a model be paid for
a mention that is not there.

Form `list`. One mention a line, in order. Each is searched as a run of whole tokens, white space
left aside and case kept, among the tokens that no earlier mention claimed: first after the
previous match, then from the beginning of the sentence. What is found nowhere is hallucinated, a
false positive. Two readings stay open to this form, as when only the second of two equal words is
a mention: the gold lists of the NCBI test set, read back this way, reach F1 0.9990.
An answer is unparsed if it is empty, if it says `none` beside mentions, or if one of its lines is
longer than the sentence. Bullets, numbering and quotes around a mention are taken off.

Form `medtuned`. One `token : TAG` line a token. The answer's tokens are aligned to the sentence's
by a longest common subsequence, the leftmost where several are equally long; a predicted mention
counts where all its tokens are aligned and adjacent, else it is hallucinated. Tokens left out of
the answer are O. Lines of another shape are counted; an answer without any good line is unparsed.

Form one word (PubMedQA). The first word decides, also after "the answer is"; case, punctuation and
what follows do not matter, except that a second choice joined to it ("yes or no") is unparsed.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bioinstruct.synth.convert import NOTHING
from bioinstruct.synth.sources import find_spans

_BULLET = re.compile(r"^(?:[-*\u2022]|\d{1,3}[.)])\s+")
_QUOTES = "\"'`\u2018\u2019\u201c\u201d"
_TAGGED = re.compile(r"\s*(\S+?)\s*:\s*([BIO])(?:-\S+)?\s*")
_LEAD = r"\W*(?:(?:the |my )?(?:final |correct )?answer(?: is\b|:)\W*)?"


class Placed(NamedTuple):
    """Predicted mentions laid onto a sentence."""

    spans: list[tuple[int, int]]
    """Token positions, start to end (exclusive), no two of them overlapping."""
    hallucinated: list[str]
    """Predicted mentions that the sentence does not hold."""


class Tagged(NamedTuple):
    """An answer of `token : TAG` lines."""

    tokens: list[str]
    tags: list[str]
    bad_lines: int
    """Lines, not blank, that are of another shape."""


def read_list(text: str, tokens: Sequence[str]) -> list[str] | None:
    """Return the mentions of a list answer, or None if it cannot be read as one."""
    sentence = "".join(tokens)
    lines = [_bare(line.strip(), sentence) for line in text.splitlines() if line.strip()]
    nothing = [line.rstrip(".").lower() == NOTHING for line in lines]
    if any(nothing):
        return [] if all(nothing) else None
    too_long = any(len(_squeezed(line)) > len(sentence) for line in lines)
    return None if too_long or not lines else lines


def place_list(mentions: Sequence[str], tokens: Sequence[str]) -> Placed:
    """Lay a list of mentions onto a sentence; see the module's text for the rule."""
    free = _Free(tokens)
    placed = Placed([], [])
    after = 0
    for mention in mentions:
        wanted = _squeezed(mention)
        span = free.claim(wanted, after) or free.claim(wanted, 0)
        if span is None:
            placed.hallucinated.append(mention)
        else:
            placed.spans.append(span)
            after = span[1]
    return placed


def read_tagged(text: str) -> Tagged | None:
    """Return the tokens and tags of a medtuned answer, or None if no line has that shape."""
    lines = [line for line in text.splitlines() if line.strip()]
    found = [m for m in map(_TAGGED.fullmatch, lines) if m]
    if not found:
        return None
    return Tagged([m[1] for m in found], [m[2] for m in found], len(lines) - len(found))


def place_tagged(answer: Tagged, tokens: Sequence[str]) -> Placed:
    """Lay the mentions of a medtuned answer onto a sentence."""
    at = align_tokens(answer.tokens, tokens)
    placed = Placed([], [])
    for start, end, _ in find_spans(answer.tags):
        first = at[start]
        if first >= 0 and at[start:end] == list(range(first, first + end - start)):
            placed.spans.append((first, first + end - start))
        else:
            placed.hallucinated.append(" ".join(answer.tokens[start:end]))
    return placed


def align_tokens(predicted: Sequence[str], tokens: Sequence[str]) -> list[int]:
    """Return the position in tokens of each predicted token, -1 for one that has none.

    The aligned tokens are a longest common subsequence, the leftmost in case of ties.
    """
    if list(predicted) == list(tokens):
        return list(range(len(tokens)))
    num_P, num_T = len(predicted), len(tokens)
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    ids_T = np.array([ids[token] for token in tokens])
    # common_PT[p, t]: the length of the longest one of predicted[p:] and tokens[t:]
    common_PT = np.zeros((num_P + 1, num_T + 1), np.int32)
    for p in range(num_P - 1, -1, -1):
        same_T = ids_T == ids.get(predicted[p], -1)
        best_T = np.maximum(common_PT[p + 1, :-1], common_PT[p + 1, 1:] + same_T)
        common_PT[p, :-1] = np.maximum.accumulate(best_T[::-1])[::-1]
    at = [-1] * num_P
    p = t = 0
    while p < num_P and t < num_T:
        if predicted[p] == tokens[t]:
            at[p] = t
            p, t = p + 1, t + 1
        elif common_PT[p + 1, t] >= common_PT[p, t + 1]:
            p += 1
        else:
            t += 1
    return at


def read_choice(text: str, choices: Sequence[str]) -> str | None:
    """Return the choice that an answer of one word names, or None if it names none or several.

    Args:
        choices: lower-case words.
    """
    word = rf"(?:{'|'.join(map(re.escape, choices))})\b"
    found = re.match(rf"{_LEAD}({word})", text, re.IGNORECASE)
    if not found:
        return None
    # "yes, no harm was seen" is an answer; "yes, no" and "yes, no or maybe" repeat the question
    listed = rf",[ \t]*(?:or )?{word}\W*(?:$|or\b|and\b|{word})"
    second = rf"[ \t]*[/|][ \t]*{word}|[ \t]+(?:or|and)[ \t]+{word}|{listed}"
    return None if re.match(second, text[found.end() :], re.IGNORECASE) else found[1].lower()


class _Free:
    """A sentence whose tokens can be claimed, each once."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.text = "".join(tokens)
        offsets = np.cumsum([0, *map(len, tokens)]).tolist()
        self.offsets: list[int] = offsets
        self.index = {offset: i for i, offset in enumerate(offsets)}
        self.claimed = [False] * len(tokens)

    def claim(self, wanted: str, after: int) -> tuple[int, int] | None:
        """Claim the first free run of tokens at or after position after that spells wanted."""
        at = self.text.find(wanted, self.offsets[after]) if wanted else -1
        while at >= 0:
            start, end = self.index.get(at), self.index.get(at + len(wanted))
            if start is not None and end is not None and not any(self.claimed[start:end]):
                self.claimed[start:end] = [True] * (end - start)
                return start, end
            at = self.text.find(wanted, at + 1)
        return None


def _bare(line: str, sentence: str) -> str:
    """Take bullet and quotes off a line, unless the sentence holds the line with them."""
    if _squeezed(line) in sentence:
        return line
    return _BULLET.sub("", line, count=1).strip(_QUOTES)


def _squeezed(text: str) -> str:
    return "".join(text.split())
