"""Byte-level BPE (LLaMA 3, SmolLM, Qwen): `tiktoken` does the merging, at some 5 MB/s.

A text is split into words by a regular expression; the bytes of each word are joined pair by pair,
always the pair that comes first in the list of merges, until no neighbours are on it.

tiktoken knows ranks of tokens, not merges of pairs, and joins any two neighbours whose bytes make a
token. So that this is the same thing, a token's rank is the place of the merge that makes it when
its own bytes are encoded alone, and tokens that the merges do not make from their bytes get none.
Then tiktoken is exact: two neighbours l, r in a word have been formed inside their span by the very
steps of encoding l + r alone (no step crossed its borders). Either that goes on to join them, and
(l, r) is the merge that gave the token its rank; or it stops, and the token has no rank.
"""

import itertools
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import regex  # what tiktoken itself depends on
import tiktoken

from bioinstruct.model.tokenizers.bpe_files import (
    CONTROL,
    GGUF_SPLITS,
    MAX_ID,
    NORMAL,
    UNUSED,
    ByteVocabulary,
    split_name,
)
from bioinstruct.model.tokenizers.byte_alphabet import ALPHABET
from bioinstruct.model.tokenizers.tokenizer import GgufWords, Tokenizer

# tiktoken's matcher overflows its stack on a run of a million blanks
MAX_BLANKS = 500_000


Order = Mapping[tuple[str, str], int]  # pair of pieces -> its place in the list of merges
Made = tuple[str, str, int]  # two pieces that were joined, and the place of the merge


class ByteBPE(Tokenizer):
    """A byte-level BPE tokenizer.

    Args:
        source: the file the vocabulary came from.
        vocabulary: its tokens, merges and settings.

    Raises:
        ValueError: the parts of the vocabulary contradict each other.
    """

    kind = "bpe"

    def __init__(self, source: Path, vocabulary: ByteVocabulary) -> None:
        texts = {text: _bytes(text, source) for text in vocabulary.tokens}
        super().__init__(
            source,
            pieces=_pieces(vocabulary, texts, source),
            controls=vocabulary.controls,
            bos_id=vocabulary.bos_id,
            eos_id=vocabulary.eos_id,
            adds_bos=vocabulary.adds_bos,
            lossless=not vocabulary.nfc,
            identity=_identity(vocabulary),
        )
        self.vocabulary = vocabulary
        ranks = _ranks(vocabulary, source)
        self._nfc, self._pattern = vocabulary.nfc, vocabulary.pattern
        self._ids = {rank: vocabulary.tokens[text] for text, rank in ranks.items()}
        self._lacking = bytes(
            sorted(set(range(256)) - {text[0] for text in texts.values() if len(text) == 1})
        )
        self._encoding = _encoding(
            {texts[text]: rank for text, rank in ranks.items()}, source, self._pattern
        )

    def lacking(self, text: str) -> list[int]:
        return sorted(set(text.encode("utf-8")) & set(self._lacking))

    def gguf_words(self) -> GgufWords:
        vocabulary = self.vocabulary
        pre = split_name(vocabulary.pattern)
        if pre is None:
            raise ValueError(
                f"{self.source}: GGUF has no name for how this tokenizer splits words; known are "
                f"the splits of {', '.join(GGUF_SPLITS)}"
            )
        texts = [f"[PAD{token}]" for token in range(self.vocab_size)]
        types = [UNUSED] * self.vocab_size
        for text, token in vocabulary.tokens.items():
            texts[token], types[token] = text, NORMAL
        for text, token in vocabulary.controls.items():
            texts[token], types[token] = text, CONTROL
        pairs = _pairs_of_ranks(vocabulary) if vocabulary.ranked else vocabulary.merges
        merges = [f"{left} {right}" for left, right in pairs]
        return GgufWords("gpt2", pre, texts, types, None, merges)

    def _encode(self, text: str) -> list[int]:
        text = unicodedata.normalize("NFC", text) if self._nfc else text
        if len(text) > MAX_BLANKS and regex.search(rf"\s{{{MAX_BLANKS}}}", text):
            raise ValueError(
                f"the text holds a run of more than {MAX_BLANKS} blanks, which cannot be encoded; "
                f"shorten the text"
            )
        data = text.encode("utf-8")
        if len(data.translate(None, self._lacking)) < len(data):
            return self._encode_without(text)
        return [self._ids[rank] for rank in self._ranks_of(text)]

    def _ranks_of(self, text: str) -> list[int]:
        try:
            return self._encoding.encode_ordinary(text)
        except BaseException as error:
            # a panic of tiktoken's Rust is no Exception, and has no name to import
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(
                f"{self.source}: its pattern splits the text into words that cannot be encoded, "
                "such as empty ones"
            ) from None

    def _encode_continuation(self, text: str) -> list[int]:
        return self._encode(text)

    def _encode_without(self, text: str) -> list[int]:
        """Encode, leaving the lacking bytes out of the words: their neighbours become adjacent.

        That is what `tokenizers` does. Characters that one Unicode version calls letters and
        another does not may fall into other words here than in tiktoken's own matcher.
        """
        ids: list[int] = []
        for word in regex.findall(self._pattern, text):
            # nothing may be left of a word, and tiktoken fails on nothing
            if data := word.encode("utf-8").translate(None, self._lacking):
                ids += [self._ids[rank] for rank in self._encoding._encode_single_piece(data)]
        return ids


def _pieces(vocabulary: ByteVocabulary, texts: Mapping[str, bytes], source: Path) -> list[bytes]:
    """The bytes of each id, after checking that no id has two owners."""
    owners: dict[int, str] = {}
    for text, token in [*vocabulary.tokens.items(), *vocabulary.controls.items()]:
        if token in owners:
            raise ValueError(
                f"{source}: the tokens {owners[token]!r} and {text!r} have the same id {token}"
            )
        if not 0 <= token <= MAX_ID:
            raise ValueError(f"{source}: the token {text!r} has the id {token}, which is no id")
        owners[token] = text
    if not owners:
        raise ValueError(f"{source}: the vocabulary is empty")
    pieces = [b""] * (max(owners) + 1)
    for text, token in vocabulary.tokens.items():
        pieces[token] = texts[text]
    return pieces


def _bytes(text: str, source: Path) -> bytes:
    try:
        return bytes(map(ALPHABET.__getitem__, text))
    except KeyError as error:
        raise ValueError(
            f"{source}: the token {text!r} holds {error}, which is not in the alphabet of bytes, "
            f"so this is no byte-level BPE vocabulary"
        ) from None


def _identity(vocabulary: ByteVocabulary) -> list[bytes]:
    tokens = (f"{text} {token}" for text, token in vocabulary.tokens.items())
    merges = (f"{left} {right}" for left, right in vocabulary.merges)
    flags = (vocabulary.pattern, str(vocabulary.whole_words), str(vocabulary.nfc))
    return ["\n".join(part).encode("utf-8") for part in (tokens, merges, flags)]


def _ranks(vocabulary: ByteVocabulary, source: Path) -> dict[str, int]:
    """Token -> rank: single bytes first, then each token by the merge that makes it."""
    if vocabulary.ranked:
        return dict(vocabulary.tokens)
    order = _order(vocabulary, source)
    ranks = {text: byte for text, byte in ALPHABET.items() if text in vocabulary.tokens}
    made = _made(order)
    ranks |= {text: len(ALPHABET) + place for text, (_, _, place) in made.items()}
    if vocabulary.whole_words:
        _rank_whole_words(ranks, vocabulary.tokens, order, source)
    return ranks


def _order(vocabulary: ByteVocabulary, source: Path) -> Order:
    order: dict[tuple[str, str], int] = {}
    for place, (left, right) in enumerate(vocabulary.merges):
        for text in (left, right, left + right):
            if text not in vocabulary.tokens:
                raise ValueError(
                    f"{source}: merge {place} joins {left!r} and {right!r}, but {text!r} is no "
                    f"token of the vocabulary"
                )
        if (left, right) in order:
            raise ValueError(f"{source}: merge {place} joins {left!r} and {right!r} once more")
        order[left, right] = place
    return order


def _rank_whole_words(
    ranks: dict[str, int], tokens: Mapping[str, int], order: Order, source: Path
) -> None:
    """Give tokens that no merges make a rank behind all others: found only as whole words."""
    for text in tokens:
        if text not in ranks:
            parts, _ = merge(text, order)
            if len(parts) == 2:
                # tiktoken would join these two inside of longer words as well
                raise ValueError(
                    f"{source}: the token {text!r} stands outside the merges in a way that is not "
                    f"supported"
                )
            ranks[text] = len(ALPHABET) + len(order) + len(ranks)


def _made(order: Order) -> dict[str, Made]:
    """Each token that the merges make from its own bytes -> the last of these merges."""
    made: dict[str, Made] = {}
    for (left, right), place in order.items():
        formed = (len(left) == 1 or left in made) and (len(right) == 1 or right in made)
        if formed and left + right not in made and _stay_apart(left, right, made, order):
            made[left + right] = (left, right, place)
    # merges listed before those of their parts are rare, and left to the reference
    for text in {left + right for left, right in order} - made.keys():
        parts, last = merge(text, order)
        if len(parts) == 1:
            left, right = next(pair for pair, place in order.items() if place == last)
            made[text] = (left, right, last)
    return made


def _stay_apart(left: str, right: str, made: Mapping[str, Made], order: Order) -> bool:
    """Whether no merge reaches over the border while the bytes of two neighbours are joined.

    Walks the pieces that meet at the border, in the order in which merges take them up.
    """
    never = len(order)
    lefts, rights = _edge(left, 1, made, never), _edge(right, 0, made, never)
    while len(lefts) + len(rights) > 2:
        (last, last_until), (first, first_until) = lefts[-1], rights[-1]
        across = order.get((last, first), never)
        # of equal merges the leftmost is done first
        if across < last_until and across <= first_until:
            return False
        (lefts if last_until <= first_until else rights).pop()
    return True


def _edge(text: str, side: int, made: Mapping[str, Made], never: int) -> list[tuple[str, int]]:
    """The pieces at one end of a token, whole first and byte last, each with the place of the
    merge that takes it up."""
    pieces, until = [(text, never)], never
    while text in made:
        left, right, until = made[text]
        text = right if side else left
        pieces.append((text, until))
    return pieces


def merge(symbols: Sequence[str], order: Order) -> tuple[list[str], int]:
    """Join neighbours by the list of merges, the reference way.

    Args:
        symbols: the characters of one word.
        order: pair -> its place in the list of merges; the lowest is joined first.

    Returns:
        The pieces, and the place of the last merge (-1 without any).
    """
    parts, last, never = list(symbols), -1, len(order)
    places = [order.get(pair, never) for pair in itertools.pairwise(parts)]
    while (first := min(places, default=never)) < never:
        at, last = places.index(first), first
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del places[at]
        # only the neighbours on either side have changed
        for near in range(max(at - 1, 0), min(at + 1, len(places))):
            places[near] = order.get((parts[near], parts[near + 1]), never)
    return parts, last


def _pairs_of_ranks(vocabulary: ByteVocabulary) -> list[tuple[str, str]]:
    """The merges of a vocabulary that states ranks: each way to make a token of two others."""
    ids = vocabulary.tokens
    pairs = []
    for text in sorted(ids, key=ids.__getitem__):
        ways = ((text[:at], text[at:]) for at in range(1, len(text)))
        known = [way for way in ways if way[0] in ids and way[1] in ids]
        pairs += sorted(known, key=lambda way: (ids[way[0]], ids[way[1]]))
    return pairs


def _encoding(ranks: dict[bytes, int], source: Path, pattern: str) -> tiktoken.Encoding:
    try:
        return tiktoken.Encoding(
            str(source), pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
    except ValueError as error:
        raise ValueError(
            f"{source}: the pattern that splits words cannot be read: {error}"
        ) from None
