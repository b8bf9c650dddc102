"""The step that the benches time: a model's shape with random weights, and random documents.

A document of n input tokens has its second half supervised: the labels of its last n // 2 rows,
the token after the last row included. Weights and tokens are random because speed does not depend
on them; whether the gradients are right is checked apart, against float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import torch

from bioinstruct.kernels.attention import choose_backend
from bioinstruct.kernels.heap import keep_freed_memory
from bioinstruct.model.adapters import Adapters, LoraSettings
from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.llama import Llama
from bioinstruct.model.llm import choose_device, choose_dtype
from bioinstruct.train.data.batch import Batch, collate
from bioinstruct.train.data.tokens import TokenSet

LORA = LoraSettings(r=16, alpha=32.0)
"""All seven projections, no dropout."""


def _llama(D: int, F: int, layers: int, heads: int, kv_heads: int, V: int) -> LlamaConfig:
    """A LLaMA of these widths, heads of width 128."""
    return LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        norm_eps=1e-5,
        rope_base=5e5 if V > 100_000 else 1e4,
        rope_scaling=None,
        max_positions=8192,
        tied_embeddings=False,
        bos_id=1,
        eos_ids=(2,),
    )


SHAPES = {
    "llama-7b": _llama(4096, 11008, 32, 32, 32, 32_000),
    "llama-13b": _llama(5120, 13824, 40, 40, 40, 32_000),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128_256),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        norm_eps=1e-5,
        rope_base=1e5,
        rope_scaling=None,
        max_positions=8192,
        tied_embeddings=True,
        bos_id=1,
        eos_ids=(2,),
    ),
    "tiny": LlamaConfig(
        vocab_size=160,
        hidden_size=48,
        intermediate_size=80,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        norm_eps=1e-5,
        rope_base=1e4,
        rope_scaling=None,
        max_positions=512,
        tied_embeddings=True,
        bos_id=1,
        eos_ids=(2,),
    ),
}
"""Model shapes by name."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One bench's settings, as its options give them."""

    device: str
    """auto | cpu | cuda | cuda:N."""
    model: str
    """A name in SHAPES."""
    documents: int
    """Documents of a step."""
    document_tokens: int
    """Input tokens of each, at least 2."""
    pack_tokens: int | None
    """Largest pack (micro-batch), in input tokens; None for one document."""
    steps: int
    """Timed steps."""
    packs_at_once: int | None = None
    """Packs that our step takes side by side; None for as many as the trainer would."""

    def __post_init__(self) -> None:
        if self.pack_tokens is not None and self.pack_tokens < self.document_tokens:
            raise ValueError(
                f"--pack-tokens {self.pack_tokens} cannot hold a document of "
                f"{self.document_tokens} tokens; give at least that, or shorten the documents"
            )

    @property
    def config(self) -> LlamaConfig:
        """The model's shape."""
        return SHAPES[self.model]

    @property
    def tokens(self) -> int:
        """Input tokens of a step."""
        return self.documents * self.document_tokens

    @property
    def lengths(self) -> list[int]:
        """Input tokens of every document."""
        return [self.document_tokens] * self.documents

    def arguments(self) -> list[str]:
        """The options that give this job to another process."""
        pairs = {name: value for name, value in vars(self).items() if value is not None}
        return [text for k, v in pairs.items() for text in (f"--{k.replace('_', '-')}", str(v))]


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of Job to a command."""
    at_least_one = click.IntRange(min=1)
    options = [
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N"),
        click.option(
            "--model",
            type=click.Choice(list(SHAPES)),
            default="smollm2-135m",
            help="The shape; `tiny` is there to try a bench.",
        ),
        click.option("--documents", type=at_least_one, default=4, show_default=True),
        click.option(
            "--document-tokens", type=click.IntRange(min=2), default=512, show_default=True
        ),
        click.option("--pack-tokens", type=at_least_one, help="Default: one document a pack."),
        click.option("--steps", type=at_least_one, default=6, show_default=True),
        click.option("--packs-at-once", type=at_least_one, help="Default: as the trainer."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def random_documents(config: LlamaConfig, lengths: Sequence[int], seed: int = 0) -> TokenSet:
    """Samples of random tokens, the second half of each supervised.

    Args:
        config: whose vocabulary the tokens are drawn from.
        lengths: input tokens of each document, at least 2; a sample has one token more.
        seed: of the tokens.
    """
    sizes = [length + 1 for length in lengths]
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, sum(sizes), dtype=np.uint32)
    prompts = np.array([length + 1 - length // 2 for length in lengths], dtype=np.int64)
    places = [f"document {i}" for i in range(len(lengths))]
    return TokenSet.laid(tokens, sizes, prompts, places)


def make_batches(tokens: TokenSet, pack_tokens: int, device: torch.device) -> list[Batch]:
    """Lay the documents, in order, into packs of at most pack_tokens (or one document)."""
    packs: list[list[int]] = []
    room = 0
    for i, length in enumerate(tokens.lengths):
        if length > room:
            packs.append([])
            room = pack_tokens
        packs[-1].append(i)
        room -= int(length)
    draws = {i: i for i in range(len(tokens))}
    return [collate(tokens, pack, draws, device) for pack in packs]


def make_model(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> Llama:
    """A model with random weights and the attention that this device and dtype run by default."""
    model = Llama(config, device, dtype)
    model.attention_backend = choose_backend("auto", device, dtype)
    model.randomise(0)
    return model


@dataclass(frozen=True)
class Step:
    """Everything that one optimizer step takes."""

    model: Llama
    adapters: Adapters
    batches: list[Batch]
    supervised_tokens: int

    @property
    def scale(self) -> float:
        """Factor of every token's loss."""
        return 1 / self.supervised_tokens


def make_step(job: Job, dtype: str) -> Step:
    """Model, fresh adapters and packs of a job.

    Raises:
        ValueError: a device or dtype that this machine does not have.
    """
    device = choose_device(job.device)
    if device.type == "cpu":
        keep_freed_memory()  # as the trainer does
    model = make_model(job.config, device, choose_dtype(dtype, device))
    adapters = Adapters(job.config, LORA, device)
    adapters.initialise(0)
    tokens = random_documents(job.config, job.lengths)
    batches = make_batches(tokens, job.pack_tokens or job.document_tokens, device)
    return Step(model, adapters, batches, int(tokens.supervised.sum()))
