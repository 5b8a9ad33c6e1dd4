"""Whether a state of batches was taken by what takes it up: the same settings, seed and prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from allyouneed import core
from allyouneed.core.errors import InputError, brief
from allyouneed.generate.language_model import Turns


def identity(config: core.Config, seed: int, *, free: Sequence[str] = (), **what: Any) -> dict[str, Any]:
    """What a state says of its making: each setting but those that are `free` to change, the seed, and `what` else.

    >>> from allyouneed.objectives.policy import FixedKl
    >>> sorted(identity(FixedKl(beta=0.5), seed=3))
    ['beta', 'seed', 'type']
    """
    settings = {name: value for name, value in config.to_json().items() if name not in free}
    found: dict[str, Any] = json.loads(json.dumps({**settings, "seed": seed, **what}))
    return found


def check_same(there: object, here: Mapping[str, Any]) -> None:
    """Hold a state's identity against that of who takes it up.

    Raises:
        InputError: they differ; names the first setting that does.

    >>> check_same({"beta": 0.5}, {"beta": 0.25})
    Traceback (most recent call last):
    allyouneed.core.errors.InputError: data state: it was taken with beta=0.5, this run has beta=0.25; ...
    """
    if not isinstance(there, Mapping):
        raise InputError("data state: it does not say what it was made by; start the run anew")
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            pair = f"{name}={brief(there.get(name))}, this run has {name}={brief(here.get(name))}"
            raise InputError(f"data state: it was taken with {pair}; start the run anew")


def digest_of(prompts: Sequence[Turns]) -> str:
    """Of prompts and their order.

    >>> digest_of(["a", "b"]) == digest_of(["b", "a"])
    False
    """
    return hashlib.sha256(json.dumps([p if isinstance(p, str) else list(p) for p in prompts]).encode()).hexdigest()
