"""The devices and processes of a command, by `--mesh` and the environment."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from typing import Any, NoReturn

REFUSED = re.compile(r"RESOURCE_EXHAUSTED: .*?allocat\w+ (\d+) bytes", re.DOTALL)  # by JAX, on any device


def mesh_of(layout: str | None) -> Any:
    """Return the mesh of `--mesh`, or None; join the processes that the environment names, of which the first prints.

    Without a mesh, say on standard error if devices are idle.

    Raises:
        ValueError: for a layout as `mesh.mesh_of`, or for several processes without one.
    """
    import jax

    from jaxrl_llm import mesh as meshes

    meshes.join()
    if jax.process_count() > 1:
        if layout is None:
            raise ValueError("several processes share one mesh: give --mesh, such as --mesh data=-1.")
        where = os.dup(1) if jax.process_index() == 0 else os.devnull
        sys.stdout = open(where, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115
        os.dup2(2, 1)  # for what communication libraries print
    if layout is not None:
        return meshes.mesh_of(layout)
    if sentence := meshes.idle():
        print(f"jaxrl-llm: {sentence}", file=sys.stderr)
    return None


def reason(error: Exception) -> Exception | str:
    """Return an error as it is printed: as a sentence if it comes of too little memory or another process's end."""
    if refused := REFUSED.search(str(error)):
        return (
            f"the device has not enough memory: {int(refused[1]) / 2**30:.1f} GiB more are needed at once. Fewer texts "
            "at a time, fewer beams or samples, or shorter texts need less."
        )
    meshes = sys.modules.get("jaxrl_llm.mesh")
    return meshes.ended() if meshes is not None and meshes.is_lost(error) else error


def leave(status: int) -> NoReturn:
    """End the program, as one of several processes at once: others would be waited for, which wait for this one."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status) from None


def is_first() -> bool:
    """Return True in the process that prints and writes files."""
    import jax

    return jax.process_index() == 0
