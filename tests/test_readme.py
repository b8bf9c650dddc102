"""The README cannot rot: its commands, options, settings, imports and files all exist."""

import ast
import importlib
import inspect
import re
import shlex
import tomllib
import typing
from pathlib import Path
from typing import Any

import click
import pytest

from bioinstruct.train import run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = {
    "bioinstruct-synth": "bioinstruct.synth.cli",
    "bioinstruct-eval": "bioinstruct.eval.cli",
}
FOLDERS = ("kernels", "model", "train", "synth", "eval", "benches", "tests")


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


def command_lines() -> list[str]:
    text = "".join(blocks("bash")).replace("\\\n", " ")
    return [line for line in text.split("\n") if line.strip()]


def click_command(module: str) -> click.Command:
    """Return the module's click command: its group where there is one."""
    found = [
        v for v in vars(importlib.import_module(module)).values() if isinstance(v, click.Command)
    ]
    assert found, f"{module} holds no click command"
    return next((c for c in found if isinstance(c, click.Group)), found[0])


def check_click(command: click.Command, arguments: list[str]) -> dict[str, Any]:
    """Parse arguments as click would, running nothing; return the options given."""
    if isinstance(command, click.Group):
        assert arguments[0] in command.commands, f"no sub-command {arguments[0]}"
        return check_click(command.commands[arguments[0]], arguments[1:])
    context = click.Context(command)
    given, rest, _ = command.make_parser(context).parse_args(list(arguments))
    assert rest == []
    needed = {p.name for p in command.params if p.required and p.name is not None}
    assert needed <= given.keys(), f"{sorted(needed - given.keys())} missing"
    return given


def check_script(script: str, arguments: list[str]) -> None:
    assert (ROOT / script).is_file(), f"{script} does not exist"
    module = f"bioinstruct.{script.removesuffix('.py').replace('/', '.')}"
    check_click(click_command(module), arguments)
    pairs = zip(arguments, arguments[1:], strict=False)
    run.read_run(None, [after for option, after in pairs if option == "--set"])
    for recipe in (a for a in arguments if a.endswith(".toml")):
        shown = any(text.startswith(f"# {recipe}\n") for text in blocks("toml"))
        assert shown or (ROOT / recipe).is_file(), f"the README does not show {recipe}"


def check_python(arguments: list[str]) -> None:
    if arguments[0] != "-m":
        check_script(arguments[0], arguments[1:])
    elif arguments[1] == "pip":
        check_extras(" ".join(arguments))
    elif arguments[1] == "bioinstruct.model.checkpoint":
        check_click(click_command("bioinstruct.model.checkpoint_cli"), arguments[2:])
    else:
        assert arguments[1] in ("venv", "pytest"), f"teach this test python -m {arguments[1]}"


def check_extras(text: str) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"\.\[(.*?)\]", text)
    assert set(extras.split(",")) <= known["optional-dependencies"].keys()


@pytest.mark.parametrize("line", command_lines())
def test_command_can_be_said(line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)
    if name in COMMANDS:
        check_click(click_command(COMMANDS[name]), arguments)
    elif name.rpartition("/")[2] in ("python", "python3"):
        check_python(arguments)
    else:
        assert name == "make", f"teach this test the command {name}"
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert arguments and set(arguments) <= set(targets)


def test_the_two_commands_stand_in_it() -> None:
    assert {"make demo", "make test"} <= set(command_lines())


@pytest.mark.parametrize("text", blocks("toml"))
def test_recipe_is_a_recipe(text: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    assert run.read_run(recipe, []) != run.Run()


def test_settings_named_in_the_text_exist() -> None:
    named = set(re.findall(r"`((?:model|data|train|lora)\.[a-z_]+)`", README))
    assert {"data.path"} <= named <= set(run.keys())


@pytest.mark.parametrize("text", blocks("python"))
def test_python_names_what_exists(text: str) -> None:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert [a.name for a in node.names if not hasattr(module, a.name)] == []
    model = importlib.import_module("bioinstruct.model")
    returned = typing.get_type_hints(model.load)["return"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.keywords:
            name = ast.unparse(node.func)
            holder, _, method = name.rpartition(".")
            if holder in ("", "llm"):  # the tokenizer's class is only known once one is read
                function = getattr(returned if holder else model, method)
                known = inspect.signature(function).parameters
                assert {k.arg for k in node.keywords} <= known.keys(), name


def tree_paths() -> list[str]:
    """Return the paths of the annotated tree: names first, a gap, then what they are."""
    (text,) = blocks("text")
    paths, folders = [], [""]
    for line in text.rstrip().split("\n"):
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.findall(r"\S+(?:\.py|/)(?=\s|$)", re.split(r" {2,}", line.strip())[0]):
            paths.append("".join(folders[: depth + 1]) + name)
            if name.endswith("/"):
                folders[depth + 1 :] = [name]
    return paths


def test_tree_names_what_exists() -> None:
    paths = tree_paths()
    assert len(paths) > len(FOLDERS)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert [f for f in FOLDERS if f"{f}/" not in paths] == []


def test_files_named_in_the_text_exist() -> None:
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./]*)`", README)
    named += re.findall(r"\b([A-Z]+\.(?:md|cff))\b", README)
    assert "train/main.py" in named and "LOG.md" in named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_is_short_and_plain() -> None:
    assert README.count("\n") <= 200
    assert README.isascii()
