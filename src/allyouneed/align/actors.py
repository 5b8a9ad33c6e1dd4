"""Rollouts by other processes: samplers on the workers of a Ray cluster, sent the weights before each rollout.

What they write is what the engine in this process would have written with the same seed: the tokens of a request do not
depend on what else runs, nor on how many do it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from allyouneed.align.samplers import LocalSampler
from allyouneed.align.sharing import interleaved
from allyouneed.core.workers import Actors, actors
from allyouneed.data.tokenizers import Tokenizer
from allyouneed.generate.language_model import Completion, Sampling, Turns, samplings_of
from allyouneed.models.decoder import Decoder


class RemoteSamplers:
    """A `Sampler` that shares prompts out among workers. Made by `over_ray`."""

    def __init__(self, workers: Actors, model: Decoder, tokenizer: Tokenizer) -> None:
        self.workers, self.model = workers, model
        self.reader = LocalSampler.of(model, tokenizer, width=1, tokens=1)  # of prompts only

    def prompt_ids(self, prompt: Turns) -> list[int]:
        """As of the model."""
        return self.reader.prompt_ids(prompt)

    def complete(self, prompts: Sequence[Turns], sampling: Sampling | Sequence[Sampling]) -> list[Completion]:
        """Worker i answers every n-th prompt from the i-th on."""
        samplings, n = samplings_of(sampling, len(prompts)), min(len(self.workers), len(prompts))
        shares = self.workers.ask("complete", [(list(prompts[i::n]), samplings[i::n]) for i in range(n)])
        found = interleaved(shares)
        assert len(found) == len(prompts), "each prompt is answered once"
        return found

    def renew(self) -> None:
        """Send what is trained, with LoRA the adapters alone."""
        learned = {name: p.detach().cpu() for name, p in self.model.named_parameters() if p.requires_grad}
        self.workers.tell("load", learned)


@contextmanager
def over_ray(
    address: str, model: Decoder, tokenizer: Tokenizer, *, count: int, width: int, tokens: int
) -> Iterator[RemoteSamplers]:
    """Samplers on `count` cores of the cluster at `address`: HOST:PORT, `auto`, or `local` for one of this machine.

    Args:
        address: as `core.workers.actors` takes it.
        model: the policy; every worker gets a copy.
        tokenizer: its own.
        count: workers.
        width: prompts that one answers at once.
        tokens: the most of a prompt and its answer.

    Raises:
        InputError: Ray is not installed, nobody answers there, or a worker was lost.
    """
    make = partial(_Worker.of, model, tokenizer, width=width, tokens=tokens)
    with actors(address, make, count) as workers:
        yield RemoteSamplers(workers, model, tokenizer)


class _Worker(LocalSampler):
    """The engine of one worker."""

    quiet = True

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over what was trained."""
        there = dict(self.lm.module.eval().named_parameters())
        for name, x in weights.items():
            there[name].copy_(x)
        self.renew()
