"""The passes of a decoder layer and of its parts over augmented buffers, by the layer's own code.

    layer_passes(config, T=8192, R=16, p=0.0)["qkv"]

Everything is on the meta device (traffic.py): a layer is what model/augmented_layers.py makes of
it, in three parts. Each is the part's forward and backward pass:

    qkv    residual addition, norm, projection and rotation                         norm_heads
    o      the projection behind attention
    mlp    residual addition, norm, gate and up, gating, down                         norm_mlp

Shapes   T = packed tokens, K inputs and N outputs of a group, R rank of each projection.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from bioinstruct.benches.traffic import Pass, passes
from bioinstruct.kernels import Branch, Dropout, Rotation
from bioinstruct.kernels.augmented import Augmented, Use, late_linear_of, linear_of
from bioinstruct.kernels.lora import group_of
from bioinstruct.kernels.norm_lora import Late
from bioinstruct.kernels.rows import with_room
from bioinstruct.kernels.sublayers import Norm, norm_heads, norm_mlp
from bioinstruct.model.adapters import GROUPS, TARGETS, projection_shapes
from bioinstruct.model.config import LlamaConfig

SCALE, SITE = 2.0, 3


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor that wants a gradient."""
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def masks(T: int, p: float) -> Dropout | None:
    """Masks whose numbers nobody reads."""
    zeros = torch.zeros(T, dtype=torch.int64)
    return Dropout(p, 2**32 - 1, zeros, zeros) if p else None


def use_of(K: int, N: int, own: Sequence[tuple[int, int]], R: int, dropout: Dropout | None) -> Use:
    """A use of a buffer, whose masters have gradients already.

    Args:
        K: inputs.
        N: rows of the frozen weight.
        own: first row and number of rows of each projection that has an adapter.
        R: their rank.
        dropout: of their input.
    """
    branches = []
    for i, (start, rows) in enumerate(own):
        a_RK, b_NR = leaf(R, K, dtype=torch.float32), leaf(rows, R, dtype=torch.float32)
        a_RK.grad, b_NR.grad = torch.zeros_like(a_RK), torch.zeros_like(b_NR)
        branches.append(Branch(a_RK, b_NR, start, number=i))
    buffer = Augmented(leaf(N, K).detach(), branches)
    return Use(buffer, group_of(branches, SCALE, dropout, SITE, fused=True))


def layer_calls(
    config: LlamaConfig, T: int, R: int, p: float, adapted: Collection[str] = tuple(TARGETS)
) -> dict[str, Callable[[], None]]:
    """Make what the three parts of a layer work on, and return the parts.

    Args:
        config: the model's shape.
        T: tokens.
        R: rank of each adapted projection.
        p: dropout.
        adapted: names of the projections that have adapters.
    """
    shapes, dropout = projection_shapes(config), masks(T, p)
    uses = {}
    for group in GROUPS:
        names = [name for name, (own, _) in TARGETS.items() if own == group]
        places = [(shapes[name][2], shapes[name][0]) for name in names if name in adapted]
        N, K = sum(shapes[name][0] for name in names), shapes[names[0]][1]
        uses[group] = use_of(K, N, places, R, dropout)
    return {
        "qkv": _heads(config, T, uses["qkv"], uses["down"].buffer.room),
        "o": _output(T, uses),
        "mlp": _mlp(config.hidden_size, T, uses),
    }


def layer_passes(
    config: LlamaConfig, T: int, R: int, p: float, adapted: Collection[str] = tuple(TARGETS)
) -> dict[str, list[Pass]]:
    """Passes of the three parts; what they are given is layer_calls'."""
    with torch.device("meta"):
        calls = layer_calls(config, T, R, p, adapted)
        return {name: passes(call) for name, call in calls.items()}


def _heads(config: LlamaConfig, T: int, use: Use, room: int) -> Callable[[], None]:
    D, E = config.hidden_size, config.head_dim
    x_TD, delta_TD, norm = leaf(T, D), leaf(T, D), Norm(leaf(D).detach(), 1e-5, room)
    rotation = Rotation(torch.zeros(T, E // 2), torch.zeros(T, E // 2))

    def call() -> None:
        h_TD, heads = norm_heads(x_TD, delta_TD, norm, use, rotation, config.num_heads)
        # attention gives each gradient in memory of its own
        gradients = [part.new_empty(part.shape) for part in heads]
        _back((h_TD, *heads), (torch.empty_like(h_TD), *gradients), (x_TD, delta_TD))

    return call


def _is_late(uses: dict[str, Use]) -> bool:
    """As model/augmented_layers.py decides it."""
    return uses["o"].fuses() and uses["gate_up"].fuses()


def _output(T: int, uses: dict[str, Use]) -> Callable[[], None]:
    use = uses["o"]
    x_TK = leaf(T, use.buffer.K)

    def call() -> None:
        y_TN = late_linear_of(use, x_TK)[0] if _is_late(uses) else linear_of(use, x_TK)
        dy_TN = with_room(y_TN, y_TN.shape, use.buffer.room)
        _back((y_TN,), (dy_TN,), (x_TK,))

    return call


def _mlp(D: int, T: int, uses: dict[str, Use]) -> Callable[[], None]:
    gate_up, down, o = uses["gate_up"], uses["down"], uses["o"].buffer
    x_TD, delta_TD, norm = leaf(T, D), leaf(T, D), Norm(leaf(D).detach(), 1e-5, o.room)
    late = None
    if _is_late(uses):
        late = Late(o.we.new_empty(T, o.room), o.we[: o.N, o.K :])

    def call() -> None:
        h_TD, y_TD = norm_mlp(x_TD, delta_TD, norm, gate_up, down, late)
        dy_TD = with_room(y_TD, y_TD.shape, down.buffer.room)
        _back((h_TD, y_TD), (torch.empty_like(h_TD), dy_TD), (x_TD, delta_TD))

    return call


def _back(outputs: Sequence[Tensor], gradients: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    # asked for rather than added to the inputs, as the layer before would take them
    torch.autograd.grad(outputs, inputs, gradients)
