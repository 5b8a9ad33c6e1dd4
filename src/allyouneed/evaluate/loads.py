"""What engines are loaded with: requests of real text and real lengths, drawn anew for each seed.

Prompts are paragraphs of the Python reference as they stand, answers as long as paragraphs are, so that both have the
long tails of text that people write. Answers go on through end tokens: how long they are is part of the load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain

import numpy as np

from allyouneed import core
from allyouneed.core.seeds import derive
from allyouneed.data import chat
from allyouneed.data.corpora import corpus
from allyouneed.data.tokenizers import Tokenizer
from allyouneed.evaluate.load import Arrival, poisson
from allyouneed.generate.language_model import Sampling
from allyouneed.generate.requests import Request

Ids = list[int]


@dataclass(frozen=True)
class Text:
    """Prose as tokens: as a whole and by paragraphs."""

    ids: Ids
    paragraphs: tuple[Ids, ...]
    tokenizer: Tokenizer

    def run(self, start: int, count: int) -> Ids:
        """So many paragraphs on end."""
        return list(chain(*self.paragraphs[start : start + count]))

    def asked_to_repeat(self, paragraph: int) -> Ids:
        """The prompt of somebody who wants a paragraph said again, in the model's own form of conversation."""
        text = self.tokenizer.decode(self.paragraphs[paragraph])
        asked = [{"role": "user", "content": f"Repeat this text word for word:\n\n{text}"}]
        assert self.tokenizer.chat_template is not None, "a model tuned for conversation is wanted"
        first, last = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
        return self.tokenizer.encode(chat.render(self.tokenizer.chat_template, asked, bos_token=first, eos_token=last))

    @staticmethod
    @cache
    def of(tokenizer: Tokenizer) -> Text:
        """The Python reference."""
        documents = corpus("python-reference").train
        texts = [text for document in documents for text in document.text.split("\n\n") if text.strip()]
        paragraphs = tuple(tokenizer.encode(text + "\n\n") for text in texts)
        return Text(list(chain(*paragraphs)), paragraphs, tokenizer)


@dataclass(frozen=True, kw_only=True)
class Mixed(core.Config):
    """Runs of paragraphs, answered as long as the next one; with `rate` a second, or all at once."""

    requests: int
    rate: float | None = None
    longest: int = 128  # tokens of an answer at most
    paragraphs: int = 8  # of a prompt at most
    most: int = 512  # tokens of a prompt at most: the reference has tables of thousands

    def arrivals(self, text: Text, seed: int) -> list[Arrival]:
        """Drawn anew for each seed."""
        source = np.random.default_rng(derive(seed, "mixed"))
        requests = []
        for _ in range(self.requests):
            count = int(np.exp(source.uniform(0, np.log(self.paragraphs + 1))))
            start = int(source.integers(len(text.paragraphs) - count))
            prompt, answer = text.run(start, count), text.paragraphs[start + count]
            requests.append(asked(prompt[: self.most], min(len(answer), self.longest)))
        return poisson(requests, self.rate, seed)


@dataclass(frozen=True, kw_only=True)
class Alike(core.Config):
    """Prompts that begin with the same `common` tokens."""

    requests: int
    common: int
    answer: int = 8

    def arrivals(self, text: Text, seed: int) -> list[Arrival]:
        """All at once."""
        source = np.random.default_rng(derive(seed, "alike"))
        first = text.ids[: self.common]
        chosen = source.choice(len(text.paragraphs), self.requests, replace=False)
        requests = [asked([*first, *text.paragraphs[i]], self.answer) for i in chosen]
        return poisson(requests, None, seed)


@dataclass(frozen=True, kw_only=True)
class Interrupted(core.Config):
    """`streams` of short prompts and long answers, while `prompts` of `length` tokens come, `every` so many seconds."""

    streams: int
    answer: int
    prompts: int
    length: int
    every: float

    def arrivals(self, text: Text, seed: int) -> list[Arrival]:
        """The streams first."""
        source = np.random.default_rng(derive(seed, "interrupted"))
        starts = source.integers(len(text.ids) - self.length, size=self.streams + self.prompts)
        short = [Arrival(0.0, asked(text.ids[at : at + 16], self.answer)) for at in starts[: self.streams]]
        long = [asked(text.ids[at : at + self.length], 4) for at in starts[self.streams :]]
        return short + [Arrival((i + 1) * self.every, request) for i, request in enumerate(long)]


@dataclass(frozen=True, kw_only=True)
class Copied(core.Config):
    """The model is asked to repeat paragraphs, one request after another."""

    requests: int
    answer: int = 64

    def arrivals(self, text: Text, seed: int) -> list[Arrival]:
        """All at once."""
        source = np.random.default_rng(derive(seed, "copied"))
        long = [i for i, ids in enumerate(text.paragraphs) if self.answer <= len(ids) <= 2 * self.answer]
        requests = [asked(text.asked_to_repeat(i), self.answer) for i in source.choice(long, self.requests)]
        return poisson(requests, None, seed)


AnyLoad = Mixed | Alike | Interrupted | Copied


def asked(ids: Sequence[int], answer: int) -> Request:
    """A greedy request for exactly `answer` tokens, at least one."""
    return Request(ids=ids, sampling=Sampling(max_new_tokens=max(1, answer), temperature=0.0, ignore_eos=True))
