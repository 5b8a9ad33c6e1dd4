"""Float weights packed into GGUF's blocks of 8 or 4 bits, which the native kernels compute with: for serving.

Quantised storage that adapters are trained over is in `adapt.quantise`.
"""

from __future__ import annotations

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor, nn

from allyouneed.core.errors import InputError, about, unknown
from allyouneed.nn.moe import StackedLinear
from allyouneed.nn.packed import STEP, PackedEmbedding, PackedLinear, shared
from allyouneed.nn.quantised import QuantisedWeight

KINDS = {"int8": Kind.Q8_0, "int4": Kind.Q4_1}  # 8.5 and 5 bits a weight, scales and minima of 32 included
WIDE = Kind.Q8_0  # of tables and of heads tied to them, as llama.cpp keeps them: their errors meet every token


def pack(module: nn.Module, kind: str) -> list[str]:
    """Linear layers and tables of `module` in blocks, in place, the rest in float32; the names of the layers that stay
    as they are, since their rows are no whole blocks or they are all experts' in one.

    Args:
        module: one with plain weights, in evaluation mode.
        kind: one of `KINDS`.

    Raises:
        InputError: an unknown kind, weights that are packed or quantised already, that are not finite, or none that
            could be.

    >>> model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 3))
    >>> pack(model, "int8"), type(model[0]).__name__
    (['1'], 'PackedLinear')
    """
    if kind not in KINDS:
        raise unknown("kind of packed weights", kind, KINDS)
    packed = next((part.kind for part in module.modules() if isinstance(part, PackedLinear | PackedEmbedding)), None)
    if packed is not None:
        raise InputError(f"weights are packed already ({packed.name}); leave out {kind}")
    coded = next((part for part in module.modules() if isinstance(part, QuantisedWeight)), None)
    if coded is not None:
        raise InputError(f"weights are quantised already ({coded.kind}); leave out {kind}")
    found = {name: part for name, part in module.named_modules() if _plain(name, part)}
    left = [name for name, part in found.items() if part.weight.shape[1] % STEP]
    if len(left) == len(found):
        raise InputError(f"{kind}: rows of no layer are whole blocks of {STEP} numbers; leave it out")
    tables = {part.weight for part in found.values() if isinstance(part, nn.Embedding)}
    blocks: dict[Tensor, Tensor] = {}
    for name, part in found.items():
        if name not in left:
            wide = WIDE if part.weight in tables else KINDS[kind]
            with about(name):
                module.set_submodule(name, _packed(part, wide, blocks))
    module.float()
    return left + [name for name, part in module.named_modules() if isinstance(part, StackedLinear)]


def _plain(name: str, part: nn.Module) -> bool:
    """Whether it is to be packed. Tables of positions are small, and added to what others gave."""
    return type(part) is nn.Linear or (type(part) is nn.Embedding and "positions" not in name.split("."))


def _packed(part: nn.Module, kind: Kind, blocks: dict[Tensor, Tensor]) -> nn.Module:
    """The layer over its blocks, which tied layers share."""
    weight: Tensor = part.weight  # type: ignore[assignment]
    if weight not in blocks:
        if not torch.isfinite(weight).all():
            raise InputError("weights that are not finite cannot be packed; mend them first")
        blocks[weight] = shared(gguf.quants.quantize(weight.detach().float().cpu().numpy(), kind)).to(weight.device)
    if isinstance(part, nn.Embedding):
        return PackedEmbedding(blocks[weight], kind, part.embedding_dim)
    assert isinstance(part, nn.Linear)
    return PackedLinear(
        blocks[weight], kind, part.in_features, None if part.bias is None else part.bias.detach().float()
    )
