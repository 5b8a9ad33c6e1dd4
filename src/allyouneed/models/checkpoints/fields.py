"""Reads the fields of a checkpoint's configuration, which anybody may have written: each with its type and range."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from allyouneed.core.errors import InputError

LARGEST = 1 << 24  # no dimension, count or length of a model comes near


class Fields:
    """The fields of `source` (a path for the messages).

    Every reader raises `InputError` naming file and field, what was found and what is accepted. A `default` stands in
    for a field that is absent or null.
    """

    def __init__(self, values: Mapping[str, Any], source: object) -> None:
        if not isinstance(values, Mapping):
            raise InputError(f"{source}: expected a JSON object, found {type(values).__name__}")
        self.values, self.source = values, source

    def integer(self, name: str, default: int | None = None, *, least: int = 1, most: int = LARGEST) -> int:
        """A whole number from `least` to `most`."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(name, value, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, default: float | None = None, *, least: float = 0.0, most: float = 1e12) -> float:
        """A finite number from `least` to `most`."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(name, value, "a finite number")
        if not least <= value <= most:
            raise self.wrong(name, value, f"a number from {least:g} to {most:g}")
        return float(value)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def choice(self, name: str, accepted: Iterable[str], default: str | None = None) -> str:
        """One of the `accepted` strings."""
        value, accepted = self._get(name, default), sorted(accepted)
        if not isinstance(value, str) or value not in accepted:
            raise self.wrong(name, value, "one of " + ", ".join(accepted))
        return value

    def expect(self, name: str, only: Any) -> None:
        """Refuse a field that, where present, asks for something we do not compute."""
        value = self.values.get(name)
        if value is not None and value != only:
            raise self.wrong(name, value, f"only {only!r} (another value changes what is computed)")

    def wrong(self, name: str, value: Any, accepted: str) -> InputError:
        """The error for a field with a value that is not accepted."""
        shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
        return InputError(f"{self.source}: field {name!r} is {shown}; accepted: {accepted}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise InputError(f"{self.source}: field {name!r} is missing")
        return value
