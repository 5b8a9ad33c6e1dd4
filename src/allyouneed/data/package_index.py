"""Pinned files out of archives of the Python package index, without installing or running anything of the package.

A client of the index's simple API in JSON (PEP 503, 691, 700), and an unpacker of wheels and source distributions that
takes only what was asked for. Which files, and where they go, `materials` knows.
"""

from __future__ import annotations

import configparser
import fnmatch
import hashlib
import json
import os
import re
import stat
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from allyouneed.core.errors import InputError
from allyouneed.core.progress import Progress

PYPI = "https://pypi.org/simple/"
JSON = "application/vnd.pypi.simple.v1+json"
MB = 10**6
LARGEST_LISTING = 16 * MB  # of one package's files; the largest on PyPI are a few MB


class Archive(NamedTuple):
    """A file of a package on the index, whose every byte is known beforehand."""

    package: str
    name: str
    bytes: int
    sha256: str


class Member(NamedTuple):
    """A file inside an archive; `regular` says that it is no link, folder or device."""

    name: str
    regular: bool
    open: Callable[[], IO[bytes] | None]


def index_url() -> str:
    """The package index that pip would ask: `PIP_INDEX_URL`, pip's configuration files, else PyPI."""
    url = os.environ.get("PIP_INDEX_URL")
    home, settings = Path.home(), os.environ.get("XDG_CONFIG_HOME")
    files = [
        Path(os.environ.get("PIP_CONFIG_FILE", os.devnull)),
        Path(sys.prefix) / "pip.conf",
        Path(settings or home / ".config") / "pip" / "pip.conf",
        home / ".pip" / "pip.conf",
        Path("/etc/pip.conf"),
    ]
    for file in files:
        url = url or _configured(file)
    return (url or PYPI).rstrip("/") + "/"


def _configured(file: Path) -> str | None:
    parser = configparser.RawConfigParser()
    try:
        parser.read(file, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):  # pip will say so; it is not ours to mend
        return None
    return parser.get("global", "index-url", fallback=None)


def download(archive: Archive, to: Path, *, index: str) -> None:
    """Download an archive from the `index` and see that it is the one that was meant.

    Raises:
        InputError: the index cannot be reached, does not have it, or sends something else.
    """
    import httpx

    try:
        with httpx.Client(follow_redirects=True, timeout=30.0) as client:
            _save(client, _find(client, archive, index), archive, to)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise InputError(_without_password(f"{index}: {reason}")) from None
    except InputError as error:
        raise InputError(_without_password(str(error))) from None


def digest(file: Path) -> str:
    """A file's SHA-256, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of_all(folder: Path, names: Iterable[str]) -> str:
    """One SHA-256 for several files: that of the lines `sha256sum` prints for them, sorted by name."""
    lines = [f"{digest(folder / name)}  {name}\n" for name in sorted(names)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def unpack(archive: Path, inside: str, pattern: str, to: Path, *, limit: int) -> list[str]:
    """Write the files of an archive that lie in the folder `inside` and match `pattern` into the folder `to`.

    A source distribution's own top folder does not count. Returns the files' names below `inside`.

    Raises:
        InputError: not such an archive, nothing matches, a member is a link or leads out of the folder, or all of them
            together are larger than `limit` bytes.
    """
    names: list[str] = []
    try:
        for member in _members(archive):
            below = _below(member.name, inside)
            if below is not None and fnmatch.fnmatchcase(below, pattern):
                limit -= _write(member, to / _safe(below, archive), archive, limit)
                names.append(below)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, NotImplementedError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{archive.name}: cannot be unpacked: {str(error).splitlines()[0]}") from None
    if not names:
        raise InputError(f"{archive.name}: has nothing that matches {inside}/{pattern}")
    return names


def _without_password(line: str) -> str:
    """An index of one's own may have its password in the address."""
    return re.sub(r"//[^/@\s]*@", "//", line)


def _find(client: Any, archive: Archive, index: str) -> Any:
    """The archive's address, from the index's list of the package's files."""
    listing = f"{index}{archive.package}/"
    with client.stream("GET", listing, headers={"Accept": JSON}) as response:
        if response.status_code != 200:
            raise InputError(f"{listing}: answers {response.status_code} {response.reason_phrase}")
        text = bytearray()
        for chunk in response.iter_bytes():
            text += chunk
            if len(text) > LARGEST_LISTING:
                raise InputError(f"{listing}: more than {LARGEST_LISTING} bytes")
        base = response.url
    try:
        files = {file["filename"]: file["url"] for file in json.loads(text)["files"]}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(f"{listing}: does not speak the simple API in JSON (PEP 691)") from None
    if not isinstance(files.get(archive.name), str):
        raise InputError(f"{listing}: has no {archive.name}")
    return base.join(files[archive.name])


def _save(client: Any, url: Any, archive: Archive, to: Path) -> None:
    total = -(-archive.bytes // MB)
    with (
        client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as response,
        to.open("wb") as file,
        Progress(f"download {archive.name}", total, unit="MB") as progress,
    ):
        if response.status_code != 200:
            raise InputError(f"{url}: answers {response.status_code} {response.reason_phrase}")
        for chunk in response.iter_bytes():
            file.write(chunk)
            if file.tell() > archive.bytes:
                raise InputError(f"{url}: longer than the {archive.bytes} bytes it should have")
            progress.update(file.tell() * total // archive.bytes - progress.done)
    check(to, archive, str(url))


def check(file: Path, archive: Archive, source: str) -> None:
    """Refuse a file that is not the archive, byte for byte."""
    size = file.stat().st_size
    if size != archive.bytes:
        raise InputError(f"{source}: {size} bytes of {archive.bytes}")
    found = digest(file)
    if found != archive.sha256:
        raise InputError(f"{source}: sha256 {found}, not {archive.sha256}")


def _members(archive: Path) -> Iterator[Member]:
    """What a wheel (zip) or a source distribution (tar.gz) holds."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)
                regular = not info.is_dir() and kind in (0, stat.S_IFREG)
                yield Member(info.filename, regular, lambda info=info: wheel.open(info))  # type: ignore[misc]
    else:
        with tarfile.open(archive, "r:gz") as source:
            for entry in source:
                name = entry.name.partition("/")[2]
                yield Member(name, entry.isreg(), lambda entry=entry: source.extractfile(entry))  # type: ignore[misc]


def _below(name: str, folder: str) -> str | None:
    """A member's name as seen from `folder`, None if it is not in there or a folder itself."""
    inside = name.startswith(folder + "/") and not name.endswith("/")
    return name[len(folder) + 1 :] if inside else None


def _safe(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise InputError(f"{archive.name}: member {name!r} leads out of its folder")
    return path


def _write(member: Member, to: Path, archive: Path, limit: int) -> int:
    stream = member.open() if member.regular else None
    if stream is None:
        raise InputError(f"{archive.name}: member {member.name!r} is not a plain file")
    to.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with stream, to.open("xb") as file:
        while chunk := stream.read(min(MB, limit - written + 1)):
            written += len(chunk)
            if written > limit:
                raise InputError(f"{archive.name}: member {member.name!r} is larger than it should be")
            file.write(chunk)
    return written
