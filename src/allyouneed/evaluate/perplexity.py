"""How well a model predicts text: losses per token, byte, character and position.

Asks of a model only that `module(ids).logits` are next-token logits; where it is a module, it should be in eval mode.
Shapes: B rows, T tokens, V vocabulary, N windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from allyouneed.core.errors import InputError


class HasLogits(Protocol):
    """What a model answers: `logits` (B, T, V)."""

    @property
    def logits(self) -> Tensor:
        """Unnormalised log-probabilities of each next token."""


Model = Callable[[Tensor], HasLogits]


class Tokenizer(Protocol):
    """As much of a tokenizer as is needed here."""

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text."""

    @property
    def eos_ids(self) -> Collection[int]:
        """The tokens that end one."""

    def encode(self, text: str) -> Sequence[int]:
        """The ids of `text` alone."""


@dataclass(frozen=True)
class TextLoss:
    """The loss of a text as a whole and what it is counted over.

    >>> TextLoss(nats=math.log(2) * 8, tokens=2, characters=3, bytes=4).bits_per_byte
    2.0
    """

    nats: float
    tokens: int
    characters: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        """Depends on the tokenizer: compare models by it only if they share one."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the nats per token."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Of UTF-8; comparable between tokenizers (Gao et al. 2020, sec. 3.1)."""
        return self.nats / math.log(2) / self.bytes

    @property
    def bits_per_character(self) -> float:
        """Of Unicode code points."""
        return self.nats / math.log(2) / self.characters

    def __add__(self, other: TextLoss) -> TextLoss:
        return TextLoss(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.characters + other.characters,
            self.bytes + other.bytes,
        )


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """−log p of each target in nats, in at least float32: (..., V) and ids (...) -> (...).

    >>> token_nll(torch.zeros(2, 3, 8), torch.ones(2, 3, dtype=torch.long)).exp().round()[0].tolist()
    [8.0, 8.0, 8.0]
    """
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(precise.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def perplexity(
    module: Model,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    context: int,
    stride: int | None = None,
    batch: int = 4,
    device: torch.device | str = "cpu",
) -> list[TextLoss]:
    """The loss of each text, every token of it predicted; add them up (`sum_losses`) for a corpus.

    A text follows its tokenizer's begin token, or the end token that separates documents, so that the first token of
    the text is predicted as well and bits per byte are of the whole text.

    Args:
        context, stride: see `sliding_nll`.

    Raises:
        InputError: the tokenizer has no token to begin with, or a text is empty.
    """
    begin = tokenizer.bos_id if tokenizer.bos_id is not None else next(iter(tokenizer.eos_ids), None)
    if begin is None:
        raise InputError("perplexity: the tokenizer has neither a begin nor an end token to put before a text")
    losses = []
    for number, text in enumerate(texts):
        ids = torch.tensor([begin, *tokenizer.encode(text)], device=device)
        if len(ids) == 1:
            raise InputError(f"perplexity: text {number} is empty")
        nats = sliding_nll(module, ids, context=context, stride=stride, batch=batch).double().sum().item()
        losses.append(TextLoss(nats, len(ids) - 1, len(text), len(text.encode())))
    return losses


def sum_losses(losses: Sequence[TextLoss]) -> TextLoss:
    """The loss of all texts taken together: long ones weigh more.

    >>> sum_losses([TextLoss(1.0, 1, 1, 1), TextLoss(2.0, 3, 4, 5)])
    TextLoss(nats=3.0, tokens=4, characters=5, bytes=6)
    """
    return sum(losses[1:], losses[0])


@torch.inference_mode()
def sliding_nll(module: Model, ids: Tensor, *, context: int, stride: int | None = None, batch: int = 4) -> Tensor:
    """−log p of each token but the first, given the tokens before it within a sliding window: (T,) -> (T - 1,).

    Args:
        context: tokens that the model sees at once.
        stride: tokens by which the window moves on. After the first window every token is predicted from at least
            `context - stride + 1` tokens, at `context / stride` times the cost (Baevski & Auli 2019, sec. 5.2). None:
            `context`, windows side by side, the cheapest; the first tokens in each then have little to go by.
        batch: windows computed at once.
    """
    stride = stride or context
    assert 0 < stride <= context, "windows further apart than they are long leave tokens out"
    inputs, targets = ids[:-1], ids[1:]
    length = min(context, len(inputs))
    starts = [*range(0, len(inputs) - length, stride), len(inputs) - length]  # the last window ends with the text
    pieces, done = [], 0
    for some in _batches(starts, batch):
        rows = torch.stack([inputs[start : start + length] for start in some])
        wanted = torch.stack([targets[start : start + length] for start in some])
        for start, values in zip(some, token_nll(module(rows).logits, wanted), strict=True):
            pieces.append(values[done - start :])
            done = start + length
    return torch.cat(pieces)


@torch.inference_mode()
def nll_by_position(module: Model, windows: Tensor, *, batch: int = 4) -> Tensor:
    """The mean loss at each position in context: windows of ids (N, T + 1) -> (T,), float64.

    Entry t is of predictions from t + 1 tokens. It falls along the context where a model learns from it (Kaplan et al.
    2020, sec. D.5), and rises beyond the lengths that a model can use.
    """
    total = torch.zeros(windows.shape[1] - 1, dtype=torch.float64, device=windows.device)
    for some in windows.split(batch):
        total += token_nll(module(some[:, :-1]).logits, some[:, 1:]).double().sum(0)
    return total / len(windows)


@torch.inference_mode()
def batch_nll(module: Model, ids: Tensor, targets: Tensor, *, batch: int = 64) -> float:
    """The mean loss of `targets`, nats a token, each predicted from the `ids` up to its place: both (N, T)."""
    parts = zip(ids.split(batch), targets.split(batch), strict=True)
    return sum(token_nll(module(some).logits, wanted).double().sum().item() for some, wanted in parts) / targets.numel()


@torch.inference_mode()
def unigram_nll(tokens: Tensor, held_out: Tensor, *, vocab_size: int) -> float:
    """The loss of one who knows how frequent each token is and nothing else, in nats per token of `held_out`.

    Frequencies are those in `tokens` (N,), each token counted once more than it occurs (Laplace).

    >>> round(unigram_nll(torch.tensor([0, 0]), torch.tensor([0, 1]), vocab_size=2), 4)  # 3/4 and 1/4
    0.837
    """
    counts = torch.bincount(tokens.int(), minlength=vocab_size).double() + 1
    return -(counts / counts.sum()).log()[held_out.long()].mean().item()


def last_tokens_nll(module: Model, windows: Tensor, *, context: int, last: int = 1, batch: int = 4) -> Tensor:
    """The loss of the `last` tokens of each window, read with `context` tokens in view: (N, T + 1) -> (N, last).

    Longer inputs score better side by side merely because fewer of their tokens come early (Press et al. 2021, sec. 2.2
    and appendix B). Here the same tokens are predicted at every `context` up to T, so that what changes between two of
    them is only what the model makes of more context. Rows are items for a paired bootstrap.
    """
    assert 0 < last <= context < windows.shape[1], "the predicted tokens and the tokens in view fit into a window"
    seen, targets = windows[:, -context - 1 : -1], windows[:, -last:]
    return torch.cat(
        [
            token_nll(module(rows).logits[:, -last:], wanted)
            for rows, wanted in zip(seen.split(batch), targets.split(batch), strict=True)
        ]
    )


def _batches(starts: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(starts), size):
        yield starts[first : first + size]
