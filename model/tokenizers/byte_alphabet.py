"""GPT-2's printable alphabet for bytes, in which byte-level BPE files spell their tokens."""

from collections.abc import Mapping


def byte_alphabet() -> dict[str, int]:
    """Return the printable character for each byte, as GPT-2 chose them: character -> byte.

    Bytes that are printable in Latin-1 stand for themselves, the others for U+0100 and on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(hidden)
    }


ALPHABET: Mapping[str, int] = byte_alphabet()
_CHARACTERS = {byte: character for character, byte in ALPHABET.items()}


def to_text(data: bytes) -> str:
    """Spell bytes in the alphabet."""
    return "".join(map(_CHARACTERS.__getitem__, data))
