"""From one device to many: the same losses and parameters on 1 device, on 8, and from 2 processes."""

import json
import os
import re
import socket
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxrl_llm import mesh as meshes
from tests.conftest import TINY
from tests.training import mesh_program

ROOT = Path(__file__).resolve().parents[2]
SHARDED = {"8x1x1": [[32, 96]] * 8, "2x1x4": [[32, 24]] * 8, "2x2x2": [[16, 48]] * 8, "1x8x1": [[4, 96]] * 8}


def launch(*arguments, devices):
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    environment = {**os.environ, "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-m", "tests.training.mesh_program", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def results(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def alone():
    as_arrays = lambda tree: jax.tree.map(jnp.asarray, tree)  # noqa: E731
    return mesh_program.two_steps(as_arrays, as_arrays, mesh_program.checksum)


def assert_same(found, alone):
    for name in ("dpo", "grpo"):
        np.testing.assert_allclose(found[name], alone[name], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_eight_devices_give_the_losses_and_parameters_of_one(alone):
    for layout, found in zip(SHARDED, results(launch(",".join(SHARDED), devices=8)), strict=True):
        assert_same(found, alone)
        assert found["layout"] == SHARDED[layout], "parameters stay spread as they were"
        assert found["moments"] == [SHARDED[layout]] * 2, "and so does the optimiser's state"


@pytest.mark.slow
def test_two_processes_give_the_losses_and_parameters_of_one(alone):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [launch("2x1x1", address, str(process), devices=1) for process in range(2)]
    for found in map(results, both):
        assert_same(found[0], alone)


def test_rules_know_where_a_parameter_lies():
    two = types.SimpleNamespace(shape={"data": 2, "fsdp": 4, "model": 2})
    for path, shape, spec in [
        ("params/h/0/attn/c_attn/kernel", (32, 96), P("fsdp", "model")),
        ("opt_state/1/0/mu/h/0/mlp/c_proj/kernel", (128, 32), P("model", "fsdp")),
        ("layers/3/self_attn/o_proj/kernel", (32, 32), P("model", "fsdp")),
        ("layers/3/mlp/gate_proj/kernel", (32, 33), P("fsdp", None)),  # 33 is odd: it stays whole
        ("h/0/attn/c_attn/bias", (96,), P("model")),
        ("wte/embedding", (64, 32), P("model", "fsdp")),
        ("layers/0/self_attn/q_layernorm/norms/3/scale", (8,), P()),
        ("ln_f/scale", (32,), P()),
        ("step", (), P()),
    ]:
        assert meshes.spec_of(path, shape, two) == spec, path


@pytest.mark.parametrize("name", ["gpt2", "llama", "stablelm", "t5"])
def test_every_matrix_of_every_family_is_shared_out(name):
    one = types.SimpleNamespace(shape={"data": 1, "fsdp": 1, "model": 1})
    for path, leaf in jax.tree_util.tree_leaves_with_path(TINY[name].abstract_params):
        where = "/".join(str(entry.key) for entry in path)
        small = where.endswith(("wpe/embedding", "relative_attention_bias/embedding", "_norm/scale"))
        if leaf.ndim == 2 and not small:
            assert "model" in meshes.spec_of(where, leaf.shape, one), where


def test_what_does_not_fit_the_devices_is_refused():
    with pytest.raises(ValueError, match="must multiply to all devices, 1, but are data 2 × fsdp 1 × model 1"):
        meshes.make_mesh(2, 1)
    for layout in ("", "data", "data=0", "rows=2", "data=2x2", "data=1,,fsdp=1", "data=1,data=1"):
        with pytest.raises(
            ValueError, match="must be sizes of data, fsdp, model, each once, such as data=4,fsdp=2 or data=-1"
        ):
            meshes.mesh_of(layout)
    with pytest.raises(ValueError, match="only one axis of the mesh must be -1"):
        meshes.make_mesh(-1, -1)
    mesh = meshes.mesh_of("fsdp=-1,model=1")
    assert mesh == meshes.make_mesh()
    with pytest.raises(ValueError, match="1 device must divide the rows of a batch, but there are 0"):
        meshes.shard_batch({"x": np.zeros(())}, mesh)
    params = meshes.shard_state(TINY["gpt2"].init(jax.random.key(0)), mesh)
    assert all(isinstance(leaf.sharding, jax.sharding.NamedSharding) for leaf in jax.tree.leaves(params))


def test_idle_devices_are_named(monkeypatch):
    assert meshes.idle() is None, "one device is never idle"
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert meshes.idle() == '1 of 8 devices is used: mesh="data=-1" (--mesh data=-1) uses all.'
    with jax.set_mesh(meshes.make_mesh()):
        assert meshes.idle() is None
