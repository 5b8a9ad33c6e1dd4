"""Stop strings: where a text ends, found while it comes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Pieces(Protocol):
    """Turns token ids into text as they come; holds back characters that are not yet whole."""

    def push(self, token: int) -> str:
        """The text that became whole with `token`."""

    def finish(self) -> str:
        """What was held back."""


class StopStrings:
    """Text up to the first stop string. What may be the beginning of one is held back until it is clear.

    Stop strings that begin before the token number `least` do not count (`Sampling.min_tokens`).

    >>> class Letters:
    ...     def push(self, token): return chr(token)
    ...     def finish(self): return ""
    >>> text = StopStrings(Letters(), ["END"])
    >>> [text.push(ord(letter)) for letter in "a END"], text.finish()
    ([False, False, False, False, True], 'a ')
    """

    def __init__(self, pieces: Pieces, stop: Sequence[str], least: int = 0) -> None:
        self.pieces, self.stop, self.missing = pieces, [string for string in stop if string], least
        self.text, self.taken, self.begin, self.stopped, self.done = "", 0, 0, False, False

    def push(self, token: int) -> bool:
        """Add a token; whether a stop string is now complete."""
        self.missing -= 1
        self._add(self.pieces.push(token))
        return self.stopped

    def take(self) -> str:
        """Text that is sure and was not taken before."""
        end = len(self.text) if self.done or self.stopped else len(self.text) - self._doubtful()
        piece = self.text[self.taken : end]
        self.taken = max(self.taken, end)
        return piece

    def finish(self) -> str:
        """The whole text, up to the stop string where there was one."""
        if not self.done and not self.stopped:
            self._add(self.pieces.finish())
        self.done = True
        return self.text

    def _add(self, piece: str) -> None:
        searched = max(self.begin, len(self.text) - max(map(len, self.stop), default=0))
        self.text += piece
        if self.missing > 0:
            self.begin = len(self.text)
            return
        places = [place for string in self.stop if (place := self.text.find(string, searched)) >= 0]
        if places:
            self.text, self.stopped = self.text[: min(places)], True

    def _doubtful(self) -> int:
        """How many characters at the end may belong to a stop string."""
        longest = max((len(string) for string in self.stop), default=1) - 1
        for length in range(min(longest, len(self.text) - self.begin), 0, -1):
            if any(string.startswith(self.text[-length:]) for string in self.stop):
                return length
        return 0
