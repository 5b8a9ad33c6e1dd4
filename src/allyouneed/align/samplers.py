"""Who writes the answers of a rollout: the engine in this process. `align.actors` has others do it.

All are asked alike and told when the weights have changed. With one seed they write the same, since a request's tokens
do not depend on what else runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, Self

from allyouneed.core.errors import InputError, about
from allyouneed.core.progress import Progress
from allyouneed.data.tokenizers import Tokenizer
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import Completion, Sampling, Turns
from allyouneed.generate.local import LocalModel
from allyouneed.models.decoder import Decoder

PATIENCE = 10.0  # seconds of writing that nothing is said of


class Writer(Protocol):
    """Writes answers, as any `LanguageModel` does."""

    def complete(self, prompts: Sequence[Turns], sampling: Sampling | Sequence[Sampling]) -> list[Completion]:
        """One completion per prompt, in order."""


class Sampler(Writer, Protocol):
    """Writes answers with the weights that a policy has now, and tells their tokens and log-probabilities."""

    def prompt_ids(self, prompt: Turns) -> list[int]:
        """The tokens that an answer follows."""

    def renew(self) -> None:
        """The weights have changed: use nothing that was made of them before."""


class LocalSampler:
    """The engine over the policy itself: one model in memory.

    >>> from allyouneed.data.tokenizers import byte_tokenizer
    >>> from allyouneed.models import llama
    >>> model = llama.EXAMPLE.replace(vocab_size=257).build().eval()
    >>> sampler = LocalSampler.of(model, byte_tokenizer(), width=2, tokens=32)
    >>> [len(one.logprobs) for one in sampler.complete(["a", "b"], Sampling(max_new_tokens=3, ignore_eos=True))]
    [3, 3]
    """

    quiet = False  # no progress line

    def __init__(self, lm: LocalModel) -> None:
        self.lm = lm

    @classmethod
    def of(cls, model: Decoder, tokenizer: Tokenizer, *, width: int, tokens: int, name: str = "policy") -> Self:
        """An engine that answers `width` prompts at once, of at most so many `tokens` with their answers."""
        size = Engine.Config().block_size
        each = -(-tokens // size) + 1
        return cls(LocalModel(model, tokenizer, name, config=Engine.Config(max_batch=width, blocks=width * each)))

    def prompt_ids(self, prompt: Turns) -> list[int]:
        """As of the model: a text's own tokens, a conversation's through the chat template."""
        return self.lm.prompt_ids(prompt)

    def complete(
        self,
        prompts: Sequence[Turns],
        sampling: Sampling | Sequence[Sampling],
        finished: Callable[[int, Completion], None] = lambda number, completion: None,
    ) -> list[Completion]:
        """The engine's completions, `finished` told of each; with a progress line, where they take long."""
        with Progress("write", len(prompts), unit="answer", quiet=self.quiet, patience=PATIENCE) as progress:

            def counted(number: int, completion: Completion) -> None:
                progress.update()
                finished(number, completion)

            return self.lm.complete(prompts, sampling, counted)

    def renew(self) -> None:
        """Have the engine forget."""
        self.lm.engine.forget()


def check_length(sampler: Sampler, prompt: Turns, max_new_tokens: int, limit: int | None) -> int:
    """The tokens of a prompt.

    Raises:
        InputError: it leaves no room for an answer within `limit`, the model's context.
    """
    length = len(sampler.prompt_ids(prompt))
    if limit is not None and length + max_new_tokens > limit:
        raise InputError(f"its {length} tokens and max_new_tokens={max_new_tokens} exceed the context of {limit}")
    return length


def check_lengths(sampler: Sampler, prompts: Sequence[Turns], max_new_tokens: int, limit: int | None) -> None:
    """The same of all prompts; names the first by its number."""
    for i, prompt in enumerate(prompts):
        with about(f"prompt {i}"):
            check_length(sampler, prompt, max_new_tokens, limit)
