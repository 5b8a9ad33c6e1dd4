"""adapter_config.json as PEFT writes it: what of it we compute, what only matters before training, what is refused.

Reads no tensor and no model; names of layers in it are those of `transformers`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allyouneed.adapt.layers import Lora
from allyouneed.core import files
from allyouneed.core.errors import InputError
from allyouneed.models.checkpoints.fields import Fields

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# what changes the computation or the base's weights; a missing, null, false or empty field is none of it
REFUSED = (
    *("use_dora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices", "use_qalora"),
    *("alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
    *("megatron_config", "tinylora_config"),
)
PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva")  # others move a part of the base's weights into the adapter


@dataclass(frozen=True)
class PeftConfig:
    """What a file says of an adapter: its base, scale and dropout, and the modules trained whole."""

    source: Path
    base: str | None
    alpha: float
    rank: int
    dropout: float
    rslora: bool
    whole: tuple[str, ...]
    ranks: Mapping[str, Any]
    alphas: Mapping[str, Any]

    def layer(self, name: str, rank: int) -> Lora.Config:
        """The configuration of one layer whose matrices are of `rank`.

        Raises:
            InputError: the file gives it another rank.
        """
        said = _pattern(self.ranks, name, self.rank)
        if said != rank:
            raise InputError(f"{self.source}: {name} is of rank {said} there, but its matrices are of rank {rank}")
        alpha = _pattern(self.alphas, name, self.alpha)
        return Lora.Config(rank=rank, alpha=float(alpha), dropout=self.dropout, rslora=self.rslora)


def read(folder: Path) -> PeftConfig:
    """The configuration in `folder`.

    Raises:
        InputError: missing, not LoRA's, or with a field we do not compute, which is named.
    """
    source = folder / CONFIG
    fields = Fields(files.read_json(source, limit=4 << 20), source)
    fields.choice("peft_type", ["LORA"])
    fields.choice("bias", ["none"], "none")
    for name in REFUSED:
        if fields.values.get(name):
            raise fields.wrong(name, fields.values[name], "nothing (it changes what is computed)")
    if fields.values.get("init_lora_weights") not in PLAIN_BEGINNINGS:
        raise fields.wrong("init_lora_weights", fields.values["init_lora_weights"], "true, false, gaussian or eva")
    base = fields.values.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise fields.wrong("base_model_name_or_path", base, "the name of a model")
    return PeftConfig(
        source=source,
        base=base,
        alpha=fields.number("lora_alpha", 8.0, least=1e-12),
        rank=fields.integer("r", 8),
        dropout=fields.number("lora_dropout", 0.0, most=1 - 1e-9),
        rslora=fields.boolean("use_rslora", False),
        whole=_names(fields, "modules_to_save"),
        ranks=_patterns(fields, "rank_pattern"),
        alphas=_patterns(fields, "alpha_pattern"),
    )


def described(
    configs: Mapping[str, Lora.Config],
    whole: list[str],
    *,
    targets: list[str],
    base: str,
    task: str | None,
    transposed: bool,
) -> dict[str, Any]:
    """What the file says of layers with these configurations; `transposed`: the base stores matrices input × output."""
    first = next(iter(configs.values()), Lora.Config())
    alphas = {name: _alpha(c, first.rslora) for name, c in configs.items()}
    common = Counter((c.rank, alphas[name]) for name, c in configs.items()).most_common(1)
    rank, alpha = common[0][0] if common else (8, 8.0)
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": first.dropout,
        "use_rslora": first.rslora,
        "target_modules": targets,
        "modules_to_save": whole or None,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "init_lora_weights": True,
        "rank_pattern": {name: c.rank for name, c in configs.items() if c.rank != rank},
        "alpha_pattern": {name: _number(its) for name, its in alphas.items() if its != alpha},
    }


def _alpha(config: Lora.Config, rslora: bool) -> float:
    """The α by which a layer has its scale under the file's one rule for all."""
    if config.rslora == rslora:
        return config.resolved_alpha
    return config.scale * (config.rank**0.5 if rslora else config.rank)


def _pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that a layer's name ends with; each is a regex, as PEFT has it."""
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", name)), default)


def _patterns(fields: Fields, name: str) -> Mapping[str, Any]:
    found = fields.values.get(name) or {}
    if not isinstance(found, dict) or not all(type(x) in (int, float) and 0 < x < 1 << 20 for x in found.values()):
        raise fields.wrong(name, found, "an object from names of layers to numbers above 0")
    try:
        for key in found:
            re.compile(key)
    except re.error as error:
        raise fields.wrong(name, key, f"regular expressions ({error})") from None
    return found


def _names(fields: Fields, name: str) -> tuple[str, ...]:
    found = fields.values.get(name) or []
    if not isinstance(found, list) or not all(isinstance(x, str) for x in found):
        raise fields.wrong(name, found, "a list of names")
    return tuple(found)


def _number(value: float) -> float:
    """As an integer where it is one, which is how PEFT has its alpha."""
    return int(value) if float(value).is_integer() else value
