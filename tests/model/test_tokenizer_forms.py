"""One tokenizer in several forms of file: the ids are the same, and broken forms are refused."""

import base64
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from bioinstruct.model.tokenizers import tiktoken_file
from bioinstruct.model.tokenizers.bpe_tokenizer import ByteBPE
from bioinstruct.model.tokenizers.tokenizer import Tokenizer, load_tokenizer

DATA = Path(__file__).parent.parent / "data" / "tokenizers"
STORIES = load_tokenizer(DATA / "stories260K_tok512.model")
JSON = load_tokenizer(DATA / "stories260k_json")
# the shipped model removes blanks at the ends and in runs, the JSON form of it does not
words = st.lists(st.text("abcdeht onupi.,\u00e9\u03b2\n19", min_size=1), max_size=8).map(
    lambda parts: " ".join(" ".join(parts).split(" ")).strip(" ").replace("  ", "")
)


def gguf_of(model: Path, out: Path, **changes: Any) -> Path:
    """Write a sentencepiece model as a GGUF header, with the gguf package."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    size = processor.vocab_size()
    kinds = [
        2
        if processor.is_unknown(i)
        else 3
        if processor.is_control(i)
        else 6
        if processor.is_byte(i)
        else 1
        for i in range(size)
    ]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([processor.id_to_piece(i) for i in range(size)])
    writer.add_token_scores(changes.get("scores", [processor.get_score(i) for i in range(size)]))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(changes.get("bos", 1))
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(changes.get("adds_bos", True))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return out


@given(words)
@settings(max_examples=200)
def test_the_json_form_gives_the_ids_of_the_model(text: str) -> None:
    assert JSON.encode(text) == STORIES.encode(text)
    assert JSON.encode_continuation(text) == STORIES.encode_continuation(text)


def test_the_json_form_knows_its_control_tokens() -> None:
    assert (JSON.kind, JSON.vocab_size, JSON.bos_id, JSON.eos_id) == ("sentencepiece", 512, 1, 2)
    assert JSON.adds_bos and JSON.lossless
    assert JSON.control_ids == {0, 1, 2}
    assert JSON.encode("<s> </s>") != [1, 2]
    assert JSON.decode(JSON.encode(" two  blanks ")) == " two  blanks "


def changed(tmp_path: Path, place: str, value: object) -> Path:
    root = json.loads((DATA / "stories260k_json" / "tokenizer.json").read_text())
    inner = root
    *path, last = place.split(".")
    for key in path:
        inner = inner[key]
    inner[last] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(root))
    return tmp_path / "tokenizer.json"


METASPACE = {"type": "Metaspace", "replacement": "\u2581", "split": False}


@pytest.mark.parametrize(
    ("step", "prefix"),
    [
        (METASPACE | {"prepend_scheme": "first"}, True),
        (METASPACE | {"prepend_scheme": "always"}, True),
        (METASPACE | {"prepend_scheme": "never"}, False),
        (METASPACE | {"add_prefix_space": True}, True),
        (METASPACE | {"add_prefix_space": False}, False),
    ],
)
def test_metaspace_is_the_newer_spelling(
    tmp_path: Path, step: dict[str, object], prefix: bool
) -> None:
    changed(tmp_path, "normalizer", None)
    path = tmp_path / "tokenizer.json"
    root = json.loads(path.read_text()) | {"pre_tokenizer": step}
    path.write_text(json.dumps(root))
    found = load_tokenizer(path)
    expected = JSON.encode if prefix else JSON.encode_continuation
    assert found.encode("once upon a time") == expected("once upon a time")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("model.vocab", {"a": 1}, "model.vocab: the ids must be 0 to 0, each once"),
        ("model.vocab", {"a": 0, "b": 0}, "the ids must be 0 to 1"),
        ("model.merges", [], "no merge makes the token .* no sentencepiece vocabulary"),
        ("model.merges", 3, "merges is 3; it must be a list"),
        ("normalizer", {"type": "NFKC"}, "normalizer: NFKC is not supported beside merges"),
        ("pre_tokenizer", {"type": "ByteLevel"}, "pre_tokenizer: ByteLevel is not supported"),
        ("pre_tokenizer", METASPACE | {"split": True}, "only Metaspace that does not split"),
        ("added_tokens", 3, "added_tokens is 3; it must be a list"),
    ],
)
def test_a_json_that_is_no_sentencepiece_model_is_refused(
    tmp_path: Path, place: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_tokenizer(changed(tmp_path, place, value))


def test_a_way_that_the_merges_leave_out_is_noticed(tmp_path: Path) -> None:
    root = json.loads((DATA / "stories260k_json" / "tokenizer.json").read_text())
    merges = [
        tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in root["model"]["merges"]
    ]
    twice = next(b for a, b in pairwise(merges) if "".join(a) == "".join(b))
    path = changed(tmp_path, "model.merges", [m for m in merges if m != twice])
    with pytest.raises(ValueError, match="is made in some ways but not of"):
        load_tokenizer(path)


# ---- GGUF --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def from_gguf(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return load_tokenizer(gguf_of(DATA / "stories260K_tok512.model", path))


def test_the_gguf_form_gives_the_ids_of_the_model(from_gguf: Tokenizer) -> None:
    rows = json.loads((DATA / "golden_stories260k_json.json").read_text())["rows"]
    assert len(rows) >= 40
    for row in rows:
        assert from_gguf.encode(row["text"]) == row["ids"], row["text"]
    assert (from_gguf.bos_id, from_gguf.eos_id, from_gguf.adds_bos) == (1, 2, True)
    assert from_gguf.control_ids == {0, 1, 2}


def test_mistral_s_tokenizer_survives_gguf(shared_data: Path, tmp_path: Path) -> None:
    model = shared_data / "tokenizers" / "mistral_instruct_tokenizer_240323.model.v3"
    (tmp_path / "m.model").write_bytes(model.read_bytes())
    original = load_tokenizer(tmp_path / "m.model")
    found = load_tokenizer(gguf_of(model, tmp_path / "m.gguf"))
    rows = json.loads((DATA / "golden_llama3_bpe.json").read_text())["rows"]
    for row in rows:
        assert found.encode(row["text"]) == original.encode(row["text"]), row["text"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [0.0]}, "512 tokens, 1 scores and 512 token types"),
        ({"bos": 600}, "bos_token_id is 600; there are 512 tokens"),
    ],
)
def test_a_wrong_gguf_vocabulary(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = gguf_of(DATA / "stories260K_tok512.model", tmp_path / "m.gguf", **changes)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(path)


# ---- tiktoken's format -------------------------------------------------------------------------

SMALL = [bytes([b]) for b in range(256)] + [
    *[b" t", b"he", b" the", b"in", b"ing", b"aa", b"aaa", b" a", b"123"],
    *["\u03b2".encode(), b"  ", b"the"],
]


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small file in tiktoken's format, taken for Llama 3's."""
    monkeypatch.setattr(tiktoken_file, "NUM_TOKENS", len(SMALL))
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(SMALL)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    return tmp_path / "tokenizer.model"


def by_ranks(word: bytes) -> list[int]:
    """Join the neighbours whose bytes have the lowest rank, until none have one."""
    order = {token: rank for rank, token in enumerate(SMALL)}
    if word in order:
        return [order[word]]
    parts = [bytes([b]) for b in word]
    while True:
        pairs = [(order[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in order]
        if not pairs:
            return [order[part] for part in parts]
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.mark.parametrize("word", ["the", " the", "inging", "aaaaa", " thing", "\u03b2", "\u03b1"])
def test_llama_3_s_file_joins_by_rank(ranks: Path, word: str) -> None:
    found = load_tokenizer(ranks)
    assert found.kind == "bpe"
    assert found.encode(word) == by_ranks(word.encode())


def test_llama_3_s_control_tokens_stand_behind(ranks: Path) -> None:
    found, first = load_tokenizer(ranks), len(SMALL)
    assert found.vocab_size == first + 256
    assert (found.bos_id, found.eos_id, found.adds_bos) == (first, first + 1, True)
    named = {
        "<|start_header_id|>": 6,
        "<|end_header_id|>": 7,
        "<|eot_id|>": 9,
        "<|reserved_special_token_0|>": 2,
        "<|reserved_special_token_2|>": 11,
        "<|reserved_special_token_246|>": 255,
    }
    assert {name: found.control_id(name) for name in named} == {
        name: first + place for name, place in named.items()
    }
    assert found.encode("<|eot_id|>")[0] < first


def test_ranks_written_as_merges_give_the_same_ids(ranks: Path) -> None:
    found = load_tokenizer(ranks)
    assert isinstance(found, ByteBPE)
    merges = [tuple(merge.split(" ")) for merge in found.gguf_words().merges or ()]
    assert ("a", "aa") in merges and ("aa", "a") in merges
    assert found.gguf_words().pre == "llama-bpe"
