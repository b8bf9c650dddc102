"""One optimizer step: gradients of its packs, summed; then clip and AdamW on the flat buffers.

The loss of a step is the sum of its tokens' losses over the step's supervised tokens, whatever its
split into packs and ranks: every pack is scaled by the same number, known from the plan, and adds
its gradient into the flat buffer. Ranks sum that buffer once a step, and one vector of numbers: the
loss, and whatever they have to tell each other. Both sums are equal on all ranks to the last bit,
so all take the same update and the masters never part.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from bioinstruct.kernels import Dropout, linear_cross_entropy
from bioinstruct.kernels.adamw import adamw_, clip_factor, global_norm
from bioinstruct.model.adapters import Adapters
from bioinstruct.model.llama import Llama
from bioinstruct.train.batch import Batch
from bioinstruct.train.ranks import ALONE, Ranks
from bioinstruct.train.state import Piece, State, whole


class Optimizer:
    """AdamW on the flat buffers of a model's adapters.

    With LoRA+ (settings.plus_ratio) the rate of all B is a multiple of the rate of all A.

    Args:
        adapters: what trains.
        weight_decay: decoupled decay.
        clip: largest gradient norm; 0 for none.
        ema: share that an average of the masters keeps of itself at an update; 0 for no average.
    """

    def __init__(
        self,
        adapters: Adapters,
        *,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        ema: float = 0.0,
    ) -> None:
        self.adapters, self.weight_decay, self.clip, self.ema = adapters, weight_decay, clip, ema
        self.m_P = torch.zeros_like(adapters.flat_P)
        self.v_P = torch.zeros_like(adapters.flat_P)
        self.average_P = adapters.flat_P.clone() if ema else None
        self.updates = 0

    def step(self, lr: float) -> float:
        """Apply the collected gradient and clear it.

        Returns:
            The gradient's norm before clipping; where it is not finite nothing was changed.
        """
        grad_P = self.adapters.grad_P
        norm = global_norm(grad_P)
        if math.isfinite(norm):
            self.updates += 1
            for part, rate in self._parts(lr):
                adamw_(
                    self.adapters.flat_P[part],
                    grad_P[part],
                    self.m_P[part],
                    self.v_P[part],
                    lr=rate,
                    step=self.updates,
                    weight_decay=self.weight_decay,
                    grad_factor=clip_factor(norm, self.clip),
                )
            if self.average_P is not None:
                # early updates count fully, or the start would stay in the average for long
                kept = min(self.ema, self.updates / (self.updates + 9))
                self.average_P.lerp_(self.adapters.flat_P, 1 - kept)
        grad_P.zero_()
        return norm

    def pieces(self) -> dict[str, Piece]:
        """What a state holds of it, whole on every rank."""
        tensors = {"masters": self.adapters.flat_P, "m": self.m_P, "v": self.v_P}
        if self.average_P is not None:
            tensors["average"] = self.average_P
        return {name: whole(tensor) for name, tensor in tensors.items()}

    def restore(self, state: State) -> None:
        """Take up the masters, moments and average of a state.

        Raises:
            ValueError: it holds others than these.
        """
        pieces = self.pieces()
        if pieces.keys() != state.names():
            raise ValueError(f"{state.path} holds {sorted(state.names())}, not {sorted(pieces)}")
        for name, piece in pieces.items():
            piece.rows.copy_(state.read(name, piece.start, piece.start + len(piece.rows)))
        self.updates = state.facts["updates"]

    def _parts(self, lr: float) -> list[tuple[slice, float]]:
        """Parts of the flat buffer, and the rate of each."""
        ratio, num_a = self.adapters.settings.plus_ratio, self.adapters.num_a
        if ratio == 1:
            return [(slice(None), lr)]
        return [(slice(num_a), lr), (slice(num_a, None), lr * ratio)]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the adapters be their average for a while, where one is kept."""
        if self.average_P is None:
            yield
            return
        own_P = self.adapters.flat_P.clone()
        try:
            self.adapters.flat_P.copy_(self.average_P)
            yield
        finally:
            self.adapters.flat_P.copy_(own_P)


class OutOfRoom(Exception):
    """A pack did not fit into the memory of so many ranks; all of them raise this."""

    def __init__(self, num_ranks: int) -> None:
        super().__init__(f"a pack did not fit into the memory of {num_ranks} ranks")


class StepResult(NamedTuple):
    loss: float
    """Mean negative log-likelihood of the step's supervised tokens, in nats."""
    grad_norm: float
    """Before clipping."""
    flags: tuple[float, ...] = ()
    """Each flag, summed over ranks."""


def add_gradient(
    model: Llama, adapters: Adapters, batch: Batch, scale: float, dropout_seed: int = 0
) -> float:
    """Add one pack's gradient to the flat buffer.

    Args:
        model: frozen weights.
        adapters: what trains; their dropout setting applies.
        batch: the pack.
        scale: 1 / supervised tokens of the whole step.
        dropout_seed: key of the masks.

    Returns:
        The pack's share of the step's loss.
    """
    pack, dropout = batch.pack, None
    if adapters.settings.dropout:
        p = adapters.settings.dropout
        dropout = Dropout(p, dropout_seed, pack.positions_T, batch.draws_T)
    attend = model.packed_attention(pack.documents)
    h_TD = model(pack.ids_T, pack.positions_T, attend, adapters, dropout)
    loss = linear_cross_entropy(h_TD, model.head_VD, batch.rows_S, batch.labels_S, scale)
    loss.backward()
    return float(loss.detach())


def train_step(
    model: Llama,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    supervised_tokens: int,
    lr: float,
    dropout_seed: int = 0,
    ranks: Ranks = ALONE,
    flags: Callable[[], Sequence[float]] = tuple,
) -> StepResult:
    """Run one optimizer step over its packs; every rank calls it, also one without a pack.

    A loss or gradient that is not finite changes no weight, on no rank; the result shows it.

    Args:
        model: frozen weights.
        optimizer: of what trains.
        batches: this rank's packs.
        supervised_tokens: of the whole step, over all ranks.
        lr: learning rate.
        dropout_seed: key of the masks.
        ranks: who takes part.
        flags: gives, after the packs, numbers that travel with the loss: 1 for a request to stop.

    Returns:
        The whole step's loss and norm, equal on all ranks.

    Raises:
        OutOfRoom: on all ranks, when a pack did not fit into the memory of one; nothing changed.
    """
    scale = 1 / max(1, supervised_tokens)
    adapters = optimizer.adapters
    own_loss, full = 0.0, False
    try:
        for batch in batches:
            own_loss += add_gradient(model, adapters, batch, scale, dropout_seed)
    except torch.OutOfMemoryError:
        # the others are on their way to the sum below, which must hear of it
        full = True
    loss, num_full, *told = ranks.total([own_loss, full, *flags()])
    if num_full:
        adapters.grad_P.zero_()
        raise OutOfRoom(int(num_full))
    ranks.sum_(adapters.grad_P)
    if not math.isfinite(loss):
        adapters.grad_P.zero_()
        return StepResult(loss, math.nan, tuple(told))
    return StepResult(loss, optimizer.step(lr), tuple(told))


@torch.inference_mode()
def summed_loss(model: Llama, adapters: Adapters | None, batch: Batch) -> float:
    """Sum of a pack's token losses, without gradient."""
    attend = model.packed_attention(batch.pack.documents)
    h_TD = model(batch.pack.ids_T, batch.pack.positions_T, attend, adapters)
    return float(linear_cross_entropy(h_TD, model.head_VD, batch.rows_S, batch.labels_S))
