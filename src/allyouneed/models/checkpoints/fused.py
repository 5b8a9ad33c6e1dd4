"""Layers of `transformers` and what they are of ours, which may be several: how products of low rank go both ways.

An adapter of a fused layer becomes one of each of ours: A the same, B divided as the weight is. The other way round the
A of ours are stacked, equal ones once, and each B has its rows and its columns, zeros elsewhere; where a file shows
such zeros, each of ours takes its own columns back. Knows no file.

Shapes: N outputs, K inputs, r = rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from allyouneed.adapt.layers import Adapted, Lora
from allyouneed.adapt.targets import is_linear, is_table
from allyouneed.models.checkpoints import huggingface
from allyouneed.models.checkpoints.names import Rule, expand, same

IN_MEMORY = {"embed_out": "lm_head"}  # GPT-NeoX's head: what files call it, and what transformers 5 does


@dataclass(frozen=True)
class Place:
    """One layer of theirs and the ones of ours that it is; `rule` ties their weights."""

    theirs: str
    ours: tuple[str, ...]
    rule: Rule
    transposed: bool  # theirs holds its matrix input × output
    bias: Rule | None = None  # ties their biases, where theirs has one

    def split(self, B: Tensor) -> Sequence[Tensor]:
        """Their B (N, r) as ours, each with the rows of its layer."""
        return self.rule.split(B.t() if self.transposed else B)

    def join(self, Bs: Sequence[Tensor]) -> Tensor:
        """Ours, all with the same columns, as theirs."""
        joined = self.rule.join(Bs)
        return (joined.t() if self.transposed else joined).contiguous()

    def whole(self, ours: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Their weight and bias from those of each of ours."""
        keys = {key: rule for key, rule in self._rules() if key in ours[0]}
        return {key: rule.join([one[key].detach() for one in ours]).contiguous() for key, rule in keys.items()}

    def parts(self, theirs: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Weight and bias of each of ours, by its name, from theirs."""
        found: dict[str, dict[str, Tensor]] = {name: {} for name in self.ours}
        for key, rule in self._rules():
            for name, part in zip(self.ours, rule.split(theirs[key]) if key in theirs else (), strict=key in theirs):
                found[name][key] = part
        return found

    def _rules(self) -> list[tuple[str, Rule]]:
        return [("weight", self.rule), *([("bias", self.bias)] if self.bias else [])]


def places(module: Any) -> dict[str, Place]:
    """The layers of a model by their names in `transformers`, or by our own where it has no such model."""
    held = {name: part for name, part in module.named_modules() if _adaptable(part)}
    family = huggingface.fitting(module.config)
    if family is None:
        rules = [same(f"{name}.{key}", f"{name}.{key}") for name in held for key in ("weight", "bias")]
    else:
        rules = list(expand(family.rules(module.config), module.config.layers))
    return {place.theirs: place for place in _places(rules, held)}


def fuse(place: Place, layers: Sequence[nn.Module], name: str) -> tuple[Tensor, Tensor, Lora.Config]:
    """A (r, K), B (N, r) and the configuration of their layer, from the `layers` of ours that have the adapter."""
    pairs: list[Lora | None] = [_pair(layer, name) for layer in layers]
    known = [pair for pair in pairs if pair is not None]
    first = known[0]
    if len(layers) == 1:
        return first.A.detach(), first.B.detach(), first.config
    distinct = _distinct([pair.A.detach() for pair in known])
    rank = sum(map(len, distinct))
    Bs = [first.B.new_zeros(int(layer.out_features), rank) for layer in layers]  # type: ignore[arg-type]
    for B, pair in zip(Bs, pairs, strict=True):
        if pair is not None:
            start = _start(pair.A, distinct) or 0
            B[:, start : start + len(pair.A)] = pair.B.detach() * (pair.scale / first.scale)
    return torch.cat(distinct), place.join(Bs), of_scale(first.scale, rank, first.config)


def divide(
    place: Place, A: Tensor, B: Tensor, config: Lora.Config
) -> Iterator[tuple[str, Tensor, Tensor, Lora.Config]]:
    """Name, A, B and configuration for each of ours that has columns of B, or could have those that are zero in all:
    such a part was not trained yet.
    """
    if len(place.ours) == 1:
        yield place.ours[0], A, B, config
        return
    parts = [part.contiguous() for part in place.split(B)]
    columns = [part.any(0) for part in parts]
    nobodys = ~torch.stack(columns).any(0)
    for name, part, its in zip(place.ours, parts, columns, strict=True):
        used = its if its.any() else nobodys
        if used.any():
            yield name, A[used], part[:, used], of_scale(config.scale, int(used.sum()), config)


def of_scale(scale: float, rank: int, like: Lora.Config) -> Lora.Config:
    """A configuration of that rank whose s is `scale`, else like another one.

    >>> of_scale(2.0, 4, Lora.Config(rank=2, alpha=4)).alpha
    8.0
    """
    return like.replace(rank=rank, alpha=scale * (rank**0.5 if like.rslora else rank))


def _places(rules: Sequence[Rule], held: Mapping[str, nn.Module]) -> Iterator[Place]:
    """The rules whose tensors are the weights of `held` layers."""
    biases = {rule.theirs: rule for rule in rules}
    for rule in rules:
        ours = tuple(name.removesuffix(".weight") for name in rule.ours)
        if rule.theirs.endswith(".weight") and all(name in held for name in ours) and not rule.again:
            theirs = rule.theirs.removesuffix(".weight")
            columns = [torch.empty(_outputs(held[name]), 1) for name in ours]
            yield Place(
                IN_MEMORY.get(theirs, theirs),
                ours,
                rule,
                rule.join(columns).shape[0] == 1,
                biases.get(f"{theirs}.bias"),
            )


def _outputs(part: Any) -> int:
    """Rows of a layer's weight."""
    base = part.base if isinstance(part, Adapted) else part
    rows: Any = base.out_features if is_linear(base) else base.num_embeddings
    return int(rows)


def _adaptable(part: nn.Module) -> bool:
    return isinstance(part, Adapted) or is_linear(part) or is_table(part)


def _pair(layer: nn.Module, name: str) -> Lora | None:
    found = layer.adapters[name] if isinstance(layer, Adapted) and name in layer.adapters else None
    assert found is None or isinstance(found, Lora)
    return found


def _distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each of the tensors once."""
    found: list[Tensor] = []
    for one in tensors:
        if _start(one, found) is None:
            found.append(one)
    return found


def _start(tensor: Tensor, among: Sequence[Tensor]) -> int | None:
    """The first row of `tensor` where those `among` which it is are stacked; None: it is none of them."""
    start = 0
    for other in among:
        if tensor.shape == other.shape and torch.equal(tensor, other):
            return start
        start += len(other)
    return None
