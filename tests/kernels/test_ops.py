"""Every op against its reference in float64: outputs and all gradients, on shapes that divide
nothing. The budget is twice eager's own error in the same dtype plus one unit at the scale of all.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bioinstruct.kernels import (
    Branch,
    Dropout,
    Rotation,
    linear_cross_entropy,
    lora_linear,
    rmsnorm,
    rope,
    split_rope,
    swiglu,
)
from bioinstruct.kernels.cross_entropy import linear_cross_entropy_reference
from bioinstruct.kernels.lora import lora_linear_reference
from bioinstruct.kernels.rmsnorm import rmsnorm_reference
from bioinstruct.kernels.rope import rope_reference
from bioinstruct.kernels.swiglu import swiglu_reference

Op = Callable[..., Tensor]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def normal(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def outputs(op: Op, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The op's output and the gradient of each input, for one fixed output gradient."""
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    y = op(*leaves)
    generator = torch.Generator().manual_seed(7)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    y.backward(dy.to(y.dtype))
    grads = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
    return [y.detach(), *grads]


def check(
    ours: Op, reference: Op, inputs: Sequence[Tensor], dtype: torch.dtype, units: int = 1
) -> None:
    # inputs are first rounded to the dtype, so that only the arithmetic is judged
    inputs = [x.to(dtype).double() for x in inputs]
    exact = outputs(reference, inputs, torch.float64)
    eager = outputs(reference, inputs, dtype)
    # one scale for all: a gradient that is exactly zero has none of its own
    scale = max([float(x.abs().max()) for x in exact if x.numel()], default=1.0)
    for i, (y, e, x) in enumerate(zip(outputs(ours, inputs, dtype), eager, exact, strict=True)):
        assert y.shape == x.shape
        assert y.dtype == e.dtype
        if not y.numel():
            continue
        # in float64 eager is the truth itself, and only the order of sums differs
        units = 64 if dtype == torch.float64 else units
        budget = 2 * (e - x).abs().max() + units * torch.finfo(y.dtype).eps * scale
        error = (y - x).abs().max()
        assert error <= budget, f"tensor {i}: {error:.3g} > {budget:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "D"), [(0, 8), (1, 1), (3, 5), (17, 100), (33, 257)])
def test_rmsnorm(T: int, D: int, dtype: torch.dtype) -> None:
    check(rmsnorm, rmsnorm_reference, normal((T, D), (D,)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "F"), [(0, 8), (1, 1), (3, 5), (17, 100), (33, 257)])
def test_swiglu(T: int, F: int, dtype: torch.dtype) -> None:
    check(swiglu, swiglu_reference, normal((T, 2 * F)), dtype)


def rotation(T: int, E: int, dtype: torch.dtype) -> Rotation:
    angles = torch.arange(T, dtype=torch.float64)[:, None] * torch.rand(E // 2).double()
    wide = torch.promote_types(dtype, torch.float32)
    return Rotation(angles.cos().to(wide), angles.sin().to(wide))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "H", "E"), [(0, 2, 4), (1, 1, 2), (5, 3, 6), (33, 4, 64)])
def test_rope(T: int, H: int, E: int, dtype: torch.dtype) -> None:
    table = rotation(T, E, dtype)
    check(lambda x: rope(x, table), lambda x: rope_reference(x, table), normal((T, H, E)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "H", "G", "E"), [(1, 1, 1, 2), (5, 6, 2, 6), (33, 4, 4, 64)])
def test_split_rope(T: int, H: int, G: int, E: int, dtype: torch.dtype) -> None:
    table = rotation(T, E, dtype)

    def reference(qkv: Tensor) -> Tensor:
        heads = qkv.view(T, -1, E)
        return torch.cat((rope_reference(heads[:, : H + G], table), heads[:, H + G :]), 1)

    check(
        lambda qkv: torch.cat(split_rope(qkv, table, H), 1),
        reference,
        normal((T, (H + 2 * G) * E)),
        dtype,
    )


def test_rotation_by_the_negative_angle_undoes_it() -> None:
    table = rotation(9, 8, torch.float64)
    (x,) = normal((9, 2, 8))
    back = Rotation(table.cos_TE, -table.sin_TE)
    torch.testing.assert_close(rope(rope(x, table), back), x)


def branches(masters: Sequence[Tensor], starts: Sequence[int]) -> list[Branch]:
    return [Branch(masters[2 * i], masters[2 * i + 1], start) for i, start in enumerate(starts)]


GROUPS = [
    # N, K, then (start, rows, rank) of each branch
    (5, 7, [(0, 5, 1)]),
    (20, 12, [(0, 10, 4), (10, 5, 4), (15, 5, 4)]),
    (20, 12, [(0, 10, 3), (15, 5, 8)]),  # the middle projection has no adapter
    (64, 100, [(32, 32, 24)]),
]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("T", [0, 1, 37])
@pytest.mark.parametrize("group", GROUPS)
def test_lora_linear(
    group: tuple[int, int, list[tuple[int, int, int]]], T: int, dtype: torch.dtype, p: float
) -> None:
    N, K, parts = group
    dropout = Dropout(p, 3, torch.arange(T), torch.full((T,), 11)) if p else None
    starts = [start for start, _, _ in parts]
    shapes = [s for _, rows, rank in parts for s in ((rank, K), (rows, rank))]
    weight = normal((N, K), seed=1)[0]

    def call(op: Op) -> Op:
        return lambda x, *masters: op(
            x, weight.to(x.dtype), branches(masters, starts), 0.5, dropout, 2
        )

    check(call(lora_linear), call(lora_linear_reference), normal((T, K), *shapes), dtype)


def test_lora_linear_in_bfloat16_keeps_float32_masters() -> None:
    x, w, a, b = normal((19, 24), (16, 24), (4, 24), (16, 4))
    a, b = (m.float().requires_grad_() for m in (a, b))
    y = lora_linear(x.bfloat16(), w.bfloat16(), [Branch(a, b, 0)], 0.5)
    y.backward(torch.ones_like(y))
    assert y.dtype == torch.bfloat16
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad.dtype == b.grad.dtype == torch.float32
    exact = lora_linear_reference(
        x.bfloat16().double(), w.bfloat16().double(), [Branch(a.double(), b.double(), 0)], 0.5
    )
    torch.testing.assert_close(y.double(), exact, atol=0.1, rtol=2e-2)


def test_first_layer_adapters_learn_though_its_input_needs_no_gradient() -> None:
    x, w, a, b = normal((5, 6), (4, 6), (2, 6), (4, 2))
    a, b = a.requires_grad_(), b.requires_grad_()
    lora_linear(x, w, [Branch(a, b, 0)]).sum().backward()
    assert a.grad is not None
    assert a.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "D", "V", "S"), [(4, 3, 5, 0), (1, 1, 2, 1), (33, 20, 101, 17)])
def test_linear_cross_entropy(T: int, D: int, V: int, S: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(T, generator=generator)[:S]
    labels = torch.randint(0, V, (S,), generator=generator)
    h, w = normal((T, D), (V, D))
    check(
        lambda h: linear_cross_entropy(h, w.to(h.dtype), rows, labels, 0.25),
        lambda h: linear_cross_entropy_reference(h, w.to(h.dtype), rows, labels, 0.25),
        [h],
        dtype,
    )


def test_linear_cross_entropy_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    h, w = normal((40, 8), (30, 8))
    rows, labels = torch.arange(40), torch.arange(40) % 30
    whole = linear_cross_entropy(h, w, rows, labels)
    monkeypatch.setattr("bioinstruct.kernels.cross_entropy.CHUNK_BYTES", 30 * 8 * 7)
    torch.testing.assert_close(linear_cross_entropy(h, w, rows, labels), whole)


def test_no_supervised_row_gives_zero_loss_and_zero_gradient() -> None:
    h, w = normal((4, 3), (5, 3))
    none = torch.empty(0, dtype=torch.int64)
    loss = linear_cross_entropy(h.requires_grad_(), w, none, none)
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(h.grad, torch.zeros_like(h))  # type: ignore[arg-type]


@pytest.mark.parametrize("op", [rmsnorm_reference, swiglu_reference])
def test_references_pass_gradcheck(op: Op) -> None:
    shapes = [(3, 6), (6,)] if op is rmsnorm_reference else [(3, 6)]
    inputs = [x.requires_grad_() for x in normal(*shapes)]
    assert torch.autograd.gradcheck(op, inputs)


def test_lora_linear_passes_gradcheck() -> None:
    x, a, b = (x.requires_grad_() for x in normal((5, 4), (2, 4), (3, 2)))
    w = normal((3, 4), seed=3)[0]
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, w, [Branch(a, b, 0)]), (x, a, b))


@settings(max_examples=30, deadline=None)
@given(T=st.integers(1, 9), D=st.integers(1, 70), c=st.floats(0.5, 8))
def test_scaling_the_input_of_a_norm_changes_nothing(T: int, D: int, c: float) -> None:
    x, w = torch.randn(T, D, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    torch.testing.assert_close(rmsnorm(c * x, w, eps=0.0), rmsnorm(x, w, eps=0.0))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: rmsnorm(torch.zeros(2, 4), torch.zeros(3)), r"rmsnorm needs x_TD"),
        (lambda: swiglu(torch.zeros(2, 3)), r"swiglu needs gate_up_T2F"),
        (lambda: lora_linear(torch.zeros(2, 3), torch.zeros(4, 5)), r"lora_linear needs x_TK"),
        (
            lambda: lora_linear(
                torch.zeros(2, 3),
                torch.zeros(4, 3),
                [Branch(torch.zeros(2, 3), torch.zeros(3, 2), 2)],
            ),
            "within the weight's 4 rows",
        ),
        (
            lambda: lora_linear(
                torch.zeros(2, 3),
                torch.zeros(4, 3),
                [Branch(torch.zeros(2, 3), torch.zeros(3, 1), 0)],
            ),
            r"needs A \(R, 3\) and B",
        ),
        (
            lambda: linear_cross_entropy(
                torch.zeros(2, 3), torch.zeros(4, 2), torch.zeros(0), torch.zeros(0)
            ),
            "linear_cross_entropy needs h_TD",
        ),
        (
            lambda: linear_cross_entropy(
                torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(1), torch.zeros(2)
            ),
            r"must be \(S,\) alike",
        ),
        (lambda: rope(torch.zeros(3, 1, 4), rotation(2, 4, torch.float32)), r"must be \(3, 2\)"),
        (lambda: split_rope(torch.zeros(3, 10), rotation(3, 4, torch.float32), 1), "10 columns"),
    ],
)
def test_wrong_shapes_are_named(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()
