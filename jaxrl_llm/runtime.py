"""Set-up of a program (not of a library): the compilation cache, and a terminal without others' warnings."""

from __future__ import annotations

import os
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


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def ask_for_huge_pages() -> None:
    """Start the program of this process again, once, with huge pages of memory, where Linux gives them to who asks.

    A training step takes and returns gigabytes, whose every page of 4 KiB costs a fault. glibc asks for pages of 2 MiB
    if its tunable says so when a process starts. Where the user has set GLIBC_TUNABLES, also to nothing, nothing is
    done, nor where Python runs another program, such as a test.
    """
    named = Path(sys.argv[0]).stem in ("jaxrl-llm", "__main__")
    own = named and sys.orig_argv[-len(sys.argv) :][1:] == sys.argv[1:]
    if own and "GLIBC_TUNABLES" not in os.environ and _gives_huge_pages():
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _gives_huge_pages() -> bool:
    """Return True on a Linux that gives huge pages to who asks, with a glibc that can: 2.35 or later."""
    try:
        _, version = os.confstr("CS_GNU_LIBC_VERSION").split()
        return "[madvise]" in HUGE_PAGES.read_text() and tuple(map(int, version.split("."))) >= (2, 35)
    except (AttributeError, OSError, ValueError):  # no Linux, no glibc
        return False


def quiet_transformers() -> None:
    """Silence transformers' notice that PyTorch is missing; call before transformers is imported."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def is_file() -> bool:
    """Return True if progress bars would go to a file or a pipe, not to a terminal or a notebook."""
    return "ipykernel" not in sys.modules and not sys.stderr.isatty()
