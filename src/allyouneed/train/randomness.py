"""Torch's global generators, from which dropout draws: a run has them to itself, saves them and takes them up again.

Data has generators of its own, kept by the batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from allyouneed.core.seeds import derive
from allyouneed.train.ranks import Ranks


@contextmanager
def private(device: torch.device) -> Iterator[None]:
    """Whatever is drawn within, the generators go on outside as if nothing had been."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def begin(seed: int, ranks: Ranks) -> None:
    """Seed the generators of this rank: those with other rows their own, so that their dropout differs, tensor ranks
    the same, so that what all of them hold drops out alike (each uses the mask of its first heads for its own).
    """
    torch.manual_seed(derive(seed, "train", ranks.part))


def state(device: torch.device, ranks: Ranks) -> dict[str, Tensor]:
    """The generators' states, by part of the rows."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {f"{kind}-{part}": x for kind, mine in states.items() for part, x in enumerate(ranks.gather(mine))}


def load_state(states: dict[str, Tensor], device: torch.device, ranks: Ranks) -> None:
    """Take up this rank's generators where `state` saw them, as far as it did."""
    cpu, cuda = states.get(f"cpu-{ranks.part}"), states.get(f"cuda-{ranks.part}")
    if cpu is not None:
        torch.set_rng_state(cpu)
    if cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(cuda, device)
