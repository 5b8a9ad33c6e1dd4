"""A guide that fails alone: what goes wrong in one request's grammar ends that request, not the pass it is in."""

from __future__ import annotations

import torch
from torch import Tensor

from allyouneed.core.errors import InputError
from allyouneed.generate.requests import Guide


class WatchedGuide:
    """Guides as `guide` does. When that fails, the error is kept in `error` and the text is at its end.

    Args:
        size: V, how many tokens the vocabulary has.
    """

    def __init__(self, guide: Guide, size: int) -> None:
        self.guide, self.size = guide, size
        self.error: InputError | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing but an end token may follow."""
        return self.error is not None or self.guide.finished

    def allowed(self) -> Tensor:
        """Which tokens may come next: (V,) bool; after a failure any, for whatever comes is thrown away."""
        if self.error is None:
            try:
                return self.guide.allowed()
            except InputError as error:
                self.error = error
        return torch.ones(self.size, dtype=torch.bool)

    def take(self, token: int) -> None:
        """Go on past a token."""
        if self.error is None:
            try:
                self.guide.take(token)
            except InputError as error:
                self.error = error

    def rewind(self, count: int) -> None:
        """Take back the last `count` tokens."""
        if self.error is None:
            self.guide.rewind(count)
