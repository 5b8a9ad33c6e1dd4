"""What a language model is fine-tuned on: texts, answers to prompts, and the assistant's part of conversations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

from allyouneed.core.errors import InputError
from allyouneed.data import chat, jsonl
from allyouneed.data.packing import IGNORED, Piece, document
from allyouneed.data.pairs import Pair
from allyouneed.data.tokenizers import Tokenizer

KINDS: tuple[jsonl.Kind, ...] = (jsonl.Text, jsonl.Completion, jsonl.Chat)


def piece(tokenizer: Tokenizer, record: jsonl.Record) -> Piece:
    """A record as tokens and what is to be predicted of them: all of a text, the completion of a prompt, what the
    assistant says in a conversation. Texts and completions get the end token, conversations their template's.

    Raises:
        InputError: an empty text, no chat template for messages, or no message of the assistant's.
    """
    if isinstance(record, jsonl.Text):
        return _marked(tokenizer, record.text, 0, "text")
    if isinstance(record, jsonl.Chat):
        return conversation(tokenizer, record.messages)
    assert isinstance(record, jsonl.Completion), f"no text to learn in {type(record).__name__}"
    if isinstance(record.prompt, str) and isinstance(record.completion, str):
        return _marked(tokenizer, record.prompt + record.completion, len(record.prompt), "completion")
    prompt, completion = _turns("user", record.prompt), _turns("assistant", record.completion)
    return conversation(tokenizer, [*prompt, *completion], after=len(prompt))


def pair(tokenizer: Tokenizer, record: jsonl.Record) -> Pair:
    """A prompt and its completion for a model that reads one and writes the other, each with its end token.

    Raises:
        InputError: an empty text, or messages.
    """
    assert isinstance(record, jsonl.Completion), f"no source and target in {type(record).__name__}"
    if not isinstance(record.prompt, str) or not isinstance(record.completion, str):
        raise InputError("prompt and completion: messages; a model of two stacks takes two strings")
    source, target = (
        [*_encoded(tokenizer, name, text), *tokenizer.eos_ids[:1]]
        for name, text in (("prompt", record.prompt), ("completion", record.completion))
    )
    return source, target


def conversation(tokenizer: Tokenizer, messages: Sequence[jsonl.Message], after: int = 0) -> Piece:
    """A conversation as its template writes it; only the assistant's messages are predicted, their end included, and of
    these only what comes `after` so many messages.

    Raises:
        InputError: no chat template, one that does not tell who speaks or writes an earlier message anew for a later
            one, or nothing to learn.
    """
    template = tokenizer.chat_template
    if template is None:
        raise InputError("messages, but the tokenizer has no chat template; give prompt + completion, or text")
    if not _tells_who_speaks(template):
        raise InputError("the chat template does not mark what the assistant says; choose another, or give strings")

    def written(upto: int, *, prompt: bool = False) -> str:
        return chat.render(
            template,
            chat.plain(messages[:upto]),
            add_generation_prompt=prompt,
            bos_token=tokenizer.bos_token or "",
            eos_token=tokenizer.eos_token or "",
        )

    learned: list[tuple[int, int]] = []
    before = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, told = written(i, prompt=True), written(i + 1)
        if not (asked.startswith(before) and told.startswith(asked)):
            raise InputError("the chat template writes earlier messages anew; what the assistant says cannot be told")
        if i >= after:
            learned.append((len(asked), len(told)))
        before = told
    if not learned:
        raise InputError("messages: none of the assistant's; there is nothing to learn")
    return document(*_read(tokenizer, before, learned))


def shown(tokenizer: Tokenizer, piece: Piece) -> str:
    """A piece as text, what is to be predicted between ⟦ and ⟧.

    >>> from allyouneed.data.tokenizers import byte_tokenizer
    >>> shown(byte_tokenizer(), piece(byte_tokenizer(), jsonl.Completion("2+2=", "4")))
    '2+2=⟦4<|endoftext|>⟧'
    """
    marks = [False, *(target != IGNORED for target in piece.targets[:-1])]
    text = ""
    for learned, run in groupby(zip(marks, piece.ids, strict=True), key=lambda one: one[0]):
        said = tokenizer.decode([token for _, token in run], skip_special_tokens=False)
        text += f"⟦{said}⟧" if learned else said
    return text


@lru_cache(maxsize=16)
def _tells_who_speaks(template: str) -> bool:
    """Whether a message reads otherwise from the assistant than from the user."""
    try:
        first, second = (
            chat.render(template, [{"role": "user", "content": "A"}, {"role": role, "content": "B"}])
            for role in ("assistant", "user")
        )
    except InputError:
        return True  # a template that refuses such turns looks at roles
    return first != second


def _marked(tokenizer: Tokenizer, text: str, after: int, name: str) -> Piece:
    """A text with what the vocabulary puts around it and its end; what comes `after` so many characters is learned."""
    if not text[after:].strip():
        raise InputError(f"{name} is empty; a text is needed")
    ids, marks = _read(tokenizer, text, [(after, len(text))])
    front, back = tokenizer.frame
    end = () if back and back[-1] in tokenizer.eos_ids[:1] else tokenizer.eos_ids[:1]
    behind = [*back, *end]
    return document([*front, *ids, *behind], [False] * len(front) + marks + [True] * len(behind))


def _read(tokenizer: Tokenizer, text: str, learned: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """The ids of a text, and which of them stand for the characters that are learned.

    A model that is asked reads the text before its answer alone. Where that gives other tokens than the whole text does
    (of "Answer: " and "yes" one token would take the space and the word), what is before and what comes after are read
    apart: what is learned is what can be answered then, and nothing is lost. Vocabularies that write another text so (a
    space before each part) keep tokens that reach over the border, and these are learned.
    """
    ids, places = tokenizer.places(text)
    asked = {start: tokenizer.encode(text[:start]) for start, _ in learned if start}
    cuts = [start for start, before in asked.items() if ids[: len(before)] != before]
    if cuts:
        borders = [*zip([0, *cuts], [*cuts, len(text)], strict=True)]
        parts = [(start, *tokenizer.places(text[start:end])) for start, end in borders]
        apart = [token for _, tokens, _ in parts for token in tokens]
        if tokenizer.decode(apart, skip_special_tokens=False) == tokenizer.decode(ids, skip_special_tokens=False):
            ids, places = apart, [(a + start, b + start) for start, _, found in parts for a, b in found]
    return ids, [any(start < max(last, first + 1) and first < end for start, end in learned) for first, last in places]


def _turns(role: str, given: jsonl.Turns) -> list[jsonl.Message]:
    return [{"role": role, "content": given}] if isinstance(given, str) else given


def _encoded(tokenizer: Tokenizer, name: str, text: str) -> list[int]:
    ids = tokenizer.encode(text)
    if not text.strip() or not ids:
        raise InputError(f"{name} is empty; a text is needed")
    return ids
