"""Files of text that are read, and files that are written as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def read_text(path: str | os.PathLike) -> str:
    """Return the text of a file in UTF-8, without the byte order mark that some editors put before it.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)} must be text in UTF-8, but is not: {error.reason}.") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which then takes the place of `path`; if writing fails, nothing of it is left.

    A missing folder is made.

    Raises:
        OSError: naming the file, for example on a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None and error.strerror:
            raise OSError(f"{path} could not be written: {error.strerror}") from error
        raise
