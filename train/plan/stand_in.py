"""A tokenizer for plans made before there is one: every four bytes of a text count as a token.

Real vocabularies spend three to five bytes of English a token. An id is the four bytes themselves,
the last piece of a text filled up with 0xFF, which UTF-8 never uses; so what was encoded can be
shown again, by any process. The ids fit no model.
"""

import zlib
from pathlib import Path

from bioinstruct.model.tokenizers.tokenizer import GgufWords, Tokenizer

BYTES = 4
"""Of a text that count as a token."""
_FILL = b"\xff"
_CONTROLS = 0xFFFFFF00
"""Ids from here on are control tokens."""


class ByteCount(Tokenizer):
    """Counts bytes; it has every control token that a template asks for."""

    kind = "bytes"

    def __init__(self) -> None:
        bos, eos = (self._control(name) for name in ("<s>", "</s>"))
        super().__init__(
            Path("bytes / 4"),
            pieces=(),
            controls={"<s>": bos, "</s>": eos},
            bos_id=bos,
            eos_id=eos,
            adds_bos=True,
            lossless=True,
            identity=[b"four bytes"],
        )

    @staticmethod
    def _control(name: str) -> int:
        return _CONTROLS + zlib.crc32(name.encode()) % 255

    @property
    def vocab_size(self) -> int:
        """Every number of four bytes."""
        return 1 << 8 * BYTES

    def control_id(self, name: str) -> int | None:
        """Return an id for any control token."""
        return self._control(name)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of text that an id is."""
        whole = token.to_bytes(BYTES, "big")
        return b"" if token >= _CONTROLS else whole.rstrip(_FILL)

    def lacking(self, text: str) -> list[int]:
        """Return no bytes: all can be expressed."""
        return []

    def gguf_words(self) -> GgufWords:
        """Refuse: these ids fit no model.

        Raises:
            ValueError: always.
        """
        raise ValueError("counted bytes are no vocabulary that could be written to a GGUF file")

    def _encode(self, text: str) -> list[int]:
        data = text.encode()
        parts = (data[i : i + BYTES].ljust(BYTES, _FILL) for i in range(0, len(data), BYTES))
        return [int.from_bytes(part, "big") for part in parts]

    def _encode_continuation(self, text: str) -> list[int]:
        return self._encode(text)
