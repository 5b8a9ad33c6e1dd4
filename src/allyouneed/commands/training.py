"""`train`: a language model on text, from scratch or from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from allyouneed.core.errors import InputError, unknown

if TYPE_CHECKING:
    from allyouneed.data.tokenizers import Tokenizer
    from allyouneed.models.decoder import Decoder


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command("train")(train)


def train(
    model: Annotated[str, typer.Argument(help="A checkpoint to go on from, or new:gpt2, new:llama, new:bloom.")],
    data: Annotated[str, typer.Argument(help="A .jsonl with `text`, a .txt, a folder of them, or a named corpus.")],
    out: Annotated[Path, typer.Option(help="The run's folder; the model ends up in OUT/model.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 500,
    batch: Annotated[int, typer.Option(help="Rows a step, all ranks together.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens a row.")] = 128,
    lr: Annotated[float, typer.Option(help="The peak learning rate.")] = 1e-3,
    dim: Annotated[int, typer.Option(help="Of a new model.")] = 128,
    layers: Annotated[int, typer.Option(help="Of a new model.")] = 4,
    heads: Annotated[int, typer.Option(help="Of a new model.")] = 4,
    vocab: Annotated[int, typer.Option(help="Of a new model: BPE learned from the data, or 257 for bytes.")] = 1024,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    evaluate_every: Annotated[int, typer.Option(help="Steps between looks at held-out text.")] = 100,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change any training setting.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, data order and dropout.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew even if the run could go on.")] = False,
    tracker: Annotated[str | None, typer.Option(help="Also log to tensorboard or trackio.")] = None,
) -> None:
    """Train on next tokens. Ctrl-C saves; the same command goes on from there. Runs under torchrun as it is."""
    import torch

    from allyouneed.core.seeds import seed_everything
    from allyouneed.data.batches import Epochs
    from allyouneed.data.corpora import corpus
    from allyouneed.data.packing import chop, document, take
    from allyouneed.evaluate.perplexity import perplexity as losses
    from allyouneed.evaluate.perplexity import sum_losses
    from allyouneed.models.checkpoints.loading import save
    from allyouneed.objectives.next_token import next_token
    from allyouneed.train.loop import Training
    from allyouneed.train.loop import train as run
    from allyouneed.train.optimizers import AdamW
    from allyouneed.train.ranks import join
    from allyouneed.train.schedules import Cosine
    from allyouneed.train.sharding import whole

    text = corpus(data, seed=seed)
    seed_everything(seed)
    module, tokenizer = _model(model, [d.text for d in text.train], dim, layers, heads, length, vocab)
    if length > module.config.context:
        raise InputError(f"--length {length} exceeds the model's context of {module.config.context}")
    end = tokenizer.eos_ids[:1]
    rows = chop((document([*tokenizer.encode(d.text), *end]) for d in text.train), length)
    held_out = [d.text for d in text.valid][:8]

    def evaluate(trained: torch.nn.Module) -> dict[str, float]:
        loss = sum_losses(losses(trained, tokenizer, held_out, context=length))
        return {"valid_nats_per_token": loss.nats_per_token, "valid_bits_per_byte": loss.bits_per_byte}

    training = Training(
        steps=steps,
        optimizer=AdamW.Config(lr=lr),
        schedule=Cosine(warmup=max(1, steps // 20)),
        seed=seed,
        save_every=save_every,
        evaluate_every=evaluate_every,
    ).override(*(settings or ()))
    batches = Epochs(range(len(rows["ids"])), batch_size=batch, collate=lambda chosen: take(rows, chosen), seed=seed)
    if join().rank == 0:
        _announce(module, tokenizer, len(rows["ids"]), length, training.steps * batch * length)
    callbacks = [_tracker(tracker, out)] if tracker else []
    run(
        module.train(),
        next_token,
        batches,
        training,
        folder=out,
        evaluate=evaluate,
        callbacks=callbacks,
        resume=not fresh,
    )
    trained = whole(module.eval())
    if join().rank == 0:
        save(trained, out / "model", tokenizer)
        print(f"{out / 'model'}: try it with: allyouneed generate {out / 'model'} 'Once'")


def _model(
    name: str, texts: list[str], dim: int, layers: int, heads: int, length: int, vocab: int
) -> tuple[Decoder, Tokenizer]:
    """The module and tokenizer that `name` asks for."""
    from allyouneed.data.tokenizer_training import train_bpe
    from allyouneed.data.tokenizers import byte_tokenizer
    from allyouneed.models import bloom, gpt2, llama
    from allyouneed.models.checkpoints.loading import load_decoder, load_tokenizer

    kind, _, family = name.partition(":")
    if kind != "new":
        return load_decoder(name), load_tokenizer(name)
    makers: dict[str, Any] = {"gpt2": gpt2.architecture, "llama": llama.architecture, "bloom": bloom.architecture}
    if family not in makers:
        raise unknown("architecture", family, makers)
    tokenizer = byte_tokenizer() if vocab == 257 else train_bpe(texts, vocab)
    sizes = {"dim": dim, "num_layers": layers, "num_heads": heads, "context": max(length, 256)}
    return makers[family](vocab_size=tokenizer.vocab_size, **sizes).build(), tokenizer


def _announce(module: Decoder, tokenizer: Tokenizer, rows: int, length: int, tokens: int) -> None:
    parameters = sum(parameter.numel() for parameter in module.parameters())
    print(
        f"{parameters / 1e6:.2f} M parameters, vocabulary of {tokenizer.vocab_size}; {rows} rows of {length} tokens; "
        f"{tokens / 1e6:.2f} M tokens to read, {tokens / parameters:.1f} a parameter"
    )


def _tracker(name: str, folder: Path) -> Any:
    from allyouneed.train.trackers import TensorBoard, Trackio

    trackers = {"tensorboard": lambda: TensorBoard(folder), "trackio": lambda: Trackio("allyouneed", folder.name)}
    if name not in trackers:
        raise unknown("tracker", name, trackers)
    return trackers[name]()
