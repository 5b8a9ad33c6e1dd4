"""Matrices in blocks of codes as tensors of a checkpoint, in and out: bitsandbytes' names, as transformers writes them.

Beside `weight` stand `weight.absmax`, `weight.quant_map`, with double quantisation `weight.nested_absmax` and
`weight.nested_quant_map`, and `weight.quant_state.bitsandbytes__nf4`: JSON as bytes. Kinds that bitsandbytes has not
are written alike under a name of ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from allyouneed.core import files
from allyouneed.core.errors import InputError, about, brief
from allyouneed.models.checkpoints.fields import LARGEST, Fields
from allyouneed.models.checkpoints.names import Rule
from allyouneed.nn.blockwise import BLOCKS, NESTED, Blocks, Scales
from allyouneed.nn.codebooks import BOOKS, DYNAMIC
from allyouneed.nn.quantised import QuantisedEmbedding, QuantisedLinear, QuantisedWeight

STATE = ".quant_state."
MAKERS = {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "int4": "allyouneed", "int8": "allyouneed"}
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
MOST_STATE = 4096  # bytes of JSON


def stored(module: nn.Module) -> dict[str, QuantisedWeight]:
    """The matrices of `module` in blocks by the names that plain ones would have, a shared one once."""
    return {name: part for name, part in module.named_modules() if isinstance(part, QuantisedWeight)}


def biases(module: nn.Module) -> dict[str, Tensor]:
    """The biases of layers whose matrices are in blocks, by name."""
    found = {name: part for name, part in module.named_modules() if isinstance(part, QuantisedLinear)}
    return {f"{name}.bias": part.bias for name, part in found.items() if part.bias is not None}


def tensors(weights: Mapping[str, QuantisedWeight]) -> dict[str, Tensor]:
    """What a file holds of the matrices of these names."""
    return {key: tensor for name, weight in weights.items() for key, tensor in _tensors(name, weight.blocks).items()}


def described(module: nn.Module, names: Mapping[str, str]) -> dict[str, Any]:
    """The `quantization_config` of config.json, by which transformers knows what to load; `names` are the file's, by
    ours.
    """
    found = [weight.blocks for weight in stored(module).values()]
    kinds = {(one.kind, one.scales.codes is not None) for one in found}
    kind, double = next(iter(kinds))
    if len(kinds) > 1 or MAKERS[kind] != "bitsandbytes":
        return {"quant_method": "allyouneed", "kinds": sorted({kind for kind, _ in kinds})}
    left = {f"{name}.weight" for name, part in module.named_modules() if type(part) is nn.Linear}
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    said |= {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double, "bnb_4bit_quant_storage": "uint8"}
    skipped = [theirs.removesuffix(".weight") for ours, theirs in names.items() if ours in left]
    return said | {"bnb_4bit_compute_dtype": "float32", "llm_int8_skip_modules": ["lm_head", *skipped]}


def parted(found: Mapping[str, Tensor], source: object) -> tuple[dict[str, Tensor], dict[str, Blocks]]:
    """A checkpoint's tensors, each matrix in blocks as an outline without memory; and the blocks, by the same names.

    Raises:
        InputError: the parts of a matrix are missing or do not belong together.
    """
    states = {key.partition(STATE)[0]: key for key in found if STATE in key}
    used = {*states.values(), *(name + part for name in states for part in PARTS)}
    with about(source):
        blocks = {name: _blocks(name, key, found) for name, key in states.items()}
    rest = {name: tensor for name, tensor in found.items() if name not in used}
    return rest | {name: torch.empty(one.shape, device="meta") for name, one in blocks.items()}, blocks


def ours(blocks: Mapping[str, Blocks], rules: Iterable[Rule], source: object) -> dict[str, Blocks]:
    """`blocks` by our names.

    Raises:
        InputError: one that our model holds in another shape, or shares.
    """
    plain = {rule.theirs: rule.ours[0] for rule in rules if rule.plain}
    for name in blocks:
        if name not in plain:
            raise InputError(
                f"{source}: {brief(name)} is stored in blocks, which is not read here; load it unquantised"
            )
    return {plain[name]: one for name, one in blocks.items()}


def filled(model: Any, blocks: Mapping[str, Blocks], source: object) -> Any:
    """`model`, whose layers and tables that have these tensors now compute from `blocks`, tied ones as well.

    Raises:
        InputError: what has the tensor is neither linear nor an embedding.
    """
    owners: dict[int, list[str]] = {}
    for name, layer in model.named_modules():
        owners.setdefault(id(getattr(layer, "weight", None)), []).append(name)
    with about(source):
        for name, one in blocks.items():
            weight = QuantisedWeight(one)
            for owner in owners[id(model.get_parameter(name))]:
                model.set_submodule(owner, _around(model.get_submodule(owner), weight, name))
    return model


def _tensors(name: str, blocks: Blocks) -> dict[str, Tensor]:
    scales = blocks.scales
    state: dict[str, Any] = {"quant_type": blocks.kind, "blocksize": blocks.block, "dtype": "float32"}
    state["shape"] = list(blocks.shape)
    found = {name: blocks.codes[:, None], f"{name}.quant_map": BOOKS[blocks.kind].values.clone()}
    if scales.codes is None or scales.offset is None:
        found[f"{name}.absmax"] = scales.values
    else:
        found |= {f"{name}.absmax": scales.codes, f"{name}.nested_absmax": scales.values}
        found[f"{name}.nested_quant_map"] = DYNAMIC.values.clone()
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": scales.offset.item()}
    packed = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return found | {f"{name}{STATE}{MAKERS[blocks.kind]}__{blocks.kind}": packed}


def _around(layer: nn.Module, weight: QuantisedWeight, name: str) -> nn.Module:
    if type(layer) is nn.Linear:
        return QuantisedLinear(weight, None if layer.bias is None else layer.bias.detach())
    if type(layer) is nn.Embedding:
        return QuantisedEmbedding(weight)
    raise InputError(f"{brief(name)} is stored in blocks, which a {type(layer).__name__} does not compute from")


def _blocks(name: str, key: str, found: Mapping[str, Tensor]) -> Blocks:
    """The matrix called `name`, after its parts were found to belong together."""
    said = _state(key, found[key])
    shape = torch.Size(said.values["shape"])
    kind, block = said.choice("quant_type", BOOKS), said.integer("blocksize")
    if block not in BLOCKS:
        raise said.wrong("blocksize", block, f"one of {', '.join(map(str, BLOCKS))}")
    count = -(-shape.numel() // block)
    codes = _part(found, name, -(-shape.numel() * BOOKS[kind].bits // 8), torch.uint8)
    _check_book(found, f"{name}.quant_map", BOOKS[kind].values)
    if "nested_offset" not in said.values:
        return Blocks(kind, block, shape, codes, Scales(_part(found, f"{name}.absmax", count, torch.float32)))
    if said.integer("nested_blocksize") != NESTED:
        raise said.wrong("nested_blocksize", said.values["nested_blocksize"], str(NESTED))
    _check_book(found, f"{name}.nested_quant_map", DYNAMIC.values)
    offset = torch.tensor(said.number("nested_offset", least=-1e30, most=1e30))
    scales = _part(found, f"{name}.absmax", count, torch.uint8)
    nested = _part(found, f"{name}.nested_absmax", -(-count // NESTED), torch.float32)
    return Blocks(kind, block, shape, codes, Scales(nested, scales, offset))


def _state(key: str, packed: Tensor) -> Fields:
    """The JSON of a matrix: its kind, block and shape, and how its scales are stored."""
    if packed.dtype != torch.uint8 or not 0 < packed.numel() <= MOST_STATE:
        raise InputError(
            f"{brief(key)}: {packed.numel()} of {packed.dtype}; at most {MOST_STATE} bytes of JSON are read"
        )
    try:
        said = Fields(files.parse_json(bytes(packed.tolist()).decode()), brief(key))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{brief(key)}: not JSON: {str(error).splitlines()[0][:80]}") from None
    shape = said.values.get("shape")
    sizes = isinstance(shape, list) and all(type(size) is int and 0 < size <= LARGEST for size in shape)
    if not sizes or len(shape or ()) != 2:
        raise said.wrong("shape", shape, "two whole numbers")
    return said


def _part(found: Mapping[str, Tensor], name: str, count: int, dtype: torch.dtype) -> Tensor:
    """One tensor of a matrix in a row, of as many numbers as it must have."""
    if name not in found:
        raise InputError(f"tensor {brief(name)} is missing")
    tensor = found[name]
    if tensor.dtype != dtype or tensor.numel() != count:
        raise InputError(f"tensor {brief(name)}: {tensor.numel()} of {tensor.dtype}, {count} of {dtype} are needed")
    return tensor.flatten()


def _check_book(found: Mapping[str, Tensor], name: str, values: Tensor) -> None:
    tensor = _part(found, name, len(values), torch.float32)
    if not torch.allclose(tensor, values, rtol=0, atol=1e-6):
        raise InputError(f"tensor {brief(name)}: another code book than the one computed with here")
