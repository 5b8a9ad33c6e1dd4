"""What ties a kind of checkpoint to our models: its configuration's fields and its tensors' names, both ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from allyouneed.core.config import Config
from allyouneed.core.errors import InputError
from allyouneed.models.checkpoints.fields import Fields
from allyouneed.models.checkpoints.names import Rule
from allyouneed.models.stack import Stack

C = TypeVar("C", bound=Config)  # the configuration of a model

# What training or the machine chooses; no trained model computes anything else for it, nor can every layout say it.
NOT_COMPUTED = ("dropout", "norm_dropout", "initialise", "context", "kernel")

HEAD_STORED = "head_stored"  # what the weights tell `read` beside the fields of config.json: they hold an lm_head


@dataclass(frozen=True)
class Family(Generic[C]):
    """One `model_type` of the Hugging Face layout, or one of its architectures where they are several; or one
    `general.architecture` of GGUF.
    """

    model_type: str
    architecture: str  # class name in config.json's `architectures`
    read: Callable[[Fields], C]
    write: Callable[[C], dict[str, Any]]
    rules: Callable[[C], Sequence[Rule]]
    example: C  # a small one of odd sizes, which the contract tests hold to what every model must do
    not_computed: tuple[str, ...] = NOT_COMPUTED

    def fits(self, config: Any) -> bool:
        """Whether this layout can say all of `config`: what it writes, it reads back."""
        try:
            again = self.read(Fields(self.write(config), self.model_type))
        except (ValueError, AttributeError, KeyError, TypeError):  # a part that this family has no field for
            return False
        return self._computation(again.to_json()) == self._computation(config.to_json())

    def _computation(self, value: Any) -> Any:
        """A config's JSON without what makes no difference to it; defaults that mean the same are made the same."""
        if isinstance(value, dict):
            return {k: self._computation(v) for k, v in value.items() if k not in self.not_computed}
        return [self._computation(v) for v in value] if isinstance(value, list) else value


def one_kind_of_block(config: Stack.Config) -> Any:
    """The block of a model or stack that has but one kind."""
    if len(config.blocks) != 1:
        raise InputError("this layout has one kind of block for all layers")
    return config.blocks[0]


# transformers' names of activations, and ours
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def activation_name(ours: str) -> str:
    """transformers' name of one of our activations."""
    return {name: theirs for theirs, name in reversed(ACTIVATIONS.items())}[ours]
