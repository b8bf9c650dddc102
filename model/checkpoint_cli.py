"""`python -m bioinstruct.model.checkpoint`: look at a model's files, and write them anew.

    inspect MODEL               shape, dtype, tokenizer, template, estimated memory for training
    convert MODEL OUT           to Hugging Face's safetensors, or to Meta's consolidated.00.pth
    merge MODEL ADAPTER OUT     the same with an adapter added to the weights, and checked
    export-gguf MODEL OUT       to one GGUF file with its tokenizer, for llama.cpp and its kin

No command holds a model in memory: tensors are read, changed and written one at a time.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch
from torch import Tensor

from bioinstruct.model.adapters import Adapters, LoraSettings
from bioinstruct.model.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.llama import pack_documents
from bioinstruct.model.merging import merged, streamed_logits
from bioinstruct.model.templates import guess_template
from bioinstruct.model.tokenizers.tokenizer import load_tokenizer
from bioinstruct.model.tokenizers.tokenizer_config import copy_tokenizer
from bioinstruct.synth import console

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PROBE_TOKENS = 24  # of the two documents that a merge is checked on
_MODEL = click.argument("model", type=click.Path(path_type=Path))
_OUT = click.argument("out", type=click.Path(path_type=Path))
_DTYPE = click.option(
    "--dtype", type=click.Choice(list(DTYPES)), help="What to store; without it, what is stored."
)
_SHARD = click.option(
    "--shard-gb", type=click.FloatRange(0, min_open=True), default=5.0, show_default=True
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Look at a model's files, and write them anew."""


@command.command()
@_MODEL
@click.option("--tokens", type=click.IntRange(1), default=4096, show_default=True)
def inspect(model: Path, tokens: int) -> None:
    """Print what a model is, and estimate the memory to train it on packs of --tokens tokens."""
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    checkpoint.check(config.tensor_shapes())
    kinds = Counter(stored.dtype for stored in checkpoint.tensors.values())
    rows = {
        "file": str(checkpoint.path),
        "family": config.family,
        "shape": f"{config.num_layers} layers of width {config.hidden_size}, "
        f"{config.num_heads} heads of {config.head_dim} ({config.num_kv_heads} for keys and "
        f"values), feed-forward {config.intermediate_size}, vocabulary {config.vocab_size}"
        f"{', tied' if config.tied_embeddings else ''}",
        "context": f"{config.max_positions} tokens, rotary base {config.rope_base:g}"
        f"{f', {config.rope_scaling}' if config.rope_scaling else ''}",
        "weights": f"{config.parameter_count():,} in {len(checkpoint.tensors)} tensors: "
        + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
        **_tokenizer_rows(model, config),
        **_memory_rows(config, tokens),
    }
    width = max(map(len, rows))
    for name, text in rows.items():
        print(f"{name:{width}}  {text}")


def _tokenizer_rows(path: Path, config: LlamaConfig) -> dict[str, str]:
    try:
        tokenizer = load_tokenizer(path)
    except ValueError as error:
        return {"tokenizer": f"none ({error})"}
    fits = "" if tokenizer.vocab_size <= config.vocab_size else ", more than the model has rows"
    text = f"{tokenizer.kind}, {tokenizer.vocab_size} tokens{fits}, {tokenizer.source}"
    return {"tokenizer": text, "template": f"{guess_template(tokenizer)} (by its control tokens)"}


def _memory_rows(config: LlamaConfig, tokens: int) -> dict[str, str]:
    settings = LoraSettings()
    sizes = Adapters(config, settings, "meta").flat_P.numel()
    name = f"estimate at {tokens} tokens"
    return {
        name: f"bfloat16: {_gb(training_bytes(config, sizes, tokens, 2))}, float32: "
        f"{_gb(training_bytes(config, sizes, tokens, 4))} (weights, LoRA r={settings.r} everywhere "
        "with gradient and moments, and what every layer keeps for its gradient, nothing "
        "recomputed; by formula, not measured)"
    }


def training_bytes(config: LlamaConfig, adapter_weights: int, tokens: int, itemsize: int) -> int:
    """Bytes of weights, of adapters with gradient and moments, and of what a step keeps.

    Args:
        config: the model's shape.
        adapter_weights: numbers that train.
        tokens: of a pack.
        itemsize: bytes of a weight and of an activation.
    """
    D, F, E = config.hidden_size, config.intermediate_size, config.head_dim
    heads = config.num_heads * E
    # two norms' inputs and outputs; q, k, v and what attention gives; gate, up and their product
    kept = 4 * D + 2 * heads + 2 * config.num_kv_heads * E + 3 * F
    activations = config.num_layers * kept * tokens * itemsize
    return config.parameter_count() * itemsize + 4 * 4 * adapter_weights + activations


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


@command.command()
@_MODEL
@_OUT
@click.option("--to", "form", type=click.Choice(["safetensors", "meta"]), default="safetensors")
@_DTYPE
@_SHARD
def convert(model: Path, out: Path, form: str, dtype: str | None, shard_gb: float) -> None:
    """Write a model as a folder of safetensors, or in Meta's form."""
    checkpoint = open_checkpoint(model)
    pairs = _weights(checkpoint)
    if form == "meta":
        from bioinstruct.model.formats.meta_writer import save_meta

        files = save_meta(out, checkpoint.config, pairs, dtype=_dtype(dtype))
    else:
        files = _save(out, checkpoint.config, pairs, dtype, shard_gb)
    files += copy_tokenizer(checkpoint.path.parent, out)
    print(f"wrote {', '.join(file.name for file in files)} to {out}")


@command.command()
@_MODEL
@click.argument("adapter", type=click.Path(path_type=Path))
@_OUT
@_DTYPE
@_SHARD
def merge(model: Path, adapter: Path, out: Path, dtype: str | None, shard_gb: float) -> None:
    """Add a PEFT adapter to the weights; print how far the logits of the result differ.

    Sums are taken in float32 and rounded once. The difference is that of the files: the merged one
    against the model and the adapter, both computed in float32 on the same tokens.
    """
    checkpoint = open_checkpoint(model)
    adapters = Adapters.load(adapter, checkpoint.config)
    pairs = merged(_weights(checkpoint), adapters)
    files = _save(out, checkpoint.config, pairs, dtype, shard_gb)
    files += copy_tokenizer(checkpoint.path.parent, out)
    print(f"wrote {', '.join(file.name for file in files)} to {out}")
    difference, largest = logit_difference(checkpoint, adapters, open_checkpoint(out))
    print(
        f"largest logit difference, merged against model and adapter: {difference:.1e} "
        f"(largest logit {largest:.1f})"
    )


def logit_difference(
    base: Checkpoint, adapters: Adapters, whole: Checkpoint
) -> tuple[float, float]:
    """Largest difference of two models' logits on random tokens, and the largest logit.

    Args:
        base: a model.
        adapters: what belongs to it.
        whole: the model with the adapters merged.
    """
    generator = torch.Generator().manual_seed(0)
    config = base.config
    length = min(PROBE_TOKENS, config.max_positions)
    ids = torch.randint(config.vocab_size, (2, length), generator=generator).tolist()
    pack = pack_documents([ids[0], ids[1][: max(1, length // 2)]])
    expected = streamed_logits(config, _reader(base), pack, adapters)
    found = streamed_logits(config, _reader(whole), pack)
    return float((found - expected).abs().max()), float(expected.abs().max())


def _reader(checkpoint: Checkpoint) -> Callable[[str], Tensor]:
    return lambda name: checkpoint.tensors[name].read()


def _weights(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the model needs, read one at a time."""
    shapes = checkpoint.config.tensor_shapes()
    checkpoint.check(shapes)
    for name in shapes:
        yield name, checkpoint.tensors[name].read()


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else DTYPES[name]


def _save(
    out: Path,
    config: LlamaConfig,
    pairs: Iterator[tuple[str, Tensor]],
    dtype: str | None,
    shard_gb: float,
) -> list[Path]:
    size = max(1, int(shard_gb * 1e9))
    return save_checkpoint(out, config, pairs, dtype=_dtype(dtype), max_shard_bytes=size)


@command.command("export-gguf")
@_MODEL
@_OUT
@click.option(
    "--type", "kind", type=click.Choice(["f32", "f16", "q8_0"]), default="f16", show_default=True
)
@click.option("--tokenizer", type=click.Path(path_type=Path), help="By default the model's own.")
def export_gguf(model: Path, out: Path, kind: str, tokenizer: Path | None) -> None:
    """Write a model and its tokenizer as one GGUF file."""
    from bioinstruct.model.formats.gguf_writer import save_gguf

    checkpoint = open_checkpoint(model)
    words = load_tokenizer(tokenizer or model)
    save_gguf(out, checkpoint.config, _weights(checkpoint), words, kind)
    print(f"wrote {out}: {_gb(out.stat().st_size)}, {kind}, {words.vocab_size} tokens")


def main() -> None:
    """Entry point."""
    console.run(command)
