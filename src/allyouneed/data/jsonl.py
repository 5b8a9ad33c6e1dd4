"""Data files: JSON lines of the field's kinds, and plain text. Read as they stream, or by line number.

    {"text": "…"}                                        Text
    {"messages": [{"role": "user", "content": "…"}, …]}  Chat
    {"prompt": "…"}                                      Prompt
    {"prompt": "…", "completion": "…"}                   Completion
    {"prompt": "…", "chosen": "…", "rejected": "…"}      Preference
    {…, "margin": 1.5}                                   Graded: a preference and how clear it is
    {"text": "…", "label": "…"}                          Labelled
    {"text": "…", "text_pair": "…", "label": "…"}        LabelledPair
    {"context": "…", "choices": ["…", …], "label": 0}    Choices
    {"context": "…", "question": "…", "answers": {…}}    Spans, as of SQuAD: {"text": ["…"], "answer_start": [0]}
    {"tokens": ["…", …], "tags": ["…", …]}               Tagged

Prompts and answers may be strings or lists of messages, labels and tags strings or whole numbers; further keys are
passed over. Nothing is tokenised here.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from allyouneed.core.errors import InputError, about

Made = TypeVar("Made")
Message = dict[str, str]  # role and content
Turns = str | list[Message]
ROLES = ("system", "user", "assistant", "tool")
LONGEST = 8 << 20  # bytes of a line: no record is longer, and JSON in memory is many times its text


@dataclass(frozen=True)
class Text:
    """A document."""

    text: str


@dataclass(frozen=True)
class Chat:
    """A conversation."""

    messages: list[Message]


@dataclass(frozen=True)
class Prompt:
    """What is to be answered."""

    prompt: Turns


@dataclass(frozen=True)
class Completion:
    """A prompt and its answer."""

    prompt: Turns
    completion: Turns


@dataclass(frozen=True)
class Preference:
    """A prompt, the better answer and the worse one."""

    prompt: Turns
    chosen: Turns
    rejected: Turns


@dataclass(frozen=True)
class Graded:
    """A preference and how clear it is, a number from 0."""

    prompt: Turns
    chosen: Turns
    rejected: Turns
    margin: float


@dataclass(frozen=True)
class Labelled:
    """A text and its class."""

    text: str
    label: str | int


@dataclass(frozen=True)
class LabelledPair:
    """Two texts and the class of the pair."""

    text: str
    text_pair: str
    label: str | int


@dataclass(frozen=True)
class Choices:
    """A text, several that may follow it, and the number of the right one, from 0."""

    context: str
    choices: list[str]
    label: int


@dataclass(frozen=True)
class Spans:
    """A text, a question about it, and passages of it that answer: `text` and, in characters, `answer_start`."""

    context: str
    question: str
    answers: dict[str, Any]


@dataclass(frozen=True)
class Tagged:
    """Words and the tag of each."""

    tokens: list[str]
    tags: list[str | int]


Record = Text | Chat | Prompt | Completion | Preference | Graded | Labelled | LabelledPair | Choices | Spans | Tagged
Kind = type[Record]
KINDS: tuple[Kind, ...] = (Text, Chat, Completion, Preference)  # what language models are trained on


def read(path: Path | str, kinds: Sequence[Kind] = KINDS) -> Iterator[Record]:
    """The records of a file, one at a time; blank lines are passed over.

    Raises:
        InputError: names the file, the line, what was found there and what is accepted.
    """
    path = Path(path)
    for number, _, line in lines(path):
        yield parse(line, kinds, f"{path}: line {number}")


def made(
    path: Path | str,
    kinds: Sequence[Kind],
    make: Callable[[Any], Made],
    *,
    bad: list[str] | None = None,
    named: Mapping[str, str] | None = None,
) -> list[Made]:
    """What `make` makes of each record of a file. Its `InputError`s get file and line put before them.

    Args:
        path: the file.
        kinds: the kinds of records accepted.
        make: called with each record.
        bad: where it is given, errors of lines are added to it, and the lines left out.
        named: fields that the file calls otherwise, by what it calls them.

    Raises:
        InputError: as of `read`, or what `make` raised.
    """
    path, found = Path(path), []
    for number, _, line in lines(path):
        where = f"{path}: line {number}"
        try:
            with about(where):
                found.append(make(parse(line, kinds, where, named)))
        except InputError as error:
            if bad is None:
                raise
            bad.append(str(error))
    return found


class Lines(Sequence[Record]):
    """The records of a file by number. One pass finds where lines begin; a record is read when it is asked for."""

    def __init__(self, path: Path | str, kinds: Sequence[Kind] = KINDS) -> None:
        self.path, self.kinds = Path(path), kinds
        self.offsets, self.numbers = array("q"), array("q")
        for number, offset, _ in lines(self.path):
            self.numbers.append(number)
            self.offsets.append(offset)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        with _opened(self.path) as file:
            file.seek(self.offsets[index])
            return parse(file.readline(LONGEST + 1), self.kinds, f"{self.path}: line {self.numbers[index]}")


def parse(line: bytes, kinds: Sequence[Kind], where: str, named: Mapping[str, str] | None = None) -> Record:
    """The record in one line; `where` opens the message of an error, `named` is as of `made`.

    >>> parse(b'{"prompt": "2+2=", "completion": "4", "id": 7}', KINDS, "here")
    Completion(prompt='2+2=', completion='4')
    >>> parse(b'{"promt": "2+2="}', [Completion], "data.jsonl: line 1")
    Traceback (most recent call last):
    allyouneed.core.errors.InputError: data.jsonl: line 1: keys 'promt'; accepted: prompt + completion
    """
    theirs = {field: key for key, field in (named or {}).items()}
    found = parse_object(line, where)
    for kind in sorted(kinds, key=lambda kind: -len(fields(kind))):  # prompt + chosen + rejected before prompt + …
        keys = {field.name: theirs.get(field.name, field.name) for field in fields(kind)}
        if all(key in found for key in keys.values()):
            for name, key in keys.items():
                _check(name, found[key], where, key)
            return kind(**{name: found[key] for name, key in keys.items()})
    accepted = ", or ".join(" + ".join(theirs.get(f.name, f.name) for f in fields(kind)) for kind in kinds)
    raise InputError(f"{where}: keys {shown(found)}; accepted: {accepted}")


def parse_object(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object in one line; `where` opens the message of an error.

    Raises:
        InputError: too long, not UTF-8, not JSON, a key twice, or no object.
    """
    if len(line) > LONGEST:
        raise InputError(f"{where}: longer than {LONGEST} bytes")
    text = _decoded(line, where)
    try:
        found = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error.msg} at character {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON that can be read: {str(error)[:100]}") from None
    if not isinstance(found, dict):
        raise InputError(f"{where}: of type {type(found).__name__}; accepted: an object")
    return found


def shown(keys: Iterable[str]) -> str:
    """Keys as a message names them, the first few.

    >>> shown({"a": 1, "b": 2})
    "'a', 'b'"
    """
    return ", ".join(repr(key[:40]) for key in list(keys)[:8]) or "none"


def texts(path: Path | str, *, whole: bool = False) -> Iterator[str]:
    """The documents of a plain text file: what stands between blank lines, or the `whole` file as one.

    Raises:
        InputError: missing, or a line that is not UTF-8.
    """
    path = Path(path)
    gathered: list[str] = []
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            text = _decoded(line, f"{path}: line {number}").replace("\r\n", "\n")
            if text.strip() or whole:
                gathered.append(text)
            elif gathered:
                yield "".join(gathered)
                gathered = []
    if gathered:
        yield "".join(gathered)


def lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset in bytes and text of each line that is not blank; of one that `parse_object` will refuse for its
    length, only as much as shows it.
    """
    number = offset = 0
    with _opened(path) as file:
        while line := file.readline(LONGEST + 1):
            number += 1
            if len(line) > LONGEST or line.strip():
                yield number, offset, line
            offset += len(line)
            while len(line) > LONGEST and not line.endswith(b"\n"):
                line = file.readline(LONGEST + 1)
                offset += len(line)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig")  # a byte order mark opens files from Windows
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {error.start + 1} is not UTF-8 text") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"key {name[:40]!r} twice")
        found[name] = value
    return found


def _check(name: str, value: Any, where: str, key: str) -> None:
    """Refuse a value that a field of this name, which the file calls `key`, cannot have."""
    strings = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    if name in _PLAIN:
        accepted, fits = _PLAIN[name]
        if not fits(value):
            raise _not_accepted(key, value, accepted, where)
        for text in strings:
            if isinstance(text, str):
                _check_text(key, text, where)
        return
    if isinstance(value, str) and name != "messages":
        _check_text(key, value, where)
        return
    if not isinstance(value, list) or not value:
        accepted = "a list of messages" if name == "messages" else "a string or a list of messages"
        raise _not_accepted(key, value, accepted, where)
    for number, message in enumerate(value):
        _check_message(f"{key}[{number}]", message, where)


def _not_accepted(name: str, value: Any, accepted: str, where: str) -> InputError:
    found = "an empty list" if value == [] else f"of type {type(value).__name__}"
    return InputError(f"{where}: field {name!r} is {found}; accepted: {accepted}")


def _is_label(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(of, value))


def _is_margin(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _are_answers(value: Any) -> bool:
    """SQuAD's: as many texts as places."""
    if not isinstance(value, dict):
        return False
    texts, places = value.get("text"), value.get("answer_start")
    whole = _is_list(texts, _is_string) and _is_list(places, lambda place: type(place) is int)
    return whole and len(value["text"]) == len(value["answer_start"])


# what fields of a plain form are, and whether a value is that; all other fields are text or a conversation
_PLAIN: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("a string", _is_string),
    "text_pair": ("a string", _is_string),
    "context": ("a string", _is_string),
    "question": ("a string", _is_string),
    "label": ("a string or a whole number", _is_label),
    "margin": ("a number from 0", _is_margin),
    "choices": ("a list of strings", lambda value: _is_list(value, _is_string)),
    "tokens": ("a list of strings", lambda value: _is_list(value, _is_string)),
    "tags": ("a list of strings or whole numbers", lambda value: _is_list(value, _is_label)),
    "answers": ('{"text": ["…"], "answer_start": [0]}, lists of one length', _are_answers),
}


def _check_message(name: str, message: Any, where: str) -> None:
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        found = shown(message) if isinstance(message, dict) else f"type {type(message).__name__}"
        raise InputError(f"{where}: {name} has {found}; accepted: an object of role and content")
    if message["role"] not in ROLES:
        raise InputError(f"{where}: {name}.role is {str(message['role'])[:40]!r}; accepted: {', '.join(ROLES)}")
    if not isinstance(message["content"], str):
        raise InputError(f"{where}: {name}.content is of type {type(message['content']).__name__}; accepted: a string")
    _check_text(f"{name}.content", message["content"], where)


def _check_text(name: str, text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: field {name!r}: half a surrogate pair at character {error.start + 1}") from None
