"""`train`: a model on text, from scratch or from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from allyouneed.core.errors import InputError, unknown

if TYPE_CHECKING:
    from torch import nn

    from allyouneed.data.tokenizers import Tokenizer


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command("train")(train)


def train(
    model: Annotated[
        str, typer.Argument(help="A checkpoint to go on from, or new: and gpt2, llama, bloom, bert or t5.")
    ],
    data: Annotated[str, typer.Argument(help="A .jsonl with `text`, a .txt, a folder of them, or a named corpus.")],
    out: Annotated[Path, typer.Option(help="The run's folder; the model ends up in OUT/model.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 500,
    batch: Annotated[int, typer.Option(help="Rows a step, all ranks together.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens a row.")] = 128,
    lr: Annotated[float, typer.Option(help="The peak learning rate.")] = 1e-3,
    dim: Annotated[int, typer.Option(help="Of a new model.")] = 128,
    layers: Annotated[int, typer.Option(help="Of a new model.")] = 4,
    heads: Annotated[int, typer.Option(help="Of a new model.")] = 4,
    vocab: Annotated[
        int, typer.Option(help="Of a new model, learned from the data; decoders read bytes with 257.")
    ] = 1024,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    evaluate_every: Annotated[int, typer.Option(help="Steps between looks at held-out text.")] = 100,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change any training setting.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, data order and dropout.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew even if the run could go on.")] = False,
    tracker: Annotated[str | None, typer.Option(help="Also log to tensorboard or trackio.")] = None,
) -> None:
    """Train a decoder on next tokens, BERT on masked ones and pairs, T5 on spans. Ctrl-C saves; the same command goes
    on from there. Runs under torchrun as it is.
    """
    from allyouneed.commands import pretraining
    from allyouneed.core.seeds import seed_everything
    from allyouneed.data.corpora import corpus
    from allyouneed.models.checkpoints.loading import load_module, load_tokenizer, save
    from allyouneed.train.loop import Training
    from allyouneed.train.loop import train as run
    from allyouneed.train.optimizers import AdamW
    from allyouneed.train.ranks import join
    from allyouneed.train.schedules import Cosine
    from allyouneed.train.sharding import whole

    text = corpus(data, seed=seed)
    seed_everything(seed)
    kind, _, family = model.partition(":")
    if kind == "new":
        sizes: dict[str, Any] = {"dim": dim, "layers": layers, "heads": heads, "context": max(length, 256)}
        module, tokenizer = pretraining.new(family, [d.text for d in text.train], vocab=vocab, folder=out, **sizes)
    else:
        module, tokenizer = load_module(model), load_tokenizer(model)
    lessons = pretraining.lessons(module, tokenizer, text, rows=batch, length=length, seed=seed)
    if length > module.config.context:
        raise InputError(f"--length {length} exceeds the model's context of {module.config.context}")
    training = Training(
        steps=steps,
        optimizer=AdamW.Config(lr=lr),
        schedule=Cosine(warmup=max(1, steps // 20)),
        seed=seed,
        save_every=save_every,
        evaluate_every=evaluate_every,
    ).override(*(settings or ()))
    if join().rank == 0:
        _announce(module, tokenizer, lessons.read, training.steps * batch * length)
    callbacks = [_tracker(tracker, out)] if tracker else []
    run(
        module.train(),
        lessons.objective,
        lessons.batches,
        training,
        folder=out,
        evaluate=lessons.evaluate,
        callbacks=callbacks,
        resume=not fresh,
    )
    trained = whole(module.eval())
    if join().rank == 0:
        save(trained, out / "model", tokenizer)
        print(_next_command(trained, out / "model"))


def _next_command(module: nn.Module, folder: Path) -> str:
    from allyouneed.models.decoder import Decoder

    if isinstance(module, Decoder):
        return f"{folder}: try it with: allyouneed generate {folder} 'Once'"
    return f"{folder}: teach it a task with: allyouneed finetune {folder} DATA.jsonl --out FOLDER"


def _announce(module: nn.Module, tokenizer: Tokenizer, read: str, tokens: int) -> None:
    parameters = sum(parameter.numel() for parameter in module.parameters())
    print(
        f"{parameters / 1e6:.2f} M parameters, vocabulary of {tokenizer.vocab_size}; {read}; "
        f"{tokens / 1e6:.2f} M tokens to read, {tokens / parameters:.1f} a parameter"
    )


def _tracker(name: str, folder: Path) -> Any:
    from allyouneed.train.trackers import TensorBoard, Trackio

    trackers = {"tensorboard": lambda: TensorBoard(folder), "trackio": lambda: Trackio("allyouneed", folder.name)}
    if name not in trackers:
        raise unknown("tracker", name, trackers)
    return trackers[name]()
