"""Where a tokenizer is found, and what is said of a file that cannot be read."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioinstruct.model.gguf_header import read_metadata
from bioinstruct.model.tokenizers.bpe_files import from_json
from bioinstruct.model.tokenizers.tokenizer import load_tokenizer

TOKENIZERS = Path(__file__).parent.parent / "data" / "tokenizers"
SENTENCEPIECE = (TOKENIZERS / "stories260K_tok512.model").read_bytes()
JSON = (TOKENIZERS / "digits_bpe" / "tokenizer.json").read_bytes()
LLAMA3 = (TOKENIZERS / "llama3_bpe" / "tokenizer.json").read_bytes()

SMALL: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|end|>", "a", "b", "ab", "1", "\u0120"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 0,
}


def gguf(entries: dict[str, Any], version: int = 3) -> bytes:
    """A GGUF file without tensors, written by the format's description."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def typed(value: Any) -> tuple[int, bytes]:
        if isinstance(value, bool):
            return 7, struct.pack("<?", value)
        if isinstance(value, int):
            return 5, struct.pack("<i", value)
        if isinstance(value, float):
            return 6, struct.pack("<f", value)
        if isinstance(value, str):
            return 8, text(value)
        kinds = [typed(item) for item in value]
        kind = kinds[0][0] if kinds else 8
        return 9, struct.pack("<IQ", kind, len(value)) + b"".join(body for _, body in kinds)

    rows = [(text(name), *typed(value)) for name, value in entries.items()]
    head = b"GGUF" + struct.pack("<IQQ", version, 0, len(rows))
    return head + b"".join(name + struct.pack("<I", kind) + body for name, kind, body in rows)


def test_the_kind_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    for content, kind in ((SENTENCEPIECE, "sentencepiece"), (JSON, "bpe"), (gguf(SMALL), "bpe")):
        (tmp_path / "vocabulary.dat").write_bytes(content)
        assert load_tokenizer(tmp_path / "vocabulary.dat").kind == kind


def test_a_folder_gives_its_first_kind_and_says_which(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(gguf(SMALL))
    assert load_tokenizer(tmp_path).source.name == "model.gguf"
    (tmp_path / "tokenizer.json").write_bytes(JSON)
    assert load_tokenizer(tmp_path).source.name == "tokenizer.json"
    (tmp_path / "x.model").write_bytes(SENTENCEPIECE)
    assert load_tokenizer(tmp_path).source.name == "x.model"
    (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE)
    assert load_tokenizer(tmp_path).source.name == "tokenizer.model"


def test_the_folder_above_is_looked_into_too(tmp_path: Path) -> None:
    weights = tmp_path / "model" / "weights" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"")
    (weights.parent.parent / "tokenizer.model").write_bytes(SENTENCEPIECE)
    # a weights file stands for its folder
    for path in (weights.parent, weights):
        assert load_tokenizer(path).source.parent.name == "model"


def test_a_gguf_file_in_the_folder_above_is_another_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "other.gguf").write_bytes(gguf(SMALL))
    with pytest.raises(ValueError, match="no tokenizer was found"):
        load_tokenizer(tmp_path / "model")


def test_without_a_tokenizer_what_was_looked_for_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"no tokenizer was found in .*model\.tokenizer, --tokenizer\)$"
    ) as told:
        load_tokenizer(tmp_path / "model")
    for pattern in ("tokenizer.model", "*.model", "tokenizer.json", "*.gguf"):
        assert pattern in str(told.value)


def test_several_files_must_be_the_same_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(gguf(SMALL))
    # another quantisation of the same model
    (tmp_path / "b.gguf").write_bytes(gguf({"general.file_type": 3} | SMALL))
    assert load_tokenizer(tmp_path).source.name == "a.gguf"
    (tmp_path / "c.gguf").write_bytes(gguf(SMALL | {"tokenizer.ggml.merges": []}))
    with pytest.raises(ValueError, match=r"several tokenizers that differ: a\.gguf, b\.gguf, c"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty, and no tokenizer"),
        (b"IQ== 0\nIg== 1\n", "holds 2 tokens; of tiktoken-format files only Llama 3's is known"),
        (b"IQ== 0\nIg== 2\n", ":2: 'Ig== 2' must be new bytes in base64 and the rank 1"),
        (b"IQ== 0\nIQ== 1\n", ":2: 'IQ== 1' must be new bytes"),
        (b"IQ== 0\n!! 1\n", ":2: '!! 1' must be new bytes in base64"),
        (b"IQ== 0\nIg==\n", ":2: 'Ig==' must be new bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "is a Git LFS pointer"),
        (b"\x80\x02}q\x00", "not a sentencepiece model .*, not a JSON file, not a GGUF file"),
        (b"[1, 2]", "not a sentencepiece model"),
        (b"the\nof\nand\n", "not a sentencepiece model"),
        (b'{"model": ', r"line 1, column 11: not valid JSON \(Expecting value\)"),
        (b'\xef\xbb\xbf{"a": "\xff"}', "not UTF-8 text"),
        (b"{}", r"tokenizer: model: expected named settings, found None"),
        (b"GGUF", "damaged or incomplete GGUF"),
        (b"GGUF\x01\x00\x00\x00" + bytes(16), "is GGUF version 1; versions 2 and 3"),
        (b"GGUF\x00\x00\x00\x03" + bytes(16), "is GGUF version 50331648; .* little-endian"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer").write_bytes(content)
    with pytest.raises(ValueError, match=message) as told:
        load_tokenizer(tmp_path / "tokenizer")
    assert str(tmp_path / "tokenizer") in str(told.value)


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file or folder"):
        load_tokenizer(tmp_path / "nowhere")


# tokenizer.json


def changed(place: str, value: object) -> dict[str, Any]:
    """The small tokenizer.json with one entry replaced, or taken out where value is None."""
    root: dict[str, Any] = json.loads(JSON)
    *path, last = place.split(".")
    inner: Any = root
    for key in path:
        inner = inner[int(key) if key.isdecimal() else key]
    inner[int(last) if last.isdecimal() else last] = value
    return root


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
SPLIT = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}


def sequence(*steps: object) -> dict[str, object]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("model.type", "Unigram", "model: a Unigram model is not supported"),
        ("model.type", "WordPiece", "model: a WordPiece model is not supported"),
        ("model.byte_fallback", True, "pre_tokenizer: Digits is not supported in a sent"),
        ("model.dropout", 0.1, "model: dropout is 0.1; only byte-level BPE without it"),
        ("model.continuing_subword_prefix", "##", "continuing_subword_prefix is '##'"),
        ("model.end_of_word_suffix", "</w>", "end_of_word_suffix is '</w>'"),
        ("model.vocab", [], "model.vocab: expected named settings"),
        ("model.vocab", {"a": "1"}, "model.vocab: every id must be a whole number"),
        ("model.merges", None, "model: merges is None; it must be a list"),
        ("model.merges", ["a b c"], "merges: entry 0 is 'a b c'; a merge joins two pieces"),
        ("model.merges", [["a"]], r"merges: entry 0 is \['a'\]"),
        ("model.merges", [["a", 1]], r"merges: entry 0 is \['a', 1\]"),
        ("model.merges", [3], "merges: entry 0 is 3"),
        ("model.ignore_merges", "no", "ignore_merges is 'no'; it must be true or false"),
        ("pre_tokenizer", None, "the steps none are not supported"),
        ("pre_tokenizer", {"type": "Metaspace"}, "the steps Metaspace are not supported"),
        ("pre_tokenizer", {"kind": 1}, "pre_tokenizer: the key type is missing"),
        ("pre_tokenizer", sequence(BYTE_LEVEL, BYTE_LEVEL), "ByteLevel, ByteLevel are not"),
        ("pre_tokenizer", sequence(SPLIT, BYTE_LEVEL), "Split, ByteLevel are not supported"),
        ("pre_tokenizer", sequence({"type": "Punctuation"}, BYTE_LEVEL), "Punctuation, ByteLevel"),
        ("pre_tokenizer", BYTE_LEVEL | {"add_prefix_space": True}, "it must be false"),
        ("pre_tokenizer", {"type": "Sequence"}, "pretokenizers is None; it must be a list"),
        ("normalizer", {"type": "Lowercase"}, "normalizer: Lowercase is not supported, only NFC"),
        ("post_processor", {"type": "BertProcessing"}, "BertProcessing is not supported"),
        ("added_tokens.0.content", "  ", "added tokens made of blanks are not supported"),
        ("added_tokens.0.content", 5, r"added_tokens\[0\]: content is 5; it must be a string"),
        ("added_tokens.0.id", None, r"added_tokens\[0\]: the key id is missing"),
        ("added_tokens.0", "x", r"added_tokens\[0\]: expected named settings"),
        ("added_tokens", {}, "added_tokens is {}; it must be a list"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, place: str, value: object, message: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(changed(place, value)))
    with pytest.raises(ValueError, match=message) as told:
        load_tokenizer(tmp_path)
    assert str(path) in str(told.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"behavior": "Removed"}, "behavior is 'Removed'; only Isolated is supported"),
        ({"invert": True}, "invert is True; only false is supported"),
        ({"pattern": {"String": " "}}, "pattern: the key Regex is missing"),
        ({"pattern": {"Regex": "("}}, "the pattern that splits words cannot be read"),
    ],
)
def test_a_split_that_is_not_supported_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    steps = sequence(SPLIT | change, BYTE_LEVEL | {"use_regex": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed("pre_tokenizer", steps)))
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_what_lies_between_the_matches_of_a_split_is_kept(tmp_path: Path) -> None:
    split = SPLIT | {"pattern": {"Regex": "[a-z]+"}}
    steps = sequence(split, BYTE_LEVEL | {"use_regex": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed("pre_tokenizer", steps)))
    tokenizer = load_tokenizer(tmp_path)
    text = "12 abc \u764c\n\n (x)"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("steps", [BYTE_LEVEL, sequence(BYTE_LEVEL), {"type": "Digits"}])
def test_the_known_splits_are_read(tmp_path: Path, steps: dict[str, object]) -> None:
    given = sequence(steps, BYTE_LEVEL) if steps["type"] == "Digits" else steps
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed("pre_tokenizer", given)))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a  12 b")) == "a  12 b"


def test_merges_are_read_in_both_spellings(tmp_path: Path) -> None:
    root = json.loads(JSON)
    root["model"]["merges"] = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in root["model"]["merges"]
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(root))
    assert (
        from_json(tmp_path / "tokenizer.json").merges
        == from_json(TOKENIZERS / "digits_bpe" / "tokenizer.json").merges
    )


def test_bos_as_the_post_processor_adds_it(tmp_path: Path) -> None:
    single = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A"}}]
    root = json.loads(LLAMA3)
    template = {"type": "TemplateProcessing", "single": single}
    root["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(root))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.adds_bos, tokenizer.bos_id, tokenizer.eos_id) == (True, 1, None)
    # tokenizer_config.json has the last word
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert not load_tokenizer(tmp_path).adds_bos


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected named settings"),
        ('{"add_bos_token": "yes"}', "add_bos_token is 'yes'; it must be true or false"),
        ('{"eos_token": 3}', "eos_token is 3; it must be a string"),
        ('{"eos_token": {"id": 3}}', "eos_token: the key content is missing"),
        ('{"eos_token": "<eot>"}', "'<eot>' begins or ends a sequence, but is no added token"),
        ('{"added_tokens_decoder": {"x": {}}}', "added_tokens_decoder: 'x' is not a token id"),
        ('{"added_tokens_decoder": {"99999999": {}}}', "'99999999' is not a token id"),
        ('{"added_tokens_decoder": {"1": {}}}', "1: the key content is missing"),
        ('{"added_tokens_decoder": []}', "expected named settings"),
    ],
)
def test_a_wrong_tokenizer_config_is_refused(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(JSON)
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


# GGUF


def test_a_gguf_vocabulary_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(SMALL))
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("ab  1ba") == [3, 5, 5, 4, 2, 1]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (None, 0, False)
    assert tokenizer.control_id("<|end|>") == 0
    path.write_bytes(
        gguf(SMALL | {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.pre": "llama-bpe"})
    )
    assert load_tokenizer(path).adds_bos
    path.write_bytes(
        gguf(SMALL | {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.add_bos_token": True})
    )
    assert load_tokenizer(path).adds_bos


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "tekken"}, "pre is 'tekken'; it must be one of gpt-2, .*qwen2"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores is None; it must be a list"),
        ({"tokenizer.ggml.model": 3}, "tokenizer.ggml.model is 3; it must be a string"),
        ({"tokenizer.ggml.model": None}, r"holds no tokenizer \(no key tokenizer.ggml.model\)"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is None; it must be a list"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens must be a list of texts"),
        ({"tokenizer.ggml.tokens": "ab"}, "tokenizer.ggml.tokens is 'ab'; it must be a list"),
        ({"tokenizer.ggml.token_type": [1]}, "6 tokens but 1 token types"),
        ({"tokenizer.ggml.token_type": None}, "token_type is None; it must be a list"),
        ({"tokenizer.ggml.merges": ["ab"]}, "entry 0 is 'ab'; a merge joins two pieces"),
        ({"tokenizer.ggml.merges": ["b a"]}, "merge 0 joins 'b' and 'a', but 'ba' is no token"),
        ({"tokenizer.ggml.eos_token_id": 6}, "eos_token_id is 6; .* from 0 to 5"),
        ({"tokenizer.ggml.eos_token_id": -1}, "eos_token_id is -1; .* from 0 to 5"),
        ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token is 1; it must be true or false"),
    ],
)
def test_a_wrong_gguf_vocabulary_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    entries = {key: value for key, value in (SMALL | change).items() if value is not None}
    (tmp_path / "model.gguf").write_bytes(gguf(entries))
    with pytest.raises(ValueError, match=message) as told:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "model.gguf") in str(told.value)


def test_metadata_of_every_type_are_read(tmp_path: Path) -> None:
    entries = {"b": True, "i": -3, "f": 0.5, "t": "\u764c", "e": [], "l": [1, 2], "n": [["a"], []]}
    (tmp_path / "a.gguf").write_bytes(gguf(entries, version=2))
    assert read_metadata(tmp_path / "a.gguf") == entries


def test_metadata_equal_those_of_the_gguf_package(smollm2: Path) -> None:
    gguf_package = pytest.importorskip("gguf")
    ours = read_metadata(smollm2)
    theirs = gguf_package.GGUFReader(smollm2).fields
    assert set(ours) == {name for name in theirs if not name.startswith("GGUF.")}
    assert all(ours[name] == theirs[name].contents() for name in ours)


@settings(max_examples=150)
@given(st.data())
def test_a_damaged_gguf_header_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject
) -> None:
    whole = gguf(SMALL)
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    cut = draw.draw(st.integers(4, len(whole) - 1))
    path.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match="damaged or incomplete GGUF"):
        read_metadata(path)
    junk = bytearray(whole)
    for _ in range(draw.draw(st.integers(1, 4))):
        junk[draw.draw(st.integers(4, len(whole) - 1))] = draw.draw(st.integers(0, 255))
    path.write_bytes(junk)
    try:
        load_tokenizer(path).encode("ab 1")
    except ValueError as error:
        assert str(path) in str(error)
