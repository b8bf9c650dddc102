"""The operations in C against float64, in every form that native.c has for one kind of processor.

The budget is twice the error of torch's operations in the same dtype, plus units in the last place
at the scale of the whole result.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bioinstruct.kernels import Dropout, Rotation, attention_blocked, dispatch, native
from bioinstruct.kernels.cross_entropy import _gradient_on_cpu, linear_cross_entropy
from bioinstruct.kernels.rmsnorm import (
    add_rmsnorm,
    norm_backward,
    norm_backward_on_cpu,
    norm_forward,
    rmsnorm,
)
from bioinstruct.kernels.rope import rope_reference, rotate_into
from bioinstruct.kernels.swiglu import swiglu, swiglu_backward, swiglu_forward

DTYPES = [torch.float32, torch.bfloat16]
BUILDS = {
    "as installed": (),
    "without AVX512": ("-mno-avx512f",),
    "without BF16 instructions": ("-mno-avx512bf16",),
    "any x86": ("-march=x86-64",),
}
NAN, INF = float("nan"), float("inf")
COLUMNS = st.sampled_from([1, 5, 15, 16, 17, 63, 100, 257])
TOKENS = st.sampled_from([0, 1, 3])
SEEDS = st.integers(0, 1 << 16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
few = settings(max_examples=15)
UNITS = 2
"""One is too few for results of one element that torch happens to hit exactly."""
TINY = 1e-28
"""What may be lost far below zero: the sigmoid of less than -80 is 0."""


@pytest.fixture(scope="module", params=BUILDS, autouse=True)
def build(request: pytest.FixtureRequest) -> Iterator[str]:
    """Have the ops call the library of one form."""
    with pytest.MonkeyPatch.context() as patch:
        for dtype in DTYPES:
            found = native.load(dtype, BUILDS[request.param])
            if found.library is None:
                pytest.skip(found.told)
            patch.setitem(native._loaded, dtype, found)
        yield request.param


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(scale).double()


def check(
    op: Callable[..., Sequence[Tensor | None]],
    oracle: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype,
    scales: Sequence[Tensor] = (),
) -> None:
    """Compare an op in C, and in torch, with the oracle in float64, on inputs exact in dtype.

    Where terms of a result cancel, its scale is that of the terms.
    """
    narrow = [None if x is None else x.to(dtype) for x in inputs]

    def copies() -> list[Tensor | None]:
        return [None if x is None else x.clone() for x in narrow]

    ours = op(*copies())
    with dispatch.forced("reference"):
        eager = op(*copies())
    exact = oracle(*(None if x is None else x.double() for x in narrow))
    for number, (mine, theirs, truth) in enumerate(zip(ours, eager, exact, strict=True)):
        if truth is None:
            assert mine is None
            continue
        assert mine is not None and theirs is not None
        assert mine.shape == truth.shape and mine.dtype == theirs.dtype
        if truth.numel():
            terms = (truth, *scales[number : number + 1])
            scale = max(float(x.abs().max()) for x in terms if x.numel())
            eps = torch.finfo(mine.dtype).eps
            allowed = 2 * float((theirs - truth).abs().max()) + UNITS * eps * scale + TINY
            error = float((mine - truth).abs().max())
            assert error <= allowed, f"result {number}: {error:.3g} > {allowed:.3g}"


# ---- norms and SwiGLU ---------------------------------------------------------------------------


@dtypes
@given(T=TOKENS, D=COLUMNS, adds=st.booleans(), seed=SEEDS, power=st.integers(-3, 3))
@few
def test_norm_forward(
    dtype: torch.dtype, T: int, D: int, adds: bool, seed: int, power: int
) -> None:
    x, w = normal(seed, T, D, scale=10.0**power), normal(seed + 1, D)
    delta = normal(seed + 2, T, D, scale=10.0**power) if adds else None

    def oracle(x: Tensor, delta: Tensor | None, w: Tensor) -> Sequence[Tensor]:
        # what is normed is rounded first
        h = x if delta is None else (x + delta).to(dtype).double()
        r = (h.square().mean(-1) + 1e-5).rsqrt() if T else h.new_empty(0)
        return h, h * r[:, None] * w, r

    check(lambda x, delta, w: norm_forward(x, delta, w, 1e-5), oracle, (x, delta, w), dtype)


@dtypes
@given(T=TOKENS, D=COLUMNS, passes=st.booleans(), again=st.booleans(), seed=SEEDS)
@few
def test_norm_backward(
    dtype: torch.dtype, T: int, D: int, passes: bool, again: bool, seed: int
) -> None:
    dy, h, w = normal(seed, T, D), normal(seed + 1, T, D), normal(seed + 2, D)
    dh = normal(seed + 3, T, D) if passes else None

    def op(dy: Tensor, h: Tensor, w: Tensor, dh: Tensor | None) -> Sequence[Tensor | None]:
        r = (h.float().square().mean(-1) + 1e-5).rsqrt()
        alone = norm_backward(dy, h, w, r, dh)
        found = norm_backward_on_cpu(dy, h, w, r, dh, again=again)
        assert torch.equal(alone, found[0])
        return found

    def oracle(dy: Tensor, h: Tensor, w: Tensor, dh: Tensor | None) -> Sequence[Tensor | None]:
        leaf = h.clone().requires_grad_()
        y = leaf * (leaf.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w
        (dx,) = torch.autograd.grad(y, leaf, dy)
        return dx if dh is None else dx + dh, y.detach() if again else None

    r = (h.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    check(op, oracle, (dy, h, w, dh), dtype, (r * dy * w,))


@dtypes
@given(T=TOKENS, F=COLUMNS, seed=SEEDS, power=st.integers(-3, 2))
@few
def test_swiglu(dtype: torch.dtype, T: int, F: int, seed: int, power: int) -> None:
    gate_up = normal(seed, T, 2 * F, scale=10.0**power)

    def oracle(gate_up: Tensor) -> Sequence[Tensor]:
        gate, up = gate_up.chunk(2, dim=-1)
        return (gate * gate.sigmoid() * up,)

    check(lambda x: (swiglu_forward(x),), oracle, (gate_up,), dtype)


@dtypes
@given(T=TOKENS, F=COLUMNS, again=st.booleans(), seed=SEEDS, power=st.integers(-3, 2))
@few
def test_swiglu_backward(
    dtype: torch.dtype, T: int, F: int, again: bool, seed: int, power: int
) -> None:
    gate_up, dh = normal(seed, T, 2 * F, scale=10.0**power), normal(seed + 1, T, F)

    def oracle(dh: Tensor, gate_up: Tensor) -> Sequence[Tensor | None]:
        leaf = gate_up.clone().requires_grad_()
        gate, up = leaf.chunk(2, dim=-1)
        h = gate * gate.sigmoid() * up
        (found,) = torch.autograd.grad(h, leaf, dh)
        return found, h.detach() if again else None

    scale = (dh * gate_up[:, F:], dh * gate_up[:, :F])
    both = torch.cat(scale, 1)
    check(lambda dh, x: swiglu_backward(dh, x, again=again), oracle, (dh, gate_up), dtype, (both,))


# ---- rotation and the layout of heads -----------------------------------------------------------


def rotation(seed: int, T: int, E: int) -> Rotation:
    angles = normal(seed, T, E // 2, scale=10.0)
    return Rotation(angles.cos().float(), angles.sin().float())


@dtypes
@given(
    T=TOKENS,
    H=st.integers(1, 3),
    E=st.sampled_from([2, 10, 30, 32, 34, 64, 200]),
    sign=st.sampled_from([1.0, -1.0]),
    where=st.sampled_from(["apart", "in place", "in strided rows", "between strided rows"]),
    seed=SEEDS,
)
@few
def test_rotation(
    dtype: torch.dtype, T: int, H: int, E: int, sign: float, where: str, seed: int
) -> None:
    table = rotation(seed + 1, T, E)

    def op(x: Tensor) -> Sequence[Tensor]:
        rows = torch.zeros(2, T, H + 2, E, dtype=dtype)
        if "strided" in where:
            x = rows[0, :, 1 : H + 1].copy_(x)
        out = x if "in" in where.split()[0] else torch.empty_like(x)
        if where == "between strided rows":
            out = rows[1, :, 1 : H + 1]
        rotate_into(out, x, table, sign)
        # the heads beside them are left alone
        assert not rows[:, :, 0].any() and not rows[:, :, H + 1].any()
        return (out,)

    signed = Rotation(table.cos_TE.double(), sign * table.sin_TE.double())
    check(op, lambda x: (rope_reference(x, signed),), (normal(seed, T, H, E),), dtype)


@dtypes
@given(T=st.integers(0, 5), G=st.integers(1, 3), J=st.integers(1, 3), E=COLUMNS, seed=SEEDS)
@few
def test_heads_and_tokens_change_places(
    dtype: torch.dtype, T: int, G: int, J: int, E: int, seed: int
) -> None:
    rows = normal(seed, T, G * J + 2, E).to(dtype)
    x = rows[:, 1:-1]
    moved = x.reshape(T, G, J, E).transpose(0, 1).reshape(G, T * J, E).contiguous()
    assert torch.equal(attention_blocked._heads_first(x, G), moved)
    assert torch.equal(attention_blocked._heads_first(x.mT.contiguous().mT, G), moved)
    assert torch.equal(attention_blocked._tokens_first(moved, x.shape, dtype), x)
    sums = normal(seed, G, T * J, E).float()
    back = sums.view(G, T, J, E).transpose(0, 1).reshape(T, G * J, E).to(dtype)
    assert torch.equal(attention_blocked._tokens_first(sums, x.shape, dtype), back)


@given(G=st.integers(1, 3), U=st.integers(1, 5), E=COLUMNS, seed=SEEDS)
@few
def test_sums_of_products(G: int, U: int, E: int, seed: int) -> None:
    """A product is rounded to bfloat16 before it is added, in torch's operations too."""
    a, b = normal(seed, G, U, 7).bfloat16(), normal(seed + 1, G, 7, E).bfloat16()
    before = normal(seed + 2, G, U + 3, E).float()
    found, wanted = before.clone(), before.clone()
    scratch = attention_blocked._Scratch(a, [(G, U, E)])
    attention_blocked._add_product(found[:, :U], a, b, 0.5, scratch)
    with dispatch.forced("reference"):
        attention_blocked._add_product(wanted[:, :U], a, b, 0.5, scratch)
    assert torch.equal(found, wanted)


# ---- softmax ------------------------------------------------------------------------------------


def softmax(scores: Tensor, queries: int) -> Tensor:
    """Probabilities of (G, Q * J, U) scores, in place."""
    (G, rows, U), library = scores.shape, native.native(scores)
    assert library is not None
    arguments = G, queries, rows // queries, U, native.threads_for(scores.numel())
    library.causal_softmax(scores.data_ptr(), *arguments)
    return scores


def hidden(queries: int, J: int, U: int) -> Tensor:
    """(Q * J, U): which keys lie in a query's future."""
    query = U - queries + torch.arange(queries * J)[:, None] // J
    return torch.arange(U) > query


blocks = {
    "G": st.integers(1, 2),
    "J": st.sampled_from([1, 3]),
    "Q": st.sampled_from([1, 2, 7, 16]),
    "before": st.sampled_from([0, 1, 14, 15, 16, 17, 63, 240]),
    "seed": SEEDS,
}


@dtypes
@given(**blocks, power=st.integers(-2, 2))
@few
def test_probabilities(
    dtype: torch.dtype, G: int, J: int, Q: int, before: int, seed: int, power: int
) -> None:
    U, E = before + Q, 8
    q, k = normal(seed, G, Q * J, E, scale=10.0**power), normal(seed + 1, G, U, E)

    def op(q: Tensor, k: Tensor) -> Sequence[Tensor]:
        return (attention_blocked._probabilities(q, k, Q, q.new_empty(G, Q * J, U)),)

    def oracle(q: Tensor, k: Tensor) -> Sequence[Tensor]:
        # softmax reads scores that the product has rounded
        scores = torch.baddbmm(
            torch.zeros((), dtype=dtype), q.to(dtype), k.mT.to(dtype), beta=0, alpha=E**-0.5
        )
        return (scores.double().masked_fill(hidden(Q, J, U), -INF).softmax(-1),)

    check(op, oracle, (q, k), dtype)


@dtypes
@given(**blocks)
@few
def test_gradient_of_scores(
    dtype: torch.dtype, G: int, J: int, Q: int, before: int, seed: int
) -> None:
    U = before + Q
    seen = normal(seed, G, Q * J, U).masked_fill(hidden(Q, J, U), -INF)

    def op(ds: Tensor, p: Tensor) -> Sequence[Tensor]:
        attention_blocked._scores_gradient(ds, p, Q)
        return (ds,)

    def oracle(dp: Tensor, p: Tensor) -> Sequence[Tensor]:
        return (p * (dp - (p * dp).sum(-1, keepdim=True)),)

    p, dp = seen.softmax(-1), normal(seed + 1, G, Q * J, U)
    check(op, oracle, (dp, p), dtype, (p * dp,))


@dtypes
def test_more_keys_than_are_kept_between_two_passes(dtype: torch.dtype) -> None:
    scores = normal(0, 1, 6, 4100).to(dtype)
    wanted = scores.double().masked_fill(hidden(3, 2, 4100), -INF).softmax(-1)
    found = softmax(scores.clone(), 3)
    one = torch.finfo(dtype).eps * float(wanted.max())
    assert (found - wanted).abs().max() <= 2 * one
    assert not found[hidden(3, 2, 4100).expand_as(found)].any()


@dtypes
def test_softmax_of_extremes(dtype: torch.dtype) -> None:
    rows = torch.tensor(
        [
            [1e30, 0.0, -1e30, 1e30, -INF],
            [-1e30, -1e30, -INF, -1e30, -INF],
            [0.0, -100.0, -105.0, -1e4, 3.0],
            [NAN, 0.0, 1.0, 2.0, 3.0],
            [0.0, 1.0, 2.0, 3.0, NAN],
            [INF, 0.0, 1.0, 2.0, 3.0],
            [INF, INF, -INF, 2.0, 3.0],
            [-INF, -INF, -INF, -INF, -INF],
            [NAN, NAN, NAN, NAN, NAN],
        ],
        dtype=dtype,
    )
    for U in (5, 40):  # alone in the vector, and behind whole vectors of the smallest number
        scores = torch.full((len(rows), 1, U), -INF, dtype=dtype)
        scores[:, 0, -5:] = rows
        wanted = scores.double().softmax(-1)
        found = softmax(scores, 1).double()
        assert torch.equal(found.isnan(), wanted.isnan())
        difference = (found - wanted).nan_to_num().abs().max()
        assert difference <= 2 * torch.finfo(dtype).eps


# ---- cross-entropy ------------------------------------------------------------------------------


@dtypes
@given(
    S=TOKENS,
    V=st.sampled_from([1, 2, 5, 15, 16, 17, 63, 100, 257]),
    gradient=st.booleans(),
    power=st.integers(-2, 4),
    seed=SEEDS,
)
@few
def test_cross_entropy(
    dtype: torch.dtype, S: int, V: int, gradient: bool, power: int, seed: int
) -> None:
    z = normal(seed, S, V, scale=10.0**power)
    labels = torch.randint(V, (S,), generator=torch.Generator().manual_seed(seed))

    def op(z: Tensor) -> Sequence[Tensor]:
        loss = _gradient_on_cpu(z, labels, gradient)
        return z, loss.float()

    def oracle(z: Tensor) -> Sequence[Tensor]:
        leaf = z.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(leaf, labels, reduction="sum")
        (dz,) = torch.autograd.grad(loss, leaf)
        return dz if gradient else z, loss.detach()

    # for bfloat16 the exponentials are good to 2.5e-6 only
    least = 2.5e-6 / torch.finfo(torch.float32).eps if dtype == torch.bfloat16 else 1.0
    check(op, oracle, (z,), dtype, (torch.ones(1), z.abs() + least))


@dtypes
def test_cross_entropy_of_extremes(dtype: torch.dtype) -> None:
    z = torch.tensor(
        [
            [1e4, 0.0, -1e4, 3.0],
            [-1e4, 0.0, 1e4, 3.0],
            [1e30, -1e30, 0.0, 0.0],
            [-INF, 0.0, 1.0, 2.0],
            [1.0, -INF, 1.0, 2.0],
            [NAN, 0.0, 1.0, 2.0],
            [0.0, 1.0, 2.0, NAN],
            [0.0, INF, 2.0, 1.0],
            [-INF, -INF, -INF, -INF],
        ],
        dtype=dtype,
    )
    label = torch.tensor([0])
    for row in z[:, None]:
        leaf = row.double().requires_grad_()
        loss = torch.nn.functional.cross_entropy(leaf, label, reduction="sum")
        (wanted,) = torch.autograd.grad(loss, leaf)
        made = row.clone()
        found = _gradient_on_cpu(made, label, True)
        torch.testing.assert_close(found, loss.detach(), rtol=1e-6, atol=1e-6, equal_nan=True)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(made.double(), wanted, rtol=eps, atol=eps, equal_nan=True)


@dtypes
@pytest.mark.parametrize("label", [-1, -100, 7, 1 << 40, None])
def test_a_label_that_is_no_logit_is_refused(dtype: torch.dtype, label: int | None) -> None:
    h, w = torch.zeros(2, 3, dtype=dtype), torch.zeros(7, 3, dtype=dtype)
    labels = torch.tensor([6, 0 if label is None else label])
    with pytest.raises(IndexError, match="labels_S must be int64 from 0 to 6, got "):
        linear_cross_entropy(h, w, torch.tensor([0, 1]), labels.int() if label is None else labels)


# ---- dropout ------------------------------------------------------------------------------------


@dtypes
@given(
    T=TOKENS,
    K=COLUMNS,
    p=st.sampled_from([0.0, 0.05, 0.5, 0.999]),
    key=st.integers(0, (1 << 32) - 1),
    site=st.integers(0, (1 << 32) - 1),
    seed=SEEDS,
)
@few
def test_masks_are_those_of_torch(
    dtype: torch.dtype, T: int, K: int, p: float, key: int, site: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    positions, draws = torch.randint(1 << 32, (2, T, 2), generator=generator)
    dropout = Dropout(p, key, positions[:, 0], draws[:, 1])  # strided
    found = dropout.mask(site, K, dtype)
    with dispatch.forced("reference"):
        wanted = dropout.mask(site, K, dtype)
    assert torch.equal(found, wanted)
    assert torch.equal(found.signbit(), wanted.signbit())


# ---- what is no number, and what is hardly one --------------------------------------------------

EXTREMES = [0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0, 20.0, -20.0, 100.0, -100.0, 1e30, -1e30]


def assert_alike(found: Tensor, wanted: Tensor, eps: float) -> None:
    """Equal up to rounding and to what float32 can hold, NaN where NaN is due."""
    wide = found.double()
    wanted = torch.where(wanted.abs() > torch.finfo(found.dtype).max, wanted * INF, wanted)
    torch.testing.assert_close(wide, wanted, rtol=4 * eps, atol=1e-30, equal_nan=True)


@dtypes
@pytest.mark.parametrize("width", [1, 40])
def test_silu_of_extremes(dtype: torch.dtype, width: int) -> None:
    gate = torch.tensor([*EXTREMES, INF, -INF, NAN], dtype=dtype)[:, None].expand(-1, width)
    up = torch.full_like(gate, 2.0)
    gate_up = torch.cat((gate, up), 1)
    leaf = gate_up.double().requires_grad_()
    g, u = leaf.chunk(2, 1)
    h = g * g.sigmoid() * u
    (wanted,) = torch.autograd.grad(h, leaf, torch.ones_like(h))
    eps = torch.finfo(dtype).eps
    assert_alike(swiglu_forward(gate_up), h.detach(), eps)
    found, again = swiglu_backward(torch.ones_like(up), gate_up, again=True)
    assert again is not None
    assert_alike(again, h.detach(), eps)
    assert_alike(found, wanted, eps)


@dtypes
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("at", [0, 20])
def test_what_is_no_number_spoils_a_norm_as_in_float64(
    dtype: torch.dtype, bad: float, at: int
) -> None:
    x, w = normal(0, 3, 21), normal(1, 21)
    dy = normal(2, 3, 21).to(dtype)
    x[1, at] = bad
    h, y, r = norm_forward(x.to(dtype), None, w.to(dtype), 1e-5)
    with dispatch.forced("reference"):
        truth = norm_forward(x, None, w, 1e-5)
        wanted = norm_backward(dy.double(), x, w, truth.r_T, None)
    assert torch.equal(y.isnan(), truth.y_TD.isnan())
    dx = norm_backward(dy, h, w.to(dtype), r, None)
    assert torch.equal(dx.isnan(), wanted.isnan())
    assert dx[[0, 2]].isfinite().all()


@dtypes
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_no_number_is_moved_turned_and_summed(dtype: torch.dtype, bad: float) -> None:
    x = normal(0, 3, 2, 34).to(dtype)
    x[1, 1, 3] = bad
    table, out = rotation(1, 3, 34), torch.empty_like(x)
    rotate_into(out, x, table, 1.0)
    wanted = rope_reference(x.double(), table)
    assert torch.equal(out.isnan(), wanted.isnan()) and torch.equal(out.isinf(), wanted.isinf())
    sums = x.float().transpose(0, 1).contiguous()
    found = attention_blocked._tokens_first(sums, x.shape, dtype)
    assert torch.equal(found.nan_to_num(7.0), x.nan_to_num(7.0))
    p, dp = torch.full((2, 3, 3), 1 / 3, dtype=dtype).tril(), normal(0, 2, 3, 3).to(dtype)
    dp[1, 2, 0] = bad
    truth = p.double() * (dp.double() - (p.double() * dp.double()).sum(-1, keepdim=True))
    attention_blocked._scores_gradient(dp, p, 3)
    assert torch.equal(dp.isnan(), truth.isnan()) and torch.equal(dp.isinf(), truth.isinf())


@dtypes
def test_the_smallest_numbers_are_harmless(dtype: torch.dtype) -> None:
    """They may count as zero."""
    tiny = torch.full((3, 34), 1e-40, dtype=dtype)
    w = torch.ones(34, dtype=dtype)
    h, y, r = norm_forward(tiny, None, w, 1e-5)
    assert y.abs().max() < 1e-37 and norm_backward(tiny, h, w, r, None).abs().max() < 1e-34
    assert swiglu_forward(tiny).abs().max() < 1e-37
    assert torch.equal(softmax(tiny[:, None].clone(), 1), torch.full_like(tiny, 1 / 34)[:, None])


# ---- memory and threads -------------------------------------------------------------------------

T, D, G, J, E = 3, 21, 2, 3, 34


class Guarded:
    """Makes tensors between guards, at odd addresses."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.made: list[tuple[Tensor, Tensor]] = []

    def __call__(self, *shape: int, kind: torch.dtype | None = None) -> Tensor:
        kind = kind or self.dtype
        elements = math.prod(shape)
        # the guards are no numbers, so that reading them shows too
        whole = torch.full((elements + 74,), 9 if kind == torch.int64 else NAN, dtype=kind)
        inner = whole[37:-37].view(shape)
        inner.copy_(normal(len(self.made), *shape))
        self.made.append((whole, inner))
        return inner

    def are_whole(self) -> bool:
        """Whether nothing was written beside the tensors."""
        guards = torch.cat([torch.cat((w[:37], w[-37:])).double() for w, _ in self.made])
        return bool((guards.isnan() | (guards == 9)).all())


def times(number: int, make: Guarded, *shape: int, **kind: torch.dtype) -> list[Tensor]:
    return [make(*shape, **kind) for _ in range(number)]


def labels(make: Guarded) -> Tensor:
    return make(T, kind=torch.int64).copy_(torch.tensor([0, D - 1, 4]))


def counters(make: Guarded) -> list[Tensor]:
    return [make(T, kind=torch.int64).fill_(value) for value in (3, 5)]


F32 = {"kind": torch.float32}
CALLS: dict[str, Callable[[Guarded], list[Any]]] = {
    "norm": lambda m: [
        *times(2, m, T, D), m(D), *times(2, m, T, D), m(T, **F32), T, D, 1e-5
    ],
    "norm_back": lambda m: [
        *times(2, m, T, D), m(D), m(T, **F32), *times(3, m, T, D), T, D
    ],
    "gated": lambda m: [m(T, 2 * D), m(T, D), T, D],
    "gated_back": lambda m: [m(T, D), m(T, 2 * D), m(T, 2 * D), m(T, D), T, D],
    "rotate": lambda m: [
        m(T, G * E), G * E, m(T, G * E), G * E, *times(2, m, T, E // 2, **F32), -1.0, T, G, E
    ],
    "heads_first": lambda m: [m(T, G * E), G * E, m(G, T, E), T, G, E],
    "tokens_first": lambda m: [m(G, T, E), m(T, G * E), T, G, E],
    "sums_tokens_first": lambda m: [m(G, T, D, **F32), m(T, G * D), T, G, D],
    "add_to_sums": lambda m: [m(G, T * D, **F32), T * D, m(G, T * D), G, T * D],
    "causal_softmax": lambda m: [m(G, T * J, D), G, T, J, D],
    "causal_softmax_back": lambda m: [m(G, T * J, D), m(G, T * J, D), G, T, J, D],
    "cross_entropy": lambda m: [m(T, D), labels(m), m(T, **F32), T, D, 1],
    "dropout_mask": lambda m: [m(T, D), *counters(m), T, D, 1, 2, 30000, 1.5],
}  # fmt: skip
"""The arguments of each function, but for the number of threads."""


def call(name: str, make: Guarded, threads: int) -> list[Tensor]:
    """Call a function of the library; return all tensors it was given."""
    given = [a.data_ptr() if isinstance(a, Tensor) else a for a in CALLS[name](make)]
    if name != "add_to_sums":
        given.append(threads)
    getattr(native.loaded(make.dtype).library, name)(*given)
    return [inner for _, inner in make.made]


@dtypes
@pytest.mark.parametrize("name", CALLS)
def test_nothing_else_is_read_or_written_by_any_number_of_threads(
    name: str, dtype: torch.dtype
) -> None:
    makers = [Guarded(dtype) for _ in range(3)]
    found = [call(name, make, threads) for threads, make in enumerate(makers, 1)]
    assert all(make.are_whole() for make in makers)
    for tensors in zip(*found, strict=True):
        assert all(torch.equal(tensors[0], other) for other in tensors[1:])
        assert tensors[0].isfinite().all()


def test_threads_share_what_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert native.threads_for(native.SMALL - 1) == 1 and native.threads_for(native.SMALL) == 3


# ---- layouts ------------------------------------------------------------------------------------


@dtypes
def test_inputs_that_are_not_contiguous(dtype: torch.dtype) -> None:
    def columns(seed: int, *shape: int) -> Tensor:
        return normal(seed, *shape[::-1]).to(dtype).mT.requires_grad_()

    def step(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x, delta, wide = (change(columns(i, 5, 34)) for i in range(3))
        gain = change(normal(4, 34, 2).to(dtype)[:, 0])
        h, y = add_rmsnorm(x, delta, gain)
        found = [h, y, rmsnorm(wide, gain), swiglu(wide)]
        gradients = [change(columns(9 + i, *f.shape).detach()) for i, f in enumerate(found)]
        leaves = [x, delta, wide]
        return [*found, *torch.autograd.grad(found, leaves, gradients)]

    strided = step(lambda x: x)
    plain = step(lambda x: x.detach().contiguous().requires_grad_(x.requires_grad))
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))


@dtypes
def test_attention_of_views(dtype: torch.dtype) -> None:
    """As the fused projection gives them, and transposed ones."""
    qkv = normal(0, 70, 8, 6).to(dtype)
    views = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    turned = [v.mT.contiguous().mT for v in views]
    found = [
        attention_blocked.Blocked.apply(*heads, (0, 3, 70))
        for heads in ([v.contiguous() for v in views], views, turned)
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
