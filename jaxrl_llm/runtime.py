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


def quiet_transformers() -> None:
    """Silence transformers' notice that PyTorch is missing; call before transformers is imported."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def is_file() -> bool:
    """Return True if progress bars would go to a file or a pipe, not to a terminal or a notebook."""
    return "ipykernel" not in sys.modules and not sys.stderr.isatty()
