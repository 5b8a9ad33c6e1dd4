"""The one training loop. It is handed a module, an objective, batches and a configuration, and is never subclassed.

Holds the order of things. What a gradient, a schedule, a checkpoint or another rank is, the files beside it know; what
is learned and from which data, the caller knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from allyouneed import core
from allyouneed.core.errors import InputError, RemoteError
from allyouneed.core.progress import StepProgress
from allyouneed.train import checkpoints as saving
from allyouneed.train import randomness, sharding
from allyouneed.train.averages import Ema
from allyouneed.train.checkpoints import Checkpoints, State, fill, weights
from allyouneed.train.gradients import Batch, Objective, differentiate
from allyouneed.train.interrupts import Stopped, watched
from allyouneed.train.journal import Callback, Journal, Row
from allyouneed.train.mesh import Mesh
from allyouneed.train.optimizers import Adafactor, AdamW
from allyouneed.train.ranks import Ranks, join
from allyouneed.train.schedules import Constant, Cosine, InverseSquareRoot, Linear

# when a run is taken up
MAY_CHANGE = {
    "steps",
    "accumulate",
    "log_every",
    "evaluate_every",
    "save_every",
    "keep",
    "mesh",
    "recompute",
    "optimizer.folder",
}

FAULT = 1 << 8  # among numbers of signals, that something went wrong


@dataclass(frozen=True, kw_only=True)
class Training(core.Config):
    """How long, how fast and how exactly to train. Rates, schedule and clipping are LLaMA's (sec. 2.3)."""

    steps: int
    optimizer: AdamW.Config | Adafactor.Config = field(default_factory=AdamW.Config)
    schedule: Constant | Linear | Cosine | InverseSquareRoot = field(default_factory=Cosine)
    clip: float | None = 1.0  # the largest norm of a step's gradient
    accumulate: int = 1  # micro-batches that a batch is computed in, to fit in memory; the result is the same
    mesh: Mesh = field(default_factory=Mesh)  # how ranks share the work; alone there is nothing to share
    recompute: bool = False  # compute each block twice instead of keeping what is within; the result is the same
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: weights stay fp32, matrix products are computed in bf16
    ema: float | None = None  # decay of a moving average of the weights, which is then what is evaluated
    seed: int = 0  # of dropout
    log_every: int = 10  # steps
    evaluate_every: int | None = None  # steps; None: after the last
    save_every: int | None = None  # steps; None: after the last
    keep: int = 3  # checkpoints

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise InputError(f"training.steps={self.steps}; it must be 0 or more")
        for name in ("accumulate", "log_every", "evaluate_every", "save_every", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"training.{name}={value}; it must be 1 or more")
        if self.clip is not None and not self.clip > 0:  # so is what is no number
            raise InputError(f"training.clip={self.clip}; it must be above 0, or None for no clipping")


class Batches(Protocol):
    """An endless iterator that can say where it stands. Every rank draws the same batches, then takes its rows: so it
    is of no account to the order of the data how many ranks there are.
    """

    def __next__(self) -> Batch:
        """The next batch."""

    def state_dict(self) -> State:
        """Where it stands."""

    def load_state_dict(self, state: State) -> None:
        """Go on from there."""


@dataclass(frozen=True)
class Trained:
    """A run that came to its end."""

    step: int
    seen: int  # targets trained on
    seconds: float  # of all its sittings
    history: list[Row]  # what was logged: step, loss, lr, grad_norm, …
    averages: dict[str, Tensor] | None  # of the weights, if `ema` was asked for; slices, where the module is split


def train(
    module: nn.Module,
    objective: Objective,
    batches: Batches,
    training: Training,
    *,
    folder: Path | str | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    callbacks: Iterable[Callback] = (),
    snapshot: Callable[[int, nn.Module], None] | None = None,
    resume: bool = True,
    title: str = "train",
    quiet: bool = False,
) -> Trained:
    """Train `module` in place, on the device it is on.

    Under `torchrun` every rank calls this with the same arguments, and together they do what one process would. Where
    `training.mesh` splits it, `module` holds slices from then on; `sharding.whole` puts it together.

    Args:
        module: trained where its parameters require gradients. Ranks but the first may have it on the meta device
            (`sharding.deferred`).
        objective: the loss of a batch.
        batches: asked for one batch a step, the rows of all ranks and micro-batches together.
        training: the configuration.
        folder: where `metrics.jsonl` and `checkpoints/` go; None: nothing is written.
        evaluate: what to measure now and then, on every rank, without gradients and in eval mode; joins the log.
        callbacks: told of each row that is logged, on the first rank.
        snapshot: handed the step and the module before the first step and after every one, on the first rank, to keep
            what it likes; after a kill it may be handed a step again, with the same weights. A split module is put
            together for it, unless it has a method `wants(step)` that says no.
        resume: go on from the newest checkpoint in `folder`, bit for bit; False removes those there.
        title: what the progress line calls the run.
        quiet: no progress line.

    Raises:
        InputError: a mesh that fits neither ranks nor module, a loss or gradient that is not finite, a full disk, a
            folder of another run; on all ranks alike.
        RankLostError: another rank died.
        Stopped: SIGINT or SIGTERM came; the step was finished and saved. A second SIGINT interrupts at once.
    """
    folder = None if folder is None else Path(folder)
    checkpoints = None if folder is None else Checkpoints(folder / "checkpoints", training.keep)
    ranks = _laid(training, module)
    device = _device(module, ranks)
    writes = ranks.rank == 0
    with watched() as interrupts, randomness.private(device), ranks.together():
        run = _Run(module, objective, batches, training, ranks, checkpoints)
        if checkpoints is not None and resume:
            run.take_up(checkpoints)
        with ranks.alike():
            if checkpoints is not None and writes:
                checkpoints.tidy(run.step) if resume else checkpoints.clear()
            journal = Journal(folder if writes else None, run.step, callbacks if writes else ())
        with (
            journal,
            StepProgress(title, training.steps, done=run.step, quiet=quiet or not writes) as progress,
            sharding.recomputed(module, training.recompute),
            run.saving(),
        ):
            run.show(snapshot)
            run.heard(0)
            while run.step < training.steps:
                row = run.advance()
                run.show(snapshot)  # before the checkpoint, so that none is missing after a kill
                progress.update(loss=row["loss"], **{f"{run.unit}/s": int(run.seen / row["seconds"])})
                logged = run.due(training.log_every)
                if evaluate is not None and run.due(training.evaluate_every):
                    row, logged = row | run.evaluated(evaluate), True
                if logged:
                    with run.noting():
                        journal.record(row)
                signum = run.heard(interrupts.received)
                if checkpoints is not None and (signum or run.due(training.save_every)):
                    run.save(checkpoints)
                if signum:
                    run.finish()  # before it is said
                    rest = "nothing was saved" if folder is None else f"saved in {folder}; the same call goes on"
                    raise Stopped(signum, f"stopped after step {run.step} of {training.steps}, {rest}")
        return Trained(run.step, run.seen, run.seconds, journal.rows, run.ema.weights if run.ema else None)


def _laid(training: Training, module: nn.Module) -> Ranks:
    """The ranks in their mesh, everything checked that can be before anything is sent."""
    if training.mesh.splits and not training.optimizer.splits:
        name = type(training.optimizer).__qualname__.partition(".")[0]
        raise InputError(f"mesh: {name} cannot step slices of a tensor; choose AdamW, or only data > 1")
    return training.mesh.lay(join(), module)


def _device(module: nn.Module, ranks: Ranks) -> torch.device:
    """Where the module is, or will be."""
    there = next(module.parameters()).device
    return torch.device(ranks.device) if there.type == "meta" or ranks.mesh is not None else there


class _Run:
    """All that changes while training goes on, and the step that changes it."""

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        batches: Batches,
        training: Training,
        ranks: Ranks,
        checkpoints: Checkpoints | None,
    ) -> None:
        self.narrow = torch.bfloat16 if training.precision == "bf16" else None
        sharding.begin(module, ranks, self.narrow)
        module.train().zero_grad()
        self.module, self.objective, self.batches = module, objective, batches
        self.training, self.ranks, self.device = training, ranks, next(module.parameters()).device
        self.saver = None if checkpoints is None or ranks.mesh is None else _slices().Saver(checkpoints)
        self.optimizer: torch.optim.Optimizer = training.optimizer.build(module)
        self.ema = None if training.ema is None else Ema(module, training.ema)
        self.step, self.seen, self.unit = 0, 0, "targets"
        self.fault = ""  # what this rank noted
        self.began = time.perf_counter()
        randomness.begin(training.seed, ranks)

    @property
    def seconds(self) -> float:
        """Time spent training, earlier sittings included."""
        return time.perf_counter() - self.began

    def due(self, every: int | None) -> bool:
        """Whether what is done every so many steps is done now. After the last step everything is."""
        return self.step == self.training.steps or (every is not None and self.step % every == 0)

    def advance(self) -> Row:
        """Train one step further; what was measured."""
        t = self.training
        self.step += 1
        how: dict[str, Any] = {"accumulate": t.accumulate, "clip": t.clip, "autocast": self.narrow}
        try:
            batch = next(self.batches)  # which may be made of what the module answers
            measured = differentiate(self.module, self.objective, batch, self.ranks, **how)
        except InputError as error:
            raise InputError(self._ended_by(error)) from None
        except RemoteError as error:  # of who judges, say
            raise RemoteError(self._ended_by(error), error.status) from None
        lr = t.optimizer.lr * t.schedule(self.step, t.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update()
        self.seen, self.unit = self.seen + measured.targets, measured.unit
        facts = {"lr": lr, "grad_norm": measured.norm, self.unit: self.seen, "seconds": self.seconds}
        return {"step": self.step, **measured.means, **facts}

    def _ended_by(self, error: Exception) -> str:
        return f"step {self.step}: {error}; training stops, the last checkpoint stands"

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Within, what goes wrong for this rank alone is noted; all raise it when they are `heard`."""
        try:
            yield
        except InputError as error:
            self.fault = self.fault or str(error)

    def heard(self, signum: int) -> int:
        """The signal that any rank received, 0 for none. What was noted is told in the same message, being rare.

        Raises:
            InputError: a rank noted one; on all of them.
        """
        raised = self.ranks.any(FAULT if self.fault else signum)
        if raised == FAULT:
            raise InputError(self.ranks.first(self.fault))
        return raised

    def show(self, snapshot: Callable[[int, nn.Module], None] | None) -> None:
        """Hand the module to who wants to look at it, on the first rank."""
        wanted = getattr(snapshot, "wants", None)
        if snapshot is None or (wanted is not None and not wanted(self.step)):
            return
        module = sharding.whole(self.module)
        if self.ranks.rank == 0:
            with self.noting():
                snapshot(self.step, module)

    def evaluated(self, evaluate: Callable[[nn.Module], Mapping[str, float]]) -> Row:
        """What `evaluate` measures on the module, or on the moving average of its weights if there is one."""
        averaged = nullcontext() if self.ema is None else self.ema.in_place()
        with torch.no_grad(), averaged, randomness.private(self.device):
            measured = dict(evaluate(self.module.eval()))
            sharding.settle(self.module)
        self.module.train()
        return measured

    def save(self, checkpoints: Checkpoints) -> None:
        """Write a checkpoint: all ranks tell what they know, and the first writes; or each its slices, from a copy that
        is made at once.
        """
        state = {
            "run": {"step": self.step, "seen": self.seen, "unit": self.unit, "seconds": self.seconds},
            "training": self.training.to_json(),
            "model": weights(self.module),
            "optimizer": {
                name: self.optimizer.state[p] for name, p in self.module.named_parameters() if p.requires_grad
            },
            "averages": {} if self.ema is None else self.ema.weights,
            "batches": self.batches.state_dict(),
            "randomness": randomness.state(self.device, self.ranks),
        }
        if self.saver is not None:
            self.saver.save(self.step, state)
        else:
            with self.ranks.alike():
                if self.ranks.rank == 0:
                    checkpoints.save(self.step, state)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within, a checkpoint may be under way; afterwards none is, unless a second SIGINT interrupts at once. So who
        tries again in this process finds nothing half-written that is written yet.
        """
        try:
            yield
        except Exception:
            with suppress(Exception):  # what ended the run is said, not what came of it
                self.finish()
            raise
        self.finish()

    def finish(self) -> None:
        """Until the last checkpoint is on disk."""
        if self.saver is not None:
            self.saver.wait()

    def take_up(self, checkpoints: Checkpoints) -> None:
        """Go on from the newest checkpoint, if there is one.

        Raises:
            InputError: it is of another model or training.
        """
        path = checkpoints.newest(self.ranks)
        if path is None:
            return
        self._check_same(saving.read_plain(path)["training"], checkpoints.folder)
        state = saving.read(path) if self.saver is None else _slices().read(path, self._places())
        fill(weights(self.module), state["model"], checkpoints.folder)
        if self.ema is not None:
            fill(self.ema.weights, state["averages"], checkpoints.folder)
        for name, p in self.module.named_parameters():
            if name in state["optimizer"]:
                self.optimizer.state[p] = {k: x.to(p.device, copy=True) for k, x in state["optimizer"][name].items()}
        self.batches.load_state_dict(state["batches"])
        randomness.load_state(state["randomness"], self.device, self.ranks)
        self.step, self.seen, self.unit = (state["run"][name] for name in ("step", "seen", "unit"))
        self.began = time.perf_counter() - state["run"]["seconds"]

    def _places(self) -> dict[str, Tensor]:
        """The tensors whose slices this rank holds, by their names in a checkpoint; the optimizer's are like those."""
        places = {f"model/{name}": x for name, x in weights(self.module).items()}
        places |= {f"optimizer/{name}": p for name, p in self.module.named_parameters()}
        return places | {f"averages/{name}": x for name, x in (self.ema.weights if self.ema else {}).items()}

    def _check_same(self, there: dict[str, Any], folder: Path) -> None:
        for name, here in _fixed(self.training.to_json()).items():
            if (begun := _fixed(there).get(name)) != here:
                mend = "choose another folder, or begin again with resume=False"
                raise InputError(f"{folder}: this run was begun with {name}={begun}, not {here}; {mend}")


def _fixed(settings: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Those that may not change."""
    found = {}
    for key, value in settings.items():
        if (name := within + key) not in MAY_CHANGE:
            found[key] = _fixed(value, f"{name}.") if isinstance(value, dict) else value
    return found


def _slices() -> Any:
    """Distributed checkpoints, whose imports take a second."""
    from allyouneed.train import slices

    return slices
