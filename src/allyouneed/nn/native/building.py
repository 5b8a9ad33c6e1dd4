"""How the C++ kernels are compiled, and for which processors a wheel brings them along.

Asks for nothing but Python, so that `setup.py` can read this file before anything is installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = tuple(HERE / name for name in ("packed.cpp", "program.cpp", "quantised.cpp", "wkv.cpp"))
HEADERS = tuple(sorted(HERE.glob("*.h")))
# A multiplication and an addition are one rounding everywhere: tuned for Zen 2 and 3, GCC would part some, and a row's
# bits would depend on how many rows its tile has.
ALWAYS = ("-std=c++17", "-ffp-contract=fast", "--param=avoid-fma-max-bits=0", "-shared", "-fPIC")
THREADED = "-fopenmp"  # Apple's clang has none: without it the kernels run on one thread

# -march by kind of machine, best first, and what /proc/cpuinfo must list for it (the x86-64 psABI's levels)
_V2 = frozenset({"ssse3", "sse4_1", "sse4_2", "popcnt", "cx16"})
_V3 = _V2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
LEVELS = {
    "x86_64": {"x86-64-v4": _V4, "x86-64-v3": _V3, "x86-64-v2": _V2},
    "aarch64": {"armv8-a": frozenset[str]()},  # which has NEON
}


def compiler() -> list[str]:
    """The command of the C++ compiler: what CXX names, or the first that there is.

    Raises:
        OSError: there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    found = next((name for name in [*named[:1], "g++", "clang++", "c++"] if shutil.which(name)), None)
    if found is None:
        raise OSError("no C++ compiler")
    return named if named[:1] == [found] else [found]


def compile_kernels(command: list[str], flags: tuple[str, ...], target: Path) -> None:
    """Write the shared library.

    Raises:
        subprocess.SubprocessError: the compiler failed.
    """
    whole = [*command, *flags, *ALWAYS, *map(str, SOURCES), "-o", str(target)]
    try:
        subprocess.run([*whole, THREADED], capture_output=True, check=True, timeout=300)
    except subprocess.CalledProcessError:
        subprocess.run(whole, capture_output=True, check=True, timeout=300)


def ship(folder: Path) -> list[Path]:
    """Compile the kernels for every level of this kind of machine, to be put in a wheel; none where none is known."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [folder / f"{level}-{digest()}.so" for level in LEVELS.get(platform.machine(), {})]
    for path in made:
        level = path.name.removesuffix(f"-{digest()}.so")
        compile_kernels(compiler(), ("-O3", f"-march={level}"), path)
    return made


def shipped(folder: Path = HERE / "shipped", found: frozenset[str] | None = None) -> Path | None:
    """The best library that came with the wheel of these sources and that this processor can run.

    Args:
        folder: where they are.
        found: what the processor can do; None: ask it.
    """
    able = features() if found is None else found
    for level, needed in LEVELS.get(platform.machine(), {}).items():
        path = folder / f"{level}-{digest()}.so"
        if needed <= able and path.is_file():
            return path
    return None


def features() -> frozenset[str]:
    """What Linux says that the processor can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features"))), ()))


def digest() -> str:
    """Of the sources: a library of others is not loaded."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES + HEADERS)).hexdigest()[:16]
