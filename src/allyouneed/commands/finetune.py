"""`finetune`: any model of ours by one of the methods in `commands.methods`. Trains, keeps and shows; what is learned
and how it is judged, the method says.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from allyouneed.core.errors import InputError, unknown

if TYPE_CHECKING:
    from torch import nn

    from allyouneed.commands.methods.base import Job


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command("finetune")(finetune)


def finetune(
    model: Annotated[str, typer.Argument(help="A material, a folder, a hub id or a .gguf file.")],
    data: Annotated[Path, typer.Argument(metavar="DATA.jsonl", help="What to learn; its keys depend on --method.")],
    out: Annotated[Path, typer.Option(help="The run's folder; the model ends up in OUT/model.")],
    method: Annotated[
        str,
        typer.Option(
            help="sft; dpo, ipo, reward; ppo, rejection; classify, pairs, similarity, choices, spans, tokens: see "
            "docs/finetune.md."
        ),
    ] = "sft",
    valid: Annotated[Path | None, typer.Option(help="What to judge by; without it, a tenth of DATA.")] = None,
    epochs: Annotated[float, typer.Option(help="How often each example is seen.")] = 3.0,
    batch: Annotated[int, typer.Option(min=1, help="Examples a step; with sft, rows as long as the longest.")] = 16,
    length: Annotated[int | None, typer.Option(help="The most tokens of an example; default: the context.")] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="The peak rate; default: 6.25e-5·√(117 M/parameters), dpo and ipo 1e-6, ppo 1e-5; of adapters tenfold."
        ),
    ] = None,
    auxiliary: Annotated[
        float | None, typer.Option(help="λ of the language model's own loss beside the labels' (GPT: 0.5); default: 0.")
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="β of dpo and ipo, what a nat away from the reference costs; default: 0.1.")
    ] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(help="ε of dpo, the share of preferences that are wrong; default: 0.")
    ] = None,
    margin_field: Annotated[
        str | None, typer.Option(help="Of DATA, a number from 0: how clear a preference is, for reward.")
    ] = None,
    reward: Annotated[
        str | None, typer.Option(metavar="FILE.py|MODEL|URL", help="Of ppo and rejection: how good an answer is.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Answers a rollout of ppo, default: 8 steps'; to a prompt of rejection, default 8."),
    ] = None,
    passes: Annotated[
        int | None, typer.Option(help="Of ppo and rejection: how often an answer is learned from; default: 1.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of an answer of ppo and rejection; default: 64.")] = None,
    kl: Annotated[
        float | None, typer.Option(help="β of ppo, what a nat away from the reference costs; default: 0.02.")
    ] = None,
    kl_target: Annotated[
        float | None, typer.Option(help="Nats an answer of ppo should be away from the reference: β follows.")
    ] = None,
    unended: Annotated[
        float | None, typer.Option(help="The reward of an answer of ppo that comes to no end; default: as of others.")
    ] = None,
    ptx: Annotated[Path | None, typer.Option(help="Texts to learn beside ppo, as many rows a step as answers.")] = None,
    ptx_weight: Annotated[float | None, typer.Option(help="γ of these texts; default: 27.8.")] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Have the workers of a Ray cluster write what ppo and rejection learn: HOST:PORT, auto, or local.",
        ),
    ] = None,
    writers: Annotated[int | None, typer.Option(help="How many of its cores; default: 2.")] = None,
    rank: Annotated[
        int | None, typer.Option("--lora", metavar="R", help="Train adapters of this rank instead of the model.")
    ] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="α, adapters count α/R; default: R.")] = None,
    lora_targets: Annotated[
        str | None, typer.Option(help="Layers by the ends of their names, a regex, or all-linear; default: q,v.")
    ] = None,
    lora_dropout: Annotated[float | None, typer.Option(help="Of what adapters read; default: 0.")] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="Adapters count α/√R.")] = False,
    quantize: Annotated[
        str | None, typer.Option(metavar="KIND", help="Store the base in nf4, fp4, int4 or int8, its table in int8.")
    ] = None,
    paged: Annotated[
        bool, typer.Option("--paged", help="Adam's moments in files; beside a GPU, in the host's memory.")
    ] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave lines out that are wrong, and say so.")] = False,
    save_every: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints; default: an epoch.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change any training setting.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the new layer, the order of examples and dropout.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew even if the run could go on.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The results as JSON, for programs.")] = False,
) -> None:
    """Fine-tune a model. Ctrl-C saves; the same command goes on from there. Runs under torchrun as it is."""
    from allyouneed.adapt.quantise import stored
    from allyouneed.commands import adapters, quantising
    from allyouneed.commands.methods import estimates
    from allyouneed.commands.methods.base import Task
    from allyouneed.commands.methods.table import methods
    from allyouneed.core.files import write_json
    from allyouneed.core.seeds import seed_everything
    from allyouneed.models.checkpoints.loading import load_module, load_tokenizer
    from allyouneed.models.heads import Head
    from allyouneed.nn.digests import digest
    from allyouneed.train.loop import Training, train
    from allyouneed.train.optimizers import AdamW, PagedAdamW
    from allyouneed.train.ranks import join
    from allyouneed.train.schedules import Linear

    known = methods()
    options: dict[str, Any] = {"auxiliary": auxiliary, "beta": beta}
    options |= {"label_smoothing": label_smoothing, "margin_field": margin_field}
    options |= {"reward": reward, "samples": samples, "passes": passes, "max_new_tokens": max_new_tokens}
    options |= {"kl": kl, "kl_target": kl_target, "unended": unended, "ptx": ptx, "ptx_weight": ptx_weight}
    options |= {"ray": ray, "writers": writers}
    if method not in known:
        raise unknown("method", method, known)
    if not 0 < epochs < math.inf:
        raise InputError(f"--epochs {epochs}; a number above 0 is needed")
    given = {name: value for name, value in options.items() if value is not None}
    known[method].check(method, given, known)
    lora = adapters.config(rank, lora_alpha, lora_targets, lora_dropout, rslora)
    storage = quantising.config(quantize, lora)
    seed_everything(seed)
    few = storage is not None  # then each layer is stored in few bits as it comes from the file
    module, tokenizer = load_module(model, packed=few, narrow=few), load_tokenizer(model)
    if isinstance(module, Head):
        module = module.model  # of what it was tuned to before only the layer is replaced
    base = digest(module)
    bad: list[str] | None = [] if skip_bad else None
    with ExitStack() as kept:
        what: dict[str, Any] = {
            "method": method,
            "data": data,
            "valid": valid,
            "out": out,
            "fresh": fresh,
            "kept": kept,
        }
        task = Task(**what, length=length, seed=seed, bad=bad, options=given, lora=lora, quantise=storage)
        job = known[method].prepare(module, tokenizer, task)
        parameters = sum(p.numel() for p in job.module.parameters()) + stored(job.module)
        usual = known[method].lr or 6.25e-5 * math.sqrt(117e6 / parameters)
        rate = lr if lr is not None else min(1e-3, usual * (10 if lora else 1))
        each, steps = job.steps(epochs, batch)
        how: dict[str, Any] = {"lr": rate, "betas": (0.9, 0.999), "weight_decay": 0.01}
        training = Training(
            steps=steps,
            optimizer=PagedAdamW.Config(**how, folder=str(out)) if paged else AdamW.Config(**how),
            schedule=Linear(warmup=max(1, round(0.1 * steps))),
            seed=seed,
            save_every=save_every or each,
            evaluate_every=each,
        ).override(*(settings or ()))
        known[method].check_training(method, training)
        first = join().rank == 0
        if first:
            _announce(job, model, method, training, batch, bad)
        asked: dict[str, Any] = {"model": model, "weights": base, "batch": batch, "learned": job.digest(task)}
        asked |= {"architecture": module.config.to_json(), "tokenizer": tokenizer.identity}
        asked |= {"lora": lora.to_json()} if lora else {}
        asked |= {"quantise": storage.to_json()} if storage else {}
        if not fresh:
            _check_task(out, asked)
        batches = job.batches(batch, seed)
        found = dict(job.begin())
        if job.probe is not None and join().world == 1:
            print(f"estimate: {estimates.told(job, batch, training)}", file=sys.stderr)
        before = dict(job.judge(job.valid)) if job.before else {}
        if first:
            write_json(out / "task.json", asked)

        judged = dict[str, float]()  # the last time, which is after the last step if any is taken

        def evaluate(trained: nn.Module) -> Mapping[str, float]:
            judged.update(job.judge(job.valid))
            return {f"valid_{name}": value for name, value in judged.items()}

        trained = train(
            job.module.train(),
            job.objective,
            batches,
            training,
            folder=out,
            evaluate=evaluate,
            resume=not fresh,
        )
        if trained.averages is not None:  # what was judged all along
            job.module.load_state_dict(trained.averages, strict=False)
        results: dict[str, Any] = {"method": method, "train": len(job.train), "valid": len(job.valid)}
        results |= found | {f"{name}_before": value for name, value in before.items()}
        results |= judged or job.judge(job.valid)
        results |= {"left_out": len(bad or ())} | ({"quantize": storage.kind} if storage else {})
        _keep(job, model, out, results, as_json)


def _check_task(out: Path, task: Mapping[str, Any]) -> None:
    """Refuse to go on in a folder where something else was being learned."""
    from allyouneed.core.files import read_json

    path = out / "task.json"
    if path.is_file() and read_json(path) != task:
        what = "another model, data, method or --batch was begun there"
        raise InputError(f"{out}: {what}; choose another --out, or add --fresh")


def _keep(job: Job, model: str, out: Path, results: dict[str, Any], as_json: bool) -> None:
    """Write the model and what was found, on the first rank, which all help to put the model together."""
    from allyouneed.adapt import lora
    from allyouneed.commands import adapters
    from allyouneed.core.files import write_json
    from allyouneed.models.checkpoints.loading import save
    from allyouneed.train.ranks import join
    from allyouneed.train.sharding import whole

    learned = job.model(whole(job.module.eval()))
    if join().rank == 0:
        results |= job.end(out)
        if lora.names(learned):
            adapters.keep(job, learned, model, out / "model")
        else:
            save(learned, out / "model", job.tokenizer)
        write_json(out / "results.json", results)
        _show(results, out, model, as_json)


def _announce(job: Job, model: str, method: str, training: Any, batch: int, bad: list[str] | None) -> None:
    """What will be trained, as a table on standard error."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=escape(f"{method}: {model}"), show_header=False)
    parts: Counter[str] = Counter()
    called = {"layer.": "new layer", ".adapters.": "adapters", "embedding": "embeddings"}
    for name, parameter in job.module.named_parameters():
        name = name.removeprefix("model.")
        inner = next((part for part in (*called, "blocks") if part in name), "other")
        if parameter.requires_grad:
            parts[called.get(inner, inner)] += parameter.numel()
    total = sum(parts.values())
    shown.add_row("trained", f"{total:,} parameters: " + ", ".join(f"{part} {n:,}" for part, n in parts.items()))
    frozen = sum(p.numel() for p in job.module.parameters()) - total
    if frozen:
        shown.add_row("frozen", f"{frozen:,} parameters; {total / (total + frozen):.3%} of all are trained")
    shown.add_row("examples", f"{len(job.lengths):,} to learn from, {len(job.valid):,} to judge by")
    for name, value in job.told.items():
        shown.add_row(name, escape(value))
    shown.add_row("tokens", f"median {statistics.median(job.lengths):g}, longest {max(job.lengths)}")
    seen = training.steps * batch / job.repeats / len(job.train)
    shown.add_row("training", f"{training.steps} steps of {batch}, {seen:.1f} epochs; rate {training.optimizer.lr:.3g}")
    if job.whole(batch) > 1:
        shown.add_row("rounds", _rounds(training.steps, job.whole(batch)))
    console = Console(stderr=True, highlight=False)
    console.print(shown)
    for line in (bad or [])[:5]:
        console.print(f"left out: {line}", soft_wrap=True, markup=False)
    if bad and len(bad) > 5:
        console.print(f"left out: {len(bad) - 5} more")


def _rounds(steps: int, whole: int) -> str:
    """How often the model answers anew; once is not what who asks for a policy means."""
    rounds = f"{math.ceil(steps / whole)} of {whole} steps"
    if steps > whole:
        return f"{rounds}, each on new answers"
    return f"{rounds}: all is learned from answers of the model as it came; more --epochs have it answer anew"


def _show(results: Mapping[str, Any], out: Path, model: str, as_json: bool) -> None:
    from allyouneed.models.checkpoints.adapters import is_adapter

    if as_json:
        print(json.dumps(results))
        return
    for name, value in results.items():
        print(f"{name:<24} {f'{value:.4f}' if isinstance(value, float) else value}")
    if not is_adapter(out / "model"):
        print(f"{out / 'model'}: the tuned model")
        return
    kind = results.get("quantize")
    over = f", judged over its layers in {kind}" if kind else ""
    same = f" --quantize {kind}" if kind in ("nf4", "fp4") else ""  # those of 4 and 8 bits are packed otherwise there
    served = f"allyouneed serve {model}{same} --adapter tuned={out / 'model'}"
    print(f"{out / 'model'}: an adapter of {model}{over}; {served}")
