"""The kernels' path through a whole model: weights and adapters in one buffer, fused halves.

Held against the plain path of torch operations, which test_llama.py and test_golden_peft.py hold
against independent formulas.
"""

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from bioinstruct.benches.workload import SHAPES, make_batches, make_model, random_documents
from bioinstruct.kernels import dispatch
from bioinstruct.kernels.mirror import Mirror, Tiles
from bioinstruct.model.adapters import Adapters, LoraSettings
from bioinstruct.model.augmented_layers import AugmentedLayers
from bioinstruct.model.generate import Completion, generate
from bioinstruct.model.llama import Llama, pack_documents
from bioinstruct.model.merging import merged_tensors
from bioinstruct.train.step import Optimizer, add_gradient

pytest.importorskip("triton", reason="Triton is not installed (it comes for Linux only)")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = SHAPES["tiny"]
ONE_LAYER = dataclasses.replace(TINY, num_layers=1)
DOCUMENTS = ((5, 3, 6), 8)  # lengths, and the tokens of a pack


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """Every op of these tests runs its kernels."""
    with dispatch.forced("triton"):
        yield


def made(config: object = ONE_LAYER, **settings: object) -> tuple[Llama, Adapters]:
    model = make_model(config, DEVICE, torch.float32)  # type: ignore[arg-type]
    adapters = Adapters(model.config, LoraSettings(**{"r": 4, **settings}), DEVICE)  # type: ignore[arg-type]
    with torch.no_grad():
        generator = torch.Generator(DEVICE).manual_seed(1)
        adapters.flat_P.normal_(0, 0.05, generator=generator)
        for name, place in model.destinations().items():
            if name.endswith("bias"):
                place.normal_(generator=generator)
    return model, adapters


def gradient(choice: str, model: Llama, adapters: Adapters) -> tuple[float, Tensor]:
    """Loss and flat gradient of two packs."""
    tokens = random_documents(model.config, DOCUMENTS[0])
    adapters.grad_P.zero_()
    with dispatch.forced(choice):
        batches = make_batches(tokens, DOCUMENTS[1], DEVICE)
        scale = 1 / int(tokens.supervised.sum())
        loss = sum(float(add_gradient(model, adapters, batch, scale, 5)) for batch in batches)
    return loss, adapters.grad_P.clone()


def assert_equal_to_the_reference(model: Llama, adapters: Adapters) -> None:
    loss, exact_P = gradient("reference", model, adapters)
    found, found_P = gradient("triton", model, adapters)
    assert found == pytest.approx(loss, rel=1e-5)
    for module in adapters.modules:
        for master in (module.a_RK, module.b_NR):
            part = slice(master.storage_offset(), master.storage_offset() + master.numel())
            scale = float(exact_P[part].abs().max())
            assert scale > 0
            torch.testing.assert_close(found_P[part], exact_P[part], rtol=1e-3, atol=2e-5 * scale)


QWEN2 = dataclasses.replace(ONE_LAYER, family="qwen2")
QWEN3 = dataclasses.replace(TINY, family="qwen3", tied_embeddings=False)
CASES: dict[str, tuple[object, dict[str, object]]] = {
    "two layers": (TINY, {}),
    "two of seven": (TINY, {"targets": ("q_proj", "v_proj")}),
    "only up and down": (ONE_LAYER, {"targets": ("up_proj", "down_proj")}),
    "only o": (ONE_LAYER, {"targets": ("o_proj",)}),
    "only gate, second layer": (TINY, {"targets": ("gate_proj",), "layers": (1,)}),
    "ranks and scales of their own": (
        ONE_LAYER,
        {
            "rank_pattern": {"k_proj": 9, "down_proj": 1},
            "alpha_pattern": {"v_proj": 3.0, "up_proj": 70.0},
            "rslora": True,
        },
    ),
    "a layer too wide for a buffer": (
        TINY,
        {"r": 2, "rank_pattern": {"layers.1.mlp.down_proj": 193}},
    ),
    "ranks beyond the kernels": (ONE_LAYER, {"r": 24, "targets": ("q_proj", "k_proj", "v_proj")}),
    "biases": (QWEN2, {}),
    "normed heads, untied": (QWEN3, {}),
}


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("case", CASES)
def test_every_gradient_is_the_plain_paths(case: str, p: float) -> None:
    config, settings = CASES[case]
    assert_equal_to_the_reference(*made(config, **settings, dropout=p))


def test_recomputed_layers_give_the_same_gradient() -> None:
    model, adapters = made(TINY, dropout=0.2)
    _, once_P = gradient("triton", model, adapters)
    model.recomputed_layers = 1
    _, again_P = gradient("triton", model, adapters)
    assert torch.equal(once_P, again_P)


# ---- memory ------------------------------------------------------------------------------------


def test_weights_exist_once_and_stay_the_models() -> None:
    model, adapters = made(TINY)
    before = {name: place.clone() for name, place in model.destinations().items()}
    merged_before = {name: t.clone() for name, t in merged_tensors(model, adapters)}
    gradient("triton", model, adapters)
    for name, place in model.destinations().items():
        assert torch.equal(place, before[name]), name
    for name, tensor in merged_tensors(model, adapters):
        assert torch.equal(tensor, merged_before[name]), name
    layers = model._augmented_for(adapters)
    for block, buffers in zip(model.blocks, layers, strict=True):
        assert buffers is not None
        for group, weight in block.matrices().items():  # type: ignore[operator]
            buffer = buffers.buffers[group]
            assert weight.data_ptr() == buffer.we.data_ptr()
            assert buffer.room == 8 * -(-buffer.ranks // 8) > 0
    # and what is loaded later goes into the buffers
    with torch.no_grad():
        model.destinations()["model.layers.1.self_attn.v_proj.weight"].mul_(3)
        model.destinations()["model.layers.0.mlp.down_proj.weight"].neg_()
    assert_equal_to_the_reference(model, adapters)


def test_other_adapters_take_the_buffers_over() -> None:
    model, adapters = made()
    gradient("triton", model, adapters)
    first = model._augmented
    _, others = made(r=3, targets=("q_proj", "down_proj"))
    assert_equal_to_the_reference(model, others)
    assert model._augmented is not first
    assert_equal_to_the_reference(model, adapters)


def test_sharded_weights_stay_apart() -> None:
    model, adapters = made()
    model.may_augment = False
    places = [weight.data_ptr() for weight in model.parameters()]
    assert_equal_to_the_reference(model, adapters)
    assert model._augmented is None
    assert places == [weight.data_ptr() for weight in model.parameters()]


def test_nothing_is_saved_but_whole_and_few_tensors() -> None:
    model, adapters = made(TINY)
    tokens = random_documents(model.config, (20,))
    (batch,) = make_batches(tokens, 20, DEVICE)
    gradient("triton", model, adapters)
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        add_gradient(model, adapters, batch, 1.0)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    activations = [t for place, t in saved.items() if place not in owned]
    for tensor in activations:
        # queries, keys and values are views of one buffer, all of which is saved
        whole = tensor.untyped_storage().nbytes() in (tensor.nbytes, 20 * 4 * (6 + 4) * 8)
        assert whole, tuple(tensor.shape)
    config, layers = model.config, model.config.num_layers
    D, F = config.hidden_size, config.intermediate_size
    per_token = 2 * D + 2 * F + (6 + 4) * 8 + D  # two h, gate and up, q k v, attention's output
    stored = sum(t.untyped_storage().nbytes() for t in activations)
    # t, r, the attention's own numbers, the last norm, the loss and the rotation's tables
    assert stored < 4 * 20 * (layers * (per_token + 130) + 3 * D + 2 * 8)


# ---- masters that change -----------------------------------------------------------------------


def change_flat(adapters: Adapters) -> None:
    adapters.flat_P.copy_(adapters.flat_P.flip(0))


def change_detached(adapters: Adapters) -> None:
    adapters.flat_P.detach().normal_(0, 0.1)


def change_a_view(adapters: Adapters) -> None:
    adapters.modules[2].b_NR.mul_(-3)


def change_in_inference(adapters: Adapters) -> None:
    with torch.inference_mode():
        adapters.flat_P.mul_(-1.5)


def change_by_an_update(adapters: Adapters) -> None:
    adapters.grad_P.normal_()
    Optimizer(adapters).step(0.1)


def change_by_an_update_with_two_rates(adapters: Adapters) -> None:
    adapters.settings = dataclasses.replace(adapters.settings, plus_ratio=4.0)
    change_by_an_update(adapters)


CHANGES = [
    change_flat,
    change_detached,
    change_a_view,
    change_in_inference,
    change_by_an_update,
    change_by_an_update_with_two_rates,
]


def logits(model: Llama, adapters: Adapters | None) -> Tensor:
    pack = pack_documents([[3, 1, 4, 1, 5], [9, 2, 6]], DEVICE)
    with torch.no_grad():
        return model.logits(pack, adapters)


def assert_fresh(model: Llama, adapters: Adapters) -> None:
    with dispatch.forced("reference"):
        exact = logits(model, adapters)
    torch.testing.assert_close(logits(model, adapters), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_masters_are_in_the_buffers(change: Callable[[Adapters], None]) -> None:
    model, adapters = made()
    before = logits(model, adapters)
    assert_fresh(model, adapters)
    with torch.no_grad():
        change(adapters)
    assert_fresh(model, adapters)
    assert not torch.allclose(logits(model, adapters), before, rtol=1e-3, atol=1e-4)


def nowhere(mirror: Mirror, start: int, end: int) -> Tiles:
    tiles = whole_tiles(mirror, start, end)
    table = tiles.table.clone()
    table[:, -1] = 0  # the addresses
    return tiles._replace(table=table)


whole_tiles = Mirror.tiles


@pytest.mark.parametrize("change", CHANGES)
def test_a_stale_buffer_would_be_caught(
    change: Callable[[Adapters], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AugmentedLayers, "refresh", lambda self: None)
    monkeypatch.setattr(Mirror, "tiles", nowhere)  # an update writes copies itself
    with pytest.raises(AssertionError):
        test_changed_masters_are_in_the_buffers(change)


def test_an_average_stands_in_and_goes_again() -> None:
    model, adapters = made()
    optimizer = Optimizer(adapters, ema=0.9)
    for _ in range(2):
        adapters.grad_P.normal_()
        optimizer.step(0.05)
        assert_fresh(model, adapters)
    own = logits(model, adapters)
    with optimizer.averaged():
        assert_fresh(model, adapters)
        assert not torch.allclose(logits(model, adapters), own, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits(model, adapters), own)


# ---- answers -----------------------------------------------------------------------------------


def answers(model: Llama, adapters: Adapters | None) -> list[Completion]:
    prompts = [[5, 6, 7], [1, 2, 3, 4, 5, 6]]
    return generate(model, prompts, max_new_tokens=4, end_ids=[], adapters=adapters, logprobs=True)


def test_answers_with_and_without_adapters_before_and_after_training() -> None:
    """The buffers are made by inference first, and training goes on with them."""
    model, adapters = made()
    for given in (adapters, None):
        with dispatch.forced("reference"):
            exact = answers(model, given)
        for one, two in zip(answers(model, given), exact, strict=True):
            assert one.ids == two.ids
            assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)
    assert_equal_to_the_reference(model, adapters)
    adapters.grad_P.normal_()
    Optimizer(adapters).step(0.01)
    with dispatch.forced("reference"):
        exact = answers(model, adapters)
    for one, two in zip(answers(model, adapters), exact, strict=True):
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)
