"""GGUF files against the safetensors they were made from, and broken ones."""

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file
from torch import Tensor

from bioinstruct.model.checkpoint import open_checkpoint
from bioinstruct.model.config import Llama3RopeScaling, LlamaConfig
from bioinstruct.model.formats.rotary_rows import unpermute_rows

gguf = pytest.importorskip("gguf", reason='needs the gguf package: pip install "bioinstruct[demo]"')
F32, F16, BF16 = (getattr(gguf.GGMLQuantizationType, kind) for kind in ("F32", "F16", "BF16"))
Q8_0, Q4_1 = (getattr(gguf.GGMLQuantizationType, kind) for kind in ("Q8_0", "Q4_1"))

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permute_rows(w_NHK: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Interleave each head's rows the way llama.cpp's converter does."""
    rows, width = w_NHK.shape
    halves = w_NHK.reshape(num_heads, 2, rows // num_heads // 2, width)
    return halves.swapaxes(1, 2).reshape(rows, width)


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in GGUF_NAMES:
        return GGUF_NAMES[stem] + ".weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.weight"


def gguf_kind(name: str, width: int) -> Any:
    """Every kind of number in one file; blocks are 32 wide, so odd widths stay F16."""
    if "norm" in name:
        return F32
    if width % 32:
        return F16
    return {"q_proj": Q8_0, "k_proj": BF16, "up_proj": Q4_1}.get(name.split(".")[-2], Q8_0)


def write_gguf(
    path: Path, config: LlamaConfig, tensors: dict[str, Tensor], *, kind: Any = None, **extra: Any
) -> None:
    """Write a GGUF file as llama.cpp's converter would; extra holds further tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_bos_token_id(config.bos_id)
    writer.add_eos_token_id(config.eos_ids[0])
    for name, tensor in tensors.items():
        numbers = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_heads if "q_proj" in name else config.num_kv_heads
            numbers = permute_rows(numbers, heads)
        kind_here = gguf_kind(name, tensor.shape[-1]) if kind is None else kind
        stored = gguf.quants.quantize(np.ascontiguousarray(numbers), kind_here)
        writer.add_tensor(gguf_name(name), stored, raw_dtype=kind_here)
    for name, numbers in extra.items():
        writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def original(data: Path) -> tuple[LlamaConfig, dict[str, Tensor]]:
    folder = data / "stories260K"
    return open_checkpoint(folder).config, load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def exact(
    original: tuple[LlamaConfig, dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A GGUF file of float32 numbers."""
    path = tmp_path_factory.mktemp("gguf") / "stories.gguf"
    write_gguf(path, *original, kind=F32)
    return path


def loaded(path: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(path)
    destinations = {n: torch.empty(s) for n, s in checkpoint.config.tensor_shapes().items()}
    checkpoint.load_into(destinations)
    return destinations


# ---- the same model ----------------------------------------------------------------------------


@given(
    heads=st.integers(1, 5),
    half=st.integers(1, 6),
    width=st.integers(1, 4),
    values=st.data(),
)
def test_unpermute_undoes_the_converter(
    heads: int, half: int, width: int, values: st.DataObject
) -> None:
    shape = (heads * half * 2, width)
    w_NHK = values.draw(hnp.arrays(np.float32, shape, elements=st.integers(-99, 99)))
    permuted = torch.from_numpy(permute_rows(w_NHK, heads))
    assert torch.equal(unpermute_rows(permuted, heads), torch.from_numpy(w_NHK))
    # with one pair a head there is nothing to interleave
    assert half > 1 or np.array_equal(permuted.numpy(), w_NHK)


def test_rows_of_one_head() -> None:
    interleaved = torch.tensor([[0.0], [2.0], [1.0], [3.0]])
    assert unpermute_rows(interleaved, 1).flatten().tolist() == [0, 1, 2, 3]


def test_float32_is_bitwise_the_same(
    original: tuple[LlamaConfig, dict[str, Tensor]], exact: Path
) -> None:
    config, tensors = original
    checkpoint = open_checkpoint(exact.parent)
    assert (checkpoint.path, checkpoint.config) == (exact, config)
    assert checkpoint.names() == config.tensor_shapes()
    found = loaded(exact)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_quantized_is_the_same_within_a_step(
    original: tuple[LlamaConfig, dict[str, Tensor]], tmp_path: Path
) -> None:
    config, tensors = original
    write_gguf(tmp_path / "q.gguf", config, tensors)
    # half a unit of the block and the rounding of its scale to float16, or the number's rounding;
    # Q4_1 spans from the smallest to the largest number, at most twice the largest magnitude
    steps = {F32: 0.0, F16: 2**-11, BF16: 2**-8, Q8_0: 0.5 / 127 + 2**-11, Q4_1: 1 / 15 + 2**-9}
    for name, found in loaded(tmp_path / "q.gguf").items():
        kind = gguf_kind(name, found.shape[-1])
        error = (found - tensors[name]).abs().max() / tensors[name].abs().max()
        assert error <= steps[kind], name
        assert error > 0 or kind == F32


def test_an_output_of_its_own_is_not_tied(
    original: tuple[LlamaConfig, dict[str, Tensor]], tmp_path: Path
) -> None:
    config, tensors = original
    head = torch.randn(512, 64)
    write_gguf(tmp_path / "m.gguf", config, tensors | {"lm_head.weight": head}, kind=F32)
    assert not open_checkpoint(tmp_path).config.tied_embeddings
    assert torch.equal(loaded(tmp_path)["lm_head.weight"], head)


def test_rope_divisors_become_the_scaling_that_made_them(
    original: tuple[LlamaConfig, dict[str, Tensor]], tmp_path: Path
) -> None:
    config, tensors = original
    scaling = Llama3RopeScaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )
    divisors = np.array(scaling.divisors(config.head_dim, config.rope_base), np.float32)
    write_gguf(tmp_path / "m.gguf", config, tensors, **{"rope_freqs.weight": divisors})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.rope_scaling == scaling
    assert "rope_freqs.weight" not in checkpoint.names()


def test_the_demos_model(smollm2: Path) -> None:
    checkpoint = open_checkpoint(smollm2)
    assert checkpoint.config.parameter_count() == 134_515_008
    assert checkpoint.names() == checkpoint.config.tensor_shapes()
    first = checkpoint.tensors["model.layers.0.self_attn.k_proj.weight"].read()
    raw = next(t for t in gguf.GGUFReader(smollm2).tensors if t.name == "blk.0.attn_k.weight")
    permuted = permute_rows(first.numpy(), 3)
    assert np.array_equal(permuted, gguf.quants.dequantize(raw.data, raw.tensor_type))


# ---- files that are refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
        (b"<!doctype html>", "a web page was saved"),
        (b"PK\x03\x04", "pickled weights"),
        (b"GGML" + bytes(60), "GGUF"),
        (b"GGUF", "GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "the key general.architecture is missing"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "its table of tensors is cut short"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 2**60), "GGUF"),
    ],
)
def test_junk(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "m.gguf" in str(caught.value)


def test_a_file_cut_anywhere(exact: Path, tmp_path: Path) -> None:
    whole = exact.read_bytes()
    for keep in [30, 500, 5000, 10_000, 12_000, 14_000, 100_000, len(whole) - 65]:
        (tmp_path / "m.gguf").write_bytes(whole[:keep])
        with pytest.raises(ValueError, match="cut short|incomplete|damaged"):
            open_checkpoint(tmp_path)


@settings(max_examples=60, deadline=None)
@given(at=st.integers(24, 15_000), byte=st.integers(0, 255))
def test_no_damaged_byte_ends_in_a_stack_trace(
    exact: Path, tmp_path_factory: pytest.TempPathFactory, at: int, byte: int
) -> None:
    content = bytearray(exact.read_bytes())
    content[at] = byte
    path = tmp_path_factory.mktemp("damaged") / "m.gguf"
    path.write_bytes(content)
    try:
        open_checkpoint(path)
    except ValueError as error:
        assert "m.gguf" in str(error)


def table_line(name: str, dims: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    text = struct.pack("<Q", len(name)) + name.encode()
    return text + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([table_line("a", (), 0)], "'a' stands there twice, or has 0 dimensions"),
        ([table_line("a", (1,) * 5, 0)], "'a' stands there twice, or has 5 dimensions"),
        ([table_line("a", (1,), 0)] * 2, "'a' stands there twice, or has 1 dimensions"),
        ([table_line("a", (2**40,), 0)], r"the tensor a \(1099511627776,\) of type F32 ends at"),
        ([table_line("a", (4,), 0, 2**50)], "the tensor a .* the file is cut short or damaged"),
        ([table_line("a", (33,), 8)], r"the tensor a \(33,\) of type Q8_0"),
        ([table_line("rope_freqs.weight", (2,), 26)], "rope_freqs.weight is I32"),
        ([table_line("rope_freqs.weight", (2,), 999)], "rope_freqs.weight is type 999"),
    ],
)
def test_bad_tensor_tables(tmp_path: Path, lines: list[bytes], message: str) -> None:
    header = b"GGUF" + struct.pack("<IQQ", 3, len(lines), 0)
    (tmp_path / "m.gguf").write_bytes(header + b"".join(lines) + bytes(200))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


def test_unknown_and_unreadable_tensors_are_listed(
    original: tuple[LlamaConfig, dict[str, Tensor]], tmp_path: Path
) -> None:
    config, tensors = original
    kept = {name: t for name, t in tensors.items() if name != "model.norm.weight"}
    extra = {
        "output_norm.weight": np.ones(64, np.int32),
        "blk.0.attn_sinks.weight": np.ones(64, "f4"),
    }
    write_gguf(tmp_path / "m.gguf", config, kept, **extra)
    with pytest.raises(ValueError) as caught:
        loaded(tmp_path)
    assert str(caught.value).splitlines()[1:] == [
        "  1 of a type that is not read: model.norm.weight is I32",
        "  1 unknown: blk.0.attn_sinks.weight",
    ]


def test_values_that_are_not_finite_are_refused(
    original: tuple[LlamaConfig, dict[str, Tensor]], tmp_path: Path
) -> None:
    config, tensors = original
    broken = tensors | {"model.norm.weight": torch.full((64,), torch.inf)}
    write_gguf(tmp_path / "m.gguf", config, broken)
    with pytest.raises(ValueError, match="m.gguf: model.norm.weight holds NaN or infinite"):
        loaded(tmp_path)


def test_without_the_package(exact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r'pip install "bioinstruct\[demo\]"'):
        open_checkpoint(exact)
