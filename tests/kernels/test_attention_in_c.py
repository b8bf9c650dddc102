"""Attention in C against the formula in float64, in whatever layout, threads and vectors."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bioinstruct.benches.budget import check, normal
from bioinstruct.kernels import Documents, attention_in_c, dispatch, native
from bioinstruct.kernels.attention import attention, attention_reference
from bioinstruct.kernels.attention_blocked import Blocked
from bioinstruct.kernels.attention_in_c import InC, library_for

CPU = torch.device("cpu")
LENGTHS = [(1,), (5,), (63,), (64,), (65,), (100,), (257,), (3, 1, 64, 100, 2), (30, 600)]
HEADS = [(3, 3), (4, 2), (6, 2), (8, 1)]
NARROWER = ("-mno-avx512f",)


def heads(T: int, H: int, G: int, E: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values as the fused projection gives them, and the output's gradient."""
    qkv, do = normal((T, H + 2 * G, E), (T, H, E))
    return [*(x.detach() for x in qkv.to(dtype).split((H, G, G), 1)), do.to(dtype)]


def passes(tensors: list[Tensor], bounds: tuple[int, ...]) -> list[Tensor]:
    """Output and gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    o = InC.apply(*leaves, bounds)
    return [o.detach(), *torch.autograd.grad(o, leaves, tensors[3])]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    if library_for(*torch.empty(3, 1, 1, 16, dtype=found)) is None:  # type: ignore[call-arg]
        pytest.skip(f"no attention in C for {found} here: {native.loaded(found).told}")
    return found


@pytest.fixture
def narrow_vectors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library as a processor without AVX-512 has it."""
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setitem(native.OPTIONS, torch.float32, NARROWER)
    monkeypatch.setitem(native.OPTIONS, torch.bfloat16, ("-DBFLOAT16", *NARROWER))
    if native.loaded(torch.float32).library is None:
        pytest.skip("this compiler has no such option")
    yield


def check_against_formula(
    lengths: tuple[int, ...], H: int, G: int, E: int, dtype: torch.dtype
) -> None:
    documents, T = Documents.of_lengths(lengths), sum(lengths)
    check(
        lambda q, k, v: InC.apply(q, k, v, documents.bounds),
        lambda q, k, v: attention_reference(q, k, v, documents),
        normal((T, H, E), (T, G, E), (T, G, E)),
        dtype,
        CPU,
        roundings=4,  # eager's gradient of a one-token document is exactly zero, ours nearly
    )


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("H", "G"), HEADS)
def test_outputs_and_gradients(
    lengths: tuple[int, ...], H: int, G: int, dtype: torch.dtype
) -> None:
    check_against_formula(lengths, H, G, 16, dtype)


@pytest.mark.parametrize("E", [32, 48, 64, 80, 128, 256])
def test_widths_of_heads(E: int, dtype: torch.dtype) -> None:
    check_against_formula((65, 1, 130), 6, 2, E, dtype)


@pytest.mark.parametrize(("H", "G"), [(5, 1), (7, 1), (130, 1), (1, 1)])
def test_groups_of_heads_that_divide_no_block(H: int, G: int, dtype: torch.dtype) -> None:
    check_against_formula((33, 2), H, G, 16, dtype)


@pytest.mark.parametrize("E", [16, 80])
@pytest.mark.parametrize("lengths", [(1,), (65, 3), (257,)])
def test_narrow_vectors(lengths: tuple[int, ...], E: int, narrow_vectors: None) -> None:
    if library_for(*torch.empty(3, 1, 1, E)) is None:  # type: ignore[call-arg]
        pytest.skip("no attention in C without AVX2")
    check_against_formula(lengths, 6, 2, E, torch.float32)


def test_a_processor_without_products_takes_the_librarys(narrow_vectors: None) -> None:
    q, k, v, _ = heads(70, 6, 2, 16, torch.bfloat16)
    assert library_for(q, k, v) is None
    documents = Documents.of_lengths((70,))
    found = attention(q, k, v, documents, "blocked")
    assert torch.equal(found, Blocked.apply(q, k, v, documents.bounds))


def test_what_runs_in_c(dtype: torch.dtype) -> None:
    q, k, v, _ = heads(7, 6, 2, 16, dtype)
    found = attention(q, k, v, Documents.of_lengths((7,)), "blocked")
    assert torch.equal(found, InC.apply(q, k, v, (0, 7)))
    assert library_for(q, k, v) is not None
    for E in (0, 8, 24, 272):
        assert library_for(*torch.empty(3, 1, 1, E, dtype=dtype)) is None  # type: ignore[call-arg]
    assert library_for(q, k.double(), v) is None
    assert library_for(*(x.double() for x in (q, k, v))) is None
    assert library_for(*(x.to("meta") for x in (q, k, v))) is None
    with dispatch.forced("reference"):
        assert library_for(q, k, v) is None


def test_an_empty_pack(dtype: torch.dtype) -> None:
    found = passes(heads(0, 6, 2, 16, dtype), (0,))
    assert [tuple(x.shape) for x in found] == [(0, 6, 16), (0, 6, 16), (0, 2, 16), (0, 2, 16)]


def test_any_layout_gives_the_same_bits(dtype: torch.dtype) -> None:
    q, k, v, do = heads(150, 6, 2, 16, dtype)
    bounds = 0, 100, 150
    once = passes([q, k, v, do], bounds)
    wider = torch.nn.functional.pad(do, (0, 0, 1, 2))[:, 1:7]
    crossed = do.transpose(0, 1).contiguous().transpose(0, 1)
    for other in ([x.contiguous() for x in (q, k, v)] + [do], [q, k, v, wider], [q, k, v, crossed]):
        again = passes(other, bounds)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads: int, dtype: torch.dtype) -> None:
    tensors, bounds = heads(700, 6, 2, 32, dtype), (0, 600, 690, 700)
    once = passes(tensors, bounds)
    torch.set_num_threads(threads)
    try:
        again = passes(tensors, bounds)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_documents_do_not_see_each_other(dtype: torch.dtype) -> None:
    bounds = 0, 63, 130, 131, 200
    tensors = heads(200, 6, 2, 16, dtype)
    once = passes(tensors, bounds)
    for x in tensors:
        x[63:130] = torch.nan
    again = passes(tensors, bounds)
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a[:63], b[:63]) and torch.equal(a[130:], b[130:])
        assert b[63:130].isnan().all()


def test_a_document_alone_gives_the_same_bits(dtype: torch.dtype) -> None:
    tensors = heads(200, 6, 2, 16, dtype)
    packed = passes(tensors, (0, 63, 130, 131, 200))
    alone = passes([x[63:130] for x in tensors], (0, 67))
    assert all(torch.equal(a[63:130], b) for a, b in zip(packed, alone, strict=True))


def test_the_future_changes_no_earlier_output(dtype: torch.dtype) -> None:
    tensors = heads(200, 6, 2, 16, dtype)
    once = passes(tensors, (0, 200))[0]
    for x in tensors[:3]:
        x[150:] *= -2
    again = passes(tensors, (0, 200))[0]
    assert torch.equal(once[:150], again[:150]) and not torch.equal(once[150:], again[150:])


def test_a_score_that_is_no_number_shows(dtype: torch.dtype) -> None:
    tensors = heads(200, 6, 2, 16, dtype)
    tensors[0][120, 3] = torch.nan
    o, dq, dk, dv = passes(tensors, (0, 200))
    assert o[120, 3].isnan().all() and dq[120, 3].isnan().all()
    assert dk[:121, 1].isnan().all() and dv[:121, 1].isnan().all()
    kept = torch.ones(200, 6, dtype=torch.bool)
    kept[120, 3] = False
    assert o[kept].isfinite().all() and dq[kept].isfinite().all()
    assert dk[:, 0].isfinite().all() and dv[:, 0].isfinite().all()


def test_large_scores(dtype: torch.dtype) -> None:
    q, k, v, do = heads(90, 2, 2, 16, dtype)
    q, k = q * 1e3, k * 1e3
    found = passes([q, k, v, do], (0, 90))[0]
    wide = [x.double() for x in (q, k, v)]
    exact = attention_reference(*wide, Documents.of_lengths((90,)))  # type: ignore[call-arg]
    torch.testing.assert_close(found, exact.to(dtype), atol=1e-3, rtol=1e-2)


def test_nothing_is_written_outside(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that C gets lies between guards here, and comes back with them whole."""
    made: list[tuple[Tensor, int]] = []

    def guarded(_: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        whole = torch.full((size + 2 * GUARD,), 3.0, dtype=dtype)
        made.append((whole, size))
        return whole[GUARD : GUARD + size].view(shape).fill_(torch.nan)

    monkeypatch.setattr(attention_in_c, "empty", guarded)
    found = passes(heads(165, 6, 2, 48, dtype), (0, 65, 66, 165))
    assert all(x.isfinite().all() for x in found) and len(made) == 5
    for whole, size in made:
        assert (whole[:GUARD] == 3).all() and (whole[GUARD + size :] == 3).all()


GUARD = 4096
