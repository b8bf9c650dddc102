"""Every op with a pack as one function of its rows: for repeatability and for large offsets.

A case has inputs with a row for every token and inputs shared by all tokens; `call` maps some of
the rows, and the number of the first, to the op's output on them. Rows that do not depend on each
other may be computed apart, so the last rows of a large pack have an independent answer.

Shapes   T tokens, D width of a row, R rank, E head width, V vocabulary.
"""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bioinstruct.benches.workload import SHAPES, make_model
from bioinstruct.kernels import (
    Branch,
    Documents,
    Dropout,
    Rotation,
    add_rmsnorm,
    attention,
    linear_cross_entropy,
    lora_linear,
    rmsnorm,
    rope,
    split_rope,
    swiglu,
)
from bioinstruct.kernels.attention import choose_backend
from bioinstruct.kernels.dispatch import uses_triton
from bioinstruct.kernels.gemm_lora import gemm_lora
from bioinstruct.model.adapters import Adapters, LoraSettings

TAIL = 64
"""Tokens of the last document of a pack, which are a pack of their own."""
SITE, SCALE = 3, 2.0


class Sizes(NamedTuple):
    """Widths of the cases."""

    D: int
    R: int
    E: int
    V: int


LARGE, TINY = Sizes(4096, 16, 128, 128_256), Sizes(32, 4, 8, 40)


class Case(NamedTuple):
    """An op, and how to make its inputs."""

    name: str
    widths: tuple[tuple[int, ...], ...]
    """Of a row of each input with rows."""
    shared: tuple[tuple[int, ...], ...]
    """Shapes of the inputs without; they are float32, as adapters are."""
    call: Callable[..., Tensor]
    """(first row, *inputs with rows, *shared) -> output."""

    @property
    def elements(self) -> int:
        """Of a row of the widest input."""
        return max(int(torch.Size(width).numel()) for width in self.widths)


class Place(NamedTuple):
    """Where and in what the cases run."""

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """The same numbers for the same shape."""
        generator = torch.Generator(self.device).manual_seed(sum(shape))
        empty = torch.empty(shape, device=self.device, dtype=dtype or self.dtype)
        return empty.normal_(0, 0.5, generator=generator)

    def masks(self, first: int, rows: int) -> Dropout:
        """Masks of rows that lie in documents of 2,048 tokens."""
        tokens = torch.arange(first, first + rows, device=self.device)
        return Dropout(0.1, 7, tokens % 2048, tokens // 2048)

    def rotation(self, first: int, rows: int) -> Rotation:
        """Angles of these rows."""
        tokens = torch.arange(first, first + rows, device=self.device) % 2048
        frequencies = torch.linspace(0.001, 1, self.sizes.E // 2, device=self.device)
        angles_TE = tokens[:, None] * frequencies
        return Rotation(angles_TE.cos(), angles_TE.sin())


def documents_of(T: int, device: torch.device) -> Documents:
    """Documents of 2,048 tokens, then what is left, then TAIL."""
    body = T - TAIL
    rest = [body % 2048] if body % 2048 else []
    return Documents.of_lengths([2048] * (body // 2048) + rest + [TAIL], device)


def cases(place: Place) -> Iterator[Case]:
    """All of them; those of whole packs first."""
    D, R, E, _ = place.sizes
    yield Case("rmsnorm", ((D,),), ((D,),), lambda _, x, w: rmsnorm(x, w.to(x.dtype)))
    yield Case(
        "add_rmsnorm",
        ((D,), (D,)),
        ((D,),),
        lambda _, x, delta, w: torch.cat(add_rmsnorm(x, delta, w.to(x.dtype)), 1),
    )
    yield Case("swiglu", ((2 * D,),), (), lambda _, x: swiglu(x))
    yield Case("rope", ((D // E, E),), (), lambda i, x: rope(x, place.rotation(i, len(x))))
    yield Case("split_rope", ((D,),), (), _split_rope(place))
    yield Case("lora_linear", ((D,),), ((R, D), (D, R)), _lora_linear(place, dropped=False))
    yield Case("lora_linear, dropout", ((D,),), ((R, D), (D, R)), _lora_linear(place, dropped=True))
    yield Case("gemm_lora", ((D,), (R,)), (), _gemm_lora(place))
    yield Case("dropout", ((D,),), (), lambda i, x: x * place.masks(i, len(x)).mask(5, D, x.dtype))
    layer = _augmented_layer(place)
    if layer is not None:
        yield Case("augmented layer", ((D,),), (), layer)
    yield Case("linear_cross_entropy", ((D,),), (), _loss(place))
    yield Case(
        "attention", ((D // E, E), (D // E // 2, E), (D // E // 2, E)), (), _attention(place)
    )


def _split_rope(place: Place) -> Callable[..., Tensor]:
    heads = place.sizes.D // place.sizes.E

    def call(first: int, x: Tensor) -> Tensor:
        # turned in place on a GPU, so the op gets a copy
        parts = split_rope(x * 1, place.rotation(first, len(x)), heads // 2)
        return torch.cat(parts, 1)

    return call


def _lora_linear(place: Place, *, dropped: bool) -> Callable[..., Tensor]:
    D = place.sizes.D
    w_NK = place.random(D, D)

    def call(first: int, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        masks = place.masks(first, len(x)) if dropped else None
        return lora_linear(x, w_NK, [Branch(a, b, 0)], SCALE, masks, SITE)

    return call


def _augmented_layer(place: Place) -> Callable[..., Tensor] | None:
    """A whole layer over augmented buffers, where there are any and the kernels run."""
    if importlib.util.find_spec("bioinstruct.model.augmented_layers") is None:
        return None
    D, R, E, _ = place.sizes
    heads = D // E
    config = dataclasses.replace(
        SHAPES["tiny"],
        num_layers=1,
        hidden_size=D,
        intermediate_size=D // 2,
        num_heads=heads,
        num_kv_heads=heads // 2,
        head_dim=E,
        vocab_size=64,
    )
    model = make_model(config, place.device, place.dtype)
    adapters = Adapters(config, LoraSettings(r=R, alpha=2.0 * R), place.device)
    with torch.no_grad():
        adapters.flat_P.copy_(0.1 * place.random(adapters.flat_P.numel(), dtype=torch.float32))
    if not uses_triton(model.norm_D, adapters.flat_P):
        return None
    made: Any = importlib.import_module("bioinstruct.model.augmented_layers")
    (layer,) = made.AugmentedLayers([*model.blocks], adapters).layers

    def call(first: int, x: Tensor) -> Tensor:
        T = len(x)
        attend = model.packed_attention(documents_of(T, place.device))
        given = place.rotation(first, T), attend, place.masks(first, T)
        y: Tensor = layer(made.Residual(x), *given).added()
        return y

    return call


class _GemmLora(torch.autograd.Function):
    """Both products of the graph-split form; t has no gradient here."""

    @staticmethod
    def forward(ctx, x, t, w_NK, b_NR):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(t, w_NK, b_NR)
        return gemm_lora(x, w_NK, t, b_NR)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        t, w_NK, b_NR = ctx.saved_tensors
        return gemm_lora(dy, w_NK.T, t, b_NR), None, None, None


def _gemm_lora(place: Place) -> Callable[..., Tensor]:
    D, R, _, _ = place.sizes
    w_NK, b_NR = place.random(D, D), place.random(D, R)
    return lambda _, x, t: _GemmLora.apply(x, t.detach(), w_NK, b_NR)


def _loss(place: Place) -> Callable[..., Tensor]:
    w_VD = place.random(place.sizes.V, place.sizes.D)

    def call(first: int, x: Tensor) -> Tensor:
        rows = torch.arange(len(x) - TAIL, len(x), device=x.device)
        labels = (rows + first) % place.sizes.V
        # one number for all rows: the others have no part in it
        return linear_cross_entropy(x, w_VD, rows, labels).expand(len(x), 1)

    return call


def _attention(place: Place) -> Callable[..., Tensor]:
    backend = choose_backend("auto", place.device, place.dtype)
    return lambda _, q, k, v: attention(q, k, v, documents_of(len(q), q.device), backend)


class Found(NamedTuple):
    """Outputs of the last TAIL rows, and gradients: of these rows, and of what all rows share."""

    output: Tensor
    rows: list[Tensor]
    shared: list[Tensor]


def run(case: Case, place: Place, T: int, *, alone: bool) -> Found:
    """Run a case on T rows of which only the last TAIL have a gradient, or on these alone.

    Args:
        case: which.
        place: where.
        T: rows of the pack.
        alone: whether the last TAIL rows are taken from it and computed as a pack of their own.
    """
    rows = [place.random(T, *width) for width in case.widths]
    if alone:
        rows = [x[-TAIL:].clone() for x in rows]
    rows = [x.requires_grad_() for x in rows]
    shared = [place.random(*shape, dtype=torch.float32).requires_grad_() for shape in case.shared]
    y = case.call(T - len(rows[0]), *rows, *shared)
    dy = torch.zeros_like(y)
    dy[-TAIL:] = place.random(TAIL, *y.shape[1:])
    y.backward(dy)
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in rows]
    return Found(
        y[-TAIL:].detach().clone(),
        [g[-TAIL:].clone() for g in gradients],
        [x.grad for x in shared if x.grad is not None],
    )
