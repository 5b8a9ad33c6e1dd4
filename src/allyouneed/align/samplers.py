"""Who writes the answers of a rollout: the engine in this process. `align.actors` has others do it.

All are asked alike and told when the weights have changed. With one seed they write the same, since a request's tokens
do not depend on what else runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from allyouneed.data.tokenizers import Tokenizer
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import Completion, Sampling, Turns
from allyouneed.generate.local import LocalModel
from allyouneed.models.decoder import Decoder


class Sampler(Protocol):
    """Writes answers with the weights that a policy has now."""

    def prompt_ids(self, prompt: Turns) -> list[int]:
        """The tokens that an answer follows."""

    def complete(self, prompts: Sequence[Turns], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in order, with its tokens and their log-probabilities."""

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

    def __init__(self, lm: LocalModel) -> None:
        self.lm = lm

    @classmethod
    def of(cls, model: Decoder, tokenizer: Tokenizer, *, width: int, tokens: int, name: str = "policy") -> LocalSampler:
        """An engine that answers `width` prompts at once, of at most so many `tokens` with their answers."""
        size = Engine.Config().block_size
        each = -(-tokens // size) + 1
        return cls(LocalModel(model, tokenizer, name, config=Engine.Config(max_batch=width, blocks=width * each)))

    def prompt_ids(self, prompt: Turns) -> list[int]:
        """As of the model: a text's own tokens, a conversation's through the chat template."""
        return self.lm.prompt_ids(prompt)

    def complete(self, prompts: Sequence[Turns], sampling: Sampling) -> list[Completion]:
        """The engine's completions."""
        return self.lm.complete(prompts, sampling)

    def renew(self) -> None:
        """Have the engine forget."""
        self.lm.engine.forget()
