"""Memory that loading and rewriting a checkpoint take, beside its size.

A LLaMA of random bfloat16 weights is written as shards of safetensors, with an adapter of random
numbers, and then loaded and rewritten in every form, each in a process of its own. What counts is
the peak of the anonymous memory (RssAnon): pages of mapped files are the system's to drop.

    python benches/checkpoint_memory.py --layers 22       2.2 GB, and as much again while it runs

Prints a JSON line: sizes and peaks in bytes, by command.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from bioinstruct.model.adapters import Adapters, LoraSettings
from bioinstruct.model.checkpoint import open_checkpoint, save_checkpoint
from bioinstruct.model.checkpoint_cli import command
from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.formats.config_json import config_from_hf
from bioinstruct.model.llama import Llama

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "tests" / "data" / "tokenizers" / "stories260K_tok512.model"
SHARD_GB = 0.5
COMMANDS = {
    "import": [],
    "load": [],
    "convert": ["convert", "{model}", "{out}", "--shard-gb", str(SHARD_GB)],
    "convert to meta": ["convert", "{model}", "{out}", "--to", "meta"],
    "convert from meta": ["convert", "{meta}", "{out}", "--shard-gb", str(SHARD_GB)],
    "merge": ["merge", "{model}", "{adapter}", "{out}", "--shard-gb", str(SHARD_GB)],
    "export-gguf f16": ["export-gguf", "{model}", "{out}.gguf", "--tokenizer", str(TOKENIZER)],
    "export-gguf q8_0": [
        *("export-gguf", "{model}", "{out}.gguf", "--tokenizer", str(TOKENIZER)),
        *("--type", "q8_0"),
    ],
}


def shape(layers: int, width: int, vocab_size: int) -> LlamaConfig:
    """Return a model in the proportions of TinyLlama, which has 22 layers of width 2048."""
    given = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": max(1, width // 512),
    }
    return config_from_hf(given, "the bench's model")


def random_weights(config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    for name, size in config.tensor_shapes().items():
        yield name, torch.randn(size, generator=generator).mul_(0.02).bfloat16()


def make(folder: Path, config: LlamaConfig) -> None:
    """Write the model and an adapter."""
    shard = int(SHARD_GB * 1e9)
    save_checkpoint(folder / "model", config, random_weights(config), max_shard_bytes=shard)
    adapters = Adapters(config, LoraSettings())
    adapters.flat_P.normal_(0, 0.01)
    adapters.save(folder / "adapter", "random")


def anonymous_bytes() -> int:
    """Return this process's anonymous memory, by Linux's own count."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def peak_of(work: Callable[[], object]) -> int:
    """Run something; return the largest anonymous memory met, looking every 2 ms."""
    peaks, done = [anonymous_bytes()], threading.Event()

    def look() -> None:
        while not done.is_set():
            peaks.append(anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(peaks)


def load_model(folder: Path) -> Llama:
    """Load a model in bfloat16."""
    checkpoint = open_checkpoint(folder)
    model = Llama(checkpoint.config, dtype=torch.bfloat16)
    checkpoint.load_into(model.destinations())
    return model


def run_one(name: str, folder: Path) -> int:
    """Run one of the commands in this process; return its peak."""
    torch.set_num_threads(1)
    places = {key: str(folder / key) for key in ("model", "adapter", "meta", "out")}
    if name == "load":
        return peak_of(lambda: load_model(folder / "model"))
    arguments = [part.format(**places) for part in COMMANDS[name]]
    if not arguments:
        return anonymous_bytes()
    return peak_of(lambda: command.main(arguments, standalone_mode=False))


def in_its_own_process(name: str, folder: Path) -> int:
    """Run one of the commands, and remove or keep what it wrote."""
    call = [sys.executable, __file__, "--folder", str(folder), "--only", name]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    out = folder / "out"
    if name == "convert to meta":
        out.rename(folder / "meta")
    elif out.exists():
        shutil.rmtree(out)
    (folder / "out.gguf").unlink(missing_ok=True)
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    """Make a model and measure every command, or measure one in this process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(run_one(given.only, given.folder))
        return
    config = shape(given.layers, given.width, given.vocabulary)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, config)
        peaks = {key: in_its_own_process(key, folder) for key in COMMANDS}
    size = 2 * config.parameter_count()
    print(json.dumps({"model_bytes": size, "shard_bytes": int(SHARD_GB * 1e9), "peaks": peaks}))


if __name__ == "__main__":
    main()
