"""What training will take, from one example differentiated once before the first step: bytes and seconds."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from allyouneed.commands.methods.base import Job
from allyouneed.core.devices import memory
from allyouneed.core.progress import clock

STATE = 3  # gradient and AdamW's two moments, each as large as what is trained


def told(job: Job, batch: int, training: Any) -> str:
    """Memory and time as they are said before training; the longest example is tried, and what it takes is scaled."""
    assert job.probe is not None, "nothing to try"
    kept, seconds = _tried(job, job.probe(), training)
    parameters = list(job.module.parameters())
    held = sum(map(_size, _held(job)))
    state = STATE * sum(_size(p) for p in parameters if p.requires_grad)
    need, there = held + state + kept * batch / training.accumulate, memory(parameters[0].device)
    step = seconds * batch * sum(job.lengths) / len(job.train) / max(job.lengths)
    room = "" if there is None else f" of {_bytes(there)}" + (", which is too little" if need > there else "")
    beside = ", and what writing answers takes" if job.whole(batch) > 1 else ""
    return f"about {_bytes(need)} of memory{room}; {step:.2g} s a step, {clock(step * training.steps)} in all{beside}"


def _tried(job: Job, batch: dict[str, Tensor], training: Any) -> tuple[float, float]:
    """Bytes that are kept of an example between forward and backward pass, and the seconds of both."""
    module, stored = job.module.train(), dict[int, int]()
    device = next(module.parameters()).device
    known = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            stored[storage.data_ptr()] = storage.nbytes()
        return x

    narrow = training.precision == "bf16"
    began = time.perf_counter()
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast(device.type, torch.bfloat16, enabled=narrow),
    ):
        loss = job.objective(module, {name: x.to(device) for name, x in batch.items()})
    loss.total.backward()
    module.zero_grad(set_to_none=True)
    return sum(stored.values()), time.perf_counter() - began


def _held(job: Job) -> list[Tensor]:
    """All tensors of the module and of its reference, each once: a model without its adapters is no second one."""
    with job.reference() if job.reference else nullcontext(job.module) as reference:
        tensors = [x for module in (job.module, reference) for x in (*module.parameters(), *module.buffers())]
    return list({id(x): x for x in tensors}.values())


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
