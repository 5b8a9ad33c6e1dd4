"""`finetune`: any model of ours on labelled lines, on answers or on conversations."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from allyouneed.core.errors import InputError, brief, unknown

if TYPE_CHECKING:
    from torch import Tensor, nn

    from allyouneed.data import jsonl
    from allyouneed.data.tokenizers import Tokenizer
    from allyouneed.models.checkpoints.huggingface import Model

FRAME = ("<|start|>", "<|delimiter|>", "<|extract|>")  # what a decoder reads around and between texts
SFT = "sft"


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command("finetune")(finetune)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be learned, as the command line says it."""

    method: str
    data: Path
    valid: Path | None
    length: int | None
    auxiliary: float
    seed: int
    bad: list[str] | None  # where errors of lines go; None: the first one ends all


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a method prepares: a module, its objective, what it learns and how it is judged."""

    module: Model
    tokenizer: Tokenizer
    objective: Any
    collate: Callable[[Any], dict[str, Tensor]]
    train: Sequence[Any]
    valid: Sequence[Any]
    lengths: Sequence[int]  # tokens of each example to learn from
    judge: Callable[[Sequence[Any]], Mapping[str, float]]
    labels: Mapping[str, int]  # examples of each class, where there are classes

    def digest(self, task: Task) -> str:
        """Of all that is learned, in order, and how."""
        learned = [[x.tolist() for x in one.values()] if isinstance(one, dict) else one for one in self.train]
        said = repr((task.method, task.auxiliary, list(self.labels), learned))
        return hashlib.sha256(said.encode()).hexdigest()


def finetune(
    model: Annotated[str, typer.Argument(help="A material, a folder, a hub id or a .gguf file.")],
    data: Annotated[Path, typer.Argument(metavar="DATA.jsonl", help="What to learn; its keys depend on --method.")],
    out: Annotated[Path, typer.Option(help="The run's folder; the model ends up in OUT/model.")],
    method: Annotated[
        str, typer.Option(help="sft, classify, pairs, similarity, choices, spans or tokens: see docs/finetune.md.")
    ] = SFT,
    valid: Annotated[Path | None, typer.Option(help="What to judge by; without it, a tenth of DATA.")] = None,
    epochs: Annotated[float, typer.Option(help="How often each example is seen.")] = 3.0,
    batch: Annotated[int, typer.Option(min=1, help="Examples a step; with sft, rows as long as the longest.")] = 16,
    length: Annotated[int | None, typer.Option(help="The most tokens of an example; default: the context.")] = None,
    lr: Annotated[float | None, typer.Option(help="The peak rate; default: 6.25e-5·√(117 M/parameters).")] = None,
    auxiliary: Annotated[
        float, typer.Option(help="λ of the language model's own loss beside the labels' (GPT: 0.5).")
    ] = 0.0,
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
    from allyouneed.core.seeds import seed_everything
    from allyouneed.data.batches import Epochs
    from allyouneed.data.labelled import METHODS
    from allyouneed.models.checkpoints.loading import load_module, load_tokenizer
    from allyouneed.models.heads import Head
    from allyouneed.train.loop import Training, train
    from allyouneed.train.optimizers import AdamW
    from allyouneed.train.ranks import join
    from allyouneed.train.schedules import Linear

    if method not in (SFT, *METHODS):
        raise unknown("method", method, (SFT, *METHODS))
    if not 0 < epochs < math.inf:
        raise InputError(f"--epochs {epochs}; a number above 0 is needed")
    if not 0 <= auxiliary < math.inf:
        raise InputError(f"--auxiliary {auxiliary}; a number from 0 is needed")
    if auxiliary and method == SFT:
        raise InputError("--auxiliary: sft learns the language model's loss as it is; leave it out")
    seed_everything(seed)
    module, tokenizer = load_module(model), load_tokenizer(model)
    if isinstance(module, Head):
        module = module.model  # of what it was tuned to before only the layer is replaced
    bad: list[str] | None = [] if skip_bad else None
    task = Task(method=method, data=data, valid=valid, length=length, auxiliary=auxiliary, seed=seed, bad=bad)
    job = (_instructions if method == SFT else _labelled)(module, tokenizer, task)
    parameters = sum(p.numel() for p in job.module.parameters())
    rate = lr if lr is not None else min(1e-3, 6.25e-5 * math.sqrt(117e6 / parameters))
    each = math.ceil(len(job.train) / batch)
    training = Training(
        steps=max(1, round(epochs * each)),
        optimizer=AdamW.Config(lr=rate, betas=(0.9, 0.999), weight_decay=0.01),
        schedule=Linear(warmup=max(1, round(0.1 * epochs * each))),
        seed=seed,
        save_every=save_every or each,
        evaluate_every=each,
    ).override(*(settings or ()))
    first = join().rank == 0
    if first:
        _announce(job, model, method, training, batch, bad)
    _same_task(out, fresh, first, {"model": model, "learned": job.digest(task)})
    before = dict(job.judge(job.valid)) if method == SFT else {}
    batches = Epochs(job.train, batch_size=batch, collate=job.collate, seed=seed)

    def evaluate(trained: nn.Module) -> Mapping[str, float]:
        return {f"valid_{name}": value for name, value in job.judge(job.valid).items()}

    trained = train(
        job.module.train(), job.objective, batches, training, folder=out, evaluate=evaluate, resume=not fresh
    )
    if not first:
        return
    if trained.averages is not None:  # what was judged all along
        job.module.load_state_dict(trained.averages, strict=False)
    results: dict[str, Any] = {"method": method, "train": len(job.train), "valid": len(job.valid)}
    results |= {f"{name}_before": value for name, value in before.items()} | dict(job.judge(job.valid))
    results |= {"left_out": len(bad or ())}
    _keep(job, out, results, as_json)


def _same_task(out: Path, fresh: bool, first: bool, task: Mapping[str, Any]) -> None:
    """Refuse to go on in a folder where something else was being learned, and say what is learned in a new one."""
    from allyouneed.core.files import read_json, write_json

    path = out / "task.json"
    if path.is_file() and not fresh and read_json(path) != task:
        raise InputError(f"{out}: another model, data or method was begun there; choose another --out, or add --fresh")
    if first:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, dict(task))


def _labelled(module: Any, tokenizer: Tokenizer, task: Task) -> Job:
    """A head on the model, and examples for it."""
    from allyouneed.data import jsonl
    from allyouneed.data.labelled import METHODS, Labels, Span, collate, example_of, within
    from allyouneed.evaluate import labels as judging
    from allyouneed.models import heads
    from allyouneed.models.bert import encoder_from
    from allyouneed.models.decoder import Decoder
    from allyouneed.models.encoder import Encoder, MaskedModel
    from allyouneed.objectives.labels import labels as objective

    if not isinstance(module, Decoder | Encoder):
        raise InputError(
            f"--method {task.method}: a decoder or an encoder is wanted; this model reads and writes, use sft"
        )
    if task.auxiliary and not isinstance(module, Decoder):
        raise InputError("--auxiliary: only a decoder has a language model's loss; leave it out")
    if isinstance(module, Decoder):
        tokenizer = tokenizer.framed(*FRAME)
        module.grow(tokenizer.vocab_size)
    elif isinstance(module, MaskedModel):
        module = encoder_from(module)
    if isinstance(module, Encoder):  # transformers' classes have the pooler just where the whole text is told of
        module.repool(task.method not in ("spans", "tokens"))
    how, most = METHODS[task.method], _most(task.length, module.config.context)
    named: set[str] = set()
    ignored: list[str] | None = None if task.bad is None else []  # the next reading tells of them
    jsonl.made(task.data, [how.kind], lambda record: named.update(map(str, how.named(record))), bad=ignored)
    known = Labels(sorted(named))
    if known.names and len(known.names) < 2:
        raise InputError(f"{task.data}: the only label is {known.names[0]!r}; two at least are needed to learn from")

    def example(record: jsonl.Record) -> Any:
        return within(how.make(tokenizer, known, record), most)

    learned, judged = _parted(task, [how.kind], example)
    counted = Counter(known.names[i] for one in learned for i in example_of(one).labels if known.names and i >= 0)
    lacking = [name for name in known.names if name not in counted]
    if lacking:
        raise InputError(f"{task.data}: no line to learn the label {brief(lacking[0])} from; give it more lines")
    told = {"choices": heads.Chooser, "spans": heads.SpanReader, "tokens": heads.Tagger}
    kind: type[heads.Head] = told.get(task.method, heads.Classifier)
    scores = isinstance(module, Decoder) and kind is heads.Classifier  # transformers' layer has no bias there
    pad = tokenizer.pad_id if tokenizer.pad_id is not None else next(iter(tokenizer.eos_ids), None)
    config = kind.Config(model=module.config, labels=known.names, bias=not scores, pad_id=pad)
    head = kind(config, module)

    def judge(examples: Sequence[Any]) -> Mapping[str, float]:
        return (judging.spans if examples and isinstance(examples[0], Span) else judging.classes)(head, examples)

    return Job(
        module=head,
        tokenizer=tokenizer,
        objective=objective(task.auxiliary),
        collate=lambda chosen: collate([example_of(one) for one in chosen]),
        train=learned,
        valid=judged,
        lengths=[example_of(one).longest for one in learned],
        judge=judge,
        labels=dict(sorted(counted.items())),
    )


def _instructions(module: Any, tokenizer: Tokenizer, task: Task) -> Job:
    """The model itself, and answers for it to give."""
    import torch

    from allyouneed.data import instructions, jsonl
    from allyouneed.data.packing import Piece, fit, pad_right, take
    from allyouneed.data.pairs import apart
    from allyouneed.models.decoder import Decoder
    from allyouneed.models.encoder_decoder import EncoderDecoder
    from allyouneed.objectives.next_token import next_token
    from allyouneed.objectives.span import target_given_source

    translates = isinstance(module, EncoderDecoder)
    if not translates and not isinstance(module, Decoder):
        raise InputError("--method sft: this model only reads; use classify, pairs, similarity, choices, spans, tokens")
    kinds = (jsonl.Completion,) if translates else instructions.KINDS
    make = instructions.pair if translates else instructions.piece
    most = _most(task.length, (module.config.decoder if translates else module.config).context)

    def size(example: Any) -> int:
        return max(map(len, example)) if translates else len(example.ids)

    def example(record: jsonl.Record) -> Any:
        made = make(tokenizer, record)
        if size(made) > most:
            raise InputError(f"{size(made)} tokens; at most {most} fit (--length, or a shorter text)")
        return made

    learned, judged = _parted(task, kinds, example)
    lengths = [size(one) for one in learned]
    objective: Any = target_given_source if translates else next_token
    if translates:
        collate: Any = lambda chosen: apart(chosen, start=tokenizer.pad_id or 0)  # noqa: E731
        examples = learned
    else:
        rows = fit(learned, max(lengths))
        examples = [take(rows, [i]) for i in range(len(rows["ids"]))]
        collate = lambda chosen: {name: torch.cat([row[name] for row in chosen]) for name in chosen[0]}  # noqa: E731

    @torch.inference_mode()
    def judge(held: Sequence[Any]) -> Mapping[str, float]:
        module.eval()
        device, total, weight = next(module.parameters()).device, 0.0, 0
        for start in range(0, len(held), 8):
            chosen = held[start : start + 8]
            batch = pad_right(chosen) if isinstance(chosen[0], Piece) else collate(chosen)
            loss = objective(module, {name: x.to(device) for name, x in batch.items()})
            total, weight = total + loss.total.item(), weight + int(loss.weight)
        return {"nats_per_token": total / max(weight, 1)}

    return Job(
        module=module,
        tokenizer=tokenizer,
        objective=objective,
        collate=collate,
        train=examples,
        valid=judged,
        lengths=lengths,
        judge=judge,
        labels={},
    )


def _most(length: int | None, context: int) -> int:
    if length is not None and not 1 <= length <= context:
        raise InputError(f"--length {length}; from 1 to the model's context of {context} tokens")
    return length or context


def _parted(
    task: Task, kinds: Sequence[jsonl.Kind], make: Callable[[jsonl.Record], Any]
) -> tuple[list[Any], list[Any]]:
    """What is learned and what is judged by: a tenth of the former where there is nothing else."""
    import torch

    from allyouneed.core.seeds import generator
    from allyouneed.data import jsonl

    found = jsonl.made(task.data, kinds, make, bad=task.bad)
    if task.valid is not None:
        held = jsonl.made(task.valid, kinds, make, bad=task.bad)
    else:
        order = torch.randperm(len(found), generator=generator(task.seed, "held out")).tolist()
        count = max(1, len(found) // 10)
        found, held = [found[i] for i in sorted(order[count:])], [found[i] for i in sorted(order[:count])]
    if not found or not held:
        raise InputError(f"{task.data}: {len(found)} lines to learn from and {len(held)} to judge by; each needs one")
    return found, held


def _keep(job: Job, out: Path, results: dict[str, Any], as_json: bool) -> None:
    """Write the model and what was found, on the first rank, which all help to put the model together."""
    from allyouneed.core.files import write_json
    from allyouneed.models.checkpoints.loading import save
    from allyouneed.train.ranks import join
    from allyouneed.train.sharding import whole

    learned = whole(job.module.eval())
    if join().rank == 0:
        save(learned, out / "model", job.tokenizer)
        write_json(out / "results.json", results)
        _show(results, out, as_json)


def _announce(job: Job, model: str, method: str, training: Any, batch: int, bad: list[str] | None) -> None:
    """What will be trained, as a table on standard error."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=escape(f"{method}: {model}"), show_header=False)
    parts: Counter[str] = Counter()
    for name, parameter in job.module.named_parameters():
        name = name.removeprefix("model.")
        inner = next((part for part in ("blocks", "embedding", "layer.") if part in name), "other")
        parts[{"layer.": "new layer", "embedding": "embeddings"}.get(inner, inner)] += parameter.numel()
    total = sum(parts.values())
    shown.add_row("trained", f"{total:,} parameters: " + ", ".join(f"{part} {n:,}" for part, n in parts.items()))
    shown.add_row("examples", f"{len(job.lengths):,} to learn from, {len(job.valid):,} to judge by")
    if job.labels:
        listed = [f"{label} {count}" for label, count in list(job.labels.items())[:12]]
        more = f" and {len(job.labels) - 12} more" if len(job.labels) > 12 else ""
        shown.add_row("labels", escape(", ".join(listed)) + more)
    shown.add_row("tokens", f"median {statistics.median(job.lengths):g}, longest {max(job.lengths)}")
    seen = training.steps * batch / len(job.train)
    shown.add_row("training", f"{training.steps} steps of {batch}, {seen:.1f} epochs; rate {training.optimizer.lr:.3g}")
    console = Console(stderr=True, highlight=False)
    console.print(shown)
    for line in (bad or [])[:5]:
        console.print(f"left out: {line}", soft_wrap=True, markup=False)
    if bad and len(bad) > 5:
        console.print(f"left out: {len(bad) - 5} more")


def _show(results: Mapping[str, Any], out: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(results))
        return
    for name, value in results.items():
        print(f"{name:<24} {f'{value:.4f}' if isinstance(value, float) else value}")
    print(f"{out / 'model'}: the tuned model")
