"""Attention Is All You Need (Vaswani et al., 2017).

arXiv:1706.03762.

Claim   A translator made of attention alone, without recurrence, translates better than one that reads and writes word
        by word, and trains in a fraction of the time. Its words must be told their places, which fixed sinusoids do as
        well as learned vectors.
Here    Two generated languages with other orders of words, agreement over a distance and words that have no single
        counterpart; a fixed set of sentence pairs to train on and sentences that never occur in it to be judged by
        BLEU. Treatment: the Transformer with the paper's norms, sinusoids, optimiser, schedule, dropout and label
        smoothing. Controls: an LSTM that reads both ways with another that writes and attends (Bahdanau et al. 2015),
        of as many parameters, on the same batches; and the Transformer without positions. Beside them the rows of the
        paper's table 3: heads, their size, dropout, label smoothing, learned positions.
Apart   0.2 million parameters instead of 65 million, a vocabulary of some seventy words, sentences of ten words; each
        kind of model has the better of two peak learning rates, tried with a seed of its own. BLEU of 28.4 on WMT 2014
        English–German needs data and weeks of GPUs that are not here. The LSTM is PyTorch's, whose writer takes one
        step a word: the ratio of times is that of this machine, on which little runs side by side.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allyouneed import core
from allyouneed.core.seeds import seed_everything
from allyouneed.data.batches import Epochs
from allyouneed.data.languages import END, START, Languages
from allyouneed.data.packing import Batch
from allyouneed.data.pairs import Pair, apart, bucketed
from allyouneed.evaluate.statistics import median
from allyouneed.evaluate.translation import bleu
from allyouneed.generate.beams import beam_search, gnmt
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import Sampling
from allyouneed.models import encoder_decoder, recurrent_translator, transformer
from allyouneed.models.encoder_decoder import EncoderDecoder
from allyouneed.models.recurrent_translator import RecurrentTranslator
from allyouneed.nn.positions import Learned, Positions
from allyouneed.objectives.translation import translation
from allyouneed.papers import figures
from allyouneed.papers.base import Paper, Report
from allyouneed.train.averages import mean_of_last
from allyouneed.train.loop import Training, train
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import InverseSquareRoot

BASE, LSTM, PLACELESS = "Transformer", "LSTM with attention", "no positions"


@dataclass(frozen=True, kw_only=True)
class Config(core.Config):
    """The two kinds of model, what they learn from, and the margins of the verdict, in BLEU."""

    world: Languages.Config
    dim: int
    num_layers: int
    num_heads: int
    recurrent: RecurrentTranslator.Config
    training: Training
    rates: tuple[float, ...]  # peaks that are tried for each kind of model
    pairs: int = 8000
    batch_tokens: int = 800
    tested: int = 200
    searched: int = 40  # of these with beams
    dropout: float = 0.1
    label_smoothing: float = 0.1
    better: float = 0.0  # Transformer minus LSTM: above
    faster: float = 1.0  # time of a training step, LSTM over Transformer: above
    timings: int = 41
    placed: float = 5.0  # Transformer minus the one without positions: above
    alike: float = 3.0  # learned minus sinusoidal positions: within this, either way


@dataclass(frozen=True, kw_only=True)
class Arm(core.Config):
    """One model and how it is trained."""

    model: EncoderDecoder.Config | RecurrentTranslator.Config
    lr: float
    label_smoothing: float


def arms(config: Config, rates: Mapping[str, float]) -> dict[str, Arm]:
    """Treatment, controls, and the variations of table 3."""

    def transformer_arm(*, label_smoothing: float = config.label_smoothing, **changes: Any) -> Arm:
        return Arm(model=_model(config, **changes), lr=rates[BASE], label_smoothing=label_smoothing)

    heads = config.num_heads
    return {
        BASE: transformer_arm(),
        LSTM: Arm(model=_recurrent(config), lr=rates[LSTM], label_smoothing=config.label_smoothing),
        PLACELESS: transformer_arm(positions=Positions.Config()),
        "learned positions": transformer_arm(positions=Learned.Config()),
        "one head": transformer_arm(num_heads=1),
        f"{2 * heads} heads": transformer_arm(num_heads=2 * heads),
        "heads of a quarter the size": transformer_arm(head_dim=config.dim // heads // 4),
        "no dropout": transformer_arm(dropout=0.0),
        "no label smoothing": transformer_arm(label_smoothing=0.0),
    }


def run(config: Config, report: Report) -> None:
    """Choose the rates, train every arm, and judge the translations."""
    world = config.world.build()
    rates = {kind: _best_rate(config, report, world, kind) for kind in (BASE, LSTM)}
    chosen = arms(config, rates)

    def work(arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
        return _trained(config, world, arm, seed, folder)

    found = report.repeat(chosen, work)
    for name, arm in chosen.items():
        report.arm(name, parameters=arm.model.num_parameters(), learning_rate=arm.lr)
    scores = {name: [one["bleu"] for one in values] for name, values in found.items()}
    report.check(
        f"BLEU, {BASE} minus {LSTM}",
        values=[a - b for a, b in zip(scores[BASE], scores[LSTM], strict=True)],
        above=config.better,
    )
    times = median(report.job("times", lambda folder: _times(config, world, chosen[BASE], chosen[LSTM])))
    report.check(
        f"time of a training step, {LSTM} over {BASE}",
        times.estimate,
        interval=(times.low, times.high),
        method=f"95 % interval of the median of {config.timings} steps on one machine, in turn",
        above=config.faster,
    )
    report.check(
        f"BLEU, {BASE} minus the one without positions",
        values=[a - b for a, b in zip(scores[BASE], scores[PLACELESS], strict=True)],
        above=config.placed,
    )
    report.check(
        "BLEU, learned minus sinusoidal positions",
        values=[b - a for a, b in zip(scores[BASE], scores["learned positions"], strict=True)],
        above=-config.alike,
        below=config.alike,
    )
    report.table("the rows of table 3: means over seeds", [_row(name, values) for name, values in found.items()])
    report.table("searching and averaging, the Transformer", _searched(found[BASE]))
    _figures(config, report, world, found)


def _best_rate(config: Config, report: Report, world: Languages, kind: str) -> float:
    """The peak rate with the least loss on held-out pairs, with a seed that no arm uses."""
    if len(config.rates) == 1:
        return config.rates[0]
    losses = {}
    for lr in config.rates:
        arm = arms(config, {BASE: lr, LSTM: lr})[kind]
        found = report.job(
            f"rates/{kind.split()[0]}-{lr:g}",
            lambda folder, arm=arm: _trained(config, world, arm, len(report.seeds), folder),  # type: ignore[misc]
        )
        losses[lr] = found["nll"][-1]
    best = min(losses, key=losses.__getitem__)
    rows = [{"peak rate": f"{lr:g}", "held-out loss": round(x, 4), "chosen": lr == best} for lr, x in losses.items()]
    report.table(f"learning rates tried: {kind}", rows)
    return best


def _trained(config: Config, world: Languages, arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
    tested = world.pairs(config.tested, seed, held_out=True)
    batch = apart(_ended(tested), start=START)

    @torch.inference_mode()
    def evaluate(module: nn.Module) -> dict[str, float]:
        loss = translation()(module, batch)
        return {"held_out_nll": loss.mean.item()}

    seed_everything(seed)
    module = arm.model.build()
    every = max(1, config.training.steps // 10)
    training = config.training.replace(
        seed=seed,
        optimizer=config.training.optimizer.replace(lr=arm.lr),
        evaluate_every=every,
        save_every=every,
        keep=5,
    )
    batches = _batches(config, world, seed)
    done = train(
        module, translation(arm.label_smoothing), batches, training, folder=folder, evaluate=evaluate, title="  train"
    )
    points = [row for row in done.history if "held_out_nll" in row]
    found = {
        "targets": [row["tokens"] for row in points],
        "nll": [row["held_out_nll"] for row in points],
        **_judged(config, world, module.eval(), tested),
    }
    if isinstance(module, EncoderDecoder):
        found["looks"] = _looks(module, tested[0])
        found["searched"] = _with_beams(config, module, tested, folder)
    return found


def _batches(config: Config, world: Languages, seed: int) -> Epochs[Batch]:
    pairs = _ended(world.pairs(config.pairs, seed))
    return bucketed(pairs, tokens=config.batch_tokens, start=START, seed=seed)


def _ended(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs with the end token that the model has to write."""
    return [(source, (*target, END)) for source, target in pairs]


def _times(config: Config, world: Languages, one: Arm, other: Arm) -> list[float]:
    """Time of a forward and backward pass of the other over that of the one, on the same batches, in turn."""
    batches = _batches(config, world, 0)
    modules = [one.model.build(), other.model.build()]
    ratios = []
    for _ in range(3 + config.timings):
        batch, seconds = next(batches), []
        for module in modules:
            began = time.perf_counter()
            translation(one.label_smoothing)(module, batch).mean.backward()
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[1] / seconds[0])
    return ratios[3:]  # the first are to warm up


def _judged(config: Config, world: Languages, module: nn.Module, tested: Sequence[Pair]) -> dict[str, Any]:
    """BLEU of greedy translations, the share that is right to the word, and of endings by their distance."""
    written = _greedy(config, module, [source for source, _ in tested])
    right: dict[int, list[bool]] = {}
    for translated, (source, target) in zip(written, tested, strict=True):
        right.setdefault(world.distance(source), []).append(world.ending(translated) == target[-1])
    return {
        "bleu": _bleu(written, tested),
        "exact": statistics.fmean(tuple(w) == tuple(target) for w, (_, target) in zip(written, tested, strict=True)),
        "agreement": {str(d): [sum(values), len(values)] for d, values in sorted(right.items())},
    }


def _greedy(config: Config, module: nn.Module, sources: Sequence[Sequence[int]]) -> list[list[int]]:
    batch = apart([(source, [END]) for source in sources], start=START)
    written: list[list[int]] = [[] for _ in sources]
    sampling = Sampling(max_new_tokens=_room(config), temperature=0.0)
    engine = Engine(_answering(module)(module, batch["source"], batch["source_segments"]), eos_ids=[END])
    for step in engine.steps([[START]] * len(sources), [sampling] * len(sources)):
        if step.token != END:
            written[step.request].append(step.token)
    return written


@torch.inference_mode()
def _looks(module: EncoderDecoder, pair: Pair) -> dict[str, Any]:
    """One sentence, and how much each word of its translation looks at each of its words: mean over the last heads."""
    batch = apart(_ended([pair]), start=START)
    cross, seen = module.decoder.blocks[-1].cross, []
    hook = cross.register_forward_pre_hook(
        lambda part, given: seen.append(part.weights(given[0], given[1].memory.states))
    )
    module(batch["source"], batch["ids"])
    hook.remove()
    return {"source": list(pair[0]), "target": [*pair[1], END], "weights": seen[0][0].mean(0).tolist()}


def _with_beams(config: Config, module: EncoderDecoder, tested: Sequence[Pair], folder: Path) -> dict[str, float]:
    """BLEU of some sentences: greedily, with beams as in sec. 6.1, and so with the mean of the last checkpoints."""
    some = tested[: config.searched]

    def score(beams: int) -> float:
        written = []
        for source, _ in some:
            engine = Engine(encoder_decoder.Answering(module, torch.tensor([source])), eos_ids=[END])
            found = beam_search(engine, [START], beams=beams, max_new_tokens=_room(config), penalty=gnmt(0.6))
            written.append([token for token in found[0].tokens if token != END])
        return _bleu(written, some)

    scores = {"greedy": score(1), "4 beams, α = 0.6": score(4)}
    module.load_state_dict(mean_of_last(folder), strict=False)
    return scores | {"4 beams, mean of the last 5 checkpoints": score(4)}


def _bleu(written: Sequence[Sequence[int]], tested: Sequence[Pair]) -> float:
    texts = [" ".join(map(str, tokens)) for tokens in written]
    return bleu(texts, [" ".join(map(str, target)) for _, target in tested], tokenize="none")


def _answering(module: nn.Module) -> Callable[..., Any]:
    return encoder_decoder.Answering if isinstance(module, EncoderDecoder) else recurrent_translator.Answering


def _room(config: Config) -> int:
    """As many words as any translation has, and a few more."""
    return config.recurrent.context - 1


def _row(name: str, values: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "arm": name,
        "BLEU": round(statistics.fmean(one["bleu"] for one in values), 1),
        "lowest … highest": " … ".join(f"{f(one['bleu'] for one in values):.1f}" for f in (min, max)),
        "right to the word": round(statistics.fmean(one["exact"] for one in values), 3),
        "held-out loss (nats)": round(statistics.fmean(one["nll"][-1] for one in values), 3),
    }


def _searched(values: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"search": how, "BLEU, mean over seeds": round(statistics.fmean(one["searched"][how] for one in values), 1)}
        for how in values[0]["searched"]
    ]


def _figures(config: Config, report: Report, world: Languages, found: dict[str, list[dict[str, Any]]]) -> None:
    figure, (left, right) = figures.new(11, 4.2, columns=2)
    shown = {BASE: figures.PALETTE[0], LSTM: figures.PALETTE[1], PLACELESS: figures.CONTROL}
    for name, color in shown.items():
        targets, losses = found[name][0]["targets"], [one["nll"] for one in found[name]]
        report.curve(name, targets, losses, x_label="target words read", y_label="held-out loss (nats per word)")
        figures.band(left, targets, losses, name, color)
        together = _agreement(found[name], fewest=config.tested // 20)
        right.plot(list(together), list(together.values()), "o-", color=color, label=name)
    figures.describe(left, title="Learning to translate", x="target words read", y="held-out loss (nats per word)")
    figures.describe(
        right, title="Agreement over a distance", x="words between noun and ending", y="share of right endings"
    )
    figures.mark(right, "chance", y=1 / config.world.classes)
    right.set_ylim(0, 1.02)
    for axes in (left, right):
        figures.label_ends(axes)
    report.figure(figure, "Left: held-out loss; band, lowest to highest seed. Right: endings by their distance.")
    looks = found[BASE][0]["looks"]
    figure, (axes,) = figures.new(6, 5)
    axes.imshow(looks["weights"], cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(looks["source"])), [world.name(word) for word in looks["source"]], rotation=60)
    axes.set_yticks(range(len(looks["target"])), [world.name(word) for word in looks["target"]])
    axes.grid(visible=False)
    figures.describe(axes, title="Where the writer looks", x="source", y="word to be written")
    report.figure(figure, "The last layer's attention from a translation to its source, mean of heads.", "looks")


def _agreement(values: Sequence[dict[str, Any]], fewest: int) -> dict[int, float]:
    """The share of right endings by distance, where at least so many were asked over all seeds."""
    counts: dict[int, list[int]] = {}
    for one in values:
        for distance, (right, asked) in one["agreement"].items():
            held = counts.setdefault(int(distance), [0, 0])
            held[0] += right
            held[1] += asked
    return {d: right / asked for d, (right, asked) in sorted(counts.items()) if asked >= fewest}


def _model(config: Config, **changes: Any) -> EncoderDecoder.Config:
    usual: dict[str, Any] = {
        "vocab_size": config.world.build().vocab_size,
        "context": config.recurrent.context,
        "dim": config.dim,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "hidden_dim": 4 * config.dim,
        "dropout": config.dropout,
    }
    return transformer.architecture(**(usual | changes))


def _recurrent(config: Config) -> RecurrentTranslator.Config:
    return config.recurrent.replace(vocab_size=config.world.build().vocab_size, dropout=config.dropout)


def _training(steps: int) -> Training:
    """The paper's optimiser and schedule (sec. 5.3), the warm-up being the first fifth."""
    return Training(
        steps=steps,
        optimizer=AdamW.Config(lr=3e-3, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0),
        schedule=InverseSquareRoot(warmup=max(1, steps // 5)),
        log_every=max(1, steps // 10),
    )


def _small(dim: int, hidden_dim: int, **fields: Any) -> Config:
    recurrent = RecurrentTranslator.Config(vocab_size=0, context=40, dim=dim, hidden_dim=hidden_dim)
    return Config(dim=dim, num_heads=4, recurrent=recurrent, **fields)


_WORLD = Languages.Config(nouns=16, verbs=8, adjectives=8, most_adjectives=2, most_owners=1)

PAPER = Paper(
    doc=__doc__,
    run=run,
    evidence="small world",
    minutes={"smoke": 0.3, "laptop": 10},
    sizes={
        "smoke": _small(
            16,
            16,
            num_layers=1,
            world=_WORLD.replace(nouns=4, verbs=2, adjectives=2),
            training=_training(10),
            rates=(3e-3,),
            pairs=80,
            batch_tokens=100,
            tested=12,
            searched=3,
            timings=6,
        ),
        "laptop": _small(64, 79, num_layers=2, world=_WORLD, training=_training(500), rates=(3e-3, 6e-3)),
        "paper": Config(
            dim=512,
            num_layers=6,
            num_heads=8,
            recurrent=RecurrentTranslator.Config(vocab_size=0, context=256, dim=512, hidden_dim=1200),
            world=Languages.Config(nouns=12_000, verbs=4000, adjectives=2000, most_adjectives=6, most_owners=4),
            training=_training(100_000).replace(schedule=InverseSquareRoot(warmup=4000)),
            rates=((512 * 4000) ** -0.5,),
            pairs=4_500_000,
            batch_tokens=25_000,
        ),
    },
)
