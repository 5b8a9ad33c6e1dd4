"""What training will take, from an example differentiated before the first step: bytes and seconds."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from allyouneed.commands.methods.base import Job, joined
from allyouneed.core.devices import memory
from allyouneed.core.progress import clock

FEW = 4  # examples that are tried at once to tell what one more adds
PATIENCE = 5.0  # seconds of a first try after which nothing more is tried
STATE = 3  # gradient and AdamW's two moments, each as large as what is trained


def told(job: Job, batch: int, training: Any) -> str:
    """Memory and time as they are said before training; the longest example is tried, and what it takes is scaled."""
    assert job.probe is not None, "nothing to try"
    with torch.random.fork_rng():  # what is drawn here is not missing later
        kept, seconds = _tried(job, job.probe(), batch / training.accumulate, training)
    parameters = list(job.module.parameters())
    held = sum(map(_size, _held(job)))
    state = STATE * sum(_size(p) for p in parameters if p.requires_grad)
    need, there = held + state + kept * batch / training.accumulate, memory(parameters[0].device)
    step = seconds * training.accumulate * sum(job.lengths) / len(job.train) / max(job.lengths)
    room = "" if there is None else f" of {_bytes(there)}" + (", which is too little" if need > there else "")
    beside = ", and what writing answers takes" if job.whole(batch) > 1 else ""
    return f"about {_bytes(need)} of memory{room}; {step:.2g} s a step, {clock(step * training.steps)} in all{beside}"


def _tried(job: Job, row: dict[str, Tensor], rows: float, training: Any) -> tuple[float, float]:
    """Bytes that are kept of an example between forward and backward pass, and the seconds of both for so many `rows`
    at once: what one takes, most of it the reading of all weights where it is short, and what each more adds.
    """
    stored = dict[int, int]()
    known = {p.untyped_storage().data_ptr() for p in job.module.parameters()}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            stored[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        first = _timed(job, row, training)  # has much to load
    kept, few = sum(stored.values()), int(min(FEW, rows))
    if first > PATIENCE or few < 2:
        return kept, first * rows
    one, some = _timed(job, row, training), _timed(job, joined([row] * few), training)
    return kept, one + max(0.0, some - one) / (few - 1) * (rows - 1)


def _timed(job: Job, batch: dict[str, Tensor], training: Any) -> float:
    module = job.module.train()
    device, narrow = next(module.parameters()).device, training.precision == "bf16"
    began = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
        loss = job.objective(module, {name: x.to(device) for name, x in batch.items()})
    loss.total.backward()
    module.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def _held(job: Job) -> list[Tensor]:
    """All tensors of the module and of its reference, each once: a model without its adapters is no second one."""
    with job.reference() if job.reference else nullcontext(job.module) as reference:
        tensors = [x for module in (job.module, reference) for x in (*module.parameters(), *module.buffers())]
    return list({id(x): x for x in tensors}.values())


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
