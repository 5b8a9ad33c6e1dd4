"""Configurations: frozen dataclasses that hold their children's configurations.

Holds the base classes, overrides written `a.b=c`, and JSON both ways. Knows no field of any room.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import types
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from allyouneed.core.errors import InputError, brief, unknown

TAG = "type"  # key under which JSON names a configuration's class


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every configuration: immutable, keyword-only, comparable, printable.

    >>> @dataclass(frozen=True, kw_only=True)
    ... class Adam(Config):
    ...     lr: float = 1e-3
    >>> Adam().override("lr=3e-4").lr
    0.0003
    """

    owner: ClassVar[type | None] = None  # the part this configuration builds, set by `Configured`

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """The part this configuration describes; arguments are what only its parent knows (`dim`, `vocab_size`)."""
        assert self.owner is not None, f"{type(self).__qualname__} describes no part"
        return self.owner(self, *args, **kwargs)

    def replace(self, **changes: Any) -> Self:
        """A copy with fields changed."""
        return dataclasses.replace(self, **changes)

    def override(self, *assignments: str) -> Self:
        """A copy with `path.to.field=value` assignments applied.

        Raises:
            InputError: no such field (the nearest valid ones are named), or a value of another type.
        """
        config = self
        for assignment in assignments:
            path, equals, text = assignment.partition("=")
            if not equals:
                raise InputError(f"override {assignment!r} has no '='; write path.to.field=value")
            config = _assign(config, path.strip().split("."), text.strip(), path.strip())
        return config

    def to_json(self) -> dict[str, Any]:
        """A JSON object; children carry the name of their class under `"type"`."""
        return {TAG: _class_name(type(self))} | {
            f.name: _jsonable(getattr(self, f.name)) for f in dataclasses.fields(self)
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Any:
        """The configuration that `to_json` wrote. Only configuration classes of this package are ever constructed.

        Raises:
            InputError: unknown class or field.
        """
        return _from_json(data)


class Configured:
    """A class with a nested `Config` that builds it: `Thing.Config(...).build(...)` is `Thing(config, ...)`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Config" in cls.__dict__:
            cls.__dict__["Config"].owner = cls


def _assign(config: Any, path: list[str], text: str, full: str) -> Any:
    name, rest = path[0], path[1:]
    if isinstance(config, tuple):
        if not name.isdigit() or int(name) >= len(config):
            raise InputError(f"override {full!r}: {name!r} is no index of a list of {len(config)}")
        i = int(name)
        value = _assign(config[i], rest, text, full) if rest else _parse(text, type(config[i]), full)
        return (*config[:i], value, *config[i + 1 :])
    if not dataclasses.is_dataclass(config):
        raise InputError(f"override {full!r}: {name!r} is a field of something that has none")
    hints = typing.get_type_hints(type(config))
    names = [f.name for f in dataclasses.fields(config)]
    if name not in names:
        raise unknown(f"field in override {full!r}:", name, names)
    value = _assign(getattr(config, name), rest, text, full) if rest else _parse(text, hints[name], full)
    return dataclasses.replace(config, **{name: value})  # type: ignore[type-var]


def _parse(text: str, hint: Any, full: str) -> Any:
    try:
        value: Any = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if _is_tuple(hint) and isinstance(value, str):
        value = tuple(part.strip() for part in value.split(","))
    for option in _options(hint):
        fitted = _fit(value, text, option)
        if fitted is not _NO:
            return fitted
    raise InputError(f"override {full}={text}: expected {_describe(hint)}, got {value!r}")


_NO = object()


def _fit(value: Any, text: str, hint: Any) -> Any:
    """`value` as an instance of `hint`, or `_NO`."""
    if _is_tuple(hint):
        items = value if isinstance(value, tuple | list) else (value,)
        kinds = _kinds(hint, len(items))
        fitted = [_fit(v, str(v), kind) for v, kind in zip(items, kinds, strict=False)]
        return _NO if len(kinds) != len(items) or any(v is _NO for v in fitted) else tuple(fitted)
    if typing.get_origin(hint) is typing.Literal:
        return value if value in typing.get_args(hint) else _NO
    if hint is Any:
        return value
    if hint is str:
        return text
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e6 steps
    if hint is int and isinstance(value, bool):
        return _NO
    return value if isinstance(hint, type) and isinstance(value, hint) else _NO


def _options(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(sorted(typing.get_args(hint), key=lambda h: h is str))  # str accepts anything: try it last
    return (hint,)


def _is_tuple(hint: Any) -> bool:
    return hint is tuple or typing.get_origin(hint) is tuple


def _kinds(hint: Any, length: int) -> list[Any]:
    """What the items of a tuple are annotated as; where any number may stand, `length` of them do."""
    args = list(typing.get_args(hint)) or [Any, Ellipsis]
    return [args[0]] * length if args[-1] is Ellipsis else args


def _describe(hint: Any) -> str:
    return " or ".join(getattr(h, "__name__", str(h)) if not typing.get_origin(h) else str(h) for h in _options(hint))


def _class_name(cls: type) -> str:
    return f"{cls.__module__.removeprefix('allyouneed.')}:{cls.__qualname__}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_json()
    if isinstance(value, tuple | list):
        return [_jsonable(v) for v in value]
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    if TAG not in value:
        return {k: _from_json(v) for k, v in value.items()}
    cls = _find_class(value[TAG])
    fields = {k: _from_json(v) for k, v in value.items() if k != TAG}
    hints = typing.get_type_hints(cls)
    for name, found in fields.items():
        if name not in cls.__dataclass_fields__:
            raise unknown(f"field of {value[TAG]}", name, cls.__dataclass_fields__)
        if not _accepts(hints[name], found):
            raise InputError(f"{value[TAG]}: {name} is {brief(found)}; expected {_describe(hints[name])}")
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in fields and _needed(f)]
    if missing:
        raise InputError(f"{value[TAG]}: field {missing[0]!r} is missing")
    return cls(**fields)


def _needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _accepts(hint: Any, value: Any) -> bool:
    """Whether `value`, read from JSON, is of the annotated type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_accepts(option, value) for option in typing.get_args(hint))
    if _is_tuple(hint):
        if not isinstance(value, tuple):
            return False
        kinds = _kinds(hint, len(value))
        return len(kinds) == len(value) and all(_accepts(kind, v) for kind, v in zip(kinds, value, strict=True))
    if typing.get_origin(hint) is not None:
        return typing.get_origin(hint) is not typing.Literal or value in typing.get_args(hint)
    if hint is Any or not isinstance(hint, type):
        return True
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _find_class(name: Any) -> Any:
    """The configuration class called `module:Qualified.Name`, looked for inside this package only."""
    if not isinstance(name, str) or name.count(":") != 1:
        raise InputError(f"config type {brief(name)} is not of the form module:Class")
    module, _, qualname = name.partition(":")
    try:
        found: Any = importlib.import_module(f"allyouneed.{module}")
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        raise InputError(f"config type {brief(name)} is not one of this version of allyouneed") from None
    if not (isinstance(found, type) and issubclass(found, Config)):
        raise InputError(f"config type {brief(name)} is not a configuration")
    return found
