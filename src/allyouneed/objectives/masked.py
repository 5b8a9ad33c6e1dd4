"""Masked tokens and following sentences: the two objectives of BERT's pre-training (Devlin et al. 2019, sec. 3.1).

Both take what `data.masked` makes. Shapes: B rows, T tokens, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from allyouneed.objectives.cross_entropy import cross_entropy
from allyouneed.objectives.loss import Loss
from allyouneed.objectives.next_token import IGNORED


def masked(module: Any, batch: Mapping[str, Tensor]) -> Loss:
    """−Σ log p(token | the row with some tokens hidden) in nats, over the places that have a target.

    Only these pass the head, which is most of the work where the model is small.

    Args:
        module: an encoder with BERT's head: `hidden(ids, segments, types)` and `tell(hidden)`.
        batch: `ids` (B, T), some replaced; `targets` (B, T), the hidden ids, `IGNORED` elsewhere; where there are any
            `segments` and `types` (B, T).
    """
    return _tokens(module, _hidden(module, batch), batch["targets"])


def masked_and_pairs(module: Any, batch: Mapping[str, Tensor]) -> Loss:
    """The mean loss of hidden tokens plus the mean loss of telling whether one sentence follows the other (sec. A.2).

    Args:
        module: an encoder with BERT's two heads: further `pool(hidden)` and `pairs(pooled)`.
        batch: as of `masked`, and for each row `following` (B), 0 where the second sentence follows the first and 1
            where it does not; `pair_weights` (B), the whole batch's targets over its rows, by which the two means
            add up whatever parts the batch is computed in.
    """
    hidden = _hidden(module, batch)
    tokens, following = _tokens(module, hidden, batch["targets"]), batch["following"]
    logits = module.pairs(module.pool(hidden))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights = batch["pair_weights"].to(logits.dtype)
    pairs = (torch.nn.functional.cross_entropy(logits, following, reduction="none") * weights).sum()
    right = ((logits.argmax(-1) == following) * weights).sum()
    metrics = {**tokens.metrics, "pair_loss": pairs.detach(), "pair_accuracy": right}
    return Loss(tokens.total + pairs, tokens.weight, metrics, tokens.unit)


def _hidden(module: Any, batch: Mapping[str, Tensor]) -> Tensor:
    hidden: Tensor = module.hidden(batch["ids"], batch.get("segments"), batch.get("types"))
    return hidden


def _tokens(module: Any, hidden: Tensor, targets: Tensor) -> Loss:
    places = targets != IGNORED
    logits, asked = module.tell(hidden[places]), targets[places]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = cross_entropy(logits, asked, ignored=IGNORED)
    return Loss(total, places.sum(), {"masked_accuracy": (logits.argmax(-1) == asked).sum()}, "masked tokens")
