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

from allyouneed.core import files
from allyouneed.core.config import Config
from allyouneed.core.errors import InputError, about, brief, unknown
from allyouneed.models import bloom, gpt, gpt2, gpt_neo, gpt_neox, llama, marian, t5
from allyouneed.models.checkpoints import weights
from allyouneed.models.checkpoints.family import HEAD_STORED, Family
from allyouneed.models.checkpoints.fields import LARGEST, Fields
from allyouneed.models.checkpoints.names import Rule, to_ours, to_theirs
from allyouneed.models.decoder import Decoder
from allyouneed.models.encoder_decoder import EncoderDecoder

Model = Decoder | EncoderDecoder
FAMILIES: dict[str, Family[Any]] = {
    family.model_type: family
    for family in (
        gpt.HUGGING_FACE,
        gpt2.HUGGING_FACE,
        llama.HUGGING_FACE,
        bloom.HUGGING_FACE,
        gpt_neo.HUGGING_FACE,
        gpt_neox.HUGGING_FACE,
        t5.HUGGING_FACE,
        marian.HUGGING_FACE,
    )
}
OURS = "allyouneed"
OWN_BLOCKS = {Decoder: {"i": "blocks."}, EncoderDecoder: {"i": "encoder.blocks.", "j": "decoder.blocks."}}


def load(folder: Path) -> Model:
    """The model in a folder of the Hugging Face layout, in float32 and evaluation mode.

    Raises:
        InputError: a file or field is missing or wrong, or config.json and the weights do not belong together.
    """
    source = folder / "config.json"
    fields = Fields(files.read_json(source, limit=16 << 20), source)
    tensors = weights.read_sharded(folder)
    model_type = fields.choice("model_type", [*FAMILIES, OURS])
    if model_type == OURS:
        config = _own_config(fields)
        for sign, prefix in OWN_BLOCKS[config.owner].items():
            held = {name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)}
            if len(held) != config.layers[sign]:
                raise InputError(f"{source}: num_layers={config.layers[sign]}, but the weights hold {len(held)} layers")
        return assemble(config, tensors, source)
    family = FAMILIES[model_type]
    stored = {HEAD_STORED: any(name.endswith("lm_head.weight") for name in tensors)}
    config = family.read(Fields({**fields.values, **stored}, source))
    rules = family.rules(config)
    check_layers(rules, config.layers, tensors, source)
    if rules[0].theirs not in tensors and rules[0].theirs.count(".") > 1:
        tensors = _with_prefix(rules, tensors)
    return assemble(config, to_ours(rules, config.layers, tensors, folder), source)


def save(module: Model, folder: Path, *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write config.json and weights; `transformers` loads them with the same outputs where it has such a model."""
    state = _state(module)
    if not {"embedding.weight", "encoder.embedding.weight"} & set(state):
        raise InputError(f"{folder}: packed weights have no such layout; load the model with packed=False to save it")
    for family in FAMILIES.values():
        if family.fits(module.config):
            described = {"architectures": [family.architecture], "model_type": family.model_type} | family.write(
                module.config
            )
            state = to_theirs(family.rules(module.config), module.config.layers, state)
            break
    else:
        described = {"model_type": OURS, "config": module.config.to_json()}
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    weights.write_sharded(folder, state, max_shard_bytes=max_shard_bytes)
    files.write_json(folder / "config.json", described | {"dtype": dtype})


def assemble(config: Any, state: Mapping[str, Tensor], source: object) -> Any:
    """The model of `config` with the tensors of `state`; nothing is allocated before every shape agrees."""
    try:
        with about(source), torch.device("meta"):
            model = config.build()
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{source}: no such model can be built: {str(error).splitlines()[0]}") from None
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, shape in expected.items():
        if name not in state:
            raise InputError(f"{source}: the weights have no tensor for {name}")
        if tuple(state[name].shape) != shape:
            raise InputError(
                f"{source}: {name} has shape {list(state[name].shape)}, the configuration asks for {list(shape)}"
            )
    places = model.state_dict()
    strange = next((name for name in state if name not in places), None)
    if strange:
        raise InputError(
            f"{source}: tensor {brief(strange)} has no place in this model, which would compute without it"
        )
    model.load_state_dict({name: state[name].to(torch.float32) for name in expected}, strict=False, assign=True)
    model.retie()
    return model.eval()


def check_layers(rules: Iterable[Rule], layers: Mapping[str, int], names: Iterable[str], source: object) -> None:
    """Refuse a number of layers other than that of the weights, before anything is built by it."""
    for sign, num_layers in layers.items():
        pattern = next(rule.theirs for rule in rules if f"{{{sign}}}" in rule.theirs)
        before, _, after = pattern.partition(f"{{{sign}}}")
        suffix_of = before.split(".", 1)[-1]  # checkpoints of the bare model leave out the first part of the name
        held = sum(name.endswith(after) and name.startswith((before, suffix_of)) for name in names)
        if held != num_layers:
            raise InputError(f"{source}: {num_layers} layers, but the weights hold {held}")


def _with_prefix(rules: Iterable[Rule], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as in the full model for a checkpoint of the bare one (`wte.weight`, not `transformer.wte.weight`)."""
    prefix = next(iter(rules)).theirs.split(".", 1)[0] + "."
    return {prefix + name: tensor for name, tensor in tensors.items()}


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
        raise fields.wrong("config", described.get("type"), "the configuration of a decoder, or encoder and decoder")
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
    """The module's parameters by name, a shared one once."""
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def family_named(model_type: str, families: Mapping[str, Family[Any]], source: object) -> Family[Any]:
    """One of `families`, or the error that names the nearest."""
    if model_type not in families:
        raise InputError(f"{source}: {unknown('architecture', model_type, families)}")
    return families[model_type]
