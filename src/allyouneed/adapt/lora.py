"""LoRA (Hu et al. 2021): layers whose frozen weight W is joined by trained products of low rank, W + s·BA.

Holds the pair of matrices, the layers around a base layer that hold several of them by name, and what is done with a
whole module: to adapt it, to choose among its adapters, to merge them. Files are elsewhere
(`models.checkpoints.adapters`); which layers a pattern means is said by `targets`.

Shapes: N outputs, K inputs, r = rank, V rows of a table, D numbers in a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allyouneed import core
from allyouneed.adapt.rows import Mix, current
from allyouneed.adapt.targets import Targets, find, is_linear, is_table, layers, shared
from allyouneed.core.errors import InputError, unknown
from allyouneed.core.seeds import generator

DEFAULT = "default"  # PEFT's name for the only adapter


class Lora(core.Configured, nn.Module):
    """ΔW x = s·B(Ax), A (r, K) random and B (N, r) zero at first, so that nothing changes before training
    (Hu et al. 2021, eq. 3).

    >>> Lora.Config(rank=2).build(8, 4)(torch.ones(3, 8)).abs().max().item()
    0.0
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`alpha` None: the rank, by which s = 1, or √r with `rslora`. `targets` are suffixes of layers' names, a regex
        for whole names, or "all-linear": all but the head.
        """

        rank: int = 8
        alpha: float | None = None
        dropout: float = 0.0  # of the input of A
        rslora: bool = False  # s = α/√r (Kalajdzievski 2023) instead of α/r
        targets: Targets = ("q", "v")  # sec. 7.1

        def __post_init__(self) -> None:
            if self.rank < 1:
                raise InputError(f"rank={self.rank}; it must be 1 or more")
            if self.alpha is not None and not 0 < self.alpha < math.inf:
                raise InputError(f"alpha={self.alpha}; it must be above 0")
            if not 0 <= self.dropout < 1:
                raise InputError(f"dropout={self.dropout}; from 0 to below 1")

        @property
        def scale(self) -> float:
            """s."""
            alpha = self.rank if self.alpha is None else self.alpha
            return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def __init__(
        self, config: Config, inputs: int, outputs: int, *, device: Any = None, draw: torch.Generator | None = None
    ) -> None:
        """`draw` is where A comes from; None: torch's own generator."""
        super().__init__()
        self.config, self.scale = config, config.scale
        self.A = nn.Parameter(torch.empty(config.rank, inputs, device=device))
        self.B = nn.Parameter(torch.empty(outputs, config.rank, device=device))
        self.begin(draw)

    @torch.no_grad()
    def begin(self, draw: torch.Generator | None) -> None:
        """A uniform within ±1/√K, as the authors' code has it; B zero."""
        bound = self.A.shape[1] ** -0.5
        self.A.copy_(torch.rand(self.A.shape, generator=draw) * (2 * bound) - bound)
        self.B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) -> (…, N), in float32 whatever x is."""
        x = F.dropout(x.to(self.A.dtype), self.config.dropout, self.training)
        return F.linear(F.linear(x, self.A), self.B) * self.scale

    def delta(self) -> Tensor:
        """ΔW as it stands in the layer's weight: (N, K)."""
        return self.B @ self.A * self.scale


class LoraRows(Lora):
    """ΔW of a table: row i is s·B A[:, i]; A (r, V) zero and B (D, r) random at first, as PEFT has them.

    >>> LoraRows(Lora.Config(rank=2), 9, 4)(torch.tensor([[8, 0]])).shape
    torch.Size([1, 2, 4])
    """

    @torch.no_grad()
    def begin(self, draw: torch.Generator | None) -> None:
        """A zero, B N(0, 1)."""
        self.A.zero_()
        self.B.copy_(torch.randn(self.B.shape, generator=draw))

    def forward(self, ids: Tensor) -> Tensor:
        """(…) integers -> (…, D)."""
        return F.linear(F.embedding(ids, self.A.t()), self.B) * self.scale

    def delta(self) -> Tensor:
        """(V, D)."""
        return (self.B @ self.A).t() * self.scale


class Adapted(nn.Module):
    """A frozen base layer and its adapters by name; `weights` says how much of each is added, `merged` how much of each
    is in the base's weight already.
    """

    kind: type[Lora]

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.adapters = base, nn.ModuleDict()
        self.weights: dict[str, float] = {}
        self.merged: dict[str, float] = {}

    @property
    def sizes(self) -> tuple[int, int]:
        """K and N, of a table V and D."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """What the base gives, and what the chosen adapters add to it: to all of it, or to each row its own."""
        y: Tensor = self.base(x)
        if (by_row := current()) is not None:
            return y if self.merged else by_row.join(y, x, dict(self.adapters.items()))
        for name, weight in {} if self.merged else self.weights.items():
            y = y + weight * self.adapters[name](x).to(y.dtype)
        return y

    def add(self, name: str, config: Lora.Config, draw: torch.Generator | None = None) -> Lora:
        """A new adapter, not in use yet."""
        device = next((x.device for x in (*self.base.parameters(), *self.base.buffers())), None)
        made = self.kind(config, *self.sizes, device=device, draw=draw)
        self.adapters[name] = made
        return made

    @torch.no_grad()
    def fold(self, weights: Mapping[str, float], sign: float) -> None:
        """Add the adapters to the base's weight, or take them out, `sign` being −1."""
        for name, weight in weights.items():
            delta = self.adapters[name].delta()  # type: ignore[operator]
            self.base.weight += (sign * weight * delta).to(self.base.weight.dtype)  # type: ignore[operator, union-attr]


class LoraLinear(Adapted):
    """Wx + b + Σ w·s·BAx over the adapters in use; `base` is any layer with `in_features` and `out_features`.

    >>> layer = LoraLinear(nn.Linear(8, 4))
    >>> _ = layer.add("default", Lora.Config(rank=2))
    >>> torch.equal(layer(torch.ones(1, 8)), layer.base(torch.ones(1, 8)))
    True
    """

    kind = Lora

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        self.in_features: int = base.in_features
        self.out_features: int = base.out_features

    @property
    def sizes(self) -> tuple[int, int]:
        """K and N."""
        return self.in_features, self.out_features


class LoraEmbedding(Adapted):
    """The rows of a table and what the adapters in use add to them.

    >>> layer = LoraEmbedding(nn.Embedding(9, 4))
    >>> _ = layer.add("default", Lora.Config(rank=2))
    >>> layer(torch.tensor([3])).shape
    torch.Size([1, 4])
    """

    kind = LoraRows

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        self.num_embeddings: int = base.num_embeddings
        self.embedding_dim: int = base.embedding_dim

    @property
    def sizes(self) -> tuple[int, int]:
        """V and D."""
        return self.num_embeddings, self.embedding_dim


def adapt(module: nn.Module, config: Lora.Config, name: str = DEFAULT, seed: int = 0) -> list[str]:
    """Freeze `module` and join its layers that `config.targets` mean by a new adapter, in place; the layers' names.

    The adapter is in use and alone is trained. The same seed draws the same matrices, whatever else is adapted.

    >>> adapt(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), Lora.Config(targets=("1",)))
    ['1']

    Raises:
        InputError: a target that matches nothing or a tied layer, or a name that is taken.
    """
    found = find(module, config.targets)
    attach(module, dict.fromkeys(found, config), name, seed)
    return found


def attach(module: nn.Module, configs: Mapping[str, Lora.Config], name: str = DEFAULT, seed: int = 0) -> None:
    """The same with a configuration of its own for each layer, by its name.

    Raises:
        InputError: as of `adapt`.
    """
    _check_unmerged(module)
    if name in names(module):
        raise InputError(f"adapter {name!r} is there already; choose another name")
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise InputError(f"adapter {name!r}: letters, digits and _ make a name, and it must be none of PyTorch's own")
    tied = shared(module)
    for layer in configs:
        if layer in tied:
            raise InputError(f"{layer} shares its tensor with {tied[layer]}: leave it out of the targets, or untie it")
    freeze(module)
    for layer, config in configs.items():
        _wrapped(module, layer).add(name, config, generator(seed, "lora", name, layer))
    use(module, {name: 1.0})


def freeze(module: nn.Module) -> None:
    """No gradients for what there is. What packed layers keep as buffers is no part of the state dict from then on, as
    it never changes.
    """
    module.requires_grad_(False)
    for _, layer in layers(module):
        for part in layer.modules():
            for key, buffer in list(part.named_buffers(recurse=False)):
                part.register_buffer(key, buffer, persistent=False)


def use(module: nn.Module, weights: Mapping[str, float]) -> None:
    """Add the adapters of these names, each times its weight, from now on; they are trained, the others are not.

    Raises:
        InputError: no such adapter, or some are merged.
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

    Raises:
        InputError: no such adapter, or some are merged.
    """
    layers = adapted(module) if isinstance(module, nn.Module) else []
    if name is None:
        used = {key: w for layer in layers if not layer.merged for key, w in layer.weights.items()}
        return tuple(used.items())
    if name not in (known := {key for layer in layers for key in layer.adapters}):
        raise unknown("adapter", name, known)
    _check_unmerged(module)
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
    _check_unmerged(module)
    parts = {name: part for name, part in module.named_modules() if isinstance(part, Adapted)}
    for name, layer in parts.items():
        if not isinstance(getattr(layer.base, "weight", None), nn.Parameter):
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
    """`module` without its adapters, in place; what was merged stays in the weights."""
    for name, part in list(module.named_modules()):
        if isinstance(part, Adapted):
            module.set_submodule(name, part.base)
    return module


def _choose(module: nn.Module, weights: Mapping[str, float]) -> None:
    _check_unmerged(module)
    known = names(module)
    for name in weights:
        if name not in known:
            raise unknown("adapter", name, known)
    for layer in adapted(module):
        layer.weights = {name: float(w) for name, w in weights.items() if name in layer.adapters}


def _check_unmerged(module: nn.Module) -> None:
    merged = next((layer.merged for layer in adapted(module) if layer.merged), None)
    if merged:
        raise InputError(f"adapter {', '.join(merged)} is merged; unmerge it first")


def _wrapped(module: nn.Module, name: str) -> Adapted:
    """The layer of that name, made one that takes adapters where it is none yet."""
    layer = module.get_submodule(name)
    if isinstance(layer, Adapted):
        return layer
    assert is_linear(layer) or is_table(layer), f"{name} is no layer to adapt"
    made: Adapted = (LoraLinear if is_linear(layer) else LoraEmbedding)(layer)
    made.train(module.training)
    module.set_submodule(name, made)
    return made
