"""Makes the golden files beside it, with llama.cpp; no test runs it.

    python tests/data/llama_cpp_golden/make.py            make the files anew
    python tests/data/llama_cpp_golden/make.py --check    compare the files with what it says now
    ... --smollm2 FILE.gguf --mistral TOKENIZER.model --llama3 TOKENIZER.model

It needs this project and llama-cpp-python, built from its source distribution, in one environment,
which should be a throwaway one. The models and tokenizers in this repository are always asked, the
larger ones where they are named.

words.json       a tokenizer of 96 tokens, for the tiny models of ../families
greedy.json      model -> type of the file that we exported -> for each prompt the 48 tokens that
                 llama.cpp puts behind it; by how much each won over the next best (margins); and
                 whether ours from the same file are the same (ours), also where we round
                 activations as llama.cpp does (rounded)
tokens.json      tokenizer, in a file that we exported -> the ids that llama.cpp gives the texts of
                 ../tokenizers, where they are not ours; empty where all are equal
made.json        versions; number of texts; and the largest absolute difference of logits, of ours
                 in float32, and of ours with rounded activations

llama.cpp rounds activations to float16 before it multiplies them with float16 weights, and to
blocks of 8 bits for q8_0. The tiny models are random, so that their choices often hang on less.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import gguf
import numpy as np
import torch
from torch import Tensor

from bioinstruct.kernels import lora_linear
from bioinstruct.model.checkpoint import open_checkpoint, save_checkpoint
from bioinstruct.model.checkpoint_cli import command
from bioinstruct.model.formats.config_json import config_from_hf
from bioinstruct.model.generate import generate
from bioinstruct.model.llama import Llama, pack_documents
from bioinstruct.model.merging import merged_tensors
from bioinstruct.model.tokenizers.bpe_files import GPT2, QWEN2
from bioinstruct.model.tokenizers.tokenizer import Tokenizer, load_tokenizer

HERE = Path(__file__).parent
DATA = HERE.parent
FAMILIES = ("llama", "llama3", "wide_heads", "mistral", "qwen2", "qwen3")
STORIES = DATA / "tokenizers" / "stories260K_tok512.model"
STORY = [1, 403, 407, 261, 378]  # Once upon a time
BPE = DATA / "tokenizers" / "llama3_bpe" / "tokenizer.json"
TOKENIZERS = {
    "stories260k": STORIES,
    "stories260k_json": DATA / "tokenizers" / "stories260k_json" / "tokenizer.json",
    "digits_bpe": DATA / "tokenizers" / "digits_bpe" / "tokenizer.json",
    "llama3_bpe": BPE,
}
SPLITS = {"qwen2_bpe": QWEN2, "gpt2_bpe": GPT2}
KINDS = ("f32", "f16", "q8_0")
NEW = 48
QUESTIONS = (
    "<|im_start|>user\nWhat is ataxia?<|im_end|>\n<|im_start|>assistant\n",
    "Metformin is a drug that",
)


def texts() -> list[str]:
    """The hard texts of the tokenizers' golden files."""
    rows = json.loads((DATA / "tokenizers" / "golden_llama3_bpe.json").read_text("utf-8"))["rows"]
    return [row["text"] for row in rows]


def export(model: Path, tokenizer: Path | None, out: Path, kind: str) -> Path:
    """Write a GGUF file by the project's own command."""
    words = [] if tokenizer is None else ["--tokenizer", str(tokenizer)]
    flags = ["export-gguf", str(model), str(out), "--type", kind, *words]
    command.main(flags, standalone_mode=False)
    return out


def theirs(path: Path, **settings: Any) -> Any:
    """Open a file in llama.cpp, with keys and values in float32."""
    plain = {"n_threads": 1, "n_threads_batch": 1, "verbose": False, "type_k": 0, "type_v": 0}
    size = {"n_ctx": 96, "logits_all": True}
    return import_module("llama_cpp").Llama(str(path), **plain | size | settings)


def ours(path: Path) -> Llama:
    """Open a file in this project, in float32."""
    checkpoint = open_checkpoint(path)
    model = Llama(checkpoint.config)
    checkpoint.load_into(model.destinations())
    return model


def their_greedy(model: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Tokens that llama.cpp puts behind a prompt, end tokens included, and their margins."""
    found: list[int] = []
    margins = []
    model.reset()
    model.eval(prompt)
    while len(found) < NEW:
        logits = model.scores[model.n_tokens - 1]
        found.append(int(np.argmax(logits)))
        second, first = np.sort(logits)[-2:]
        margins.append(float(first - second))
        model.eval(found[-1:])
    return found, margins


@torch.inference_mode()
def our_greedy(model: Llama, prompt: list[int]) -> list[int]:
    """The same of ours."""
    return generate(model, [prompt], max_new_tokens=NEW, end_ids=[])[0].ids


@torch.inference_mode()
def logit_error(model: Llama, other: Any, ids: list[int]) -> float:
    """Largest difference of the logits of a text."""
    other.reset()
    other.eval(ids)
    return float(
        np.abs(model.logits(pack_documents([ids])).numpy() - other.scores[: len(ids)]).max()
    )


def as_llama_cpp_rounds(x: Tensor, kind: str) -> Tensor:
    """What llama.cpp multiplies weights of a type with, in place of x."""
    if kind == "q8_0" and x.shape[-1] % 32 == 0:
        blocks = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType.Q8_0)
        return torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))
    return x if kind == "f32" else x.half().float()


@contextmanager
def rounding(kind: str) -> Iterator[None]:
    """Let our model round what it multiplies with its weights."""

    def linear(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        return lora_linear(as_llama_cpp_rounds(x, kind), weight, *rest)

    plain = Llama.forward

    def forward(self: Llama, *arguments: Any) -> Tensor:
        # what the head multiplies
        return as_llama_cpp_rounds(plain(self, *arguments), kind)

    with (
        mock.patch("bioinstruct.model.llama.lora_linear", linear),
        mock.patch.object(Llama, "forward", forward),
    ):
        yield


def row_of(model: Llama, other: Any, prompt: list[int], kind: str) -> tuple[dict[str, Any], Any]:
    """One row of greedy.json, and the largest differences of the logits."""
    tokens, margins = their_greedy(other, prompt)
    row = {"prompt": prompt, "tokens": tokens, "margins": [round(m, 4) for m in margins]}
    text = [*prompt, *tokens[:-1]]
    row["ours"], error = our_greedy(model, prompt) == tokens, logit_error(model, other, text)
    with rounding(kind):
        row["rounded"] = our_greedy(model, prompt) == tokens
        return row, (error, logit_error(model, other, text))


def prompts_of(name: str, path: Path) -> list[list[int]]:
    """What a model is to continue."""
    if name == "smollm2":
        tokenizer = load_tokenizer(path)
        return [tokenizer.encode(question) for question in QUESTIONS]
    if name == "stories260K":
        return [STORY, STORY[:3]]
    random, size = Random(0), open_checkpoint(path).config.vocab_size
    return [[random.randrange(size) for _ in range(4)] for _ in range(4)]


def models(folder: Path, smollm2: Path | None) -> dict[str, tuple[Path, Path | None]]:
    """Each model's folder or file, and its tokenizer where it is not there."""
    found: dict[str, tuple[Path, Path | None]] = {"stories260K": (DATA / "stories260K", STORIES)}
    for name in FAMILIES:
        shutil.copytree(DATA / "families" / name, folder / name)
        path = folder / name / "config.json"
        # a window of 16 tokens has no form in GGUF, and leaves no room
        config = json.loads(path.read_text()) | {"sliding_window": None}
        path.write_text(json.dumps(config))
        found[name] = folder / name, HERE / "words.json"
    return found | ({"smollm2": (smollm2, None)} if smollm2 else {})


def greedy(folder: Path, smollm2: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Content of greedy.json, and the largest differences of logits."""
    rows: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    for name, (source, tokenizer) in models(folder, smollm2).items():
        rows[name], errors[name] = {}, {}
        for kind in KINDS:
            path = export(source, tokenizer, folder / "model.gguf", kind)
            other, model = theirs(path), ours(path)
            found = [row_of(model, other, prompt, kind) for prompt in prompts_of(name, path)]
            rows[name][kind] = [row for row, _ in found]
            errors[name][kind] = [max(pair) for pair in zip(*(e for _, e in found), strict=True)]
            other.close()
            path.unlink()
    return rows, errors


def differing(tokenizer: Path, folder: Path) -> dict[str, list[int]]:
    """Texts whose ids are not ours, with llama.cpp's."""
    words = load_tokenizer(tokenizer)
    path = folder / "words.gguf"
    export(random_model(words, folder / "words"), tokenizer, path, "f16")
    other = theirs(path, vocab_only=True)
    found = {text: other.tokenize(text.encode(), add_bos=False) for text in texts() if text}
    other.close()
    path.unlink()
    shutil.rmtree(folder / "words")
    return {text: ids for text, ids in found.items() if ids != words.encode(text)}


def split_otherwise(pattern: str, folder: Path) -> Path:
    """Write the byte-level tokenizer with another split into words."""
    folder.mkdir()
    content = json.loads(BPE.read_text("utf-8"))
    step = content["pre_tokenizer"]["pretokenizers"][0]
    assert step["type"] == "Split"
    step["pattern"]["Regex"] = pattern
    content["model"]["ignore_merges"] = False
    (folder / BPE.name).write_text(json.dumps(content))
    return folder / BPE.name


def random_model(words: Tokenizer, folder: Path) -> Path:
    """Write a model of a single narrow layer with as many rows as the tokenizer has tokens."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    more = {"num_attention_heads": 1, "tie_word_embeddings": True, "model_type": "llama"}
    given = shape | more | {"vocab_size": words.vocab_size}
    model = Llama(config_from_hf(given, "a model of one layer"))
    model.randomise(0)
    save_checkpoint(folder, model.config, merged_tensors(model, None))
    return folder


def main() -> None:
    """Make the files, or compare with them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    for name in ("smollm2", "mistral", "llama3"):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE")
    given = parser.parse_args()
    larger = {name: getattr(given, name) for name in ("smollm2", "mistral", "llama3")}
    named = {name: path for name, path in larger.items() if path}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, errors = greedy(folder, given.smollm2)
        own = {key: split_otherwise(split, folder / key) for key, split in SPLITS.items()}
        words = {key: differing(path, folder) for key, path in (TOKENIZERS | own | named).items()}
    made = {name: version(name) for name in ("llama-cpp-python", "gguf", "torch", "numpy")}
    files = {"greedy.json": rows, "tokens.json": words}
    for kind in KINDS:
        every = [row for model in rows.values() for row in model[kind]]
        ours_too, rounded = (sum(row[key] for row in every) for key in ("ours", "rounded"))
        print(f"{kind}: {ours_too} of {len(every)} texts are ours, {rounded} where we round alike")
    print({key: len(texts) for key, texts in words.items()}, "texts of", len(texts()), "differ")
    print(json.dumps(made | {"largest differences of logits": errors}, indent=2))
    for file, content in files.items():
        if not given.check:
            (HERE / file).write_text(json.dumps(content) + "\n")
        stored = json.loads((HERE / file).read_text())
        assert all(stored[key] == found for key, found in content.items()), f"{file} differs"
    if not given.check:
        more = {"texts": len(texts()) - 1, "logit_differences": errors}
        (HERE / "made.json").write_text(json.dumps(made | more, indent=2) + "\n")


if __name__ == "__main__":
    main()
