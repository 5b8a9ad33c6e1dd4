"""`chat`: a conversation with a model in a terminal, or read from a pipe."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from allyouneed.commands.models import (
    MinP,
    Model,
    Penalty,
    Quantize,
    Seed,
    Temperature,
    Timeout,
    Tokens,
    TopK,
    TopP,
    write,
)
from allyouneed.core.errors import InputError, RemoteError

if TYPE_CHECKING:
    from allyouneed.generate.language_model import LanguageModel, Message, Sampling

FENCE = '"""'


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command("chat")(chat)


def chat(
    model: Model = "smollm2-135m-instruct",
    system: Annotated[str | None, typer.Option(help="A standing instruction.")] = None,
    max_new_tokens: Tokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.1,
    seed: Seed = None,
    quantize: Quantize = None,
    timeout: Timeout = None,
) -> None:
    """Talk with a model, which remembers the conversation. Ctrl-C stops an answer, Ctrl-D ends.

    A message is a line, what is pasted at once, or what stands between two lines of three quotation marks. /reset
    forgets what was said; /save FILE adds it to a file, as a row that finetune reads.
    """
    from allyouneed.generate.language_model import Sampling
    from allyouneed.generate.load import load

    lm = load(model, quantize=quantize, timeout=timeout)
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    converse(Talk(lm, sampling, [{"role": "system", "content": system}] if system else []))


class Talk:
    """What was said so far, and who answers."""

    def __init__(self, lm: LanguageModel, sampling: Sampling, opening: list[Message]) -> None:
        self.lm, self.sampling, self.opening = lm, sampling, opening
        self.history = list(opening)

    def hear(self, message: str) -> None:
        """Answer a message, or do what a line with a slash says."""
        name, _, rest = message.partition(" ")
        if message == "/reset":
            self.history = list(self.opening)
            _note("forgotten")
        elif name == "/save":
            self.save(rest.strip())
        else:
            self.answer(message)

    def answer(self, message: str) -> None:
        """The answer, written as it comes; Ctrl-C cuts it short and the conversation goes on."""
        asked: list[Message] = [*self.history, {"role": "user", "content": message}]
        pieces: list[str] = []
        started, first = time.monotonic(), 0.0

        def kept() -> Iterator[str]:
            nonlocal first
            for piece in self.lm.chat_stream(asked, self.sampling):
                first = first or time.monotonic() - started
                pieces.append(piece)
                yield piece

        try:
            write(kept())
        except KeyboardInterrupt:
            print(" …")
        except (InputError, RemoteError) as error:
            print(f"error: {error}", file=sys.stderr)
        if pieces:  # else it was refused or cut short at once: what was said is unsaid
            self.history = [*asked, {"role": "assistant", "content": "".join(pieces)}]
            _note(self.speed("".join(pieces), first, time.monotonic() - started))

    def speed(self, text: str, first: float, whole: float) -> str:
        """How fast an answer came: tokens by the model's own count where it has one, else characters."""
        from allyouneed.generate.language_model import CountsTokens

        lm = self.lm
        amount, unit = (
            (lm.count_tokens([text])[0], "tokens") if isinstance(lm, CountsTokens) else (len(text), "letters")
        )
        return f"{amount} {unit}, {amount / max(whole, 1e-9):.1f} {unit}/s, the first after {first:.2f} s"

    def save(self, name: str) -> None:
        """Add the conversation to a file as one row."""
        if not name or not self.history:
            mend = "name a file: /save talk.jsonl" if not name else "nothing was said yet"
            print(f"error: /save: {mend}", file=sys.stderr)
            return
        try:
            with Path(name).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.history}, ensure_ascii=False) + "\n")
            _note(f"{len(self.history)} messages added to {name}")
        except OSError as error:
            print(f"error: {name}: {error.strerror}", file=sys.stderr)


def converse(talk: Talk) -> None:
    """Pass on what a person types or pastes, until Ctrl-D; Ctrl-C drops what was being typed or done."""
    descriptor, terminal = sys.stdin.fileno(), sys.stdin.isatty()
    while True:
        try:
            if terminal:
                print("\n> ", end="", flush=True)
            message = _read_message(descriptor)
            if message is None:
                break
            if message.strip():
                talk.hear(message.strip())
        except KeyboardInterrupt:  # wherever it comes, not only while we wait for the keyboard
            if not terminal:
                raise
            print("\n(Ctrl-D ends)", end="")
    if terminal:
        print()


def _read_message(descriptor: int) -> str | None:
    """A paste, or what stands between two fences; None at the end of the input."""
    text = _read_paste(descriptor)
    if text is None or not text.lstrip().startswith(FENCE):
        return text
    while text.count(FENCE) < 2:
        more = _read_paste(descriptor)
        if more is None:
            break
        text += more
    return text.strip().removeprefix(FENCE).removesuffix(FENCE)


def _read_paste(descriptor: int, pause: float = 0.05) -> str | None:
    """One line, and those that arrive within a `pause` of it, as pasted ones do; None at the end of the input."""
    read = os.read(descriptor, 1 << 16)
    if not read:
        return None
    while select.select([descriptor], [], [], pause)[0]:
        more = os.read(descriptor, 1 << 16)
        if not more:
            break
        read += more
    return read.decode("utf-8", errors="replace")


def _note(text: str) -> None:
    """What is said beside the conversation, to a terminal only."""
    if sys.stderr.isatty():
        print(f"\x1b[2m[{text}]\x1b[0m", file=sys.stderr)
