"""The model against an independent implementation's outputs, and the laws of packing.

stories260K_golden.npz holds 155 token ids, logits and the mean loss of another program.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bioinstruct.kernels import Documents
from bioinstruct.model import Llm, load
from bioinstruct.model.adapters import Adapters, LoraSettings
from bioinstruct.model.checkpoint import save_checkpoint
from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.generate import generate
from bioinstruct.model.llama import Llama, pack_documents
from bioinstruct.model.merging import merged_tensors


@pytest.fixture(scope="module")
def golden(data: Path) -> dict[str, np.ndarray]:
    return dict(np.load(data / "stories260K" / "stories260K_golden.npz"))


def check_golden(llm: Llm, golden: dict[str, np.ndarray]) -> None:
    ids = golden["ids"].tolist()
    (logits,) = llm.logits([ids])
    assert np.abs(logits[:8].numpy() - golden["logits_first8"]).max() < 5e-5
    assert np.abs(logits[-1].numpy() - golden["logits_last"]).max() < 5e-5
    nll = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))
    assert abs(float(nll) - float(golden["nll"])) < 1e-5
    (greedy,) = generate(llm.model, [ids[:1]], max_new_tokens=154, end_ids=[])
    assert greedy.ids == ids[1:]


def test_stories_equal_the_golden_outputs(stories: Llm, golden: dict[str, np.ndarray]) -> None:
    check_golden(stories, golden)


def test_stories_from_our_own_shards(
    stories: Llm, golden: dict[str, np.ndarray], data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    tensors = merged_tensors(stories.model, None)
    files = save_checkpoint(out, stories.config, tensors, dtype=None, max_shard_bytes=250_000)
    assert len([f for f in files if f.suffix == ".safetensors"]) > 2
    tokenizer = data / "tokenizers" / "stories260K_tok512.model"
    check_golden(load(out, dtype="float32", device="cpu", tokenizer=tokenizer), golden)


CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    norm_eps=1e-5,
    rope_base=1e4,
    rope_scaling=None,
    max_positions=64,
    tied_embeddings=False,
    bos_id=1,
    eos_ids=(2,),
)


def small_model(backend: str = "sdpa", dtype: torch.dtype = torch.float32) -> Llama:
    model = Llama(CONFIG, dtype=dtype)
    model.randomise(0, std=0.2)
    model.attention_backend = backend
    return model


def small_adapters(seed: int = 0, **changes: object) -> Adapters:
    adapters = Adapters(CONFIG, LoraSettings(r=4, alpha=8.0, **changes))  # type: ignore[arg-type]
    adapters.initialise(seed)
    with torch.no_grad():
        adapters.flat_P.add_(0.05 * torch.randn(adapters.flat_P.shape))
    return adapters


def plain_llama(model: Llama, ids: list[int]) -> Tensor:
    """One document through textbook code in float64: no packing, no fusion, no shared buffers."""
    w = {name: tensor.double() for name, tensor in model.destinations().items()}
    c, L = model.config, len(ids)
    half = c.head_dim // 2
    angles = torch.outer(
        torch.arange(L).double(), c.rope_base ** (-torch.arange(half).double() / half)
    )
    turn = torch.polar(torch.ones_like(angles), angles)

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * gain

    def heads(x: Tensor, count: int, rotate: bool) -> Tensor:
        x = x.view(L, count, c.head_dim).transpose(0, 1)
        if rotate:
            z = torch.complex(x[..., :half], x[..., half:]) * turn
            x = torch.cat((z.real, z.imag), -1)
        return x.repeat_interleave(c.num_heads // count, 0)

    x = w["model.embed_tokens.weight"][ids]
    for i in range(c.num_layers):
        at = f"model.layers.{i}."
        h = norm(x, w[at + "input_layernorm.weight"])
        q, k, v = (
            heads(h @ w[f"{at}self_attn.{n}_proj.weight"].T, count, n != "v")
            for n, count in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads))
        )
        scores = q @ k.transpose(1, 2) / c.head_dim**0.5 + torch.full((L, L), -torch.inf).triu(1)
        o = (scores.softmax(-1) @ v).transpose(0, 1).reshape(L, -1)
        x = x + o @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, w[at + "post_attention_layernorm.weight"])
        gate = h @ w[at + "mlp.gate_proj.weight"].T
        h = gate * gate.sigmoid() * (h @ w[at + "mlp.up_proj.weight"].T)
        x = x + h @ w[at + "mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
def test_model_equals_textbook_code(backend: str) -> None:
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    model = small_model(backend, torch.float64)
    ours = model.logits(pack_documents([ids]))
    torch.testing.assert_close(ours, plain_llama(model, ids), atol=1e-9, rtol=1e-9)


documents_of_ids = st.lists(
    st.lists(st.integers(0, CONFIG.vocab_size - 1), min_size=1, max_size=20), min_size=1, max_size=5
)


@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
@settings(max_examples=20, deadline=None)
@given(documents=documents_of_ids)
def test_a_pack_equals_its_documents_alone(backend: str, documents: list[list[int]]) -> None:
    model, adapters = small_model(backend), small_adapters()
    packed = model.logits(pack_documents(documents), adapters)
    alone = torch.cat([model.logits(pack_documents([d]), adapters) for d in documents])
    assert (packed - alone).abs().max() <= 1e-5 * alone.abs().max()


@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
@settings(max_examples=20, deadline=None)
@given(documents=documents_of_ids, data=st.data())
def test_changing_one_document_leaves_the_others_bit_identical(
    backend: str, documents: list[list[int]], data: st.DataObject
) -> None:
    model, adapters = small_model(backend), small_adapters()
    i = data.draw(st.integers(0, len(documents) - 1))
    other = [list(d) for d in documents]
    other[i] = [(token + 1) % CONFIG.vocab_size for token in other[i]]
    before, after = (model.logits(pack_documents(d), adapters) for d in (documents, other))
    bounds = Documents.of_lengths([len(d) for d in documents]).bounds
    for j, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        assert torch.equal(before[start:end], after[start:end]) == (j != i)


def test_merged_weights_give_the_adapters_logits() -> None:
    model, adapters = small_model(dtype=torch.float64), small_adapters()
    pack = pack_documents([[5, 6, 7, 8], [9, 10]])
    with_adapters = model.logits(pack, adapters)
    merged = Llama(CONFIG, dtype=torch.float64)
    places = merged.destinations()
    for name, tensor in merged_tensors(model, adapters):
        places[name].copy_(tensor)
    torch.testing.assert_close(merged.logits(pack), with_adapters, atol=1e-10, rtol=1e-10)
    assert (with_adapters - model.logits(pack)).abs().max() > 1e-3


def test_rope_scaling_is_applied(data: Path) -> None:
    from dataclasses import replace

    from bioinstruct.model.rope_scaling import LinearRopeScaling

    scaled = Llama(replace(CONFIG, rope_scaling=LinearRopeScaling(factor=4.0)))
    ratio = small_model().inverse_frequency_E / scaled.inverse_frequency_E
    torch.testing.assert_close(ratio, torch.full_like(ratio, 4.0))


@pytest.mark.parametrize(
    ("documents", "sentence"), [([[]], "document 0 has no tokens"), ([[512]], "outside 0 to 511")]
)
def test_logits_refuse_what_is_no_document(
    stories: Llm, documents: list[list[int]], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        stories.logits(documents)


def test_logits_of_nothing(stories: Llm) -> None:
    assert stories.logits([]) == []


@pytest.mark.slow
def test_smollm2_nll_on_pubmedqa(smollm2: Path) -> None:
    """5.4 instead of 2.95 means that q and k are still permuted as GGUF stores them."""
    from bioinstruct.synth.sources import read_pubmedqa
    from bioinstruct.train.demo import FOLDER

    llm = load(smollm2, dtype="float32", device="cpu")
    questions = read_pubmedqa(FOLDER / "pubmedqa-ori_pqal.json.gz")[:10]
    documents = [llm.tokenizer.encode("\n".join(q.contexts)) for q in questions]
    total, count = 0.0, 0
    for ids, logits in zip(documents, llm.logits(documents), strict=True):
        targets = torch.tensor(ids[1:])
        total += float(torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum"))
        count += len(targets)
    assert count == 3163
    assert abs(total / count - 2.95) < 0.02
