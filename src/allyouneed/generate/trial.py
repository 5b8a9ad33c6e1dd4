"""A grammar tried out in a process of its own, which may be ended: some take minutes or gigabytes to compile.

Run as `python -m allyouneed.generate.trial`: reads {"grammar", "alphabet"} as JSON, compiles the grammar over single
bytes, takes a few walks through it and writes what is wrong with it, nothing where it will do. Imports llguidance only.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator

SECONDS = 1  # of arithmetic that compiling and walking may take
PATIENCE = 15.0  # seconds by the clock, for machines that are busy
MEMORY = 1 << 30  # bytes
MOST_SHOWN = 300  # characters of a message
WALKS, LENGTH = 3, 64  # bytes of each


def refusal(grammar: str, alphabet: bytes) -> str | None:
    """Why a grammar (llguidance's notation) cannot be used, in one line; None: it can.

    `alphabet` are the bytes that the vocabulary can write.
    """
    asked = json.dumps({"grammar": grammar, "alphabet": list(alphabet)}).encode()
    command = [sys.executable, "-m", "allyouneed.generate.trial"]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return "takes too long to compile"
    if done.returncode:  # out of time, out of memory, or the stack overflowed
        return "too complex: compiling it takes too much time or memory"
    return " ".join(done.stdout.decode(errors="replace").replace("<non-verbose/>", "").split())[:MOST_SHOWN] or None


class Bytes:
    """A vocabulary of some bytes and an end, in the form that llguidance wants."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, alphabet: bytes) -> None:
        self.tokens = [bytes([byte]) for byte in alphabet] + [b"<end>"]
        self.eos_token_id = len(alphabet)
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: str | bytes) -> list[int]:
        """The tokens of a text, as far as it can be written."""
        data = text.encode() if isinstance(text, str) else text
        return [self.tokens.index(bytes([byte])) for byte in data if bytes([byte]) in self.tokens]


def _faults(grammar: str, alphabet: bytes) -> Iterator[str]:
    """What goes wrong in compiling the grammar and in walks through it."""
    import llguidance

    vocabulary = llguidance.LLTokenizer(Bytes(alphabet))  # type: ignore[arg-type]
    limits = llguidance.LLParserLimits(verbose_errors=False)
    matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        yield matcher.get_error()
    for seed in range(WALKS):
        walk, source = matcher.deep_copy(), random.Random(seed)
        for _ in range(LENGTH):
            if walk.is_stopped():
                break
            mask = int.from_bytes(walk.compute_bitmask(), "little")
            allowed = [token for token in range(len(alphabet) + 1) if mask >> token & 1]
            if not allowed:
                break
            walk.consume_token(source.choice(allowed))
        if walk.is_error():
            yield walk.get_error()
        elif not allowed:
            yield "no text fits that this vocabulary can write"


def _bounded() -> None:
    """Let the system end this process where it takes too much."""
    try:
        import resource
    except ImportError:  # Windows: the clock alone must do
        return
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    _bounded()
    request = json.loads(sys.stdin.buffer.read())
    sys.stdout.write(next(_faults(request["grammar"], bytes(request["alphabet"])), ""))
