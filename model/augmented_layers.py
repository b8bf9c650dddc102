"""The layers of a model for the kernels: weights and adapters in one buffer, halves fused.

Every frozen matrix becomes a view of an augmented buffer [[W, B], [A, 0]] (kernels/augmented.py),
one at a time, so that no second copy of the weights ever exists; whoever knows the model's
parameters still finds W there. The adapters' float32 masters are rounded into the buffers whenever
they changed since: by an update, a loaded state, the average that stands in for them.

A layer with more ranks than a buffer takes stays as it is, and is computed by its own forward.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bioinstruct.kernels import Dropout, Heads, Rotation, split_rope
from bioinstruct.kernels.augmented import MAX_RANKS, Augmented, Use, late_linear_of, linear_of
from bioinstruct.kernels.lora import group_of
from bioinstruct.kernels.mirror import Mirror, Place
from bioinstruct.kernels.sublayers import Norm, norm_heads, norm_linear, norm_mlp
from bioinstruct.model.adapters import GROUPS, Adapters

if TYPE_CHECKING:
    from bioinstruct.model.llama import Block


class Residual(NamedTuple):
    """The residual stream between layers, before the last half's output is added to it."""

    x_TD: Tensor
    delta_TD: Tensor | None = None
    """What is to be added."""
    room: int = 0
    """Columns to leave free behind the rows of delta's gradient."""

    def added(self) -> Tensor:
        """(T, D), the stream as plain layers take it."""
        return self.x_TD if self.delta_TD is None else self.x_TD + self.delta_TD


class AugmentedLayer:
    """One layer over buffers.

    Args:
        block: its weights; each frozen matrix becomes a view of its buffer.
        adapters: what trains.
    """

    def __init__(self, block: "Block", adapters: Adapters) -> None:
        self.block, self.adapters = block, adapters
        self.buffers: dict[str, Augmented] = {}
        for group, weight in block.matrices().items():
            buffer = Augmented(weight.data, adapters.branches(block.layer, group))
            weight.data = buffer.w_NK
            self.buffers[group] = buffer

    def __call__(
        self,
        residual: Residual,
        rotation: Rotation,
        attend: Callable[[int, Heads], Tensor],
        dropout: Dropout | None = None,
    ) -> Residual:
        """Do as the block's own forward does."""
        block = self.block
        num_heads, eps = block.config.num_heads, block.config.norm_eps
        qkv, o, gate_up, down = (self._use(group, dropout) for group in GROUPS)
        norm = Norm(block.attention_norm_D, eps, residual.room)
        if block.q_norm_E is None:
            x_TD, heads = norm_heads(*residual[:2], norm, qkv, rotation, num_heads, block.bias_N)
        else:
            x_TD, qkv_TN = norm_linear(*residual[:2], norm, qkv, block.bias_N)
            heads = split_rope(block.normed_heads(qkv_TN), rotation, num_heads)
        o_THE = attend(block.layer, heads)
        norm, late = Norm(block.mlp_norm_D, eps, o.buffer.room), None
        if o.fuses() and gate_up.fuses():
            o_TD, late = late_linear_of(o, o_THE.flatten(1))
        else:
            o_TD = linear_of(o, o_THE.flatten(1))
        return Residual(*norm_mlp(x_TD, o_TD, norm, gate_up, down, late), down.buffer.room)

    def _use(self, group: str, dropout: Dropout | None) -> Use:
        """One pack's use of a buffer."""
        buffer, scale = self.buffers[group], self.adapters.settings.scale
        site = self.block.layer * len(GROUPS) + GROUPS.index(group)
        return Use(buffer, group_of(buffer.branches, scale, dropout, site, fused=True))


class AugmentedLayers:
    """All layers over buffers, for one set of adapters.

    Args:
        blocks: the model's.
        adapters: what trains.
    """

    @torch.inference_mode(mode=False)
    def __init__(self, blocks: Sequence["Block"], adapters: Adapters) -> None:
        self.adapters = adapters
        self.layers: list[AugmentedLayer | None] = []
        for block in blocks:
            widest = max(adapters.ranks(block.layer, group) for group in GROUPS)
            fits = widest <= MAX_RANKS
            self.layers.append(AugmentedLayer(block, adapters) if fits else None)
        places = [
            Place(int(master.storage_offset()), block, factor)
            for layer in self.layers
            if layer is not None
            for buffer in layer.buffers.values()
            for master, block, factor in buffer.places()
        ]
        self._mirror = adapters.mirror = Mirror(places, adapters.flat_P.numel())
        self._mirror.version = adapters.version

    @torch.inference_mode(mode=False)
    def refresh(self) -> None:
        """Round the masters into the buffers, if they changed since and no update did that."""
        self._mirror.refresh(self.adapters.flat_P)
