"""Which device and precision to compute with, and what machine this is."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def best() -> str:
    """`"cuda"` or `"mps"` when there is one, else `"cpu"`."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def machine() -> dict[str, Any]:
    """What a report says about the machine it ran on: no names, no paths."""
    return {
        "system": platform.system(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "device": best(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    from importlib.metadata import version

    names = ["allyouneed", "torch", "numpy", "tokenizers", "safetensors"]
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open() as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
