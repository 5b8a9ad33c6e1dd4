"""What a language model is fine-tuned on: texts, answers to prompts, and the assistant's part of conversations."""

from __future__ import annotations

from collections.abc import Sequence

from allyouneed.core.errors import InputError
from allyouneed.data import chat, jsonl
from allyouneed.data.packing import Piece, answer, document
from allyouneed.data.pairs import Pair
from allyouneed.data.tokenizers import Tokenizer

KINDS: tuple[jsonl.Kind, ...] = (jsonl.Text, jsonl.Completion, jsonl.Chat)


def piece(tokenizer: Tokenizer, record: jsonl.Record) -> Piece:
    """A record as tokens and what is to be predicted of them: all of a text, the completion of a prompt, what the
    assistant says in a conversation. Texts and completions get the end token, conversations their template's.

    Raises:
        InputError: an empty text, no chat template for messages, or no message of the assistant's.
    """
    end = tokenizer.eos_ids[:1]
    if isinstance(record, jsonl.Text):
        return document([*_encoded(tokenizer, "text", record.text), *end])
    if isinstance(record, jsonl.Chat):
        return conversation(tokenizer, record.messages)
    assert isinstance(record, jsonl.Completion), f"no text to learn in {type(record).__name__}"
    if isinstance(record.prompt, str) and isinstance(record.completion, str):
        prompt = tokenizer.encode(record.prompt)
        return answer(prompt, [*_encoded(tokenizer, "completion", record.completion), *end])
    turns = [_turns("user", record.prompt), _turns("assistant", record.completion)]
    return conversation(tokenizer, [message for side in turns for message in side])


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


def conversation(tokenizer: Tokenizer, messages: Sequence[jsonl.Message]) -> Piece:
    """A conversation as its template writes it; only the assistant's messages are predicted, their end included.

    Raises:
        InputError: no chat template, one that writes an earlier message anew for a later one, or nothing to learn.
    """
    template = tokenizer.chat_template
    if template is None:
        raise InputError("messages, but the tokenizer has no chat template; give prompt + completion, or text")

    def written(upto: int, *, prompt: bool = False) -> str:
        return chat.render(
            template,
            messages[:upto],
            add_generation_prompt=prompt,
            bos_token=tokenizer.bos_token or "",
            eos_token=tokenizer.eos_token or "",
        )

    ids: list[int] = []
    marks: list[bool] = []
    before = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, told = written(i, prompt=True), written(i + 1)
        if not (asked.startswith(before) and told.startswith(asked)):
            raise InputError("the chat template writes earlier messages anew; what the assistant says cannot be told")
        for text, mark in ((asked[len(before) :], False), (told[len(asked) :], True)):
            new = tokenizer.encode(text)
            ids, marks = ids + new, marks + [mark] * len(new)
        before = told
    if not any(marks):
        raise InputError("messages: none of the assistant's; there is nothing to learn")
    return document(ids, marks)


def _turns(role: str, given: jsonl.Turns) -> list[jsonl.Message]:
    return [{"role": role, "content": given}] if isinstance(given, str) else given


def _encoded(tokenizer: Tokenizer, name: str, text: str) -> list[int]:
    ids = tokenizer.encode(text)
    if not text.strip() or not ids:
        raise InputError(f"{name} is empty; a text is needed")
    return ids
