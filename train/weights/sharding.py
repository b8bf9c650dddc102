"""A model whose weights are spread over the ranks: FSDP2, one group a block.

    full     every rank holds 1/size of the rows of each weight
    hybrid   1/local_size of them: machines hold copies of each other, and weights travel within one

Before a block computes, its weights are gathered from all shards, and dropped after; again in the
backward pass. Embedding, head and last gain are the root's group, gathered once a pack, because
they are needed at both ends of it; tied, they are one tensor anyway. Adapters never belong to FSDP:
they are no parameters of the model, stay whole on each rank and are summed in one flat collective.

Where all weights train, the shards are their float32 masters (Rajbhandari et al. 2020, arXiv
1910.02054): gathered in the compute dtype, their gradients summed and scattered in float32 into
the flat gradient of this rank, whose moments exist for its rows alone. Sums, not means: the loss
is scaled by the whole step's tokens already.

Collectives of a pack with L blocks: L + 1 gathers forward, L backward; where all weights train,
L + 1 reduce-scatters too (hybrid: and L + 1 all-reduces in the step's last pack). All ranks must
issue them alike, so a rank with fewer packs takes an empty one.

A model is made on the meta device, then sharded, then given memory, then filled from the mapped
files row by row: no rank ever holds the whole.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from bioinstruct.kernels.adamw import wide_norm
from bioinstruct.model.checkpoint import Checkpoint, Rows
from bioinstruct.model.llama import Llama
from bioinstruct.train.ranks.process import Ranks
from bioinstruct.train.resume.state import Piece
from bioinstruct.train.weights.full import FullMasters, decays, ordered
from bioinstruct.train.weights.masters import Part


def sharded_model(
    checkpoint: Checkpoint, ranks: Ranks, *, mode: str, dtype: torch.dtype, trains: bool
) -> Llama:
    """Load a model of which this rank holds only its rows.

    Args:
        checkpoint: where the weights are.
        ranks: among whom they are spread, at least two.
        mode: full | hybrid.
        dtype: in which it computes.
        trains: whether all its weights train; the shards are then at least float32.

    Raises:
        ValueError: as Checkpoint.load_rows; or hybrid without several machines alike.
    """
    stored = torch.promote_types(dtype, torch.float32) if trains else dtype
    model = Llama(checkpoint.config, "meta", stored)
    model.requires_grad_(trains)
    shard(model, _mesh(ranks, mode), dtype)
    model.materialise(ranks.device)
    model.dtype = dtype
    checkpoint.load_rows(_rows(model))
    return model


def _mesh(ranks: Ranks, mode: str) -> DeviceMesh:
    kind, local = ranks.device.type, ranks.local_size
    if mode == "full":
        return init_device_mesh(kind, (ranks.size,), mesh_dim_names=("shard",))
    if ranks.size % local or ranks.size == local:
        raise ValueError(
            f"shard = hybrid needs several machines with equally many processes; there are "
            f"{ranks.size} processes, {local} of them here; set shard = full"
        )
    shape = ranks.size // local, local
    return init_device_mesh(kind, shape, mesh_dim_names=("copy", "shard"))


def shard(model: Llama, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Make a model's blocks, and the rest of it, FSDP2 groups that compute in dtype."""
    # adapters in one buffer with weights would be sharded with them
    model.may_augment = False
    # inputs are cast by nobody: angles stay float32
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.promote_types(dtype, torch.float32),
        cast_forward_inputs=False,
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # a plain sum: gloo has neither means nor factors
            module.set_force_sum_reduction_for_comms(True)


def _first_row(parameter: DTensor) -> int:
    """Number of the first of this rank's rows: torch.chunk's parts are equal but for the last."""
    mesh = parameter.device_mesh
    size, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    return min(rank * math.ceil(len(parameter) / size), len(parameter))


def _rows(model: Llama) -> dict[str, Rows]:
    """Where this rank's rows of each tensor belong, by Hugging Face name."""
    places = {}
    for name, (parameter, start, rows) in model.pieces().items():
        assert isinstance(parameter, DTensor)
        local = parameter.to_local().detach()
        own = _first_row(parameter)
        first, last = max(start, own), min(start + rows, own + len(local))
        part = local[first - own : max(first, last) - own]
        places[name] = Rows((rows, *parameter.shape[1:]), first - start, part)
    return places


class ShardedWeights(FullMasters):
    """All weights of a sharded model: this rank's rows of them.

    Args:
        model: made by sharded_model, with trains.
        ranks: among whom it is spread.
    """

    is_sharded = True

    def __init__(self, model: Llama, ranks: Ranks) -> None:
        assert isinstance(model, FSDPModule)
        self.model, self.root, self.ranks = model, model, ranks
        self.shards = [p for p in ordered(model) if isinstance(p, DTensor)]
        locals_ = [p.to_local().detach() for p in self.shards]
        total = sum(local.numel() for local in locals_)
        grad_P = torch.zeros(total, dtype=self.shards[0].dtype, device=ranks.device)
        parts, start = [], 0
        for parameter, local in zip(self.shards, locals_, strict=True):
            place = slice(start, start := start + local.numel())
            parts.append(Part(place, local.view(-1), decays=decays(parameter)))
            # FSDP adds to a gradient that is there already
            parameter.grad = _like(parameter, grad_P[place].view_as(local))
        super().__init__(grad_P, parts)

    def before_pack(self, is_last: bool) -> None:
        # sums between copies on several machines can wait for the last pack
        self.root.set_requires_all_reduce(is_last)

    def sum_gradient(self, ranks: Ranks) -> None:
        """Nothing is left to do: the backward passes summed it."""

    def gradient_norm(self) -> Tensor:
        square: Tensor = wide_norm(self.grad_P).square()
        self.ranks.sum_(square)
        mesh = self.shards[0].device_mesh
        copies = mesh.size(0) if mesh.ndim == 2 else 1
        return (square / copies).sqrt()

    def changed(self) -> None:
        self._let_go()

    def _let_go(self) -> None:
        """Drop what a pass without gradient left gathered: the model shows its shards again."""
        self.root.reshard()

    def pieces(self, flat_P: Tensor) -> dict[str, Piece]:
        self._let_go()
        held = {p: part.place for p, part in zip(self.shards, self.parts, strict=True)}
        pieces = {}
        for name, (parameter, start, rows) in self.model.pieces().items():
            assert isinstance(parameter, DTensor)
            local = flat_P[held[parameter]].view_as(parameter.to_local())
            own = _first_row(parameter)
            first, last = max(start, own), min(start + rows, own + len(local))
            last = max(first, last)
            pieces[name] = Piece(local[first - own : last - own], first - start, rows)
        return pieces

    @property
    def num_writers(self) -> int:
        mesh = self.shards[0].device_mesh
        return mesh.size(mesh.ndim - 1)

    def named(self, flat_P: Tensor) -> Iterator[tuple[str, Tensor]]:
        self._let_go()
        held = {p: part.place for p, part in zip(self.shards, self.parts, strict=True)}
        whole: dict[nn.Parameter, Tensor] = {}
        for name, (parameter, first, rows) in self.model.pieces().items():
            if parameter not in whole:
                assert isinstance(parameter, DTensor)
                local = flat_P[held[parameter]].view_as(parameter.to_local())
                whole = {parameter: _like(parameter, local).full_tensor()}
            yield name, whole[parameter][first : first + rows]


def _like(parameter: DTensor, local: Tensor) -> DTensor:
    """This rank's part as a tensor that is spread like a parameter."""
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
