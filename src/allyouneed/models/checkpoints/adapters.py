"""Adapters in PEFT's layout, in and out: `adapter_config.json` and `adapter_model.safetensors`.

What the configuration says is read in `peft_config`, how layers of theirs and ours go together in `fused`.

Shapes: N outputs, K inputs, r = rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allyouneed.adapt import lora
from allyouneed.adapt.layers import Adapted, Lora, Whole
from allyouneed.adapt.quantise import dequantise
from allyouneed.adapt.targets import is_linear, matches
from allyouneed.core import files
from allyouneed.core.errors import InputError, brief
from allyouneed.models.checkpoints import fused, likeness, peft_config, weights
from allyouneed.models.checkpoints.fused import Place
from allyouneed.models.checkpoints.names import listed
from allyouneed.models.checkpoints.peft_config import CONFIG, WEIGHTS, PeftConfig
from allyouneed.models.decoder import Decoder
from allyouneed.models.encoder_decoder import EncoderDecoder
from allyouneed.models.heads import Classifier, SpanReader, Tagger

PREFIX = "base_model.model."
TASKS: dict[type, str] = {
    Decoder: "CAUSAL_LM",
    EncoderDecoder: "SEQ_2_SEQ_LM",
    Classifier: "SEQ_CLS",
    Tagger: "TOKEN_CLS",
    SpanReader: "QUESTION_ANS",
}
_LOW_RANK = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
Tensors = Mapping[str, Tensor]
_ByLayer = dict[str, dict[str, Tensor]]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def save_adapter(module: Any, folder: Path | str, name: str = lora.DEFAULT, *, base: str) -> None:
    """Write one adapter of a model of ours as PEFT reads it.

    Args:
        module: the model, adapted.
        folder: where to.
        name: which of its adapters.
        base: what names the model without the adapter: a folder, a material, a hub id.

    Raises:
        InputError: no such adapter, it is on a layer that transformers does not have, or what it does cannot be said in
            such files.
    """
    folder = Path(folder)
    if name not in lora.names(module):
        raise InputError(f"{folder}: no adapter {name!r}; there is {', '.join(lora.names(module)) or 'none'}")
    found = fused.places(module)
    wanted = [key for key, x in module.named_modules() if isinstance(x, Adapted) and name in x.adapters]
    homeless = set(wanted).difference(*(place.ours for place in found.values()))
    if homeless:
        raise InputError(f"{folder}: transformers has no layers like {listed(sorted(homeless))}, so PEFT has neither")
    _check_dropouts([module.get_submodule(f"{one}.adapters.{name}") for one in wanted], folder)
    tensors: dict[str, Tensor] = {}
    configs: dict[str, Lora.Config] = {}
    whole: list[str] = []
    for place in found.values():
        layers = [module.get_submodule(one) for one in place.ours]
        if any(isinstance(layer, Whole) and name in layer.adapters for layer in layers):
            whole.append(place.theirs)
            held = place.whole([_held(layer, name, place, folder) for layer in layers])
            tensors |= {f"{PREFIX}{place.theirs}.{key}": x for key, x in held.items()}
        elif set(wanted) & set(place.ours):
            A, B, configs[place.theirs] = fused.fuse(place, layers, name)
            ending = "lora_{}.weight" if is_linear(layers[0]) else "lora_embedding_{}"
            tensors |= {f"{PREFIX}{place.theirs}.{ending.format(key)}": x for key, x in (("A", A), ("B", B))}
    layers = [module.get_submodule(one) for theirs in sorted(configs) for one in found[theirs].ours]
    described = peft_config.described(
        configs,
        whole,
        targets=_targets(list(configs), list(found)),
        base=base,
        task=TASKS.get(type(module)),
        transposed=any(found[name].transposed for name in configs),
    )
    weights.write_safetensors(folder / WEIGHTS, tensors)
    likeness.write(folder, layers)
    files.write_json(folder / CONFIG, described)


def load_adapter(module: Any, folder: Path | str, name: str = lora.DEFAULT) -> PeftConfig:
    """Put the adapter in `folder` on a model of ours, in place and in use; what its configuration says.

    Raises:
        InputError: a file is missing or broken, the adapter is another base's, or of a kind we do not compute.
    """
    folder = Path(folder)
    said = peft_config.read(folder)
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder}: has no {WEIGHTS}; adapters in other formats are not read")
    found = fused.places(module)
    tensors = weights.read_safetensors(folder / WEIGHTS)
    for key, x in tensors.items():
        if not torch.isfinite(x).all():
            raise InputError(f"{folder}: tensor {brief(key)} holds numbers that are not finite")
    pairs, whole, bases = _sorted(tensors, said, found, folder)
    configs: dict[str, Lora.Config] = {}
    values: dict[str, Tensors] = {}
    for theirs, pair in pairs.items():
        place = found[theirs]
        _check(pair, _pair_shapes(module, place), theirs, folder)
        config = said.layer(theirs, len(pair["A"]))
        for ours, A, B, one in fused.divide(place, pair["A"], pair["B"], config):
            configs[ours], values[ours] = one, {"A": A, "B": B}
    for theirs, its in (whole | bases).items():
        base = _base(module, found[theirs], folder)
        _check(its, {key: tuple(p.shape) for key, p in base.items()}, theirs, folder)
        if theirs in bases and not torch.equal(its["weight"].to(base["weight"].dtype), base["weight"]):
            raise InputError(f"{folder}: an adapter for another base: {theirs} brings other numbers than this model's")
    _check_base([module.get_submodule(one) for theirs in sorted(pairs) for one in found[theirs].ours], said, folder)
    copies = {name: part for theirs, its in whole.items() for name, part in found[theirs].parts(its).items()}
    lora.attach(module, configs, copies, name)
    _fill(module, name, values | copies)
    return said


def merge_adapter(module: Any, folder: Path | str) -> int:
    """Put the adapter in `folder` into the weights of a model of ours, in place; how many layers it changed. Weights in
    few bits become plain ones for it.

    Raises:
        InputError: as of `load_adapter`; or a layer has no plain weight.
    """
    load_adapter(dequantise(module), folder)
    layers = len(lora.adapted(module))
    lora.merge(module)
    lora.unload(module)
    return layers


def _sorted(tensors: Tensors, said: PeftConfig, found: Mapping[str, Place], folder: Path) -> tuple[_ByLayer, ...]:
    """By their layer the matrices A and B, the tensors of layers trained whole, and the base's own weights, which PEFT
    puts beside adapters of embeddings.
    """
    pairs: _ByLayer = {}
    whole: _ByLayer = {}
    bases: _ByLayer = {}
    for key, tensor in tensors.items():
        layer, _, last = key.removeprefix(PREFIX).rpartition(".")
        low = _LOW_RANK.fullmatch(key.removeprefix(PREFIX))
        if low:
            pairs.setdefault(low[1], {})[low[2]] = tensor
        elif layer.endswith(".base_layer"):
            bases.setdefault(layer.removesuffix(".base_layer"), {})[last] = tensor
        elif matches(layer, said.whole):
            whole.setdefault(layer, {})[last] = tensor
        else:
            raise InputError(f"{folder}: tensor {brief(key)} is no matrix of LoRA, nor of a layer in modules_to_save")
    if others := [layer for layer in whole if layer not in found]:
        mend = "only such are trained whole here"
        raise InputError(
            f"{folder}: modules_to_save: {listed(others)}: no linear layer or embedding of this model; {mend}"
        )
    strange = [layer for layer in pairs | bases if layer not in found]
    if strange:
        raise InputError(f"{folder}: an adapter for another base: this model has no layers like {listed(strange)}")
    return pairs, whole, bases


def _check_base(layers: Sequence[nn.Module], said: PeftConfig, folder: Path) -> None:
    """Refuse a base of the same shapes with other numbers, where the file knows them."""
    if not likeness.alike(folder, layers):
        line = f"{folder}: an adapter for another base, {said.base}: this model's layers have other numbers"
        raise InputError(f"{line}; name that base, or remove {likeness.FILE}")


def _check_dropouts(parts: Sequence[nn.Module], folder: Path) -> None:
    """Refuse adapters of unlike dropout, of which a file has one for all."""
    dropouts = sorted({part.config.dropout for part in parts if isinstance(part, Lora)})
    if len(dropouts) > 1:
        raise InputError(f"{folder}: layers drop out {', '.join(map(str, dropouts))}; a file says one number for all")


def _held(layer: nn.Module, name: str, place: Place, folder: Path) -> dict[str, Tensor]:
    """Weight and bias of a layer that stands in one that is trained whole: the adapter's copy, or the base's."""
    if isinstance(layer, Adapted) and name in layer.adapters and not isinstance(layer, Whole):
        raise InputError(f"{folder}: {place.theirs} is trained whole in part, in part by low rank; let all do the same")
    if isinstance(layer, Adapted):
        copies = layer.adapters if name in layer.adapters else {name: layer.base}
        layer = copies[name]
    return dict(layer.named_parameters())


def _base(module: nn.Module, place: Place, folder: Path) -> dict[str, Tensor]:
    """Weight and bias of their layer as ours have it without adapters."""
    layers = [module.get_submodule(name) for name in place.ours]
    parts = [layer.base if isinstance(layer, Adapted) else layer for layer in layers]
    if packed := next((part for part in parts if not isinstance(getattr(part, "weight", None), Tensor)), None):
        raise InputError(
            f"{folder}: {place.theirs} needs plain weights, not a {type(packed).__name__}'s; load it unpacked"
        )
    return place.whole([dict(part.named_parameters()) for part in parts])


def _pair_shapes(module: nn.Module, place: Place) -> dict[str, tuple[int | str, ...]]:
    """What the matrices have to be like, r being anything."""
    layers: list[Any] = [module.get_submodule(name) for name in place.ours]
    if is_linear(layers[0]):
        return {"A": ("r", layers[0].in_features), "B": (sum(layer.out_features for layer in layers), "r")}
    return {"A": ("r", layers[0].num_embeddings), "B": (layers[0].embedding_dim, "r")}


def _check(tensors: Tensors, wanted: Mapping[str, tuple[int | str, ...]], theirs: str, folder: Path) -> None:
    """Refuse tensors of other names or shapes than those of one layer of this model."""
    rank = len(tensors["A"]) if "A" in tensors else 0
    there = {key: tuple(x.shape) for key, x in tensors.items()}
    if there != {key: tuple(rank if n == "r" else n for n in shape) for key, shape in wanted.items()}:
        shown = (
            ", ".join(f"{key} [{', '.join(map(str, s))}]" for key, s in sorted(x.items())) for x in (there, wanted)
        )
        raise InputError(f"{folder}: an adapter for another base: {theirs} has {next(shown)}; needed: {next(shown)}")


@torch.no_grad()
def _fill(module: nn.Module, name: str, values: Mapping[str, Tensors]) -> None:
    for layer, tensors in values.items():
        adapter: Any = module.get_submodule(f"{layer}.adapters.{name}")
        for key, value in tensors.items():
            adapter.get_parameter(key).copy_(value)


def _targets(chosen: Sequence[str], known: Sequence[str]) -> list[str]:
    """Suffixes that mean just the layers `chosen` among all that are `known`, or their whole names."""
    endings = sorted({name.rpartition(".")[2] for name in chosen})
    meant = [name for name in known if matches(name, tuple(endings))]
    return endings if sorted(meant) == sorted(chosen) else list(chosen)
