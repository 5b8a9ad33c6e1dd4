"""A suite: models of several sizes that see the same data in the same order and are kept at the same steps.

What Pythia is (Biderman et al. 2023, sec. 2.1–2.3). Each size gets a folder of its own, a run of the one loop in it,
and beside the loop's own checkpoints, which only serve to go on, a folder `step<k>` for every step of the schedule,
which anything can load: `load_module("runs/suite/70M", step=512)`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from allyouneed import core
from allyouneed.core.errors import InputError
from allyouneed.core.files import replacing
from allyouneed.core.seeds import seed_everything
from allyouneed.train.checkpoints import writing
from allyouneed.train.gradients import Objective
from allyouneed.train.loop import Batches, Trained, Training, train


@dataclass(frozen=True, kw_only=True)
class Member(core.Config):
    """One size: what is built and how it is trained. Sizes share the order of the data, not the learning rate."""

    model: core.Config
    training: Training


Save = Callable[[Any, Path], object]  # writes a module into a folder


@dataclass(frozen=True)
class Snapshots:
    """Keeps the weights of some `steps` under `folder`/step<k>, each of them whole or not at all; for `train`."""

    folder: Path
    steps: Collection[int]
    save: Save

    def wants(self, step: int) -> bool:
        """Whether a step is kept."""
        return step in self.steps

    def __call__(self, step: int, module: nn.Module) -> None:
        """Called by the loop before the first step and after every one."""
        if self.wants(step):
            path = self.folder / f"step{step}"
            with writing(path), replacing(path) as temporary:
                self.save(module, temporary)


def kept_steps(steps: int, every: int = 1000) -> list[int]:
    """The steps at which a suite is kept: 0, the powers of two below `every`, its multiples, and the last (sec. 2.3).

    >>> kept_steps(5000)
    [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 3000, 4000, 5000]
    >>> len(kept_steps(143_000))
    154
    """
    if every < 1:
        raise InputError(f"every={every}; a suite is kept every 1 or more steps")
    early = [1 << n for n in range((every - 1).bit_length())]
    return sorted({0, steps, *(step for step in early if step < steps), *range(every, steps, every)})


def train_suite(
    sizes: Mapping[str, Member],
    objective: Objective,
    batches: Callable[[], Batches],
    folder: Path | str,
    *,
    save: Save,
    every: int = 1000,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Trained]:
    """Train every size, one after another, each from the first batch on.

    The same call takes up a suite that was stopped: finished sizes are passed over, the one under way goes on from its
    last checkpoint bit for bit.

    Args:
        sizes: by name, which is also the name of the folder.
        objective: the loss of a batch.
        batches: makes the order anew for each size; it must give the same batches each time (`data.replay`).
        folder: of the suite.
        save: how weights are kept, `models.checkpoints.loading.save` for instance.
        every: see `kept_steps`.
        seed: of the initial weights.
        quiet: no progress lines.

    Raises:
        InputError: a name that is no folder's, or whatever `train` raises.
    """
    folder, done = Path(folder), dict[str, Trained]()
    for name in sizes:
        if not name or Path(name).name != name or name in (".", ".."):
            raise InputError(f"size {name!r} cannot be the name of a folder")
    for name, member in sizes.items():
        seed_everything(seed)
        done[name] = train(
            member.model.build(),
            objective,
            batches(),
            member.training,
            folder=folder / name,
            snapshot=Snapshots(folder / name, kept_steps(member.training.steps, every), save),
            title=name,
            quiet=quiet,
        )
    return done
