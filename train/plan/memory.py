"""Bytes of a training step, counted by running the step without its numbers.

The model itself, its kernels' autograd functions and the loss run forward and backward on PyTorch's
meta device, where a tensor has a shape and no memory, and a tally follows every storage from its
first appearance to its end. So what is counted is what the code does: what each function saves,
which buffers live at once, the logits' chunk, the layers that are computed again. Stated by hand
are attention, whose backends choose their own workspace, and what FSDP2 gathers of shards.

    peak = own + weights + trained + the most of
               gathered + saved + passing     while a pack runs forward and backward
               update                         while the optimizer steps
               generation                     while sample answers are written

Shapes   T tokens of a pack, S its supervised rows, H and G query and key heads, E their width.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels import (
    Dropout,
    Heads,
    attention_blocked,
    linear_cross_entropy,
    native,
)
from bioinstruct.kernels.adamw import NORM_PIECE
from bioinstruct.kernels.attention_in_c import function_for
from bioinstruct.model.adapters import Adapters, projection_shapes
from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.generate import CACHE_BYTES
from bioinstruct.model.llama import Attend, Llama
from bioinstruct.model.lora.settings import LoraSettings, module_path
from bioinstruct.train.plan.tally import AttentionBytes, Tally
from bioinstruct.train.weights.full import WholeWeights

MARGIN = 0.05
"""Share of a GPU's memory that a plan leaves free, for what its allocator cannot use."""
OWN_BYTES = {"cuda": 640 << 20, "cpu": 420 << 20}
"""What a process holds before any model: the CUDA context and its libraries; Python and PyTorch."""
_STEP_TOKENS = 256
"""Packs are sized in multiples of this."""
_MOST_TOKENS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What decides a step's memory, beside the pack."""

    config: LlamaConfig
    lora: LoraSettings | None
    """The adapters that train, or None where all weights do."""
    dtype: torch.dtype
    """In which the model computes."""
    device: str = "cuda"
    """cuda | cpu."""
    backend: str = "varlen"
    """Of attention."""
    shards: int = 1
    """Ranks that the weights are spread over; 1: each holds them whole."""
    packs_at_once: int = 1
    """Packs that are taken side by side."""
    ema: bool = False
    """Whether an average of the masters is kept."""
    answers: int = 0
    """Answers that are written at once at an evaluation, 0 for none."""


class Pack(NamedTuple):
    """Sizes of one forward and backward pass."""

    tokens: int
    supervised: int
    longest: int
    """Tokens of its longest document."""


class Pass(NamedTuple):
    """Bytes of one forward and backward pass, without weights and gradients."""

    saved: int
    """Alive between the forward and the backward pass."""
    peak: int
    """The most that is alive at once."""

    def plus(self, bytes_: int) -> "Pass":
        """The same with more kept all the while."""
        return Pass(self.saved + bytes_, self.peak + bytes_)


def pass_bytes(setup: Setup, pack: Pack, recomputed: int = 0) -> Pass:
    """Count a pack's forward and backward pass.

    Layers are alike, so a few of each kind are counted and the others added: from where one more
    layer adds as much to the peak as it saves, every further one does.

    Args:
        setup: the model and what trains.
        pack: sizes.
        recomputed: so many layers keep only their input.
    """
    lora = setup.lora
    if lora is not None and (lora.layers or lora.rank_pattern or lora.alpha_pattern):
        return counted_pass(setup, pack, recomputed)
    whole, again = setup.config.num_layers - recomputed, min(recomputed, 2)

    def count(kept: int, anew: int) -> Pass:
        config = dataclasses.replace(setup.config, num_layers=kept + anew)
        return counted_pass(dataclasses.replace(setup, config=config), pack, anew)

    few = min(whole, 2)
    found = count(few, again)
    while few < whole:
        more = count(few + 1, again)
        layer = more.saved - found.saved
        if more.peak - found.peak == layer:
            found = found.plus((whole - few) * layer)
            break
        few, found = few + 1, more
    if recomputed > again:
        layer = count(min(whole, 2), again + 1).saved - count(min(whole, 2), again).saved
        found = found.plus((recomputed - again) * layer)
    return found


def counted_pass(setup: Setup, pack: Pack, recomputed: int = 0) -> Pass:
    """Run all layers of a pack forward and backward on the meta device and count."""
    model = Llama(setup.config, "meta", setup.dtype)
    model.recomputed_layers = recomputed
    adapters = masters = None
    if setup.lora is not None:
        adapters = Adapters(setup.config, setup.lora, "meta")
        known = [adapters.flat_P, adapters.grad_P]
    else:
        masters = WholeWeights(model)
        known = [masters.flat_P, masters.grad_P]
    tally = Tally(*known, *model.parameters(), model.inverse_frequency_E)
    as_on_a_cpu = native.counted() if setup.device == "cpu" else contextlib.nullcontext()
    try:
        with torch.device("meta"), tally, as_on_a_cpu:
            saved = _pass(model, adapters, setup, pack, tally)
    finally:
        attention_blocked.forget_masks()
    return Pass(saved, tally.peak)


def _pass(model: Llama, adapters: Adapters | None, setup: Setup, pack: Pack, tally: Tally) -> int:
    """What train/step.py does with a pack; the bytes that are alive between its two halves."""
    ids_T, positions_T, draws_T = (_counted(pack.tokens) for _ in range(3))
    rows_S, labels_S = (_counted(pack.supervised) for _ in range(2))
    dropout = None
    if adapters is not None and adapters.settings.dropout:
        p, own = adapters.settings.dropout, adapters.settings.dropout_per_module
        dropout = Dropout(p, 0, positions_T, draws_T, own)
    h_TD = model(ids_T, positions_T, _attention(setup.backend, pack), adapters, dropout)
    loss = linear_cross_entropy(h_TD, model.head_VD, rows_S, labels_S, 1.0)
    saved = tally.live
    loss.backward()
    return saved


def _attention(backend: str, pack: Pack) -> Attend:
    """The pack's attention; documents are taken to be as long as the longest."""
    if backend != "blocked":
        return lambda _, heads: AttentionBytes.apply(*heads, backend)
    bounds = (*range(0, pack.tokens, pack.longest), pack.tokens)

    def attend(_: int, heads: Heads) -> Tensor:
        function = function_for(heads.q_THE.dtype, heads.q_THE.shape[2])
        o_THE: Tensor = function.apply(*heads, bounds)
        return o_THE

    return attend


def _counted(length: int) -> Tensor:
    return torch.empty(length, dtype=torch.int64, device="meta")


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    own: int
    """The process without a model."""
    weights: int
    """The frozen weights, or the compute copies of those that train."""
    trained: int
    """Masters, gradients, moments and average of what trains."""
    gathered: int
    """Of sharded weights: what is whole for a while."""
    saved: int
    """Kept for a pack's backward pass."""
    passing: int
    """What the pass needs beyond that, at its peak."""
    update: int
    """The optimizer's workspace."""
    generation: int
    """Keys and values of the answers written at an evaluation."""

    @property
    def peak(self) -> int:
        """The most that is in use at once."""
        phases = self.gathered + self.saved + self.passing, self.update, self.generation
        return self.own + self.weights + self.trained + max(phases)


def estimate(setup: Setup, pack: Pack, recomputed: int = 0) -> Memory:
    """Bytes of a step with this pack.

    Args:
        setup: the model, what trains, and how it is spread.
        pack: sizes of the largest pass.
        recomputed: layers that keep only their input.
    """
    one = pass_bytes(setup, pack, recomputed)
    config, width = setup.config, setup.dtype.itemsize
    weights = config.parameter_count()
    trained = weights if setup.lora is None else adapter_count(config, setup.lora)
    wide = max(4, width)
    copies = (5 if setup.ema else 4) + setup.packs_at_once - 1
    if setup.lora is not None:
        held, masters = weights * width // setup.shards, trained
    else:
        # masters in the compute dtype are the model's own parameters
        whole = 0 if setup.shards > 1 or width == wide else weights * width
        held, masters = whole, math.ceil(trained / setup.shards)
    return Memory(
        own=OWN_BYTES[setup.device],
        weights=held,
        trained=copies * wide * masters,
        gathered=_gathered(setup) if setup.shards > 1 else 0,
        saved=setup.packs_at_once * one.saved,
        passing=setup.packs_at_once * (one.peak - one.saved),
        # AdamW's denominators, or what the norm widens
        update=max(wide * masters, 8 * min(masters, NORM_PIECE)),
        generation=_generation(setup, pack),
    )


def adapter_count(config: LlamaConfig, lora: LoraSettings) -> int:
    """Numbers of all adapters."""
    shapes = projection_shapes(config)
    layers = sorted(set(lora.layers)) or range(config.num_layers)
    return sum(
        lora.rank_of(module_path(layer, target)) * sum(shapes[target][:2])
        for layer in layers
        for target in lora.targets
    )


def _gathered(setup: Setup) -> int:
    """Whole weights beside the shards: the root's group, a block and the one fetched ahead.

    Where all weights train, the gradients of the root's group and of a block are whole until they
    are scattered, the block's in float32 too.
    """
    width, shapes = setup.dtype.itemsize, setup.config.tensor_shapes()
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    block = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    root = sum(size for name, size in sizes.items() if not name.startswith("model.layers."))
    forward = (root + 2 * block) * width
    return forward if setup.lora is not None else forward + root * width + block * (width + 4)


def _generation(setup: Setup, pack: Pack) -> int:
    """Keys and values of a batch of answers, twice where one that ends leaves the batch."""
    config = setup.config
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * setup.dtype.itemsize
    return 2 * min(CACHE_BYTES, setup.answers * pack.longest * token)


def fits(memory: Memory, device_bytes: int) -> bool:
    """Whether a step runs on a device of this memory, the margin left free."""
    return memory.peak <= device_bytes * (1 - MARGIN)


def fewest_recomputed(setup: Setup, pack: Pack, device_bytes: int) -> int | None:
    """The fewest layers to recompute so that a pack fits; None where even all do not help."""

    def excess(layers: int) -> float:
        return estimate(setup, pack, layers).peak - device_bytes * (1 - MARGIN)

    return least(excess, setup.config.num_layers)


def least(excess: Callable[[int], float], layers: int) -> int | None:
    """The least number, 0 to layers, without excess; excess never grows with the number."""
    if (first := excess(0)) <= 0:
        return 0
    if excess(layers) > 0:
        return None
    # every layer saves the same until something else is the peak, so one line leads close
    saving = first - excess(1)
    low, high = 0, layers
    guess = math.ceil(first / saving) if saving > 0 else layers
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        if excess(guess) <= 0:
            high, guess = guess, guess - 1
        else:
            low, guess = guess, guess + 1
    return high


def largest_pack(setup: Setup, pack: Pack, device_bytes: int, recomputed: int = 0) -> int:
    """Tokens of the largest pack that fits, with this pack's share of supervised tokens.

    Returns:
        A multiple of 256 up to 2^20 that holds the longest document; 0 where none fits.
    """

    def excess(tokens: int) -> float:
        supervised = math.ceil(pack.supervised / pack.tokens * tokens)
        memory = estimate(setup, Pack(tokens, supervised, pack.longest), recomputed)
        return memory.peak - device_bytes * (1 - MARGIN)

    return most(excess, pack.longest)


def most(excess: Callable[[int], float], longest: int) -> int:
    """The largest multiple of 256, at least longest, without excess, or 0; excess is convex."""
    step = _STEP_TOKENS
    low = step * math.ceil(longest / step)
    if (under := excess(low)) > 0:
        return 0
    high = 2 * low
    while (over := excess(high)) <= 0:
        if high >= _MOST_TOKENS:
            return high
        low, under, high = high, over, 2 * high
    # bytes are convex in the tokens, so the chord meets the limit at or before they do
    while high - low > step:
        part = -under / (over - under) * (high - low)
        middle = low + min(max(step, int(part / step) * step), high - low - step)
        found = excess(middle)
        if found > 0:
            high, over = middle, found
        else:
            low, under = middle, found
            if middle + step < high and (found := excess(middle + step)) > 0:
                high, over = middle + step, found
    return low
