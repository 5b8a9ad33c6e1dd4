"""What BERT is trained on: pairs of sentences, some of whose tokens are hidden (Devlin et al. 2019, sec. 3.1, A.1).

Shapes: B rows, T tokens, V = vocab_size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from allyouneed.core.config import Config
from allyouneed.core.errors import InputError
from allyouneed.data.batches import Generated
from allyouneed.data.packing import IGNORED, Batch
from allyouneed.data.tokenizers import Tokenizer

Sentences = Sequence[Sequence[int]]  # a document's sentences, each a list of token ids


def sentences(text: str) -> list[str]:
    """A text's sentences, as far as points and empty lines tell them.

    >>> sentences("One. Is this two? Yes\\nit is.\\n\\nA title\\n\\n3.5 is no end.")
    ['One.', 'Is this two?', 'Yes\\nit is.', 'A title', '3.5 is no end.']
    """
    return [one for one in re.split(r"(?<=[.!?])\s+|\n\s*\n", text.strip()) if one.strip()]


@dataclass(frozen=True, kw_only=True)
class Masking(Config):
    """`share` of a row's tokens are to be told; of these `hidden` are replaced by [MASK], `exchanged` by any token of
    the vocabulary, and the rest stay as they are.
    """

    share: float = 0.15
    hidden: float = 0.8
    exchanged: float = 0.1
    whole_words: bool = False  # all pieces of a word or none (the authors' later models)

    def __post_init__(self) -> None:
        """Refuse shares without a meaning."""
        if not 0 < self.share <= 1 or min(self.hidden, self.exchanged) < 0 or self.hidden + self.exchanged > 1:
            raise InputError(
                f"masking: share={self.share}, hidden={self.hidden}, exchanged={self.exchanged}; a share above 0 and "
                "at most 1 is needed, and two parts of it that make up no more than all"
            )


def mask(
    ids: Tensor,
    eligible: Tensor,
    randomness: torch.Generator,
    *,
    mask_id: int,
    vocab_size: int,
    masking: Masking,
    continues: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows with some tokens hidden, and what is to be told of them: each (B, T), `IGNORED` where nothing is.

    In each row the share is met to within rounding, by one token at least; whole words stop short of it rather than
    pass it, but for a first word that is longer.

    Args:
        ids: (B, T) token ids.
        eligible: (B, T), true for tokens that may be hidden: neither special ones nor padding.
        randomness: whence everything is drawn.
        mask_id: of the token that hides.
        vocab_size: V; ids to exchange for are drawn below it.
        masking: the shares.
        continues: (V,), true for ids that continue a word; needed for whole words.

    >>> ids, every = torch.arange(40).view(2, 20), torch.ones(2, 20, dtype=torch.bool)
    >>> _, targets = mask(ids, every, torch.Generator(), mask_id=99, vocab_size=99, masking=Masking())
    >>> (targets != IGNORED).sum(1).tolist()
    [3, 3]
    """
    count = (eligible.sum(1, keepdim=True) * masking.share).round().clamp(min=1)
    draws = torch.rand(ids.shape, generator=randomness)
    if masking.whole_words:
        assert continues is not None, "whole words need to know which ids continue a word"
        begins = ~(continues[ids] & eligible)
        begins[:, 0] = True
        words = begins.cumsum(1) - 1  # (B, T), the number of each token's word
        draws = draws.gather(1, words)
    else:
        words = torch.arange(ids.shape[1]).expand_as(ids)
    order = draws.where(eligible, 2.0).argsort(dim=1, stable=True)
    rank = order.argsort(1)  # the place of each token in the order drawn; a word's tokens stand together
    last = torch.zeros_like(words).scatter_reduce(1, words, rank.where(eligible, 0), "amax").gather(1, words)
    first = words == words.gather(1, order[:, :1])
    chosen = eligible & ((last < count) | first)
    kind = torch.rand(ids.shape, generator=randomness)
    drawn = torch.randint(vocab_size, ids.shape, generator=randomness)
    replaced = torch.where(kind < masking.hidden, mask_id, drawn)
    shown = torch.where(chosen & (kind < masking.hidden + masking.exchanged), replaced, ids)
    return shown, ids.where(chosen, IGNORED)


class MaskedPairs(Generated):
    """Rows [CLS] first [SEP] second [SEP], the second part being what follows the first in half of them, else a part
    of another document; what is to be told by `objectives.masked`.

    A batch holds `ids`, `segments`, `types` and `targets` (B, T), `following` and `pair_weights` (B).

    Args:
        documents: sentences of token ids, none empty; a document needs two of them.
        tokenizer: has [CLS], [SEP], [MASK] and [PAD].
        batch_size: B.
        length: T, of the longest row; to fit it the first part loses its beginning and the second its end.
        seed: of everything drawn.
        masking: what is hidden.

    Raises:
        InputError: fewer than two documents of two sentences, or a tokenizer without these tokens.

    >>> from allyouneed.data.tokenizer_training import train_wordpiece
    >>> texts = [["one two", "three four"], ["a b", "c d"]]
    >>> tokenizer = train_wordpiece([" ".join(text) for text in texts], 60)
    >>> documents = [tokenizer.encode_batch(text) for text in texts]
    >>> batch = next(MaskedPairs(documents, tokenizer, batch_size=3, length=16, seed=0))
    >>> sorted(batch), batch["following"].shape
    (['following', 'ids', 'pair_weights', 'segments', 'targets', 'types'], torch.Size([3]))
    """

    def __init__(
        self,
        documents: Sequence[Sentences],
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        length: int,
        seed: int,
        masking: Masking | None = None,
    ) -> None:
        self.documents = [document for document in documents if len(document) >= 2]
        if len(self.documents) < 2:
            raise InputError(f"{len(self.documents)} documents of two sentences or more; two at least are needed")
        if length < 5:
            raise InputError(f"length={length}; two sentences and their special tokens take 5 at least")
        self.special = [_need(tokenizer, role) for role in ("cls", "sep", "mask", "pad")]
        self.vocab_size, self.batch_size, self.length = tokenizer.vocab_size, batch_size, length
        self.masking = masking or Masking()
        pieces = [tokenizer.token(i).startswith("##") for i in range(tokenizer.vocab_size)]
        self.continues = torch.tensor(pieces)
        super().__init__(self._draw, seed=seed)

    def _draw(self, randomness: torch.Generator) -> Batch:
        cls, sep, mask_id, pad = self.special
        rows, types, following = [], [], []
        for _ in range(self.batch_size):
            first, second, unrelated = self._pair(randomness)
            rows.append(torch.tensor([cls, *first, sep, *second, sep]))
            types.append(torch.tensor([0] * (len(first) + 2) + [1] * (len(second) + 1)))
            following.append(unrelated)
        ids = pad_sequence(rows, batch_first=True, padding_value=pad)
        segments = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        eligible = (segments == 1) & (ids != cls) & (ids != sep)
        shown, targets = mask(
            ids,
            eligible,
            randomness,
            mask_id=mask_id,
            vocab_size=self.vocab_size,
            masking=self.masking,
            continues=self.continues,
        )
        weight = (targets != IGNORED).sum() / self.batch_size
        return {
            "ids": shown,
            "segments": segments,
            "types": pad_sequence(types, batch_first=True),
            "targets": targets,
            "following": torch.tensor(following),
            "pair_weights": weight.expand(self.batch_size).clone(),
        }

    def _pair(self, randomness: torch.Generator) -> tuple[list[int], list[int], int]:
        """Two parts and whether the second is of another document (1) or follows the first (0)."""

        def below(n: int) -> int:
            return int(torch.randint(n, (), generator=randomness))

        most, chosen = self.length - 3, below(len(self.documents))
        document = self.documents[chosen]
        start = below(len(document) - 1)
        cut = start + 1
        while cut < len(document) - 1 and sum(map(len, document[start:cut])) < most // 2:
            cut += 1
        first, unrelated = [token for sentence in document[start:cut] for token in sentence], below(2)
        if unrelated:
            other = below(len(self.documents) - 1)
            document = self.documents[other + (other >= chosen)]
            cut = below(len(document))
        second: list[int] = []
        for sentence in document[cut:]:
            second += sentence
            if len(first) + len(second) >= most:
                break
        kept = min(len(second), max(most // 2, most - len(first)))
        return first[max(0, len(first) + kept - most) :], second[:kept], unrelated


def _need(tokenizer: Tokenizer, role: str) -> int:
    found: int | None = getattr(tokenizer, f"{role}_id")
    if found is None:
        raise InputError(f"{tokenizer.name}: has no [{role.upper()}]; train_wordpiece makes vocabularies that have it")
    return found
