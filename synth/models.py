"""What is sent to a chat model: the table of models, the request's body, its key.

A body is a pure function of the model's entry, the settings and the messages. Its key is the
SHA-256 of its canonical JSON (sorted names, no spaces, UTF-8), without the endpoint's address, so
that the same question has the same key wherever and whenever it is asked.
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bioinstruct.synth.text import read_text

TABLE = Path(__file__).with_name("models.toml")
CAPS = ("max_tokens", "max_completion_tokens")
SAMPLING = ("temperature", "top_p", "seed")
_FIELDS = ("price_in", "price_out", "batch", "cap", "sampling", "reasoning_effort")

Message = Mapping[str, str]
_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode


@dataclass(frozen=True, kw_only=True)
class Model:
    """One chat model as the table describes it."""

    name: str
    price_in: float | None = None
    """USD per million tokens read."""
    price_out: float | None = None
    """USD per million tokens written, hidden reasoning included."""
    batch: float | None = None
    """What a batch costs, as a share of the prices."""
    cap: str = "max_tokens"
    """The body's field that bounds an answer's tokens."""
    sampling: tuple[str, ...] = SAMPLING
    """The sampling fields that the model takes."""
    reasoning_effort: str | None = None
    as_of: str = ""
    """Date of the prices."""


class Request:
    """A body as bytes, with its key and the most tokens its answer may have."""

    __slots__ = ("body", "cap_tokens", "key")

    def __init__(self, body: Mapping[str, object], cap_tokens: int) -> None:
        self.body = _canonical(body).encode()
        self.key = hashlib.sha256(self.body).hexdigest()
        self.cap_tokens = cap_tokens


def read_model(name: str, table: Path | None = None) -> Model:
    """Return a model's entry in a table, or the table's `default` under the model's name.

    Args:
        name: as the endpoint calls it.
        table: a TOML file in the form of models.toml. Default: the one that is installed.

    Raises:
        ValueError: the table is broken, or an entry has a wrong field or value.
        OSError: the table cannot be opened.
    """
    path = table or TABLE
    try:
        content = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: broken TOML: {error}") from error
    models = content.get("models")
    if not isinstance(models, dict):
        raise ValueError(f'{path} has no entries; write [models."NAME"] tables, as in models.toml')
    used = name if name in models else "default"
    entry = models.get(used, {})
    _check(entry, f'{path}: [models."{used}"]')
    sampling = tuple(entry.pop("sampling", SAMPLING))
    return Model(name=name, sampling=sampling, as_of=str(content.get("as_of", "")), **entry)


def _check(entry: object, where: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a table")
    for field, value in entry.items():
        if field not in _FIELDS:
            raise ValueError(f"{where}: unknown field {field!r}; known are {', '.join(_FIELDS)}")
        if field in ("price_in", "price_out"):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < 1e6:
                raise ValueError(f"{where}: {field} must be USD per million tokens, not {value!r}")
        elif field == "batch" and not (type(value) in (int, float) and 0 <= value <= 1):
            raise ValueError(f"{where}: batch must be a share of the prices, not {value!r}")
        elif field == "cap" and value not in CAPS:
            raise ValueError(f"{where}: cap must be {' or '.join(CAPS)}, not {value!r}")
        elif field == "sampling" and not _sampling(value):
            raise ValueError(f"{where}: sampling lists any of {', '.join(SAMPLING)}, not {value!r}")
        elif field == "reasoning_effort" and not isinstance(value, str):
            raise ValueError(f"{where}: reasoning_effort must be text, not {value!r}")
    if ("price_in" in entry) != ("price_out" in entry):
        raise ValueError(f"{where}: price_in and price_out come together")


def _sampling(value: object) -> bool:
    return isinstance(value, list) and all(name in SAMPLING for name in value)


def body(
    model: Model,
    messages: Sequence[Message],
    *,
    cap_tokens: int,
    sampling: Mapping[str, float],
    response_format: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Return the body of a chat request.

    Args:
        model: its entry decides the names of the fields.
        messages: role and content each.
        cap_tokens: the most tokens the answer may have, > 0.
        sampling: values of sampling fields; each must be one that the model takes.
        response_format: a JSON schema for the answer, in the endpoint's form.

    Raises:
        ValueError: the model does not take one of the sampling fields.
    """
    made: dict[str, object] = {
        "model": model.name,
        "messages": list(messages),
        model.cap: cap_tokens,
    }
    for field, value in sampling.items():
        if field not in model.sampling:
            allowed = ", ".join(model.sampling) or "none"
            raise ValueError(
                f"{model.name} does not take {field} (it takes: {allowed}); leave it out, "
                "or correct the model's entry with --models"
            )
        made[field] = value
    if model.reasoning_effort:
        made["reasoning_effort"] = model.reasoning_effort
    if response_format:
        made["response_format"] = response_format
    return made
