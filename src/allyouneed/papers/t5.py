"""Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer (Raffel et al., 2020).

arXiv:1910.10683.

Claim   Where every task is text in, text out, an encoder and a decoder that were pre-trained to restore spans cut out
        of a text are better, after fine-tuning on a mixture of tasks, than one stack of half the parameters for the
        same computation, be it a causal language model or a prefix language model; and each of the two choices helps
        by itself: the second stack, and spans instead of the rest of a text (table 2).
Here    The chronicle of a small country is read as words. Each arm is pre-trained on it with as many FLOPs, and
        fine-tuned on one examples-proportional mixture of four tasks with few examples each (sums,
        translation, repetition, the first of a list), every source beginning with its task's name. The score is the
        share of answers that are right to the last word, greedily decoded, mean of tasks; the questions were in
        neither text nor mixture. Treatment: encoder and decoder, spans. Controls: the same, to write the rest of a
        split text; one stack, the prefix seen both ways, with either objective; one causal stack that predicts every
        next word; and the treatment without pre-training. All have the same blocks and rates; the one
        stack has the encoder's biases of distance.
Apart   0.2 million parameters and 1.0 million words instead of 220 million and 34 billion tokens; a country whose
        every sentence shows a task instead of the web, and its tasks instead of GLUE, SuperGLUE, SQuAD, summaries and
        translations; AdamW instead of Adafactor. A causal model is trained on every word it
        reads, spans on one in seven: in a training so short that may decide, and the run cannot show what would be
        so after one as long as the paper's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allyouneed import core
from allyouneed.core.seeds import seed_everything
from allyouneed.data.batches import Generated, Windows
from allyouneed.data.chronicle import Chronicle
from allyouneed.data.packing import IGNORED, Batch
from allyouneed.data.pairs import Collate, Mixture, Pair, apart, joined
from allyouneed.data.spans import Spans, Splits, lengths
from allyouneed.models import t5
from allyouneed.models.decoder import Decoder
from allyouneed.models.encoder_decoder import EncoderDecoder
from allyouneed.models.stack import Stack
from allyouneed.nn.flops import TRAINING, Reading
from allyouneed.nn.initialise import Normal
from allyouneed.nn.sight import prefixed
from allyouneed.objectives.next_token import next_token
from allyouneed.objectives.span import rest_given_prefix, target_given_source
from allyouneed.papers import figures
from allyouneed.papers.base import Paper, Report
from allyouneed.train.loop import Training, train
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Constant, Cosine

TREATMENT = "encoder–decoder, spans"
# the shape, and what it is pre-trained on
ARMS: dict[str, tuple[str, str | None]] = {
    TREATMENT: ("two stacks", "spans"),
    "encoder–decoder, rest of text": ("two stacks", "rest"),
    "prefix LM, spans": ("prefix", "spans"),
    "prefix LM, rest of text": ("prefix", "rest"),
    "causal LM, next word": ("causal", "next"),
    "encoder–decoder, not pre-trained": ("two stacks", None),
}
SENTINELS = 32
PAD, END = 0, 1  # padding is also what targets start from


@dataclass(frozen=True, kw_only=True)
class Config(core.Config):
    """The model, its two trainings, what it reads, what it is asked, and the margin of the verdict."""

    model: EncoderDecoder.Config  # its vocabulary is set by the world
    pretraining: Training  # its steps are the treatment's; the others get as many as cost the same
    finetuning: Training
    world: Chronicle.Config
    characters: int = 2_000_000
    rows: int = 32
    length: int = 64  # of a source with its sentinels
    examples: int = 24  # of each task, to fine-tune on
    questions: int = 32  # of each task; few sums are kept out of the text
    better: float = 0.0  # the treatment's score minus each control's


def run(config: Config, report: Report) -> None:
    """Pre-train, fine-tune and ask each arm with each seed, and hold the differences against the margin."""

    def work(arm: tuple[str, str | None], seed: int, folder: Path) -> dict[str, Any]:
        return _scored(config, *arm, seed, folder)

    found = report.repeat(ARMS, work)
    means = {name: [statistics.fmean(one["scores"].values()) for one in values] for name, values in found.items()}
    for name in ARMS:
        report.arm(
            name, **{fact: found[name][0][fact] for fact in ("parameters", "pre-training steps", "pre-training FLOPs")}
        )
        if name != TREATMENT:
            report.check(
                f"score, {TREATMENT} minus {name}",
                values=[a - b for a, b in zip(means[TREATMENT], means[name], strict=True)],
                above=config.better,
            )
    report.table(
        "share of right answers, mean of seeds",
        [
            {"arm": name, "mean": round(statistics.fmean(means[name]), 3)}
            | {task: round(statistics.fmean(one["scores"][task] for one in ones), 3) for task in ones[0]["scores"]}
            for name, ones in found.items()
        ],
    )
    figure, (axes,) = figures.new(8, 3.6)
    figures.bars(
        axes,
        list(means),
        [statistics.fmean(values) for values in means.values()],
        [(min(values), max(values)) for values in means.values()],
        [figures.PALETTE[0], *[figures.CONTROL] * (len(means) - 1)],
        form="{:.2f}",
    )
    figures.describe(axes, title="After fine-tuning on a mixture of four tasks", x="share of right answers")
    report.figure(figure, "Mean score over the tasks of the mixture; line: lowest to highest seed.")


def _scored(config: Config, shape: str, objective: str | None, seed: int, folder: Path) -> dict[str, Any]:
    """What one arm scores on each task, and what it cost."""
    world = config.world.replace(seed=seed).build()
    words, tokens, taught, asked = _material(config, world, seed)
    model = _sized(config.model, len(words) + SENTINELS)
    seed_everything(seed)
    module = (model if shape == "two stacks" else _one_stack(model)).build()
    collate: Collate = partial(apart, start=PAD) if shape == "two stacks" else joined
    learn: Any = {"two stacks": target_given_source, "prefix": rest_given_prefix, "causal": next_token}[shape]
    steps = flops = 0
    if objective is not None:
        each = _flops(module, next(_texts(config, objective, tokens, collate, model.vocab_size - 1, seed)))
        steps = round(_budget(config, model, tokens, seed) / each)
        flops = steps * each
        batches = _texts(config, objective, tokens, collate, model.vocab_size - 1, seed)
        training = config.pretraining.replace(seed=seed, steps=steps)
        train(module, learn, batches, training, folder=folder / "pretraining", title="  pre-train")
    mixture = Mixture(taught, batch_size=config.rows, collate=collate, seed=seed)
    training = config.finetuning.replace(seed=seed)
    train(module, learn, mixture, training, folder=folder / "finetuning", title="  fine-tune")
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "pre-training steps": steps,
        "pre-training FLOPs": flops,
        "scores": {task: _score(module.eval(), shape, collate(pairs)) for task, pairs in asked.items()},
    }


def _budget(config: Config, model: EncoderDecoder.Config, tokens: Tensor, seed: int) -> int:
    """FLOPs of the treatment's pre-training, which are those of every arm."""
    with torch.device("meta"):
        module = model.build()
    batch = next(_texts(config, "spans", tokens, partial(apart, start=PAD), model.vocab_size - 1, seed))
    return config.pretraining.steps * _flops(module, batch)


def _material(
    config: Config, world: Chronicle, seed: int
) -> tuple[dict[str, int], Tensor, dict[str, list[Pair]], dict[str, list[Pair]]]:
    """The vocabulary, the text, what is taught of each task and what is asked; none of the lines is in the text."""
    text = _words(world.text(config.characters, seed))
    lines = {
        task: [line for line, _ in world.questions(task, config.examples + config.questions, seed)]
        for task in world.tasks
    }
    spoken = {word for task, found in lines.items() for line in found for word in _source(task, line.beginning)}
    known = [*world.words, *world.foreign, *world.verbs, *(str(n) for n in range(39))]
    ids = {word: i for i, word in enumerate(["<pad>", "</s>", *sorted({*text, *spoken, *known})])}

    def pair(task: str, beginning: str, answer: str) -> Pair:
        return [ids[word] for word in _source(task, beginning)] + [END], [ids[w] for w in answer.split()] + [END]

    pairs = {task: [pair(task, line.beginning, line.answer) for line in found] for task, found in lines.items()}
    return (
        ids,
        torch.tensor([ids[word] for word in text]),
        {task: found[: config.examples] for task, found in pairs.items()},
        {task: found[config.examples :] for task, found in pairs.items()},
    )


def _source(task: str, beginning: str) -> list[str]:
    return [f"{task}:", *beginning.split()]


def _words(text: str) -> list[str]:
    return text.replace(".", " .").split()


def _texts(config: Config, objective: str, tokens: Tensor, collate: Collate, sentinel: int, seed: int) -> Generated:
    """Batches to pre-train on, of as many texts of the same length whatever the objective."""
    length = lengths(config.length).text
    if objective == "next":
        return Windows(tokens, batch_size=config.rows, length=length, seed=seed)
    given: dict[str, Any] = {"batch_size": config.rows, "collate": collate, "seed": seed}
    if objective == "rest":
        return Splits(tokens, length=length, **given)
    return Spans(tokens, length=config.length, sentinel=sentinel, sentinels=SENTINELS, end=END, **given)


def _sized(model: EncoderDecoder.Config, vocab_size: int) -> EncoderDecoder.Config:
    return model.replace(
        encoder=model.encoder.replace(vocab_size=vocab_size), decoder=model.decoder.replace(vocab_size=vocab_size)
    )


def _one_stack(model: EncoderDecoder.Config) -> Decoder.Config:
    """A decoder of the encoder's blocks: as many layers as one of the two stacks."""
    return Decoder.Config(**{f.name: getattr(model.encoder, f.name) for f in fields(Stack.Config)}, tied=model.tied)


def _flops(module: nn.Module, batch: Batch) -> int:
    """Of training on a batch: the products with weights, not attention's scores nor padding."""

    def read(name: str) -> Reading:
        segments = batch.get({"source": "source_segments", "ids": "segments"}[name])
        return Reading(batch[name].numel() if segments is None else int((segments != 0).sum()))

    if isinstance(module, EncoderDecoder):
        return TRAINING * module.flops(read("source"), read("ids"))
    assert isinstance(module, Decoder)
    return TRAINING * module.flops(read("ids"))


@torch.inference_mode()
def _score(module: nn.Module, shape: str, batch: Batch) -> float:
    """The share of targets that greedy decoding would write: those whose every word is the likeliest after the ones
    before it.
    """
    ask: Mapping[str, Callable[[Any], Tensor]] = {
        "two stacks": lambda m: m(batch["source"], batch["ids"], batch["source_segments"], batch["segments"]).logits,
        "prefix": lambda m: m.head(m.read(batch["ids"], prefixed(m.positions, batch["segments"], batch["prefix"]))),
        "causal": lambda m: m(batch["ids"], segments=batch["segments"]).logits,
    }
    right = (ask[shape](module).argmax(-1) == batch["targets"]) | (batch["targets"] == IGNORED)
    return right.all(1).float().mean().item()


def _model(dim: int, num_layers: int, num_heads: int, hidden_dim: int, head_dim: int) -> EncoderDecoder.Config:
    """T5's parts for two stacks and for one alike: embeddings begin with a variance of 1/dim and are multiplied by
    √dim, which is what T5's scaled head amounts to; scores are divided by √head_dim, as its initial queries are.
    """
    config = t5.architecture(
        vocab_size=64,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=head_dim,
        hidden_dim=hidden_dim,
        scaled=False,
    )

    def even(stack: Stack.Config) -> Stack.Config:
        parts: Sequence[Any] = stack.blocks
        blocks = [block.replace(mixer=block.mixer.replace(scale=None)) for block in parts]
        blocks = [b.replace(cross=b.cross.replace(scale=None)) if hasattr(b, "cross") else b for b in blocks]
        return stack.replace(
            blocks=tuple(blocks),
            embedding_scale=math.sqrt(dim),
            initialise=Normal(std=dim**-0.5),
        )

    return config.replace(encoder=even(config.encoder), decoder=even(config.decoder))


def _training(steps: int, lr: float, *, constant: bool = False) -> Training:
    schedule = Constant(warmup=steps // 20) if constant else Cosine(warmup=steps // 20)
    return Training(steps=steps, optimizer=AdamW.Config(lr=lr), schedule=schedule, log_every=max(1, steps // 10))


PAPER = Paper(
    doc=__doc__,
    run=run,
    evidence="small world",
    minutes={"smoke": 0.2, "laptop": 14},
    sizes={
        "smoke": Config(
            model=_model(16, 1, 2, 32, 8),
            pretraining=_training(6, 3e-3),
            finetuning=_training(6, 3e-3, constant=True),
            world=Chronicle.Config(words=12),
            characters=4_000,
            rows=4,
            length=24,
            examples=6,
            questions=4,
        ),
        "laptop": Config(
            model=_model(64, 2, 4, 256, 16),
            pretraining=_training(900, 4e-3),
            finetuning=_training(250, 3e-3, constant=True),
            world=Chronicle.Config(share=1.0),
            length=32,
        ),
        # the baseline of sec. 3.1: base size, 2¹⁹ steps of 128 rows of 512 tokens, then 2¹⁸ at a constant rate
        "paper": Config(
            model=_model(768, 12, 12, 3072, 64),
            pretraining=_training(2**19, 1e-3).replace(precision="bf16"),
            finetuning=_training(2**18, 1e-4, constant=True).replace(precision="bf16"),
            world=Chronicle.Config(words=2000),
            characters=400_000_000,
            rows=128,
            length=512,
        ),
    },
)
