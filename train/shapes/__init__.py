"""Shapes of models whose weights are not here: config.json files with the facts of their makers.

A dry run needs no more than one of them to plan the memory and the time of a run.
"""

import json
from pathlib import Path

from bioinstruct.model.config import LlamaConfig
from bioinstruct.model.formats.config_json import config_from_hf

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The shapes that ship, by name."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read_shape(name: str) -> LlamaConfig:
    """Read a shape by its name here, or a config.json by its path.

    Raises:
        ValueError: there is no such shape or file, or it is no LLaMA's.
    """
    own = FOLDER / f"{name}.json"
    path = own if name in names() else Path(name).expanduser()
    if not path.is_file():
        raise ValueError(
            f"model.shape = {name!r} is neither a file nor a shape that ships: {', '.join(names())}"
        )
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(mapping, dict):
        raise ValueError(f"{path} must hold a JSON object, the config.json of a model")
    return config_from_hf(mapping, str(path))
