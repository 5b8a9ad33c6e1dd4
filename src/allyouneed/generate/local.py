"""A language model in this process: text in and out around the engine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allyouneed.adapt.lora import mix_of, names
from allyouneed.adapt.rows import chosen
from allyouneed.core.errors import InputError
from allyouneed.data import chat
from allyouneed.data.tokenizers import Tokenizer
from allyouneed.generate.engine import Engine
from allyouneed.generate.guides import Guides
from allyouneed.generate.language_model import Completion, Message, Sampling, Turns, sampling_from, samplings_of
from allyouneed.generate.local_queue import LocalQueue, Writing
from allyouneed.generate.requests import Guide
from allyouneed.generate.speculation import Speculator
from allyouneed.generate.stopping import StopStrings
from allyouneed.models.decoder import Decoder

PIECE = 256  # tokens of continuations scored in one pass: bounds the memory that their logits take
MOST = 4096  # tokens of contexts read in one pass


class LocalModel:
    """Satisfies `LanguageModel` with one of our modules and its tokenizer.

    Args:
        config: of the engine: how many prompts are generated for at once, and what is kept of them.
        speculator: guesses the engine's next tokens.
    """

    adapter: str | None = None  # who answers, of the module's adapters; None: the module as it stands

    def __init__(
        self,
        module: Decoder,
        tokenizer: Tokenizer,
        name: str,
        *,
        config: Engine.Config | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        if tokenizer.vocab_size > module.config.vocab_size:
            sizes = f"{tokenizer.vocab_size} tokens, the model {module.config.vocab_size}"
            raise InputError(f"{name}: the tokenizer has {sizes}; they do not belong together")
        self.module, self.tokenizer, self.name = module, tokenizer, name
        self.engine = Engine(module, tokenizer.eos_ids, config, speculator, tokenizer.vocab_size)
        self._guides = cache(partial(Guides, tokenizer))  # made when first asked for, once for all adapters

    @property
    def adapters(self) -> list[str]:
        """The names of its module's adapters."""
        return names(self.module)

    def with_adapter(self, name: str) -> LocalModel:
        """The same model answering with one of its module's adapters. Both share an engine, which reads for all
        adapters in one pass.

        Raises:
            InputError: it has no such adapter.
        """
        mix_of(self.module, name)
        found = copy.copy(self)
        found.adapter, found.name = name, f"{self.name}:{name}"
        return found

    def complete(
        self,
        prompts: Sequence[Turns],
        sampling: Sampling | Sequence[Sampling],
        finished: Callable[[int, Completion], None] = lambda i, completion: None,
    ) -> list[Completion]:
        """One completion per prompt, in order; conversations by the checkpoint's own chat template.

        `finished` is told of each as soon as it is, with its number.
        """
        samplings = samplings_of(sampling, len(prompts))
        return self._complete([self.prompt_ids(prompt) for prompt in prompts], samplings, finished)

    def queue(self) -> LocalQueue:
        """Answers prompts as they come, as many at once as the engine's batch holds.

        Raises:
            InputError: others are being answered.
        """
        return LocalQueue(self)

    def generate(self, prompts: Sequence[str], **sampling: object) -> list[str]:
        """The completions' texts; keywords are fields of `Sampling`."""
        return [completion.text for completion in self.complete(prompts, sampling_from(sampling))]

    def stream(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """Pieces of the completion's text as they come.

        Raises:
            InputError: also after the last piece, where a guided text could not be gone on with.
        """
        return self._stream(self.prompt_ids(prompt), sampling)

    def chat(self, messages: Sequence[Message], **sampling: object) -> str:
        """The assistant's answer, through the checkpoint's own chat template."""
        return "".join(self.chat_stream(messages, sampling_from(sampling)))

    def chat_stream(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[str]:
        """Pieces of the assistant's answer as they come; raises as `stream`."""
        return self._stream(self.prompt_ids(messages), sampling)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None) -> str:
        """The conversation as the text the model was trained to continue; `variables` (`tools` …) are the template's.

        Raises:
            InputError: the model has no template, or the template refuses the conversation.
        """
        if self.tokenizer.chat_template is None:
            raise InputError(f"{self.name} has no chat template; use generate, or a model tuned for conversation")
        return chat.render(
            self.tokenizer.chat_template,
            chat.plain(messages),
            bos_token=self.tokenizer.bos_token or "",
            eos_token=self.tokenizer.eos_token or "",
            variables=variables,
        )

    @torch.inference_mode()
    def score(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        """Summed natural log-probability of each continuation given its prompt.

        The two are tokenised together; the continuation is what comes after the tokens that the prompt alone has in
        common with both. Where the prompt ends between words, that is the convention of lm-evaluation-harness; spaces
        that end a prompt are moved to the continuation, as there. Where it ends within a word, the token that bridges
        the two counts as continuation. Prompts with a common beginning are read once.
        """
        if len(prompts) != len(continuations):
            raise InputError(f"score: {len(prompts)} prompts but {len(continuations)} continuations")
        pairs = [self._encode_pair(p, c) for p, c in zip(prompts, continuations, strict=True)]
        asked: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
        for i, (context, continuation) in enumerate(pairs):
            asked.setdefault(context, {}).setdefault(continuation, []).append(i)
        scores = [0.0] * len(pairs)
        reader = _Reader(self.module, asked)
        with self._adapted():
            for context in sorted(asked):
                options = list(asked[context])
                for option, score in zip(options, reader.score(context, options), strict=True):
                    for i in asked[context][option]:
                        scores[i] = score
        return scores

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(n, dim) float32: the mean of the last hidden states over a text's tokens, scaled to unit length."""
        return self.embed_ids([self.prompt_ids(text) for text in texts])

    @torch.inference_mode()
    def embed_ids(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """(n, dim) float32: `embed` of texts that are ids already."""
        for row in rows:
            self.engine.check(row, 0)
        device = self.module.device
        with self._adapted():
            hidden = (self.module.hidden(torch.tensor([list(row)], device=device)) for row in rows)
            vectors = [states[0].mean(0).cpu() for states in hidden]
        stacked = torch.stack(vectors) if vectors else torch.zeros(0, self.module.config.dim)
        return torch.nn.functional.normalize(stacked, dim=-1).float().numpy()

    @property
    def guides(self) -> Guides:
        """Makes guides for this model's vocabulary."""
        return self._guides()

    def guide(self, sampling: Sampling) -> Guide | None:
        """What `json_schema` or `regex` allows; a new one for each request."""
        if sampling.json_schema:
            return self.guides.json_schema(sampling.json_schema)
        return self.guides.regex(sampling.regex) if sampling.regex else None

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, without any that a prompt is given in front."""
        return [len(self.tokenizer.encode(text)) for text in texts]

    def prompt_ids(self, prompt: Turns) -> list[int]:
        """A prompt's ids; an empty text is the token that begins or separates documents."""
        if not isinstance(prompt, str):
            return self.tokenizer.encode(self.chat_prompt(prompt))
        ids = self.tokenizer.encode(prompt, add_special_tokens=True)
        return ids or [self._first_token()]

    def _adapted(self) -> AbstractContextManager[None]:
        """Within, the module reads single rows as this model's adapter does."""
        return chosen([mix_of(self.module, self.adapter)], self.module.device)

    def _first_token(self) -> int:
        token = self.tokenizer.bos_id
        if token is None:
            token = next(iter(self.tokenizer.eos_ids), None)
        if token is None:
            raise InputError(f"prompt is empty, and {self.name} has no token to begin with")
        return token

    def _encode_pair(self, prompt: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        spaces = len(prompt) - len(prompt.rstrip())
        if spaces:
            prompt, continuation = prompt[:-spaces], prompt[-spaces:] + continuation
        context = self.prompt_ids(prompt)
        whole = self.prompt_ids(prompt + continuation) if prompt else context + self.tokenizer.encode(continuation)
        shared = min(_common(context, whole), len(whole) - bool(continuation))
        if shared == 0:  # the first token bridges the two: it must be predicted from something
            return (self._first_token(),), tuple(whole)
        return tuple(whole[:shared]), tuple(whole[shared:])

    def _complete(
        self, prompts: list[list[int]], samplings: list[Sampling], finished: Callable[[int, Completion], None]
    ) -> list[Completion]:
        writings = [Writing(self.tokenizer, *pair) for pair in zip(prompts, samplings, strict=True)]
        guides, done = [self.guide(sampling) for sampling in samplings], dict[int, Completion]()

        def stop(i: int, token: int) -> bool:
            return writings[i].text.push(token)

        for step in self.engine.steps(prompts, samplings, stop, guides=guides, adapter=self.adapter):
            writings[step.request].hear(step)
            if step.finish_reason:
                done[step.request] = writings[step.request].completion()
                finished(step.request, done[step.request])
        return [done[i] for i in range(len(prompts))]

    def _stream(self, prompt: list[int], sampling: Sampling) -> Iterator[str]:
        text = StopStrings(self.tokenizer.stream(), sampling.stop, sampling.min_tokens)

        def stop(i: int, token: int) -> bool:
            return text.push(token)

        reason, guides = None, [self.guide(sampling)]
        for step in self.engine.steps([prompt], [sampling], stop, guides=guides, adapter=self.adapter):
            reason = step.finish_reason
            if piece := text.take():
                yield piece
        text.finish()
        if piece := text.take():
            yield piece
        if reason == "error":
            raise InputError(f"{self.name}: the text could not go on as its schema or pattern demands; it is not whole")


class _Reader:
    """Scores continuations after contexts that come in sorted order, re-reading only where they differ."""

    def __init__(self, module: Decoder, asked: Mapping[tuple[int, ...], Iterable[tuple[int, ...]]]) -> None:
        longest = max((len(context) + len(one) for context in asked for one in asked[context]), default=0)
        if module.limit is not None and longest > module.limit:
            over = longest - module.limit
            raise InputError(f"score: {longest} tokens exceed the context of {module.limit} by {over}")
        widest = max((min(sum(map(len, asked[context])), PIECE + longest) for context in asked), default=0)
        self.module, self.cache = module, module.new_cache(1, longest + widest)
        self.read: tuple[int, ...] = ()
        self.last = torch.empty(0)

    def score(self, context: tuple[int, ...], continuations: Sequence[tuple[int, ...]]) -> list[float]:
        """The summed log-probability of each continuation of `context`."""
        self._read(context)
        firsts = self.last.log_softmax(-1)
        scores = [firsts[one[0]].item() if one else 0.0 for one in continuations]
        piece: list[tuple[int, tuple[int, ...]]] = []
        for i, one in enumerate(continuations):
            if len(one) > 1:
                piece.append((i, one))
            if piece and (i == len(continuations) - 1 or sum(len(one) for _, one in piece) >= PIECE):
                self._add_rest(piece, scores)
                piece = []
        return scores

    def _add_rest(self, piece: Sequence[tuple[int, tuple[int, ...]]], scores: list[float]) -> None:
        """Add to `scores` what the tokens after the first of some continuations score, all in one pass."""
        ids = torch.tensor([[token for _, one in piece for token in one[:-1]]])
        segments = torch.tensor([[i + 1 for i, one in piece for _ in one[:-1]]])
        targets = torch.tensor([token for _, one in piece for token in one[1:]])
        device = self.module.device
        logits = self.module(ids.to(device), segments=segments.to(device), cache=self.cache).logits[0].cpu().double()
        rest = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        for i, value in zip((segments[0] - 1).tolist(), rest.tolist(), strict=True):
            scores[i] += value

    def _read(self, context: tuple[int, ...]) -> None:
        shared = _common(self.read, context[:-1])
        held = self.cache.rewind(shared)
        if held < shared:  # a state goes back to marks only; the next context is likely to share as much
            self._extend(context[held:shared])
            self.cache.mark()
        hidden = self._extend(context[shared:])
        self.last, self.read = self.module.head(hidden[:, -1])[0].cpu().double(), context

    def _extend(self, tokens: Sequence[int]) -> Tensor:
        """Read some tokens more, at least one: what the head sees of the last ones."""
        for start in range(0, len(tokens), MOST):
            ids = torch.tensor([tokens[start : start + MOST]], device=self.module.device)
            hidden: Tensor = self.module.hidden(ids, cache=self.cache)
        return hidden


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
