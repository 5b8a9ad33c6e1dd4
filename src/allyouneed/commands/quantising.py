"""`quantize`: a model with its linear layers stored in 4 or 8 bits, as a folder; what `finetune` is told of that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from allyouneed.core.errors import InputError

if TYPE_CHECKING:
    from allyouneed.adapt.layers import Lora
    from allyouneed.adapt.quantise import Quantise


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command("quantize")(quantize)


def quantize(
    model: Annotated[str, typer.Argument(help="A material, a folder, a hub id or a .gguf file.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    kind: Annotated[str, typer.Option(help="nf4, fp4, int4 or int8.")] = "nf4",
    block: Annotated[int, typer.Option(help="Numbers that share a scale.")] = 64,
    double: Annotated[bool, typer.Option("--double/--no-double", help="Scales in 8 bits as well.")] = True,
    embedding: Annotated[str | None, typer.Option(help="Store the embedding too, in this kind (int8, say).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The facts as JSON, for programs.")] = False,
) -> None:
    """Store a model's linear layers in few bits. With nf4 and fp4 transformers reads the folder through bitsandbytes,
    unless the embedding is stored so as well; every command here reads it.
    """
    from allyouneed.adapt.quantise import Quantise, quantise
    from allyouneed.models.checkpoints.loading import load_module, load_tokenizer, save

    new_folder(out)
    config = Quantise.Config(kind=kind, block=block, double=double, embedding=embedding)
    module = load_module(model, narrow=True)
    before = sum(p.numel() for p in module.parameters())
    layers = quantise(module, config)
    module.float()
    save(module, out, load_tokenizer(model))
    facts = {"kind": kind, "layers": len(layers)} | _facts(module, out, before)
    print(json.dumps(facts) if as_json else _line(facts, out))


def new_folder(out: Path) -> None:
    """Refuse a folder that is there, which may be the model that is read.

    Raises:
        InputError: it exists.
    """
    if out.exists():
        raise InputError(f"{out}: is there already; choose another folder")


def config(kind: str | None, lora: Lora.Config | None) -> Quantise.Config | None:
    """How `finetune --quantize KIND` stores the base, its table of tokens in 8 bits; None without it.

    Raises:
        InputError: no such kind, or nothing that could be trained then.
    """
    from allyouneed.adapt.quantise import Quantise

    if kind is None:
        return None
    if lora is None:
        raise InputError(f"--quantize {kind}: what is stored in few bits is not trained; add --lora R")
    return Quantise.Config(kind=kind, embedding="int8")


def _facts(module: Any, out: Path, before: int) -> dict[str, Any]:
    """Bits of a number in blocks, and bytes on disk and in memory beside those of 16 bits a number."""
    from allyouneed.adapt.quantise import resident
    from allyouneed.models.checkpoints.quantised import stored

    blocks = [weight.blocks for weight in stored(module).values()]
    numbers = sum(one.shape.numel() for one in blocks)
    return {
        "parameters": before,
        "quantised": numbers,
        "bits": sum(one.nbytes for one in blocks) * 8 / numbers,
        "file_bytes": sum(path.stat().st_size for path in out.glob("*.safetensors")),
        "resident_bytes": resident(module),
        "bf16_bytes": 2 * before,
    }


def _line(facts: dict[str, Any], out: Path) -> str:
    share = facts["resident_bytes"] / facts["bf16_bytes"]
    return (
        f"{out}: {facts['layers']} layers in {facts['kind']}, {facts['bits']:.3f} bits a parameter of theirs; "
        f"{facts['file_bytes'] / 1e6:.1f} MB on disk, in memory {share:.2f} of what the model is in bf16"
    )
