"""`allyouneed chat` in a real pseudo-terminal, as a person uses it."""

from __future__ import annotations

import codecs
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import allyouneed as ayn
from allyouneed.data import jsonl
from allyouneed.data.tokenizers import byte_tokenizer
from allyouneed.models import llama

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
CTRL_C, CTRL_D = "\x03", "\x04"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose greedy answers do not end by themselves."""
    torch.manual_seed(0)
    module = llama.architecture(vocab_size=257, context=20_000, dim=16, num_layers=1, num_heads=2, tied=False).build()
    with torch.no_grad():
        module.embedding.weight[:, 0] = 8.0  # so that one direction is in all that the head sees
        module.head.weight[:, 0] = 0.0
        module.head.weight[byte_tokenizer().encode("a")[0], 0] = 8.0
        module.head.weight[256, 0] = -8.0
    folder = tmp_path_factory.mktemp("models") / "tiny"
    ayn.save(module, folder)
    byte_tokenizer().save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


class Terminal:
    """A process behind a pseudo-terminal, and everything that it wrote."""

    def __init__(self, command: list[str], cwd: Path) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=cwd, start_new_session=True, preexec_fn=_own_terminal
        )
        os.close(slave)
        self.seen, self.read, self.decoder = "", 0, codecs.getincrementaldecoder("utf-8")()

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, pattern: str, seconds: float = 120.0) -> str:
        """What was written since the last call, up to and with what matches."""
        end = time.monotonic() + seconds
        while not (found := re.compile(pattern, re.S).search(self.seen, self.read)):
            assert time.monotonic() < end and self._more(end), f"no {pattern!r} in {self.seen[self.read :]!r}"
        text = self.seen[self.read : found.end()]
        self.read = found.end()
        return text

    def _more(self, end: float) -> bool:
        if select.select([self.master], [], [], max(0.0, end - time.monotonic()))[0]:
            try:
                self.seen += self.decoder.decode(os.read(self.master, 1 << 16))
            except OSError:  # the other end is closed
                return False
        return True

    def close(self) -> int:
        code = self.process.wait(20)
        os.close(self.master)
        return code


def _own_terminal() -> None:
    """Make standard input the controlling terminal, so that Ctrl-C reaches the process."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(folder: Path, tmp_path: Path) -> Iterator[Terminal]:
    command = [sys.executable, "-m", "allyouneed", "chat", str(folder), "--temperature", "0", "--system", "Be brief."]
    terminal = Terminal([*command, "--repetition-penalty", "1", "--max-new-tokens", "15000"], tmp_path)
    yield terminal
    if terminal.process.poll() is None:
        terminal.process.kill()
        terminal.process.wait()


def test_a_conversation(terminal: Terminal, tmp_path: Path) -> None:
    terminal.until("> ")
    terminal.send("hello\r")
    terminal.until("a{20}")  # it comes piece by piece
    terminal.send(CTRL_C)
    said = terminal.until(r" …\r?\n.*?> ")
    tokens = int(re.search(r"\[(\d+) tokens, [\d.]+ tokens/s, the first after [\d.]+ s\]", said)[1])
    assert 20 <= tokens < 15000, "the answer was stopped, not the program"
    terminal.send('"""\r')
    time.sleep(0.2)  # as typed, not pasted
    terminal.send("two\r")
    time.sleep(0.2)
    terminal.send('lines"""\r')
    terminal.until("a{20}")
    terminal.send(CTRL_C)
    terminal.until(r" …\r?\n.*?> ")
    terminal.send("pasted\rat once\r")
    terminal.until("a{20}")
    terminal.send(CTRL_C)
    terminal.until(r" …\r?\n.*?> ")
    terminal.send("/save talk.jsonl\r")
    terminal.until(r"7 messages added to talk\.jsonl.*?> ")
    terminal.send("/reset\r")
    terminal.until("forgotten.*?> ")
    terminal.send("half a thou")
    terminal.send(CTRL_C)
    terminal.until(r"Ctrl-D ends.*?> ")
    terminal.send("/save talk.jsonl\r")
    terminal.until(r"1 messages added.*?> ")
    terminal.send("/save\r")
    terminal.until(r"error: /save: name a file.*?> ")
    terminal.send(CTRL_D)
    assert terminal.close() == 0
    first, second = (json.loads(line) for line in (tmp_path / "talk.jsonl").read_text().splitlines())
    assert [m["content"] for m in first["messages"] if m["role"] == "user"] == [
        "hello",
        "two\nlines",
        "pasted\nat once",
    ]
    assert [m["role"] for m in first["messages"]] == ["system", *["user", "assistant"] * 3]
    assert set(first["messages"][2]["content"]) == {"a"}
    assert second["messages"] == [{"role": "system", "content": "Be brief."}]
    assert type(next(jsonl.read(tmp_path / "talk.jsonl"))).__name__ == "Chat"


def test_from_a_pipe_nothing_but_the_answer_is_written(folder: Path) -> None:
    command = [sys.executable, "-m", "allyouneed", "chat", str(folder), "--temperature", "0", "--max-new-tokens", "5"]
    done = subprocess.run(command, input="hello\n", capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == "aaaaa\n"
