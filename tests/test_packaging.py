"""What is installed is what the tree holds, under one name, and imports point one way."""

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ("kernels", "model", "train", "synth", "eval", "benches")
RUN_AS_SCRIPT = ("train", "benches")  # python puts these folders first on sys.path
MAY_IMPORT = {
    "synth": {"synth"},
    "kernels": {"kernels", "synth"},
    "model": {"kernels", "model", "synth"},
    "eval": {"kernels", "model", "eval", "synth"},
    "train": {"kernels", "model", "eval", "train", "synth"},
}
DONE_WITHOUT = {"transformers", "peft", "datasets", "accelerate", "tokenizers", "huggingface_hub"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def files(folder: str, pattern: str = "*") -> list[Path]:
    found = (path for path in (ROOT / folder).rglob(pattern) if path.is_file())
    return sorted(p for p in found if "__pycache__" not in p.parts and not p.name.startswith("."))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of every import in a file, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from bioinstruct import eval` names the folder among the aliases
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def wrong_imports(sources: list[Path], *, wrong: set[str], depth: int) -> list[str]:
    """List the imports whose part number depth, counted from 0, is in wrong."""
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources
        for line, name in imports(path)
        if wrong & set(name.split(".")[depth : depth + 1])
        and (depth == 0 or name.startswith("bioinstruct."))
    ]


def test_every_package_is_listed() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    found = {path.parent.relative_to(ROOT) for f in SHIPPED for path in files(f, "__init__.py")}
    assert listed == {".".join(("bioinstruct", *path.parts)) for path in found}


def test_every_folder_of_python_files_is_a_package() -> None:
    bare = {p.parent for f in SHIPPED for p in files(f, "*.py")}
    assert not [str(p) for p in bare if not (p / "__init__.py").is_file()]


def test_every_part_says_that_it_is_typed() -> None:
    assert [f for f in SHIPPED if not (ROOT / f / "py.typed").is_file()] == []


def test_script_folders_shadow_nothing() -> None:
    project = PROJECT["project"]
    wanted = sum(project["optional-dependencies"].values(), project["dependencies"])
    named = {re.split(r"[^\w-]", want)[0].replace("-", "_").lower() for want in wanted}
    taken = sys.stdlib_module_names | named | {"triton"}
    assert {"torch", "click", "gguf", "queue"} <= taken
    for folder in RUN_AS_SCRIPT:
        bad = {path.stem for path in (ROOT / folder).glob("*.py")} & taken
        assert not bad, f"rename {sorted(bad)} in {folder}/: it hides the module of that name"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy: a build folder left in the checkout would leak in."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in SHIPPED:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(folder), str(source)], check=True, stdin=subprocess.DEVNULL)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_carries_every_file_under_one_name(wheel: Path) -> None:
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    tree = {f"bioinstruct/{p.relative_to(ROOT)}" for f in SHIPPED for p in files(f)}
    assert names == tree, f"missing {sorted(tree - names)}, unexpected {sorted(names - tree)}"


def test_the_c_in_the_wheel_compiles(wheel: Path, tmp_path: Path) -> None:
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("needs a C compiler")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path)
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import torch
        from bioinstruct.kernels import native
        print(native.__file__, native.loaded(torch.float32).library is not None)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "BIOINSTRUCT_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{tmp_path / 'bioinstruct' / 'kernels' / 'native.py'} True\n", (
        done.stderr
    )
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_wheel_carries_the_licences(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("LICENSE", "NOTICE"):
        assert [n for n in names if n.endswith(f".dist-info/licenses/{name}")], name


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder: str) -> None:
    wrong = set(SHIPPED) - MAY_IMPORT[folder]
    assert wrong_imports(files(folder, "*.py"), wrong=wrong, depth=1) == []


def rooms_imported(folder: str) -> dict[str, set[str]]:
    """What each file and each sub-folder of a folder imports of the others."""
    rooms: dict[str, set[str]] = {}
    for path in files(folder, "*.py"):
        room = path.relative_to(ROOT / folder).parts[0].removesuffix(".py")
        names = [name.split(".")[1:3] for _, name in imports(path)]
        rooms.setdefault(room, set()).update(n[1] for n in names if n[:1] == [folder] and n[1:])
    return {room: (seen & rooms.keys()) - {room} for room, seen in rooms.items()}


@pytest.mark.parametrize("folder", ["model", "train"])
def test_no_sub_folder_imports_in_a_circle(folder: str) -> None:
    rooms = rooms_imported(folder)
    below = {room: set(seen) for room, seen in rooms.items()}
    for _ in rooms:
        below = {r: seen.union(*(below[s] for s in seen)) for r, seen in below.items()}
    circles = [r for r in rooms if r in below[r] and (ROOT / folder / r).is_dir()]
    assert any(len(seen) > 9 for seen in below.values())
    assert not circles, f"what {folder}/{circles} import imports them: {rooms}"


def test_the_libraries_we_do_without_are_not_imported() -> None:
    # the makers of golden files under tests/data run by hand, in an environment of their own
    sources = [p for f in (*MAY_IMPORT, "tests") for p in files(f, "*.py") if "data" not in p.parts]
    assert wrong_imports(sources, wrong=DONE_WITHOUT, depth=0) == []


def test_the_import_check_sees_what_it_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    source = "def f():\n    import peft.tuners\n    from bioinstruct import train\n"
    source += "from bioinstruct.train.loop import step\nimport trainer.train\n"
    (tmp_path / "seen.py").write_text(source)
    found = wrong_imports([tmp_path / "seen.py"], wrong={"train"}, depth=1)
    assert [line.split()[0] for line in found] == ["seen.py:4", "seen.py:3"]
    found = wrong_imports([tmp_path / "seen.py"], wrong=DONE_WITHOUT, depth=0)
    assert found == ["seen.py:2 imports peft.tuners"]


@pytest.mark.parametrize("command", ["synth", "eval"])
def test_the_light_commands_answer_without_torch(command: str) -> None:
    """Torch is made impossible to import, then every --help of the command is asked for."""
    code = f"""
        import sys
        sys.modules["torch"] = None
        import click
        from bioinstruct.{command}.cli import main
        from bioinstruct.{command} import cli
        group = next(value for value in vars(cli).values() if isinstance(value, click.Group))
        for args in [[], *([name] for name in group.commands)]:
            group.main([*args, "--help"], standalone_mode=False)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_no_synth_module_needs_torch() -> None:
    names = [
        ".".join(("bioinstruct", *p.relative_to(ROOT).with_suffix("").parts))
        for p in files("synth", "*.py")
    ]
    lines = ["import sys", "sys.modules['torch'] = None", *(f"import {name}" for name in names)]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
