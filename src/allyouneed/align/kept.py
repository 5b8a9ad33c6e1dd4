"""Answers on file as they come, so that a run that was killed while thousands were written goes on with those."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allyouneed.align.samplers import LocalSampler
from allyouneed.core.metrics import MetricsLog, read
from allyouneed.generate.language_model import Completion, Sampling, Turns, samplings_of


class KeptSampler:
    """A `Sampler` whose answers to what it was asked last are in a file; asked the same again of the same weights, it
    writes only what is missing there.

    Args:
        own: writes them.
        path: the file; a line for each answer, with what was asked and of which weights.
    """

    def __init__(self, own: LocalSampler, path: Path) -> None:
        self.own, self.path = own, path

    def prompt_ids(self, prompt: Turns) -> list[int]:
        """As of the model."""
        return self.own.prompt_ids(prompt)

    def complete(self, prompts: Sequence[Turns], sampling: Sampling | Sequence[Sampling]) -> list[Completion]:
        """What is on file and what is not, in order."""
        samplings, weights = samplings_of(sampling, len(prompts)), fingerprint(self.own.lm.module)
        asked = [self._named(*one) for one in zip(range(len(prompts)), prompts, samplings, strict=True)]
        log = MetricsLog(self.path, keep=lambda row: row["weights"] == weights)
        found = {row["asked"]: _completion(row["answer"]) for row in read(self.path)}
        left = [i for i, name in enumerate(asked) if name not in found]

        def finished(number: int, completion: Completion) -> None:
            name = asked[left[number]]
            found[name] = completion
            log.write(weights=weights, asked=name, answer=dataclasses.asdict(completion))

        try:
            self.own.complete([prompts[i] for i in left], [samplings[i] for i in left], finished)
        finally:
            log.close()
        return [found[name] for name in asked]

    def renew(self) -> None:
        """The weights have changed."""
        self.own.renew()

    def _named(self, number: int, prompt: Turns, sampling: Sampling) -> str:
        """What was asked, in short: the place, for what is asked twice is answered twice, the tokens, and how."""
        told = json.dumps([self.own.prompt_ids(prompt), sampling.to_json()])
        return f"{number}-{_digest(told.encode())}"


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """Tells the weights of two moments of training apart: the sums of all tensors in float64, in short.

    >>> module = nn.Linear(2, 2)
    >>> before = fingerprint(module)
    >>> _ = nn.init.zeros_(module.bias)
    >>> fingerprint(module) == before
    False
    """
    sums = torch.stack([x.sum(dtype=torch.float64).cpu() for x in module.state_dict().values()])
    return _digest(sums.numpy().tobytes())


def _digest(told: bytes) -> str:
    return hashlib.blake2b(told, digest_size=12).hexdigest()


def _completion(told: dict[str, Any]) -> Completion:
    return Completion(**told | {name: tuple(told[name]) for name in ("token_ids", "logprobs")})
