"""Errors a person can act on. Anything else that escapes is a bug of ours and keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class InputError(ValueError):
    """Something handed to us is wrong: a file, a name, an option. One line that names the thing and the mend.

    The command line prints the line and exits with code 2.
    """


class RankLostError(RuntimeError):
    """Another process of a run is gone, and with it the run: nobody's mistake, and one line. `torchrun --max-restarts`
    starts all of them anew.
    """


class RemoteError(RuntimeError):
    """An endpoint failed: one line with the status and the server's own words.

    Attributes:
        status: the HTTP status, None where there was no answer or the answer made no sense.
        done: what came back for the other requests of the same call, by their index.
    """

    def __init__(self, message: str, status: int | None = None, done: Mapping[int, Any] | None = None) -> None:
        super().__init__(message)
        self.status, self.done = status, dict(done or {})


@contextmanager
def about(source: object) -> Iterator[None]:
    """Errors raised inside name `source`, where they do not yet.

    >>> with about("config.json"):
    ...     raise InputError("dim=0; it must be above 0")
    Traceback (most recent call last):
    allyouneed.core.errors.InputError: config.json: dim=0; it must be above 0
    """
    try:
        yield
    except InputError as error:
        raise (error if str(source) in str(error) else InputError(f"{source}: {error}")) from None


def brief(value: object) -> str:
    """A value as a message shows it: in one line, and short whatever its size.

    >>> brief("a" * 1000)[-9:], brief([0] * 1000)
    ('aaaaaa...', 'a list of 1000')
    """
    if isinstance(value, dict | list | tuple) and len(value) > 4:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = repr(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """An `InputError` for a `name` that is not among the `known` ones, naming the nearest of them.

    >>> str(unknown("paper", "alibbi", ["alibi", "gpt2"]))
    "unknown paper 'alibbi'; did you mean 'alibi'?"
    """
    choices = sorted(set(known))
    near = difflib.get_close_matches(name[:60], choices, n=3, cutoff=0.5)
    if near:
        mend = "did you mean " + " or ".join(repr(n) for n in near) + "?"
    else:
        shown = choices[:12]
        mend = "known: " + ", ".join(shown) + (f" and {len(choices) - 12} more" if len(choices) > 12 else "")
    return InputError(f"unknown {kind} {brief(name)}; {mend}")
