"""The reference of a policy: the model that it began as, and what that held of answers, read once before training.

Holds who the reference is and where its numbers are kept. Shapes: n examples, B rows, N answers to each, T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from allyouneed.adapt import lora
from allyouneed.core.errors import InputError
from allyouneed.core.progress import Progress
from allyouneed.data.packing import IGNORED
from allyouneed.data.preferences import Ranked, collate
from allyouneed.objectives.policy import kl_divergence, kl_k3
from allyouneed.objectives.preference import answer_logprobs

Reference = Callable[[], AbstractContextManager[nn.Module]]  # within, the module that is the reference
LARGEST_DRIFT = 1e-6  # nats an answer between reference and policy before the first step
RESUMED = 1e-4  # nats by which numbers that were kept may differ from those read anew, in other company


def of(module: nn.Module) -> Reference:
    """The reference of `module` as it is now: itself without its adapters, or a frozen copy where it has none.

    >>> from allyouneed.models import llama
    >>> policy = llama.EXAMPLE.build()
    >>> with of(policy)() as reference:
    ...     reference is policy, reference.head.weight.requires_grad
    (False, False)
    """
    if lora.names(module):

        @contextmanager
        def without_adapters() -> Iterator[nn.Module]:
            with lora.disabled(module), evaluating(module):
                yield module

        return without_adapters
    frozen = copy.deepcopy(module).eval().requires_grad_(False)

    @contextmanager
    def copied() -> Iterator[nn.Module]:
        yield frozen

    return copied


@contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """Within, `module` drops nothing."""
    training = module.training
    try:
        yield module.eval()
    finally:
        module.train(training)


def logprobs(
    reference: Reference, examples: Sequence[Ranked], *, file: Path | None = None, rows: int = 8, quiet: bool = True
) -> Tensor:
    """log π_ref of each example's answers, `rows` of like length at once.

    Args:
        reference: as `of` gives it.
        examples: all with N answers.
        file: where they are kept, a NumPy array of float32 with NaN for what is still to be read. What it holds is
            believed if the first of it is as read anew; a reading that was interrupted goes on.
        rows: B.
        quiet: no progress line.

    Returns:
        (n, N), float32.
    """
    order = sorted(range(len(examples)), key=lambda i: examples[i].longest)
    with torch.inference_mode(), reference() as module:
        kept = _opened(file, (len(examples), len(examples[0].pieces)))
        if not _same(kept[order[:rows]], _read(module, examples, order[:rows])):
            kept[:] = np.nan
        left = [i for i in order if np.isnan(kept[i]).any()]
        done = len(order) - len(left)
        with Progress("reference", len(order), unit="example", done=done, quiet=quiet) as progress:
            for start in range(0, len(left), rows):
                chosen = left[start : start + rows]
                kept[chosen] = _read(module, examples, chosen)
                if isinstance(kept, np.memmap):
                    kept.flush()
                progress.update(len(chosen))
    return torch.from_numpy(np.array(kept))


def drift(module: nn.Module, examples: Sequence[Ranked], known: Tensor, *, rows: int = 8) -> float:
    """How far a policy that was not trained yet is from its reference: the mean of π_ref/π − 1 − log(π_ref/π) over
    answers, which estimates their KL divergence and is 0 only where both agree.

    Args:
        module: the policy.
        examples: those to compare by.
        known: (n, N), as of `logprobs`.
        rows: read at once.

    Raises:
        InputError: it is more than `LARGEST_DRIFT`, so that the reference is another model's.
    """
    with torch.inference_mode(), evaluating(module):
        found = [
            kl_k3(answer_logprobs(module, _moved(module, examples[start : start + rows])).cpu(), known[start:][:rows])
            for start in range(0, len(examples), rows)
        ]
    mean = torch.cat(found).mean().item()
    if not mean <= LARGEST_DRIFT:
        raise InputError(
            f"the policy is {mean:.2g} nats from its reference before training; the reference is another's"
        )
    return mean


def divergence(module: nn.Module, reference: Reference, examples: Sequence[Ranked], *, rows: int = 8) -> float:
    """KL[π, π_ref] of the next token, in nats, the mean over the tokens of the examples' answers. These are given and
    not the policy's own, so it is a measure of change, no estimate of the divergence of whole answers.
    """
    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(examples), rows):
            batch = {name: x.flatten(0, 1) for name, x in _moved(module, examples[start : start + rows]).items()}
            learned = batch["targets"] != IGNORED
            with evaluating(module):
                ours = module(batch["ids"], segments=batch["segments"]).logits[learned].float()
            with reference() as other:
                theirs = other(batch["ids"], segments=batch["segments"]).logits[learned].float()
            total, count = total + kl_divergence(ours, theirs).sum().item(), count + int(learned.sum())
    return total / count


def _read(module: nn.Module, examples: Sequence[Ranked], chosen: Sequence[int]) -> np.ndarray[Any, Any]:
    return answer_logprobs(module, _moved(module, [examples[i] for i in chosen])).float().cpu().numpy()


def _moved(module: nn.Module, examples: Sequence[Ranked]) -> dict[str, Tensor]:
    device = next(module.parameters()).device
    return {name: x.to(device) for name, x in collate(examples).items() if x.dim() == 3}


def _opened(file: Path | None, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    """What the file holds, or NaN."""
    if file is None:
        return np.full(shape, np.nan, dtype=np.float32)
    if file.is_file():
        kept: np.ndarray[Any, Any] = np.lib.format.open_memmap(file, mode="r+")
        if kept.shape == shape and kept.dtype == np.float32:
            return kept
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
    kept[:] = np.nan
    return kept


def _same(kept: np.ndarray[Any, Any], anew: np.ndarray[Any, Any]) -> bool:
    """Whether what was kept is what is read now; what is still to be read contradicts nothing."""
    return bool((np.isnan(kept) | (np.abs(kept - anew) <= RESUMED * (1 + np.abs(anew)))).all())
