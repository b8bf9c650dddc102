"""Our GGUF files in llama.cpp: what it generated and how it tokenized, against ours.

data/llama_cpp_golden/make.py made the numbers; llama.cpp is not needed here. The files are written
anew, so a change of what we write shows: then let llama.cpp read it again.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bioinstruct.model.checkpoint import open_checkpoint
from bioinstruct.model.checkpoint_cli import command
from bioinstruct.model.generate import generate
from bioinstruct.model.llama import Llama, pack_documents
from bioinstruct.model.tokenizers.tokenizer import load_tokenizer

HERE = Path(__file__).parents[1] / "data"
GOLDEN = HERE / "llama_cpp_golden"
GREEDY: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(
    (GOLDEN / "greedy.json").read_text("utf-8")
)
TOKENS: dict[str, dict[str, list[int]]] = json.loads((GOLDEN / "tokens.json").read_text("utf-8"))
TEXTS: list[str] = [
    row["text"]
    for row in json.loads((HERE / "tokenizers" / "golden_llama3_bpe.json").read_text())["rows"]
]
# a choice that hangs on less says nothing: llama.cpp rounds activations as it does the weights
CLEAR = {"f32": 1e-3, "f16": 0.02, "q8_0": 0.4}
SMALL = [name for name in GREEDY if name != "smollm2"]


def export(source: Path, tokenizer: Path | None, out: Path, kind: str) -> None:
    words = [] if tokenizer is None else ["--tokenizer", str(tokenizer)]
    command.main(
        ["export-gguf", str(source), str(out), "--type", kind, *words], standalone_mode=False
    )


@torch.inference_mode()
def check(path: Path, rows: list[dict[str, Any]], kind: str) -> int:
    """Compare with every row; the number of choices that were clear."""
    checkpoint = open_checkpoint(path)
    model = Llama(checkpoint.config)
    checkpoint.load_into(model.destinations())
    compared = 0
    for row in rows:
        prompt, tokens = row["prompt"], row["tokens"]
        assert len(tokens) >= 48
        ours = generate(model, [prompt], max_new_tokens=len(tokens), end_ids=[])[0].ids
        assert (ours == tokens) == row["ours"]
        logits = model.logits(pack_documents([[*prompt, *tokens[:-1]]]))[len(prompt) - 1 :]
        clear = torch.tensor(row["margins"]) > CLEAR[kind]
        assert torch.equal(logits.argmax(1)[clear], torch.tensor(tokens)[clear])
        compared += int(clear.sum())
    return compared


@pytest.mark.parametrize("kind", CLEAR)
@pytest.mark.parametrize("name", SMALL)
def test_llama_cpp_s_choices_are_ours(data: Path, tmp_path: Path, name: str, kind: str) -> None:
    source, tokenizer = data / "families" / name, GOLDEN / "words.json"
    if name == "stories260K":
        source, tokenizer = data / name, data / "tokenizers" / "stories260K_tok512.model"
    shutil.copytree(source, tmp_path / name)
    config = tmp_path / name / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sliding_window": None}))
    export(tmp_path / name, tokenizer, tmp_path / "m.gguf", kind)
    compared = check(tmp_path / "m.gguf", GREEDY[name][kind], kind)
    assert compared > (40 if kind == "q8_0" else 80)


@pytest.mark.parametrize("name", GREEDY)
def test_whole_texts_are_llama_cpp_s(name: str) -> None:
    """All of float32 and float16; of the 8-bit files those where no choice hangs on a hair."""
    for kind, rows in GREEDY[name].items():
        same = [row["ours"] for row in rows]
        assert any(same) if kind == "q8_0" else all(same)


def test_smollm2_goes_on_as_in_llama_cpp(smollm2: Path, tmp_path: Path) -> None:
    export(smollm2, None, tmp_path / "m.gguf", "q8_0")
    assert check(tmp_path / "m.gguf", GREEDY["smollm2"]["q8_0"], "q8_0") > 60


@pytest.mark.parametrize(
    "name", ["stories260k_json", "digits_bpe", "llama3_bpe", "qwen2_bpe", "gpt2_bpe"]
)
def test_llama_cpp_gives_every_text_our_ids(name: str) -> None:
    assert len(TEXTS) >= 40
    assert TOKENS[name] == {}


@pytest.mark.parametrize("name", ["mistral", "llama3"])
def test_real_vocabularies_of_32768_and_128256_tokens(name: str) -> None:
    assert TOKENS[name] == {}


def test_smollm2_differs_only_where_bytes_are_no_tokens() -> None:
    # its vocabulary lacks U+0004; what is left of a word without it, libraries do not agree on
    assert len(TOKENS["smollm2"]) == 1
    assert all("\x04" in text for text in TOKENS["smollm2"])


def test_llama_cpp_keeps_the_blanks_that_one_tokenizer_removes(data: Path) -> None:
    """sentencepiece's remove_extra_whitespaces has no form in GGUF; LLaMA's and Mistral's keep."""
    removing = load_tokenizer(data / "tokenizers" / "stories260K_tok512.model")
    keeping = load_tokenizer(data / "tokenizers" / "stories260k_json" / "tokenizer.json")
    assert TOKENS["stories260k"]
    for text in filter(None, TEXTS):
        found = TOKENS["stories260k"].get(text, removing.encode(text))
        assert found == keeping.encode(text)
