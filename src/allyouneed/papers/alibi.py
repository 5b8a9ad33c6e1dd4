"""Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation (Press et al., 2022).

arXiv:2108.12409.

Claim   A model whose attention scores are lowered in proportion to distance, s(q, k) − m·(q − k), each head with its
        own slope m, can be tested on longer sequences than it was trained on without growing worse, where sinusoidal
        positions fail at once; and at twice its training length it is as good as a sinusoidal model that was trained
        at that length.
Here    One decoder, one corpus of English prose read as bytes, one budget of tokens. Only the `positions` part changes:
        ALiBi, sinusoidal, rotary, T5's learned bias; and sinusoidal once more, trained at twice the length. All
        multiply their embeddings by √dim, as sinusoidal positions want. Every context length is judged on the same last
        bytes of a window, so that a longer context can only help by being used (the paper's sliding evaluation,
        appendix B, keeps the early-token effect out the same way).
Apart   0.2 million parameters instead of 247 million and 1.3 billion, bytes instead of words, some 0.4 MB of text.
        The slopes are the paper's. At this size little is gained from beyond the training length by any method, so
        the run can show that ALiBi does not break, not how far long contexts help; nor does it show the savings
        in time and memory. In so few steps sinusoidal positions and T5's bias are behind already at their own
        training length, which makes the comparison at 2L an easy one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from allyouneed import core
from allyouneed.core.seeds import seed_everything
from allyouneed.data.batches import Windows
from allyouneed.data.corpora import Document, corpus
from allyouneed.evaluate.perplexity import last_tokens_nll
from allyouneed.models import gpt2, llama
from allyouneed.models.decoder import Decoder
from allyouneed.nn.initialise import Normal
from allyouneed.nn.positions import Alibi, RelativeBias, Rotary, Sinusoidal
from allyouneed.objectives.next_token import next_token
from allyouneed.papers import figures
from allyouneed.papers.base import Paper, Report
from allyouneed.train.loop import Training, train
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Cosine

ARMS = {
    "ALiBi": (Alibi.Config(), 1),
    "sinusoidal": (Sinusoidal.Config(), 1),
    "rotary": (Rotary.Config(), 1),
    "T5 bias": (RelativeBias.Config(), 1),
    "sinusoidal, trained at 2L": (Sinusoidal.Config(), 2),
}


@dataclass(frozen=True, kw_only=True)
class Config(core.Config):
    """The model, its training, the lengths and the margins of the verdict, in nats per byte."""

    model: Decoder.Config
    training: Training
    corpus: str = "python-reference"
    length: int = 128  # L
    batch_tokens: int = 4096  # the same for every arm, whatever its length
    tested: tuple[int, ...] = (1, 2, 4, 8)  # multiples of L
    judged: int = 32  # bytes at the end of each window
    windows: int = 128
    not_worse: float = 0.03  # ALiBi at 8 L against itself at L, and at 2 L against sinusoidal trained there
    breaks: float = 0.10  # sinusoidal at 2 L and at the longest against itself at L


def run(config: Config, report: Report) -> None:
    """Train each arm with each seed, test it at every length, and hold the differences against the margins."""
    if config.tested[0] != 1 or 2 not in config.tested or sorted(config.tested) != list(config.tested):
        raise core.InputError(f"tested={config.tested}: rising multiples of L are wanted, 1 and 2 among them")
    text = corpus(config.corpus)
    training_bytes, windows = _bytes(text.train), _windows(_bytes(text.valid), config)

    def work(arm: tuple[core.Config, int], seed: int, folder: Path) -> list[float]:
        positions, factor = arm
        module = _trained(config, positions, factor * config.length, training_bytes, seed, folder)
        return [
            last_tokens_nll(module, windows, context=config.length * multiple, last=config.judged).mean().item()
            for multiple in config.tested
        ]

    by_arm = report.repeat(ARMS, work)
    _record(config, report, by_arm)
    last, twice = len(config.tested) - 1, config.tested.index(2)
    alibi, sinusoidal, long = by_arm["ALiBi"], by_arm["sinusoidal"], by_arm["sinusoidal, trained at 2L"]
    furthest = f"{config.tested[-1]}L"
    report.check(f"ALiBi at {furthest} minus at L", values=[s[last] - s[0] for s in alibi], below=config.not_worse)
    for name, at in (("2L", twice), (furthest, last)):
        report.check(f"sinusoidal at {name} minus at L", values=[s[at] - s[0] for s in sinusoidal], above=config.breaks)
    report.check(
        "ALiBi minus sinusoidal trained at 2L, at 2L",
        values=[a[twice] - s[twice] for a, s in zip(alibi, long, strict=True)],
        below=config.not_worse,
    )


def _trained(config: Config, positions: core.Config, length: int, tokens: Tensor, seed: int, folder: Path) -> Decoder:
    seed_everything(seed)
    module = config.model.replace(positions=positions).build()
    batches = Windows(tokens, batch_size=config.batch_tokens // length, length=length, seed=seed)
    train(module, next_token, batches, config.training.replace(seed=seed), folder=folder, title="  train")
    return module.eval()


def _windows(tokens: Tensor, config: Config) -> Tensor:
    """Evenly spread windows of the longest length tested, each with the byte after it: (windows, T + 1)."""
    length = config.length * config.tested[-1]
    starts = torch.linspace(0, len(tokens) - length - 1, config.windows).long()
    return tokens[starts[:, None] + torch.arange(length + 1)].long()


def _record(config: Config, report: Report, by_arm: dict[str, list[list[float]]]) -> None:
    lengths = [config.length * multiple for multiple in config.tested]
    figure, (axes,) = figures.new()
    for name, values in by_arm.items():
        report.arm(name, parameters=config.model.replace(positions=ARMS[name][0]).num_parameters())
        report.curve(name, lengths, values, x_label="context (bytes)", y_label="loss (nats per byte)")
        figures.band(axes, lengths, values, name, style="--" if ARMS[name][1] > 1 else "-")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, list(map(str, lengths)))
    figures.mark(axes, "training length L", x=config.length)
    figures.describe(
        axes,
        title="Trained short, tested long",
        x="context at test time (bytes)",
        y=f"loss on the last {config.judged} bytes (nats)",
    )
    figures.label_ends(axes)
    report.figure(figure, "Loss on the same bytes after ever longer contexts; band: lowest to highest seed.")


def _bytes(documents: Sequence[Document]) -> Tensor:
    text = "\n".join(document.text for document in documents)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _small(dim: int, num_layers: int) -> Decoder.Config:
    """LLaMA's block; embeddings begin with a variance of 1/dim and are multiplied by √dim (Vaswani et al. 2017)."""
    config = llama.architecture(
        vocab_size=256, context=128, dim=dim, num_layers=num_layers, num_heads=4, hidden_dim=3 * dim, tied=True
    )
    return config.replace(initialise=Normal(std=dim**-0.5), embedding_scale=dim**0.5)


def _training(steps: int) -> Training:
    return Training(
        steps=steps, optimizer=AdamW.Config(lr=3e-3), schedule=Cosine(warmup=steps // 20), log_every=max(1, steps // 20)
    )


# The paper's large model (sec. 5): 25 layers of 16 heads, dimension 2048, hidden 8192, trained at 1024 for 50 k updates
LARGE = gpt2.architecture(vocab_size=50257, context=1024, dim=2048, num_layers=25, num_heads=16)

PAPER = Paper(
    doc=__doc__,
    run=run,
    evidence="small world",
    minutes={"smoke": 0.2, "laptop": 12},
    sizes={
        "smoke": Config(model=_small(32, 1), training=_training(12), length=16, batch_tokens=512, judged=8, windows=16),
        "laptop": Config(model=_small(64, 3), training=_training(400)),
        "paper": Config(
            model=LARGE,
            training=Training(steps=50_000, optimizer=AdamW.Config(lr=2e-4), schedule=Cosine(warmup=500)),
            length=1024,
            batch_tokens=256 * 1024,
            tested=(1, 2, 4),
            judged=512,
        ),
    },
)
