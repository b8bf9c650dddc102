"""Frozen dataclasses from TOML tables and back; train/run.py says what they hold.

Every field of a dataclass is a key, every field that is a dataclass itself a table, and a tuple of
dataclasses an array of tables. Types are those of the annotations, an int passes for a float and a
single value for a list of one. Unknown keys are refused with the nearest known name.
"""

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

Place = Callable[[str], str]
"""Where the value of a dotted key was given, for messages."""


def put(table: dict[str, Any], override: str) -> str:
    """Put a "key=value" flag into a table.

    Args:
        table: what the recipe holds; changed.
        override: a dotted key, and a TOML value or else a plain string.

    Returns:
        The key.

    Raises:
        ValueError: no "=", or a key that leads through a plain value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set {override!r} must be key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = key.strip().split(".")
    for part in path:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ValueError(f"--set {override!r}: {part} is a value, not a table")
        table = inner
    table[last] = value
    return key.strip()


def keys(kind: type[Any], prefix: str = "") -> list[str]:
    """All dotted keys of a dataclass."""
    names = []
    for f in dataclasses.fields(kind):
        section = typing.get_type_hints(kind)[f.name]
        if dataclasses.is_dataclass(section):
            names += keys(typing.cast(type, section), f"{prefix}{f.name}.")
        else:
            names.append(prefix + f.name)
    return names


class Reader:
    """Builds a dataclass from tables.

    Args:
        root: the outermost dataclass.
        aliases: what others call a key -> the keys here.
        place: where a key's value was given.
    """

    def __init__(self, root: type[Any], aliases: Mapping[str, list[str]], place: Place) -> None:
        self.root, self.aliases, self.place = root, aliases, place

    def build(self, kind: type[Any], table: Mapping[str, Any], prefix: str = "") -> Any:
        """Make a value of a dataclass.

        Raises:
            ValueError: unknown keys, or wrong types or values.
        """
        hints = typing.get_type_hints(kind)
        values = {}
        for key, value in table.items():
            name = prefix + key
            if key not in hints:
                known = None if "[" not in prefix else ", ".join(hints)
                hint = self._suggestion(name) if known is None else f"known keys are {known}"
                raise ValueError(f"{self.place(name)}: unknown key {name}; {hint}")
            if dataclasses.is_dataclass(hints[key]):
                values[key] = self._table(typing.cast(type, hints[key]), value, name)
            else:
                values[key] = self._value(hints[key], value, name)
        self._complete(kind, values, prefix)
        return kind(**values)

    def _complete(self, kind: type[Any], values: Mapping[str, Any], prefix: str) -> None:
        for f in dataclasses.fields(kind):
            required = f.default is f.default_factory is dataclasses.MISSING
            if required and f.name not in values:
                raise ValueError(f"{self.place(prefix)}: {prefix}{f.name} is missing")

    def _table(self, kind: type[Any], value: Any, name: str) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"{self.place(name)}: {name} must be a table, not {value!r}")
        return self.build(kind, value, f"{name}.")

    def _suggestion(self, name: str) -> str:
        known = keys(self.root)
        tables = sorted({k.split(".")[0] for k in known})
        # the right key in the wrong table comes first, then likely slips
        last = name.split(".")[-1]
        close = [k for k in known if k.split(".")[-1] == last] + self.aliases.get(last, [])
        close += difflib.get_close_matches(name, [*tables, *known], 1, 0.5)
        return f"did you mean {close[0]}?" if close else f"known keys are {', '.join(known)}"

    def _value(self, hint: Any, value: Any, name: str) -> Any:
        """Check a TOML value against a field's type."""
        kind = typing.get_origin(hint)
        if kind is tuple:
            return self._list(typing.get_args(hint)[0], value, name)
        where = self.place(name)
        if kind is dict:
            if not isinstance(value, dict):
                message = f"{where}: {name} = {value!r} must be a table of names and numbers"
                raise ValueError(message)
            item = typing.get_args(hint)[1]
            return {k: self._value(item, inner, f"{name}.{k}") for k, inner in value.items()}
        allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if float in allowed and type(value) is int and int not in allowed:
            value = float(value)
        if type(value) not in allowed:
            names = " or ".join(_TYPE_NAMES[t] for t in allowed if t is not types.NoneType)
            raise ValueError(f"{where}: {name} = {value!r} must be {names}")
        return value

    def _list(self, item: Any, value: Any, name: str) -> tuple[Any, ...]:
        items = value if isinstance(value, list) else [value]
        if dataclasses.is_dataclass(item):
            kind = typing.cast(type, item)
            return tuple(self._table(kind, v, f"{name}[{i}]") for i, v in enumerate(items, 1))
        if not all(type(i) is item for i in items):
            where = self.place(name)
            raise ValueError(f"{where}: {name} = {value!r} must be a list of {_PLURALS[item]}")
        return tuple(items)


_PLURALS = {str: "strings", int: "whole numbers"}
_TYPE_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def lines_of(value: Any) -> list[str]:
    """Write a dataclass as TOML: its plain fields, then a table of each section."""
    plain = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    tables = {k: v for k, v in plain.items() if dataclasses.is_dataclass(v)}
    lines = [line(k, v) for k, v in plain.items() if k not in tables]
    for name, section in tables.items():
        lines += ["", f"[{name}]", *(line(k, v) for k, v in _given(section).items())]
    return lines


def line(key: str, value: Any) -> str:
    """One "key = value" of TOML."""
    return f"{key} = {_toml(value)}"


def _given(section: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not None, which TOML cannot say."""
    rows = ((f.name, getattr(section, f.name)) for f in dataclasses.fields(section))
    return {k: v for k, v in rows if v is not None}


def _toml(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        value = _given(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        shown = (c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped)
        return f'"{"".join(shown)}"'
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    return repr(value)
