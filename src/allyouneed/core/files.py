"""Files written whole or not at all, and read with a limit."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from allyouneed.core.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write a file or a folder under; on success it is fsynced and renamed to `path`.

    On any error, a full disk included, the temporary is removed and what stood at `path` stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:  # a folder's names need it as much as its files' bytes
            sync(file)
        if path.is_dir() and temporary.is_dir():  # rename cannot replace a folder that holds something
            shutil.rmtree(path)
        temporary.replace(path)
        sync(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as readable JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def parse_json(text: str, **how: Any) -> Any:
    """`json.loads` without Python's collector, which finds no cycles in JSON but would look at everything in the
    process again and again while a hostile text makes millions of small objects.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        return json.loads(text, **how)
    finally:
        if collecting:
            gc.enable()


def read_json(path: Path, *, limit: int = 64 << 20) -> Any:
    """The JSON value in `path`.

    Raises:
        InputError: missing, not UTF-8, larger than `limit` bytes, not JSON, or nested too deeply.
    """
    text = read_text(path, limit=limit)
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno} is not JSON: {error.msg}") from None
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"{path}: {str(error).split(';')[0]}") from None
    except RecursionError:
        raise InputError(f"{path}: JSON nested too deeply") from None


def read_text(path: Path, *, limit: int = 64 << 20) -> str:
    """The UTF-8 text in `path`, at most `limit` bytes of it.

    Raises:
        InputError: missing, too large, or not UTF-8.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > limit:
            raise InputError(f"{path}: {size} bytes, more than the {limit} such a file may have")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def sync(path: Path) -> None:
    """Have what was written to a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
