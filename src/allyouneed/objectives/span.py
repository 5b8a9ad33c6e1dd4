"""Text to text: a target given a source, by a model of two stacks or by one that sees the source both ways.

Which source and target these are – spans cut out of a text, the rest of a text, a task and its answer – is said by the
batch (`data.spans`, `data.pairs`). Shapes: B rows, M tokens of source, T tokens, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from allyouneed.nn.sight import prefixed
from allyouneed.objectives.cross_entropy import cross_entropy
from allyouneed.objectives.loss import Loss
from allyouneed.objectives.next_token import IGNORED


def target_given_source(module: Any, batch: Mapping[str, Tensor]) -> Loss:
    """−Σ log p(target | source, the target up to here) in nats (Raffel et al. 2020, sec. 3.1.2).

    Args:
        module: called as `module(source, ids, source_segments=…, segments=…)`, gives `.logits` (B, T, V).
        batch: `source` (B, M), `ids` (B, T), `targets` (B, T) with `IGNORED` where nothing counts, and where rows are
            padded `source_segments` (B, M) and `segments` (B, T).

    >>> class Uniform:
    ...     def __call__(self, source, ids, source_segments=None, segments=None):
    ...         self.logits = torch.zeros(*ids.shape, 8)
    ...         return self
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> target_given_source(Uniform(), {"source": ids, "ids": ids, "targets": ids}).mean.exp().round().item()
    8.0
    """
    segments = {name: batch.get(name) for name in ("source_segments", "segments")}
    return _nll(module(batch["source"], batch["ids"], **segments).logits, batch["targets"])


def rest_given_prefix(module: Any, batch: Mapping[str, Tensor]) -> Loss:
    """The same by one stack: tokens of the prefix see each other both ways, those after it what comes before
    (Raffel et al. 2020, sec. 3.2.1, "prefix LM").

    Args:
        module: a decoder: `module.positions`, `module.read(ids, sight)` (B, T, dim), `module.head`.
        batch: `ids`, `targets` and `segments` (B, T) as for `next_token`, and `prefix` (B, T), true in the source.
    """
    sight = prefixed(module.positions, batch["segments"], batch["prefix"])
    return _nll(module.head(module.read(batch["ids"], sight)), batch["targets"])


def _nll(logits: Tensor, targets: Tensor) -> Loss:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # a sum over thousands drowns in bf16
    total = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignored=IGNORED)
    return Loss(total, (targets != IGNORED).sum())
