"""The model that a run trains: read, spread over the ranks or not, and what of it trains.

    train.method  shard        each rank holds                        summed once a step
    lora          none         the model, adapters                    adapters' gradient
    lora          full         its rows of the model, adapters        adapters' gradient
    full          none         the model, masters, moments            gradient of all weights
    full          full         its rows of masters and moments        nothing: FSDP has, every pack

shard = auto takes none where that fits into the memory that is free, else full. One process shards
nothing, whatever is asked for: a recipe for eight GPUs runs on one.
"""

import hashlib
from pathlib import Path

import torch

from bioinstruct.kernels.attention import choose_backend
from bioinstruct.model.adapters import Adapters, LoraSettings
from bioinstruct.model.checkpoint import open_checkpoint
from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.llama import Llama
from bioinstruct.model.llm import Llm, check_vocabulary, choose_device, choose_dtype
from bioinstruct.model.tokenizers.tokenizer import load_tokenizer
from bioinstruct.synth.console import note
from bioinstruct.train.demo import resolve
from bioinstruct.train.ranks.process import Ranks
from bioinstruct.train.run import Run
from bioinstruct.train.weights.full import WholeWeights
from bioinstruct.train.weights.masters import LoraMasters, Masters

ROOM = 0.7
"""Share of the free memory that weights and their training may take; activations need the rest."""


def load_base(run: Run, ranks: Ranks) -> Llm:
    """Load the model that the settings name, or this rank's rows of it.

    Raises:
        ValueError: files that are missing, damaged or do not fit each other, or settings that do
            not fit the model or the ranks.
    """
    path = Path(resolve(run.model.path))
    device = choose_device(run.device) if ranks.size == 1 else ranks.device
    dtype = choose_dtype(run.model.dtype, device)
    checkpoint = open_checkpoint(path)
    words = load_tokenizer(Path(resolve(run.model.tokenizer)) if run.model.tokenizer else path)
    check_vocabulary(checkpoint.config, words, path)
    # before memory is asked for: a configuration may say anything
    checkpoint.check(checkpoint.config.tensor_shapes())
    trains = run.train.method == "full"
    mode = shard_mode(run, checkpoint.config, dtype, ranks)
    if mode == "none":
        model = Llama(checkpoint.config, device, dtype)
        checkpoint.load_into(model.destinations())
    else:
        # only here: torch's FSDP takes a second and 43 MB to import
        from bioinstruct.train.weights.sharding import sharded_model

        model = sharded_model(checkpoint, ranks, mode=mode, dtype=dtype, trains=trains)
    model.attention_backend = choose_backend(run.attention, device, dtype)
    model.recomputed_layers = recomputed_layers(run, checkpoint.config)
    return Llm(path, model, words)


def recomputed_layers(run: Run, config: LlamaConfig) -> int:
    """Layers that keep only their input; 0 while that is left open.

    Raises:
        ValueError: more than the model has.
    """
    layers = run.train.checkpoint_layers
    if isinstance(layers, str):
        return 0
    if layers > config.num_layers:
        raise ValueError(
            f"train.checkpoint_layers = {layers}, but the model has {config.num_layers} layers"
        )
    return layers


def shard_mode(run: Run, config: LlamaConfig, dtype: torch.dtype, ranks: Ranks) -> str:
    """Decide between none, full and hybrid, alike on all ranks."""
    if ranks.size == 1:
        if run.shard in ("full", "hybrid"):
            note(f"one process: shard = {run.shard} spreads nothing")
        return "none"
    if run.shard != "auto":
        return run.shard
    needed = resident_bytes(config, dtype, run.train.method)
    free = free_bytes(ranks)
    if not ranks.any_(needed > ROOM * free):
        return "none"
    note(
        f"shard = full: each rank would hold {needed / 1e9:.1f} GB of weights and training state "
        f"of {free / 1e9:.1f} GB free memory"
    )
    return "full"


def resident_bytes(config: LlamaConfig, dtype: torch.dtype, method: str) -> int:
    """Bytes of weights, and of masters, gradient and moments where all of them train."""
    own = dtype.itemsize
    if method == "full":
        own = 16 + (own if dtype.itemsize < 4 else 0)
    return config.parameter_count() * own


def free_bytes(ranks: Ranks) -> float:
    """Memory that this rank may still take: of its GPU, or its part of the machine's."""
    if ranks.device.type == "cuda":
        return float(torch.cuda.mem_get_info(ranks.device)[0])
    return available_bytes() / ranks.local_size


def available_bytes() -> float:
    """What the machine's memory has left, by /proc/meminfo; infinite where that does not exist."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return float("inf")
    rows = dict(line.split(":", 1) for line in text.splitlines())
    return 1024.0 * int(rows["MemAvailable"].split()[0])


def masters_of(run: Run, llm: Llm, ranks: Ranks) -> Masters:
    """Make what trains: adapters, which the model then carries, or all of its weights.

    Raises:
        ValueError: as for Adapters.starting and check_alike.
    """
    model = llm.model
    is_sharded = hasattr(model, "unshard")  # FSDP2 gives a module that it takes over this method
    if run.train.method == "lora":
        if is_sharded and run.lora.init != LoraSettings.init:
            raise ValueError(
                f"lora.init = {run.lora.init!r} takes a part out of every whole weight; set "
                "shard = none, or leave it out"
            )
        weights = None if is_sharded else model.destinations()
        llm.adapters = Adapters.starting(
            llm.config, run.lora, model.device, run.train.seed, weights
        )
        check_alike(llm.adapters, ranks)
        return LoraMasters(llm.adapters, is_sharded=is_sharded)
    if is_sharded:
        from bioinstruct.train.weights.sharding import ShardedWeights

        return ShardedWeights(model, ranks)
    whole = WholeWeights(model)
    if model.dtype != whole.flat_P.dtype:
        # the masters start with what the files hold, not with what is left of it in bfloat16
        whole.read(open_checkpoint(llm.path))
    return whole


def check_alike(adapters: Adapters, ranks: Ranks) -> None:
    """Refuse ranks that begin with different adapters: no sum would ever bring them together.

    Raises:
        ValueError: they differ, as PiSSA's decompositions do on unlike processors.
    """
    own = hashlib.sha256(adapters.flat_P.detach().cpu().numpy().tobytes()).hexdigest()
    others = [rank for rank, digest in enumerate(ranks.gather(own)) if digest != own]
    if others:
        raise ValueError(
            f"the adapters of ranks {ranks.rank} and {others[0]} start with different numbers: "
            "their processors or libraries differ; use machines that are alike, or leave lora.init "
            "out"
        )
