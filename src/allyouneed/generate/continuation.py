"""A request under way: its tokens so far, what is held of it, and how its next token is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from allyouneed.adapt.rows import Mix
from allyouneed.generate.blocks import Key
from allyouneed.generate.requests import Request, Step, Top
from allyouneed.generate.sampling import Sampler
from allyouneed.generate.speculation import Drafts, Pace
from allyouneed.generate.tables import BlockTable


@dataclass(eq=False)
class Continuation:
    """One request, waiting (`table` None) or running. An interrupted one goes on as if it had not been."""

    number: int
    request: Request
    tokens: list[int]  # the prompt's, then those made
    choosing: Callable[[], Sampler]
    keys: Sequence[Key]  # of the full blocks of the prompt but for its last token, by which they are found
    whole: Key  # of the whole prompt, and of what is read besides it
    adapters: Mix = ()  # that read and write it, however the module stands by then
    table: BlockTable | None = None
    echoed: list[tuple[float | None, Top]] = field(default_factory=lambda: [(None, ())])  # of the prompt so far
    cached: int = 0  # tokens of the prompt that were found or forked, not read
    pace: Pace | None = None  # of drafts, where there is a speculator
    drafts: Drafts = field(default_factory=Drafts)  # judged in the next pass

    @cached_property
    def sampler(self) -> Sampler:
        """Chooses its tokens. Made with the first: penalties take tensors (V,), which those that wait need not hold."""
        return self.choosing()

    @property
    def prompt(self) -> int:
        """The prompt's length."""
        return len(self.request.ids)

    @property
    def made(self) -> int:
        """How many tokens came."""
        return len(self.tokens) - self.prompt

    @property
    def held(self) -> BlockTable:
        """Its table, while it runs."""
        assert self.table is not None, f"request {self.number} is not running"
        return self.table

    @property
    def unread(self) -> int:
        """How many of its tokens the model has not read."""
        return len(self.tokens) - (0 if self.table is None else self.table.length)

    @property
    def ahead(self) -> int:
        """How many drafts to try once only its last token is unread. None with the first token, so that they do not
        depend on how the prompt was read.
        """
        if self.pace is None or not self.made:
            return 0
        return min(self.pace.count, self.request.sampling.max_new_tokens - self.made - 1)

    @property
    def echoing(self) -> bool:
        """Whether log-probabilities of its prompt are still to be found."""
        return self.request.prompt_logprobs and len(self.echoed) < self.prompt

    def next(self, count: int) -> list[int]:
        """The next `count` tokens to be read, and the drafts after them."""
        start = self.held.length
        return [*self.tokens[start : start + count], *self.drafts.tokens]

    def wanted(self, count: int) -> int:
        """Of how many of the next `count` tokens logits are wanted."""
        if self.echoing:
            return count
        return int(count == self.unread) + len(self.drafts.tokens)

    def echo(self, logprobs: Tensor, start: int) -> None:
        """Take the log-probabilities (T, V) after the prompt's tokens from `start` on, for those that follow them."""
        known = len(self.echoed) - 1 - start  # more than none after an interruption
        targets = self.tokens[len(self.echoed) : self.prompt]
        for row, target in zip(logprobs[known:], targets, strict=False):
            self.echoed.append((row[target].item(), likeliest(row, self.request.top_logprobs)))

    def step(self, token: int, logprobs: Tensor, reason: str | None) -> Step:
        """What is told of a token that came, given log-probabilities (V,)."""
        first = self.request.prompt_logprobs and self.made == 1
        return Step(
            request=self.number,
            token=token,
            logprob=logprobs[token].item(),
            finish_reason=reason,
            top=likeliest(logprobs, self.request.top_logprobs),
            cached=self.cached if self.made == 1 else 0,
            prompt=tuple(self.echoed) if first else None,
        )


def likeliest(logprobs: Tensor, count: int) -> Top:
    """The `count` likeliest tokens with their log-probabilities (V,).

    >>> import torch
    >>> likeliest(torch.tensor([-3.0, -1.0, -2.0]), 2)
    ((1, -1.0), (2, -2.0))
    """
    if not count:
        return ()
    values, tokens = logprobs.topk(min(count, len(logprobs)))
    return tuple(zip(tokens.tolist(), values.tolist(), strict=True))
