"""Full fine-tuning where every rank holds the whole model: flat float32 masters of all weights.

In float32 the model's parameters are views of the masters and their gradients views of the flat
gradient, so nothing is stored twice. In bfloat16 the model keeps compute copies, which take over
the masters' values after each update; a gradient is added to its float32 place, and freed, as soon
as its layer has it.

Matrices decay, the embedding and the head too; gains and biases do not (as in the trainer that the
Llama2-MedTuned paper used: every parameter but norms and biases).

Memory   16 bytes a weight in float32 (master, gradient, two moments), 18 in bfloat16.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bioinstruct.model.checkpoint import Checkpoint, Rows
from bioinstruct.model.llama import Llama
from bioinstruct.train.weights.masters import Masters, Part


def ordered(model: Llama) -> list[nn.Parameter]:
    """The model's parameters, each once: those that decay first."""
    return sorted(model.parameters(), key=lambda p: p.ndim == 1)


def decays(parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to gains and biases."""
    return parameter.ndim > 1


class FullMasters(Masters):
    """All weights of a model."""

    def read(self, checkpoint: Checkpoint) -> None:
        """Give the masters the values of a checkpoint of this model.

        Raises:
            ValueError: as Checkpoint.load_rows.
        """
        flat_P = self.flat()
        checkpoint.load_rows(
            {
                name: Rows((total, *rows.shape[1:]), start, rows)
                for name, (rows, start, total) in self.pieces(flat_P).items()
            }
        )
        self.set_flat(flat_P)


class WholeWeights(FullMasters):
    """All weights of a model that this rank holds whole; it unfreezes them.

    Args:
        model: loaded weights, which train from here on.
    """

    def __init__(self, model: Llama) -> None:
        self.model = model
        wide = torch.promote_types(model.dtype, torch.float32)
        self.parameters = ordered(model)
        sizes = [p.numel() for p in self.parameters]
        self.flat_P = torch.empty(sum(sizes), dtype=wide, device=model.device)
        grad_P = torch.zeros_like(self.flat_P)
        self._masters: dict[nn.Parameter, Tensor] = {}
        start = 0
        for parameter, size in zip(self.parameters, sizes, strict=True):
            place = slice(start, start := start + size)
            master = self.flat_P[place].view_as(parameter)
            self._masters[parameter] = master
            self._train(parameter, master, grad_P[place].view_as(parameter))
        super().__init__(grad_P, self._stretches())

    def _train(self, parameter: nn.Parameter, master: Tensor, grad: Tensor) -> None:
        master.copy_(parameter.data)
        parameter.requires_grad_()
        if parameter.dtype == master.dtype:
            parameter.data, parameter.grad = master, grad
            return

        def widen(p: Tensor) -> None:
            assert p.grad is not None
            grad.add_(p.grad)
            p.grad = None

        parameter.register_post_accumulate_grad_hook(widen)

    def _stretches(self) -> list[Part]:
        matrices = sum(p.numel() for p in self.parameters if decays(p))
        places = (slice(matrices), True), (slice(matrices, None), False)
        return [Part(place, self.flat_P[place], decays=kind) for place, kind in places]

    @torch.no_grad()
    def changed(self) -> None:
        for parameter, master in self._masters.items():
            if parameter.data_ptr() != master.data_ptr():
                parameter.copy_(master)

    def named(self, flat_P: Tensor) -> Iterator[tuple[str, Tensor]]:
        start, whole = 0, {}
        for parameter in self.parameters:
            whole[parameter] = flat_P[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
        for name, (parameter, first, rows) in self.model.pieces().items():
            yield name, whole[parameter][first : first + rows]
