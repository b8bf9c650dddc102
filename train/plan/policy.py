"""What a run makes of the memory that it finds: shards, and layers that are computed again.

The plan of a dry run and the run itself ask here, so that they decide alike.
"""

import dataclasses
import os

import torch

from bioinstruct.kernels.attention import choose_backend
from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.llm import DTYPES, choose_dtype
from bioinstruct.train.plan.hardware import Hardware
from bioinstruct.train.plan.memory import Pack, Setup, fewest_recomputed
from bioinstruct.train.plan.planner import Planner
from bioinstruct.train.run import Run
from bioinstruct.train.weights.base import ROOM, resident_bytes

GPUS_OF_A_MACHINE = 8
"""Assumed for shard = hybrid where torchrun does not say."""


def packs_of(planner: Planner) -> list[Pack]:
    """Sizes of every pack of the first epoch."""
    lengths, supervised = planner.lengths, planner.supervised
    return [
        Pack(int(lengths[pack].sum()), int(supervised[pack].sum()), int(lengths[pack].max()))
        for step in range(planner.steps_of(0))
        for pack in planner.plan(step).packs
    ]


def worst_of(packs: list[Pack]) -> Pack:
    """The largest of each size, which no pack may reach in all of them."""
    return Pack(*(max(sizes) for sizes in zip(*packs, strict=True)))


def settled(run: Run, config: LlamaConfig, planner: Planner, device: Hardware, ranks: int) -> Run:
    """Choose the layers that are computed again, where a run leaves that open.

    They are the fewest with which the largest pack fits, and all where it does not fit at all.
    """
    if run.train.checkpoint_layers != "auto":
        return run
    setup, worst = setup_of(run, config, device, ranks), worst_of(packs_of(planner))
    layers = fewest_recomputed(setup, worst, device.memory_bytes)
    chosen = config.num_layers if layers is None else layers
    return dataclasses.replace(run, train=dataclasses.replace(run.train, checkpoint_layers=chosen))


def setup_of(run: Run, config: LlamaConfig, device: Hardware, ranks: int) -> Setup:
    """What decides the memory of a run's steps on this hardware."""
    kind = torch.device(device.kind)
    dtype = choose_dtype(run.model.dtype, kind) if device.is_here else DTYPES["bfloat16"]
    if run.model.dtype in DTYPES:
        dtype = DTYPES[run.model.dtype]
    return Setup(
        config=config,
        lora=run.lora if run.train.method == "lora" else None,
        dtype=dtype,
        device=device.kind,
        backend=_backend(run.attention, device, dtype),
        shards=_shards(run, config, dtype, device, ranks),
        ema=run.train.ema > 0,
        answers=run.train.samples,
    )


def _shards(run: Run, config: LlamaConfig, dtype: torch.dtype, device: Hardware, ranks: int) -> int:
    """Ranks that the weights are spread over, as the run itself would choose."""
    shard = run.shard
    if shard == "auto":
        needed = resident_bytes(config, dtype, run.train.method)
        shard = "none" if needed <= ROOM * device.memory_bytes else "full"
    if shard == "hybrid":
        return min(ranks, int(os.environ.get("LOCAL_WORLD_SIZE", GPUS_OF_A_MACHINE)))
    return ranks if shard == "full" else 1


def _backend(name: str, device: Hardware, dtype: torch.dtype) -> str:
    """Attention's backend; of a GPU that is not here, the one that PyTorch brings."""
    if device.is_here:
        return choose_backend(name, torch.device(device.kind), dtype)
    return "varlen" if name == "auto" else name
