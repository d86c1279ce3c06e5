"""Sharding over many devices: axes of parameters by rules on their names, through `jax.sharding`.

Shard the state and the batches, and call the same steps: XLA inserts the communication. Batches are sharded over the
axis "data", inner dimensions of the layers over "model", as in Megatron (Shoeybi et al. 2019).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

Tree = TypeVar("Tree", bound=PyTree)

OUTER = "c_attn|c_fc|q_proj|k_proj|v_proj|qkv_proj|gate_proj|up_proj|gate_up_proj"  # their outputs are split
# A parameter's path, such as h/0/attn/c_attn/kernel: the first rule that its end matches. Kernels are [in, out].
RULES: tuple[tuple[str, P], ...] = (
    (r"experts/(gate_proj|up_proj)/kernel", P(None, None, "model")),  # [expert, in, out]
    (r"experts/down_proj/kernel", P(None, "model", None)),
    (rf"({OUTER}|q|k|v|wi|wi_0|wi_1)/kernel", P(None, "model")),
    (rf"({OUTER})/bias", P("model")),
    (r"(c_proj|o_proj|down_proj|o|wo)/kernel", P("model", None)),
    (r"(wte|embed_tokens|shared)/embedding", P("model", None)),  # by tokens, as the unembedding's rows
    (r"lm_head/kernel", P(None, "model")),
    (r".*", P()),
)


def make_mesh(data: int = -1, model: int = 1) -> Mesh:
    """Return a mesh of all devices, "data" × "model".

    Args:
        data: copies of the model, each with its share of the rows; −1 for as many as the devices allow.
        model: devices that share the layers of one copy.

    Raises:
        ValueError: if the product is not the number of devices of all processes.
    """
    count = len(jax.devices())
    data = count // model if data == -1 and model > 0 else data
    if model < 1 or data < 1 or data * model != count:
        raise ValueError(f"data × model must be the {count} devices there are, but is {data} × {model}.")
    return Mesh(np.asarray(jax.devices()).reshape(data, model), ("data", "model"))


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


def shard_state(tree: Tree, mesh: Mesh) -> Tree:
    """Shard parameters or a whole training state: optimiser moments as their parameters, the rest replicated."""
    sharding = sharding_on(mesh)

    def place(path: Any, leaf: Any) -> Any:
        name = "/".join(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", "")))) for entry in path)
        return _put(leaf, sharding(name, np.shape(leaf)))

    return jax.tree_util.tree_map_with_path(place, tree)


def shard_batch(batch: Tree, mesh: Mesh) -> Tree:
    """Shard the rows of every leaf over "data". Of several processes each gives its own rows.

    Raises:
        ValueError: if the devices do not divide the rows.
    """
    parts = mesh.shape["data"]
    sharding = NamedSharding(mesh, P("data"))

    def place(leaf: Any) -> jax.Array:
        rows = np.shape(leaf)[0] if np.ndim(leaf) else 0
        if rows == 0 or rows * jax.process_count() % parts:
            raise ValueError(
                f"{parts} devices must divide the rows of a batch, but there are {rows * jax.process_count()}."
            )
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(place, batch)


def initialize(coordinator: str, *, processes: int, process: int) -> None:
    """Join several processes to one run. Call it before anything else of jax; each then sees all devices.

    Args:
        coordinator: "host:port" of process 0.
        processes: number of processes.
        process: number of this one, from 0.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of CPUs; other platforms have their own
    jax.distributed.initialize(coordinator, num_processes=processes, process_id=process)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if jax.process_count() == 1:
        return jax.device_put(leaf, sharding)
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
