"""`merge`, and what `finetune` does where it trains adapters only: the options, and what is kept of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from allyouneed.commands.quantising import new_folder
from allyouneed.core.errors import InputError

if TYPE_CHECKING:
    from allyouneed.adapt.layers import Lora
    from allyouneed.commands.methods.base import Job


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command("merge")(merge)


def merge(
    model: Annotated[str, typer.Argument(help="The base: a material, a folder, a hub id or a .gguf file.")],
    adapter: Annotated[Path, typer.Argument(help="A folder with an adapter in PEFT's layout.")],
    out: Annotated[Path, typer.Argument(help="The folder of the merged model; it must not exist.")],
) -> None:
    """Add a LoRA adapter to the weights of its base and save the model (Hugging Face layout, float32)."""
    from allyouneed.models.checkpoints.adapters import merge_adapter
    from allyouneed.models.checkpoints.loading import load_module, load_tokenizer, save

    new_folder(out)
    module, tokenizer = load_module(model), load_tokenizer(model)
    layers = merge_adapter(module, adapter)
    save(module, out, tokenizer)
    print(f"{out}: {model} with {layers} layers of {adapter}; try it with: allyouneed generate {out} 'Once'")


def config(
    rank: int | None, alpha: float | None, targets: str | None, dropout: float | None, rslora: bool
) -> Lora.Config | None:
    """What the options ask for, None without --lora.

    Raises:
        InputError: one of the others without --lora, or a value out of range.
    """
    asked: dict[str, Any] = {"alpha": alpha, "targets": targets, "dropout": dropout, "rslora": rslora or None}
    given = {name: value for name, value in asked.items() if value is not None}
    if rank is None:
        if given:
            name = next(iter(given))
            raise InputError(f"--{name if name == 'rslora' else f'lora-{name}'} says how --lora adapts; add --lora R")
        return None
    from allyouneed.adapt.layers import Lora
    from allyouneed.adapt.targets import ALL_LINEAR

    if targets is not None and targets != ALL_LINEAR and not re.search(r"[\\^$*+?()\[\]{}|]", targets):
        given["targets"] = tuple(one.strip() for one in targets.split(","))  # else a pattern for whole names
    return Lora.Config(rank=rank, **given)


def keep(job: Job, learned: Any, model: str, folder: Path) -> None:
    """Write an adapter and the tokenizer; of a model with a head the whole, merged, since no adapter says its labels.

    Args:
        job: what was trained.
        learned: its module, put together.
        model: the base's name, which the adapter is to say.
        folder: where to.
    """
    from allyouneed.adapt import lora
    from allyouneed.adapt.quantise import dequantise
    from allyouneed.models.checkpoints.adapters import save_adapter
    from allyouneed.models.checkpoints.loading import save
    from allyouneed.models.heads import Head

    if isinstance(learned, Head):
        lora.merge(dequantise(learned))
        lora.unload(learned)
        save(learned, folder, job.tokenizer)
        return
    base = str(Path(model).resolve()) if Path(model).exists() else model
    save_adapter(learned, folder, base=base)
    job.tokenizer.save(folder)
