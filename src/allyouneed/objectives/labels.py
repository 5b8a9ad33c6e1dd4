"""The loss of labels, with the language model's own beside it: what a pre-trained model is fine-tuned by.

Shapes: B rows, N readings, T tokens, L answers a row, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from allyouneed.objectives.loss import Loss
from allyouneed.objectives.next_token import IGNORED


def labels(auxiliary: float = 0.0) -> Callable[[Any, Mapping[str, Tensor]], Loss]:
    """L₃ = L₂ + λ·L₁: −log p(label | text), and with `auxiliary` λ > 0 the mean −log p(token | the tokens before it) of
    the same texts, both in nats (Radford et al. 2018, eq. 5; there λ = 0.5).

    The loss is called with a head (`models.heads`), over a decoder where λ is not 0, and a batch of `ids` and
    `segments` (B, N, T) and `labels` (B, L), `IGNORED` where there is none. Its metric `accuracy` is the share of
    labels that are the likeliest.

    >>> class Sure:
    ...     hidden = staticmethod(lambda batch: None)
    ...     tell = staticmethod(lambda hidden, batch: torch.tensor([[[0.0, 0.0]]]))
    >>> labels()(Sure(), {"labels": torch.tensor([[1]])}).mean.exp().round().item()
    2.0
    """

    def loss(module: Any, batch: Mapping[str, Tensor]) -> Loss:
        hidden, asked = module.hidden(batch), batch["labels"]
        logits = _wide(module.tell(hidden, batch))
        total = F.cross_entropy(logits.flatten(0, 1), asked.flatten(), ignore_index=IGNORED, reduction="sum")
        counted = asked != IGNORED
        right = ((logits.argmax(-1) == asked) & counted).sum()
        metrics = {"accuracy": right}
        if auxiliary:
            language = (_mean_nll(module, hidden, batch) * counted.sum(1)).sum()
            total, metrics["language_nll"] = total + auxiliary * language, language.detach()
        return Loss(total, counted.sum(), metrics, "labels")

    return loss


def _mean_nll(module: Any, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """−log p of a reading's tokens, mean of its tokens and of a row's readings: (B,)."""
    ids, inside = batch["ids"][..., 1:], batch["segments"][..., 1:] != 0
    logits = _wide(module.model.head(hidden[..., :-1, :])).flatten(0, -2)
    nll = F.cross_entropy(logits, ids.flatten(), reduction="none").view_as(ids) * inside
    read = inside.any(-1)
    return (nll.sum(-1) / inside.sum(-1).clamp(min=1)).sum(1) / read.sum(1).clamp(min=1)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
