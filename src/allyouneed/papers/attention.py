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
        paper's table 3: heads, their size, dropout, label smoothing, learned positions. Beside the verdict, both kinds
        of model on two thousand sentences of web software that people translated into German.
Apart   0.2 million parameters instead of 65 million, a vocabulary of some seventy words, sentences of ten words; each
        kind of model has the better of two peak learning rates, tried with a seed of its own. BLEU of 28.4 on WMT 2014
        English–German needs data and weeks of GPUs that are not here: the real sentences are too few to learn German,
        and show only how far either kind of model gets with so little. The LSTM is PyTorch's, whose writer takes one
        step a word: the ratio of times is that of this machine, on which little runs side by side.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allyouneed import core
from allyouneed.core.seeds import seed_everything
from allyouneed.data.batches import Epochs
from allyouneed.data.catalogues import Sentences
from allyouneed.data.languages import END, START, Languages
from allyouneed.data.packing import Batch
from allyouneed.data.pairs import Pair, apart, bucketed, ended
from allyouneed.evaluate.grades import exact_match
from allyouneed.evaluate.statistics import median
from allyouneed.evaluate.timing import ratios
from allyouneed.evaluate.translation import agreement, bleu, bleu_of_ids, pooled
from allyouneed.generate.translations import greedy, with_beams
from allyouneed.models import encoder_decoder, transformer
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

BASE, LSTM, PLACELESS, LEARNED = "Transformer", "LSTM with attention", "no positions", "learned positions"


@dataclass(frozen=True, kw_only=True)
class Real(core.Config):
    """Sentences that people translated, and how both kinds of model learn them."""

    sentences: Sentences.Config
    training: Training
    shown: int = 6  # of the test, in the report


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
    real: Real | None = None  # beside the verdict


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
        LEARNED: transformer_arm(positions=Learned.Config()),
        "one head": transformer_arm(num_heads=1),
        f"{2 * heads} heads": transformer_arm(num_heads=2 * heads),
        "heads of a quarter the size": transformer_arm(head_dim=config.dim // heads // 4),
        "no dropout": transformer_arm(dropout=0.0),
        "no label smoothing": transformer_arm(label_smoothing=0.0),
    }


def run(config: Config, report: Report) -> None:
    """Choose the rates, train every arm, and judge the translations."""
    world, sentences = config.world.build(), config.real.sentences.build() if config.real else None
    rates = {kind: _best_rate(config, report, world, kind) for kind in (BASE, LSTM)}
    chosen = arms(config, rates)

    def work(arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
        return _trained(config, world, arm, seed, folder)

    judged = (BASE, LSTM, PLACELESS, LEARNED)
    found = report.repeat({name: chosen[name] for name in judged}, work)
    # a row that no check asks for is one training, as in the paper
    found |= report.repeat({name: arm for name, arm in chosen.items() if name not in judged}, work, report.seeds[:1])
    for name, arm in chosen.items():
        report.arm(name, parameters=arm.model.num_parameters(), learning_rate=arm.lr)

    def minus(one: str, other: str) -> list[float]:
        return [a["bleu"] - b["bleu"] for a, b in zip(found[one], found[other], strict=True)]

    report.check(f"BLEU, {BASE} minus {LSTM}", values=minus(BASE, LSTM), above=config.better)
    times = median(report.job("times", lambda folder: _times(config, world, chosen[BASE], chosen[LSTM])))
    report.check(
        f"time of a training step, {LSTM} over {BASE}",
        times.estimate,
        interval=(times.low, times.high),
        method=f"95 % interval of the median of {config.timings} steps on one machine, in turn",
        above=config.faster,
    )
    report.check(f"BLEU, {BASE} minus the one without positions", values=minus(BASE, PLACELESS), above=config.placed)
    learned = minus(LEARNED, BASE)
    report.check("BLEU, learned minus sinusoidal positions", values=learned, above=-config.alike, below=config.alike)
    report.table("the rows of table 3: means over seeds", [_row(name, values) for name, values in found.items()])
    report.table("searching and averaging, the Transformer", _searched(found[BASE]))
    _figures(config, report, world, found)
    if config.real is not None and sentences is not None:
        _translate_real(config, config.real, sentences, report, rates)


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
    batches = _batches(config, world, seed)
    module, found = _fitted(arm, config.training, batches, tested, seed, folder)
    found |= _judged(config, world, module, tested)
    if isinstance(module, EncoderDecoder):
        found["looks"] = _looks(module, tested[0])
        found["searched"] = _with_beams(config, module, tested, folder)
    return found


def _fitted(
    arm: Arm, training: Training, batches: Epochs[Batch], held_out: Sequence[Pair], seed: int, folder: Path
) -> tuple[nn.Module, dict[str, Any]]:
    """The arm trained, and its loss on held-out pairs ten times on the way."""
    batch = apart(ended(held_out, END), start=START)

    @torch.inference_mode()
    def evaluate(module: nn.Module) -> dict[str, float]:
        return {"held_out_nll": translation()(module, batch).mean.item()}

    seed_everything(seed)
    module = arm.model.build()
    every = max(1, training.steps // 10)
    training = training.replace(
        seed=seed, optimizer=training.optimizer.replace(lr=arm.lr), evaluate_every=every, save_every=every, keep=5
    )
    objective = translation(arm.label_smoothing)
    done = train(module, objective, batches, training, folder=folder, evaluate=evaluate, title="  train")
    points = [row for row in done.history if "held_out_nll" in row]
    losses = {"targets": [row["tokens"] for row in points], "nll": [row["held_out_nll"] for row in points]}
    return module.eval(), losses


def _translate_real(
    config: Config, real: Real, sentences: Sentences, report: Report, rates: Mapping[str, float]
) -> None:
    """Both kinds of model on sentences that people translated: two tables, and nothing in the verdict."""
    train_on, valid, test = sentences.ids
    sources, references = map(list, zip(*sentences.texts.test, strict=True))
    context, language = real.sentences.context, real.sentences.language
    sizes = {"vocab_size": sentences.tokenizer.vocab_size, "context": context}

    def work(arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
        batches = bucketed(ended(train_on, END), tokens=config.batch_tokens, start=START, seed=seed)
        module, found = _fitted(arm, real.training, batches, valid, seed, folder)
        written = with_beams(module, [read for read, _ in test], start=START, end=END, most=context - 1)
        said = [sentences.tokenizer.decode(one) for one in written]
        return found | {
            "bleu": bleu(said, references),
            "exact": float(exact_match(said, references).mean()),
            "said": said,
        }

    ours, theirs = _model(config, **sizes), _recurrent(config, **sizes)
    chosen = {
        f"{BASE}, {language}": Arm(model=ours, lr=rates[BASE], label_smoothing=config.label_smoothing),
        f"{LSTM}, {language}": Arm(model=theirs, lr=rates[LSTM], label_smoothing=config.label_smoothing),
    }
    found = report.repeat(chosen, work)
    for name, arm in chosen.items():
        report.arm(name, parameters=arm.model.num_parameters(), learning_rate=arm.lr)
    title = f"sentences that people translated, en–{language}"
    report.table(f"{title}: 4 beams, α = 0.6", [_row(name, values) for name, values in found.items()])
    said = {name: values[0]["said"] for name, values in found.items()}
    shown = range(0, len(test), max(1, len(test) // real.shown))
    report.table(
        f"{title}: some of the test, by the first seed",
        [{"source": sources[i], "reference": references[i]} | {k: one[i] for k, one in said.items()} for i in shown],
    )
    report.note(
        f"{title}: {len(train_on)} pairs to train on, {len(valid)} held out, {len(test)} to test, no source and no "
        f"target in two parts; {sentences.left_out} pairs of {context} pieces or more are left out. Copying the source "
        f"has BLEU {bleu(sources, references):.1f}. Rates are those of the generated languages. No check asks for it."
    )


def _batches(config: Config, world: Languages, seed: int) -> Epochs[Batch]:
    return bucketed(ended(world.pairs(config.pairs, seed), END), tokens=config.batch_tokens, start=START, seed=seed)


def _times(config: Config, world: Languages, one: Arm, other: Arm) -> list[float]:
    """Time of a forward and backward pass of the other over that of the one, on the same batches, in turn."""
    modules, loss = [arm.model.build() for arm in (one, other)], translation(one.label_smoothing)
    steps = [lambda batch, module=module: loss(module, batch).mean.backward() for module in modules]
    return ratios(*steps, given=_batches(config, world, 0), repeats=config.timings)


def _judged(config: Config, world: Languages, module: nn.Module, tested: Sequence[Pair]) -> dict[str, Any]:
    """BLEU of greedy translations, the share that is right to the word, and of endings by their distance."""
    written = greedy(module, [source for source, _ in tested], **_ends(config))
    targets = [target for _, target in tested]
    counts = agreement(world, written, tested)
    return {
        "bleu": bleu_of_ids(written, targets),
        "exact": float(exact_match(written, targets).mean()),
        "agreement": counts,
    }


def _looks(module: EncoderDecoder, pair: Pair) -> dict[str, Any]:
    """One sentence, and how much each word of its translation looks at each of its words."""
    batch = apart(ended([pair], END), start=START)
    weights = encoder_decoder.cross_weights(module, batch["source"], batch["ids"])[0]
    return {"source": list(pair[0]), "target": [*pair[1], END], "weights": weights.tolist()}


def _with_beams(config: Config, module: EncoderDecoder, tested: Sequence[Pair], folder: Path) -> dict[str, float]:
    """BLEU of some sentences: greedily, with beams as in sec. 6.1, and so with the mean of the last checkpoints."""
    some = tested[: config.searched]

    def score(beams: int) -> float:
        written = with_beams(module, [source for source, _ in some], beams=beams, **_ends(config))
        return bleu_of_ids(written, [target for _, target in some])

    scores = {"greedy": score(1), "4 beams, α = 0.6": score(4)}
    module.load_state_dict(mean_of_last(folder), strict=False)
    return scores | {"4 beams, mean of the last 5 checkpoints": score(4)}


def _ends(config: Config) -> dict[str, Any]:
    """What a translation begins and ends with, and as many words as any has, and a few more."""
    return {"start": START, "end": END, "most": config.recurrent.context - 1}


def _row(name: str, values: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "arm": name,
        "seeds": len(values),
        "BLEU": round(statistics.fmean(one["bleu"] for one in values), 1),
        "lowest … highest": " … ".join(f"{f(one['bleu'] for one in values):.1f}" for f in (min, max)),
        "of the first seed": round(values[0]["bleu"], 1),
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
        together = pooled([one["agreement"] for one in found[name]], fewest=config.tested // 20)
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
    rows, columns = ([world.name(word) for word in looks[side]] for side in ("target", "source"))
    figures.grid(axes, looks["weights"], rows, columns)
    figures.describe(axes, title="Where the writer looks", x="source", y="word to be written")
    report.figure(figure, "The last layer's attention from a translation to its source, mean of heads.", "looks")


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


def _recurrent(config: Config, **changes: Any) -> RecurrentTranslator.Config:
    usual: dict[str, Any] = {"vocab_size": config.world.build().vocab_size, "dropout": config.dropout}
    return config.recurrent.replace(**(usual | changes))


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
        "laptop": _small(
            64,
            79,
            num_layers=2,
            world=_WORLD,
            training=_training(450),
            rates=(3e-3, 6e-3),
            real=Real(sentences=Sentences.Config(), training=_training(450)),
        ),
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
