"""`merge`: a model and an adapter become one model, which costs no more than the model did."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command("merge")(merge)


def merge(
    model: Annotated[str, typer.Argument(help="The base: a material, a folder, a hub id or a .gguf file.")],
    adapter: Annotated[Path, typer.Argument(help="A folder with an adapter in PEFT's layout.")],
    out: Annotated[Path, typer.Argument(help="The folder of the merged model.")],
) -> None:
    """Add a LoRA adapter to the weights of its base and save the model (Hugging Face layout, float32)."""
    from allyouneed.adapt import lora
    from allyouneed.models.checkpoints.adapters import load_adapter
    from allyouneed.models.checkpoints.loading import load_module, load_tokenizer, save

    module, tokenizer = load_module(model), load_tokenizer(model)
    load_adapter(module, adapter)
    layers = len(lora.adapted(module))
    lora.merge(module)
    lora.unload(module)
    save(module, out, tokenizer)
    print(f"{out}: {model} with {adapter} merged into {layers} layers; try it with: allyouneed generate {out} 'Once'")
