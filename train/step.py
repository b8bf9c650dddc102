"""One optimizer step: gradients of its packs, summed; then clip and AdamW on flat buffers.

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
from torch import Tensor

from bioinstruct.kernels import Dropout, linear_cross_entropy
from bioinstruct.kernels.adamw import adamw_, clip_factor
from bioinstruct.model.adapters import Adapters
from bioinstruct.model.llama import Llama
from bioinstruct.train.data.batch import Batch
from bioinstruct.train.ranks.process import ALONE, Ranks
from bioinstruct.train.resume.state import Piece, State
from bioinstruct.train.side_by_side import SideBySide
from bioinstruct.train.weights.masters import LoraMasters, Masters


class Optimizer:
    """AdamW on flat buffers.

    Args:
        trained: what trains.
        weight_decay: decoupled decay, of the masters that decay.
        clip: largest gradient norm; 0 for none.
        ema: share that an average of the masters keeps of itself at an update; 0 for no average.
    """

    def __init__(
        self,
        trained: Masters | Adapters,
        *,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        ema: float = 0.0,
    ) -> None:
        self.masters = LoraMasters(trained) if isinstance(trained, Adapters) else trained
        self.weight_decay, self.clip, self.ema = weight_decay, clip, ema
        self.m_P = torch.zeros_like(self.masters.grad_P)
        self.v_P = torch.zeros_like(self.masters.grad_P)
        self.average_P = self.masters.flat() if ema else None
        self.updates = 0

    def step(self, lr: float, norm: float | None = None) -> float:
        """Apply the collected gradient and clear it.

        Args:
            lr: learning rate.
            norm: of the gradient, where it is known.

        Returns:
            The gradient's norm before clipping; where it is not finite nothing was changed.
        """
        grad_P = self.masters.grad_P
        norm = float(self.masters.gradient_norm()) if norm is None else norm
        if math.isfinite(norm):
            self.updates += 1
            adapters = self.masters.adapters
            for part in self.masters.parts:
                adamw_(
                    part.master_P,
                    grad_P[part.place],
                    self.m_P[part.place],
                    self.v_P[part.place],
                    lr=lr * part.rate,
                    step=self.updates,
                    weight_decay=self.weight_decay if part.decays else 0.0,
                    grad_factor=clip_factor(norm, self.clip),
                    mirror=None if adapters is None else adapters.mirror,
                )
            self.masters.changed()
            self._follow()
        grad_P.zero_()
        return norm

    def _follow(self) -> None:
        """Move the average towards the masters."""
        if self.average_P is None:
            return
        # early updates count fully, or the start would stay in the average for long
        kept = min(self.ema, self.updates / (self.updates + 9))
        for part in self.masters.parts:
            self.average_P[part.place].lerp_(part.master_P, 1 - kept)

    def pieces(self) -> dict[str, Piece]:
        """What a state holds of it: this rank's rows of every tensor, by KIND.NAME."""
        return self._pieces(self.masters.flat())

    def _pieces(self, masters_P: Tensor) -> dict[str, Piece]:
        vectors = {"masters": masters_P, "m": self.m_P, "v": self.v_P}
        if self.average_P is not None:
            vectors["average"] = self.average_P
        return {
            f"{kind}.{name}": piece
            for kind, vector_P in vectors.items()
            for name, piece in self.masters.pieces(vector_P).items()
        }

    def restore(self, state: State) -> None:
        """Take up the masters, moments and average of a state, whichever ranks wrote it.

        Raises:
            ValueError: it holds others than these.
        """
        masters_P = self.masters.flat()
        pieces = self._pieces(masters_P)
        if pieces.keys() != state.names():
            odd = sorted(pieces.keys() ^ state.names())
            raise ValueError(f"{state.path} and this run differ in {', '.join(odd[:5])}")
        for name, (rows, start, _) in pieces.items():
            if len(rows):
                rows.copy_(state.read(name, start, start + len(rows)))
        self.masters.set_flat(masters_P)
        self.updates = state.facts["updates"]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the masters be their average for a while, where one is kept."""
        if self.average_P is None:
            yield
            return
        own_P = self.masters.flat()
        try:
            self.masters.set_flat(self.average_P)
            yield
        finally:
            self.masters.set_flat(own_P)


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
    model: Llama, adapters: Adapters | None, batch: Batch, scale: float, dropout_seed: int = 0
) -> Tensor:
    """Add one pack's gradient to the flat buffer.

    Args:
        model: the weights, frozen or trained.
        adapters: where they train; their dropout setting applies.
        batch: the pack.
        scale: 1 / supervised tokens of the whole step.
        dropout_seed: key of the masks.

    Returns:
        The pack's share of the step's loss, a scalar on the device; who reads it waits for it.
    """
    pack, dropout = batch.pack, None
    if adapters is not None and adapters.settings.dropout:
        p, own = adapters.settings.dropout, adapters.settings.dropout_per_module
        dropout = Dropout(p, dropout_seed, pack.positions_T, batch.draws_T, own)
    attend = model.packed_attention(pack.documents)
    h_TD = model(pack.ids_T, pack.positions_T, attend, adapters, dropout)
    loss = linear_cross_entropy(h_TD, model.head_VD, batch.rows_S, batch.labels_S, scale)
    loss.backward()
    return loss.detach()


def train_step(
    model: Llama,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    supervised_tokens: int,
    lr: float,
    dropout_seed: int = 0,
    ranks: Ranks = ALONE,
    beside: SideBySide | None = None,
    flags: Callable[[], Sequence[float]] = tuple,
    meanwhile: Callable[[], None] = lambda: None,
) -> StepResult:
    """Run one optimizer step over its packs; every rank calls it, also one without a pack.

    A loss or gradient that is not finite changes no weight, on no rank; the result shows it.

    Args:
        model: the weights, frozen or trained.
        optimizer: of what trains.
        batches: this rank's packs.
        supervised_tokens: of the whole step, over all ranks.
        lr: learning rate.
        dropout_seed: key of the masks.
        ranks: who takes part.
        beside: takes several packs at once.
        flags: gives, after the packs, numbers that travel with the loss: 1 for a request to stop.
        meanwhile: called once all work is given to the device and before the host waits for it.

    Returns:
        The whole step's loss and norm, equal on all ranks.

    Raises:
        OutOfRoom: on all ranks, when a pack did not fit into the memory of one; nothing changed.
    """
    scale, full = 1 / max(1, supervised_tokens), False
    masters = optimizer.masters
    own_loss = torch.zeros((), dtype=torch.float64, device=masters.grad_P.device)
    try:
        if beside is None:
            for batch, is_last in _last_marked(batches):
                masters.before_pack(is_last)
                own_loss += add_gradient(model, masters.adapters, batch, scale, dropout_seed)
        else:

            def add(adapters: Adapters, batch: Batch) -> Tensor:
                return add_gradient(model, adapters, batch, scale, dropout_seed)

            for loss_of_pack in beside(list(batches), add):
                own_loss += loss_of_pack
    except torch.OutOfMemoryError:
        masters.check_recovers()
        # the others are on their way to the sum below, which must hear of it
        full = True
    told = torch.tensor([full, *flags()], dtype=torch.float64)
    sums = torch.cat([own_loss.view(1), told.to(own_loss.device, non_blocking=True)])
    ranks.sum_(sums)
    masters.sum_gradient(ranks)
    sums = torch.cat([sums, masters.gradient_norm().view(1)])
    meanwhile()
    # the one place in a step where the host waits for the device
    loss, num_full, *answers, norm = sums.tolist()
    if num_full or not math.isfinite(loss):
        masters.grad_P.zero_()
    if num_full:
        raise OutOfRoom(int(num_full))
    if not math.isfinite(loss):
        return StepResult(loss, math.nan, tuple(answers))
    return StepResult(loss, optimizer.step(lr, norm), tuple(answers))


def _last_marked(batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Yield each batch, and whether it is the last."""
    before: Batch | None = None
    for batch in batches:
        if before is not None:
            yield before, False
        before = batch
    if before is not None:
        yield before, True


@torch.no_grad()
def summed_loss(model: Llama, adapters: Adapters | None, batch: Batch) -> float:
    """Sum of a pack's token losses, without gradient."""
    # not inference_mode: FSDP keeps what it gathers here for passes with a gradient
    attend = model.packed_attention(batch.pack.documents)
    h_TD = model(batch.pack.ids_T, batch.pack.positions_T, attend, adapters)
    return float(linear_cross_entropy(h_TD, model.head_VD, batch.rows_S, batch.labels_S))
