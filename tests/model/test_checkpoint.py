"""Safetensors folders: read, checked, written; and every way in which one can be broken."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bioinstruct.model.checkpoint import INDEX, SINGLE, open_checkpoint, save_checkpoint
from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.formats.config_json import config_from_hf
from bioinstruct.model.formats.stored import read_safetensors
from bioinstruct.model.formats.written import write_safetensors

TINY = LlamaConfig(
    vocab_size=11,
    hidden_size=6,
    intermediate_size=10,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    norm_eps=1e-5,
    rope_base=1e4,
    rope_scaling=None,
    max_positions=32,
    tied_embeddings=False,
    bos_id=1,
    eos_ids=(2,),
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.1.mlp.up_proj.weight"


def weights(config: LlamaConfig = TINY, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = config.tensor_shapes()
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def places(config: LlamaConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.empty(s, dtype=dtype) for name, s in config.tensor_shapes().items()}


def loaded(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(path)
    destinations = places(checkpoint.config, dtype)
    checkpoint.load_into(destinations)
    return destinations


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint in one file."""
    save_checkpoint(tmp_path / "tiny", TINY, weights())
    return tmp_path / "tiny"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same checkpoint in several files."""
    save_checkpoint(tmp_path / "shards", TINY, weights(), max_shard_bytes=600)
    return tmp_path / "shards"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a single-file checkpoint."""
    tensors = {name: t.clone() for name, t in load_file(folder / SINGLE).items()}
    change(tensors)
    save_file(tensors, folder / SINGLE)


def set_key(path: Path, key: str, value: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


# ---- reading -----------------------------------------------------------------------------------


def test_a_real_model_is_read(data: Path) -> None:
    path = data / "stories260K"
    checkpoint = open_checkpoint(path)
    assert checkpoint.path == path / SINGLE
    assert checkpoint.names() == checkpoint.config.tensor_shapes()
    assert same(loaded(path), load_file(path / SINGLE))
    assert same(loaded(path / SINGLE), load_file(path / SINGLE))


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_conversion_of_dtype(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    original = weights(dtype=stored)
    save_checkpoint(tmp_path / "m", TINY, original)
    expected = {name: tensor.to(wanted) for name, tensor in original.items()}
    assert same(loaded(tmp_path / "m", wanted), expected)


def test_destinations_may_be_parts_of_other_buffers(folder: Path) -> None:
    destinations = places(TINY)
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    # the fused rows with space around them, and a transposed place
    fused = torch.full((20, 8), -7.0)
    for name, part in zip(names, fused[1:17, 1:7].split([8, 4, 4]), strict=True):
        destinations[name] = part
    destinations[UP] = torch.empty(6, 10).T
    open_checkpoint(folder).load_into(destinations)
    original = weights()
    assert torch.equal(fused[1:17, 1:7], torch.cat([original[name] for name in names]))
    assert (fused[0] == -7).all() and (fused[17:] == -7).all() and (fused[:, [0, 7]] == -7).all()
    assert torch.equal(destinations[UP], original[UP])


def test_parameters_that_need_gradients_are_filled(folder: Path) -> None:
    destinations = {n: t.requires_grad_() for n, t in places(TINY).items()}
    open_checkpoint(folder).load_into(destinations)
    assert all(t.grad_fn is None and t.requires_grad for t in destinations.values())


def test_stored_rotary_frequencies_are_passed_over(folder: Path) -> None:
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(1)}
    rewrite(folder, lambda tensors: tensors.update(frequencies))
    assert same(loaded(folder), weights())


def test_a_tied_head_may_be_stored_twice_if_equal(folder: Path) -> None:
    set_key(folder / "config.json", "tie_word_embeddings", True)
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].half()}))
    with pytest.raises(ValueError, match="ties the embeddings, but lm_head.weight differs"):
        loaded(folder)  # half has lost digits
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].double()}))
    tied = loaded(folder)
    assert HEAD not in tied and torch.equal(tied[EMBEDDING], weights()[EMBEDDING])


@pytest.mark.parametrize("head", [torch.zeros(11, 6), torch.zeros(3), torch.zeros(11, 6).int()])
def test_a_tied_head_of_its_own_is_refused(folder: Path, head: Tensor) -> None:
    set_key(folder / "config.json", "tie_word_embeddings", True)
    rewrite(folder, lambda tensors: tensors.update({HEAD: head}))
    with pytest.raises(ValueError, match="set tie_word_embeddings to false if both were trained"):
        loaded(folder)


# ---- a checkpoint that does not fit ------------------------------------------------------------


def test_all_differences_are_listed_before_the_first_copy(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors[UP] = torch.zeros(10, 7)
        tensors[EMBEDDING] = torch.zeros(11, 6, dtype=torch.int8)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(8)
        tensors |= {f"model.layers.{n}.mlp.up_proj.weight": torch.zeros(1) for n in range(2, 15)}

    rewrite(folder, change)
    destinations = {name: torch.full_like(t, 3.0) for name, t in places(TINY).items()}
    with pytest.raises(ValueError) as caught:
        open_checkpoint(folder).load_into(destinations)
    first, *rows = str(caught.value).splitlines()
    assert first == f"{folder / SINGLE}: does not fit the model"
    assert rows[:3] == [
        "  1 missing: model.norm.weight",
        f"  1 of the wrong shape: {UP} is (10, 7), expected (10, 6)",
        f"  1 of a type that is not read: {EMBEDDING} is I8",
    ]
    assert rows[3].startswith("  14 unknown: ") and rows[3].endswith(" and 4 more")
    assert "model.layers.0.self_attn.q_proj.bias" in rows[3]
    assert all((t == 3).all() for t in destinations.values())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.bool])
def test_what_stands_for_something_else_is_refused(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, lambda tensors: tensors.update({UP: tensors[UP].to(dtype)}))
    with pytest.raises(ValueError, match=f"1 of a type that is not read: {UP} is [FIB]"):
        loaded(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[UP][4, 3] = value

    rewrite(folder, change)
    with pytest.raises(ValueError, match=f"{UP} holds NaN or infinite values"):
        loaded(folder)


def test_values_too_large_for_the_destination_are_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors[UP].fill_(-70000.0))
    assert (loaded(folder)[UP] == -70000).all()
    with pytest.raises(ValueError, match=f"{UP} reaches 70000, which torch.float16 cannot hold"):
        loaded(folder, torch.float16)


# ---- broken files ------------------------------------------------------------------------------

JUNK = {
    "nothing": (b"", "the file is empty"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run `git lfs pull`"),
    "html": (b"\n<!DOCTYPE html><html>404</html>", "a web page was saved"),
    "html without type": (b"<HTML><body>login</body>", "a web page was saved"),
    "zip": (b"PK\x03\x04" + bytes(60), "pickled weights under a name that says otherwise"),
    "pickle": (b"\x80\x02}q\x00." + bytes(60), "rename it to pytorch_model.bin"),
    "text": (b"these are no weights at all", "not a whole safetensors file"),
    "zeros": (bytes(64), "not a whole safetensors file"),
    "huge header": (b"\xff" * 64, "not a whole safetensors file"),
    "header only": ((9).to_bytes(8, "little"), "not a whole safetensors file"),
}


@pytest.mark.parametrize("kind", JUNK)
def test_junk_instead_of_weights(folder: Path, kind: str) -> None:
    content, message = JUNK[kind]
    (folder / SINGLE).write_bytes(content)
    with pytest.raises(ValueError, match=f"{SINGLE}: .*{message}") as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


HOSTILE = {
    "overlap": '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    '"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
    "twice": '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    '"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
    "10 GB": '{"a":{"dtype":"F32","shape":[2500000000],"data_offsets":[0,10000000000]}}',
    "negative": '{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}',
    "size": '{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}',
    "hole": '{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_headers_that_lie_are_refused(folder: Path, kind: str) -> None:
    header = HOSTILE[kind].encode()
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    with pytest.raises(ValueError, match="not a whole safetensors file") as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_header_length_of_ten_gigabytes(folder: Path) -> None:
    (folder / SINGLE).write_bytes((10**10).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        open_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_we_write_is_what_the_library_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"b": torch.randn(3, 5).to(dtype), "a": torch.randn(7).to(dtype)}
    written = write_safetensors(tmp_path, tensors.items(), [*tensors, "c" * 99], 10**9)
    assert written == (dict.fromkeys(tensors, SINGLE), 22 * dtype.itemsize)
    read = load_file(tmp_path / SINGLE)
    assert same(read, tensors)
    with safe_open(tmp_path / SINGLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_looks_like_a_pickle(tmp_path: Path, length: int) -> None:
    path = tmp_path / SINGLE
    for padding in range(length):
        save_file({"x": torch.ones(2)}, path, metadata={"padding": "." * padding})
        if path.read_bytes()[:8] == length.to_bytes(8, "little"):
            break
    assert path.read_bytes()[0] == 0x80
    assert torch.equal(read_safetensors(path)["x"].read(), torch.ones(2))


@pytest.mark.parametrize("keep", [0.001, 0.3, 0.5, 0.99])
def test_a_file_cut_short(folder: Path, keep: float) -> None:
    whole = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ValueError, match="it is cut short or damaged, download or copy it again"):
        open_checkpoint(folder)


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_no_damaged_byte_ends_in_a_stack_trace(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged") / "m"
    save_checkpoint(folder, TINY, weights())
    content = bytearray((folder / SINGLE).read_bytes())
    content[at % len(content)] = byte
    (folder / SINGLE).write_bytes(content)
    try:
        result = loaded(folder)
    except ValueError as error:
        assert SINGLE in str(error)
    else:
        assert all(t.isfinite().all() for t in result.values())
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no weights; expected model.safetensors, .* or a .gguf file"),
        (["notes.txt"], "holds no weights"),
        (["consolidated.01.pth"], "consolidated.00.pth is missing beside consolidated.01.pth"),
        (["pytorch_model-00001-of-00002.bin"], "00001-of-00002.bin without an index"),
        (["adapter_model.safetensors"], "holds an adapter, not a model"),
        (["model-00001-of-00002.safetensors"], "model-00001-of-00002.safetensors without an index"),
        ([SINGLE, INDEX], f"holds several models \\({SINGLE}, {INDEX}\\); give the path of one"),
        (["a.gguf", "b.gguf"], r"holds several models \(a.gguf, b.gguf\)"),
        ([SINGLE, "a.gguf"], "holds several models"),
    ],
)
def test_folders_without_one_model(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent", None, "does not exist; give a model folder"),
        ("absent.safetensors", None, "does not exist"),
        ("model.pth", b"\x80\x02}.", "pickled weights"),
        ("weights.dat", b"??", "is no model folder and no file of weights"),
        ("weights.dat", b"", "the file is empty"),
    ],
)
def test_other_paths(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: .*{message}|{name}: {message}"):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json: is missing; copy the model's own file there"),
        (b"", "config.json: is not valid JSON"),
        (b'{"model_type": "llama",', "config.json: is not valid JSON .*line 1"),
        (b"\xff\xfe\x00", "config.json: is not valid JSON"),
        (b"[" * 100_000, "config.json: is not valid JSON"),
        (b"[1, 2]", r"config.json: holds \[1, 2\]; it must be a JSON object"),
        (b'{"model_type": "gpt2"}', "config.json: model_type is 'gpt2'"),
    ],
)
def test_broken_configurations(folder: Path, content: bytes | None, message: str) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    for path in (folder, folder / SINGLE):
        with pytest.raises(ValueError, match=message):
            open_checkpoint(path)


# ---- shards ------------------------------------------------------------------------------------


def shard_of(folder: Path, tensor: str) -> str:
    return str(json.loads((folder / INDEX).read_text())["weight_map"][tensor])


def test_one_file_and_shards_hold_the_same(data: Path, tmp_path: Path) -> None:
    original = loaded(data / "stories260K")
    config = open_checkpoint(data / "stories260K").config
    files = save_checkpoint(tmp_path / "s", config, original, max_shard_bytes=100_000)
    shards = [f for f in files if f.suffix == ".safetensors"]
    assert len(shards) > 5 and sorted(files) == sorted((tmp_path / "s").iterdir())
    # a header beside the numbers
    assert all(f.stat().st_size < 140_000 for f in shards)
    again = open_checkpoint(tmp_path / "s")
    assert again.config == config and again.path == tmp_path / "s" / INDEX
    assert same(loaded(tmp_path / "s"), original)
    assert same(loaded(tmp_path / "s" / INDEX), original)


@settings(max_examples=25, deadline=None)
@given(max_shard_bytes=st.integers(0, 4000))
def test_any_shard_size_round_trips(
    tmp_path_factory: pytest.TempPathFactory, max_shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("any") / "m"
    files = save_checkpoint(folder, TINY, weights(), max_shard_bytes=max_shard_bytes)
    for file in files:
        if file.suffix == ".safetensors":
            sizes = [t.nbytes for t in load_file(file).values()]
            assert len(sizes) == 1 or sum(sizes) <= max_shard_bytes
    assert same(loaded(folder), weights())
    shutil.rmtree(folder)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    gone = shard_of(sharded, UP)
    (sharded / gone).unlink()
    with pytest.raises(ValueError, match=f"{INDEX}: names {gone}, which is not there"):
        open_checkpoint(sharded)


def test_a_shard_cut_short_is_named(sharded: Path) -> None:
    path = sharded / shard_of(sharded, UP)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{path.name}: not a whole safetensors file"):
        open_checkpoint(sharded)


def test_a_tensor_absent_from_its_shard_is_named(sharded: Path) -> None:
    path = sharded / shard_of(sharded, UP)
    save_file({n: t.clone() for n, t in load_file(path).items() if n != UP}, path)
    with pytest.raises(ValueError, match=f"{UP} should be in {path.name}, but is not"):
        open_checkpoint(sharded)


def test_a_tensor_in_two_shards_is_named(sharded: Path) -> None:
    path = sharded / shard_of(sharded, UP)
    tensors = {n: t.clone() for n, t in load_file(path).items()}
    save_file(tensors | {EMBEDDING: torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=f"{EMBEDDING} is in .* and in another shard"):
        open_checkpoint(sharded)


def test_a_tensor_that_the_index_omits_is_not_lost(sharded: Path) -> None:
    path = sharded / shard_of(sharded, UP)
    tensors = {n: t.clone() for n, t in load_file(path).items()}
    save_file(tensors | {"model.extra.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="1 unknown: model.extra.weight"):
        loaded(sharded)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "weight_map is None; it must name each tensor's file"),
        ({}, "weight_map is {}"),
        ([], r"weight_map is \[\]"),
        ({UP: 3}, "weight_map holds 3; it must be a file beside it"),
        ({UP: ""}, "weight_map holds ''; it must be a file beside it"),
        ({UP: "../other/model.safetensors"}, "weight_map holds '../other/model.safetensors'"),
        ({UP: "/etc/passwd"}, "weight_map holds '/etc/passwd'"),
    ],
)
def test_broken_indexes(sharded: Path, weight_map: Any, message: str) -> None:
    set_key(sharded / INDEX, "weight_map", weight_map)
    with pytest.raises(ValueError, match=f"{INDEX}: {message}"):
        open_checkpoint(sharded)


# ---- writing -----------------------------------------------------------------------------------


def test_what_other_programs_look_for_is_written(tmp_path: Path) -> None:
    files = save_checkpoint(tmp_path / "m", TINY, weights(), dtype=torch.bfloat16)
    assert [file.name for file in files] == [SINGLE, "config.json"]
    with safe_open(files[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    written = json.loads(files[1].read_text())
    assert written["torch_dtype"] == "bfloat16"
    assert config_from_hf(written, "config.json") == TINY
    assert all(t.dtype is torch.bfloat16 for t in load_file(files[0]).values())


def test_the_index_counts_bytes(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"] == {"total_size": 4 * TINY.parameter_count()}
    assert index["weight_map"].keys() == TINY.tensor_shapes().keys()


def test_views_strides_and_a_reused_buffer(tmp_path: Path) -> None:
    original = weights()

    def produced() -> Iterator[tuple[str, Tensor]]:
        buffer = torch.empty(1000)
        for name, tensor in original.items():
            # column-major, in memory that the next tensor overwrites
            place = (
                buffer[: tensor.numel()]
                .view(tensor.shape[::-1])
                .permute(*reversed(range(tensor.dim())))
            )
            yield name, place.copy_(tensor)

    save_checkpoint(tmp_path / "m", TINY, produced())
    assert same(loaded(tmp_path / "m"), original)


def test_tensors_that_share_storage_are_each_written(tmp_path: Path) -> None:
    shared = torch.randn(11, 6)
    tensors = weights() | {EMBEDDING: shared, HEAD: shared}
    save_checkpoint(tmp_path / "m", TINY, tensors)
    assert same(loaded(tmp_path / "m"), tensors)


def test_nothing_is_overwritten(folder: Path) -> None:
    before = (folder / SINGLE).read_bytes()
    with pytest.raises(ValueError, match="exists and is not empty; give a folder that is not the"):
        save_checkpoint(folder, TINY, weights())
    with pytest.raises(ValueError, match="config.json: exists and is not empty"):
        save_checkpoint(folder / "config.json", TINY, weights())
    assert (folder / SINGLE).read_bytes() == before


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "a" / "b"):
        save_checkpoint(folder, TINY, weights())
        assert same(loaded(folder), weights())


def _without_up() -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights().items() if name != UP}


@pytest.mark.parametrize(
    ("tensors", "dtype", "message"),
    [
        (_without_up(), None, f"{UP}: the model needs it, but it was not given"),
        ({}, None, f"{EMBEDDING}, .* and 11 more: the model needs it"),
        (weights() | {"x": torch.ones(1)}, None, "x: is no tensor of this model, or was given tw"),
        ([*weights().items()] * 2, None, f"{EMBEDDING}: is no tensor of this model, or was given"),
        (weights() | {UP: torch.ones(6, 10)}, None, rf"{UP}: is \(6, 10\), the model needs \(10, "),
        (weights() | {UP: torch.full((10, 6), torch.nan)}, None, f"{UP} holds NaN or infinite"),
        (weights() | {UP: torch.full((10, 6), 1e5)}, torch.float16, f"{UP} reaches 100000, which"),
    ],
)
def test_a_wrong_set_leaves_nothing_behind(
    tmp_path: Path, tensors: Any, dtype: torch.dtype | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path / "m", TINY, tensors, dtype=dtype, max_shard_bytes=600)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_producer_leaves_nothing_behind(tmp_path: Path) -> None:
    def produced() -> Iterator[tuple[str, Tensor]]:
        yield EMBEDDING, torch.ones(11, 6)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "m", TINY, produced(), max_shard_bytes=0)
    assert list(tmp_path.iterdir()) == []
