"""Sentencepiece models out of files that are none: a tokenizer.json or a GGUF header.

LLaMA 2 and Mistral are often passed on without their tokenizer.model. What the other files hold is
the same model written otherwise, so it is written back, as a sentencepiece ModelProto:

    GGUF             pieces with their scores and types: the model itself, but for its normalizer
    tokenizer.json   pieces, and for each piece every way to make it of two others, the best first;
                     a piece's score is the place of its first such way, negated

A ModelProto is a row of protobuf fields: 1 a piece (text, score, type), 2 how it was trained, 3 how
texts are normalized. Blanks are kept as they are; whether one is put in front is in the files.
"""

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bioinstruct.model.fields import Fields
from bioinstruct.model.gguf_header import read_metadata
from bioinstruct.model.tokenizers.bpe_files import (
    added_tokens,
    listed,
    merges_of,
    steps_of,
    vocabulary_of,
)
from bioinstruct.model.tokenizers.tokenizer_config import read_json

BLANK = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MODEL_BPE = 2


class Piece(NamedTuple):
    """An entry of the vocabulary."""

    text: str
    score: float
    kind: int


class Written(NamedTuple):
    """A sentencepiece model that was written back."""

    model: bytes
    added: dict[str, int]
    """Control tokens behind the model's own pieces: name -> id."""
    adds_bos: bool | None
    """Whether sequences begin with BOS; None where the file does not say."""


def from_gguf(path: Path) -> Written:
    """Read the vocabulary in a GGUF header.

    Raises:
        ValueError: the header holds no sentencepiece vocabulary, or a damaged one.
    """
    fields = Fields(read_metadata(path), str(path))
    texts, scores, kinds = (
        listed(fields, f"tokenizer.ggml.{key}") for key in ("tokens", "scores", "token_type")
    )
    if not len(texts) == len(scores) == len(kinds):
        raise ValueError(
            f"{path}: {len(texts)} tokens, {len(scores)} scores and {len(kinds)} token types"
        )
    pieces = [Piece(str(t), float(s), int(k)) for t, s, k in zip(texts, scores, kinds, strict=True)]
    for key, default in (("unknown", 0), ("bos", 1), ("eos", 2)):
        token = fields.integer(f"tokenizer.ggml.{key}_token_id", default)
        if not 0 <= token < len(pieces):
            fields.refuse(f"tokenizer.ggml.{key}_token_id", f"there are {len(pieces)} tokens")
    bos, eos = (fields.integer(f"tokenizer.ggml.{key}_token_id", i) for key, i in _ENDS.items())
    prefix = fields.boolean("tokenizer.ggml.add_space_prefix", True)
    adds_bos = fields.boolean("tokenizer.ggml.add_bos_token", True)
    model = _proto(pieces, prefix, pieces[bos].text, pieces[eos].text)
    return Written(model, {}, adds_bos)


_ENDS = {"bos": 1, "eos": 2}


def from_json(path: Path) -> Written:
    """Read a tokenizer.json whose model is BPE with byte fallback.

    Raises:
        ValueError: it is damaged, or holds a step that sentencepiece does not have.
    """
    root = Fields(read_json(path), str(path))
    model = Fields(root.mapping.get("model"), f"{path}: model")
    vocab = vocabulary_of(model)
    by_id = {token: text for text, token in vocab.items()}
    if sorted(by_id, key=str) != sorted(range(len(vocab)), key=str):
        raise ValueError(f"{path}: model.vocab: the ids must be 0 to {len(vocab) - 1}, each once")
    added, prefix = added_tokens(root), _prefix(root)
    ways = _ways(merges_of(model, "merges"), vocab, path)
    unknown = model.text("unk_token", "<unk>")
    pieces = [
        Piece(text, -float(ways.get(text, len(ways))), _kind(text, unknown, added, ways, path))
        for text in (by_id[token] for token in range(len(vocab)))
    ]
    bos, eos = (name if name in added and name in vocab else "" for name in ("<s>", "</s>"))
    behind = {name: token for name, token in added.items() if token >= len(vocab)}
    return Written(_proto(pieces, prefix, bos, eos), behind, None)


def _kind(text: str, unknown: str, added: dict[str, int], ways: dict[str, int], path: Path) -> int:
    if text == unknown:
        return UNKNOWN
    if text in added:
        return CONTROL
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return BYTE
    if len(text) > 1 and text not in ways:
        raise ValueError(
            f"{path}: no merge makes the token {text!r}, so this is no sentencepiece vocabulary"
        )
    return NORMAL


def _ways(merges: Sequence[tuple[str, str]], vocab: Iterable[str], path: Path) -> dict[str, int]:
    """Each piece that merges make -> the place of the first; checks that all ways are there."""
    first: dict[str, int] = {}
    for place, (left, right) in enumerate(merges):
        first.setdefault(left + right, place)
    there, known = set(merges), set(vocab)
    for text in first:
        for at in range(1, len(text)):
            pair = (text[:at], text[at:])
            if pair[0] in known and pair[1] in known and pair not in there:
                raise ValueError(
                    f"{path}: model.merges: {text!r} is made in some ways but not of {pair[0]!r} "
                    f"and {pair[1]!r}, so this is no sentencepiece vocabulary"
                )
    return first


def _prefix(root: Fields) -> bool:
    """Whether a blank is put before a text; refuse steps that sentencepiece does not have."""
    found = False
    for step in steps_of(root, "normalizer", "normalizers"):
        kind = step.text("type")
        if kind == "Prepend" and step.mapping.get("prepend") == BLANK:
            found = True
        elif kind != "Replace" or step.mapping.get("content") != BLANK:
            raise ValueError(f"{root.source}: normalizer: {kind} is not supported beside merges")
    for step in steps_of(root, "pre_tokenizer", "pretokenizers"):
        kind = step.text("type")
        if kind != "Metaspace" or step.boolean("split", True):
            raise ValueError(
                f"{root.source}: pre_tokenizer: {kind} is not supported in a sentencepiece-like "
                "model, only Metaspace that does not split"
            )
        scheme = "always" if step.boolean("add_prefix_space", True) else "never"
        found |= step.text("prepend_scheme", scheme) != "never"
    return found


# ---- protobuf ----------------------------------------------------------------------------------


def _proto(pieces: Sequence[Piece], prefix: bool, bos: str, eos: str) -> bytes:
    unknown = next((piece.text for piece in pieces if piece.kind == UNKNOWN), "<unk>")
    fallback = any(piece.kind == BYTE for piece in pieces)
    trained = _number(3, MODEL_BPE) + _number(4, len(pieces)) + _number(35, fallback)
    trained += _text(45, unknown) + _text(46, bos) + _text(47, eos)
    normal = _text(1, "identity") + _number(3, prefix) + _number(4, 0)
    rows = (
        length_field(1, _text(1, p.text) + _float(2, p.score) + _number(3, p.kind)) for p in pieces
    )
    return b"".join(rows) + length_field(2, trained) + length_field(3, normal)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def length_field(field: int, content: bytes) -> bytes:
    """Write a protobuf field of bytes: its number and type, its length, its content."""
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, content: str) -> bytes:
    return length_field(field, content.encode("utf-8"))
