"""The byte model: against the allocations of real steps, a formula by hand, and its own laws."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bioinstruct.benches.workload import SHAPES, make_batches, random_documents
from bioinstruct.model.adapters import Adapters
from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.llama import Llama
from bioinstruct.model.lora.settings import LoraSettings
from bioinstruct.train.plan.memory import (
    Pack,
    Setup,
    adapter_count,
    counted_pass,
    estimate,
    fewest_recomputed,
    fits,
    largest_pack,
    least,
    most,
    pass_bytes,
)
from bioinstruct.train.plan.tally import Tally
from bioinstruct.train.step import Optimizer, train_step
from bioinstruct.train.weights.full import WholeWeights

SMALL = dataclasses.replace(
    SHAPES["tiny"],
    vocab_size=3000,
    hidden_size=192,
    intermediate_size=512,
    num_layers=6,
    num_heads=6,
    num_kv_heads=3,
    head_dim=32,
)
UNTIED = dataclasses.replace(SMALL, tied_embeddings=False, num_kv_heads=6, num_layers=3)
QWEN = dataclasses.replace(SMALL, family="qwen3")
ALL = LoraSettings(r=8)


def test_the_tally_follows_storages_and_not_views() -> None:
    before = torch.zeros(100)
    with Tally(before) as tally:
        a = torch.empty(10)
        b = a[2:].view(2, 4)
        c = before[1:]
        assert tally.live == 40
        d = a + 1
        del a
        assert tally.live == 80
        del b, c
        assert tally.live == 40
        del d
    assert (tally.live, tally.peak) == (0, 80)


def allocated_peak(work: Callable[[], object]) -> int:
    """The most that the CPU allocator had given out during work, beyond what it had before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    ("config", "lora", "lengths", "recomputed"),
    [
        (SMALL, ALL, (400, 400), 0),
        (SMALL, ALL, (256, 256), 4),
        (SMALL, LoraSettings(r=8, targets=("q_proj", "v_proj")), (600,), 6),
        (SMALL, LoraSettings(r=4, dropout=0.1), (256,), 0),
        (UNTIED, LoraSettings(r=8, layers=(1,)), (256, 256), 1),
        (QWEN, ALL, (256, 256), 0),
        (SMALL, None, (256, 256), 0),
        (UNTIED, None, (512,), 2),
    ],
)
def test_a_real_step_allocates_what_is_predicted(
    config: LlamaConfig, lora: LoraSettings | None, lengths: tuple[int, ...], recomputed: int
) -> None:
    torch.use_deterministic_algorithms(False)  # or new tensors are filled, which takes others
    model = Llama(config)
    model.attention_backend = "blocked"
    model.randomise(0)
    model.recomputed_layers = recomputed
    adapters = None if lora is None else Adapters(config, lora)
    if adapters is not None:
        adapters.initialise(0)
    optimizer = Optimizer(WholeWeights(model) if adapters is None else adapters)
    tokens = random_documents(config, lengths)
    supervised = int(tokens.supervised.sum())

    def step() -> None:
        batches = make_batches(tokens, sum(lengths), torch.device("cpu"))
        train_step(model, optimizer, batches, supervised, 1e-3)

    step()  # masks and the like that are made once
    real = allocated_peak(step)
    setup = Setup(config=config, lora=lora, dtype=torch.float32, device="cpu", backend="blocked")
    plan = estimate(setup, Pack(sum(lengths), supervised, max(lengths)), recomputed)
    predicted = max(plan.saved + plan.passing, plan.update)
    assert predicted == pytest.approx(real, rel=0.05)
    update = allocated_peak(lambda: optimizer.step(1e-3))
    assert plan.update == pytest.approx(update, rel=0.05)
    held = 4 * config.parameter_count()
    trained = held if lora is None else 4 * adapter_count(config, lora)
    assert plan.weights == (0 if lora is None else held)
    assert plan.trained == 4 * trained


def test_saved_bytes_of_a_layer_by_hand() -> None:
    T, r, b = 640, 8, 2
    D, F, H, G, E = 192, 512, 6, 3, 32
    setup = Setup(config=SMALL, lora=ALL, dtype=torch.bfloat16)
    deeper = dataclasses.replace(setup, config=dataclasses.replace(SMALL, num_layers=7))
    pack = Pack(T, 64, 128)
    layer = pass_bytes(deeper, pack).saved - pass_bytes(setup, pack).saved
    N = (H + 2 * G) * E
    # inputs of both norms, q k v, attention's output, gate and up; t of every product, 1 / root
    # mean square of both norms, log-sum-exp of attention
    hand = T * (b * (2 * D + H * E + N + 2 * F + 7 * r) + 2 * 4 + 4 * H)
    # the masters are narrowed once a step, for all packs and whatever is computed again
    copies = b * (adapter_count(deeper.config, ALL) - adapter_count(SMALL, ALL))
    assert layer == hand + copies
    # a layer that is computed again keeps its input alone
    kept = pass_bytes(deeper, pack, 3).saved - pass_bytes(setup, pack, 3).saved
    assert kept == hand + copies
    again = pass_bytes(setup, pack, 3).saved - pass_bytes(setup, pack, 4).saved
    assert again == hand - T * b * D


def test_bytes_are_linear_in_layers_and_convex_in_tokens() -> None:
    def peak(layers: int, tokens: int) -> int:
        config = dataclasses.replace(UNTIED, num_layers=layers)
        setup = Setup(config=config, lora=ALL, dtype=torch.bfloat16)
        return counted_pass(setup, Pack(tokens, 4096, 128)).peak

    assert peak(4, 8192) - peak(3, 8192) == peak(3, 8192) - peak(2, 8192)
    steps = [peak(3, (i + 1) * 4096) - peak(3, i * 4096) for i in range(1, 6)]
    assert steps == sorted(steps)  # convex, which largest_pack relies on


@pytest.mark.parametrize("lora", [ALL, LoraSettings(r=4, targets=("o_proj",)), None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_layers_tell_of_all(lora: LoraSettings | None, dtype: torch.dtype) -> None:
    for layers, recomputed, tokens in ((7, 0, 300), (9, 4, 300), (7, 6, 2000), (5, 5, 2000)):
        config = dataclasses.replace(UNTIED, num_layers=layers)
        setup = Setup(config=config, lora=lora, dtype=dtype)
        pack = Pack(tokens, tokens // 3, 200)
        assert pass_bytes(setup, pack, recomputed) == counted_pass(setup, pack, recomputed)


def test_shards_hold_their_part_and_gather_a_block_at_a_time() -> None:
    pack = Pack(256, 128, 64)
    weights = UNTIED.parameter_count()
    lora = Setup(config=UNTIED, lora=ALL, dtype=torch.bfloat16, shards=4)
    full = dataclasses.replace(lora, lora=None)
    assert estimate(lora, pack).weights == 2 * weights // 4
    assert estimate(full, pack).trained == 16 * math.ceil(weights / 4)
    assert estimate(full, pack).weights == 0
    assert 0 < estimate(lora, pack).gathered < estimate(full, pack).gathered
    whole = dataclasses.replace(full, shards=1)
    assert estimate(whole, pack).weights == 2 * weights
    assert estimate(whole, pack).trained == 16 * weights
    assert estimate(whole, pack).gathered == 0


@given(
    lines=st.lists(st.tuples(st.floats(0, 9), st.floats(-99, 99)), min_size=1, max_size=4),
    layers=st.integers(1, 80),
)
def test_the_fewest_layers_are_recomputed(lines: list[tuple[float, float]], layers: int) -> None:
    def excess(k: int) -> float:
        return max(start - slope * k for slope, start in lines)

    fitting = [k for k in range(layers + 1) if excess(k) <= 0]
    assert least(excess, layers) == (fitting[0] if fitting else None)


@given(
    lines=st.lists(st.tuples(st.floats(1e-3, 1), st.floats(-9999, 99)), min_size=1, max_size=4),
    longest=st.integers(1, 5000),
)
def test_the_largest_pack_fits_and_a_larger_one_does_not(
    lines: list[tuple[float, float]], longest: int
) -> None:
    def excess(tokens: int) -> float:
        return max(start + slope * tokens for slope, start in lines)

    found = most(excess, longest)
    if found:
        assert found % 256 == 0
        assert found >= longest
        assert excess(found) <= 0
        assert excess(found + 256) > 0 or found >= 1 << 20
    else:
        assert excess(256 * math.ceil(longest / 256)) > 0


def test_what_is_chosen_fits(cuda_room: int = 850 << 20) -> None:
    setup = Setup(config=SMALL, lora=ALL, dtype=torch.bfloat16)
    pack = Pack(6000, 3000, 300)
    layers = fewest_recomputed(setup, pack, cuda_room)
    assert layers is not None
    assert 0 < layers < 6
    assert fits(estimate(setup, pack, layers), cuda_room)
    assert not fits(estimate(setup, pack, layers - 1), cuda_room)
    tokens = largest_pack(setup, pack, cuda_room)
    assert 300 <= tokens < 6000
    assert fits(estimate(setup, Pack(tokens, tokens // 2, 300)), cuda_room)
