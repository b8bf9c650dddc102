"""The layers of a model for the kernels: weights and adapters in one buffer, halves fused.

Every frozen matrix becomes a view of an augmented buffer [[W, B], [A, 0]] (kernels/augmented.py),
one at a time, so that no second copy of the weights ever exists; whoever knows the model's
parameters still finds W there. The adapters' float32 masters are rounded into the buffers whenever
they changed since: by an update, a loaded state, the average that stands in for them.

A layer with more ranks than a buffer takes stays as it is, and is computed by its own forward.
"""

from collections.abc import Iterable

import torch
from torch import nn

from bioinstruct.kernels import Dropout
from bioinstruct.kernels.augmented import MAX_RANKS, Augmented, Use
from bioinstruct.kernels.lora import group_of
from bioinstruct.model.adapters import GROUPS, Adapters


class AugmentedLayer:
    """One layer's buffers.

    Args:
        weights: its frozen matrices by group; each becomes a view of its buffer.
        adapters: what trains.
        layer: number of the layer.
    """

    def __init__(self, weights: dict[str, nn.Parameter], adapters: Adapters, layer: int) -> None:
        self.adapters, self.layer = adapters, layer
        self.buffers: dict[str, Augmented] = {}
        for group, weight in weights.items():
            buffer = Augmented(weight.data, adapters.branches(layer, group))
            weight.data = buffer.w_NK
            self.buffers[group] = buffer

    def use(self, group: str, dropout: Dropout | None) -> Use:
        """One pack's use of a buffer."""
        buffer, scale = self.buffers[group], self.adapters.settings.scale
        site = self.layer * len(GROUPS) + GROUPS.index(group)
        return Use(buffer, group_of(buffer.branches, scale, dropout, site, fused=True))


class AugmentedLayers:
    """All layers' buffers, for one set of adapters.

    Args:
        weights: the frozen matrices of every layer, by group.
        adapters: what trains.
    """

    @torch.inference_mode(mode=False)
    def __init__(self, weights: Iterable[dict[str, nn.Parameter]], adapters: Adapters) -> None:
        self.adapters = adapters
        self.layers: list[AugmentedLayer | None] = []
        for layer, matrices in enumerate(weights):
            widest = max(adapters.ranks(layer, group) for group in matrices)
            fits = widest <= MAX_RANKS
            self.layers.append(AugmentedLayer(matrices, adapters, layer) if fits else None)
        self._version = adapters.version

    @torch.inference_mode(mode=False)
    def refresh(self) -> None:
        """Round the masters into the buffers, if they changed since."""
        if self._version == self.adapters.version:
            return
        for layer in filter(None, self.layers):
            for buffer in layer.buffers.values():
                buffer.refresh()
        self._version = self.adapters.version
