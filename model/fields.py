"""Typed reading of parsed settings; a complaint names the file, the key, the value, the rule."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
_REQUIRED: Any = object()


class Fields:
    """A mapping of settings that somebody else wrote; null counts as absent, as JSON writers mean.

    Args:
        mapping: what the file holds.
        source: the file's name, and the key that led here, for messages.

    Raises:
        ValueError: the file holds no mapping.
    """

    def __init__(self, mapping: object, source: str) -> None:
        if not isinstance(mapping, Mapping):
            raise ValueError(f"{source}: expected named settings, found {shown(mapping)}")
        self.mapping: Mapping[str, Any] = mapping
        self.source = source

    def integer(self, key: str, default: int = _REQUIRED) -> int:
        """Return the whole number under key."""
        return int(self._typed(key, default, (int,), "a whole number"))

    def number(self, key: str, default: float = _REQUIRED) -> float:
        """Return the number under key."""
        value = self._typed(key, default, (int, float), "a number")
        try:
            return float(value)
        except OverflowError:
            self.refuse(key, "it must be a number of ordinary size")

    def boolean(self, key: str, default: bool = _REQUIRED) -> bool:
        """Return the truth value under key."""
        return bool(self._typed(key, default, (bool,), "true or false"))

    def text(self, key: str, default: str = _REQUIRED) -> str:
        """Return the string under key."""
        return str(self._typed(key, default, (str,), "a string"))

    def ids(self, key: str, default: int | None) -> tuple[int, ...]:
        """Return the token ids under key: one or a list, none where it says null."""
        found = self.mapping.get(key, default)
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(token) is int for token in ids):
            self.refuse(key, "it must be a token id, a list of them, or null")
        return tuple(ids)

    def one_id(self, key: str, default: int | None) -> int | None:
        """Return the one token id under key, None where it says null."""
        ids = self.ids(key, default)
        if len(ids) > 1:
            self.refuse(key, "it must be one token id or null")
        return ids[0] if ids else None

    def share(self, key: str, whole_key: str, parts_key: str) -> int:
        """Return the whole number under key; without it, whole_key's divided by parts_key's."""
        if self.has(key):
            return self.integer(key)
        whole, parts = self.integer(whole_key), self.integer(parts_key)
        if parts <= 0 or whole % parts:
            self.refuse(whole_key, f"without {key} it must be a multiple of {parts_key}, {parts}")
        return whole // parts

    def has(self, key: str) -> bool:
        """Say whether key is there and not null."""
        return self.mapping.get(key) is not None

    def refuse(self, key: str, rule: str) -> NoReturn:
        """Raise the ValueError that names the file, the key, its value and the rule."""
        raise ValueError(f"{self.source}: {key} is {shown(self.mapping.get(key))}; {rule}")

    def _typed(self, key: str, default: Any, types: tuple[type, ...], rule: str) -> Any:
        value = self.mapping.get(key)
        if value is None and default is _REQUIRED:
            raise ValueError(f"{self.source}: the key {key} is missing; it must be {rule}")
        if value is None:
            return default
        # python counts True as an integer, a checkpoint does not
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            self.refuse(key, f"it must be {rule}")
        return value


def build(kind: Callable[..., T], source: str, **values: Any) -> T:
    """Construct kind from values; what its validation complains about gets the file's name."""
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def require(holds: bool, message: str) -> None:
    """Raise ValueError(message) unless it holds."""
    if not holds:
        raise ValueError(message)


def shown(value: object) -> str:
    """Return value as a message shows it: its repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
