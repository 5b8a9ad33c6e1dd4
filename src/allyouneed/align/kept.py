"""Answers on file as they come, so that a run that was killed while it wrote thousands goes on with those."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allyouneed.align.samplers import LocalSampler
from allyouneed.core.metrics import MetricsLog, read
from allyouneed.generate.language_model import Completion, Sampling, Turns, samplings_of
from allyouneed.nn.digests import digest

MOST = 1 << 28  # bytes of a file: some hundred thousand answers; then it begins anew


class KeptSampler:
    """A `Sampler` whose answers are also in a file. Who takes up a run asks again for all since its last checkpoint, of
    the same weights; what is on file of an earlier process is not written again.

    Args:
        own: writes.
        path: the file; a line for each answer.
    """

    def __init__(self, own: LocalSampler, path: Path) -> None:
        self.own, self.path = own, path
        self._made_by = [own.lm.module.config.to_json(), own.lm.tokenizer.identity]
        self._before = {row["asked"]: _completion(row["answer"]) for row in read(path)}
        self._log: MetricsLog | None = None

    def prompt_ids(self, prompt: Turns) -> list[int]:
        """As of the model."""
        return self.own.prompt_ids(prompt)

    def complete(self, prompts: Sequence[Turns], sampling: Sampling | Sequence[Sampling]) -> list[Completion]:
        """What is on file and what is not, in order. Every request has a seed, or what it draws were not its own."""
        samplings = samplings_of(sampling, len(prompts))
        asked = self._asked(prompts, samplings)
        found = {name: self._before[name] for name in asked if name in self._before}
        left = [i for i, name in enumerate(asked) if name not in found]
        log = self._opened()

        def finished(number: int, completion: Completion) -> None:
            name = asked[left[number]]
            found[name] = completion
            log.write(asked=name, answer=dataclasses.asdict(completion))

        self.own.complete([prompts[i] for i in left], [samplings[i] for i in left], finished)
        return [found[name] for name in asked]

    def renew(self) -> None:
        """The weights have changed."""
        self.own.renew()

    def close(self) -> None:
        """Close the file."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def _opened(self) -> MetricsLog:
        """The file, without a line that a kill has cut."""
        if self._log is None:
            self._log = MetricsLog(self.path, keep=lambda row: True)
        elif self.path.stat().st_size > MOST:
            self.close()
            self._log = MetricsLog(self.path)
        return self._log

    def _asked(self, prompts: Sequence[Turns], samplings: Sequence[Sampling]) -> list[str]:
        """What is asked, in short: of which model, at which place (what is asked twice is answered twice), and how."""
        assert all(one.seed is not None or one.temperature == 0 for one in samplings), "a request without a seed"
        model = _short([*self._made_by, digest(self.own.lm.module, adapters=True)])
        told = [[self.own.prompt_ids(prompt), one.to_json()] for prompt, one in zip(prompts, samplings, strict=True)]
        return [_short([model, i, *one]) for i, one in enumerate(told)]


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def _completion(told: dict[str, Any]) -> Completion:
    return Completion(**told | {name: tuple(told[name]) for name in ("token_ids", "logprobs")})
