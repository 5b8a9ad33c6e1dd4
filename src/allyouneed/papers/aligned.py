"""What the papers on alignment train alike in a small world of text: a base, what demonstrations, comparisons and
rewards make of it, and how its answers are judged.

Every stage is a training of its own with a folder of its own, so that a stopped run goes on with the stage it was in.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from allyouneed import core
from allyouneed.align import references
from allyouneed.align.graders import RewardModel
from allyouneed.align.language_ppo import LanguagePPO
from allyouneed.align.policies import LanguagePolicy
from allyouneed.align.rewards import Reward
from allyouneed.align.rollouts import Rollouts, Text
from allyouneed.align.samplers import LocalSampler
from allyouneed.core.seeds import derive, seed_everything
from allyouneed.data.batches import Epochs
from allyouneed.data.labellers import Labeller
from allyouneed.data.packing import Piece, answer, document, pad_right
from allyouneed.data.preferences import Ranked, collate
from allyouneed.data.tokenizers import Tokenizer
from allyouneed.evaluate.perplexity import perplexity, sum_losses
from allyouneed.generate.language_model import Completion, Sampling
from allyouneed.models import llama
from allyouneed.models.decoder import Decoder
from allyouneed.models.heads import Classifier
from allyouneed.nn.initialise import Normal
from allyouneed.objectives.likelihood import likelihood
from allyouneed.objectives.next_token import next_token
from allyouneed.objectives.reward import pair_accuracy, reward, rewards
from allyouneed.train.loop import Training, train
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Cosine

WIDTH = 256  # prompts answered at once


@dataclass(frozen=True, kw_only=True)
class Stage(core.Config):
    """A training and the rows of its batches: texts, demonstrations, prompts with their ranked answers."""

    training: Training
    rows: int = 64


@dataclass(frozen=True)
class Speaker:
    """A decoder with its tokenizer, and the most tokens that an answer may have."""

    module: Decoder
    tokenizer: Tokenizer
    most: int

    def answers(self, prompts: Sequence[str], seed: int, *, temperature: float = 1.0) -> list[Completion]:
        """One to each prompt."""
        sampling = Sampling(max_new_tokens=self.most, temperature=temperature, seed=derive(seed, "answers"))
        return self.sampler().complete(prompts, sampling)

    def sampler(self) -> LocalSampler:
        """An engine over the module as it is now."""
        limit = self.module.limit
        assert limit is not None, "a decoder has a context"
        return LocalSampler.of(self.module.eval(), self.tokenizer, width=WIDTH, tokens=limit)

    def divergence(self, other: Decoder, prompts: Sequence[str], answers: Sequence[Completion]) -> float:
        """KL[this, other] of whole answers in nats, estimated by those that this one drew at temperature 1."""
        pieces = [answer(self.tokenizer.encode(p), a.token_ids) for p, a in zip(prompts, answers, strict=True)]
        with torch.inference_mode():
            theirs = likelihood(other.eval(), pad_right(pieces)).sum().item()
        return (sum(sum(one.logprobs) for one in answers) - theirs) / len(answers)

    def loss(self, texts: Sequence[str]) -> float:
        """Nats a token of texts, their end included."""
        ended = [f"{text} {self.tokenizer.eos_token}" for text in texts]
        limit = self.module.limit
        assert limit is not None, "a decoder has a context"
        return sum_losses(perplexity(self.module.eval(), self.tokenizer, ended, context=limit)).nats_per_token

    def copy(self) -> Speaker:
        """The same, to be trained apart."""
        return Speaker(copy.deepcopy(self.module), self.tokenizer, self.most)


def small(dim: int, num_layers: int, *, vocab_size: int, context: int) -> Decoder.Config:
    """LLaMA's block at the size of a small world."""
    config = llama.architecture(
        vocab_size=vocab_size, context=context, dim=dim, num_layers=num_layers, num_heads=4, hidden_dim=3 * dim
    )
    return config.replace(initialise=Normal(std=0.5 * dim**-0.5))


def stage(steps: int, lr: float, *, rows: int = 64) -> Stage:
    """AdamW without decay, a twentieth of warm-up, a cosine to a tenth."""
    optimizer, schedule = AdamW.Config(lr=lr, weight_decay=0.0), Cosine(warmup=steps // 20)
    return Stage(training=Training(steps=steps, optimizer=optimizer, schedule=schedule, log_every=steps), rows=rows)


def lasting(how: Stage, times: float) -> Stage:
    """The stage with so many times its steps, its warm-up too, so that the curve of the rate is the same."""
    training, schedule = how.training, how.training.schedule
    schedule = schedule.replace(warmup=round(schedule.warmup * times))
    return how.replace(training=training.replace(steps=max(1, round(training.steps * times)), schedule=schedule))


def text_batches(tokenizer: Tokenizer, texts: Sequence[str], rows: int, seed: int) -> Epochs[Piece]:
    """Texts between two end tokens, each once an epoch."""
    return Epochs(text_pieces(tokenizer, texts), batch_size=rows, collate=pad_right, seed=seed)


def text_pieces(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Piece]:
    """Texts between two end tokens."""
    (end, *_) = tokenizer.eos_ids
    return [document([end, *ids, end]) for ids in tokenizer.encode_batch(texts)]


def base(
    model: Decoder.Config, tokenizer: Tokenizer, texts: Sequence[str], how: Stage, most: int, seed: int, folder: Path
) -> Speaker:
    """A decoder trained on texts."""
    seed_everything(seed)
    module = model.build()
    batches = text_batches(tokenizer, texts, how.rows, seed)
    train(module, next_token, batches, how.training.replace(seed=seed), folder=folder / "base", title="  base")
    return Speaker(module.eval(), tokenizer, most)


def tuned(
    speaker: Speaker, pairs: Sequence[tuple[str, str]], texts: Sequence[str], how: Stage, seed: int, folder: Path
) -> Speaker:
    """The speaker fine-tuned on prompts with their answers, of which only the answers are learned, and on some of the
    text that it knows (Ouyang et al. 2022, app. C.3: a tenth, "since we find it helpful for PPO training").
    """
    pieces = [_said(speaker.tokenizer, *pair) for pair in pairs] + text_pieces(speaker.tokenizer, texts)
    return learned(speaker.copy(), pieces, how, seed, folder)


def learned(speaker: Speaker, pieces: Sequence[Piece], how: Stage, seed: int, folder: Path) -> Speaker:
    """The speaker itself, trained on what is marked in some pieces."""
    batches = Epochs(pieces, batch_size=how.rows, collate=pad_right, seed=seed)
    train(speaker.module, next_token, batches, how.training.replace(seed=seed), folder=folder, title="  tune")
    speaker.module.eval()
    return speaker


def ranked(
    speaker: Speaker,
    prompts: Sequence[str],
    truth: Reward,
    labeller: Labeller | None,
    each: int,
    seed: int,
    margin: Callable[[float], float] = lambda gap: 0.0,
) -> list[Ranked]:
    """`each` answers of the speaker's to every prompt, ranked by a labeller who knows the truth with noise, or without
    one by the truth itself, equals alike. Of answers that are the same one stands for all; prompts with nothing to
    compare are left out. `margin` tells what a gap between the best and the worst is worth.
    """
    source = random.Random(derive(seed, "labels"))
    asked = [prompt for prompt in prompts for _ in range(each)]
    said = [one.text for one in speaker.answers(asked, seed)]
    worth, found = list(truth(asked, said)), []
    for start in range(0, len(asked), each):
        different = dict(zip(said[start : start + each], worth[start : start + each], strict=True))
        values = list(different.values())
        ranks = _ranks(values, labeller, source)
        if len(set(ranks)) > 1:
            pieces = [_said(speaker.tokenizer, asked[start], text) for text in different]
            found.append(Ranked(tuple(pieces), tuple(ranks), margin(max(values) - min(values))))
    return found


def right(model: RewardModel, comparisons: Sequence[Ranked]) -> float:
    """The share of a prompt's pairs whose better answer a reward model prefers, mean over prompts."""
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(comparisons), WIDTH):
            batch = collate(comparisons[start : start + WIDTH])
            total += pair_accuracy(rewards(model.head, batch), batch["ranks"]).sum().item()
    return total / len(comparisons)


def graded(
    speaker: Speaker, comparisons: Sequence[Ranked], how: Stage, seed: int, folder: Path, name: str = "compared"
) -> RewardModel:
    """A reward model that begins as the speaker (Ouyang et al. 2022, sec. 3.5)."""
    seed_everything(seed)
    module = copy.deepcopy(speaker.module)
    head = Classifier.Config(model=module.config, labels=("reward",), dropout=0.0, bias=False).build(module)
    batches = Epochs(comparisons, batch_size=min(how.rows, len(comparisons)), collate=collate, seed=seed)
    train(head, reward(), batches, how.training.replace(seed=seed), folder=folder / name, title="  reward")
    return RewardModel(head, speaker.tokenizer, name, rows=WIDTH)


def reinforced(
    speaker: Speaker,
    scores: Reward,
    prompts: Sequence[str],
    rollouts: Rollouts.Config,
    objective: LanguagePPO,
    how: Stage,
    seed: int,
    folder: Path,
    *,
    text: Text | None = None,
    evaluate: Callable[[Decoder], dict[str, float]] | None = None,
) -> tuple[Speaker, list[dict[str, Any]]]:
    """The speaker after proximal policy optimisation of some scores, and what `evaluate` and the rollouts measured."""
    found, measured = speaker.copy(), (lambda policy: evaluate(policy.model)) if evaluate else None
    seed_everything(seed)
    policy = LanguagePolicy(found.module)
    batches = Rollouts(
        policy,
        found.sampler(),
        references.of(found.module),
        scores,
        prompts,
        rollouts,
        seed=seed,
        pretraining=text,
        log=folder / "rollouts.jsonl",
    )
    training = how.training.replace(seed=seed)
    done = train(policy, objective, batches, training, folder=folder, evaluate=measured, title="  reinforce")
    return Speaker(found.module.eval(), found.tokenizer, found.most), done.history


def winning(scores: Sequence[float], others: Sequence[float]) -> float:
    """The share of prompts whose first answer is better, ties counting a half."""
    return sum((a > b) + (a == b) / 2 for a, b in zip(scores, others, strict=True)) / len(scores)


def _ranks(worth: Sequence[float], labeller: Labeller | None, source: random.Random) -> list[int]:
    """The rank of each, 0 for the best."""
    if labeller is None:
        return [sum(other > one for other in worth) for one in worth]
    order = labeller.rank(worth, source)
    return [order.index(i) for i in range(len(worth))]


def _said(tokenizer: Tokenizer, prompt: str, text: str) -> Piece:
    """A prompt and its answer, with its end."""
    return answer(tokenizer.encode(prompt), [*tokenizer.encode(text), *tokenizer.eos_ids[:1]])
