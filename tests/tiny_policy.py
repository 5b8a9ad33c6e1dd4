"""A policy of a few thousand weights that writes bytes, for the tests of rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from allyouneed.adapt.lora import Lora, adapt
from allyouneed.align import references
from allyouneed.align.language_ppo import LanguagePPO
from allyouneed.align.policies import LanguagePolicy
from allyouneed.align.rewards import EachOf
from allyouneed.align.rollouts import Rollouts
from allyouneed.align.samplers import LocalSampler
from allyouneed.data.tokenizers import Tokenizer, byte_tokenizer
from allyouneed.models import llama
from allyouneed.objectives.policy import FixedKl
from allyouneed.train.loop import Trained, Training, train
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Linear

TOKENIZER: Tokenizer = byte_tokenizer()
PROMPTS = [f"{letter} is" for letter in "abcdefghijkl"]


def small(text: str) -> float:
    """The share of small letters: about a tenth of what an untrained model of bytes writes."""
    return sum("a" <= letter <= "z" for letter in text) / max(len(text), 1)


REWARD = EachOf(lambda prompt, completion: small(completion), "small letters")


def policy(seed: int = 0, lora: bool = False) -> LanguagePolicy:
    torch.manual_seed(seed)
    model = llama.EXAMPLE.replace(vocab_size=257).build()
    if lora:
        with torch.no_grad():
            model.head.weight.mul_(8)  # as if trained: through a frozen head of small weights nothing is ever certain
        adapt(model, Lora.Config(rank=4, alpha=8, targets="all-linear"), seed=seed)
    return LanguagePolicy(model)


def rollouts(acting: LanguagePolicy, reward: Any = REWARD, log: Path | None = None, **options: Any) -> Rollouts:
    sampler = LocalSampler.of(acting.model, TOKENIZER, width=16, tokens=32)
    beside = {name: options.pop(name) for name in ("pretraining", "sampler", "reference", "prompts") if name in options}
    settings = {"episodes": 16, "minibatch": 8, "epochs": 2, "max_new_tokens": 8, "kl": FixedKl(beta=0.02)}
    config = Rollouts.Config(**settings | options)
    given = {"sampler": sampler, "reference": references.of(acting.model), "reward": reward, "prompts": PROMPTS}
    return Rollouts(acting, **given | beside, config=config, seed=0, log=log)


def settings(**changes: Any) -> Training:
    optimizer = AdamW.Config(lr=1e-2, weight_decay=0.0)
    return Training(**{"steps": 12, "optimizer": optimizer, "schedule": Linear(warmup=2), "log_every": 1} | changes)


def run(acting: LanguagePolicy, batches: Rollouts, folder: Path | None = None, **options: Any) -> Trained:
    training = options.pop("training", None) or settings()
    objective = options.pop("objective", LanguagePPO())
    return train(acting, objective, batches, training, folder=folder, quiet=True, **options)
