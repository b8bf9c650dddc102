"""What a run makes of the memory that it finds: shards, packs at once, layers computed again.

The plan of a dry run and the run itself ask here, so that they decide alike.
"""

import dataclasses
import os

import torch

from bioinstruct.kernels import dispatch
from bioinstruct.kernels.attention import choose_backend
from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.llm import DTYPES, choose_dtype
from bioinstruct.synth.console import note
from bioinstruct.train.plan.hardware import Hardware
from bioinstruct.train.plan.memory import Pack, Setup, estimate, fewest_recomputed, fits
from bioinstruct.train.plan.planner import Planner
from bioinstruct.train.run import Run
from bioinstruct.train.weights.base import ROOM, resident_bytes

MOST_AT_ONCE = 4
"""Packs at once where that is left open: each holds its activations."""
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
    """Choose the packs at once and the layers that are computed again, where a run leaves it open.

    The packs are the most of those possible that fit. The layers are the fewest with which the
    largest packs fit, and all where these do not fit at all.
    """
    setup, packs = setup_of(run, config, device, ranks), packs_of(planner)
    number = _packs_at_once(run, setup, planner, packs, device, ranks)
    setup = dataclasses.replace(setup, packs_at_once=number)
    layers = run.train.checkpoint_layers
    if layers == "auto":
        fewest = fewest_recomputed(setup, worst_of(packs), device.memory_bytes)
        layers = config.num_layers if fewest is None else fewest
    train = dataclasses.replace(run.train, checkpoint_layers=layers, packs_at_once=number)
    return dataclasses.replace(run, train=train)


def _packs_at_once(
    run: Run, setup: Setup, planner: Planner, packs: list[Pack], device: Hardware, ranks: int
) -> int:
    asked = run.train.packs_at_once
    # threads share weights that are whole and frozen; the interpreter runs in one
    shared = setup.lora is not None and setup.shards == 1
    if setup.device != "cpu" or not shared or dispatch.interprets():
        if asked not in ("auto", 1):
            note(f"train.packs_at_once = {asked} is for adapters on a CPU; packs are taken in turn")
        return 1
    if isinstance(asked, int):
        return asked
    # a step of one pack is laid anew, as long as it has a record for each thread
    records = max(len(planner.plan(i).draws) for i in range(planner.steps_of(0)))
    most = min(-(-records // ranks), torch.get_num_threads(), MOST_AT_ONCE)
    return _fitting(setup, packs, most, device)


def _fitting(setup: Setup, packs: list[Pack], most: int, device: Hardware) -> int:
    """The largest number of packs at once, from most down to 1, that fits."""
    for number in range(most, 1, -1):
        several = dataclasses.replace(setup, packs_at_once=number)
        if fits(estimate(several, worst_of(packs)), device.memory_bytes):
            return number
    return 1


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
        packs_at_once=1 if run.train.packs_at_once == "auto" else int(run.train.packs_at_once),
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
