"""Settings: merging, checking, and the recipe that a run writes of itself."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bioinstruct.train.demo import RECIPE, resolve
from bioinstruct.train.run import MixFile, Run, keys, read_run, to_toml


def test_flags_beat_the_recipe_and_the_recipe_beats_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "a.toml"
    recipe.write_text('[train]\nlr = 1\nsteps = 7\n[lora]\ntargets = ["q_proj"]\n')
    run = read_run(recipe, ["train.steps=9", "out=here", "data.path=x.jsonl"])
    assert (run.train.lr, run.train.steps, run.train.clip) == (1.0, 9, 1.0)
    assert (run.lora.targets, run.out, run.data.path) == (("q_proj",), "here", ("x.jsonl",))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.learning_rate=1", "unknown key train.learning_rate; did you mean train.lr"),
        ("train.lrr=1", "unknown key train.lrr; did you mean train.lr?"),
        ("lr=1", r"unknown key lr; did you mean train.lr\?"),
        ("dta.path=1", r"unknown key dta; did you mean data\?"),
        ("train=1", "train must be a table, not 1"),
        ("train.lr.x=1", "train.lr = .* must be a number"),
        ("train.steps=many", "train.steps = 'many' must be a whole number"),
        ("train.steps=1.5", "train.steps = 1.5 must be a whole number"),
        ("train.steps=true", "train.steps = True must be a whole number"),
        ("train.steps=0", "train.steps = 0 must be greater than 0"),
        ("train.lr=-1", "train.lr = -1.0 must be greater than 0"),
        ("train.lr=nan", "train.lr = nan must be greater than 0"),
        ("train.epochs=inf", "train.epochs = inf must be greater than 0, and finite"),
        ("train.seed=-1", "train.seed = -1 must be 0 or more"),
        ("train.schedule=cosin", "did you mean cosine"),
        ("train.method=ful", "did you mean full"),
        ("train.clip=-0.5", "must be 0 or more"),
        ("model.dtype=bf16", "model.dtype = 'bf16' is unknown"),
        ("model.path=[1]", r"model.path = \[1\] must be a string"),
        ("data.path=3", "must be a list of strings"),
        ("data.validation=1.5", "must be a share below 1, or a file"),
        ("data.shuffle=1", "must be true or false"),
        ("data.on_overlong=cut", "allowed are error, drop, truncate"),
        ("data.max_tokens_per_pack=0", "must be greater than 0"),
        ("lora.r=0", "lora.r = 0 is out of range"),
        ("lora.r=257", "allowed are 1 to 256"),
        ("lora.alpha=0", "must be a positive number"),
        ("lora.dropout=1", "below 1"),
        ("lora.dropout_per_module=true", "has no effect without lora.dropout"),
        ("lora.targets=[]", "lora.targets is empty"),
        ("lora.plus_ratio=0.5", "lora.plus_ratio = 0.5 must be a number of 1 or more"),
        ("lora.layers=[true]", "lora.layers = .* must be a list of whole numbers"),
        ("lora.rank_pattern=3", "must be a table of names and numbers"),
        ("lora.rank_pattern.q_proj=x", "lora.rank_pattern.q_proj = 'x' must be a whole number"),
        ("lora.rank_pattern.q_proj=999", "lora.rank_pattern.q_proj = 999 is out of range"),
        ("train.ema=1", "train.ema = 1.0 must be at least 0 and below 1"),
        ("train.decay_share=0", "train.decay_share = 0.0 must be above 0"),
        ('lora.targets=["qproj"]', "did you mean q_proj"),
        ('lora.targets=["lm_head"]', "lm_head cannot carry an adapter"),
        ("shard=half", "allowed are auto, none, full, hybrid"),
        ("eval.tasks=pubmedqa", "must be NAME=PATH"),
        ("eval.limit=0", "must be greater than 0"),
        ("nothing", "must be key=value"),
        ("=1", "must be key=value"),
    ],
)
def test_wrong_settings_are_named(override: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_run(None, [override])


def test_an_error_names_where_the_value_was_given(tmp_path: Path) -> None:
    recipe = tmp_path / "a.toml"
    recipe.write_text("[train]\nsteps = 1.5\n")
    with pytest.raises(ValueError, match="a.toml: train.steps = 1.5"):
        read_run(recipe, ["train.lr=1"])
    recipe.write_text("[train]\nsteps = 1\n")
    with pytest.raises(ValueError, match="^--set: train.lr = 'x'"):
        read_run(recipe, ["train.lr=x"])
    with pytest.raises(ValueError, match="^--set: unknown key train.stpes"):
        read_run(recipe, ["train.stpes=1"])


def test_both_batch_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="both given; give one of them"):
        read_run(None, ["train.batch_samples=1", "train.batch_tokens=1"])


@pytest.mark.parametrize("content", [b"[train\n", b"\xff\xfe", b"lr = \n"])
def test_broken_recipes_are_named(content: bytes, tmp_path: Path) -> None:
    recipe = tmp_path / "broken.toml"
    recipe.write_bytes(content)
    with pytest.raises(ValueError, match="broken.toml is not valid TOML"):
        read_run(recipe, [])


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(
    path=texts,
    files=st.lists(texts, max_size=3),
    lr=st.floats(1e-9, 10),
    steps=st.integers(1, 10**9) | st.none(),
    shuffle=st.booleans(),
)
def test_what_a_run_writes_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    path: str,
    files: list[str],
    lr: float,
    steps: int | None,
    shuffle: bool,
) -> None:
    base = Run()
    run = Run(
        model=type(base.model)(path=path),
        data=type(base.data)(path=tuple(files), shuffle=shuffle),
        train=type(base.train)(lr=lr, steps=steps),
    )
    written = tmp_path_factory.mktemp("run") / "run.toml"
    written.write_text(to_toml(run, {"commit": "abc", "steps": 3}), encoding="utf-8")
    assert tomllib.loads(written.read_text(encoding="utf-8"))["made"]["steps"] == 3
    assert read_run(written, []) == run


def test_demo_recipe_is_valid_and_its_files_are_there() -> None:
    run = read_run(RECIPE, [])
    assert run.model.path == "demo:smollm2"
    for name in (*run.data.path, *(t.partition("=")[2] for t in run.eval.tasks), run.eval.lexicon):
        assert resolve(name).is_file()


@pytest.mark.parametrize("name", ["demo:nothing.gz", "demo:../main.py", "demo:"])
def test_demo_paths_that_do_not_exist(name: str) -> None:
    with pytest.raises(ValueError, match="the demo has smollm2 and"):
        resolve(name)


def test_keys_of_the_contract_are_there() -> None:
    promised = (
        "model.path model.tokenizer model.dtype data.path data.validation data.template "
        "data.max_tokens_per_pack data.shuffle train.batch_samples train.batch_tokens train.epochs "
        "train.steps train.lr train.schedule train.warmup_steps train.weight_decay train.clip "
        "train.seed train.save_every train.eval_every train.method lora.r lora.alpha lora.dropout "
        "lora.targets shard attention device out"
    )
    assert set(promised.split()) <= set(keys())


MIX = """
[[data.mix]]
path = "a.jsonl"
weight = 2
[[data.mix]]
path = "b.json"
cap = 100
categories = ["QA"]
"""


def test_mix_is_an_array_of_tables(tmp_path: Path) -> None:
    recipe = tmp_path / "mixed.toml"
    recipe.write_text(MIX)
    run = read_run(recipe, ["data.samples=5", "data.seed=3"])
    one = MixFile(path="a.jsonl", weight=2.0)
    assert run.data.mix == (one, MixFile(path="b.json", cap=100, categories=("QA",)))
    assert (run.data.samples, run.data.seed) == (5, 3)
    again = tmp_path / "again.toml"
    again.write_text(to_toml(run, {}))
    assert read_run(again, []) == run
    flag = read_run(recipe, ['data.mix=[{path = "c.json", weight = 0.5}]'])
    assert flag.data.mix == (MixFile(path="c.json", weight=0.5),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "weigth = 2",
            r"unknown key data.mix\[1\].weigth; known keys are path, weight, cap",
        ),
        ('path = "a"\nweight = 0', "data.mix of a: weight = 0.0 must be a number above 0"),
        ('path = "a"\nweight = inf', "data.mix of a: weight = inf must be a number above 0"),
        ('path = "a"\ncap = 0', "data.mix of a: cap = 0 must be greater than 0"),
        ('path = "a"\ncap = 1.5', r"data.mix\[1\].cap = 1.5 must be a whole number"),
        ("weight = 2", r"mixed.toml: data.mix\[1\].path is missing"),
        ('path = ""', "data.mix: path is empty"),
    ],
)
def test_bad_mixes(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "mixed.toml"
    recipe.write_text(f"[[data.mix]]\n{text}\n")
    with pytest.raises(ValueError, match=message):
        read_run(recipe, [])


def test_a_mix_that_is_no_table() -> None:
    with pytest.raises(ValueError, match=r"^--set: data.mix\[1\] must be a table, not 'a.json'"):
        read_run(None, ["data.mix=a.json"])
