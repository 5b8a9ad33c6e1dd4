"""What the papers on scale train alike: small decoders of GPT-2's block, and runs of them on a lexicon's words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allyouneed import core
from allyouneed.data.lexicon import Lexicon
from allyouneed.evaluate.perplexity import batch_nll
from allyouneed.models import gpt2
from allyouneed.nn.initialise import Normal
from allyouneed.objectives.next_token import next_token
from allyouneed.train import ladder
from allyouneed.train.loop import Training
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Cosine
from allyouneed.train.suite import Member


@dataclass(frozen=True, kw_only=True)
class Words(core.Config):
    """What is read: the source, rows a batch, tokens a row, and rows held out to test on."""

    world: Lexicon.Config
    rows: int = 4  # fewer tokens a step than the critical batch, or data is wasted (Kaplan et al. 2020, sec. 5.1)
    length: int = 60
    held_out: int = 256

    @property
    def batch_tokens(self) -> int:
        """Tokens a step."""
        return self.rows * self.length


def small(dim: int, num_layers: int = 2, *, vocab_size: int = 32, length: int = 60) -> Member:
    """A size, with a rate in proportion to 1/width (Yang et al. 2022), 0.005 at 64: what trials of 16 to 96 with four
    times the batch wanted, over the root of four.

    >>> small(32).training.optimizer.lr, small(32).model.num_parameters(embeddings=False)
    (0.01, 25472)
    """
    model = gpt2.architecture(
        vocab_size=vocab_size, context=length, dim=dim, num_layers=num_layers, num_heads=max(1, dim // 16)
    )
    return Member(model=model.replace(initialise=Normal(std=0.5 * dim**-0.5)), training=training(0.32 / dim))


def training(lr: float, steps: int = 1000) -> Training:
    """AdamW, a twentieth of warm-up, a cosine to a tenth (Hoffmann et al. 2022, sec. B); a ladder sets the steps."""
    return Training(steps=steps, optimizer=AdamW.Config(lr=lr), schedule=Cosine(warmup=steps // 20))


def learn(config: Words, world: Lexicon, member: Member, seed: int, folder: Path) -> dict[str, Any]:
    """One run, as plain values: nats a token on rows that are the same for all runs, less what these happen to be more
    surprising than the entropy says. Every batch is new text.
    """
    batch, chance = world.held_out(config.held_out, config.length)
    done = ladder.climb(
        member,
        next_token,
        world.batches(config.rows, config.length, seed=seed),
        lambda module: batch_nll(module, batch["ids"], batch["targets"]) - chance,
        batch_tokens=config.batch_tokens,
        seed=seed,
        folder=folder,
    )
    return vars(done)
