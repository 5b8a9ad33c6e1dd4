"""A ladder: models of several sizes, each trained on several amounts of data, for a scaling law to be fitted to.

Every run is a training of its own whose schedule ends with its own budget. Half-way down a longer schedule the loss is
higher than where a training ends there, and a law fitted to such points takes data for worth less than it is (Hoffmann
et al. 2022, sec. 3 and B). Runs are `Member`s of a suite under their names, so that they go through `Report.repeat`:
one list of jobs, each saved when done, one after another or spread over many machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from allyouneed.core.errors import InputError
from allyouneed.core.seeds import seed_everything
from allyouneed.train.gradients import Objective
from allyouneed.train.loop import Batches, train
from allyouneed.train.suite import Member

POINTS = 16  # of a run's curve
UNITS = ((21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k"))  # powers of ten


@dataclass(frozen=True)
class Run:
    """A run that was done: nats a token on held-out text, `losses` (n,), after `tokens` (n,) of training."""

    tokens: list[int]
    losses: list[float]

    @property
    def loss(self) -> float:
        """At the end."""
        return self.losses[-1]


def grid(sizes: Mapping[str, Member], budgets: Sequence[float], *, batch_tokens: int) -> dict[str, Member]:
    """Every size on every amount of data, in tokens.

    Raises:
        InputError: an amount that makes no batch, or two of one name.
    """
    return named(
        (f"{name}, {short(tokens)} tokens", ending(member, tokens, batch_tokens=batch_tokens))
        for tokens in budgets
        for name, member in sizes.items()
    )


def isoflops(
    sizes: Mapping[str, Member], budgets: Sequence[float], cost: Callable[[Any], float], *, batch_tokens: int
) -> dict[str, Member]:
    """For every compute, in FLOPs, every size trained on as many tokens as that pays for.

    Args:
        cost: FLOPs of training on one token, of a model's configuration.

    Raises:
        InputError: a compute below one batch of the smallest model; where only larger ones cannot have theirs, they
            are left out. Or two of one name.
    """
    found: list[tuple[str, Member]] = []
    for compute in budgets:
        paid = {name: compute / cost(member.model) for name, member in sizes.items()}
        if max(paid.values()) < batch_tokens:
            name = max(paid, key=paid.__getitem__)
            least = batch_tokens * cost(sizes[name].model)
            raise InputError(f"compute={compute:g}: one batch of the smallest model, {name}, takes {least:.3g} FLOPs")
        for name, tokens in paid.items():
            if tokens >= batch_tokens:
                member = ending(sizes[name], tokens, batch_tokens=batch_tokens)
                found.append((f"{short(compute)}FLOP, {name}", member))
    return named(found)


def named(runs: Iterable[tuple[str, Member]]) -> dict[str, Member]:
    """Runs, or sizes, under their names, which keep three digits (`short`).

    Raises:
        InputError: two have the same; one would take the other's place.
    """
    found: dict[str, Member] = {}
    for name, member in runs:
        if name in found:
            raise InputError(
                f"ladder: two runs are called {name!r}; names keep three digits, so set them further apart"
            )
        found[name] = member
    return found


def ending(member: Member, tokens: float, *, batch_tokens: int) -> Member:
    """The same size, trained on so many tokens; its warm-up keeps its share of the steps.

    Raises:
        InputError: not one batch.
    """
    steps, training = int(tokens / batch_tokens), member.training
    if steps < 1:
        raise InputError(f"tokens={tokens:g}: less than one batch of {batch_tokens} tokens")
    warmup = round(training.schedule.warmup * steps / training.steps)
    return member.replace(training=training.replace(steps=steps, schedule=training.schedule.replace(warmup=warmup)))


def climb(
    member: Member,
    objective: Objective,
    batches: Batches,
    evaluate: Callable[[nn.Module], float],
    *,
    batch_tokens: int,
    seed: int,
    folder: Path | None = None,
    points: int = POINTS,
    quiet: bool = False,
) -> Run:
    """Train one run, going on where it was stopped, and measure the loss on held-out text along the way.

    Args:
        member: the model and its training.
        objective: the loss of a batch.
        batches: of `batch_tokens` tokens.
        evaluate: nats a token.
        batch_tokens: tokens a step.
        seed: of initial weights.
        folder: where checkpoints go.
        points: measurements, evenly spread over the steps.
        quiet: no progress line.
    """
    seed_everything(seed)
    module, steps = member.model.build(), member.training.steps
    every = max(1, steps // points)
    done = train(
        module,
        objective,
        batches,
        member.training.replace(seed=seed, evaluate_every=every, log_every=every),
        folder=folder,
        evaluate=lambda trained: {"held_out": evaluate(trained)},
        title="  train",
        quiet=quiet,
    )
    rows = [row for row in done.history if "held_out" in row]
    return Run([row["step"] * batch_tokens for row in rows], [row["held_out"] for row in rows])


def short(amount: float) -> str:
    """Three digits and a unit: a name.

    >>> short(250_000), short(6e18), short(96)
    ('250k', '6E', '96')
    """
    size, unit = next(((10.0**p, u) for p, u in UNITS if amount >= 10.0**p), (1.0, ""))
    return f"{amount / size:.3g}{unit}"
