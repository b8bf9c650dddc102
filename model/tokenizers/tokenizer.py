"""Text <-> token ids: one face for every kind of tokenizer, and the finding of a model's own.

Two kinds are read, told apart by the file's content and never by its name:

    sentencepiece  LLaMA 1 and 2, Mistral: a `.model` file, tokenizer.json or GGUF
                   sentencepiece_tokenizer.py, sentencepiece_files.py
    byte-level BPE LLaMA 3, SmolLM, Qwen: tokenizer.json or GGUF, and Llama 3's tiktoken file
                   bpe_tokenizer.py, bpe_files.py, tiktoken_file.py

User text is data. Whatever it spells, "</s>" or "<|im_start|>", it is encoded as the characters it
is made of; a control token enters a sequence by its id alone (`control_id`, which templates use).

The laws that the tests hold every tokenizer to, for texts without `lacking` bytes:

    decode(encode(text)) == text                                        where `lossless`
    decode(encode(a) + encode_continuation(b)) == decode(encode(a)) + b
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bioinstruct.model import gguf_header

WEIGHTS = (".safetensors", ".bin", ".pth", ".index.json")
# what is looked for in a folder; the first pattern that is met wins
PATTERNS = ("tokenizer.model", "*.model", "*.model.v*", "tokenizer.json", "*.gguf")


class GgufWords(NamedTuple):
    """A vocabulary as GGUF files hold it."""

    model: str
    """llama (sentencepiece) or gpt2 (byte-level BPE)."""
    pre: str | None
    """Name of the split into words, for gpt2."""
    texts: list[str]
    types: list[int]
    """1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte."""
    scores: list[float] | None
    merges: list[str] | None
    space_prefix: bool | None = None
    """Whether a blank is put before a text, for llama."""


class Tokenizer(ABC):
    """What every tokenizer can do; load_tokenizer makes one.

    Args:
        source: the file it was read from.
        pieces: the bytes of each id; empty for control tokens and holes.
        controls: name -> id of the control tokens.
        bos_id: begins a sequence, if the vocabulary has such a token.
        eos_id: ends a sequence, likewise.
        adds_bos: whether the model was trained on sequences that begin with bos_id.
        lossless: whether decode undoes encode; false where a normalizer rewrites the text.
        identity: everything that determines the ids, for the fingerprint.
    """

    kind: str
    """"sentencepiece" or "bpe"."""

    def __init__(
        self,
        source: Path,
        *,
        pieces: Sequence[bytes],
        controls: Mapping[str, int],
        bos_id: int | None,
        eos_id: int | None,
        adds_bos: bool,
        lossless: bool,
        identity: Iterable[bytes],
    ) -> None:
        self.source = source
        self.bos_id, self.eos_id = bos_id, eos_id
        self.adds_bos = adds_bos and bos_id is not None
        self.lossless = lossless
        self._pieces = pieces
        self._controls = dict(controls)
        self.fingerprint = self._fingerprint(identity)

    @property
    def vocab_size(self) -> int:
        """The number of ids: the greatest one plus 1."""
        return len(self._pieces)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Turn a text that begins a sequence into ids.

        Args:
            text: any text; markers in it are plain characters.
            bos: put the beginning-of-sequence token in front.
            eos: put the end-of-sequence token behind.

        Raises:
            ValueError: the text cannot be written in UTF-8, or the wanted token does not exist.
        """
        ids = self._encode(checked(text))
        if bos:
            ids.insert(0, self._required(self.bos_id, "beginning"))
        if eos:
            ids.append(self._required(self.eos_id, "end"))
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """Turn a text that stands in the middle of a sequence into ids: nothing is put before it.

        Raises:
            ValueError: the text cannot be written in UTF-8.
        """
        return self._encode_continuation(checked(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Turn the ids of a whole sequence into text; control tokens become nothing.

        Raises:
            ValueError: an id lies outside the vocabulary.
        """
        return self.decode_continuation(ids)

    def decode_continuation(self, ids: Iterable[int]) -> str:
        """Turn ids from the middle of a sequence into text, such as a generated answer.

        Bytes that make no UTF-8, as in half a character, become U+FFFD.

        Raises:
            ValueError: an id lies outside the vocabulary.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of text behind an id; none behind a control token.

        Raises:
            ValueError: the id lies outside the vocabulary.
        """
        if 0 <= token < len(self._pieces):
            return self._pieces[token]
        raise ValueError(
            f"token id {token} lies outside the vocabulary of {self.source}, "
            f"which ends at {self.vocab_size - 1}"
        )

    def control_id(self, name: str) -> int | None:
        """Return the id of a control token such as "</s>", or None if there is none so called."""
        return self._controls.get(name)

    @property
    def control_ids(self) -> frozenset[int]:
        """The ids that no text is ever encoded to."""
        return frozenset(self._controls.values())

    @abstractmethod
    def lacking(self, text: str) -> list[int]:
        """Return the bytes of text, sorted and once each, that the vocabulary cannot express.

        A byte-level vocabulary leaves them out when it encodes; a sentencepiece one without byte
        fallback writes its unknown token.
        """

    @abstractmethod
    def gguf_words(self) -> GgufWords:
        """Return the vocabulary as a GGUF file holds it.

        Raises:
            ValueError: GGUF has no form for this kind of tokenizer.
        """

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def _encode_continuation(self, text: str) -> list[int]: ...

    def _required(self, token: int | None, place: str) -> int:
        if token is None:
            raise ValueError(f"{self.source} has no {place}-of-sequence token")
        return token

    def _fingerprint(self, identity: Iterable[bytes]) -> str:
        own = [self.kind, self.bos_id, self.eos_id, self.adds_bos, sorted(self._controls.items())]
        digest = hashlib.sha256(json.dumps(own).encode())
        for part in identity:
            # the length in front keeps ("ab", "c") apart from ("a", "bc")
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.

    Args:
        path: a sentencepiece model, tokenizer.json or GGUF file; or a folder: the first of PATTERNS
            found in it, else in the folder above, is taken (`source` of the result says which).
            A file of weights other than GGUF stands for its folder.

    Raises:
        OSError: a file cannot be read.
        ValueError: there is none, it is of an unsupported kind or damaged, or several differ.
    """
    if not path.exists():
        raise ValueError(f"no tokenizer can be read from {path}: there is no such file or folder")
    if path.is_file() and not path.name.endswith(WEIGHTS):
        return _load_checked(path)
    folder = (path if path.is_dir() else path.parent).resolve()
    places = [(folder, pattern) for pattern in PATTERNS]
    # a GGUF file in the folder above is another model
    places += [(folder.parent, pattern) for pattern in PATTERNS if pattern != "*.gguf"]
    for place, pattern in places:
        if files := sorted(file for file in place.glob(pattern) if file.is_file()):
            return _only(files)
    raise ValueError(
        f"no tokenizer was found in {folder} or the folder above it: looked for "
        f"{', '.join(PATTERNS)}; put the model's own there, or name "
        "its file (model.tokenizer, --tokenizer)"
    )


def checked(text: str) -> str:
    """Return text if it can be written in UTF-8.

    Raises:
        ValueError: it holds half of a surrogate pair, as a broken escape in a JSON file does.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds the lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which is half a character and cannot be encoded; mend the text"
        ) from None
    return text


def _only(files: list[Path]) -> Tokenizer:
    loaded = [_load_checked(file) for file in files]
    if len({tokenizer.fingerprint for tokenizer in loaded}) > 1:
        raise ValueError(
            f"{files[0].parent} holds several tokenizers that differ: "
            f"{', '.join(file.name for file in files)}; name one of them in model.tokenizer"
        )
    return loaded[0]


def _load_checked(path: Path) -> Tokenizer:
    try:
        return _load_file(path)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{path}: a token holds the lone surrogate U+{ord(error.object[error.start]):04X}, "
            "which is half a character; the file is damaged, download or copy it again"
        ) from None


def _load_file(path: Path) -> Tokenizer:
    """Read one file; each kind's libraries are imported only when it is met."""
    with path.open("rb") as file:
        head = file.read(200)
    if head.startswith(gguf_header.MAGIC):
        return _load_gguf(path)
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return _load_json(path)
    if problem := _unsupported(head):
        raise ValueError(f"{path} {problem}")
    if _RANKS.match(head):
        from bioinstruct.model.tokenizers import bpe_tokenizer, tiktoken_file

        return bpe_tokenizer.ByteBPE(path, tiktoken_file.from_tiktoken(path))
    from bioinstruct.model.tokenizers import sentencepiece_tokenizer

    return sentencepiece_tokenizer.Sentencepiece(path)


_RANKS = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")  # tiktoken: base64 and a rank
_FALLBACK = re.compile(rb'"byte_fallback"\s*:\s*true')


def _load_gguf(path: Path) -> Tokenizer:
    if gguf_header.read_metadata(path).get("tokenizer.ggml.model") == "llama":
        from bioinstruct.model.tokenizers import sentencepiece_files, sentencepiece_tokenizer

        written = sentencepiece_files.from_gguf(path)
        return sentencepiece_tokenizer.Sentencepiece(path, written)
    from bioinstruct.model.tokenizers import bpe_files, bpe_tokenizer

    return bpe_tokenizer.ByteBPE(path, bpe_files.from_gguf(path))


def _load_json(path: Path) -> Tokenizer:
    if _FALLBACK.search(path.read_bytes()):
        from bioinstruct.model.tokenizers import sentencepiece_files, sentencepiece_tokenizer

        written = sentencepiece_files.from_json(path)
        return sentencepiece_tokenizer.Sentencepiece(path, written)
    from bioinstruct.model.tokenizers import bpe_files, bpe_tokenizer

    return bpe_tokenizer.ByteBPE(path, bpe_files.from_json(path))


def _unsupported(head: bytes) -> str | None:
    """Why a file that begins so cannot be a tokenizer, if that can be told."""
    if not head:
        return "is empty, and no tokenizer"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the file itself; fetch it with `git lfs pull`"
    return None
