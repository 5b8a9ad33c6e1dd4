"""Whether a regular expression that came with a file can be trusted to finish.

Tokenizer files carry expressions for a backtracking engine (Oniguruma), where `(a|a)*b` takes time exponential in the
text. Accepted is what real tokenizers use and what takes at most quadratic time: no repetition of something that
itself can match in several ways, and at most one unbounded repetition before something that can fail. Holds a reader
of the expression's shape, no engine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LONGEST = 4096  # characters of an expression
DEEPEST = 16  # groups within groups
MOST_REPEATS = 1000  # of a counted repetition
MOST_WAYS = 4096  # in which its bounded parts may match; also of its items, counted repetitions written out
FEW = 16  # a repetition `{m,n}` with n - m beyond this counts as unbounded

_GROUP = re.compile(r"\?(?:[:>=!]|<[=!]|<[A-Za-z]\w*>|[imsu]*(?:-[imsu]+)?(?P<scope>[:)]))")
_COUNTED = re.compile(r"\{(\d{0,6})(,?)(\d{0,6})\}")
_ESCAPE = re.compile(r"\\(?:[pP]\{\^?\w+\}|x\{[0-9A-Fa-f ]+\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|[^gkpPxu0-9])")


@dataclass(frozen=True)
class _Shape:
    """How a part may match: can it be empty, how many unbounded repetitions, in how many ways the rest.

    `size` is how many items it has once counted repetitions are written out, as an engine may do.
    """

    empty: bool
    loops: int = 0
    ways: int = 1
    size: int = 1

    @property
    def fixed(self) -> bool:
        return self.loops == 0 and self.ways == 1


def refusal(pattern: str) -> str | None:
    r"""Why `pattern` is not accepted, or None.

    >>> refusal(r"\s*[\r\n]+|\s+(?!\S)|(?i:'s|'t)?")
    >>> refusal("(a|a)*b")
    'repeats a group that can match in several ways'
    """
    if len(pattern) > LONGEST:
        return f"has {len(pattern)} characters; at most {LONGEST} are accepted"
    try:
        reader = _Reader(pattern)
        reader.alternatives(0)
        return None if reader.at == len(pattern) else f"has an unmatched ')' at {reader.at}"
    except _RefusedError as error:
        return str(error)


class _RefusedError(Exception):
    """An expression that is not accepted."""


class _Reader:
    """Recursive descent over alternatives, sequences, items and their repetition."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.at = pattern, 0

    def alternatives(self, depth: int) -> _Shape:
        if depth > DEEPEST:
            raise _RefusedError(f"nests groups deeper than {DEEPEST}")
        branches = [self.sequence(depth)]
        while self.pattern.startswith("|", self.at):
            self.at += 1
            branches.append(self.sequence(depth))
        empty, loops = any(b.empty for b in branches), max(b.loops for b in branches)
        return _Shape(empty, loops, sum(b.ways for b in branches), sum(b.size for b in branches))

    def sequence(self, depth: int) -> _Shape:
        empty, loops, ways, size = True, 0, 1, 0
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            item, can_fail = self.item(depth)
            item = self.repeated(item)
            if can_fail or not item.empty:
                _check(loops, ways)
            empty, loops, ways = empty and item.empty, loops + item.loops, ways * item.ways
            size += item.size
            if max(ways, size) > MOST_WAYS:
                raise _RefusedError(f"has more than {MOST_WAYS} items or ways to match its optional parts")
        return _Shape(empty, loops, ways, size)

    def item(self, depth: int) -> tuple[_Shape, bool]:
        """The next item without its repetition, and whether it can fail though it takes no text."""
        character = self.pattern[self.at]
        if character == "(":
            return self.group(depth)
        if character in "*+?":
            raise _RefusedError(f"repeats nothing at {self.at}")
        if character == "[":
            self.skip_class()
        elif character == "\\":
            self.skip_escape()
            return _Shape(empty=False), True  # \b and its like take no text, and nothing is lost by thinking so of all
        else:
            self.at += 1
        return _Shape(empty=character in "^$"), True

    def group(self, depth: int) -> tuple[_Shape, bool]:
        self.at += 1
        opening = _GROUP.match(self.pattern, self.at)
        if opening is None and self.pattern.startswith("?", self.at):
            raise _RefusedError(f"has a group of an unusual kind at {self.at}")
        if opening is not None:
            self.at = opening.end()
            if opening["scope"] == ")":
                return _Shape(empty=True), False
        inner = self.alternatives(depth + 1)
        if not self.pattern.startswith(")", self.at):
            raise _RefusedError("has an unmatched '('")
        self.at += 1
        looks = opening is not None and opening[0] in ("?=", "?!", "?<=", "?<!")
        return (_Shape(empty=True), True) if looks else (inner, False)

    def repeated(self, item: _Shape) -> _Shape:
        """`item` under the repetition that follows it, if one does."""
        low, high = self.bounds()
        if self.pattern[self.at : self.at + 1] in ("?", "+") and (low, high) != (1, 1):
            self.at += 1  # lazy or possessive
        if self.pattern[self.at : self.at + 1] in ("*", "+", "?", "{") and (low, high) != (1, 1):
            raise _RefusedError("repeats a repetition")
        if (high is None or high > 1) and not item.fixed:
            raise _RefusedError("repeats a group that can match in several ways")
        empty = item.empty or low == 0
        if high is None or high - low > FEW:
            return _Shape(empty, item.loops + 1, item.ways, item.size * max(low, high or 0, 1))
        return _Shape(empty, item.loops, item.ways + high - low, item.size * max(high, 1))

    def bounds(self) -> tuple[int, int | None]:
        """How often the item before may occur; moves over the sign that says so."""
        sign = self.pattern[self.at : self.at + 1]
        if sign and sign in "*+?":
            self.at += 1
            return int(sign == "+"), 1 if sign == "?" else None
        counted = _COUNTED.match(self.pattern, self.at)
        if counted is None or not (counted[1] or counted[3]):
            return 1, 1
        self.at = counted.end()
        low = int(counted[1] or 0)
        high = low if not counted[2] else int(counted[3]) if counted[3] else None
        if max(low, high or 0) > MOST_REPEATS:
            raise _RefusedError(f"repeats more than {MOST_REPEATS} times")
        return low, high

    def skip_class(self) -> None:
        """Move over a bracket expression, which may hold others."""
        depth, start = 0, self.at
        while self.at < len(self.pattern):
            character = self.pattern[self.at]
            if character == "\\":
                self.skip_escape()
                continue
            self.at += 1
            if character == "[":
                depth += 1
                self.at += self.pattern.startswith("^", self.at)
                self.at += self.pattern.startswith("]", self.at)  # the first one stands for itself
            elif character == "]":
                depth -= 1
            if depth == 0:
                return
        raise _RefusedError(f"has an unmatched '[' at {start}")

    def skip_escape(self) -> None:
        escape = _ESCAPE.match(self.pattern, self.at)
        if escape is None:
            raise _RefusedError(f"has an escape of an unusual kind at {self.at}")
        self.at = escape.end()


def _check(loops: int, ways: int) -> None:
    if loops > 1:
        raise _RefusedError("has several unbounded repetitions before something that can fail")
    if loops and ways > 8:
        raise _RefusedError("can match in too many ways before something that can fail")
