"""Jinja templates from strangers, rendered as Hugging Face renders chat templates, within limits.

A template runs in Jinja's immutable sandbox, with a limit on the time it takes and on the size of what it makes, held
at every loop turn, call, filter, comparison and operator. Knows nothing of conversations.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from allyouneed.core.errors import InputError

MOST_SECONDS = 0.5  # of processor time; a real template takes milliseconds
LONGEST_STEP = 0.1  # that counts: what one thing can take, given the sizes below; a garbage collection takes longer
MOST_CHARACTERS = 1 << 22  # of a template's output and of any text on the way
MOST_DIGITS = 100  # of a number
WIDEST = 64  # indentation
LONGEST_TEMPLATE = 1 << 16

# What chat templates use. Jinja's others pad, wrap, print or sum, for which no template has a need but a hostile one.
_FILTERS = frozenset(
    {"abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "forceescape"}
    | {"groupby", "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr"}
    | {"reverse", "round", "safe", "select", "selectattr", "sort", "title", "trim", "unique", "upper"}
)
_COMPARING = frozenset({"dictsort", "groupby", "max", "min", "sort", "unique"})
_WIDENING = frozenset({"center", "expandtabs", "ljust", "rjust", "translate", "zfill"})
_WIDTH = re.compile(r":[^}]*[\d{]|%[^%a-z]*[\d*]")  # in a format string


def run(template: str, variables: dict[str, Any], name: str) -> str:
    """The text that `template` makes of `variables`, which are plain data; `name` stands in messages.

    >>> run("{% for word in words %}<{{ word }}>{% endfor %}", {"words": ["a", "b"]}, "template")
    '<a><b>'

    Raises:
        InputError: the template is malformed, refuses, or takes too much time or room.
    """
    try:
        compiled = _compiled(template)
        compiled.environment.clock.start()  # type: ignore[attr-defined]
        return _gathered(compiled.generate(variables))  # no keywords: one may be called self
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"{name}: line {error.lineno}: {_line(error)}") from None
    except RecursionError:
        raise InputError(f"{name}: calls itself too deeply") from None
    except Exception as error:  # a template can raise whatever Python's own operators do
        raise InputError(f"{name}: {_line(error)}") from None


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    if len(template) > LONGEST_TEMPLATE:
        raise _LimitError(f"has {len(template)} characters; at most {LONGEST_TEMPLATE} are accepted")
    return _Environment().from_string(template)


class _LimitError(Exception):
    """The template took more than it may."""


class _Clock(threading.local):
    """What the rendering that goes on in this thread took, in its processor time."""

    spent = seen = 0.0

    def start(self) -> None:
        self.spent, self.seen = 0.0, time.thread_time()

    def check(self) -> None:
        now = time.thread_time()
        self.spent += min(now - self.seen, LONGEST_STEP)
        self.seen = now
        if self.spent > MOST_SECONDS:
            raise _LimitError(f"took longer than {MOST_SECONDS:g} s")


class _Limits(Extension):
    """What the templates' loops, macros, comparisons and `~` are made to call."""

    def tick(self) -> str:
        self.environment.clock.check()  # type: ignore[attr-defined]
        return ""

    def bounded(self, value: Any) -> Any:
        return _bounded(value)

    def concat(self, *values: Any) -> str:
        self.tick()
        return _sized("".join(_text(value) for value in values))


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says, for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - the base class has it so

    def parse(self, parser: Any) -> Any:
        """The body as it stands."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Guard(NodeTransformer):
    """Puts calls to `_Limits` where a template could go on without end."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self.limits = environment.extensions[_Limits.identifier]

    def ticking(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self.limits.call_method("tick"), lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = ticking  # noqa: N815 - the names nodes are visited by

    def visit_Compare(self, node: nodes.Compare) -> Any:  # noqa: N802
        self.generic_visit(node)
        node.expr = self.limits.call_method("bounded", [node.expr])
        for operand in node.ops:
            operand.expr = self.limits.call_method("bounded", [operand.expr])
        return node

    def visit_Concat(self, node: nodes.Concat) -> Any:  # noqa: N802
        self.generic_visit(node)
        return self.limits.call_method("concat", node.nodes, lineno=node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja with the options chat templates are written for, and limits."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=_finalize,
            extensions=[loopcontrols, _Limits, _Generation],
        )
        self.clock = _Clock()
        own: dict[str, Callable[..., Any]] = {
            "tojson": _tojson,
            "join": _join,
            "replace": _replace,
            "indent": _indent,
            "string": _text,
        }
        found = {name: self.filters[name] for name in sorted(_FILTERS)} | own
        self.filters = {name: self.timed(name, function) for name, function in found.items()}
        given = {"raise_exception": _raise, "strftime_now": _strftime_now, "namespace": _Variables, "dict": dict}
        self.globals = {"range": self.globals["range"]} | given

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that looks at the clock, and at the size of its result and of what it compares."""

        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.clock.check()
            if name in _COMPARING:
                _bounded(list(args))
            return _sized(function(*args, **kwargs))

        return guarded

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Guard(self).visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`, if its result is of a size that a chat could have."""
        self.clock.check()
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        """`str.format`, kept inside the sandbox by Jinja, and without widths here."""
        found = super().wrap_str_format(value)
        if found is not None and _WIDTH.search(value.__self__):
            raise _LimitError("formats with a width, which is not accepted")
        return found

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Not what widens a text to a number of characters the template names."""
        return super().is_safe_attribute(obj, attr, value) and not (isinstance(obj, str) and attr in _WIDENING)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call from within the template."""
        self.clock.check()
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str) and name in ("replace", "join"):
            function = {"replace": _replace, "join": _join_method}[name]
            args = (owner, *args)
        return _sized(super().call(context, function, *args, **kwargs))


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if operator == "%" and isinstance(left, str) and _WIDTH.search(left):
        raise _LimitError("formats with a width, which is not accepted")
    numbers = [value for value in (left, right) if isinstance(value, int)]
    holders = [value for value in (left, right) if isinstance(value, str | list | tuple)]
    if len(numbers) == 2:
        digits = _digits(left) + _digits(right) if operator != "**" else _digits(left) * max(right, 1)
        size = MOST_CHARACTERS * (digits > MOST_DIGITS) + 1
    elif operator == "*" and holders and numbers:
        size = len(holders[0]) * numbers[0]
    else:
        size = sum(map(len, holders))
    if size > MOST_CHARACTERS:
        raise _LimitError(f"makes a value too large with {operator!r}")


def _digits(number: int) -> int:
    return number.bit_length() // 3 + 1


class _Variables(Namespace):
    """`namespace()`, without the attributes Python itself looks for."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        Namespace.__init__(*args, **kwargs)
        if any(str(name).startswith("_") for name in dict(*args[1:], **kwargs)):
            raise jinja2.sandbox.SecurityError("a namespace holds no names that begin with '_'")

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.sandbox.SecurityError("a namespace holds no names that begin with '_'")
        super().__setitem__(name, value)


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(str(message)[:300])


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(str(form)[:100])


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where Jinja's own filter would escape it for HTML."""
    if indent is not None and indent > WIDEST:
        raise _LimitError(f"indents by {indent}; at most {WIDEST} is accepted")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=tuple(separators) if separators else None,
        sort_keys=sort_keys,
    )
    return _gathered(encoder.iterencode(_bounded(value)))


def _indent(text: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    """Jinja's own `indent`, by a number of spaces or a text that is not too wide."""
    wide, text = width if isinstance(width, int) else len(width), _text(text)
    if wide > WIDEST or len(text) + wide * (text.count("\n") + 1) > MOST_CHARACTERS:
        raise _LimitError(f"indents by {wide}; at most {WIDEST} is accepted")
    return do_indent(text, width, first, blank)


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = _text(text), _text(old), _text(new)
    if text.count(old) * len(new) > MOST_CHARACTERS:
        raise _LimitError("replaces by a text that makes the whole too large")
    return text.replace(old, new, -1 if count is None else count)


def _join(values: Any, between: Any = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        values = [value[attribute] for value in values]
    return _join_method(_text(between), values)


def _join_method(between: str, values: Any) -> str:
    items = [_text(value) for value in values]
    if sum(map(len, items)) + len(between) * len(items) > MOST_CHARACTERS:
        raise _LimitError("joins texts to one too large")
    return between.join(items)


def _finalize(value: Any) -> Any:
    """What is about to be written out."""
    return value if isinstance(value, str | jinja2.Undefined) else _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(_bounded(value))


def _bounded(value: Any) -> Any:
    """`value`, if what it holds, written out, is of a size that a chat could have. It may hold one thing many times."""
    waiting, size = [value], 0
    while waiting:
        one = waiting.pop()
        size += len(one) if isinstance(one, str) else 64
        if size > MOST_CHARACTERS:
            raise _LimitError("writes out a value too large")
        if isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, list | tuple):
            waiting += one
    return value


def _sized(value: Any) -> Any:
    if isinstance(value, str | list | tuple) and len(value) > MOST_CHARACTERS:
        raise _LimitError(f"makes a text or list of {len(value)}")
    return value


def _gathered(pieces: Any) -> str:
    found, size = [], 0
    for piece in pieces:
        found.append(piece)
        size += len(piece)
        if size > MOST_CHARACTERS:
            raise _LimitError(f"writes more than {MOST_CHARACTERS} characters")
    return "".join(found)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
