"""Text that grows a token at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from allyouneed.data.tokenizers import Tokenizer


class Stream:
    """Decodes ids as they come: `push` gives the text that no later id can change, `finish` the rest.

    The pieces joined equal `decode` of all ids.

    >>> from allyouneed.data.tokenizers import byte_tokenizer
    >>> stream = byte_tokenizer().stream()
    >>> [stream.push(byte) for byte in "né".encode()], stream.finish()
    (['n', '', 'é'], '')
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []  # the last ids whose text was given whole, and those after them
        self._given = 0  # characters of the text of `_ids` that were given
        self._since = 0  # how many of `_ids` came after those whose text was given whole

    def push(self, token: int) -> str:
        """The text that is sure once `token` is there, maybe none."""
        self._tokenizer._check([token])
        if self._skip and token in self._tokenizer._special:
            return ""
        self._ids.append(token)
        self._since += 1
        if token in self._tokenizer._bytes:  # a run of byte tokens is decoded as one, and it goes on
            return ""
        text = self._text()
        if text.endswith("\ufffd"):  # perhaps the beginning of a character; what stands before it is sure
            return self._give(text[:-1])
        piece = self._give(text)
        self._ids, self._since = self._ids[-self._since :], 0
        self._given = len(self._text())
        return piece

    def finish(self) -> str:
        """The text held back until now; the stream is as new afterwards."""
        piece = self._text()[self._given :]
        self._ids, self._given, self._since = [], 0, 0
        return piece

    def _give(self, sure: str) -> str:
        piece, self._given = sure[self._given :], max(self._given, len(sure))
        return piece

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)
