"""A branch's products against float64, on shapes that divide nothing; nothing else is written."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bioinstruct.kernels import Copies, Frozen, dispatch
from bioinstruct.kernels.branches import add_outer, add_product, product_into
from bioinstruct.kernels.branches import branch_library as library_for
from bioinstruct.kernels.lora_copied import CopiedB

GUARD = 7.0
SIZES = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 33])
RANKS = st.sampled_from([1, 2, 4, 6, 16, 18, 24, 48, 64])
COLUMNS = st.sampled_from([2, 3, 16, 30, 32, 34, 66, 100, 576])


def normal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def inside(x: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of x within a wider and longer tensor, and that."""
    rows, columns = x.shape
    whole = torch.full((rows + 2, columns + 6), GUARD, dtype=x.dtype)
    part = whole[1 : rows + 1, 3 : columns + 3]
    part.copy_(x)
    return part, whole


def check(part: Tensor, whole: Tensor, exact: Tensor, rounded: Tensor) -> None:
    """The part is right, and nothing around it was written."""
    error, theirs = (part.double() - exact).abs(), (rounded.double() - exact).abs().max()
    scale = exact.abs().max()
    assert error.max() <= 2 * theirs + torch.finfo(part.dtype).eps * scale
    part.fill_(GUARD)
    assert bool((whole == GUARD).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
@settings(max_examples=25, deadline=None)
@given(T=SIZES, R=RANKS, N=COLUMNS)
def test_expanding(dtype: torch.dtype, transposed: bool, T: int, R: int, N: int) -> None:
    y, s, m = (
        normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(((T, N), (T, R), (R, N)))
    )
    m = m.T.contiguous().T if transposed else m
    part, whole = inside(y)
    add_product(library_for(y, R), part, inside(s)[0], m)
    check(part, whole, y.double() + s.double() @ m.double(), torch.addmm(y, s, m))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
@settings(max_examples=25, deadline=None)
@given(T=SIZES, R=RANKS, N=COLUMNS)
def test_shrinking(dtype: torch.dtype, transposed: bool, T: int, R: int, N: int) -> None:
    y, m = normal(T, N, seed=1, dtype=dtype), normal(N, R, seed=2, dtype=dtype)
    m = m.T.contiguous().T if transposed else m
    part, whole = inside(torch.zeros(T, R, dtype=dtype))
    product_into(library_for(y, N), part, inside(y)[0], m)
    check(part, whole, y.double() @ m.double(), y @ m)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
@settings(max_examples=25, deadline=None)
@given(T=SIZES, R=RANKS, N=COLUMNS, scale=st.sampled_from([1.0, -0.75]))
def test_sums_over_tokens(
    dtype: torch.dtype, transposed: bool, T: int, R: int, N: int, scale: float
) -> None:
    s, y = normal(T, R, seed=1, dtype=dtype), normal(T, N, seed=2, dtype=dtype)
    before = normal(R, N, seed=3, dtype=torch.float32)
    part, whole = inside(before.T if transposed else before)
    g = part.T if transposed else part
    add_outer(library_for(y, R), g, inside(s)[0], inside(y)[0], scale)
    exact = before.double() + scale * (s.double().T @ y.double())
    rounded = before + scale * (s.T @ y)
    turned = (exact.T, rounded.T) if transposed else (exact, rounded)
    check(part, whole, *turned)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads: int) -> None:
    y, s, m = (
        normal(*shape, seed=i, dtype=torch.bfloat16)
        for i, shape in enumerate(((517, 96), (517, 18), (18, 96)))
    )

    def found() -> list[Tensor]:
        total, narrow, sums = y.clone(), torch.empty_like(s), torch.zeros(18, 96)
        add_product(library_for(y), total, s, m)
        product_into(library_for(y), narrow, y, m.T)
        add_outer(library_for(y), sums, s, y)
        return [total, narrow, sums]

    alone, before = found(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(map(torch.equal, found(), alone))
    finally:
        torch.set_num_threads(before)


def test_what_is_no_number_stays_none() -> None:
    y, s = normal(9, 32, seed=1, dtype=torch.bfloat16), normal(9, 16, seed=2, dtype=torch.bfloat16)
    y[4, 5] = torch.nan
    narrow, sums = torch.empty_like(s), torch.zeros(16, 32)
    product_into(library_for(y), narrow, y, normal(32, 16, seed=3, dtype=torch.bfloat16))
    add_outer(library_for(y), sums, s, y)
    assert narrow.isnan().any(1).tolist() == [row == 4 for row in range(9)]
    assert sums.isnan().any(0).tolist() == [column == 5 for column in range(32)]


def test_a_group_runs_in_c_where_the_processor_can(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, a, b = (
        normal(*shape, seed=i, dtype=torch.bfloat16)
        for i, shape in enumerate(((5, 24), (32, 24), (16, 24), (32, 16)))
    )
    if library_for(x) is None:
        pytest.skip("needs a C compiler and a processor with AVX512-BF16")
    branch = CopiedB(b, torch.zeros(32, 16), 1.0, 0, 0)
    frozen = Frozen(w, Copies(a, torch.zeros(16, 24), [branch], a))
    calls: list[str] = []
    monkeypatch.setattr(Tensor, "addmm_", lambda *_: calls.append("library"))
    frozen.forward(x)
    assert not calls
    with dispatch.forced("reference"):
        frozen.forward(x)
    assert calls == ["library"]
