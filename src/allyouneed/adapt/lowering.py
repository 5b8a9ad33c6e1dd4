"""Adapted linear layers as records of a native program: the frozen weight, and what each adapter adds to its rows.

Adapted tables have none. Scales are multiplied into copies: what is written into an adapter is seen by a new program
only. Imported for its entries in the table of `nn.lowering`.
"""

from __future__ import annotations

from dataclasses import replace

from allyouneed.adapt.layers import Lora, LoraLinear
from allyouneed.nn.lowering import lower, lowers
from allyouneed.nn.program import Pair, Weight


@lowers(Lora)
def _lora(part: Lora, name: str) -> Pair:
    return Pair(name, part.A.detach(), part.B.detach() * part.scale)


@lowers(LoraLinear)
def _lora_linear(layer: LoraLinear) -> Weight:
    weight: Weight = lower(layer.base)
    if layer.merged:
        return weight
    return replace(weight, adapters=tuple(lower(part, name) for name, part in layer.adapters.items()))
