"""Room for tensors that are seldom looked at, outside of the memory that is short: for `PagedAdamW`'s moments.

Beside a CPU that is a file mapped into memory, whose pages the system drops and brings back; beside a GPU the host's
memory, pinned. Knows nothing of optimisers.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from allyouneed.core.errors import InputError


class Page(Protocol):
    """`tensor` is where it is kept, zeros at first."""

    tensor: Tensor

    def bring(self) -> Tensor:
        """What can be computed with, until it is kept again."""

    def keep(self, near: Tensor) -> None:
        """Have what `bring` gave stored as it is now, and its memory free."""


def room(like: Tensor, folder: str | None = None) -> Page:
    """Room for a tensor like this one, which says the device.

    Raises:
        InputError: no room in `folder`.
    """
    return HostPage(like) if like.is_cuda else FilePage(like, folder)


class FilePage:
    """A tensor in a file without a name, which is gone with the process however that ends.

    >>> page = FilePage(torch.ones(2, 3))
    >>> page.keep(page.bring().add_(1))
    >>> page.tensor.sum()
    tensor(6.)
    """

    def __init__(self, like: Tensor, folder: str | None = None) -> None:
        where = folder or tempfile.gettempdir()
        size = max(like.nbytes, 1)
        try:
            with tempfile.TemporaryFile(dir=Path(where)) as file:
                _reserve(file.fileno(), size)
                self.memory = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise InputError(f"{where}: no room for {size} bytes of optimizer state: {error.strerror}") from None
        flat = torch.frombuffer(self.memory, dtype=like.dtype, count=like.numel())
        self.tensor = flat.as_strided(like.size(), like.stride())

    def bring(self) -> Tensor:
        """The tensor itself: the system reads its pages when they are touched."""
        return self.tensor

    def keep(self, near: Tensor) -> None:
        """Let go of the pages; what was written stays in the system's cache until it is on disk."""
        self.memory.madvise(mmap.MADV_DONTNEED)


class HostPage:
    """A tensor in the host's pinned memory, copied to the device and back."""

    def __init__(self, like: Tensor) -> None:
        self.device = like.device
        self.tensor = torch.zeros_like(like, device="cpu", pin_memory=like.is_cuda)

    def bring(self) -> Tensor:
        """A copy on the device, in the order of its stream."""
        return self.tensor.to(self.device, non_blocking=True, copy=True)

    def keep(self, near: Tensor) -> None:
        """Copied back, and waited for."""
        self.tensor.copy_(near)


def _reserve(descriptor: int, size: int) -> None:
    """So much of the disk, or an error now: to write a page for which there is no room kills the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)
