"""`plan`: what a paper's preset needs on a cluster, and which mesh carries it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from allyouneed.core.config import Config
from allyouneed.core.errors import InputError, unknown

if TYPE_CHECKING:
    from torch import nn

    from allyouneed.train.planner import Machine, Traced

SPLIT = ("shard", "tensor", "expert")
VOCABULARY = 32_000  # of models whose vocabulary is set by the data


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command("plan")(plan)


def plan(
    slug: Annotated[str, typer.Argument(help="A paper of `allyouneed list`; its models of size paper are planned.")],
    gpus: Annotated[int, typer.Option(help="Ranks.")] = 64,
    memory: Annotated[float, typer.Option(help="GB of each.")] = 80.0,
    rows: Annotated[int | None, typer.Option(help="Rows a step, instead of the preset's.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a row, instead of the preset's.")] = None,
    size: Annotated[str, typer.Option(help="paper, laptop or smoke.")] = "paper",
    peak: Annotated[float, typer.Option(help="TFLOP/s of each in bfloat16.")] = 312.0,
    reached: Annotated[float, typer.Option(help="Share of the peak that is reached.")] = 0.5,
    node: Annotated[int, typer.Option(help="Ranks that share a fast network.")] = 8,
    inside: Annotated[float, typer.Option(help="GB/s within a node.")] = 300.0,
    between: Annotated[float, typer.Option(help="GB/s a rank between nodes.")] = 25.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
    as_rows: Annotated[bool, typer.Option("--markdown", help="Rows of a table, as docs/scale.md has them.")] = False,
) -> None:
    """Memory, arithmetic and time of a step, and the mesh to ask for. Nothing is allocated, no rank is started."""
    from allyouneed.train.planner import Machine

    numbers = {"gpus": gpus, "memory": memory, "rows": rows, "length": length, "peak": peak, "reached": reached}
    for name, value in (numbers | {"node": node, "inside": inside, "between": between}).items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InputError(f"--{name} {value:g}: it must be a number above 0")
    machine = Machine(
        memory=memory * 1e9, peak=peak * 1e12, reached=reached, node=node, inside=inside * 1e9, between=between * 1e9
    )
    planned = [_planned(*found, gpus, machine) for found in _presets(slug, size, rows, length)]
    if as_json:
        print(json.dumps({"slug": slug, "gpus": gpus, "machine": machine.to_json(), "models": planned}, indent=1))
    elif as_rows:
        print("\n".join(_row(slug, gpus, one) for one in planned))
    else:
        _show(slug, gpus, memory, planned)


def _presets(slug: str, size: str, rows: int | None, length: int | None) -> Iterator[tuple[str, Any, int, int, bool]]:
    """Name, configuration, rows a step, tokens a row and precision of every model that a paper's size trains."""
    from allyouneed.papers import catalogue
    from allyouneed.papers.base import SIZES

    if size not in SIZES:
        raise unknown("size", size, SIZES)
    config = catalogue.load(slug).sizes[size]
    narrow = any(getattr(c, "precision", "") == "bf16" for _, c in _within(config, ""))
    found: dict[Any, str] = {}
    for name, model in _within(config, ""):
        if hasattr(model, "num_parameters") and not any(other.startswith(f"{name}.") for other in found.values()):
            found.setdefault(model, name)
    if not found:
        raise InputError(f"{slug}: its {size} size trains no model that can be planned")
    for model, name in found.items():
        tokens: Any = length or getattr(config, "length", 0) or getattr(model, "context", 512)
        batch: Any = rows or getattr(config, "rows", 0) or getattr(config, "batch_tokens", 0) // tokens or 256
        yield name, _with_vocabulary(model), batch, min(tokens, getattr(model, "context", tokens)), narrow


def _within(config: Any, path: str) -> Iterator[tuple[str, Any]]:
    """All configurations in a configuration, models not entered."""
    if isinstance(config, tuple):
        for i, child in enumerate(config):
            yield from _within(child, f"{path}.{i}".strip("."))
    if not isinstance(config, Config):
        return
    yield path, config
    if not hasattr(config, "num_parameters"):
        for f in dataclasses.fields(config):
            yield from _within(getattr(config, f.name), f"{path}.{f.name}".strip("."))


def _with_vocabulary(model: Any) -> Any:
    sides = {name: getattr(model, name) for name in ("encoder", "decoder") if hasattr(model, name)}
    if sides:
        return model.replace(**{name: _with_vocabulary(side) for name, side in sides.items()})
    return model if model.vocab_size > 1 else model.replace(vocab_size=VOCABULARY)


def _planned(
    name: str, model: Any, batch: int, length: int, narrow: bool, gpus: int, machine: Machine
) -> dict[str, Any]:
    """One model's numbers, and its plan if there is one."""
    import torch

    from allyouneed.train import planner, tracing

    try:
        traced = tracing.trace(model.build, lambda module: _pass(module, length), length, narrow=narrow)
    except InputError as error:
        return {"name": name, "refused": str(error)}
    with torch.device("meta"):
        outline = model.build()
    plans = planner.plan(traced, gpus, batch, outline, machine, narrow=narrow)
    return {
        "name": name,
        "parameters": traced.parameters,
        "rows": batch,
        "length": length,
        "precision": "bf16" if narrow else "fp32",
        "step_flops": 3 * batch * traced.flops.of_one(),
        "plan": plans[0].to_json() if plans else None,
        "least": None if plans else _least(traced, batch, outline, machine, narrow),
    }


def _pass(module: nn.Module, length: int) -> None:
    """The forward pass of one row, and what the loss keeps: the logits' gradient."""
    import torch

    ids = torch.zeros(1, length, dtype=torch.long)
    reads_two = "source" in inspect.signature(module.forward).parameters
    logits = (module(ids, ids) if reads_two else module(ids)).logits
    logits.float().exp().sum()


def _least(traced: Traced, batch: int, outline: nn.Module, machine: Machine, narrow: bool) -> int | None:
    """The fewest ranks, a power of two, on which it fits."""
    from allyouneed.train import planner

    for ranks in (1 << n for n in range(15)):
        if planner.plan(traced, ranks, max(batch, ranks), outline, machine, narrow=narrow):
            return ranks
    return None


def _row(slug: str, gpus: int, one: dict[str, Any]) -> str:
    """A model as a row of a table."""
    cells = [f"{slug}, {one['name']}"]
    if "refused" in one:
        return f"| {cells[0]} | – | {gpus} | {one['refused']} | – | – | – | – |"
    cells += [f"{one['parameters'] / 1e9:.3g} B", str(gpus)]
    found = one["plan"]
    if found is None:
        return f"| {' | '.join(cells)} | does not fit; {one['least']} ranks would do | – | – | – | – |"
    mesh = ", ".join(f"{name} {size}" for name, size in found["mesh"].items() if name in (*SPLIT, "data") and size > 1)
    batch = f"{found['rows']} · {found['accumulate']}" + (", recomputed" if found["recompute"] else "")
    held = found["weights"] + found["gradients"] + found["optimizer"]
    kept = found["activations"] + found["gathered"]
    cells += [mesh, batch, f"{held / 1e9:.1f}", f"{kept / 1e9:.1f}", f"{found['seconds']:.2g}"]
    return f"| {' | '.join(cells)} |"


def _show(slug: str, gpus: int, memory: float, planned: list[dict[str, Any]]) -> None:
    for one in planned:
        if "refused" in one:
            print(f"{slug}, {one['name']}: {one['refused']}")
            continue
        print(
            f"{slug}, {one['name']}: {one['parameters'] / 1e9:.3g} B parameters, {one['rows']} rows of {one['length']} "
            f"tokens a step in {one['precision']}, {one['step_flops']:.3g} FLOPs"
        )
        if one["plan"] is None:
            fewest = f"{one['least']} ranks would do" if one["least"] else "nor into those of any number of ranks"
            print(f"  does not fit into {gpus} ranks of {memory:g} GB; {fewest}")
            continue
        found = one["plan"]
        mesh = " ".join(f"{name}={size}" for name, size in found["mesh"].items() if name != "slice_gradients")
        print(f"  mesh {mesh}; {found['rows']} rows a rank at once, accumulate={found['accumulate']}", end="")
        print(", blocks recomputed" if found["recompute"] else "")
        parts = ("weights", "gradients", "optimizer", "activations", "gathered")
        gigabytes = ", ".join(f"{part} {found[part] / 1e9:.2f}" for part in parts)
        print(f"  GB a rank: {found['memory'] / 1e9:.1f} of {memory:g} ({gigabytes})")
        print(f"  a step: {found['seconds']:.3g} s if nothing overlaps, {found['messages']:.2g} s of it messages")
        print("  " + _settings(found))


def _settings(found: dict[str, Any]) -> str:
    """What to add to the command to train so."""
    chosen = {f"training.mesh.{name}": size for name, size in found["mesh"].items() if name in SPLIT and size > 1}
    chosen |= {"training.mesh.slice_gradients": True} if found["mesh"]["slice_gradients"] else {}
    chosen |= {"training.accumulate": found["accumulate"]} if found["accumulate"] > 1 else {}
    chosen |= {"training.recompute": True} if found["recompute"] else {}
    return " ".join(f"--set {name}={value}" for name, value in chosen.items()) or "no settings are needed"
