"""PiSSA: against numpy's decomposition, and against peft's own start and its gradient steps.

data/peft_golden/make.py made the numbers, and opened our files in peft on the unchanged model.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from bioinstruct.model.adapters import CONFIG, Adapters, LoraSettings
from bioinstruct.model.checkpoint import open_checkpoint
from bioinstruct.model.llama import Llama, pack_documents
from bioinstruct.model.lora.pissa import Factors, difference, principal, subtract
from bioinstruct.model.merging import merged_tensors

PATTERNED = LoraSettings(
    r=4,
    alpha=6.0,
    init="pissa",
    rslora=True,
    layers=(0, 2, 4),
    rank_pattern={"model.layers.2.self_attn.q_proj": 2, "up_proj": 2},
    alpha_pattern={"v_proj": 8.0, "layers.4.mlp.down_proj": 8.0},
)
STARTS = {"pissa": LoraSettings(r=4, alpha=6.0, init="pissa"), "pissa_patterned": PATTERNED}
RATE = 0.003  # of make.py's gradient steps


@pytest.fixture
def opened(data: Path) -> Callable[..., Llama]:
    """A model with weights of its own, which PiSSA may change."""

    def fresh(name: str = "stories260K", dtype: torch.dtype = torch.float32) -> Llama:
        checkpoint = open_checkpoint(data / name)
        model = Llama(checkpoint.config, dtype=dtype)
        checkpoint.load_into(model.destinations())
        return model

    return fresh


def started(model: Llama, settings: LoraSettings, seed: int = 0) -> Adapters:
    return Adapters.starting(model.config, settings, "cpu", seed, model.destinations())


def copies(model: Llama) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.destinations().items()}


@torch.no_grad()
def logits(model: Llama, golden: dict[str, np.ndarray], adapters: Adapters | None) -> Tensor:
    documents = [golden["ids_0"].tolist(), golden["ids_1"].tolist()]
    return model.logits(pack_documents(documents), adapters)


def gradient_steps(
    model: Llama, adapters: Adapters, golden: dict[str, np.ndarray], count: int
) -> list[float]:
    """Plain gradient steps on the sum of both documents' losses; the losses before each."""
    documents = [golden["ids_0"].tolist(), golden["ids_1"].tolist()]
    losses = []
    for _ in range(count):
        parts = model.logits(pack_documents(documents), adapters).split([len(d) for d in documents])
        loss = sum(
            cross_entropy(part[:-1], torch.tensor(ids[1:]), reduction="sum")
            for part, ids in zip(parts, documents, strict=True)
        )
        assert isinstance(loss, Tensor)
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            adapters.flat_P.sub_(adapters.grad_P, alpha=RATE)
        adapters.grad_P.zero_()
    return losses


# ---- against peft ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STARTS)
def test_training_and_export_are_peft_s(
    opened: Callable[..., Llama], golden: dict[str, np.ndarray], tmp_path: Path, name: str
) -> None:
    model = opened()
    adapters = started(model, STARTS[name])
    losses = gradient_steps(model, adapters, golden, len(golden[f"{name}_losses"]))
    assert losses == pytest.approx(golden[f"{name}_losses"].tolist(), abs=1e-4)
    expected = torch.from_numpy(golden[name])
    assert (logits(model, golden, adapters) - expected).abs().max() < 1e-4
    adapters.save(tmp_path, "stories260K")
    again, original = Adapters.load(tmp_path, model.config), opened()
    assert (logits(original, golden, again) - expected).abs().max() < 1e-4
    merged = opened()
    for place, (_, tensor) in zip(
        merged.destinations().values(), merged_tensors(original, again), strict=True
    ):
        place.copy_(tensor)
    assert (logits(merged, golden, None) - expected).abs().max() < 1e-4
    # the steps had moved them
    assert np.abs(golden[name] - golden["plain"]).max() > 1


def test_what_is_left_of_a_weight_is_peft_s(
    opened: Callable[..., Llama], golden: dict[str, np.ndarray]
) -> None:
    model = opened()
    started(model, STARTS["pissa"])
    rest = model.destinations()["model.layers.3.mlp.up_proj.weight"][:16].numpy()
    assert np.abs(rest - golden["pissa_rest"]).max() < 1e-6


def test_the_file_says_plain_lora_of_twice_the_rank(
    opened: Callable[..., Llama], tmp_path: Path
) -> None:
    model = opened()
    adapters = started(model, PATTERNED)
    adapters.save(tmp_path, "stories260K")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["r"] == 8
    assert config["rank_pattern"] == {"model.layers.2.self_attn.q_proj": 4, "up_proj": 4}
    assert "init_lora_weights" not in config
    again = Adapters.load(tmp_path, model.config)
    assert [m.scale for m in again.modules] == pytest.approx([m.scale for m in adapters.modules])
    # before the first step it adds nothing
    assert all((m.b_NR @ m.a_RK).abs().max() < 1e-5 for m in again.modules)


# ---- laws --------------------------------------------------------------------------------------


@given(
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.floats(0.1, 10),
    st.integers(0, 2**31),
    st.data(),
)
def test_the_parts_are_numpy_s_singular_triplets(
    shape: tuple[int, int], scale: float, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(shape)))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a, b = principal(weight, rank, scale, "pissa", 0)
    u, s, v = np.linalg.svd(weight.numpy(), full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ v[:rank]
    assert np.allclose(scale * (b @ a).numpy(), expected, atol=1e-10)
    # each half carries the root of the singular value
    assert np.allclose(scale * (a @ a.T).numpy(), np.diag(s[:rank]), atol=1e-10)
    assert np.allclose(scale * (b.T @ b).numpy(), np.diag(s[:rank]), atol=1e-10)
    rest = weight.clone()
    assert subtract(rest, Factors(a, b), scale) == 0
    assert np.allclose((rest + scale * b @ a).numpy(), weight.numpy(), atol=1e-12)


@pytest.mark.parametrize("shape", [(9, 40), (40, 9)])
def test_iterations_find_the_same_parts(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 9, generator=generator))[0] for n in shape)
    weight = (left * 2.0 ** -torch.arange(9)) @ right.T
    whole, fast = (principal(weight, 3, 2.0, init, 0) for init in ("pissa", "pissa_niter_8"))
    # not only the product: signs are settled too
    assert all(torch.allclose(*pair, atol=1e-4) for pair in zip(whole, fast, strict=True))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2"])
@pytest.mark.parametrize("family", ["llama", "llama3", "wide_heads", "mistral", "qwen2", "qwen3"])
def test_the_start_is_the_model_itself(
    opened: Callable[..., Llama], family: str, init: str
) -> None:
    model, targets = opened(f"families/{family}"), ("q_proj", "v_proj", "up_proj", "down_proj")
    settings = LoraSettings(
        r=3, alpha=5.0, init=init, targets=targets, rank_pattern={"1.mlp.up_proj": 7}
    )
    pack = pack_documents([[1, 17, 60, 5, 95], [1, 3, 64]])
    before, first = copies(model), model.logits(pack)
    adapters = started(model, settings)
    assert (model.logits(pack, adapters) - first).abs().max() < 1e-4
    # without them it is another model
    assert (model.logits(pack) - first).abs().max() > 0.1
    now = model.destinations()
    parts = {m.name: m.scale * (m.b_NR @ m.a_RK).detach() for m in adapters.modules}
    assert len(parts) == 8
    for name, weight in before.items():
        # q, k, v and gate, up lie in one matrix each: the rows of the others stay
        if name not in parts:
            assert torch.equal(now[name], weight)
        else:
            assert (now[name] + parts[name] - weight).abs().max() < 1e-6
            assert parts[name].norm() > 0.1 * weight.norm()


def test_rounding_moves_the_weights_by_the_share_that_is_told(
    opened: Callable[..., Llama],
) -> None:
    model = opened(dtype=torch.bfloat16)
    before = copies(model)
    adapters = Adapters(model.config, STARTS["pissa"])
    told = adapters.take_principal(model.destinations(), 0)
    moved = whole = 0.0
    for m in adapters.modules:
        now, was = model.destinations()[m.name].float(), before[m.name].float()
        moved += float((now + m.scale * m.b_NR @ m.a_RK - was).detach().norm()) ** 2
        whole += float(was.norm()) ** 2
    assert told == pytest.approx((moved / whole) ** 0.5, rel=1e-2)
    assert 1e-4 < told < 2e-3
    exact = opened()
    assert Adapters(exact.config, STARTS["pissa"]).take_principal(exact.destinations(), 0) < 1e-7


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_1"])
def test_the_start_is_the_same_again(opened: Callable[..., Llama], init: str) -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    settings = LoraSettings(r=4, init=init)
    models = [opened() for _ in range(3)]
    one, two, other = (
        started(m, settings, seed) for m, seed in zip(models, (5, 5, 6), strict=True)
    )
    assert torch.equal(one.flat_P, two.flat_P)
    first, second = (model.destinations() for model in models[:2])
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(one.flat_P, other.flat_P) == (init == "pissa")
    # nobody else's random numbers are taken
    assert torch.equal(torch.random.get_rng_state(), state)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**31))
def test_a_difference_is_written_in_twice_the_rank(n: int, k: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    now, start = (
        Factors(*(torch.randn(size, generator=generator) for size in ((rank, k), (n, rank))))
        for _ in range(2)
    )
    found = difference(now, start)
    assert found.a_RK.shape == (2 * rank, k)
    assert found.b_NR.shape == (n, 2 * rank)
    wide = [Factors(f.a_RK.double(), f.b_NR.double()) for f in (now, start)]
    expected = wide[0].b_NR @ wide[0].a_RK - wide[1].b_NR @ wide[1].a_RK
    assert torch.allclose(found.b_NR @ found.a_RK, expected, atol=1e-9)
    # no large numbers that cancel
    assert found.a_RK.norm() == pytest.approx(float(found.b_NR.norm()), abs=1e-6)
    assert found.a_RK.norm() ** 2 == pytest.approx(float(torch.linalg.matrix_norm(expected, "nuc")))


# ---- contradictions ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"init": "pisa"}, "lora.init = 'pisa' is unknown; allowed are kaiming, pissa and"),
        ({"init": "pissa_niter_"}, "lora.init = 'pissa_niter_' is unknown"),
        ({"init": "pissa", "init_from": "x"}, "lora.init = 'pissa' contradicts lora.init_from"),
        ({"init": "pissa", "dropout": 0.1}, "lora.dropout = 0.1 would drop parts of the model"),
        ({"init": "pissa", "r": 129}, "twice the rank, and 129 is more than half of 256"),
        ({"init": "pissa_niter_4", "rank_pattern": {"q_proj": 200}}, "200 is more than half"),
    ],
)
def test_settings_that_contradict_it_are_refused(
    settings: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        LoraSettings(**settings)  # type: ignore[arg-type]


def test_more_triplets_than_a_weight_has_are_refused(opened: Callable[..., Llama]) -> None:
    model = opened()
    with pytest.raises(ValueError, match=r"cannot take 33 .* of model.layers.0.self_attn.k_proj"):
        started(model, LoraSettings(r=33, init="pissa", targets=("q_proj", "k_proj")))
