"""Attention: every backend against the formula in float64, and the choice among them.

The packages for GPUs are not there on a CPU, so modules of their names, which compute the formula,
stand in for them: what is tested then is what they are called with.
"""

import importlib
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bioinstruct.benches.budget import check, normal
from bioinstruct.kernels import Documents, attention, attention_blocked, attention_packed
from bioinstruct.kernels.attention import (
    BACKENDS,
    attention_reference,
    choose_backend,
    self_test,
    why_not,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# the package exports a function of the module's name, so the module is found in sys.modules
MODULE = sys.modules["bioinstruct.kernels.attention"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [(), (1,), (5,), (3, 1, 7), (130, 2), (128, 129, 1), (300,)]
on_cpu = pytest.mark.parametrize("backend", ["blocked", "sdpa"])


@pytest.mark.parametrize("dtype", DTYPES)
@on_cpu
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("H", "G"), [(4, 4), (6, 2), (3, 1)])
def test_attention(
    lengths: tuple[int, ...], H: int, G: int, backend: str, dtype: torch.dtype
) -> None:
    documents = Documents.of_lengths(lengths)
    T, E = sum(lengths), 16
    check(
        lambda q, k, v: attention(q, k, v, documents, backend),
        lambda q, k, v: attention_reference(q, k, v, documents),
        normal((T, H, E), (T, G, E), (T, G, E)),
        dtype,
        CPU,
        roundings=4,  # eager's gradient of a one-token document is exactly zero, ours nearly
    )


@on_cpu
def test_attention_passes_gradcheck(backend: str) -> None:
    documents = Documents.of_lengths((3, 2))
    heads = [x.requires_grad_() for x in normal((5, 4, 2), (5, 2, 2), (5, 2, 2))]
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, documents, backend), heads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_or_computed_again_probabilities_give_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = Documents.of_lengths((150, 3, 260, 149))
    tensors = [x.to(dtype) for x in normal((562, 6, 16), (562, 2, 16), (562, 2, 16), (562, 6, 16))]
    found = []
    for tokens in (0, 150, 512):
        monkeypatch.setattr(attention_blocked, "SAVED_TOKENS", tokens)
        leaves = [t.clone().requires_grad_() for t in tensors[:3]]
        out = attention(*leaves, documents, "blocked")  # type: ignore[call-arg, misc]
        found.append([out, *torch.autograd.grad(out, leaves, tensors[3])])
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


def test_heads_that_are_columns_of_one_buffer() -> None:
    """As the fused projection gives them."""
    (buffer,) = normal((70, 10, 16))
    q, k, v = (x.requires_grad_() for x in buffer.float().split((6, 2, 2), 1))
    documents = Documents.of_lengths((70,))
    torch.testing.assert_close(
        attention(q, k, v, documents, "blocked"), attention_reference(q, k, v, documents)
    )


@on_cpu
def test_attention_survives_large_scores(backend: str) -> None:
    q, k, v = normal((9, 2, 4), (9, 2, 4), (9, 2, 4))
    documents = Documents.of_lengths((9,))
    out = attention(q.float() * 1e3, k.float() * 1e3, v.float(), documents, backend)
    exact = attention_reference(q.float().double() * 1e3, k.float().double() * 1e3, v, documents)
    torch.testing.assert_close(out.double(), exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: attention(*torch.zeros(3, 4, 2, 8).unbind(), Documents.of_lengths((3,))),
            "the documents cover 3 tokens, the pack has 4",
        ),
        (
            lambda: attention(
                torch.zeros(4, 3, 8), *torch.zeros(2, 4, 2, 8).unbind(), Documents.of_lengths((4,))
            ),
            "H a multiple of G",
        ),
    ],
)
def test_wrong_shapes_are_named(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


# ---- the test that a backend must pass ----------------------------------------------------------


@on_cpu
def test_the_self_test_passes(backend: str) -> None:
    assert self_test(backend, CPU, torch.float32) < 1e-6


def test_the_self_test_catches_a_wrong_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "_sdpa", lambda q, k, v, d: q + k.mean() + v.mean())
    with pytest.raises(ValueError, match="attention backend sdpa is off by"):
        self_test("sdpa", CPU, torch.float32)


def test_the_self_test_catches_a_backend_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> Tensor:
        raise TypeError("unexpected argument\nand more")

    monkeypatch.setattr(MODULE, "_sdpa", refuses)
    with pytest.raises(ValueError, match=r"sdpa fails on cpu \(unexpected argument\); choose"):
        self_test("sdpa", CPU, torch.float32)


# ---- choice ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("flashy", "is unknown; allowed are auto, blocked, sdpa, flash3"),
        ("varlen", "cannot run here: it needs a CUDA GPU and bfloat16; use auto or sdpa"),
        ("flash2", "it needs a CUDA GPU"),
    ],
)
def test_backends_that_cannot_run(name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        choose_backend(name, CPU, torch.float32)


def test_what_a_gpu_rules_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert why_not("sdpa", CUDA, torch.float32) is None
    assert why_not("blocked", CUDA, torch.bfloat16) == "it is for CPUs"
    assert why_not("varlen", CUDA, torch.float32) == "it needs a CUDA GPU and bfloat16"
    assert why_not("flash3", CUDA, torch.bfloat16) == "it needs a Hopper GPU"


@pytest.mark.parametrize(
    ("right", "chosen"),
    [({"varlen", "flex"}, "varlen"), ({"flex", "xformers"}, "xformers"), (set(), "sdpa")],
)
def test_the_first_right_backend_is_taken(
    right: set[str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def test(backend: str, *_: object) -> float:
        if backend not in right:
            raise ValueError("it is off")
        return 0.0

    monkeypatch.setattr(MODULE, "why_not", lambda *_: None)
    monkeypatch.setattr(MODULE, "self_test", test)
    assert choose_backend("auto", CUDA, torch.bfloat16) == chosen


def test_a_forced_backend_must_pass_its_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def test(*_: object) -> float:
        raise ValueError("it is off by 3")

    monkeypatch.setattr(MODULE, "why_not", lambda *_: None)
    monkeypatch.setattr(MODULE, "self_test", test)
    with pytest.raises(ValueError, match="off by 3"):
        choose_backend("flex", CUDA, torch.bfloat16)


@pytest.mark.parametrize(("slow", "chosen"), [("blocked", "sdpa"), ("sdpa", "blocked")])
def test_the_probe_takes_the_faster_on_a_cpu(
    slow: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents, backend: str) -> Tensor:
        clock[0] += 2.1 if backend == slow else 1.0
        return q + k.mean() + v.mean()

    monkeypatch.setattr(MODULE, "attention", attend)
    monkeypatch.setattr(MODULE, "time", SimpleNamespace(thread_time=lambda: clock[0]))
    assert MODULE._probed.__wrapped__(torch.float32) == chosen


def test_a_backend_is_chosen_on_this_cpu_once() -> None:
    first = choose_backend("auto", CPU, torch.float32)
    assert first in ("blocked", "sdpa")
    assert choose_backend("auto", CPU, torch.float32) == first


# ---- packages for GPUs -------------------------------------------------------------------------


def by_formula(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    return attention_reference(q, k, v, Documents(tuple(cu_seqlens.tolist()), cu_seqlens))


class Fakes:
    """Modules of the packages' names; `calls` keeps what they were called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []

        def flash(
            q: Tensor, k: Tensor, v: Tensor, cu: Tensor, cu_k: Tensor, longest: int, longest_k: int,
            *, causal: bool, deterministic: bool,
        ) -> Tensor:  # fmt: skip
            assert causal and cu is cu_k and longest == longest_k == int(cu.diff().max())
            self.calls.append({"heads": k.shape[1], "deterministic": deterministic, "T": len(q)})
            return by_formula(q, k, v, cu)

        def varlen(
            q: Tensor, k: Tensor, v: Tensor, cu: Tensor, cu_k: Tensor, longest: int, longest_k: int,
            *, window_size: tuple[int, int], enable_gqa: bool = False,
        ) -> Tensor:  # fmt: skip
            assert window_size == (-1, 0) and enable_gqa == (q.shape[1] != k.shape[1])
            self.calls.append({"heads": k.shape[1], "T": len(q), "longest": longest})
            return by_formula(q, k, v, cu)

        def efficient(q: Tensor, k: Tensor, v: Tensor, attn_bias: list[int]) -> Tensor:
            _, T, G, J, E = q.shape
            assert k.shape == q.shape and J == 1 or k.stride(3) == 0
            self.calls.append({"heads": G, "T": T})
            packed = by_formula(
                q.reshape(T, G * J, E), k[0, :, :, 0], v[0, :, :, 0], torch.tensor(attn_bias)
            )
            return packed.view(1, T, G, J, E)

        mask = SimpleNamespace(
            from_seqlens=lambda lengths: [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        )
        parts: dict[str, dict[str, Any]] = {
            "flash_attn": {"flash_attn_varlen_func": flash},
            "flash_attn_interface": {"flash_attn_varlen_func": lambda *a, **k: (flash(*a, **k), 0)},
            "torch.nn.attention.varlen": {"varlen_attn": varlen},
            "xformers": {},
            "xformers.ops": {"memory_efficient_attention": efficient},
            "xformers.ops.fmha.attn_bias": {"BlockDiagonalCausalMask": mask},
        }
        for name, members in parts.items():
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))  # type: ignore[misc]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(monkeypatch)


each_package = pytest.mark.parametrize("backend", ["varlen", "flash2", "flash3", "xformers"])


@each_package
@pytest.mark.parametrize(("H", "G"), [(4, 4), (6, 2)])
def test_packages_get_grouped_heads_as_they_are(backend: str, H: int, G: int, fakes: Fakes) -> None:
    documents = Documents.of_lengths((3, 1, 7))
    q, k, v = (x.float() for x in normal((11, H, 8), (11, G, 8), (11, G, 8)))
    out = attention(q, k, v, documents, backend)
    torch.testing.assert_close(out, attention_reference(q, k, v, documents))
    assert [call["heads"] for call in fakes.calls] == [G]


@each_package
def test_packages_pass_the_self_test(backend: str, fakes: Fakes) -> None:
    assert self_test(backend, CPU, torch.float32) < 1e-6
    assert fakes.calls


@pytest.mark.parametrize("backend", ["flash2", "flash3"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_packages_are_told_to_be_deterministic(
    backend: str, deterministic: bool, fakes: Fakes
) -> None:
    torch.use_deterministic_algorithms(deterministic)
    self_test(backend, CPU, torch.float32)
    assert {call["deterministic"] for call in fakes.calls} == {deterministic}


@each_package
def test_an_empty_pack_calls_no_package(backend: str, fakes: Fakes) -> None:
    empty = torch.zeros(0, 2, 8)
    assert attention(empty, empty, empty, Documents.of_lengths(()), backend).shape == (0, 2, 8)
    assert not fakes.calls


@pytest.mark.parametrize("backend", ["varlen", "flash2", "flash3"])
def test_a_pack_beyond_32_bits_goes_in_parts(
    backend: str, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # room for 400 padded tokens of 6 heads of width 8: every document counts 128 more
    monkeypatch.setattr(attention_packed, "INDEX_LIMIT", 400 * 6 * 32)
    documents = Documents.of_lengths((100, 20, 30, 200, 7))
    q, k, v = (x.float() for x in normal((357, 6, 8), (357, 2, 8), (357, 2, 8)))
    out = attention(q, k, v, documents, backend)
    torch.testing.assert_close(out, attention_reference(q, k, v, documents))
    assert [call["T"] for call in fakes.calls] == [120, 30, 200, 7]


def test_a_document_beyond_32_bits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_packed, "INDEX_LIMIT", 400 * 6 * 32)
    with pytest.raises(ValueError, match="272 tokens is too long for FlashAttention 2 .* most 271"):
        attention_packed.index_parts(Documents.of_lengths((5, 272)), 6, 8)


@given(st.lists(st.integers(0, 300), max_size=40), st.integers(1, 9), st.integers(1, 70))
def test_parts_hold_all_documents_within_the_limit(
    lengths: list[int], heads: int, width: int
) -> None:
    padded = heads * (-(-width // 32) * 32)
    before, attention_packed.INDEX_LIMIT = attention_packed.INDEX_LIMIT, padded * 700
    try:
        parts = attention_packed.index_parts(Documents.of_lengths(lengths), heads, width)
    finally:
        attention_packed.INDEX_LIMIT = before
    assert [i for first, end in parts for i in range(first, end)] == list(range(len(lengths)))
    for first, end in parts:
        assert sum(n + 128 for n in lengths[first:end]) * padded < padded * 700


def test_the_limit_is_two_to_the_31() -> None:
    # 32 heads of width 128: fewer than 524,288 tokens, each document padded by 128
    assert len(attention_packed.index_parts(Documents.of_lengths((262_000, 262_031)), 32, 128)) == 1
    assert len(attention_packed.index_parts(Documents.of_lengths((262_000, 262_032)), 32, 128)) == 2


def test_a_part_is_a_pack_of_its_own() -> None:
    part = Documents.of_lengths((3, 4, 5, 6)).part(1, 3)
    assert part.bounds == (0, 4, 9)
    assert torch.equal(part.cu_seqlens, torch.tensor([0, 4, 9], dtype=torch.int32))
    assert part.max_length == 5


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for backend, words in {
        "flash2": r"flash_attn is not installed; it needs flash-attn \(pip install",
        "flash3": "flash_attn_interface is not installed; it needs FlashAttention 3",
        "xformers": r"xformers.ops is not installed; it needs xformers \(pip install",
    }.items():
        if importlib.util.find_spec(attention_packed.PACKAGES[backend][0].split(".")[0]):
            pytest.skip(f"{backend} is installed here")
        with pytest.raises(ValueError, match=words):
            choose_backend(backend, CUDA, torch.bfloat16)


@pytest.mark.parametrize("failure", [ImportError("libcudart.so.12"), OSError("undefined symbol")])
def test_a_package_that_does_not_load_is_named(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(_: str) -> None:
        raise failure

    monkeypatch.setattr(attention_packed.importlib, "import_module", loads)
    reason = attention_packed.why_missing("flash2")
    assert reason is not None
    assert reason.startswith(f"flash_attn does not load here ({failure})")


def test_torchs_own_are_there() -> None:
    assert attention_packed.why_missing("flex") is None
    assert set(attention_packed.CALLS) == set(attention_packed.PACKAGES) < set(BACKENDS)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("lengths", [(1,), (3, 1, 7), (130, 2), (5, 0, 9)])
def test_flex_sees_the_past_of_its_document(lengths: tuple[int, ...]) -> None:
    """Its mask, in its plain formula; on a CPU it has no gradients."""
    torch.use_deterministic_algorithms(False)
    T, documents = sum(lengths), Documents.of_lengths(lengths)
    q, k, v = (x.float() for x in normal((T, 6, 16), (T, 2, 16), (T, 2, 16)))
    out = attention(q, k, v, documents, "flex")
    torch.testing.assert_close(out, attention_reference(q, k, v, documents))
