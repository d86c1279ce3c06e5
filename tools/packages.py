"""Fetch one pinned package with the registry's ordinary client and unpack it, without installing it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"`{command[0]}` is needed to run `{' '.join(command)}`, but it is not installed.")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"`{' '.join(command)}` failed with status {done.returncode}:\n{done.stderr.strip()}")


def _only_file(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def fetch_pypi_sdist(name: str, version: str, into: Path) -> Path:
    """Unpack the source distribution `name==version` of PyPI into the folder `into`; return `into`."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        _run([*command, f"{name}=={version}"], Path(scratch))
        with tarfile.open(_only_file(Path(scratch), "*.tar.gz")) as archive:
            archive.extractall(into, filter="data")
    return into


def fetch_npm(name: str, version: str, into: Path) -> Path:
    """Unpack the npm package `name@version` into the folder `into`; return `into`."""
    with tempfile.TemporaryDirectory() as scratch:
        _run(["npm", "pack", f"{name}@{version}"], Path(scratch))
        with tarfile.open(_only_file(Path(scratch), "*.tgz")) as archive:
            archive.extractall(into, filter="data")
    return into


def fetch_debian(name: str, into: Path) -> Path:
    """Unpack the Debian package `name` (the version its release ships) into the folder `into`; return `into`."""
    with tempfile.TemporaryDirectory() as scratch:
        _run(["apt-get", "download", "-q", name], Path(scratch))
        into.mkdir(parents=True, exist_ok=True)
        _run(["dpkg-deb", "--extract", str(_only_file(Path(scratch), "*.deb")), str(into.resolve())], Path(scratch))
    return into
