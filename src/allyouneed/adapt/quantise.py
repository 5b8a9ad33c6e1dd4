"""Quantisation (Dettmers et al. 2023): a module's linear layers, and its embedding where that is asked for, stored in 4
or 8 bits, in place. How numbers are stored is `nn.blockwise`'s, how they are computed with `nn.quantised`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar, cast

from torch import Tensor, nn

from allyouneed import core
from allyouneed.adapt.targets import ALL_LINEAR, Targets, find, is_linear, is_table, layers, shared
from allyouneed.core.errors import InputError, about
from allyouneed.core.outline import outlined
from allyouneed.nn.blockwise import blockwise, check
from allyouneed.nn.packed import PackedEmbedding, PackedLinear
from allyouneed.nn.quantised import QuantisedEmbedding, QuantisedLinear, QuantisedWeight

Module = TypeVar("Module", bound=nn.Module)


class Quantise(core.Configured):
    """Stores single layers as its configuration says.

    >>> Quantise.Config(kind="int8").build().linear(nn.Linear(64, 3)).weight
    QuantisedWeight((3, 64), int8, block=64, double=True)
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`kind` as `nn.blockwise.blockwise` has them; `embedding` another one, in which the embedding and a head tied
        to it are stored as well. The paper leaves them as they are: few of a large model's numbers, 21 % of SmolLM2's.
        """

        kind: str = "nf4"
        block: int = 64  # sec. 3
        double: bool = True  # scales in 8 bits
        embedding: str | None = None

        def __post_init__(self) -> None:
            for kind in (self.kind, self.embedding or self.kind):
                check(kind, self.block)

    def __init__(self, config: Config) -> None:
        self.config = config

    def linear(self, layer: nn.Linear | PackedLinear) -> QuantisedLinear:
        """A linear layer with its weight stored so."""
        bias = None if layer.bias is None else layer.bias.detach()
        return QuantisedLinear(self.weight(layer, self.config.kind), bias)

    def weight(self, layer: nn.Module, kind: str) -> QuantisedWeight:
        """A layer's or table's weight, stored in `kind`."""
        packed = isinstance(layer, PackedLinear | PackedEmbedding)
        plain = layer.dequantised() if packed else layer.weight  # type: ignore[operator]
        return QuantisedWeight(blockwise(cast(Tensor, plain), kind, self.config.block, double=self.config.double))


def quantise(module: nn.Module, config: Quantise.Config, targets: Targets = ALL_LINEAR) -> list[str]:
    """Store the linear layers that `targets` mean in few bits and freeze them, in place; their names.

    Layers that are packed already are unpacked for it one at a time. Nothing else of the module changes.

    Raises:
        InputError: a target that matches nothing, no linear layer, or one that is tied or stored so already; weights
            that are not finite.

    >>> quantise(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)), Quantise.Config(), targets=("0",))
    ['0']
    """
    if any(hasattr(layer, "adapters") for _, layer in layers(module)):
        raise InputError("adapters are joined to the module; quantise it first, or unload them")
    part, tied = config.build(), shared(module)
    found = find(module, targets)
    for name in found:
        layer = module.get_submodule(name)
        if not isinstance(layer, nn.Linear | PackedLinear):
            raise InputError(f"{name}: a {type(layer).__name__} cannot be quantised; choose other targets")
        if name in tied:
            raise InputError(f"{name} shares its tensor with {tied[name]}: leave it out of the targets")
        with about(name):
            module.set_submodule(name, part.linear(layer))
    if config.embedding is not None:
        found += list(_tables(module, part, config.embedding))
    if not found:
        raise InputError("nothing to quantise: the module has no linear layer but a head")
    return found


def dequantise(module: Module) -> Module:
    """`module` with plain layers in place of those stored in few bits, their numbers as they are; frozen.

    >>> layers = nn.Sequential(nn.Linear(64, 2), nn.Linear(2, 2))
    >>> _ = quantise(layers, Quantise.Config(), targets=("0",))
    >>> dequantise(layers)[0]
    Linear(in_features=64, out_features=2, bias=True)
    """
    plain: dict[int | None, nn.Parameter] = {}  # tied ones stay so
    for name, part in list(module.named_modules()):
        if not isinstance(part, QuantisedLinear | QuantisedEmbedding | PackedLinear | PackedEmbedding):
            continue
        if (place := _place(part)) not in plain:
            stored = part if isinstance(part, PackedLinear | PackedEmbedding) else part.weight
            plain[place] = nn.Parameter(stored.dequantised(), requires_grad=False)
        module.set_submodule(name, _plain(part, plain[place]))
    return module


def fitted(module: nn.Module, config: Quantise.Config) -> Quantise.Config:
    """`config` without its kind for the embedding where that is stored in few bits already, or its rows are of no whole
    blocks.

    >>> fitted(nn.ModuleDict({"embedding": nn.Embedding(5, 8)}), Quantise.Config(embedding="int8")).embedding is None
    True
    """
    tables = [table for name, table in layers(module) if _is_embedding(name, table)]
    fit = all(isinstance(table, nn.Embedding) and table.embedding_dim % config.block == 0 for table in tables)
    return config if fit else config.replace(embedding=None)


def stored(module: nn.Module) -> int:
    """How many numbers are stored in few bits, which are no parameters any more."""
    return sum(part.shape.numel() for part in module.modules() if isinstance(part, QuantisedWeight))


def resident(module: nn.Module) -> int:
    """Bytes of the parameters and buffers of `module`, what is shared counted once.

    >>> resident(nn.Linear(8, 2, bias=False))
    64
    """
    return sum(x.nbytes for x in (*module.parameters(), *module.buffers()))


def _tables(module: nn.Module, part: Quantise, kind: str) -> Iterator[str]:
    """Store token embeddings, and heads tied to them, in `kind`; their names."""
    known = list(layers(module))
    for name, table in known:
        if not _is_embedding(name, table):
            continue
        if not isinstance(table, nn.Embedding | PackedEmbedding):
            raise InputError(f"{name}: a {type(table).__name__} cannot be quantised; leave embedding={kind} out")
        with about(name):
            weight = part.weight(table, kind)
            made = QuantisedEmbedding(weight)
        tied = [(other, layer) for other, layer in known if is_linear(layer) and _place(layer) == _place(table)]
        module.set_submodule(name, made)
        for other, layer in tied:
            module.set_submodule(other, QuantisedLinear(weight, layer.bias))  # type: ignore[arg-type]
        yield from (name, *(other for other, _ in tied))


def _is_embedding(name: str, layer: nn.Module) -> bool:
    """Whether it is a table of tokens."""
    return is_table(layer) and f".{name}".endswith(".embedding") and "positions" not in name


def _plain(part: nn.Module, weight: nn.Parameter) -> nn.Module:
    with outlined():
        layer: nn.Module = nn.Embedding(*weight.shape)
        if isinstance(part, QuantisedLinear | PackedLinear):
            layer = nn.Linear(part.in_features, part.out_features, bias=part.bias is not None)
    layer.weight = weight
    if isinstance(part, QuantisedLinear | PackedLinear) and part.bias is not None:
        layer.bias = nn.Parameter(part.bias, requires_grad=False)
    return layer.train(part.training)


def _place(layer: nn.Module) -> int | None:
    """Where a layer's or table's weight lies in memory."""
    weight = layer.blocks if isinstance(layer, PackedLinear | PackedEmbedding) else layer.weight
    weight = weight.codes if isinstance(weight, QuantisedWeight) else weight
    return weight.data_ptr() if isinstance(weight, Tensor) else None
