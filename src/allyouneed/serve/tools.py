"""Calls of tools, out of the text a model writes: read as it comes, in the form its chat template taught it.

Holds the forms (Hermes, which Qwen and SmolLM write too; Phi's; Granite's; Mistral's; LLaMA's), which one a template is
of, and `Reader`, which tells text from calls. Knows no HTTP and no engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Said:
    """Text that is no call."""

    text: str


@dataclass(frozen=True)
class Called:
    """A call begins: the function's name is known."""

    name: str


@dataclass(frozen=True)
class Argued:
    """More of the JSON text of the last call's arguments."""

    text: str


Event = Said | Called | Argued

_STRING = r'"(?:[^"\\]|\\.)*"'
_HEAD = re.compile(rf'\s*\{{\s*"name"\s*:\s*({_STRING})\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)', re.S)
_PLAIN_HEAD = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]\s*(?=\{)")  # Mistral's since its tokenizer v11


_FIRST = re.compile(rf"\s*\{{\s*({_STRING})\s*:", re.S)
_KEYS = frozenset({'"name"', '"arguments"', '"parameters"', '"function"', '"type"', '"id"', '"index"'})  # of calls
MOST_HEAD = 1024  # characters in which a call's name must have come
_OTHER_MARKS = re.compile(r"<[^<>\s]*(?:tool|function)[_▁-]?calls?[^<>\s]*>|<function=", re.I)


@dataclass(frozen=True)
class Form:
    """How a family writes calls: JSON objects, or a list of them, from `opening` to `closing` or the end.

    `bare` says that a text which begins with `{` may be a call without a mark; `special` that the marks are special
    tokens, whose text has to be asked for.
    """

    opening: str | None
    closing: str | None = None
    bare: bool = False
    special: bool = False

    @property
    def plain(self) -> bool:
        """Whether text alone says where calls begin and end, so that a grammar of texts can hold them."""
        return self.closing is not None and not self.special


HERMES = Form("<tool_call>", "</tool_call>")
PHI = Form("<|tool_call|>", "<|/tool_call|>", special=True)  # Phi-4-mini, in the templates that say how it calls
GRANITE = Form("<|tool_call|>", special=True)  # 3.x; Granite 4 writes as Hermes
MISTRAL = Form("[TOOL_CALLS]", special=True)
LLAMA = Form("<|python_tag|>", bare=True, special=True)
BARE = Form(None, bare=True)
MARKS = (  # by which templates are told, the first that is there
    ("<tool_call>", HERMES),
    ("<|/tool_call|>", PHI),
    ("<|tool_call|>", GRANITE),
    ("[TOOL_CALLS]", MISTRAL),
    ("<|python_tag|>", LLAMA),
)


def form_of(template: str | None) -> Form | None:
    """The form that a chat template teaches; None where it takes no tools, or marks calls in a way not known here, of
    which nothing could be read.

    >>> form_of("{% if tools %}<tool_call>{% endif %}").closing, form_of("{{ messages }}")
    ('</tool_call>', None)
    """
    if template is None or not re.search(r"\btools\b", template):
        return None
    known = next((form for mark, form in MARKS if mark in template), None)
    return known or (None if _OTHER_MARKS.search(template) else BARE)


class Scanner:
    """Finds where a JSON value that is an object ends, in text that comes in pieces."""

    def __init__(self, depth: int = 0) -> None:
        self.depth, self.quoted, self.escaped = depth, False, False

    def end(self, piece: str) -> int | None:
        """How many characters of `piece` belong to the value, if it ends there."""
        for i, character in enumerate(piece):
            if self.quoted:
                self.quoted = self.escaped or character != '"'
                self.escaped = character == "\\" and not self.escaped
            elif character == '"':
                self.quoted = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth <= 0:
                    return i + 1
        return None


class Reader:
    """Tells calls from text, piece by piece.

    Held back is what may be the beginning of a mark, a call whose name is not yet there, and space that may stand
    before a call. Arguments are passed on as they come. What proves to be no call is text, as it stands.

    >>> reader = Reader(HERMES)
    >>> [*reader.push('Well: <tool_'), *reader.push('call>{"name": "f", "arguments": {"a": 1'), *reader.push('}}')]
    [Said(text='Well:'), Called(name='f'), Argued(text='{"a": 1'), Argued(text='}')]
    """

    def __init__(self, form: Form, *, forced: bool = False) -> None:
        """`forced`: the text is one call without marks, because a guide lets nothing else be written."""
        self.form, self.rest, self.space, self.raw = form, "", "", ""
        self.begun = self.whole = 0  # calls whose name is known, and those that are complete
        self.fresh = form.bare
        self._scanner, self._plain = Scanner(), False
        self._at = self._text
        self._scanned, self._object = 0, Scanner()
        if forced:
            self._await_head()

    @property
    def cut(self) -> bool:
        """Whether a call has begun that is not complete."""
        return self.begun > self.whole

    def push(self, piece: str) -> Iterator[Event]:
        """What `piece` makes clear."""
        self.rest += piece
        while self.rest:
            events = self._at()
            if events is None:
                return
            yield from events

    def finish(self) -> Iterator[Event]:
        """The text ended: what was held back is text, unless it is a mark that closes a call."""
        held = self.space + self.raw + self.rest
        if held and self._at in (self._text, self._head) and (held.strip() or not self.begun):
            yield Said(held)
        self.rest = self.space = self.raw = ""

    def _text(self) -> list[Event] | None:
        if self.fresh and not self.rest.strip():
            return None
        if self.fresh and self.rest.lstrip().startswith("{"):
            self.fresh = False
            self._await_head()
            return []
        self.fresh = False
        opening = self.form.opening or "\0"
        place = self.rest.find(opening)
        sure = place if place >= 0 else len(self.rest) - _overlap(self.rest, opening)
        text, self.rest = self.space + self.rest[:sure], self.rest[sure:]
        said = text.rstrip()
        self.space = text[len(said) :]
        if place >= 0:
            self._open(opening)
        elif not said:
            return None
        return [Said(said)] if said else []

    def _open(self, opening: str) -> None:
        self.raw, self.rest = self.space + opening, self.rest[len(opening) :]
        self.space = ""
        self._await_head()

    def _await_head(self) -> None:
        self._at = self._head
        self._scanned, self._object = 0, Scanner()  # of an object that does not begin with the name

    def _head(self) -> list[Event] | None:
        if self.rest.lstrip().startswith("["):
            self.raw, self.rest = self.raw + self.rest[: self.rest.index("[") + 1], self.rest.lstrip()[1:]
        found = _HEAD.match(self.rest, 0, MOST_HEAD) or _PLAIN_HEAD.match(self.rest, 0, MOST_HEAD)
        if found:
            return self._named(found)
        if self.rest.lstrip().startswith("{"):
            return self._unordered()
        if (_begins_plain(self.rest) and self.form is MISTRAL) or not self.rest.strip():
            return None
        return self._no_call()

    def _named(self, found: re.Match[str]) -> list[Event]:
        self._plain = found.re is _PLAIN_HEAD
        name = found[1] if self._plain else _loaded(found[1])
        if not isinstance(name, str):
            return self._no_call()
        self.rest, self.raw, self.begun = self.rest[found.end() :], "", self.begun + 1
        self._at, self._scanner = self._value, Scanner()
        return [Called(name)]

    def _unordered(self) -> list[Event] | None:
        """An object that does not begin with the name is read as a whole, unless its first key is none of a call's."""
        first = _FIRST.match(self.rest, 0, MOST_HEAD)
        if first and first[1] not in _KEYS:
            return self._no_call()
        end = self._object.end(self.rest[self._scanned :])
        if end is None:
            self._scanned = len(self.rest)
            return None
        end += self._scanned
        call = _loaded(self.rest[:end])
        call = call.get("function", call) if isinstance(call, dict) else {}
        name = call.get("name") if isinstance(call, dict) else None
        arguments: object = (
            next((call[key] for key in ("arguments", "parameters") if key in call), {}) if name else None
        )
        if not isinstance(name, str) or not isinstance(arguments, dict | str):
            return self._no_call()
        self.rest, self.raw, self._at = self.rest[end:], "", self._between
        self.begun, self.whole = self.begun + 1, self.whole + 1
        return [Called(name), Argued(arguments if isinstance(arguments, str) else json.dumps(arguments))]

    def _no_call(self) -> list[Event]:
        said, self.raw, self.rest, self._at = self.raw + self.rest[:1], "", self.rest[1:], self._text
        return [Said(said)]

    def _value(self) -> list[Event] | None:
        end = self._scanner.end(self.rest)
        text, self.rest = self.rest[:end], "" if end is None else self.rest[end:]
        if end is not None:
            self.whole += self._plain
            self._at, self._scanner = self._between if self._plain else self._tail, Scanner(depth=1)
        return [Argued(text)]

    def _tail(self) -> list[Event] | None:
        end = self._scanner.end(self.rest)
        self.rest = "" if end is None else self.rest[end:]
        if end is not None:
            self.whole, self._at = self.whole + 1, self._between
        return []

    def _between(self) -> list[Event] | None:
        self.rest = self.rest.lstrip(" \t\r\n,;]")
        closing = self.form.closing
        if closing and self.rest.startswith(closing):
            self.rest, self._at = self.rest[len(closing) :], self._text
        elif self.rest.startswith("{"):
            self._await_head()
        elif not self.rest or (closing and closing.startswith(self.rest)):
            return None
        else:
            self._at = self._text
        return []


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` may begin `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)


def _begins_plain(text: str) -> bool:
    return len(text) < 200 and re.fullmatch(r"\s*[\w.-]+(?:\[[A-Z_]*\]?\w*)*\s*", text) is not None


def _loaded(text: str) -> object:
    """A JSON value, None where `text` is none or spells half a surrogate pair, which no answer can carry."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return value
