"""Sharding over many devices: axes of parameters by rules on their names, through `jax.sharding`.

A mesh has three axes. Rows of a batch are split over "data" and "fsdp"; each matrix over "fsdp", where it is stored in
parts and gathered when it is used (Rajbhandari et al. 2020), and over "model", where each device computes its part of
a layer (Shoeybi et al. 2019). Shard the state and the batches, set the mesh, and call the same steps:

    with jax.set_mesh(mesh):
        state, metrics = step(shard_state(state, mesh), shard_batch(batch, mesh))

XLA inserts the communication.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int, PyTree

Tree = TypeVar("Tree", bound=PyTree)

AXES = ("data", "fsdp", "model")
ROWS = ("data", "fsdp")  # the axes that split the rows of a batch

OUTER = "c_attn|c_fc|q_proj|k_proj|v_proj|qkv_proj|gate_proj|up_proj|gate_up_proj"  # their outputs are split
# A parameter's path, such as h/0/attn/c_attn/kernel: the first rule that its end matches. Kernels are [in, out].
RULES: tuple[tuple[str, P], ...] = (
    (r"experts/(gate_proj|up_proj)/kernel", P(None, "fsdp", "model")),  # [expert, in, out]
    (r"experts/down_proj/kernel", P(None, "model", "fsdp")),
    (rf"({OUTER}|q|k|v|wi|wi_0|wi_1)/kernel", P("fsdp", "model")),
    (rf"({OUTER})/bias", P("model")),
    (r"(c_proj|o_proj|down_proj|o|wo)/kernel", P("model", "fsdp")),
    (r"(wte|embed_tokens|shared)/embedding", P("model", "fsdp")),  # by tokens, as the unembedding's columns
    (r"lm_head/kernel", P("fsdp", "model")),
    (r".*", P()),
)


def make_mesh(data: int = -1, fsdp: int = 1, model: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh of all devices, "data" × "fsdp" × "model".

    Args:
        data: copies of the model, each with its share of the rows; −1 for as many as the devices allow.
        fsdp: devices that share the weights of one copy, each with its share of the copy's rows.
        model: devices that share the computation of each layer.
        devices: by default those of all processes.

    Raises:
        ValueError: unless the product is the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(zip(AXES, (data, fsdp, model), strict=True))
    if [*sizes.values()].count(-1) > 1:
        raise ValueError("only one axis of the mesh must be -1, for as many as the devices allow, but several are.")
    known = math.prod(size for size in sizes.values() if size != -1)
    if [*sizes.values()].count(-1) == 1 and known > 0:
        sizes = {name: len(devices) // known if size == -1 else size for name, size in sizes.items()}
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != len(devices):
        found = " × ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"the sizes of the mesh must multiply to all devices, {len(devices)}, but are {found}.")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_of(layout: str) -> Mesh:
    """Return the mesh of a layout such as "data=4,fsdp=2"; axes that it does not name have one device.

    Raises:
        ValueError: for another form, or as `make_mesh`.
    """
    sizes: dict[str, int] = {}
    for part in layout.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES or name in sizes or not re.fullmatch(r"-1|[1-9]\d*", size):
            raise ValueError(
                f"mesh must be sizes of {', '.join(AXES)}, each once, such as data=4,fsdp=2 or data=-1, "
                f"but is {layout!r}."
            )
        sizes[name] = int(size)
    return make_mesh(**dict.fromkeys(AXES, 1) | sizes)


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Return the sharding of a parameter by its path. An axis that the devices do not divide stays whole."""
    for pattern, spec in RULES:
        if re.fullmatch(rf"(.*/)?{pattern}", path):
            spec = P() if len(spec) > len(shape) else spec
            fits = [
                name if name is None or size % mesh.shape[name] == 0 else None
                for name, size in zip(spec, shape, strict=False)
            ]
            return P(*fits)
    raise AssertionError("the last rule matches everything")


def sharding_on(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Return the sharding of a parameter by its path and shape, for `models.load(path, sharding=...)`."""
    return lambda path, shape: NamedSharding(mesh, spec_of(path, shape, mesh))


def sharding_of(mesh: str | Mesh | None) -> Callable[[str, tuple[int, ...]], NamedSharding] | None:
    """Return `sharding_on` a mesh or a layout of `mesh_of`; None without a mesh.

    Raises:
        TypeError: for anything else.
        ValueError: for a mesh of other axes, or as `mesh_of`.
    """
    if mesh is None:
        return None
    mesh = mesh_of(mesh) if isinstance(mesh, str) else mesh
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be sizes such as 'data=4,fsdp=2', or a jax Mesh, but is {mesh!r}.")
    if mesh.axis_names != AXES:
        raise ValueError(f"the mesh must have the axes {', '.join(AXES)}, but has {', '.join(mesh.axis_names)}.")
    return sharding_on(mesh)


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """Return the sharding of every leaf of parameters or of a training state, whose leaves may be abstract.

    Moments of an optimiser are sharded as their parameters; what no rule knows is replicated.
    """
    sharding = sharding_on(mesh)

    return jax.tree_util.tree_map_with_path(lambda path, leaf: sharding(_name(path), np.shape(leaf)), tree)


def _name(path: Any) -> str:
    return "/".join(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", "")))) for entry in path)


def shard_state(tree: Tree, mesh: Mesh) -> Tree:
    """Shard parameters or a whole training state by `shardings`."""
    return jax.tree.map(_put, tree, shardings(tree, mesh))


def shard_batch(batch: Tree, mesh: Mesh) -> Tree:
    """Shard the rows of every leaf over "data" and "fsdp". Of several processes each gives its own rows.

    Raises:
        ValueError: if the devices do not divide the rows.
    """
    parts = row_shards(mesh)
    sharding = NamedSharding(mesh, P(ROWS))

    def place(leaf: Any) -> jax.Array:
        rows = np.shape(leaf)[0] if np.ndim(leaf) else 0
        if rows == 0 or rows * jax.process_count() % parts:
            raise ValueError(
                f"{_devices(parts)} must divide the rows of a batch, but there are {rows * jax.process_count()}."
            )
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(place, batch)


def own_rows(count: int, mesh: Mesh) -> Int[np.ndarray, "own"]:
    """Return the rows of a batch of `count` that the devices of this process hold; all if they do not divide it.

    Several processes hold the same rows if they share the computation of a layer.
    """
    indices = NamedSharding(mesh, _over_rows(count, mesh)).addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[index] for index in indices]))


def place_rows(batch: Tree, count: int, mesh: Mesh) -> Tree:
    """Place a batch of `count` rows on the devices, split over "data" and "fsdp", or whole if they do not divide it.

    Args:
        batch: every leaf has the rows first, `own_rows` of them or all.
    """
    own, sharding = own_rows(count, mesh), NamedSharding(mesh, _over_rows(count, mesh))

    def place(leaf: Any) -> jax.Array:
        if jax.process_count() == 1 or isinstance(leaf, jax.Array):
            return jax.device_put(leaf, sharding)
        held = np.arange(count) if leaf.shape[0] == count else own

        def part(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[0].indices(count)
            return leaf[slice(*np.searchsorted(held, (first, last))), *index[1:]]

        return jax.make_array_from_callback((count, *leaf.shape[1:]), sharding, part)

    return jax.tree.map(place, batch)


def on_host(tree: PyTree) -> PyTree:
    """Return arrays as numpy, whole on every process; of several processes all must call it together."""

    def whole(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


def together(part: Callable[[], np.ndarray]) -> np.ndarray:
    """Call a function on every process, and return what each returns, stacked; if it raises on one, raise on all.

    Raises:
        RuntimeError: on the other processes.
    """
    if jax.process_count() == 1:
        return part()[None]
    found, error = None, None
    try:
        found = part()
    except Exception as raised:
        error = raised
    failed = multihost_utils.process_allgather(np.asarray(error is not None))
    if error is not None:
        raise error
    if failed.any():
        raise RuntimeError(f"process {failed.argmax()} has failed: what it printed says why.")
    return multihost_utils.process_allgather(found)


def _over_rows(count: int, mesh: Mesh) -> P:
    return P() if count % row_shards(mesh) else P(ROWS)


def row_shards(mesh: Mesh) -> int:
    """Return the number of parts into which the rows of a batch are split."""
    return math.prod(mesh.shape[name] for name in ROWS)


def lies_on(params: PyTree) -> Mesh | None:
    """Return the mesh of `make_mesh` on which parameters lie; None of parameters on one device."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params))
    meshes = (each.mesh for each in shardings if isinstance(each, NamedSharding))
    return next((each for each in meshes if each.axis_names == AXES), None)


def on_mesh_of(params: PyTree) -> contextlib.AbstractContextManager:
    """Set the mesh on which parameters lie while the context lasts; of parameters on one device, change nothing."""
    mesh = lies_on(params)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def filled(rows: int) -> int:
    """Return the number of rows with those that fill up a batch, so that the devices of the mesh that is set divide it.

    Without a mesh it is `rows`.
    """
    mesh = _set_mesh()
    return rows if mesh is None else -(-rows // row_shards(mesh)) * row_shards(mesh)


def over_rows(x: Tree, *, heads: bool = False) -> Tree:
    """Keep the rows of activations split over the devices of the mesh that is set; without a mesh, return them as is.

    Rows that the devices do not divide are left to XLA.

    Args:
        heads: the second axis of every leaf is that of attention heads, which are split over "model".
    """
    mesh = _set_mesh()
    if mesh is None:
        return x

    def constrained(leaf: jax.Array) -> jax.Array:
        spec = [P.UNCONSTRAINED] * leaf.ndim
        for axis, names in enumerate((ROWS, ("model",))[: 1 + heads]):
            parts = math.prod(mesh.shape[name] for name in names)
            if parts > 1 and leaf.shape[axis] % parts == 0:
                spec[axis] = names
        return leaf if spec == [P.UNCONSTRAINED] * leaf.ndim else jax.lax.with_sharding_constraint(leaf, P(*spec))

    return jax.tree.map(constrained, x)


def laid_out(tree: Tree) -> Tree:
    """Keep parameters, gradients or a training state sharded by `shardings` of the mesh that is set, as `over_rows`."""
    mesh = _set_mesh()
    if mesh is None:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.lax.with_sharding_constraint(leaf, spec_of(_name(path), leaf.shape, mesh)), tree
    )


def everywhere(x: Tree) -> Tree:
    """Give every device of the mesh that is set, and so every process, all of the results of a compiled function."""
    return x if _set_mesh() is None else jax.lax.with_sharding_constraint(x, P())


def by_host(function: Callable[..., Tree], *arrays: jax.Array) -> Tree:
    """Apply a function that asks the host (`jax.pure_callback`): once, of several processes for every device."""
    if jax.process_count() == 1 or _set_mesh() is None:
        return everywhere(function(*everywhere(arrays)))
    return jax.shard_map(function, in_specs=P(), out_specs=P(), check_vma=False)(*arrays)


def is_set() -> bool:
    """Return True if a mesh of `make_mesh` is set."""
    return _set_mesh() is not None


def _set_mesh() -> AbstractMesh | None:
    """Return the mesh that is set, if it has the axes of `make_mesh`, else None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or not set(AXES) <= set(mesh.axis_names) else mesh


def without_mesh() -> Any:
    """Return a context in which no mesh is set: arrays are then made on this process's own device."""
    return jax.set_mesh(Mesh(np.empty((), object), ()))


def by_own_rows(function: Callable[..., Tree], held: PyTree, *arrays: jax.Array) -> Tree:
    """Apply `function(held, *arrays)`, of rows that do not depend on each other, on each device to its own rows.

    Within `function` nothing is communicated but over "model": what it reads of `held` is gathered before, and its
    gradient is summed after, in float32. Without a mesh, or if the devices do not divide the rows, it is a plain call.
    """
    parts = _row_shards_set()
    if parts == 1 or arrays[0].shape[0] % parts:
        return function(held, *arrays)
    rows = P(ROWS)

    def own(held: PyTree, *arrays: jax.Array) -> Tree:
        return function(jax.tree.map(_summed_wide, held), *arrays)

    return jax.shard_map(own, in_specs=(P(), *[rows] * len(arrays)), out_specs=rows, axis_names=set(ROWS))(
        held, *arrays
    )


def by_own_heads(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Apply a function that treats all rows and heads alike, on each device to its own ones.

    The arrays, and the result in the form of the first, are [row, head, ...]. What the devices do not divide, and an
    axis of size 1, is whole on each of them. Nothing is communicated. Without a mesh it is a plain call.
    """
    mesh = _set_mesh()
    if mesh is None or mesh.size == 1:
        return function(*arrays)
    split = []
    for axis, names in enumerate((ROWS, ("model",))):
        parts, sizes = math.prod(mesh.shape[name] for name in names), {array.shape[axis] for array in arrays} - {1}
        split.append(None if any(size % parts for size in sizes) else names)
    specs = [
        P(*(names if size > 1 else None for size, names in zip(each.shape[:2], split, strict=True))) for each in arrays
    ]
    return jax.shard_map(function, in_specs=tuple(specs), out_specs=specs[0])(*arrays)


def _summed_wide(leaf: jax.Array) -> jax.Array:
    """Return the leaf as one that may differ between devices, so that its gradients are summed once, in float32."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    return jax.lax.pcast(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), ROWS, to="varying").astype(leaf.dtype)


def idle() -> str | None:
    """Return a sentence if no mesh is set and devices have no work, for both ways in; else None."""
    count = jax.device_count()
    if count == 1 or not jax.sharding.get_abstract_mesh().empty:
        return None
    return f'1 of {count} devices is used: mesh="data=-1" (--mesh data=-1) uses all.'


def initialize(coordinator: str | None = None, *, processes: int | None = None, process: int | None = None) -> None:
    """Join several processes to one run. Call it before anything else of jax; each then sees all devices.

    What is not given is read from the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or else
    found by jax, under Slurm, Open MPI or on a TPU pod. If a process ends before its work is done, the others end
    within a minute, and the last line that they print says so.

    Args:
        coordinator: "host:port" of process 0.
        processes: number of processes.
        process: number of this one, from 0.

    Raises:
        ValueError: if one of them is not known.
    """
    given = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    for (name, value), variable in zip(given.items(), VARIABLES, strict=True):
        found = os.environ.get(variable)
        if value is None and found is not None:
            if name != "coordinator_address" and not found.isdecimal():
                raise ValueError(f"{variable} must be a number, but is {found!r}.")
            given[name] = found if name == "coordinator_address" else int(found)
    if None in given.values() and not _is_managed():
        missing = [variable for variable, value in zip(VARIABLES, given.values(), strict=True) if value is None]
        are = "is" if len(missing) == 1 else "are"
        raise ValueError(
            f"{', '.join(VARIABLES)} must be given to each process, but {' and '.join(missing)} {are} not."
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of CPUs; other platforms have their own
    jax.distributed.initialize(**given, heartbeat_timeout_seconds=30)
    _watch()


VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join() -> None:
    """Call `initialize` if the environment has several processes, and it has not been called.

    Raises:
        ValueError: as `initialize`.
    """
    if not jax.distributed.is_initialized() and (_is_managed() or any(name in os.environ for name in VARIABLES)):
        initialize()


def _is_managed() -> bool:
    """Return True for one of several processes that Slurm, Open MPI or a TPU pod has started, as jax knows it."""
    counts = [os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")]
    if "SLURM_STEP_NODELIST" not in os.environ:  # not started by srun
        counts[0] = "1"
    hosts = [os.environ.get(name, "") for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")]
    return any(count not in ("", "1") for count in counts) or any("," in each for each in hosts)


def anywhere(flag: bool) -> bool:
    """Return True on every process if it is True on one; all must call it together."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def wait(name: str, seconds: float = 24 * 3600) -> bool:
    """Wait until every process has called this with the same name; return False if one does not in time.

    Unlike all else it needs no device, so that it can be called when a process may have failed.
    """
    if jax.process_count() == 1:
        return True
    try:
        distributed.global_state.client.wait_at_barrier(f"jaxrl_llm/{name}", timeout_in_ms=int(1000 * seconds))
    except jax.errors.JaxRuntimeError:
        return False
    return True


LOST = re.compile("gloo|nccl|connection (closed|reset)|unavailable|heartbeat|barrier", re.IGNORECASE)
_again = ""  # how to start the run again, beyond its command


def is_lost(error: BaseException) -> bool:
    """Return True for what jax raises, here or below, when another process has ended."""
    if jax.process_count() == 1:
        return False
    below = [error]
    while (cause := below[-1].__cause__ or below[-1].__context__) is not None and cause not in below:
        below.append(cause)
    return any(isinstance(each, jax.errors.JaxRuntimeError) and LOST.search(str(each)) for each in below)


def ended() -> str:
    """Return the sentence for a process of which another has ended."""
    return (
        "another process of this run has ended: what it printed says why. "
        f"Run the same command in every process again{_again}."
    )


@contextlib.contextmanager
def one_run(*, resume: bool = False) -> Iterator[None]:
    """Say in plain words that another process has ended, as long as the context lasts.

    Args:
        resume: the run has a folder, from which it can be resumed.

    Raises:
        RuntimeError: instead of what the libraries below raise.
    """
    global _again
    before, _again = _again, ", with resume (--resume) to go on from the last checkpoint" if resume else _again
    try:
        yield
    except Exception as error:
        if is_lost(error):  # `ended` stays as it is: this process ends too
            raise RuntimeError(ended()) from error
        _again = before
        raise
    _again = before


def _watch() -> None:
    """End this process, with `ended` on standard error, when another ends before its work is done.

    Two barriers are waited for from the start, one by process 0, one by the others. Each passes when the other side
    has done its work too, and fails if a process is lost. If process 0 is lost, nobody answers at its address. In both
    cases jax calls abort(), which runs no Python: its signal is handled by sleep(), which leaves the sentence time.
    """
    state, done = distributed.global_state, threading.Event()
    host, _, port = state.coordinator_address.rpartition(":")
    side = min(state.process_id, 1)

    def wait(side: int) -> bool:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            state.client.wait_at_barrier(f"jaxrl_llm/watch {side}", timeout_in_ms=10**12)
            return True
        return False

    def tell() -> None:
        time.sleep(1)  # in which the main thread says it, if it has noticed
        if not done.is_set():
            print(f"jaxrl-llm: {ended()}", file=sys.stderr, flush=True)
            os._exit(2)

    def watch_all() -> None:
        if wait(side):
            done.set()
        tell()

    def watch_first() -> None:
        while not done.is_set():
            try:
                with socket.create_connection((host.strip("[]"), int(port))) as held:
                    while held.recv(4096):  # until the other side closes it, by itself after minutes
                        pass
            except ConnectionRefusedError:
                return tell()
            except OSError:
                time.sleep(1)

    if os.name == "posix":
        libc = ctypes.CDLL(None)
        libc.signal(signal.SIGABRT, libc.sleep)  # of 6 seconds: its argument is the signal's number
    for watch in (watch_all, watch_first)[: 1 + side]:
        threading.Thread(target=watch, daemon=True).start()
    atexit.register(wait, 1 - side)  # called before jax's own, which was registered when jax was imported


def _row_shards_set() -> int:
    """Return `row_shards` of the mesh that is set; 1 without one."""
    mesh = _set_mesh()
    return 1 if mesh is None else row_shards(mesh)


def _devices(count: int) -> str:
    return f"{count} device{'s' * (count != 1)}"


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if jax.process_count() == 1 or not getattr(leaf, "is_fully_addressable", True):
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
