"""Which device and precision to compute with, and what machine this is."""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import suppress
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


def memory(device: Any = "cpu") -> int | None:
    """Bytes of memory on a device: of a GPU all that it has, else the machine's or, where that is less, what the group
    that this process belongs to may use (a container's limit). None where the system does not say.
    """
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    known = [size for size in (_physical(), group_limit()) if size is not None]
    return min(known, default=None)


def give_back() -> None:
    """Have the C library return to the system what it keeps of memory that was freed: to be called once something large
    was read and done with. glibc keeps what lies below the last piece in use (malloc_trim(3)); others do by themselves.
    """
    with suppress(OSError, AttributeError, TypeError):  # no such library or function here
        ctypes.CDLL(None).malloc_trim(0)


def group_limit(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The least memory limit of the control groups that a process is in (Linux, versions 1 and 2), in bytes.

    Args:
        own: says which groups they are.
        root: where their files are.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return None
    limits: list[int] = []
    for _, controllers, path in lines:
        if controllers in ("", "memory"):
            top, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
            inner = top / path.lstrip("/")
            limits += [limit for folder in (inner, *inner.parents) if (limit := _number(folder / name)) is not None]
    return min(limits, default=None)


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
    size = _physical()
    return None if size is None else round(size / 2**30, 1)


def _physical() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no such file, or it says `max`."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
