"""The named architectures, found among the modules of this room, and what their configurations say of their parts.

A module names an architecture by a table `SIZES` and a function `sized`, by a function `published` where names need
more than that, or else by a small `EXAMPLE`, which every family of checkpoints has. Nothing is registered twice.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from allyouneed import models
from allyouneed.core.config import Config

Path = tuple[
    str, ...
]  # where something stands in a configuration: ("decoder", "blocks", "mixer"), or ("blocks", "1", "mixer")

_BESIDE = ("initialise", "eps", "kernel")  # and every dropout: not what an architecture is known by
_ALWAYS = ("tied", "activation")  # is said even where it is the default
_SIZES = ("vocab_size", "context", "dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_dim")


@dataclass(frozen=True)
class Architecture:
    """A named architecture: what its module says of it, and its sizes by name; one without a name is an example."""

    module: str
    title: str
    words: str
    year: int
    sizes: Mapping[str, Config]


def architectures() -> list[Architecture]:
    """All of them, the oldest first.

    >>> [found.title for found in architectures()][:3]
    ['The recurrent language model', 'The translator before the Transformer', 'The Transformer']
    """
    modules = (importlib.import_module(f"{models.__name__}.{m.name}") for m in pkgutil.iter_modules(models.__path__))
    found = [_architecture(module) for module in modules if _sizes(module)]
    return sorted(found, key=lambda one: (one.year, one.module))


def parts(config: Config, at: Path = ()) -> Iterator[tuple[Path, str]]:
    """Every part and where it stands, a parent before its children.

    >>> from allyouneed.models import gpt2
    >>> [(".".join(path), name) for path, name in parts(gpt2.sized())][:4]
    [('', 'Decoder'), ('blocks', 'Block'), ('blocks.mixer', 'Attention'), ('blocks.channel', 'MLP')]
    """
    yield at, name_of(config)
    for path, child in _children(config, at):
        yield from parts(child, path)


def facts(config: Config, at: Path = ()) -> dict[Path, Any]:
    """Every number, name and choice and where it stands, without what only training looks at."""
    found = {(*at, name): value for name, value in _own_facts(config).items()}
    for path, child in _children(config, at):
        found |= facts(child, path)
    return found


def sizes_in(configs: Mapping[str, Config]) -> dict[str, dict[str, Any]]:
    """What sets sizes of one architecture apart, and how large they are: per name a row of numbers.

    A number that stands in several places has one column if it is the same in all of them.
    """
    known = {name: facts(config) for name, config in configs.items()}
    rows: dict[str, dict[str, Any]] = {name: {} for name in configs}
    for path in sized_facts(configs):
        alike = [other for other in next(iter(known.values())) if other[-1] == path[-1]]
        same = all(len({found[other] for other in alike}) == 1 for found in known.values())
        column = path[-1] if same else ".".join(path)
        if any(found[path] is not None for found in known.values()):
            for name, found in known.items():
                rows[name][column] = found[path]
    for name, config in configs.items():
        rows[name]["parameters"] = config.num_parameters()  # type: ignore[attr-defined]
    return rows


def sized_facts(configs: Mapping[str, Config]) -> list[Path]:
    """Where the facts stand that are sizes: by their name, or because they differ among `configs`."""
    every = [facts(config) for config in configs.values()]
    return [path for path in every[0] if path[-1] in _SIZES or any(one[path] != every[0][path] for one in every)]


def by_parts(configs: Mapping[str, Config]) -> list[dict[str, Config]]:
    """The sizes that are made of the same parts together."""
    groups: dict[Any, dict[str, Config]] = {}
    for name, config in configs.items():
        groups.setdefault(tuple(parts(config)), {})[name] = config
    return list(groups.values())


def outline(config: Config, hidden: Sequence[Path] = (), name: str = "", at: Path = ()) -> list[str]:
    """The configuration as one writes it, a part a line; of facts those that are not `hidden` and no defaults.

    >>> from allyouneed.models import t5
    >>> print(*outline(t5.EXAMPLE.encoder.blocks[0].channel))
    MLP(hidden_dim=33, activation=relu, bias=False),
    """
    said = _said(config, hidden, at)
    inner = [
        line for path, child in _children(config, at) for line in outline(child, hidden, _place(path[len(at) :]), path)
    ]
    head = f"{name}{name_of(config)}("
    if not inner:
        return [f"{head}{', '.join(said)}),"]
    return [head, *(f"  {line}" for line in [*(f"{one}," for one in said), *inner]), "),"]


def name_of(config: Config) -> str:
    """The part that a configuration builds, or its own name where it is the part."""
    return type(config).__name__ if config.owner is None else config.owner.__name__


def _architecture(module: ModuleType) -> Architecture:
    words = " ".join((module.__doc__ or "").split("\n\n")[0].split())
    title = re.split(r" of (?=\d{4})| \(|[:,.]", words)[0]
    years = re.findall(r"\b(?:19|20)\d\d\b", module.__doc__ or "")
    assert years, f"{module.__name__}: the docstring names no paper by its year"
    return Architecture(module.__name__.rpartition(".")[2], title, words, int(years[0]), _sizes(module))


def _sizes(module: ModuleType) -> dict[str, Config]:
    if hasattr(module, "published"):
        return dict(module.published())
    if hasattr(module, "SIZES"):
        return {name: module.sized(name) for name in module.SIZES}
    return {"": module.EXAMPLE} if hasattr(module, "EXAMPLE") else {}


def _said(config: Config, hidden: Sequence[Path], at: Path) -> list[str]:
    default = {field.name: field.default for field in dataclasses.fields(config)}
    shown = {key: value for key, value in _own_facts(config).items() if (*at, key) not in hidden}
    return [f"{key}={value}" for key, value in shown.items() if value != default[key] or key in _ALWAYS]


def _place(path: Path) -> str:
    """`mixer=`, or `blocks[1]=` of several."""
    return f"{path[0]}[{path[1]}]=" if len(path) > 1 else f"{path[0]}="


def _children(config: Config, at: Path) -> Iterator[tuple[Path, Config]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in _BESIDE:
            continue
        if isinstance(value, Config):
            yield (*at, field.name), value
        elif isinstance(value, tuple):
            held = [one for one in value if isinstance(one, Config)]
            numbers = [(str(i),) for i in range(len(held))] if len(held) > 1 else [()]
            yield from (((*at, field.name, *number), one) for number, one in zip(numbers, held, strict=False))


def _own_facts(config: Config) -> dict[str, Any]:
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {
        name: _by_dim(value, values.get("dim") or getattr(values.get("decoder"), "dim", None))
        for name, value in values.items()
        if not isinstance(value, Config | tuple) and name not in _BESIDE and not name.endswith("dropout")
    }


def _by_dim(value: Any, dim: int | None) -> Any:
    """The scale √dim or 1/√dim by that name, since it differs from size to size and says the same."""
    return {dim**0.5: "√dim", dim**-0.5: "1/√dim"}.get(value, value) if dim and isinstance(value, float) else value
