"""Errors a person can act on. Anything else that escapes is a bug of ours and keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Something handed to us is wrong: a file, a name, an option. One line that names the thing and the mend.

    The command line prints the line and exits with code 2.
    """


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


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """An `InputError` for a `name` that is not among the `known` ones, naming the nearest of them.

    >>> str(unknown("paper", "alibbi", ["alibi", "gpt2"]))
    "unknown paper 'alibbi'; did you mean 'alibi'?"
    """
    choices = sorted(set(known))
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    if near:
        mend = "did you mean " + " or ".join(repr(n) for n in near) + "?"
    else:
        shown = choices[:12]
        mend = "known: " + ", ".join(shown) + (f" and {len(choices) - 12} more" if len(choices) > 12 else "")
    return InputError(f"unknown {kind} {name!r}; {mend}")
