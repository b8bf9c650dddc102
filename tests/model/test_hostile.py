"""Files that somebody else made: whatever stands in them is read or refused in one sentence.

Every JSON file of a model, the table of a safetensors file and a GGUF header are changed at a place
that hypothesis picks, to a value that no writer means.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioinstruct.model import load
from bioinstruct.model.adapters import Adapters
from bioinstruct.model.checkpoint import INDEX, SINGLE, open_checkpoint, save_checkpoint
from bioinstruct.model.checkpoint_cli import command
from bioinstruct.model.formats import gguf_tensors
from bioinstruct.model.gguf_header import read_metadata
from bioinstruct.model.llama import Llama
from bioinstruct.model.merging import merged_tensors
from bioinstruct.model.tokenizers.tokenizer import load_tokenizer

DATA = Path(__file__).parents[1] / "data"
WORDS = DATA / "tokenizers" / "stories260K_tok512.model"
ODD: list[Any] = [
    *(-1, 0, 1, 3, 2**31, 2**63, 10**12, 10**400, 0.5, 1e308, math.nan, math.inf),
    *("", "x", "../../etc/passwd", "/etc/passwd", "\x00", "\ud800", "a" * 9999, "(", "x*"),
    *(None, True, False, [], {}, [[]], [1], ["a"], {"a": 1}, [None], {"type": "Sequence"}),
]
DROPPED: Any = object()
Node = dict[str, Any] | list[Any]


def places(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to the values of a JSON document; of long lists and objects the first of each."""
    keys = list(node)[:12] if isinstance(node, dict) else []
    keys += range(min(2, len(node))) if isinstance(node, list) else []
    return [at, *(place for key in keys for place in places(node[key], (*at, key)))]


def changed(node: Any, at: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value somewhere."""
    if not at:
        return None if value is DROPPED else value
    copy = dict(node) if isinstance(node, dict) else list(node)
    if len(at) == 1 and value is DROPPED:
        del copy[at[0]]
    else:
        copy[at[0]] = changed(node[at[0]], at[1:], value)
    return copy


def read_or_refused(work: Callable[[], object]) -> None:
    """Nothing but a ValueError or an OSError may come, of one line but where tensors are listed."""
    try:
        work()
    except (ValueError, OSError) as error:
        assert not isinstance(error, UnicodeError | json.JSONDecodeError)
        assert "\n" not in str(error) or "does not fit the model\n" in str(error)


def load_whole(folder: Path) -> None:
    load(folder, dtype="float32", device="cpu", tokenizer=WORDS)


def load_adapter(folder: Path) -> None:
    Adapters.load(folder, open_checkpoint(DATA / "stories260K").config)


def encode(folder: Path) -> None:
    load_tokenizer(folder).encode("ab c  1")


FILES: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "llama": ("stories260K", "config.json", load_whole),
    "qwen3": ("families/qwen3", "config.json", load_whole),
    "mistral": ("families/mistral", "config.json", load_whole),
    "meta": ("stories260K_meta", "params.json", load_whole),
    "adapter": ("peft_golden/patterned", "adapter_config.json", load_adapter),
    "bpe": ("tokenizers/digits_bpe", "tokenizer.json", encode),
    "split bpe": ("tokenizers/llama3_bpe", "tokenizer.json", encode),
    "sentencepiece": ("tokenizers/stories260k_json", "tokenizer.json", encode),
    "declared": ("tokenizers/llama3_bpe", "tokenizer_config.json", encode),
}
odd = st.sampled_from([*ODD, DROPPED])


def copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / "m"))


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_settings_that_nobody_means(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    source, name, work = FILES[kind]
    folder = copied(DATA / source, tmp_path_factory.mktemp("hostile"))
    content = json.loads((folder / name).read_text("utf-8"))

    @given(st.sampled_from(places(content)), odd)
    @settings(max_examples=60)
    def check(at: tuple[Any, ...], value: Any) -> None:
        (folder / name).write_text(json.dumps(changed(content, at, value)))
        read_or_refused(lambda: work(folder))

    check()


def test_an_index_that_nobody_means(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(DATA / "stories260K")
    model = Llama(checkpoint.config)
    checkpoint.load_into(model.destinations())
    folder = tmp_path / "m"
    save_checkpoint(folder, checkpoint.config, merged_tensors(model, None), max_shard_bytes=300_000)
    content = json.loads((folder / INDEX).read_text())

    @given(st.sampled_from(places(content)), odd)
    def check(at: tuple[Any, ...], value: Any) -> None:
        (folder / INDEX).write_text(json.dumps(changed(content, at, value)))
        read_or_refused(lambda: load_whole(folder))

    check()


def test_a_table_of_tensors_that_nobody_means(tmp_path: Path) -> None:
    folder = copied(DATA / "families" / "qwen3", tmp_path)
    raw = (folder / SINGLE).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8:end])

    @given(st.sampled_from(places(table)), odd | st.sampled_from(["F8_E4M3", "I64", "F64", "F32"]))
    def check(at: tuple[Any, ...], value: Any) -> None:
        text = json.dumps(changed(table, at, value)).encode()
        (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
        read_or_refused(lambda: load_whole(folder))

    check()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_gguf_header_that_nobody_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, words = tmp_path / "m.gguf", DATA / "llama_cpp_golden" / "words.json"
    flags = ["export-gguf", DATA / "families" / "llama3", path, "--tokenizer", words]
    command.main([str(flag) for flag in flags], standalone_mode=False)
    metadata = read_metadata(path)

    @given(st.sampled_from(sorted(metadata)), odd.filter(lambda value: value is not DROPPED))
    def check(key: str, value: Any) -> None:
        monkeypatch.setattr(gguf_tensors, "read_metadata", lambda _: metadata | {key: value})
        read_or_refused(lambda: open_checkpoint(path).check(open_checkpoint(path).names()))

    check()


# ---- what these found --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"num_hidden_layers": 10**9}, "num_layers is 1000000000; .* at most 4096"),
        ({"head_dim": 10**9}, "head_dim is 1000000000; .* at most 65536"),
        ({"hidden_size": 10**15, "head_dim": 8}, "hidden_size is 1000000000000000; .* at most"),
        ({"hidden_size": 2**31, "head_dim": 8}, "does not fit the model"),
        ({"layer_types": 7, "model_type": "qwen3"}, "architectures"),
    ],
)
def test_claims_without_end_cost_nothing(
    tmp_path: Path, keys: dict[str, Any], sentence: str
) -> None:
    folder = copied(DATA / "stories260K", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))
    with pytest.raises(ValueError, match=sentence):
        load_whole(folder)


def test_a_pattern_that_searches_for_ever_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bioinstruct.model.lora.settings.PATIENCE_S", 0.05)
    folder = copied(DATA / "peft_golden" / "seven", tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    endless = r"(?:\w|\.|[a-z])*" * 4 + r"\d"
    (folder / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {endless: 3}}))
    with pytest.raises(ValueError, match="searches without end"):
        load_adapter(folder)


@pytest.mark.parametrize("pattern", ["", "x*", "(?=a)"])
def test_a_split_into_nothing_is_refused(tmp_path: Path, pattern: str) -> None:
    folder = copied(DATA / "tokenizers" / "llama3_bpe", tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="splits the text into words that cannot be encoded"):
        encode(folder)
