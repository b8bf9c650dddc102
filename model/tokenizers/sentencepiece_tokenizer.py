"""Sentencepiece models (LLaMA 1 and 2, Mistral), through the `sentencepiece` package.

Three things differ from the package's own encode and decode:

* A text in the middle of a sequence gets no dummy prefix: sentencepiece writes a blank before each
  text it is given, so that a first word looks like any other, and that blank would drift between
  prompt and answer. A second processor, of the same model with the prefix switched off, encodes it.
* U+2581, by which sentencepiece writes a blank, is spelt in bytes when the text itself holds it;
  the package would give it back as a blank.
* User-defined symbols that are markers ("<|im_start|>", "[INST]") are made control tokens, which
  no text can spell. Those of blanks, digits or punctuation alone are text and stay.

A ModelProto is a row of protobuf fields, field 1 a piece and field 3 the normalizer's settings;
where a setting comes twice, the later one holds. So both changes are bytes put behind.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from bioinstruct.model.tokenizers.sentencepiece_files import Written, length_field
from bioinstruct.model.tokenizers.tokenizer import GgufWords, Tokenizer
from bioinstruct.model.tokenizers.tokenizer_config import read_declared

BLANK = "\u2581"
# normalizer_spec { add_dummy_prefix: false, remove_extra_whitespaces: false }
BARE = b"\x1a\x04\x18\x00\x20\x00"
PIECE, TRAINER_SPEC, NORMALIZER_SPEC = 0x0A, 0x12, 0x1A  # protobuf tags in a ModelProto
# field 3 of a piece, its type
USER_DEFINED, CONTROL = b"\x18\x04", b"\x18\x03"
# blanks, compatibility characters and a combining mark: what normalizers like to rewrite
PROBE = "  a  b \n\t\u00a0\ufb01\u2460e\u0301 "


class Sentencepiece(Tokenizer):
    """A sentencepiece model file, with what tokenizer_config.json beside it declares.

    Args:
        source: the model file, or the file that `written` was read from.
        written: a model out of a file of another kind.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no sentencepiece model.
    """

    kind = "sentencepiece"

    def __init__(self, source: Path, written: Written | None = None) -> None:
        model = _markers_to_control(source) if written is None else written.model
        self._opening = _processor(model, source)
        self._inner = _processor(model + BARE, source)
        declared = read_declared(source.parent)
        own = self._opening.vocab_size()
        controls = {
            self._opening.id_to_piece(token): token
            for token in range(own)
            if self._opening.is_control(token) or self._opening.is_unknown(token)
        }
        behind = declared.added if written is None else written.added | declared.added
        added = {name: token for name, token in behind.items() if token >= own}
        adds_bos = declared.adds_bos
        if adds_bos is None and written is not None:
            adds_bos = written.adds_bos
        size = max([own - 1, *added.values()]) + 1
        pieces = [self._piece(token) if token < own else b"" for token in range(size)]
        self._byte_ids = self._bytes_of_vocabulary()
        controls |= added
        super().__init__(
            source,
            pieces=pieces,
            controls=controls,
            bos_id=_declared_id(declared.bos, controls, self._opening.bos_id(), source),
            eos_id=_declared_id(declared.eos, controls, self._opening.eos_id(), source),
            # LLaMA's and Mistral's own code puts BOS before every sequence unless told otherwise
            adds_bos=adds_bos is not False,
            lossless=self._opening.normalize(PROBE) in (_blanked(PROBE), _blanked(" " + PROBE)),
            identity=[model],
        )
        self._prefixes = self._opening.normalize("a").startswith(BLANK)

    def decode(self, ids: Iterable[int]) -> str:
        text = self.decode_continuation(ids)
        return text.removeprefix(" ") if self._prefixes else text

    def lacking(self, text: str) -> list[int]:
        if self._byte_ids:
            return []
        unknown = self._inner.unk_id()
        found = (char for char in set(text) if unknown in self._encode_continuation(char))
        return sorted({byte for char in found for byte in char.encode("utf-8")})

    def gguf_words(self) -> GgufWords:
        model, names = self._opening, {token: name for name, token in self._controls.items()}
        own = model.vocab_size()
        types = []
        for token in range(self.vocab_size):
            unknown = token < own and model.is_unknown(token)
            byte = token < own and model.is_byte(token)
            unused = token not in names if token >= own else model.is_unused(token)
            control = token in names
            types.append(2 if unknown else 3 if control else 6 if byte else 5 if unused else 1)
        return GgufWords(
            model="llama",
            pre=None,
            texts=[
                model.id_to_piece(token) if token < own else names.get(token, f"[PAD{token}]")
                for token in range(self.vocab_size)
            ],
            types=types,
            scores=[
                model.get_score(token) if token < own else -1000.0
                for token in range(self.vocab_size)
            ],
            merges=None,
            space_prefix=self._prefixes,
        )

    def _encode(self, text: str) -> list[int]:
        first, *others = text.split(BLANK)
        return self._joined(self._opening.encode(first), others)

    def _encode_continuation(self, text: str) -> list[int]:
        first, *others = text.split(BLANK)
        return self._joined(self._inner.encode(first), others)

    def _joined(self, ids: list[int], parts: list[str]) -> list[int]:
        """The ids, and those of the parts, each behind a U+2581 of the text's own."""
        for part in parts:
            ids += self._spelt_blank()
            ids += self._inner.encode(part)
        return ids

    def _spelt_blank(self) -> list[int]:
        if not self._byte_ids:
            return [self._inner.unk_id()]
        return [self._byte_ids[byte] for byte in BLANK.encode("utf-8")]

    def _bytes_of_vocabulary(self) -> dict[int, int]:
        """Byte -> id of the pieces <0x00> to <0xFF>; empty for a vocabulary without them."""
        tokens = filter(self._opening.is_byte, range(self._opening.vocab_size()))
        return {int(self._opening.id_to_piece(token)[3:5], 16): token for token in tokens}

    def _piece(self, token: int) -> bytes:
        processor = self._opening
        if processor.is_control(token) or processor.is_unknown(token):
            return b""
        piece: str = processor.id_to_piece(token)
        if processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(BLANK, " ").encode("utf-8")


def _processor(model: bytes, source: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        raise _unreadable(source) from None


def _unreadable(source: Path) -> ValueError:
    return ValueError(
        f"{source} is no tokenizer that can be read: not a sentencepiece model (or a damaged one), "
        f"not a JSON file, not a GGUF file"
    )


def _declared_id(name: str | None, controls: dict[str, int], own: int, source: Path) -> int | None:
    """The token that tokenizer_config.json names, else the model's own, else none."""
    if name is None:
        return own if own >= 0 else None
    if name not in controls:
        raise ValueError(
            f"tokenizer_config.json beside {source} says that {name!r} begins or ends a sequence, "
            f"but the vocabulary has no such control token"
        )
    return controls[name]


def _blanked(text: str) -> str:
    return text.replace(" ", BLANK)


def _markers_to_control(source: Path) -> bytes:
    """The model's bytes, with the user-defined symbols that hold a letter made control tokens."""
    out, tags = bytearray(), set()
    with source.open("rb") as file:
        # weights given by mistake are not read whole
        data = file.read(1)
        data += file.read() if data == bytes([PIECE]) else b""
    try:
        for tag, whole, payload in _fields(data):
            marker = tag == PIECE and USER_DEFINED in payload and _is_marker(payload)
            out += length_field(1, payload + CONTROL) if marker else whole
            tags.add(tag)
    except IndexError:
        raise _unreadable(source) from None
    # pieces come first: without the settings behind them the file was cut between two fields
    if not tags >= {PIECE, TRAINER_SPEC, NORMALIZER_SPEC}:
        raise _unreadable(source)
    return bytes(out)


def _is_marker(payload: bytes) -> bool:
    """Whether a piece is user-defined and holds a letter."""
    fields = {tag: (whole, content) for tag, whole, content in _fields(payload)}
    (_, text), (kind, _) = fields.get(0x0A, (b"", b"")), fields.get(0x18, (b"", b""))
    return kind == USER_DEFINED and any(map(str.isalpha, text.decode("utf-8", "replace")))


def _fields(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Each protobuf field of a message: its tag, all of its bytes, and its content."""
    offset = 0
    while offset < len(data):
        start = offset
        tag, offset = _varint(data, offset)
        content, wire = offset, tag & 7
        if wire == 0:
            _, offset = _varint(data, offset)
        elif wire == 2:
            length, content = _varint(data, offset)
            offset = content + length
        elif wire in (1, 5):
            offset += 8 if wire == 1 else 4
        else:
            raise IndexError(f"no protobuf field at byte {start}")
        if offset > len(data):
            raise IndexError("a field goes past the end")
        yield tag, data[start:offset], data[content:offset]


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[offset]
        value |= (byte & 0x7F) << shift
        offset, shift = offset + 1, shift + 7
        if byte < 0x80:
            return value, offset
        if shift > 63:
            raise IndexError("a number of more than 64 bits")
