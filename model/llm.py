"""A model with its tokenizer, for notebooks, scripts and the evaluation.

from bioinstruct.model import load

llm = load("checkpoints/llama-2-7b", adapter="runs/x/adapter")
llm.generate(["The gene"], max_new_tokens=16)
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels.attention import choose_backend
from bioinstruct.model.adapters import Adapters
from bioinstruct.model.checkpoint import open_checkpoint
from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.generate import generate
from bioinstruct.model.llama import Llama, pack_documents
from bioinstruct.model.sampling import Sampling
from bioinstruct.model.templates import (
    decode_answer,
    encode_prompt,
    get_template,
    guess_template,
)
from bioinstruct.model.tokenizers.tokenizer import Tokenizer, load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Answer(NamedTuple):
    """A model's answer to an instruction."""

    text: str
    finished: bool
    """False where the token limit cut it off."""


class Llm:
    """Weights, tokenizer and, where there is one, an adapter."""

    def __init__(
        self, path: Path, model: Llama, tokenizer: Tokenizer, adapters: Adapters | None = None
    ):
        self.path, self.model, self.tokenizer, self.adapters = path, model, tokenizer, adapters

    @property
    def config(self) -> LlamaConfig:
        """The model's shape and constants."""
        return self.model.config

    @torch.inference_mode()
    def logits(self, documents: Sequence[Sequence[int]]) -> list[Tensor]:
        """Next-token logits of every token, each document alone.

        Args:
            documents: token ids, each document at least one long.

        Returns:
            One float32 tensor (len, vocabulary) a document.

        Raises:
            ValueError: an empty document, or an id outside the vocabulary.
        """
        for i, document in enumerate(documents):
            if not document:
                raise ValueError(f"document {i} has no tokens")
            if min(document) < 0 or max(document) >= self.config.vocab_size:
                raise ValueError(
                    f"document {i} holds a token id outside 0 to {self.config.vocab_size - 1}"
                )
        if not documents:
            return []
        pack = pack_documents([list(d) for d in documents], self.model.device)
        logits_TV = self.model.logits(pack, self.adapters).float()
        return list(logits_TV.split([len(d) for d in documents]))

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """Continue raw texts; no template is applied.

        Args:
            prompts: texts; BOS goes before them as the tokenizer's configuration says.
            max_new_tokens: limit of each answer.
            temperature: 0 for greedy decoding.
            stop: strings that end an answer and are not returned; EOS always ends it.
            seed: of the sampling.
            sampling: top-k, top-p and the like, in place of temperature and seed.
            seeds: one a prompt.

        Returns:
            The continuations, in order.

        Raises:
            ValueError: a prompt without a token, or arguments out of range.
        """
        tokenizer = self.tokenizer
        ids = [tokenizer.encode(p, bos=tokenizer.adds_bos) for p in prompts]

        def stopped(answer: list[int]) -> bool:
            text = tokenizer.decode_continuation(answer)
            return any(s in text for s in stop)

        completions = generate(
            self.model,
            ids,
            max_new_tokens=max_new_tokens,
            end_ids=self._end_ids(),
            adapters=self.adapters,
            temperature=temperature,
            seed=seed,
            sampling=sampling,
            seeds=seeds,
            num_tokens=tokenizer.vocab_size,
            stopped=stopped if stop else None,
        )
        texts = [tokenizer.decode_continuation(c.ids) for c in completions]
        return [_cut(text, stop) for text in texts]

    def default_template(self) -> str:
        """Name of the template that fits the vocabulary."""
        return guess_template(self.tokenizer)

    def answer(
        self,
        pairs: Sequence[tuple[str, str]],
        template: str,
        max_new_tokens: int,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """Answer (instruction, input) pairs greedily, in the template the model was tuned with.

        Raises:
            ValueError: an unknown template, or one whose control tokens the vocabulary lacks.
        """
        chosen = get_template(template, self.tokenizer)
        prompts = [encode_prompt(chosen, self.tokenizer, *pair) for pair in pairs]
        completions = generate(
            self.model,
            prompts,
            max_new_tokens=max_new_tokens,
            end_ids=[*self._end_ids(), chosen.stop_id(self.tokenizer)],
            adapters=self.adapters,
            num_tokens=self.tokenizer.vocab_size,
            on_progress=on_progress,
        )
        return [
            Answer(decode_answer(chosen, self.tokenizer, c.ids), c.finished) for c in completions
        ]

    def _end_ids(self) -> list[int]:
        own = () if self.tokenizer.eos_id is None else (self.tokenizer.eos_id,)
        return [*self.config.eos_ids, *own]


def _cut(text: str, stop: Sequence[str]) -> str:
    ends = [text.find(s) for s in stop if s in text]
    return text[: min(ends)] if ends else text


def load(
    path: str | Path,
    adapter: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    tokenizer: str | Path | None = None,
    attention: str = "auto",
) -> Llm:
    """Load a model, its tokenizer and, if asked, an adapter.

    Args:
        path: a folder, or one .safetensors or .gguf file.
        adapter: folder of a PEFT adapter.
        dtype: auto | float32 | bfloat16; auto is bfloat16 where the hardware computes in it.
        device: auto | cpu | cuda; auto takes a GPU where there is one.
        tokenizer: file or folder; by default the model's folder, then its parent.
        attention: auto, or a backend of bioinstruct.kernels.attention.

    Raises:
        ValueError: files that are missing, damaged or do not fit each other.
    """
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    checkpoint = open_checkpoint(Path(path))
    words = load_tokenizer(Path(tokenizer) if tokenizer else Path(path))
    check_vocabulary(checkpoint.config, words, Path(path))
    # before memory is asked for: a configuration may say anything
    checkpoint.check(checkpoint.config.tensor_shapes())
    model = Llama(checkpoint.config, where, kind)
    model.attention_backend = choose_backend(attention, where, kind)
    checkpoint.load_into(model.destinations())
    adapters = None if adapter is None else Adapters.load(Path(adapter), model.config, where)
    return Llm(Path(path), model, words, adapters)


def check_vocabulary(config: LlamaConfig, tokenizer: Tokenizer, path: Path) -> None:
    """Refuse a tokenizer that can produce ids the model has no embedding for.

    A model may have more rows than the tokenizer has tokens: vocabularies are padded for speed.

    Raises:
        ValueError: the vocabulary is larger than the embedding, or far smaller.
    """
    rows, words = config.vocab_size, tokenizer.vocab_size
    if words > rows or words < rows - max(1024, rows // 20):
        raise ValueError(
            f"the tokenizer has {words} tokens but the model in {path} has {rows}; set "
            "model.tokenizer to the tokenizer that belongs to this model"
        )


def choose_device(name: str) -> torch.device:
    """Resolve auto | cpu | cuda | cuda:N.

    Raises:
        ValueError: an unknown name, or a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise ValueError(f"device = {name!r} is unknown; allowed are auto, cpu, cuda, cuda:N")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device = {name!r} is not there; this machine shows {torch.cuda.device_count()} GPUs"
        )
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve auto | float32 | bfloat16.

    auto is bfloat16 on a GPU that computes in it and on a CPU with AMX or AVX512-BF16; other CPUs
    emulate bfloat16, several times slower than float32.

    Raises:
        ValueError: an unknown name.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise ValueError(f"model.dtype = {name!r} is unknown; allowed are auto, float32, bfloat16")
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = cpu_has_bfloat16()
    return torch.bfloat16 if native else torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AMX or AVX512-BF16)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)
