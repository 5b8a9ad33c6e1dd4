"""The Hugging Face layout: config.json and safetensors, one file or sharded, in and out.

A model that no `transformers` class can compute is saved in the same layout under `model_type` "allyouneed", its
configuration and tensor names being our own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allyouneed.adapt import lora
from allyouneed.core import files
from allyouneed.core.config import Config
from allyouneed.core.errors import InputError, about, unknown
from allyouneed.core.outline import outlined
from allyouneed.models import bert, bloom, gpt, gpt2, gpt_neo, gpt_neox, llama, marian, mixtral, rwkv, switch, t5
from allyouneed.models.checkpoints import heads, quantised, weights
from allyouneed.models.checkpoints.family import HEAD_STORED, Family
from allyouneed.models.checkpoints.fields import LARGEST, Fields
from allyouneed.models.checkpoints.names import HOMELESS, SHOWN, Rule, check_shared, expand, listed, to_ours, to_theirs
from allyouneed.models.decoder import Decoder
from allyouneed.models.encoder import Encoder, MaskedModel
from allyouneed.models.encoder_decoder import EncoderDecoder
from allyouneed.models.heads import Chooser, Classifier, Head, SpanReader, Tagger
from allyouneed.nn.quantised import QuantisedWeight

Model = Decoder | Encoder | EncoderDecoder | Head
_FAMILIES: tuple[Family[Any], ...] = (
    gpt.HUGGING_FACE,
    gpt2.HUGGING_FACE,
    llama.HUGGING_FACE,
    mixtral.HUGGING_FACE,
    bloom.HUGGING_FACE,
    gpt_neo.HUGGING_FACE,
    gpt_neox.HUGGING_FACE,
    rwkv.HUGGING_FACE,
    bert.ENCODER,
    bert.PRETRAINING,
    t5.HUGGING_FACE,
    switch.HUGGING_FACE,
    marian.HUGGING_FACE,
)
# By model_type; of several, the first of config.json's `architectures` says which.
FAMILIES: dict[str, tuple[Family[Any], ...]] = {}
for _family in _FAMILIES:
    FAMILIES[_family.model_type] = (*FAMILIES.get(_family.model_type, ()), _family)
# What these are with a head for labels; the first family of a type is the one that heads are put on.
HEADED = {model_type: heads.over(families[0]) for model_type, families in FAMILIES.items()}
OURS = "allyouneed"
OWN_BLOCKS: dict[type, dict[str, str]] = {
    **{kind: {"i": "blocks."} for kind in (Decoder, Encoder, MaskedModel)},
    EncoderDecoder: {"i": "encoder.blocks.", "j": "decoder.blocks."},
    **{kind: {"i": "model.blocks."} for kind in (Classifier, Chooser, Tagger, SpanReader)},
}


def load(folder: Path, *, narrow: bool = False) -> Model:
    """The model in a folder of the Hugging Face layout, in float32, or `narrow` as it is stored, and evaluation mode.

    Raises:
        InputError: a file or field is missing or wrong, or config.json and the weights do not belong together.
    """
    source = folder / "config.json"
    fields = Fields(files.read_json(source, limit=16 << 20), source)
    tensors: Mapping[str, Tensor] = weights.read_sharded(folder)
    model_type = fields.choice("model_type", [*FAMILIES, OURS])
    if model_type == OURS:
        config = _own_config(fields)
        for sign, prefix in OWN_BLOCKS[config.owner].items():
            held = {name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)}
            if len(held) != config.layers[sign]:
                raise InputError(f"{source}: num_layers={config.layers[sign]}, but the weights hold {len(held)} layers")
        tensors, blocks = quantised.parted(tensors, folder)
        return quantised.filled(assemble(config, tensors, source, narrow=narrow), blocks, folder)
    family = family_of(fields)
    _check_kind(family, tensors, source)
    stored = {HEAD_STORED: any(name.endswith("lm_head.weight") for name in tensors)}
    config = family.read(Fields({**fields.values, **stored}, source))
    rules = family.rules(config)
    check_layers(rules, config.layers, tensors, source)
    tensors, blocks = quantised.parted(_with_prefix(rules[0].theirs, tensors), folder)
    blocks = quantised.ours(blocks, expand(rules, config.layers), folder)
    model = assemble(config, to_ours(rules, config.layers, tensors, folder), source, narrow=narrow)
    return quantised.filled(model, blocks, folder)


def family_of(fields: Fields) -> Family[Any]:
    """The family that config.json names.

    Raises:
        InputError: no such `model_type`, or none of its families has the architecture.
    """
    model_type = fields.choice("model_type", FAMILIES)
    families = FAMILIES[model_type]
    named = fields.values.get("architectures")
    first = named[0] if isinstance(named, list) and named else named
    for family in (*families, *HEADED[model_type]):
        if family.architecture == first:
            return family
    if len(families) == 1:
        return families[0]
    raise fields.wrong(
        "architectures", named, "first of all " + " or ".join(family.architecture for family in families)
    )


def save(module: Model, folder: Path, *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write config.json and weights; `transformers` loads them with the same outputs where it has such a model."""
    if lora.adapted(module):
        raise InputError(f"{folder}: the model has adapters; save them as such, or merge and unload them first")
    state, blocks = _state(module), quantised.stored(module)
    if not {"embedding.weight", "encoder.embedding.weight", "model.embedding.weight"} & {*state, *blocks}:
        raise InputError(f"{folder}: packed weights have no such layout; load the model with packed=False to save it")
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    described, state = _theirs(module, state, blocks) or _own(module, state, blocks)
    weights.write_sharded(folder, state, max_shard_bytes=max_shard_bytes)
    files.write_json(folder / "config.json", described | {"dtype": dtype})


def fitting(config: Any) -> Family[Any] | None:
    """The family whose layout can say all of `config`, if there is one."""
    every = (family for known in (FAMILIES, HEADED) for families in known.values() for family in families)
    return next((family for family in every if family.fits(config)), None)


def _theirs(
    module: Model, state: Mapping[str, Tensor], blocks: Mapping[str, QuantisedWeight]
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """config.json and tensors as transformers names them; None where it has no such model, or has its matrices in
    another shape than they can be cut into blocks in.
    """
    config, family = module.config, fitting(module.config)
    if family is None:
        return None
    rules = list(expand(family.rules(config), config.layers))
    names = {rule.ours[0]: rule.theirs for rule in rules if rule.plain}
    if not blocks.keys() <= names.keys():
        return None
    described = {"architectures": [family.architecture], "model_type": family.model_type} | family.write(config)
    if blocks:
        described["quantization_config"] = quantised.described(module, names)
    found = to_theirs([rule for rule in rules if rule.ours[0] not in blocks], {}, state)
    return described, found | quantised.tensors({names[name]: one for name, one in blocks.items()})


def _own(
    module: Model, state: Mapping[str, Tensor], blocks: Mapping[str, QuantisedWeight]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same under our own names."""
    return {"model_type": OURS, "config": module.config.to_json()}, {**state, **quantised.tensors(blocks)}


def assemble(config: Any, state: Mapping[str, Tensor], source: object, *, narrow: bool = False) -> Any:
    """The model of `config` with the tensors of `state`; nothing is allocated before every shape agrees."""
    try:
        with about(source), outlined():
            model = config.build()
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{source}: no such model can be built: {str(error).splitlines()[0]}") from None
    expected = dict(model.named_parameters())
    missing = [name for name in expected if name not in state]
    if missing:
        raise InputError(f"{source}: the weights have no tensor for {listed(missing, expected)}")
    wrong = [name for name in expected if state[name].shape != expected[name].shape]
    if wrong:
        asked = " and ".join(str(list(expected[name].shape)) for name in wrong[:SHOWN])
        raise InputError(
            f"{source}: shapes disagree: the weights have {listed(wrong, state)}, the fields ask for {asked}"
        )
    places = model.state_dict()
    strange = [name for name in state if name not in places]
    if strange:
        raise InputError(f"{source}: the weights hold {listed(strange, state)}, {HOMELESS}")
    _check_tied(model, state, source)
    held = {name: state[name] if narrow else state[name].to(torch.float32) for name in expected}
    model.load_state_dict(held, strict=False, assign=True)
    model.retie()
    return model.eval()


def _check_tied(model: nn.Module, state: Mapping[str, Tensor], source: object) -> None:
    """Refuse a tensor of `state` that the model has from another one, unless they are the same."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        one = first[id(parameter)]
        if name != one and name in state:
            mend = "for a head of its own, set tied to false" if name.endswith("head.weight") else ""
            check_shared({one: state[one], name: state[name]}, source, mend)


def _check_kind(family: Family[Any], tensors: Mapping[str, Tensor], source: object) -> None:
    """Refuse weights that have no name in common with the family's first layer: another kind of model's. Comes before
    the fields, which in such a case say only that one of them is missing.
    """
    layered = [rule.at("i", 0).at("j", 0).theirs for rule in family.rules(family.example) if "{" in rule.theirs]
    bare = {name.partition(".")[2] for name in layered}
    if not any(name in bare or name in layered for name in tensors):
        raise InputError(
            f"{source}: not the weights of a {family.architecture}: lacks {listed(layered)}; "
            f"holds {listed(list(tensors), tensors)}"
        )


def check_layers(rules: Iterable[Rule], layers: Mapping[str, int], tensors: Mapping[str, Any], source: object) -> None:
    """Refuse a number of layers other than that of the weights, before anything is built by it."""
    for sign, num_layers in layers.items():
        pattern = next(rule.theirs for rule in rules if f"{{{sign}}}" in rule.theirs)
        before, _, after = pattern.partition(f"{{{sign}}}")
        suffix_of = before.split(".", 1)[-1]  # checkpoints of the bare model leave out the first part of the name
        held = sum(name.endswith(after) and (before in name or name.startswith(suffix_of)) for name in tensors)
        if held != num_layers:
            raise InputError(f"{source}: {num_layers} layers are asked for, but the weights hold {held}")


def _with_prefix(first: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Names as in the full model, whose `first` tensor is known, for a checkpoint of the bare one (`wte.weight`, not
    `transformer.wte.weight`).
    """
    prefix, _, bare = first.partition(".")
    if first in tensors or bare not in tensors:
        return tensors
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _own_config(fields: Fields) -> Any:
    described = fields.values.get("config")
    if not isinstance(described, dict):
        raise fields.wrong("config", described, "the object that `save` writes")
    _check_numbers(described, fields)
    try:
        with about(fields.source):
            config = Config.from_json(described)
    except TypeError as error:
        raise InputError(f"{fields.source}: {str(error).splitlines()[0]}") from None
    if getattr(config, "owner", None) not in OWN_BLOCKS:
        raise fields.wrong("config", described.get("type"), "the configuration of a model")
    return config


def _check_numbers(value: Any, fields: Fields, depth: int = 0) -> None:
    if depth > 16:
        raise InputError(f"{fields.source}: config nested too deeply")
    for name, child in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(child, dict | list):
            _check_numbers(child, fields, depth + 1)
        elif isinstance(child, int) and not -1 <= child <= LARGEST:
            raise fields.wrong(str(name), child, f"a number up to {LARGEST}")
        if str(name).endswith("dropout") and isinstance(child, int | float) and not 0 <= child <= 1:
            raise fields.wrong(str(name), child, "a number from 0 to 1")


def _state(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters by name, a shared one once, and the biases beside matrices in blocks."""
    return {name: parameter.detach() for name, parameter in module.named_parameters()} | quantised.biases(module)


def family_named(model_type: str, families: Mapping[str, Family[Any]], source: object) -> Family[Any]:
    """One of `families`, or the error that names the nearest."""
    if model_type not in families:
        raise InputError(f"{source}: {unknown('architecture', model_type, families)}")
    return families[model_type]
