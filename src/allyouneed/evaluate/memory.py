"""How much memory a computation takes at its peak."""

from __future__ import annotations

import json
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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_bytes())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(accumulate((change for _, change in changes), initial=0))
