"""The halves of a layer as one function each, in Triton's interpreter or on a GPU.

Outputs and every gradient against float64 within the budget of benches/budget.py; the references
are compositions of the ops' own. torch.empty is filled with NaN, also the room behind rows.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bioinstruct.benches.budget import check, normal
from bioinstruct.kernels import (
    Branch,
    Dropout,
    Rotation,
    dispatch,
    norm_lora,
    skinny,
    sublayers,
    swiglu_lora,
)
from bioinstruct.kernels.augmented import Augmented, Use
from bioinstruct.kernels.lora import group_of, in_turn, lora_linear_reference
from bioinstruct.kernels.norm_lora import Late, norm_with_t
from bioinstruct.kernels.rmsnorm import rmsnorm_reference
from bioinstruct.kernels.rope import rope_reference
from bioinstruct.kernels.skinny import Mask
from bioinstruct.kernels.sublayers import Norm, norm_heads, norm_linear, norm_mlp
from bioinstruct.kernels.swiglu import swiglu_reference

pytest.importorskip("triton", reason="Triton is not installed (it comes for Linux only)")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
each_size = pytest.mark.parametrize(
    ("T", "dtype"),
    [
        (0, torch.float32),
        (1, torch.float32),
        (45, torch.float32),
        (45, torch.float16),
        pytest.param(45, torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
SCALE, EPS = 0.5, 1e-5
Parts = Sequence[tuple[int, int, int]]
"""(first row, rows, rank) of each branch."""


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """Every op of these tests runs its kernels."""
    with dispatch.forced("triton"):
        yield


def masks(p: float, T: int, *, per_module: bool = False) -> Dropout | None:
    positions, draws = torch.arange(T) % 7, torch.arange(T) // 7 + 2**31 - 2
    return Dropout(p, 4242424242, positions.to(DEVICE), draws.to(DEVICE), per_module) if p else None


def branches(parts: Parts, masters: Sequence[Tensor]) -> list[Branch]:
    pairs = zip(masters[::2], masters[1::2], parts, strict=True)
    return [Branch(a, b, part[0], number=i) for i, (a, b, part) in enumerate(pairs)]


def sizes(parts: Parts, K: int) -> list[tuple[int, int]]:
    return [shape for _, rows, rank in parts for shape in ((rank, K), (rows, rank))]


def use(weight: Tensor, own: list[Branch], dropout: Dropout | None, site: int) -> Use:
    return Use(Augmented(weight, own), group_of(own, SCALE, dropout, site, fused=True))


def frozen(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [0.3 * x.to(DEVICE, dtype) for x in normal(*shapes, seed=1)]


def rotation(T: int, E: int) -> Rotation:
    angles = torch.arange(T, dtype=torch.float64)[:, None] / torch.arange(1, E // 2 + 1)
    return Rotation(angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE))


HEADS: list[tuple[int, int, int, int, Parts]] = [
    # D, H, G, E, branches
    (24, 3, 3, 8, [(0, 24, 4), (24, 24, 4), (48, 24, 4)]),
    (100, 4, 2, 6, [(0, 24, 8), (24, 12, 1), (36, 12, 15)]),
    (20, 2, 1, 4, [(0, 8, 3), (12, 4, 16)]),  # keys without a branch
    (257, 2, 1, 4, [(0, 8, 64)]),
    (20, 2, 1, 4, [(0, 8, 24), (8, 4, 24), (12, 4, 24)]),  # more ranks than the fused kernels take
    (20, 2, 1, 4, []),
]


@each_size
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("case", HEADS)
def test_norm_heads(
    case: tuple[int, int, int, int, Parts], T: int, p: float, dtype: torch.dtype
) -> None:
    check_heads(case, T, masks(p, T), dtype)


def check_heads(
    case: tuple[int, int, int, int, Parts], T: int, dropout: Dropout | None, dtype: torch.dtype
) -> None:
    D, H, G, E, parts = case
    weight, gain, bias = frozen(((H + 2 * G) * E, D), (D,), ((H + 2 * G) * E,), dtype=dtype)
    table = rotation(T, E)

    def ours(x: Tensor, delta: Tensor, *masters: Tensor) -> Tensor:
        own = use(weight, branches(parts, masters), dropout, 5)
        h, heads = norm_heads(x, delta, Norm(gain, EPS, 8), own, table, H, bias)
        return torch.cat((h, *(part.flatten(1) for part in heads)), 1)

    def reference(x: Tensor, delta: Tensor, *masters: Tensor) -> Tensor:
        h = x + delta
        n, own = rmsnorm_reference(h, gain, EPS), branches(parts, masters)
        y = lora_linear_reference(n, weight, own, SCALE, dropout, 5) + bias.to(x.dtype)
        heads = y.unflatten(1, (H + 2 * G, E))
        turned = rope_reference(heads[:, : H + G], table)
        return torch.cat((h, turned.flatten(1), heads[:, H + G :].flatten(1)), 1)

    inputs = [0.3 * x for x in normal((T, D), (T, D), *sizes(parts, D))]
    check(ours, reference, inputs, dtype, DEVICE, roundings=3)


MLPS: list[tuple[int, int, Parts, Parts]] = [
    # D, F, branches of gate and up, of down
    (24, 40, [(0, 40, 4), (40, 40, 4)], [(0, 24, 4)]),
    (100, 257, [(0, 257, 1), (257, 257, 16)], [(0, 100, 9)]),
    (20, 33, [(33, 33, 8)], [(0, 20, 16)]),  # the gate has no branch
    (20, 33, [(0, 33, 8)], []),
    (20, 33, [], [(0, 20, 5)]),
    (20, 33, [(0, 33, 24), (33, 33, 24)], [(0, 20, 24)]),  # beyond the fused backward pass
    (20, 33, [(0, 33, 4)], [(0, 20, 72)]),
]


@each_size
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("case", MLPS)
def test_norm_mlp(
    case: tuple[int, int, Parts, Parts], T: int, p: float, dtype: torch.dtype
) -> None:
    check_mlp(case, T, masks(p, T), dtype)


def check_mlp(
    case: tuple[int, int, Parts, Parts],
    T: int,
    dropout: Dropout | None,
    dtype: torch.dtype,
    late_ranks: int = 0,
) -> None:
    D, F, above, below = case
    s, b = frozen((T, late_ranks + 3), (D, late_ranks + 5), dtype=dtype)
    late = Late(s[:, :late_ranks], b[:, :late_ranks]) if late_ranks else None
    w_above, w_below, gain = frozen((2 * F, D), (D, F), (D,), dtype=dtype)

    def apart(masters: Sequence[Tensor]) -> tuple[list[Branch], list[Branch]]:
        first = 2 * len(above)
        return branches(above, masters[:first]), branches(below, masters[first:])

    def ours(x: Tensor, delta: Tensor, *masters: Tensor) -> Tensor:
        one, two = apart(masters)
        uses = use(w_above, one, dropout, 5), use(w_below, two, dropout, 6)
        return torch.cat(norm_mlp(x, delta, Norm(gain, EPS, 8), *uses, late), 1)

    def reference(x: Tensor, delta: Tensor, *masters: Tensor) -> Tensor:
        h, (one, two) = x + delta, apart(masters)
        if late is not None:
            h = h + (late.t_TL @ late.b_DL.T).to(h.dtype)
        n = rmsnorm_reference(h, gain, EPS)
        a = swiglu_reference(lora_linear_reference(n, w_above, one, SCALE, dropout, 5))
        return torch.cat((h, lora_linear_reference(a, w_below, two, SCALE, dropout, 6)), 1)

    inputs = [0.3 * x for x in normal((T, D), (T, D), *sizes(above, D), *sizes(below, F))]
    check(ours, reference, inputs, dtype, DEVICE, roundings=3)


@each_size
@pytest.mark.parametrize("L", [1, 8, 24, 64])
def test_what_delta_lacks_is_added_on_the_way_in(L: int, T: int, dtype: torch.dtype) -> None:
    for case, p in ((MLPS[0], 0.3), (MLPS[1], 0.0)):
        check_mlp(case, T, masks(p, T), dtype, L)


def test_a_forgotten_part_of_delta_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    call = norm_with_t
    monkeypatch.setattr(sublayers, "norm_with_t", lambda *given: call(*given[:-1], None))
    with pytest.raises(ValueError, match="is off by"):
        check_mlp(MLPS[0], 45, None, torch.float32, 8)


@pytest.mark.parametrize("T", [1, 45])
def test_a_mask_for_each_module(T: int) -> None:
    dropout = masks(0.3, T, per_module=True)
    for heads in HEADS[:3]:
        check_heads(heads, T, dropout, torch.float32)
    check_mlp(MLPS[1], T, dropout, torch.float32)


def test_the_first_layer_has_no_delta_and_needs_no_input_gradient() -> None:
    D, H, G, E, parts = HEADS[0]
    x, *masters = (0.3 * t.float().to(DEVICE) for t in normal((9, D), *sizes(parts, D)))
    weight, gain = frozen(((H + 2 * G) * E, D), (D,), dtype=torch.float32)
    for master in masters:
        master.requires_grad_()
    own = branches(parts, masters)
    h, y = norm_linear(x, None, Norm(gain, EPS), use(weight, own, None, 0))
    y.square().sum().backward()
    found = [master.grad for master in masters]
    assert h is x and all(grad is not None for grad in found)
    for master in masters:
        master.grad = None
    normed = rmsnorm_reference(x, gain, EPS)
    lora_linear_reference(normed, weight, own, SCALE).square().sum().backward()
    for grad, master in zip(found, masters, strict=True):
        torch.testing.assert_close(grad, master.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_the_two_results_may_go_unused(used: int) -> None:
    D, F, above, below = MLPS[0]
    shapes = sizes(above, D) + sizes(below, F)
    x, delta, *masters = (0.3 * t.float().to(DEVICE) for t in normal((9, D), (9, D), *shapes))
    w_above, w_below, gain = frozen((2 * F, D), (D, F), (D,), dtype=torch.float32)
    x.requires_grad_()
    uses = [
        use(w_above, branches(above, masters[:4]), None, 0),
        use(w_below, branches(below, masters[4:]), None, 1),
    ]
    norm_mlp(x, delta, Norm(gain, EPS), *uses)[used].sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
    assert (x.grad == 1).all() == (used == 0)


def test_repeated_passes_are_the_same_bits() -> None:
    D, F, above, below = MLPS[1]
    shapes = sizes(above, D) + sizes(below, F)
    dropout = masks(0.1, 140)
    given = [0.3 * t.float().to(DEVICE) for t in normal((140, D), (140, D), *shapes)]
    w_above, w_below, gain = frozen((2 * F, D), (D, F), (D,), dtype=torch.float32)
    found = []
    for _ in range(2):
        x, delta, *masters = (t.clone().requires_grad_() for t in given)
        uses = [
            use(w_above, branches(above, masters[:4]), dropout, 0),
            use(w_below, branches(below, masters[4:]), dropout, 1),
        ]
        sum(part.square().sum() for part in norm_mlp(x, delta, Norm(gain, EPS), *uses)).backward()  # type: ignore[union-attr]
        found.append([t.grad for t in (x, delta, *masters)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # type: ignore[arg-type]


# ---- faults are caught -------------------------------------------------------------------------

Call = Callable[..., Any]


def other_scale(call: Call, *args: Any, **kw: Any) -> Any:
    out = list(args)
    i = next(i for i, arg in enumerate(args) if isinstance(arg, Mask))
    out[i] = args[i]._replace(scale=args[i].scale * 1.02)
    return call(*out, **kw)


def no_mask(call: Call, *args: Any, **kw: Any) -> Any:
    cut = [a._replace(dropout=None) if isinstance(a, Mask) else a for a in args]
    return call(*cut, **kw)


def last_row_unwritten(call: Call, dy: Tensor, out: Tensor, *rest: Any) -> Any:
    found = call(dy, out, *rest)
    out[-1] = float("nan")
    return found


def extended_though_masked(call: Call, self: Use, dy: Tensor, ds: Tensor) -> Tensor:
    """The K-extended dx, which is right only without a mask."""
    return torch.mm(dy, self.buffer.w_NK) + torch.mm(ds, self.buffer.a_RK)


def beside_the_diagonal(call: Call, self: Augmented) -> None:
    call(self)
    self.we[: self.N, self.K :] += 0.01


def a_of_another_branch(call: Call, self: Use, parts: Tensor) -> Any:
    return call(self, parts.flip(1))


Fault = tuple[object, str, Call]
OF_HEADS: list[Fault] = [
    (sublayers, "norm_with_t", other_scale),
    (sublayers, "norm_with_t", no_mask),
    (sublayers, "norm_backward_with_da", no_mask),  # x unmasked in dA, and nothing in dx
    (sublayers, "turn_back_with_lora", last_row_unwritten),
    (Use, "unmasked_gradient", extended_though_masked),
    (Augmented, "refresh", beside_the_diagonal),
    (Use, "parts_of_a", a_of_another_branch),
]
OF_MLP: list[Fault] = [
    (sublayers, "swiglu_with_t", other_scale),
    (sublayers, "swiglu_with_t", no_mask),
    (sublayers, "swiglu_backward_with_lora", no_mask),
    (Use, "unmasked_gradient", extended_though_masked),
]


def plant(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    owner, name, change = fault
    call = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kw: change(call, *args, **kw))


@pytest.mark.parametrize("fault", OF_HEADS)
def test_faults_before_attention_are_caught(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, fault)
    with pytest.raises(ValueError, match="is off by"):
        check_heads(HEADS[0], 45, masks(0.3, 45), torch.float32)


@pytest.mark.parametrize("fault", OF_MLP)
def test_faults_of_the_feed_forward_are_caught(
    fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, fault)
    with pytest.raises(ValueError, match="is off by"):
        check_mlp(MLPS[0], 45, masks(0.3, 45), torch.float32)


def test_a_forgotten_scale_of_the_mask_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (skinny, norm_lora, swiglu_lora):
        monkeypatch.setattr(module, "keep_scale", lambda _: 1.0)
    for run in (
        lambda d: check_heads(HEADS[0], 45, d, torch.float32),
        lambda d: check_mlp(MLPS[0], 45, d, torch.float32),
    ):
        with pytest.raises(ValueError, match="is off by"):
            run(masks(0.3, 45))


def test_gradients_of_a_and_b_changed_for_each_other_are_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # of one shape, so that only the numbers can tell
    monkeypatch.setattr(sublayers, "in_turn", lambda da, db: in_turn(db, da))
    with pytest.raises(ValueError, match="is off by"):
        check_heads((16, 2, 1, 8, [(0, 16, 16)]), 45, None, torch.float32)
