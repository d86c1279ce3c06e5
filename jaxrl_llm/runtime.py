"""Set-up of a program (not of a library): the compilation cache, and a terminal without others' warnings."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from pathlib import Path


def cache() -> Path:
    """Return the user's folder for files that can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxrl_llm"


def set_up() -> None:
    """Set defaults of environment variables that the user has not set; call before jax is imported."""
    defaults = {
        "JAX_COMPILATION_CACHE_DIR": str(cache() / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "TF_CPP_MIN_LOG_LEVEL": "2",  # XLA's notes about the CPU
        "TOKENIZERS_PARALLELISM": "false",  # tokenizers' warning after a fork
        "TRANSFORMERS_VERBOSITY": "error",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    quiet_transformers()


# Parameters of glibc's mallopt, and variables of users who tune it themselves (mallopt(3), ld.so(8)).
MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}  # -1: never
TUNED = re.compile(r"MALLOC_|(GLIBC_TUNABLES|LD_PRELOAD)$")


def keep_memory() -> None:
    """Keep memory that is freed for the next arrays, in a program that trains; call before jax is imported.

    A step on a CPU takes and frees gigabytes. If they go back to Linux, each of their pages of 4 KiB costs a fault in
    the next step: together a fifth of its time. This is for glibc; with another C library, or where the user has set
    MALLOC_..., GLIBC_TUNABLES or LD_PRELOAD, nothing is done.
    """
    libc = _glibc()
    if libc is not None and not any(map(TUNED.match, os.environ)):
        for parameter, value in MALLOPT.values():
            libc.mallopt(parameter, value)


def return_memory() -> None:
    """Return to Linux all that is free, such as what loading a model took: kept in pieces it would raise the peak."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def quiet_transformers() -> None:
    """Silence transformers' notice that PyTorch is missing; call before transformers is imported."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def is_file() -> bool:
    """Return True if progress bars would go to a file or a pipe, not to a terminal or a notebook."""
    return "ipykernel" not in sys.modules and not sys.stderr.isatty()


def available_memory() -> int | None:
    """Return the bytes that new arrays can take: on the first device, or of this machine; None where it is unknown."""
    import jax

    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    if jax.default_backend() != "cpu" or not (meminfo := Path("/proc/meminfo")).is_file():
        return None
    found = re.search(r"^MemAvailable: *(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    left = [1024 * int(found[1])] if found else []
    group = Path("/sys/fs/cgroup")  # of a container
    if (group / "memory.max").is_file() and (most := (group / "memory.max").read_text().strip()).isdigit():
        cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        left.append(int(most) - int((group / "memory.current").read_text()) + (int(cached[1]) if cached else 0))
    return min(left, default=None)
