"""What InstructGPT's arms are shown by: the part of `instructgpt` that draws what reward they buy at which distance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes

from allyouneed.evaluate.statistics import student_t
from allyouneed.papers import figures
from allyouneed.papers.base import Report

SFT, PPO, PTX, DPO = "SFT", "PPO", "PPO-ptx", "DPO"
FREE, BOUND = "PPO, few comparisons, no penalty", "PPO, few comparisons"  # the same but for the penalty
COLORS = {
    SFT: figures.CONTROL,
    PPO: figures.PALETTE[1],
    PTX: figures.PALETTE[0],
    FREE: figures.PALETTE[3],
    BOUND: figures.PALETTE[5],
    DPO: figures.PALETTE[2],
    "best of n": figures.PALETTE[4],
}


def record(
    report: Report,
    found: list[dict[str, Any]],
    arms: dict[str, list[dict[str, float]]],
    *,
    parameters: int,
    comparisons: Sequence[int],
) -> None:
    """Tables, curves and the figure.

    Args:
        report: where they go.
        found: what came of each seed.
        arms: how each arm was judged with each seed.
        parameters: how many an arm has.
        comparisons: on how many prompts reward models were trained.
    """
    for name in arms:
        report.arm(name, parameters=parameters)
    rows = [
        {"arm": name, **{key: _mean(one[key] for one in values) for key in values[0]}} for name, values in arms.items()
    ]
    report.table("arms on held-out orders, means over seeds; KL in nats an answer, tax in nats a token", rows)
    best = [[one["best of"][i] for one in found] for i in range(len(found[0]["best of"]))]
    report.table(
        "best of n of the reference, by the reward model and by the truth itself",
        [{key: _mean(one[key] for one in values) for key in values[0]} for values in best],
    )
    report.table(
        "accuracy of the reward model on pairs of held-out orders",
        [{"prompts": n, "accuracy": _mean(one["accuracy"][i] for one in found)} for i, n in enumerate(comparisons)],
    )
    report.note(
        f"The base loses {_mean(one['base'] for one in found):.3f} nats a token beyond the world's own entropy."
    )
    figure, (left, right) = figures.new(11, 4.4, columns=2)
    _frontier(report, left, found, arms, best)
    _overoptimised(report, right, [one["trace"][FREE] for one in found])
    report.figure(
        figure,
        "Left: true reward over KL from the reference, of policies while they are trained; points: the end, with 95 % "
        "intervals over seeds. Right: proxy and truth without a penalty; band: lowest to highest seed.",
    )


def _frontier(
    report: Report,
    axes: Axes,
    found: list[dict[str, Any]],
    arms: dict[str, list[dict[str, float]]],
    best: Sequence[Sequence[dict[str, float]]],
) -> None:
    for name, values in arms.items():
        if name in found[0]["trace"]:
            rows = [one["trace"][name] for one in found]
            kl, truth = ([[f(row) for row in seed] for seed in rows] for f in (lambda r: r["kl"], _truth))
            report.curve(name, [row["step"] for row in rows[0]], truth, x_label="step", y_label="true reward")
            axes.plot(_means(kl), _means(truth), color=COLORS[name])
        _point(axes, values, COLORS[name], name)
    n = [[row[0][key] if key == "kl" else _mean(r[key] for r in row) for row in best] for key in ("kl", "truth")]
    axes.plot(*n, "--o", color=COLORS["best of n"], markersize=4, label="best of n")
    axes.legend(fontsize=8)
    figures.describe(axes, title="What distance from the reference buys", x="KL (nats an answer)", y="true reward")


def _point(axes: Axes, values: Sequence[dict[str, float]], color: str, label: str) -> None:
    truth = [one["truth"] for one in values]
    spread = student_t(truth) if len(truth) > 1 else None
    height = None if spread is None else [[spread.estimate - spread.low], [spread.high - spread.estimate]]
    axes.errorbar([_mean(one["kl"] for one in values)], [_mean(truth)], yerr=height, fmt="o", color=color, label=label)


def _overoptimised(report: Report, axes: Axes, traces: Sequence[Sequence[dict[str, float]]]) -> None:
    steps = [row["step"] for row in traces[0]]
    proxy, truth = ([[f(row) for row in seed] for seed in traces] for f in (lambda r: r["proxy"], _truth))
    scaled = [[(x - seed[0]) / (max(map(abs, seed)) or 1.0) for x in seed] for seed in proxy]
    report.curve(f"{FREE}, proxy", steps, proxy, x_label="step", y_label="reward model's score")
    figures.band(axes, steps, scaled, "proxy, risen (scaled)", figures.CONTROL)
    figures.band(axes, steps, truth, "truth", COLORS[FREE])
    figures.describe(axes, title="Without a penalty, few comparisons", x="step", y="reward")
    figures.label_ends(axes)


def _truth(row: dict[str, float]) -> float:
    return (row["even"] + row["odd"]) / 2


def _mean(values: Iterable[float]) -> float:
    every = list(values)
    return round(sum(every) / len(every), 4)


def _means(lines: Sequence[Sequence[float]]) -> list[float]:
    return [_mean(column) for column in zip(*lines, strict=True)]
