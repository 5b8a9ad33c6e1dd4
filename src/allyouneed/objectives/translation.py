"""The loss of a target given its source with label smoothing: what the translators of 2017 learn.

Shapes: B rows, M source tokens, T target tokens, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from allyouneed.objectives.loss import Loss
from allyouneed.objectives.next_token import IGNORED
from allyouneed.objectives.span import target_given_source


def translation(label_smoothing: float = 0.0) -> Callable[[Any, Mapping[str, Tensor]], Loss]:
    """`target_given_source`, in which the right token counts 1 − ε and all V tokens, itself included, share ε evenly
    (Szegedy et al. 2016, sec. 7; Vaswani et al. 2017, sec. 5.4: ε = 0.1). Its metric `nll` is the loss without that.
    """
    if not label_smoothing:
        return target_given_source

    def smoothed(module: Any, batch: Mapping[str, Tensor]) -> Loss:
        logits = module(batch["source"], batch["ids"], batch["source_segments"], batch["segments"]).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        targets = batch["targets"].flatten()
        how: dict[str, Any] = {"ignore_index": IGNORED, "reduction": "sum"}
        total = F.cross_entropy(logits, targets, **how, label_smoothing=label_smoothing)
        with torch.no_grad():
            plain = F.cross_entropy(logits, targets, **how)
        return Loss(total, (targets != IGNORED).sum(), {"nll": plain})

    return smoothed
