"""The engine: token ids in, token ids out. It knows nothing of text, nor whether a module keeps keys and values of all
tokens or a state of fixed size.

Prompts of unequal length share a batch, each row at its own position in the cache; a finished row leaves the batch at
once. Shapes: R rows still running, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from allyouneed.core.errors import InputError
from allyouneed.generate.language_model import Sampling
from allyouneed.generate.sampling import Sampler

PIECE = 4096  # tokens of a prompt read in one pass, which bounds the memory that reading a long one takes


@dataclass(frozen=True)
class Step:
    """One token of one request."""

    request: int
    token: int
    logprob: float  # natural, under the model's own distribution, before any filter
    finish_reason: str | None  # "stop" or "length" with a request's last token


class Continues(Protocol):
    """What the engine generates with: a decoder, one that has read its source, a recurrent model."""

    config: Any  # with `vocab_size`

    @property
    def limit(self) -> int | None:
        """The longest text it continues; None: any."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    def new_cache(self, batch: int, capacity: int) -> Any:
        """An empty cache for `batch` rows of up to `capacity` tokens, with `select(rows)`."""

    def hidden(
        self, ids: Tensor, segments: Tensor | None = None, cache: Any = None, counts: Tensor | None = None
    ) -> Tensor:
        """(B, T) -> (B, T, dim), keeping in the cache the first `counts` tokens of each row, or all."""

    def head(self, hidden: Tensor) -> Tensor:
        """(…, dim) -> logits (…, V)."""


Stop = Callable[[int, int], bool]  # (request, token just produced) -> whether the request ends here


class Engine:
    """Generates with one module; holds no state between calls, so that any number of calls may follow one another."""

    def __init__(self, module: Continues, eos_ids: Sequence[int] = ()) -> None:
        self.module, self.eos_ids = module, frozenset(eos_ids)

    @torch.inference_mode()
    def steps(
        self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], stop: Stop = lambda request, token: False
    ) -> Iterator[Step]:
        """Tokens as they come, all requests in one batch.

        Args:
            prompts: at least one token id each.
            samplings: one for each prompt.
            stop: asked after every token but an end token, once.

        Raises:
            InputError: a prompt is empty, or too long for the context together with `max_new_tokens`.
        """
        for prompt, sampling in zip(prompts, samplings, strict=True):
            self.check(prompt, sampling.max_new_tokens)
        requests = [i for i, sampling in enumerate(samplings) if sampling.max_new_tokens > 0]
        if not requests:
            return
        running = [prompts[i] for i in requests]
        capacity = max(len(prompts[i]) + samplings[i].max_new_tokens for i in requests)
        cache = self.module.new_cache(len(requests), capacity)
        sampler = Sampler([samplings[i] for i in requests], running, self.module.config.vocab_size)
        left = [samplings[i].max_new_tokens for i in requests]
        logits = self.prefill(running, cache)
        while requests:
            tokens = sampler.choose(logits)
            logprobs = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
            kept = []
            for row, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
                left[row] -= 1
                reason = self._finished(requests[row], token, left[row], sampler.samplings[row], stop)
                if reason is None:
                    kept.append(row)
                yield Step(requests[row], token, logprob, reason)
            if not kept:
                return
            if len(kept) < len(requests):
                requests, left = [requests[row] for row in kept], [left[row] for row in kept]
                tokens = tokens[kept]
                sampler.select(kept)
                cache.select(torch.tensor(kept))
            logits = self.decode(tokens, cache)

    def prefill(self, prompts: Sequence[Sequence[int]], cache: Any) -> Tensor:
        """Read the prompts, right-padded, piece by piece; the logits after each one's last token, (R, V)."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.as_tensor(prompt)
        rows, found = [], []
        for start in range(0, ids.shape[1], PIECE):
            counts = (lengths - start).clamp(0, PIECE)
            hidden = self.module.hidden(
                ids[:, start : start + PIECE].to(self.module.device), cache=cache, counts=counts
            )
            ended = ((lengths > start) & (lengths <= start + PIECE)).nonzero()[:, 0]
            rows.append(ended)
            found.append(hidden[ended, counts[ended] - 1])
        return self.module.head(torch.cat(found)[torch.cat(rows).argsort()]).float().cpu()

    def decode(self, tokens: Tensor, cache: Any) -> Tensor:
        """One more token a row: (R,) -> (R, V)."""
        hidden = self.module.hidden(tokens[:, None].to(self.module.device), cache=cache)
        return self.module.head(hidden[:, 0]).float().cpu()

    def check(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        """Refuse a prompt that is empty, or that the context cannot hold together with what is asked for."""
        limit = self.module.limit
        if not len(prompt):
            raise InputError("prompt is empty; give at least one token")
        if limit is not None and len(prompt) + max_new_tokens > limit:
            raise InputError(
                f"prompt of {len(prompt)} tokens and max_new_tokens={max_new_tokens} exceed the context of "
                f"{limit} by {len(prompt) + max_new_tokens - limit}; shorten the prompt or lower max_new_tokens"
            )

    def _finished(self, request: int, token: int, left: int, sampling: Sampling, stop: Stop) -> str | None:
        if token in self.eos_ids and not sampling.ignore_eos:
            return "stop"
        if stop(request, token):
            return "stop"
        return "length" if left == 0 else None
