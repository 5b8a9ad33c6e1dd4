"""A GGUF's tensors as one of our models: float32 copies, or modules that compute from the quantised blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from allyouneed.core.errors import InputError
from allyouneed.models import gpt2, llama
from allyouneed.models.checkpoints.fields import Fields
from allyouneed.models.checkpoints.gguf import GGUF, TensorInfo
from allyouneed.models.checkpoints.huggingface import assemble, check_layers, family_named
from allyouneed.models.checkpoints.names import Rule, expand, to_ours
from allyouneed.models.decoder import Decoder
from allyouneed.nn.packed import KINDS, PackedEmbedding, PackedLinear, shared

FAMILIES = {family.model_type: family for family in (llama.GGUF, gpt2.GGUF)}


def load(file: GGUF, *, packed: bool) -> Decoder:
    """The model of a GGUF file, in evaluation mode.

    Raises:
        InputError: an architecture or field we do not compute, a missing tensor, or a shape other than the metadata's.
    """
    family = family_named(str(file.metadata.get("general.architecture")), FAMILIES, file.path)
    config = family.read(Fields(_facts(file), file.path))
    rules = family.rules(config)
    check_layers(rules, config.layers, file.tensors, file.path)
    left_packed = {name for name, info in file.tensors.items() if packed and _packable(info)}
    tensors = to_ours(rules, config.layers, _Dequantised(file, left_packed), file.path)
    model = assemble(config, tensors, file.path)
    for rule in expand(rules, config.layers):
        if rule.theirs in left_packed:
            _pack(model, rule, file)
    return model


def _facts(file: GGUF) -> dict[str, Any]:
    """The metadata, and what only the tensors tell."""
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{file.path}: tensor 'token_embd.weight' is missing")
    vocab_size = file.tensors["token_embd.weight"].shape[0]
    return dict(file.metadata) | {"vocab_size": vocab_size, "tied": "output.weight" not in file.tensors}


class _Dequantised(Mapping[str, Tensor]):
    """The file's tensors as float32, each made when it is asked for; those `left_packed` only as shapes."""

    def __init__(self, file: GGUF, left_packed: set[str]) -> None:
        self.file, self.left_packed = file, left_packed

    def __getitem__(self, name: str) -> Tensor:
        if name in self.left_packed:
            return torch.empty(self.file.tensors[name].shape, device="meta")
        return self.file.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file.tensors)

    def __len__(self) -> int:
        return len(self.file.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.file.tensors


def _packable(info: TensorInfo) -> bool:
    return len(info.shape) == 2 and info.kind in KINDS and not info.name.startswith("position_embd")


def _pack(model: Decoder, rule: Rule, file: GGUF) -> None:
    """Let the modules whose weights `rule` names compute from the file's own blocks."""
    kind = file.tensors[rule.theirs].kind
    for name, rows in zip(rule.ours, rule.split(shared(file.raw(rule.theirs))), strict=True):
        owner = name.removesuffix(".weight")
        module = model.get_submodule(owner)
        if isinstance(module, nn.Linear):
            model.set_submodule(owner, PackedLinear(rows, kind, module.in_features, module.bias))
            continue
        model.set_submodule(owner, PackedEmbedding(rows, kind, model.config.dim))
        if model.config.tied:
            model.set_submodule("head", PackedLinear(rows, kind, model.config.dim))
