"""The loss of a target given its source: what encoder–decoders learn.

Shapes: B rows, M source tokens, T target tokens, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allyouneed.objectives.cross_entropy import cross_entropy
from allyouneed.objectives.loss import Loss
from allyouneed.objectives.next_token import IGNORED


def translation(label_smoothing: float = 0.0) -> Callable[[nn.Module, Mapping[str, Tensor]], Loss]:
    """−Σ log p(target | source, the target up to here) in nats.

    With `label_smoothing` ε the right token counts 1 − ε and all V tokens, itself included, share ε evenly (Szegedy et
    al. 2016, sec. 7; Vaswani et al. 2017, sec. 5.4: 0.1). The objective takes a module that is called as
    `module(source, ids, source_segments, segments)` and a batch as `data.pairs` makes them; its metric `nll` is the
    loss without smoothing.
    """

    def objective(module: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        logits = module(batch["source"], batch["ids"], batch["source_segments"], batch["segments"]).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        targets = batch["targets"].flatten()
        weight = (targets != IGNORED).sum()
        if not label_smoothing:
            return Loss(cross_entropy(logits, targets, ignored=IGNORED), weight)
        total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing)
        with torch.no_grad():
            plain = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        return Loss(total, weight, {"nll": plain})

    return objective
