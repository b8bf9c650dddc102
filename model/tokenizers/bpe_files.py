"""Byte-level BPE vocabularies out of the two files that carry them: GGUF and tokenizer.json.

Both hold the pieces (in a printable alphabet that stands for bytes), the merges in their order, and
how a text is first split into words. GGUF names the split by a word ("smollm", "llama-bpe"), JSON
spells it as a list of steps. What this project cannot do exactly is refused by name: a tokenizer
that is nearly right gives a model that is silently worse.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bioinstruct.model.fields import Fields, shown
from bioinstruct.model.gguf_header import read_metadata
from bioinstruct.model.tokenizers.tokenizer_config import read_declared, read_json

# GPT-2's words: contractions, letters, numbers, the rest (each with one blank before), blanks
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# the same where each digit was split off beforehand: blanks before a digit then end their piece,
# and stay together
GPT2_DIGITS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
)
GPT2_NUMBERS = GPT2_DIGITS.replace(r"|\p{N}|", r"|\p{N}+|")
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

GGUF_SPLITS = {
    "gpt-2": GPT2,
    "default": GPT2,
    "smollm": GPT2_DIGITS,
    "llama-bpe": LLAMA3,
    "qwen2": QWEN2,
}
# far above any vocabulary's; a damaged file must not ask for terabytes
MAX_ID = 1 << 24
# types of a token in a GGUF vocabulary; 2 is unknown, 4 user-defined
NORMAL, CONTROL, UNUSED = 1, 3, 5


@dataclass(frozen=True, kw_only=True)
class ByteVocabulary:
    """Everything that determines a byte-level BPE tokenizer."""

    tokens: Mapping[str, int]
    """Text of a piece, in the byte alphabet -> id."""
    controls: Mapping[str, int]
    """Name -> id of the tokens that no text is encoded to."""
    merges: list[tuple[str, str]]
    """Pairs of pieces, the first to be joined first."""
    ranked: bool = False
    """There are no merges: any neighbours that make a token are joined, the lowest id first."""
    pattern: str
    """Regular expression whose matches are the words."""
    whole_words: bool
    """Take a word that is a token as it is, whatever the merges would make of it (LLaMA 3)."""
    nfc: bool
    """Bring texts to Unicode's normal form C first (Qwen)."""
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool


def from_gguf(path: Path) -> ByteVocabulary:
    """Read the vocabulary in a GGUF file's header.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no byte-level BPE vocabulary, or one of an unknown split.
    """
    fields = Fields(read_metadata(path), str(path))
    if not fields.has("tokenizer.ggml.model"):
        raise ValueError(f"{path} holds no tokenizer (no key tokenizer.ggml.model)")
    if fields.text("tokenizer.ggml.model") != "gpt2":
        fields.refuse(
            "tokenizer.ggml.model",
            "only gpt2 (byte-level BPE) and llama (sentencepiece) are read from GGUF; put the "
            "model's tokenizer.model or tokenizer.json beside it and name that in model.tokenizer",
        )
    split = fields.text("tokenizer.ggml.pre", "default")
    if split not in GGUF_SPLITS:
        fields.refuse("tokenizer.ggml.pre", f"it must be one of {', '.join(GGUF_SPLITS)}")
    texts = _texts(fields, "tokenizer.ggml.tokens")
    types = listed(fields, "tokenizer.ggml.token_type")
    if len(types) != len(texts):
        raise ValueError(f"{path}: {len(texts)} tokens but {len(types)} token types")
    normal = [kind == NORMAL for kind in types]
    llama3 = split == "llama-bpe"
    return ByteVocabulary(
        tokens={text: token for token, text in enumerate(texts) if normal[token]},
        controls={text: token for token, text in enumerate(texts) if not normal[token]},
        merges=merges_of(fields, "tokenizer.ggml.merges"),
        pattern=GGUF_SPLITS[split],
        whole_words=llama3,
        nfc=False,
        bos_id=_gguf_id(fields, "tokenizer.ggml.bos_token_id", len(texts)),
        eos_id=_gguf_id(fields, "tokenizer.ggml.eos_token_id", len(texts)),
        adds_bos=fields.boolean("tokenizer.ggml.add_bos_token", llama3),
    )


def from_json(path: Path) -> ByteVocabulary:
    """Read a tokenizer.json, with what tokenizer_config.json beside it declares.

    Raises:
        OSError: a file cannot be read.
        ValueError: it is damaged, or holds a component that is not supported.
    """
    root = Fields(read_json(path), str(path))
    model = Fields(root.mapping.get("model"), f"{path}: model")
    _check_model(model)
    vocab = vocabulary_of(model)
    declared = read_declared(path.parent)
    controls = declared.added | added_tokens(root)
    opens = _opening_token(root)
    names = {"bos": declared.bos or opens, "eos": declared.eos}
    for name in filter(None, names.values()):
        if name not in controls:
            raise ValueError(f"{path}: {name!r} begins or ends a sequence, but is no added token")
    return ByteVocabulary(
        tokens={text: token for text, token in vocab.items() if text not in controls},
        controls=controls,
        merges=merges_of(model, "merges"),
        pattern=_split(root),
        whole_words=model.boolean("ignore_merges", False),
        nfc=_nfc(root),
        bos_id=controls.get(names["bos"] or ""),
        eos_id=controls.get(names["eos"] or ""),
        adds_bos=opens is not None if declared.adds_bos is None else declared.adds_bos,
    )


def vocabulary_of(model: Fields) -> Mapping[str, int]:
    """Return the pieces under vocab: text -> id."""
    vocab = Fields(model.mapping.get("vocab"), f"{model.source}.vocab").mapping
    if not all(type(token) is int for token in vocab.values()):
        raise ValueError(f"{model.source}.vocab: every id must be a whole number")
    return vocab


def merges_of(fields: Fields, key: str) -> list[tuple[str, str]]:
    """Return the merges under key; each is written as "left right" or as a list of the two."""
    merges = []
    for index, merge in enumerate(listed(fields, key)):
        pair = tuple(merge.split(" ")) if isinstance(merge, str) else merge
        if not isinstance(pair, list | tuple) or [type(part) for part in pair] != [str, str]:
            raise ValueError(
                f"{fields.source}: {key}: entry {index} is {shown(merge)}; a merge joins two pieces"
            )
        merges.append((pair[0], pair[1]))
    return merges


def _texts(fields: Fields, key: str) -> list[str]:
    found = listed(fields, key)
    if not all(isinstance(text, str) for text in found):
        raise ValueError(f"{fields.source}: {key} must be a list of texts")
    return found


def listed(fields: Fields, key: str) -> list[Any]:
    """Return the list under key."""
    found = fields.mapping.get(key)
    if not isinstance(found, list):
        fields.refuse(key, "it must be a list")
    return found


def _gguf_id(fields: Fields, key: str, size: int) -> int | None:
    if not fields.has(key):
        return None
    if not 0 <= fields.integer(key) < size:
        fields.refuse(key, f"it must be a token id from 0 to {size - 1}")
    return fields.integer(key)


# what a tokenizer.json may say


def _check_model(model: Fields) -> None:
    kind = model.text("type", "BPE")
    if kind != "BPE":
        raise ValueError(
            f"{model.source}: a {kind} model is not supported, only BPE; if the model has a "
            f"sentencepiece tokenizer.model, put it beside this file"
        )
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.mapping.get(key):
            model.refuse(key, "only byte-level BPE without it is supported")


def added_tokens(root: Fields) -> dict[str, int]:
    """Return the added tokens, which all count as control tokens: no text is encoded to one."""
    added = {}
    for index, entry in enumerate(listed(root, "added_tokens") if root.has("added_tokens") else []):
        fields = Fields(entry, f"{root.source}: added_tokens[{index}]")
        name = fields.text("content")
        if not name.strip():
            fields.refuse("content", "added tokens made of blanks are not supported")
        added[name] = fields.integer("id")
        if not 0 <= added[name] <= MAX_ID:
            fields.refuse("id", f"it must be a token id from 0 to {MAX_ID}")
    return added


def _split(root: Fields) -> str:
    """The pattern that does what the steps of pre_tokenizer do."""
    steps = steps_of(root, "pre_tokenizer", "pretokenizers")
    kinds = [step.text("type") for step in steps]
    if kinds and kinds[-1] == "ByteLevel":
        *before, last = steps
        if last.boolean("add_prefix_space", True):
            last.refuse("add_prefix_space", "it must be false")
        words = last.boolean("use_regex", True)
        if not before and words:
            return GPT2
        if kinds[0] == "Digits" and len(before) == 1 and words:
            return GPT2_DIGITS if before[0].boolean("individual_digits", False) else GPT2_NUMBERS
        if kinds[0] == "Split" and len(before) == 1 and not words:
            return _isolated(before[0])
    raise ValueError(
        f"{root.source}: pre_tokenizer: the steps {', '.join(kinds) or 'none'} are not supported; "
        f"known are ByteLevel, Digits then ByteLevel, Split then ByteLevel without its regex"
    )


def _isolated(step: Fields) -> str:
    """The pattern of a Split whose matches, and what lies between them, are the words."""
    pattern = Fields(step.mapping.get("pattern"), f"{step.source}: pattern").text("Regex")
    if step.text("behavior") != "Isolated":
        step.refuse("behavior", "only Isolated is supported")
    if step.boolean("invert", False):
        step.refuse("invert", "only false is supported")
    return with_rest(pattern)


def with_rest(pattern: str) -> str:
    """Return a pattern that also matches what lies between the matches of a pattern."""
    return rf"{pattern}|(?:(?!{pattern})[\s\S])+"


def split_name(pattern: str) -> str | None:
    """Return GGUF's name of a split into words, if it has one."""
    return next(
        (name for name, own in GGUF_SPLITS.items() if pattern in (own, with_rest(own))), None
    )


def _nfc(root: Fields) -> bool:
    kinds = [step.text("type") for step in steps_of(root, "normalizer", "normalizers")]
    if kinds not in ([], ["NFC"]):
        raise ValueError(
            f"{root.source}: normalizer: {', '.join(kinds)} is not supported, only NFC or none"
        )
    return bool(kinds)


def _opening_token(root: Fields) -> str | None:
    """The token that post_processor puts before every sequence."""
    opening = None
    for step in steps_of(root, "post_processor", "processors"):
        kind = step.text("type")
        if kind not in ("ByteLevel", "TemplateProcessing"):
            raise ValueError(f"{root.source}: post_processor: {kind} is not supported")
        single = listed(step, "single") if kind == "TemplateProcessing" else []
        for first in single[:1]:
            if "SpecialToken" in Fields(first, f"{step.source}: single[0]").mapping:
                opening = Fields(first["SpecialToken"], f"{step.source}: single[0]").text("id")
    return opening


def steps_of(root: Fields, key: str, inner: str) -> list[Fields]:
    """Return a component of tokenizer.json as a flat list: none, itself, or a Sequence's steps."""
    if not root.has(key):
        return []
    source = f"{root.source}: {key}"
    whole = Fields(root.mapping[key], source)
    if whole.text("type") != "Sequence":
        return [whole]
    return [
        Fields(step, f"{source}: {inner}[{index}]")
        for index, step in enumerate(listed(whole, inner))
    ]
