"""LoRA (Hu et al. 2021) on a whole module: to adapt it, to choose among its adapters, to merge them, to take them off.

What an adapted layer computes is said in `layers`, which layers a pattern means in `targets`; files are elsewhere
(`models.checkpoints.adapters`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from allyouneed.adapt.layers import Adapted, Lora, LoraEmbedding, LoraLinear, LowRank, Whole
from allyouneed.adapt.rows import Mix
from allyouneed.adapt.targets import find, is_linear, layers, shared
from allyouneed.core.errors import InputError, unknown
from allyouneed.core.seeds import generator

DEFAULT = "default"  # PEFT's name for the only adapter
LEFT_OUT = "left_out"  # the attribute that says which buffers of a part `freeze` left out of its state dict


def adapt(module: nn.Module, config: Lora.Config, name: str = DEFAULT, seed: int = 0) -> list[str]:
    """Freeze `module` and join its layers that `config.targets` mean by a new adapter, in place; the layers' names.

    The adapter is in use and alone is trained. The same seed draws the same matrices, whatever else is adapted.

    >>> adapt(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), Lora.Config(targets=("1",)))
    ['1']

    Raises:
        InputError: a target that matches nothing or a tied layer, or a name that is taken.
    """
    whole = find(module, config.whole) if config.whole else []
    found = [layer for layer in find(module, config.targets) if layer not in whole]
    attach(module, dict.fromkeys(found, config), whole, name, seed)
    return found


def attach(
    module: nn.Module,
    configs: Mapping[str, Lora.Config],
    whole: Iterable[str] = (),
    name: str = DEFAULT,
    seed: int = 0,
) -> None:
    """The same with a configuration of its own for each layer, by its name, and the names of those trained whole.

    Raises:
        InputError: as of `adapt`.
    """
    _check_unmerged(adapted(module))
    if name in names(module):
        raise InputError(f"adapter {name!r} is there already; choose another name")
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise InputError(f"adapter {name!r}: letters, digits and _ make a name, and it must be none of PyTorch's own")
    kinds = {layer: _kind(module, layer) for layer in configs} | dict.fromkeys(whole, Whole)
    if not kinds:
        raise InputError("nothing to adapt: the targets mean no layer of this module")
    tied = shared(module)
    for layer in kinds:
        if layer in tied:
            raise InputError(f"{layer} shares its tensor with {tied[layer]}: leave it out of the targets, or untie it")
        _check_kind(module, layer, kinds[layer])
    freeze(module)
    for layer, kind in kinds.items():
        config = configs.get(layer, Lora.Config())
        _wrapped(module, layer, kind).add(name, config, generator(seed, "lora", name, layer))
    use(module, {name: 1.0})


def freeze(module: nn.Module) -> None:
    """No gradients for what there is. What packed layers keep as buffers never changes, and is no part of the state
    dict until `unload`.
    """
    module.requires_grad_(False)
    for _, layer in layers(module):
        for part in (layer.base if isinstance(layer, Adapted) else layer).modules():
            hidden = part._non_persistent_buffers_set
            left_out = {key: x for key, x in part.named_buffers(recurse=False) if key not in hidden}
            for key, buffer in left_out.items():
                part.register_buffer(key, buffer, persistent=False)
            if left_out:
                part.__dict__[LEFT_OUT] = tuple(left_out)


def use(module: nn.Module, weights: Mapping[str, float]) -> None:
    """Add the adapters of these names, each times its weight, from now on; they are trained, the others are not.

    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> _ = adapt(model, Lora.Config(targets=("0",)), "one"), adapt(model, Lora.Config(targets=("0",)), "two")
    >>> use(model, {"one": 0.5, "two": 0.5})

    Raises:
        InputError: no such adapter, a weight that is not finite, or some are merged; nothing is changed then.
    """
    _choose(module, weights)
    for layer in adapted(module):
        for name, one in layer.adapters.items():
            one.requires_grad_(name in weights)


@contextmanager
def using(module: nn.Module, weights: Mapping[str, float]) -> Iterator[None]:
    """Within, these adapters are added instead of those in use; which are trained stays as it is."""
    before = [(layer, layer.weights) for layer in adapted(module)]
    _choose(module, weights)
    try:
        yield
    finally:
        for layer, was in before:
            layer.weights = was


def disabled(module: nn.Module) -> Any:
    """Within, no adapter is added: the module is what it was before, the reference of a policy.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> _ = adapt(model, Lora.Config(targets=("0",)))
    >>> with disabled(model):
    ...     model(torch.ones(1, 4)).shape
    torch.Size([1, 4])
    """
    return using(module, {})


def adapted(module: nn.Module) -> list[Adapted]:
    """The layers that have adapters."""
    return [part for part in module.modules() if isinstance(part, Adapted)]


def names(module: nn.Module) -> list[str]:
    """The adapters that any layer has."""
    return list(dict.fromkeys(name for layer in adapted(module) for name in layer.adapters))


def mix_of(module: object, name: str | None = None) -> Mix:
    """What joins a request's rows: the adapter of that name alone; None: those in use, of which merged ones are none.

    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> _ = adapt(model, Lora.Config(targets=("0",)), "one")
    >>> use(model, {"one": 0.5})
    >>> mix_of(model), mix_of(model, "one")
    ((('one', 0.5),), (('one', 1.0),))

    Raises:
        InputError: no such adapter, or some are merged.
    """
    parts = adapted(module) if isinstance(module, nn.Module) else []
    if name is None:
        used = {key: w for layer in parts if not layer.merged for key, w in layer.weights.items()}
        return tuple(used.items())
    if name not in (known := {key for layer in parts for key in layer.adapters}):
        raise unknown("adapter", name, known)
    _check_unmerged(parts)
    return ((name, 1.0),)


def parameters(module: nn.Module, name: str = DEFAULT) -> dict[str, nn.Parameter]:
    """The matrices of one adapter, by their names in `module`."""
    found = dict(module.named_parameters())
    return {key: p for key, p in found.items() if f".adapters.{name}." in key}


def merge(module: nn.Module) -> None:
    """Fold the adapters in use into the weights, so that they cost nothing (Hu et al. 2021, sec. 4.1), in place.

    Raises:
        InputError: they are merged already, or a base layer has no plain weight.
    """
    _check_unmerged(adapted(module))
    parts = {name: part for name, part in module.named_modules() if isinstance(part, Adapted)}
    for name, layer in parts.items():
        if isinstance(layer, LowRank) and not isinstance(getattr(layer.base, "weight", None), nn.Parameter):
            kind = type(layer.base).__name__
            raise InputError(f"{name}: a {kind} has no plain weight to merge into; load the model unpacked")
    for layer in parts.values():
        layer.fold(layer.weights, 1.0)
        layer.merged = dict(layer.weights)


def unmerge(module: nn.Module) -> None:
    """Take merged adapters out of the weights again, up to rounding."""
    for layer in adapted(module):
        layer.fold(layer.merged, -1.0)
        layer.merged = {}


def unload(module: nn.Module) -> nn.Module:
    """`module` without its adapters, in place; what was merged stays in the weights, which may be trained again."""
    for name, part in list(module.named_modules()):
        if isinstance(part, Adapted):
            module.set_submodule(name, part.base)
    for part in module.modules():
        for key in part.__dict__.pop(LEFT_OUT, ()):
            part.register_buffer(key, getattr(part, key))
    return module.requires_grad_(True)


def _choose(module: nn.Module, weights: Mapping[str, float]) -> None:
    _check_unmerged(adapted(module))
    known = names(module)
    for name in weights:
        if name not in known:
            raise unknown("adapter", name, known)
        if not math.isfinite(weights[name]):
            raise InputError(f"adapter {name!r}: weight={weights[name]}; a finite number is needed")
    found = [(layer, _those_of(layer, weights)) for layer in adapted(module)]
    for layer, those in found:  # all or none
        layer.weights = those


def _those_of(layer: Adapted, weights: Mapping[str, float]) -> dict[str, float]:
    """The weights of those adapters that a layer has."""
    chosen = {name: float(w) for name, w in weights.items() if name in layer.adapters}
    if isinstance(layer, Whole) and any(w != 1 for w in [*chosen.values(), max(1, len(chosen))]):
        raise InputError(f"adapters {', '.join(chosen)} bring whole layers, which cannot be weighed; use one alone")
    return chosen


def _check_unmerged(parts: Iterable[Adapted]) -> None:
    merged = next((layer.merged for layer in parts if layer.merged), None)
    if merged:
        raise InputError(f"adapter {', '.join(merged)} is merged; unmerge it first")


def _kind(module: nn.Module, name: str) -> type[Adapted]:
    """What a layer of low rank becomes."""
    layer = module.get_submodule(name)
    return LoraLinear if is_linear(layer) else LoraEmbedding


def _check_kind(module: nn.Module, name: str, kind: type[Adapted]) -> None:
    """Refuse a layer that is adapted the other way already, or has nothing to be trained whole."""
    layer = module.get_submodule(name)
    if kind is Whole and not any(True for _ in layer.parameters()):
        raise InputError(f"{name}: a {type(layer).__name__} has no weights that can be trained whole")
    if isinstance(layer, Adapted) and not isinstance(layer, kind):
        other = "whole" if isinstance(layer, Whole) else "by products of low rank"
        raise InputError(f"{name} is trained {other} by adapter {next(iter(layer.adapters))!r}; let all do the same")


def _wrapped(module: nn.Module, name: str, kind: type[Adapted]) -> Adapted:
    """The layer of that name, made one that takes adapters where it is none yet."""
    layer = module.get_submodule(name)
    if isinstance(layer, Adapted):
        return layer
    made = kind(layer)
    module.set_submodule(name, made)
    return made
