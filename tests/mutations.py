"""Damaged files for tests: seeded mutations of good ones, and what every loader owes on each of them."""

from __future__ import annotations

import json
import random
import resource
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conftest import within

from allyouneed.core.errors import InputError

SECONDS = 2.0  # of processor time
SLACK = 200 << 20  # bytes of memory beyond twice the file

_LENGTHS = (0, 1, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**64, 10**400, -0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "\x00", "\n", "\ud800", "a" * 5000, "(a|a)*b", "../../etc/passwd", [], {}, [[]], [None], {"": None}),
    *([0] * 1000, [[[[[[[[[[]]]]]]]]]], {"type": "Sequence"}, {"a": 0, "b": 0}),
)


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`count` damaged copies of `data`, the same for the same seed. JSON is damaged by value as well as by byte."""
    randomness = random.Random(seed)
    kinds: list[Callable[[bytes, random.Random], bytes]] = [_flip, _cut, _extend, _lengthen, _splice, _remove]
    if _parsed(data) is not None:
        kinds += [_revalue, _revalue, _revalue, _rename]
    for i in range(count):
        yield kinds[i % len(kinds)](data, randomness)


def survives(load: Callable[[Path], Any], path: Path, data: bytes, named: str | None = None) -> bool:
    """Write `data` to `path`, load it, and hold the loader to its duty; whether it loaded.

    It loads, or raises an `InputError` of one line that names the file (or `named`); within 2 s and without more
    memory than twice the file and 200 MB.
    """
    path.write_bytes(data)
    with bounded(len(data)):
        try:
            load(path)
        except InputError as error:
            message = str(error)
            assert "\n" not in message and len(message) < 2000, f"not one line: {message[:200]!r}"
            assert (named or path.name) in message, f"does not name {named or path.name}: {message[:200]!r}"
            return False
    return True


@contextmanager
def bounded(size: int) -> Iterator[None]:
    """What is done inside takes at most 2 s and no more memory than twice `size` bytes and 200 MB."""
    memory = _memory(fresh=True)
    with within(SECONDS):
        yield
    grown = _memory() - memory
    assert grown <= 2 * size + SLACK, f"took {grown >> 20} MiB for a file of {size} bytes"


def _flip(data: bytes, randomness: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(randomness.choice((1, 1, 2, 8, 64))):
        found[_place(data, randomness)] ^= 1 << randomness.randrange(8)
    return bytes(found)


def _cut(data: bytes, randomness: random.Random) -> bytes:
    return data[: _place(data, randomness)]


def _extend(data: bytes, randomness: random.Random) -> bytes:
    return data + randomness.randbytes(randomness.choice((1, 7, 64, 4096)))


def _lengthen(data: bytes, randomness: random.Random) -> bytes:
    """Something that may have been a count, a length or an offset becomes another."""
    form = randomness.choice(("<Q", "<I", "<H"))
    size, place = struct.calcsize(form), _place(data, randomness)
    value = randomness.choice(_LENGTHS) & (256**size - 1)
    return data[:place] + struct.pack(form, value) + data[place + size :]


def _splice(data: bytes, randomness: random.Random) -> bytes:
    """A piece of the file stands once more, over or between what was there."""
    start, place = _place(data, randomness), _place(data, randomness)
    piece = data[start : start + randomness.randrange(1, 256)]
    return data[:place] + piece + data[place + randomness.choice((0, len(piece))) :]


def _remove(data: bytes, randomness: random.Random) -> bytes:
    place = _place(data, randomness)
    return data[:place] + data[place + randomness.randrange(1, 64) :]


def _place(data: bytes, randomness: random.Random) -> int:
    """A byte of the file, more often near the beginning, where headers are."""
    return min(randomness.randrange(len(data)), randomness.choice((len(data), 64, 1024, len(data))) - 1)


def _revalue(data: bytes, randomness: random.Random) -> bytes:
    """One value of the JSON becomes another of any kind."""
    document = _parsed(data)
    holder, key = _pick(document, randomness)
    holder[key] = randomness.choice(_VALUES)
    return json.dumps(document).encode()


def _rename(data: bytes, randomness: random.Random) -> bytes:
    """One entry of the JSON is lost, or gets another name."""
    document = _parsed(data)
    holder, key = _pick(document, randomness)
    value = holder.pop(key)
    if isinstance(holder, dict) and randomness.random() < 0.5:
        holder[f"{key}_"] = value
    return json.dumps(document).encode()


def _pick(document: Any, randomness: random.Random) -> tuple[Any, Any]:
    """A holder and a key in it, by a walk from the top, so that what is nested deep is hit as often as what is not."""
    holder, key = None, None
    inner = document
    while isinstance(inner, dict | list) and inner and (holder is None or randomness.random() < 0.75):
        holder = inner
        key = randomness.choice(list(holder)) if isinstance(holder, dict) else randomness.randrange(len(holder))
        inner = holder[key]
    return holder, key


def _parsed(data: bytes) -> Any:
    """The JSON object or list in `data`, None where it is something else or empty."""
    try:
        return json.loads(data) or None if data[:1] in (b"{", b"[") else None
    except ValueError:
        return None


def _memory(fresh: bool = False) -> int:
    """The most memory the process had since the last `fresh` call, in bytes; elsewhere than on Linux, ever had."""
    if sys.platform == "linux":
        if fresh:
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew from what is held now
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
