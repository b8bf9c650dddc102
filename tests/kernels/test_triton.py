"""The Triton kernels: on a GPU, or in Triton's interpreter on a CPU (float32 and float16 only).

Outputs and every gradient are held against float64 within the budget of benches/budget.py, on
shapes that divide nothing. torch.empty is filled with NaN (conftest.py), so that a tile which is
not written shows.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bioinstruct.benches.budget import Op, check, normal
from bioinstruct.benches.workload import SHAPES, make_batches, make_model, random_documents
from bioinstruct.kernels import (
    Branch,
    Dropout,
    Rotation,
    add_rmsnorm,
    dispatch,
    linear_cross_entropy,
    lora_linear,
    rmsnorm,
    rope,
    skinny,
    split_rope,
    swiglu,
)
from bioinstruct.kernels.adamw import (
    adamw_,
    clip_factor,
    clip_factor_tensor,
    global_norm,
)
from bioinstruct.kernels.augmented import Augmented, augmented_linear
from bioinstruct.kernels.cross_entropy import linear_cross_entropy_reference
from bioinstruct.kernels.lora import lora_linear_reference
from bioinstruct.kernels.mirror import Mirror, Place
from bioinstruct.kernels.rmsnorm import rmsnorm_reference
from bioinstruct.kernels.rope import rope_reference
from bioinstruct.kernels.rows import extended, with_room
from bioinstruct.kernels.swiglu import swiglu_reference
from bioinstruct.model.adapters import Adapters, LoraSettings
from bioinstruct.train.step import Optimizer, train_step

pytest.importorskip("triton", reason="Triton is not installed (it comes for Linux only)")

# Triton 3.6's interpreter makes NumPy before 2.4 complain
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """Every op of these tests runs its kernels."""
    with dispatch.forced("triton"):
        yield


def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that run from now on."""
    names: list[str] = []

    def run(kernel: Any, *arguments: Any, **constants: Any) -> None:
        names.append(kernel.fn.__name__)
        call(kernel, *arguments, **constants)

    call = dispatch.launch
    for name, module in list(sys.modules.items()):
        if name.startswith("bioinstruct.kernels.") and hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", run)
    return names


# ---- norms, gates, rotation --------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize(("T", "D"), [(0, 8), (1, 1), (3, 5), (17, 100), (5, 257), (2, 4099)])
def test_rmsnorm(T: int, D: int, dtype: torch.dtype) -> None:
    check(rmsnorm, rmsnorm_reference, normal((T, D), (D,)), dtype, DEVICE)


@each_dtype
@pytest.mark.parametrize(("T", "D"), [(0, 8), (1, 1), (5, 63), (17, 100), (2, 4099)])
def test_add_rmsnorm(T: int, D: int, dtype: torch.dtype) -> None:
    def reference(x: Tensor, delta: Tensor, w: Tensor) -> Tensor:
        return torch.cat((x + delta, rmsnorm_reference(x + delta, w)))

    check(
        lambda *x: torch.cat(add_rmsnorm(*x)),
        reference,
        normal((T, D), (T, D), (D,)),
        dtype,
        DEVICE,
    )


@pytest.mark.parametrize("used", [0, 1])
def test_add_rmsnorm_where_one_of_the_two_is_used(used: int) -> None:
    x, delta, w = (t.float().to(DEVICE).requires_grad_() for t in normal((5, 7), (5, 7), (7,)))
    add_rmsnorm(x, delta, w)[used].square().sum().backward()
    ours = [t.grad for t in (x, delta, w)]
    x.grad = delta.grad = w.grad = None
    h = x + delta
    (h, rmsnorm_reference(h, w))[used].square().sum().backward()
    for a, b in zip(ours, (x.grad, delta.grad, w.grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@each_dtype
@pytest.mark.parametrize(("T", "F"), [(0, 8), (1, 1), (3, 5), (17, 100), (2, 1025)])
def test_swiglu(T: int, F: int, dtype: torch.dtype) -> None:
    check(swiglu, swiglu_reference, normal((T, 2 * F)), dtype, DEVICE)


def rotation(T: int, E: int) -> Rotation:
    generator = torch.Generator().manual_seed(1)
    frequencies = torch.rand(E // 2, generator=generator, dtype=torch.float64)
    angles = torch.arange(T, dtype=torch.float64)[:, None] * frequencies
    return Rotation(angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE))


@each_dtype
@pytest.mark.parametrize(("T", "H", "E"), [(0, 2, 4), (1, 1, 2), (5, 3, 6), (33, 5, 64)])
def test_rope(T: int, H: int, E: int, dtype: torch.dtype) -> None:
    table = rotation(T, E)
    inputs = normal((T, H, E))
    check(lambda x: rope(x, table), lambda x: rope_reference(x, table), inputs, dtype, DEVICE)


def test_rope_of_strided_heads() -> None:
    table, (x,) = rotation(9, 8), normal((9, 5, 24))
    part = x.float().to(DEVICE)[:, 1:4, 8:16]
    torch.testing.assert_close(rope(part, table), rope_reference(part, table))


@each_dtype
@pytest.mark.parametrize(
    ("T", "H", "G", "E"), [(0, 2, 1, 4), (1, 1, 1, 2), (5, 6, 2, 6), (33, 4, 4, 64), (19, 9, 3, 16)]
)
def test_split_rope(T: int, H: int, G: int, E: int, dtype: torch.dtype) -> None:
    table = rotation(T, E)

    def reference(qkv: Tensor) -> Tensor:
        heads = qkv.view(T, H + 2 * G, E)
        return torch.cat((rope_reference(heads[:, : H + G], table), heads[:, H + G :]), 1)

    def ours(qkv: Tensor) -> Tensor:
        return torch.cat(split_rope(qkv, table, H), 1)

    check(ours, reference, normal((T, (H + 2 * G) * E)), dtype, DEVICE)


def test_split_rope_allocates_nothing() -> None:
    (qkv,) = normal((5, 4 * 8))
    qkv = qkv.float().to(DEVICE)
    heads = split_rope(qkv, rotation(5, 8), 2)
    assert heads.q_THE.data_ptr() == qkv.data_ptr()


# ---- loss --------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize(
    ("T", "D", "V", "S"), [(4, 3, 5, 0), (1, 1, 2, 1), (33, 20, 101, 17), (3, 4, 4100, 3)]
)
def test_linear_cross_entropy(T: int, D: int, V: int, S: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(T, generator=generator)[:S].to(DEVICE)
    labels = torch.randint(0, V, (S,), generator=generator).to(DEVICE)
    h, w = normal((T, D), (V, D))
    w = w.to(DEVICE, dtype)
    check(
        lambda h: linear_cross_entropy(h, w, rows, labels, 0.25),
        lambda h: linear_cross_entropy_reference(h, w.to(h.dtype), rows, labels, 0.25),
        [h],
        dtype,
        DEVICE,
    )


def test_linear_cross_entropy_in_chunks_and_without_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    h, w = (x.float().to(DEVICE) for x in normal((40, 8), (30, 8)))
    rows = torch.arange(40, device=DEVICE)
    whole = linear_cross_entropy(h.clone().requires_grad_(), w, rows, rows % 30)
    monkeypatch.setattr("bioinstruct.kernels.cross_entropy.GPU_CHUNK_BYTES", 30 * 4 * 7)
    torch.testing.assert_close(linear_cross_entropy(h, w, rows, rows % 30), whole.detach())


def test_large_logits_do_not_overflow() -> None:
    h, w = (x.float().to(DEVICE) for x in normal((6, 8), (30, 8)))
    rows = torch.arange(6, device=DEVICE)
    ours = linear_cross_entropy(h * 1e4, w, rows, rows)
    exact = linear_cross_entropy_reference((h * 1e4).double(), w.double(), rows, rows)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)


# ---- optimizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("ratio", [1.0, 16.0])
@pytest.mark.parametrize("P", [2, 1000, 1025])
def test_ten_updates_equal_torchs(P: int, weight_decay: float, ratio: float) -> None:
    # the second half is a stretch that learns faster, as all B of LoRA+ do
    (start,) = normal((P,))
    stretches = (slice(0, P // 2), 0.01), (slice(P // 2, P), 0.01 * ratio)
    parts = [start[place].clone().requires_grad_() for place, _ in stretches]
    groups = [{"params": [x], "lr": lr} for x, (_, lr) in zip(parts, stretches, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay)
    p, m, v = (x.float().to(DEVICE) for x in (start, torch.zeros(P), torch.zeros(P)))
    for step in range(1, 11):
        (g,) = normal((P,), seed=step)
        for part, (place, _) in zip(parts, stretches, strict=True):
            part.grad = g[place] * 0.5
        optimizer.step()
        numbers = {"step": step, "weight_decay": weight_decay, "grad_factor": 0.5}
        for place, lr in stretches:
            own = p[place], g.float().to(DEVICE)[place], m[place], v[place]
            adamw_(*own, lr=lr, **numbers)  # type: ignore[arg-type]
    torch.testing.assert_close(p.double().cpu(), torch.cat(parts).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("P", [1, 1023, 1024 * 1024 + 5])
def test_global_norm(P: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bioinstruct.kernels.adamw.NORM_PARTS", 7)
    monkeypatch.setattr("bioinstruct.kernels.adamw.BLOCK_P", 1 << 16)
    g = normal((P,))[0].float()
    assert float(global_norm(g.to(DEVICE))) == pytest.approx(float(g.double().norm()), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_norm_shows_what_is_not_finite(bad: float) -> None:
    g = torch.ones(3000, device=DEVICE)
    g[2999] = bad
    assert not global_norm(g).isfinite()


@pytest.mark.parametrize("choice", ["triton", "reference"])
@pytest.mark.parametrize("limit", [0.0, 0.5, 1e6])
def test_a_clip_factor_that_is_on_its_way(limit: float, choice: str) -> None:
    p, g, m, v = (t.float().to(DEVICE) for t in normal((2000,), (2000,), (2000,), (2000,)))
    found = []
    with dispatch.forced(choice):
        for late in (False, True):
            own = [t.clone() for t in (p, g, m.square(), v.square())]
            norm = global_norm(own[1])
            early = clip_factor(float(norm), limit)
            factor = clip_factor_tensor(norm, limit) if late else early
            adamw_(*own, lr=0.1, step=3, grad_factor=factor)  # type: ignore[arg-type]
            found.append(own)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("choice", ["triton", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_step_is_skipped_without_waiting(bad: float, choice: str) -> None:
    p, g, m, v = (t.float().to(DEVICE) for t in normal((2000,), (2000,), (2000,), (2000,)))
    before = [t.clone() for t in (p, m, v)]
    g[1234] = bad
    with dispatch.forced(choice):
        adamw_(p, g, m, v, lr=0.1, step=3, grad_factor=clip_factor_tensor(global_norm(g), 1.0))
    assert all(torch.equal(a, b) for a, b in zip((p, m, v), before, strict=True))


@each_dtype
def test_one_launch_copies_masters_to_all_their_places(dtype: torch.dtype) -> None:
    (flat,) = normal((5000,))
    flat = flat.float().to(DEVICE)
    wide = torch.zeros(70, 90, dtype=dtype, device=DEVICE)
    places = [
        Place(0, wide[:30, :80], 1.0),  # 2,400 numbers, more than a tile
        Place(2400, wide[30:33, 5:6], -2.0),
        Place(4000, wide[40:60, 40:90], 0.5),
    ]
    exact = torch.zeros_like(wide)
    exact[:30, :80] = flat[:2400].view(30, 80)
    exact[30:33, 5:6] = -2 * flat[2400:2403, None]
    exact[40:60, 40:90] = 0.5 * flat[4000:].view(20, 50)
    Mirror(places, len(flat)).refresh(flat)
    assert torch.equal(wide, exact)


def places_of(wide: Tensor) -> list[Place]:
    """Blocks that leave gaps between them, the first of more than a tile."""
    blocks = (1000, wide[:30, :80], 1.0), (3400, wide[30:33, 5:6], -2.0)
    return [Place(*block) for block in (*blocks, (4000, wide[40:60, 40:90], 0.5))]


@each_dtype
@pytest.mark.parametrize("late", [False, True])
def test_an_update_writes_the_copies(
    late: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, g, m, v = (t.float().to(DEVICE) for t in normal((6000,), (6000,), (6000,), (6000,)))
    v.square_()
    wide, exact = torch.zeros(2, 70, 90, dtype=dtype, device=DEVICE)
    mirror = Mirror(places_of(wide), len(p))
    mirror.refresh(p)
    plain = [t.clone() for t in (p, g, m, v)]
    factor = clip_factor_tensor(global_norm(g), 1.0) if late else 0.25
    names = launched(monkeypatch)
    for part, lr in ((slice(0, 4000), 0.1), (slice(4000, None), 0.3)):
        rest = {"lr": lr, "step": 3, "weight_decay": 0.1, "grad_factor": factor}
        adamw_(*(t[part] for t in (p, g, m, v)), **rest, mirror=mirror)  # type: ignore[arg-type]
        adamw_(*(t[part] for t in plain), **rest)  # type: ignore[arg-type]
    mirror.refresh(p)
    assert names == ["_adamw"] * 4  # the copies were written on the way
    assert all(torch.equal(a, b) for a, b in zip((p, m, v), (plain[0], *plain[2:]), strict=True))
    Mirror(places_of(exact), len(p)).refresh(p)
    assert exact.any() and torch.equal(wide, exact)


def test_an_update_leaves_copies_that_are_behind_to_the_next_refresh() -> None:
    p, g, m, v = (t.float().to(DEVICE) for t in normal((6000,), (6000,), (6000,), (6000,)))
    wide = torch.zeros(70, 90, device=DEVICE)
    mirror = Mirror(places_of(wide), len(p))
    adamw_(p, g, m, v.square_(), lr=0.1, step=1, mirror=mirror)
    assert not wide.any()
    mirror.refresh(p)
    assert torch.equal(wide[:30, :80].flatten(), p[1000:3400])
    adamw_(
        p,
        g * torch.nan,
        m,
        v,
        lr=0.1,
        step=2,
        grad_factor=clip_factor_tensor(g[0] * torch.nan, 1),
        mirror=mirror,
    )
    assert torch.equal(wide[:30, :80].flatten(), p[1000:3400])


# ---- dropout -----------------------------------------------------------------------------------


def masks(p: float, T: int, seed: int = 4242424242) -> Dropout:
    positions, draws = torch.arange(T) % 7, torch.arange(T) // 7 + 2**31 - 2
    return Dropout(p, seed, positions.to(DEVICE), draws.to(DEVICE))


@pytest.mark.parametrize(("T", "K"), [(1, 1), (9, 21), (13, 300)])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_mask_is_the_cpus(p: float, T: int, K: int) -> None:
    """The CPU's is held against published vectors in test_dropout.py."""
    dropout = masks(p, T)
    ours = dropout.mask(17, K, torch.float32)
    with dispatch.forced("reference"):
        assert torch.equal(ours, dropout.mask(17, K, torch.float32))


# ---- LoRA --------------------------------------------------------------------------------------

GROUPS = [
    # N, K, then (start, rows, rank) of each branch
    (5, 7, [(0, 5, 1)]),
    (20, 12, [(0, 10, 4), (10, 5, 4), (15, 5, 4)]),
    (20, 12, [(0, 10, 3), (15, 5, 8)]),  # the middle projection has no adapter
    (257, 100, [(32, 225, 24)]),
    (63, 130, [(0, 63, 64)]),
    (40, 33, [(0, 20, 48), (20, 20, 48)]),  # more than one chunk of ranks
    (30, 20, [(0, 30, 256)]),
]


@each_dtype
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("T", [0, 1, 100])
@pytest.mark.parametrize("group", GROUPS)
def test_lora_linear(
    group: tuple[int, int, list[tuple[int, int, int]]], T: int, p: float, dtype: torch.dtype
) -> None:
    N, K, parts = group
    dropout = masks(p, T) if p else None
    shapes = [s for _, rows, rank in parts for s in ((rank, K), (rows, rank))]
    weight = normal((N, K), seed=1)[0].to(DEVICE, dtype)

    def call(op: Op) -> Op:
        def f(x: Tensor, *masters: Tensor) -> Tensor:
            branches = [
                Branch(masters[2 * i], masters[2 * i + 1], start)
                for i, (start, _, _) in enumerate(parts)
            ]
            return op(x, weight.to(x.dtype), branches, 0.5, dropout, 2)

        return f

    # the sums over tokens are rounded between s, t and dA in another place than eager's
    inputs = [0.3 * x for x in normal((T, K), *shapes)]
    check(call(lora_linear), call(lora_linear_reference), inputs, dtype, DEVICE, roundings=2)


@pytest.mark.parametrize("group", [GROUPS[1], GROUPS[5]])
def test_lora_linear_with_a_mask_for_each_branch(
    group: tuple[int, int, list[tuple[int, int, int]]],
) -> None:
    N, K, parts = group
    dropout = dataclasses.replace(masks(0.3, 40), per_module=True)
    x, weight, dy = (t.float().to(DEVICE) for t in normal((40, K), (N, K), (40, N)))
    shapes = [s for _, rows, rank in parts for s in ((rank, K), (rows, rank))]
    found = []
    for op in (lora_linear, lora_linear_reference):
        leaves = [t.float().to(DEVICE).requires_grad_() for t in (x, *normal(*shapes))]
        pairs = zip(leaves[1::2], leaves[2::2], parts, strict=True)
        branches = [Branch(a, b, part[0], 1.5, i) for i, (a, b, part) in enumerate(pairs)]
        y = op(leaves[0], weight, branches, 0.5, dropout, 2)
        y.backward(dy)
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)


class _Roomy(torch.autograd.Function):
    """Identity whose output, and whose gradient, have room behind their rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, room: int) -> Tensor:
        ctx.room = room
        return with_room(x, x.shape, room).copy_(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return with_room(dx, dx.shape, ctx.room).copy_(dx), None


@each_dtype
@pytest.mark.parametrize("room", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("T", [0, 1, 100])
@pytest.mark.parametrize("group", GROUPS[:6])
def test_augmented_linear(
    group: tuple[int, int, list[tuple[int, int, int]]],
    T: int,
    p: float,
    room: bool,
    dtype: torch.dtype,
) -> None:
    N, K, parts = group
    dropout = masks(p, T) if p else None
    shapes = [s for _, rows, rank in parts for s in ((rank, K), (rows, rank))]
    weight = normal((N, K), seed=1)[0].to(DEVICE, dtype)

    def branches(masters: Sequence[Tensor]) -> list[Branch]:
        starts = [start for start, _, _ in parts]
        return [Branch(*pair) for pair in zip(masters[::2], masters[1::2], starts, strict=True)]

    def ours(x: Tensor, *masters: Tensor) -> Tensor:
        buffer = Augmented(weight, branches(masters))
        if not room:
            return augmented_linear(x, buffer, 0.5, dropout, 2)
        x = _Roomy.apply(x, buffer.room)
        assert extended(x, buffer.room) is not None or not T
        return _Roomy.apply(augmented_linear(x, buffer, 0.5, dropout, 2), buffer.room)

    def reference(x: Tensor, *masters: Tensor) -> Tensor:
        given = weight.to(x.dtype), branches(masters), 0.5, dropout, 2
        return lora_linear_reference(x, *given)

    inputs = [0.3 * x for x in normal((T, K), *shapes)]
    check(ours, reference, inputs, dtype, DEVICE, roundings=2)


def test_the_augmented_buffer_holds_what_its_formula_says() -> None:
    w, a, b, c, d = (t.to(DEVICE) for t in normal((20, 12), (3, 12), (10, 3), (8, 12), (5, 8)))
    buffer = Augmented(w, [Branch(a, b, 0), Branch(c, d, 15)])
    for _ in range(2):
        exact = torch.zeros(20 + 16, 12 + 16, dtype=torch.float64, device=DEVICE)
        exact[:20, :12], exact[20:23, :12], exact[23:31, :12] = w, a, c
        exact[:10, 12:15], exact[15:, 15:23][:5] = b, d
        assert torch.equal(buffer.we, exact)
        assert torch.equal(buffer.w_NK, w)
        for master in (a, b, c, d):
            master.mul_(-2)
        buffer.refresh()


def test_room_is_never_anothers_columns() -> None:
    wide = torch.zeros(5, 24, device=DEVICE)
    for part in (wide[:, :16], wide[1:, :16], wide[:, 8:], wide[:, :15], torch.zeros(5, 16)):
        whole = part.data_ptr() == wide.data_ptr() and part.shape == (5, 16)
        assert (extended(part, 8) is not None) == whole
    assert extended(with_room(wide, (5, 16), 8), 8) is not None


@pytest.mark.parametrize("ranks", [[193], [100, 93]])
def test_ranks_that_an_augmented_buffer_does_not_take(ranks: list[int]) -> None:
    branches = [Branch(torch.zeros(r, 4), torch.zeros(2, r), 2 * i) for i, r in enumerate(ranks)]
    with pytest.raises(ValueError, match="takes 192 ranks at most"):
        Augmented(torch.zeros(6, 4), branches)


def test_a_wrong_input_of_an_augmented_linear_is_named() -> None:
    buffer = Augmented(torch.zeros(6, 4), [Branch(torch.zeros(1, 4), torch.zeros(6, 1), 0)])
    with pytest.raises(ValueError, match=r"needs x_TK \(T, 4\) for this buffer, got \(2, 5\)"):
        augmented_linear(torch.zeros(2, 5), buffer)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_a_step_split_into_micro_batches_gives_its_gradient(p: float) -> None:
    x, w, a, b, dy = (
        t.float().to(DEVICE) for t in normal((50, 33), (20, 33), (4, 33), (20, 4), (50, 20))
    )
    dropout = masks(p, 50)
    grads = []
    for size in (50, 25, 10):
        A, B = (m.clone().requires_grad_() for m in (a, b))
        A.grad, B.grad = torch.zeros_like(a), torch.zeros_like(b)
        places = A.grad.data_ptr(), B.grad.data_ptr()
        for i in range(0, 50, size):
            rows = slice(i, i + size)
            masked = Dropout(p, dropout.seed, dropout.positions_T[rows], dropout.draws_T[rows])
            y = lora_linear(x[rows], w, [Branch(A, B, 0)], 2.0, masked if p else None, 3)
            y.backward(dy[rows])
        assert places == (A.grad.data_ptr(), B.grad.data_ptr())
        grads.append((A.grad, B.grad))
    for other in grads[1:]:
        for one, two in zip(grads[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_the_gradient_view_is_added_to_and_the_first_layer_learns() -> None:
    x, w, a, b = (t.float().to(DEVICE) for t in normal((5, 6), (4, 6), (2, 6), (4, 2)))
    a, b = a.requires_grad_(), b.requires_grad_()
    lora_linear(x, w, [Branch(a, b, 0)]).sum().backward()
    assert a.grad is not None and b.grad is not None
    once = a.grad.clone()
    assert once.abs().max() > 0
    lora_linear(x, w, [Branch(a, b, 0)]).sum().backward()
    torch.testing.assert_close(a.grad, 2 * once)


def test_repeated_passes_are_the_same_bits() -> None:
    x, w, a, b = (t.float().to(DEVICE) for t in normal((300, 130), (260, 130), (8, 130), (260, 8)))
    results = []
    for _ in range(3):
        A, B, X = (t.clone().requires_grad_() for t in (a, b, x))
        lora_linear(X, w, [Branch(A, B, 0)], 0.5, masks(0.1, 300), 1).square().sum().backward()
        results.append((A.grad, B.grad, X.grad))
    for again in results[1:]:
        assert all(torch.equal(u, v) for u, v in zip(results[0], again, strict=True))  # type: ignore[arg-type]


# ---- faults are caught -------------------------------------------------------------------------


def faulty(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[..., Any]) -> None:
    call = getattr(skinny, name)
    monkeypatch.setattr(skinny, name, lambda *args, **kw: change(call, *args, **kw))


def unmasked(call: Callable[..., Any], ds: Tensor, x: Tensor, *_: object) -> Any:
    return call(ds, x, None, 0)


def wrong_scale(call: Callable[..., Any], *args: Any) -> Any:
    return call(*args[:3], args[3] * 1.01, *args[4:])


def unwritten(call: Callable[..., Any], x: Tensor, a: Tensor, t: Tensor, *rest: Any) -> Any:
    return call(x[:-1], a, t[:-1], *rest)


FAULTS: list[tuple[str, Callable[..., Any]]] = [
    ("shrink", wrong_scale),
    ("shrink", lambda call, x, a, t, s, *_: call(x, a, t, s)),  # no mask
    ("shrink", unwritten),
    ("gradient_of_a", unmasked),
    ("keep_scale", lambda call, *_: 1.0),
    ("masked_expand", lambda call, ds, a, *_: ds @ a),  # the K-extended dx at p > 0
    ("shrink_dy", lambda call, *args: call(*args).flip(1)),
]


@pytest.mark.parametrize(("name", "change"), FAULTS)
def test_planted_faults_are_caught(
    name: str, change: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty(monkeypatch, name, change)
    with pytest.raises(ValueError, match="is off by"):
        test_lora_linear((20, 24, [(0, 12, 4), (12, 8, 8)]), 30, 0.3, torch.float32)


# ---- the switch --------------------------------------------------------------------------------


def test_every_op_runs_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    names = launched(monkeypatch)
    test_add_rmsnorm(5, 63, torch.float32)
    test_swiglu(3, 5, torch.float32)
    test_split_rope(5, 6, 2, 6, torch.float32)
    test_linear_cross_entropy(33, 20, 101, 17, torch.float32)
    test_lora_linear(GROUPS[1], 30, 0.3, torch.float32)
    masks(0.5, 3).mask(0, 8, torch.float32)
    wanted = {
        "_rmsnorm_fwd", "_rmsnorm_bwd", "_rmsnorm_dw", "_swiglu_fwd", "_swiglu_bwd", "_rotate",
        "_softmax_gradient", "_shrink", "_shrink_dy", "_gradient_of_a", "_masked_expand",
        "_sum_parts", "_mask",
    }  # fmt: skip
    assert set(names) == wanted


def run_all(dtype: torch.dtype) -> Sequence[object]:
    x = torch.ones(2, 4, dtype=dtype)
    return rmsnorm(x, x[0]), swiglu(x)


def test_the_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    names = launched(monkeypatch)
    with dispatch.forced("reference"):
        run_all(torch.float32)
    assert names == []


def test_float64_and_cpu_tensors_take_torchs_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    names = launched(monkeypatch)
    run_all(torch.float64)
    with dispatch.forced("auto"):
        run_all(torch.float32)
    assert names == []


def test_bfloat16_is_refused_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    with pytest.raises(ValueError, match="interpreter is wrong in bfloat16"):
        run_all(torch.bfloat16)


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs a GPU, or TRITON_INTERPRET=1"):
        run_all(torch.float32)


def test_a_machine_without_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="needs Triton, which is not installed"):
        run_all(torch.float32)
    with dispatch.forced("auto"):
        run_all(torch.float32)


def test_an_unknown_choice_is_named() -> None:
    with (
        pytest.raises(
            ValueError, match="BIOINSTRUCT_KERNELS = 'cuda' is unknown; allowed are auto"
        ),
        dispatch.forced("cuda"),
    ):
        pass


def test_a_failed_block_leaves_the_choice_as_it_was() -> None:
    with pytest.raises(KeyError), dispatch.forced("reference"):
        raise KeyError
    assert dispatch._State.choice == "triton"


# ---- the whole step ----------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_training_step_is_the_references(p: float) -> None:
    """The model's own wiring: all ops and the optimizer, over two packs."""
    found = []
    for choice in ("reference", "triton"):
        settings = LoraSettings(r=4, alpha=8.0, dropout=p)
        config = SHAPES["tiny"]
        model, adapters = (
            make_model(config, DEVICE, torch.float32),
            Adapters(config, settings, DEVICE),
        )
        adapters.flat_P.detach().normal_(0, 0.05, generator=torch.Generator(DEVICE).manual_seed(1))
        tokens = random_documents(config, (9, 5, 12))
        batches = make_batches(tokens, 14, DEVICE)
        optimizer = Optimizer(adapters)
        with dispatch.forced(choice):
            result = train_step(model, optimizer, batches, int(tokens.supervised.sum()), 1e-3, 5)
        found.append((result, optimizer.m_P, optimizer.v_P))
    (one, m, v), (two, m2, v2) = found
    assert two[:2] == pytest.approx(one[:2], rel=1e-5)
    assert m.abs().max() > 0
    torch.testing.assert_close(m2, m, rtol=1e-3, atol=1e-5 * float(m.abs().max()))
    torch.testing.assert_close(v2, v, rtol=1e-3, atol=1e-5 * float(v.abs().max()))
