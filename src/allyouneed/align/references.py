"""The reference of a policy: the model that it began as, and what that held of answers, read once before training.

Holds who the reference is and where its numbers are kept. Shapes: n examples, B rows, N answers to each, T tokens.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from allyouneed.adapt import lora
from allyouneed.core.errors import InputError
from allyouneed.core.modes import evaluating
from allyouneed.core.progress import Progress
from allyouneed.data.packing import IGNORED
from allyouneed.data.preferences import Ranked, collate
from allyouneed.nn.digests import digest
from allyouneed.objectives.policy import kl_divergence, kl_k3
from allyouneed.objectives.preference import answer_logprobs

Reference = Callable[[], AbstractContextManager[nn.Module]]  # within, the module that is the reference
DIGEST = 16  # bytes of a row's digest
LARGEST_DRIFT = 1e-6  # nats an answer between reference and policy before the first step


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


def logprobs(
    reference: Reference, examples: Sequence[Ranked], *, file: Path | None = None, rows: int = 8, quiet: bool = True
) -> Tensor:
    """log π_ref of each example's answers, `rows` of like length at once.

    Args:
        reference: as `of` gives it.
        examples: all with N answers.
        file: where they are kept: a NumPy array of rows, each a `digest` of the example and of the reference's weights
            and its `logprobs`. A row is believed if its digest is the one of now; a reading that was interrupted goes
            on.
        rows: B.
        quiet: no progress line.

    Returns:
        (n, N), float32.
    """
    order = sorted(range(len(examples)), key=lambda i: examples[i].longest)
    with torch.inference_mode(), reference() as module:
        digests = _digests(module, examples)
        kept = _opened(file, len(examples), len(examples[0].pieces))
        left = [i for i in order if not np.array_equal(kept[i]["digest"], digests[i])]
        done = len(order) - len(left)
        with Progress("reference", len(order), unit="example", done=done, quiet=quiet) as progress:
            for start in range(0, len(left), rows):
                chosen = left[start : start + rows]
                kept["logprobs"][chosen] = _read(module, examples, chosen)
                kept["digest"][chosen] = digests[chosen]  # afterwards: what has a digest was read
                if isinstance(kept, np.memmap):
                    kept.flush()
                progress.update(len(chosen))
    return torch.from_numpy(np.array(kept["logprobs"]))


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


def _digests(module: nn.Module, examples: Sequence[Ranked]) -> np.ndarray[Any, Any]:
    """Of each example as this module reads it: (n, DIGEST), bytes."""
    weights = digest(module)
    said = [repr((weights, example.pieces)).encode() for example in examples]
    return np.stack([np.frombuffer(hashlib.sha256(one).digest()[:DIGEST], dtype=np.uint8) for one in said])


def _opened(file: Path | None, n: int, answers: int) -> np.ndarray[Any, Any]:
    """The rows that the file holds, or new ones with a digest of nothing."""
    row = np.dtype([("digest", np.uint8, (DIGEST,)), ("logprobs", np.float32, (answers,))])
    if file is None:
        return np.zeros(n, dtype=row)
    kept: np.ndarray[Any, Any]
    if file.is_file():
        kept = np.lib.format.open_memmap(file, mode="r+")
        if kept.shape == (n,) and kept.dtype == row:
            return kept
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = np.lib.format.open_memmap(file, mode="w+", dtype=row, shape=(n,))
    return kept
