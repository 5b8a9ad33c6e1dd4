"""Losses that keep a router from favouring few experts, beside any objective, and statistics of what it does.

Routers are listened to by hooks, so that no model and no objective knows of them. All losses are functions of sums over
tokens (`Tally`), which are added up over ranks before, so that many ranks balance what one process would; the
micro-batches of one step are balanced each by itself. What is padding is routed and counted like any token.

Shapes: N tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from allyouneed.core.errors import InputError, unknown
from allyouneed.nn.routers import Router
from allyouneed.nn.routing import Routing
from allyouneed.objectives.loss import Loss

Objective = Callable[[Any, Mapping[str, Tensor]], Loss]


@dataclass(frozen=True)
class Tally:
    """Sums over the tokens that a router answered."""

    tokens: Tensor  # ()
    counts: Tensor  # (E,), choices of each expert
    firsts: Tensor  # (E,), those that are a token's first
    importance: Tensor  # (E,), gates
    load: Tensor  # (E,), choices, differentiable where the router's noise makes it so
    probabilities: Tensor  # (E,) of the softmax over all logits; of a hierarchical router over its first level's
    squares: Tensor  # (), of log Σ exp(logits)
    dropped: Tensor  # (), choices that found no place

    @staticmethod
    def of(routing: Routing) -> Tally:
        """The sums of one answer."""
        E, logits = routing.num_experts, routing.logits
        asked = torch.where(routing.asked, routing.experts, E)
        return Tally(
            logits.new_tensor(len(logits)),
            torch.bincount(asked.flatten(), minlength=E + 1)[:E].to(logits.dtype),
            torch.bincount(routing.experts[:, 0], minlength=E).to(logits.dtype),
            routing.importance,
            routing.load,
            logits.softmax(-1).sum(0),
            logits.logsumexp(-1).square().sum(),
            routing.dropped.to(logits.dtype),
        )

    def over_ranks(self) -> Tally:
        """The same summed over all ranks, gradients included; alone, this one."""
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return self
        parts = list(vars(self).values())
        summed = _Sum.apply(torch.cat([part.flatten() for part in parts]))
        found = summed.split([part.numel() for part in parts])
        return Tally(*(f.view_as(part) for f, part in zip(found, parts, strict=True)))

    @property
    def busiest(self) -> Tensor:
        """The share of all choices that the most chosen expert has, (); 1/E were all alike."""
        return self.counts.max() / self.counts.sum()


class _Sum(torch.autograd.Function):
    """Over ranks; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x


def squared_cv(x: Tensor) -> Tensor:
    """(standard deviation / mean)², () of (E,).

    >>> squared_cv(torch.tensor([2.0, 2.0, 2.0, 2.0])).item(), squared_cv(torch.tensor([4.0, 0.0])).item()
    (0.0, 1.0)
    """
    return x.var(correction=0) / x.mean().square()


def importance_loss(tally: Tally) -> Tensor:
    """CV(Σ gates)² (Shazeer et al. 2017, eq. 7; there weighed 0.1)."""
    return squared_cv(tally.importance)


def load_loss(tally: Tally) -> Tensor:
    """CV(load)² (Shazeer et al. 2017, eq. 11; there weighed 0.1)."""
    return squared_cv(tally.load)


def switch_loss(tally: Tally) -> Tensor:
    """E·Σ fᵢPᵢ, f the choices a token and P the mean probability of each expert; k if all are alike (Fedus et al. 2021,
    eq. 4 to 6; there weighed 0.01). With k > 1 choices as `transformers` has it for Mixtral.
    """
    if len(tally.probabilities) != len(tally.counts):
        raise InputError(
            "the switch loss needs one probability an expert; hierarchical routers have importance and load"
        )
    return len(tally.counts) * (tally.counts * tally.probabilities).sum() / tally.tokens.square()


def gshard_loss(tally: Tally) -> Tensor:
    """1/E·Σ cᵢ/N·mᵢ, c the first choices and m the mean probability of each expert (Lepikhin et al. 2020, alg. 1)."""
    if len(tally.probabilities) != len(tally.counts):
        raise InputError(
            "the gshard loss needs one probability an expert; hierarchical routers have importance and load"
        )
    return (tally.firsts * tally.probabilities).sum() / tally.tokens.square() / len(tally.counts)


def z_loss(tally: Tally) -> Tensor:
    """The mean of (log Σ exp(logits))², which keeps logits small (Zoph et al. 2022, eq. 5; there weighed 0.001)."""
    return tally.squares / tally.tokens


LOSSES: dict[str, Callable[[Tally], Tensor]] = {
    "importance": importance_loss,
    "load": load_loss,
    "switch": switch_loss,
    "gshard": gshard_loss,
    "z": z_loss,
}


def balanced(objective: Objective, **weights: float) -> Objective:
    """`objective` + Σ weight · loss over all routers of the module (Fedus et al. 2021, sec. 2.2), by names in `LOSSES`.

    Metrics: `objective`, the loss without them; means over the routers: each before its weight (`switch_loss`), and
    `importance_cv`, `load_cv` (of the counts), `busiest`, the share of the most chosen expert, and `dropped`, that of
    the choices that found no place.

    Raises:
        InputError: a loss of no such name, a module without routers, or, in training, a loss with a weight that gives
            one of them no gradient.

    >>> from allyouneed.models import mixtral
    >>> from allyouneed.objectives.next_token import next_token
    >>> model, ids = mixtral.EXAMPLE.build(), torch.randint(53, (2, 9))
    >>> loss = balanced(next_token, switch=0.01)(model, {"ids": ids[:, :-1], "targets": ids[:, 1:]})
    >>> sorted(loss.metrics)
    ['busiest', 'dropped', 'importance_cv', 'load_cv', 'objective', 'switch_loss']
    """
    for name in weights:
        if name not in LOSSES:
            raise unknown("loss of balance", name, LOSSES)

    wanted = [name for name, weight in weights.items() if weight]

    def loss(module: Any, batch: Mapping[str, Tensor]) -> Loss:
        if torch.is_grad_enabled():
            _refuse_idle(wanted, module)
        with tallied(module) as tallies:
            plain = objective(module, batch)
        if not tallies:
            raise InputError("losses of balance are for a model with routers; this one has none")
        tallies = [tally.over_ranks() for tally in tallies]
        each = {name: torch.stack([LOSSES[name](tally) for tally in tallies]) for name in weights}
        extra = sum((weight * each[name].sum() for name, weight in weights.items()), plain.total.new_zeros(()))
        measured = {f"{name}_loss": values.mean() for name, values in each.items()} | statistics(tallies)
        metrics = {name: plain.weight * value.detach() for name, value in measured.items()}
        metrics["objective"] = plain.total.detach()
        return replace(plain, total=plain.total + plain.weight * extra, metrics={**plain.metrics, **metrics})

    return loss


def _refuse_idle(names: Iterable[str], module: nn.Module) -> None:
    mends = {"importance": "take a larger k", "load": "take NoisyTopK"}
    for router in module.modules():
        if isinstance(router, Router) and router.training:
            for name in names:
                if name in mends and name not in router.smooth:
                    kind = f"{type(router).__name__} with k={router.k}"
                    raise InputError(
                        f"the {name} loss gives {kind} no gradient; weigh switch instead, or {mends[name]}"
                    )


@contextmanager
def tallied(module: nn.Module) -> Iterator[list[Tally]]:
    """What the routers of `module` answer meanwhile, in the order in which they do."""
    tallies: list[Tally] = []
    hooks = [
        part.register_forward_hook(lambda _, __, routing: tallies.append(Tally.of(routing)))
        for part in module.modules()
        if isinstance(part, Router)
    ]
    try:
        yield tallies
    finally:
        for hook in hooks:
            hook.remove()


def statistics(tallies: list[Tally]) -> dict[str, Tensor]:
    """What is worth watching, each () and a mean over routers."""
    found = {
        "importance_cv": [squared_cv(t.importance).sqrt() for t in tallies],
        "load_cv": [squared_cv(t.counts).sqrt() for t in tallies],
        "busiest": [t.busiest for t in tallies],
        "dropped": [t.dropped / t.counts.sum() for t in tallies],
    }
    return {name: torch.stack(values).detach().mean() for name, values in found.items()}
