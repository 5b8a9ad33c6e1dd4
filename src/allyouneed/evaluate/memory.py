"""How much memory a computation takes at its peak, and how much it keeps."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def peak_allocated(work: Callable[[], object]) -> int:
    """Bytes that PyTorch's allocator has given out on the CPU at the highest moment of `work()`, beyond what stood
    before. Exact and the same on every machine; what libraries take past the allocator is not seen.

    >>> import torch
    >>> peak_allocated(lambda: torch.zeros(1000) + torch.zeros(1000)) // 4000
    3
    """
    return max(accumulate(_changes(work), initial=0))


def kept_allocated(work: Callable[[], object]) -> int:
    """Bytes that are still given out when `work()` is done and its result is held, beyond what stood before; of a view
    all that it keeps alive. As exact as `peak_allocated`.

    >>> import torch
    >>> kept_allocated(lambda: (torch.zeros(1000) + torch.zeros(1000))[:1]) // 4000
    1
    """
    return sum(_changes(work))


def _changes(work: Callable[[], object]) -> list[int]:
    """Every allocation, above 0, and release, below, in their order."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines to the terminal each time
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        held = work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_bytes())["traceEvents"]
    del held  # not before the profiler has stopped
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return [change for _, change in changes]
