"""The C++ kernels: built once on the machine that runs them, kept in the user's cache folder; without a compiler those
that the wheel brought along (`building`).

The sources ask nothing of torch's headers, so g++ (11 or later) or clang++ builds them in a few seconds. Their OpenMP
runtime is the one torch has already loaded (same SONAME), hence the same threads. What the kernels compute is in
`packed.cpp` (packed weights), `quantised.cpp` (weights in blocks of codes), `program.cpp` (whole passes of decoders)
and `wkv.cpp` (RWKV's weighted sums).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import threading
import warnings
from pathlib import Path

import torch  # noqa: F401  # its OpenMP runtime must be in the process before ours is looked for

from allyouneed.core.files import replacing
from allyouneed.nn.native.building import ALWAYS, HEADERS, SOURCES, THREADED, compile_kernels, compiler, shipped

FLAGS = ("-O3", "-march=native")

_LOADING = threading.Lock()  # two threads would write the same temporary file


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, built if need be; None where `ALLYOUNEED_NATIVE=0` or, with a warning, where they cannot be built.

    What they take is said in their sources: addresses of contiguous memory, sizes, and how many threads to use. They
    check nothing.
    """
    if os.environ.get("ALLYOUNEED_NATIVE") == "0":
        return None
    try:
        with _LOADING:
            return declared(ctypes.CDLL(str(_found())))
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"no native kernels ({_reason(error)}): packed weights are unpacked to fp32 and kept, which takes 4 to 7 "
            "times their memory and makes a token several times slower, and RWKV trains and reads more slowly; install "
            "g++ or clang++, or name one in CXX",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _found() -> Path:
    """For just this processor where there is a compiler; else what the wheel brought for its generation."""
    try:
        return built()
    except (OSError, subprocess.SubprocessError):
        path = shipped()
        if path is None:
            raise
        return path


def built(flags: tuple[str, ...] = FLAGS) -> Path:
    """The path of the shared library for these sources, compiler, `flags` and processor; compiled where it is missing.

    Raises:
        OSError: no compiler, or a cache folder that is not ours to write.
        subprocess.SubprocessError: the compiler failed.
    """
    command = compiler()
    version = subprocess.run([*command, "--version"], capture_output=True, check=True, timeout=60).stdout
    options = repr((command, flags, ALWAYS, THREADED, _processor())).encode()
    digest = hashlib.sha256(
        b"".join(source.read_bytes() for source in SOURCES + HEADERS) + version + options
    ).hexdigest()
    target = folder() / f"{digest[:32]}.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.parent.chmod(0o700)  # only its owner may: code is loaded from here, never from a folder of somebody else's
    if not target.exists():
        with replacing(target) as temporary:
            compile_kernels(command, flags, temporary)
    return target


def declared(kernels: ctypes.CDLL) -> ctypes.CDLL:
    """`kernels` with the types of their arguments."""
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    kernels.packed_linear.argtypes = [number, address, address, address, size, size, size, number]
    kernels.packed_unpack.argtypes = [number, address, address, size, number]
    kernels.program_run.argtypes = [address, address]
    weight = [size] * 2 + [address] * 6
    kernels.quantised_unpack.argtypes = [*weight, address, size, number]
    kernels.quantised_linear.argtypes = [*weight, address, address, size, size, size, number]
    kernels.wkv_read.argtypes = [size] * 3 + [address] * 10 + [number]
    kernels.wkv_differentiate.argtypes = [size] * 3 + [address] * 12 + [number]
    packed, quantised = (
        (kernels.packed_linear, kernels.packed_unpack),
        (kernels.quantised_linear, kernels.quantised_unpack),
    )
    for kernel in (*packed, *quantised, kernels.wkv_read, kernels.wkv_differentiate, kernels.program_run):
        kernel.restype = None
    return kernels


def folder() -> Path:
    """Where built libraries are kept: `native` in `ALLYOUNEED_CACHE`, else in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ALLYOUNEED_CACHE") or Path(cache) / "allyouneed") / "native"


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        return platform.processor() + platform.machine()


def _reason(error: Exception) -> str:
    output = getattr(error, "stderr", None)
    return output.decode(errors="replace").strip().splitlines()[0] if output and output.strip() else str(error)
