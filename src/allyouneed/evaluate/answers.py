"""Answers of a known length: what a model writes, and what it would have thought of the right ones.

Knows ids only. Shapes: n questions, P tokens of prompt, k of an answer, C options.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from allyouneed.evaluate.perplexity import token_nll
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import Sampling
from allyouneed.generate.reading import Continues


def written(module: Continues, prompts: Tensor, length: int, *, batch: int = 256) -> list[list[int]]:
    """What greedy decoding writes after each prompt, each token seeing the model's own before it: (n, P) -> n × k."""
    engine = Engine(module, config=Engine.Config(max_batch=batch, share_prefixes=False))
    found: list[list[int]] = [[] for _ in prompts]
    sampling = Sampling(max_new_tokens=length, temperature=0.0, ignore_eos=True)
    for step in engine.steps(prompts.tolist(), [sampling] * len(prompts)):
        found[step.request].append(step.token)
    return found


@torch.inference_mode()
def read(module: Any, prompts: Tensor, answers: Tensor, *, batch: int = 256) -> tuple[Tensor, Tensor]:
    """The log-probability of each right token, and whether it is the likeliest, the right ones before it being given:
    (n, P), (n, k) -> (n, k) and (n, k).
    """
    logprobs, likeliest = [], []
    for asked, right in zip(prompts.split(batch), answers.split(batch), strict=True):
        logits = module(torch.cat((asked, right[:, :-1]), 1)).logits[:, asked.shape[1] - 1 :]
        logprobs.append(-token_nll(logits, right))
        likeliest.append(logits.argmax(-1) == right)
    return torch.cat(logprobs), torch.cat(likeliest)


def weighed(module: Any, prompts: Tensor, options: Tensor, *, batch: int = 256) -> Tensor:
    """The log-probability of each option as a whole: (n, P), (n, C, k) -> (n, C)."""
    count = options.shape[1]
    logprobs, _ = read(module, prompts.repeat_interleave(count, 0), options.flatten(0, 1), batch=batch)
    return logprobs.sum(-1).unflatten(0, (-1, count))
