"""Optimisers, and which parameters they shrink."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from allyouneed import core
from allyouneed.train.pages import Page, room

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names


class AdamW(core.Configured, torch.optim.AdamW):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, alg. 2) over a module's trainable parameters.

    >>> optimizer = AdamW.Config(lr=1e-3).build(nn.Linear(2, 2))
    >>> [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
    [(0.1, 1), (0.0, 1)]
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """The betas, epsilon and decay of GPT-3 (Brown et al. 2020, app. B), which LLaMA keeps (sec. 2.3)."""

        splits: ClassVar[bool] = True  # a slice of a tensor can be stepped by itself

        lr: float = 3e-4  # the schedule's peak
        betas: tuple[float, float] = (0.9, 0.95)
        eps: float = 1e-8
        weight_decay: float = 0.1

    def __init__(self, config: Config, module: nn.Module) -> None:
        decayed, rest = decay_groups(module)
        groups: list[dict[str, Any]] = [{"params": some} for some in _by_mesh(decayed)]
        groups += [{"params": some, "weight_decay": 0.0} for some in _by_mesh(rest)]
        super().__init__(
            groups,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,  # one pass over memory instead of a dozen
        )


class PagedAdamW(AdamW):
    """AdamW, bit for bit, whose moments are not in the memory that weights and gradients are in but in pages that are
    brought one parameter at a time (Dettmers et al. 2023, sec. 3: paged optimizers).

    >>> PagedAdamW.Config(lr=1e-3).build(nn.Linear(2, 2)).param_groups[0]["weight_decay"]
    0.1
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(AdamW.Config):
        """As of AdamW; `folder`, on a disk, is where a CPU's pages lie: None, where the system's temporary files do."""

        splits: ClassVar[bool] = False  # pages are of whole tensors

        folder: str | None = None

    def __init__(self, config: Config, module: nn.Module) -> None:
        super().__init__(config, module)
        self.folder = config.folder
        self.pages: dict[nn.Parameter, dict[str, Page]] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient, each with its moments at hand in turn."""
        assert closure is None, "nothing is computed anew here"
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._advance(p, p.grad, group)

    def _advance(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        pages = self._paged(p)
        near = {name: page.bring() for name, page in pages.items()}
        adamw(
            [p],
            [gradient],
            [near["exp_avg"]],
            [near["exp_avg_sq"]],
            [],
            [self.state[p]["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for name, page in pages.items():
            page.keep(near[name])

    def _paged(self, p: nn.Parameter) -> dict[str, Page]:
        """The pages of a parameter's moments, which a checkpoint may have put into other memory."""
        state = self.state[p]
        pages = self.pages.setdefault(p, {})
        for name in MOMENTS:
            if name not in pages:
                pages[name] = room(p, self.folder)
            there = pages[name].tensor
            if state.get(name, there) is not there:
                there.copy_(state[name])
            state[name] = there
        state.setdefault("step", torch.zeros((), device=p.device))
        return pages


class Adafactor(core.Configured, torch.optim.Adafactor):
    """Adam with the second moments of a matrix kept as one number a row and one a column, no first moments, and steps
    as large as the weights are (Shazeer & Stern 2018, alg. 4 and 5).

    A step changes a tensor by `lr` times its root mean square, but never by more than 1/√t: with a constant schedule
    and T5's rate, 0.01, that is T5's own schedule, 1/√max(t, 10⁴) (Raffel et al. 2020, sec. 3.1.2).

    >>> Adafactor.Config().build(nn.Linear(2, 2)).param_groups[0]["lr"]
    0.01
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """The numbers of alg. 4 and its sec. 9; T5 shrinks no weights."""

        splits: ClassVar[bool] = False  # it needs the means over whole rows and columns

        lr: float = 1e-2  # the schedule's peak
        decay: float = -0.8  # second moments: β₂ at step t is 1 − t^decay
        eps: tuple[float, float] = (1e-30, 1e-3)  # least second moment, least root mean square of a tensor
        clip: float = 1.0  # the largest root mean square of an update, before it is scaled
        weight_decay: float = 0.0

    def __init__(self, config: Config, module: nn.Module) -> None:
        super().__init__(
            [p for p in module.parameters() if p.requires_grad],
            lr=config.lr,
            beta2_decay=config.decay,
            eps=(config.eps[0] ** 0.5, config.eps[1]),  # torch squares the first; 1e-30² is 0 in float32, and 0/0 NaN
            d=config.clip,
            weight_decay=config.weight_decay,
        )


def _by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those that one kernel can take together: whole ones, and those split over the same mesh."""
    found: dict[Any, list[nn.Parameter]] = {}
    for p in parameters:
        found.setdefault(getattr(p, "device_mesh", None), []).append(p)
    return list(found.values())


def decay_groups(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters that weight decay shrinks, and those it leaves alone.

    Matrices are shrunk. Norm gains and biases are not, "non bias or gain weights" being what GPT decays (Radford et al.
    2018, sec. 4.1), nor are embeddings, most of whose rows have no gradient in a given step and would only fade.
    """
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            (decayed if parameter.dim() > 1 and id(parameter) not in embeddings else rest).append(parameter)
    return decayed, rest
