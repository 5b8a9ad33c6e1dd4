"""Which layers of a module a pattern means, as PEFT reads patterns, and which of them are somebody else's too.

Knows linear layers and tables by what they have, so that packed and quantised ones are meant as plain ones are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from allyouneed.core.errors import InputError, brief, unknown
from allyouneed.nn.moe import StackedLinear
from allyouneed.nn.quantised import QuantisedWeight

ALL_LINEAR = "all-linear"
HEADS = ("head", "layer")  # a language model's (`models.decoder`) and that of labels (`models.heads`)
Targets = tuple[str, ...] | str


def is_linear(part: nn.Module) -> bool:
    """Whether it maps (…, in_features) to (…, out_features), however its weights are stored.

    >>> is_linear(nn.Linear(2, 3)), is_linear(nn.Embedding(2, 3))
    (True, False)
    """
    return hasattr(part, "in_features") and hasattr(part, "out_features") and not isinstance(part, StackedLinear)


def is_table(part: nn.Module) -> bool:
    """Whether it maps ids to rows, however these are stored."""
    return hasattr(part, "num_embeddings") and hasattr(part, "embedding_dim")


def layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Linear layers, tables and what has adapters, with their names; what these are made of is not looked at."""
    for name, part in module.named_children():
        if is_linear(part) or is_table(part) or hasattr(part, "adapters"):
            yield prefix + name, part
        else:
            yield from layers(part, f"{prefix}{name}.")


def matches(name: str, targets: Targets) -> bool:
    """Whether a module's name is meant: by one of several suffixes of whole parts of it, or by a regex as a whole.

    >>> matches("blocks.0.mixer.q", ("q", "v")), matches("blocks.0.mixer.q", r"blocks\\.\\d+\\.mixer\\.[qk]")
    (True, True)
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def find(module: nn.Module, targets: Targets) -> list[str]:
    """The names of the layers that `targets` mean: `ALL_LINEAR` all linear ones but the head.

    >>> find(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), ("2",))
    ['2']

    Raises:
        InputError: a pattern that means no layer.
    """
    known = dict(layers(module))
    if targets == ALL_LINEAR:
        return [name for name, part in known.items() if is_linear(part) and name.split(".")[-1] not in HEADS]
    patterns: list[Targets] = [targets] if isinstance(targets, str) else [(target,) for target in targets]
    if not patterns:
        raise InputError("targets=(); name at least one layer to adapt")
    for pattern in patterns:
        if not any(_meant(name, pattern) for name in known):
            endings = [name.split(".")[-1] for name in known]
            raise unknown("target (it matches no linear layer or embedding)", "".join(pattern), endings)
    return [name for name in known if matches(name, targets)]


def shared(module: nn.Module) -> dict[str, str]:
    """The layers whose weight is another's too, each with the name of one such: a tied head and its embedding, however
    these are stored.
    """
    owners: dict[int, list[str]] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        layer = name.rpartition(".")[0] if isinstance(part, QuantisedWeight) else name
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            owners.setdefault(tensor.data_ptr() or id(tensor), []).append(layer)  # outlines have no memory
    found = {name: names[i - 1] for names in owners.values() if len(names) > 1 for i, name in enumerate(names)}
    for name, part in module.named_modules():
        found |= {f"{name}.{layer}".lstrip("."): "the head" for layer in getattr(part, "borrowed", ())}
    return found


def _meant(name: str, pattern: Targets) -> bool:
    try:
        return matches(name, pattern)
    except re.error as error:
        raise InputError(f"target {brief(pattern)} is no regular expression: {error}") from None
