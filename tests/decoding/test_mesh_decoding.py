"""Decoding and scoring on meshes and in two processes: the tokens and values of one device."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxrl_llm as jl
from jaxrl_llm import cli
from jaxrl_llm import mesh as meshes
from tests.models.test_memory import both
from tests.test_cli import write_model

ROOT = Path(__file__).resolve().parents[2]
CLOSE = ("perplexity", "t5 perplexity", "attention", "evaluated", "scores", "answers")


@pytest.mark.slow
def test_meshes_give_the_tokens_of_one_device(tmp_path):
    write_model(tmp_path / "model")
    layouts = ["one", "data=8", "model=8", "data=2,model=4", "data=2,fsdp=2,model=2"]
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    environment = {**os.environ, "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "tests.decoding.mesh_program", tmp_path, *layouts]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    one, *others = map(json.loads, done.stdout.splitlines())
    cached = others[-1].pop("caches")
    assert [rows for rows, *_ in cached] == [2, 6] and all(heads == 1 for _, heads, _ in cached), "split by 4 and by 2"
    for layout, found in zip(layouts[1:], others, strict=True):
        for name, value in found.items():
            if name in CLOSE:
                np.testing.assert_allclose(value, one[name], rtol=1e-5, atol=1e-6, err_msg=f"{layout}: {name}")
            else:
                assert value == one[name], (layout, name)
    assert found.keys() == one.keys(), "the last layout has all"
    assert done.stderr.count("1 of 8 devices is used:") == 10, "a line a command"


@pytest.mark.slow
@pytest.mark.parametrize("grammar", [None, 'start: pair\npair: "(" pair ")" | "at"'], ids=["", "grammar"])
def test_two_processes_decode_together_and_the_first_prints(tmp_path, monkeypatch, capsys, grammar):
    model = write_model(tmp_path / "model")
    (tmp_path / "prompts").write_text("the cat\non the mat\nsat")
    command = ["generate", "--prompts", str(tmp_path / "prompts"), "--model", model, "--max-new-tokens", "12"]
    command += ["--num-samples", "2", "--seed", "1", *([] if grammar is None else ["--grammar", grammar])]
    found = both(["jaxrl_llm.cli", *command, "--mesh", "data=2,fsdp=2,model=2"], devices=4, JAX_NUM_PROCESSES="2")
    monkeypatch.setattr(sys, "argv", ["jaxrl-llm", *command])
    cli.main()
    assert found == [capsys.readouterr().out, ""]


def test_a_mesh_of_one_device_changes_nothing_and_others_are_refused(tmp_path, monkeypatch, capsys):
    model = write_model(tmp_path / "model")
    one, on_mesh = jl.load(model), jl.load(model, mesh="data=-1")
    assert meshes.lies_on(one.params) is None and meshes.lies_on(on_mesh.params) == meshes.make_mesh()
    generated = [[each.tokens for each in lm.generate("the cat", max_new_tokens=6)] for lm in (one, on_mesh)]
    assert generated[0] == generated[1]
    for mesh, error, match in [
        ("data=2", ValueError, "the sizes of the mesh must multiply to all devices, 1, but are data 2"),
        ("rows=2", ValueError, "mesh must be sizes of data, fsdp, model, each once, such as"),
        (8, TypeError, "mesh must be sizes such as 'data=4,fsdp=2', or a jax Mesh, but is 8"),
        (jax.make_mesh((1,), ("rows",)), ValueError, "the mesh must have the axes data, fsdp, model, but has r"),
    ]:
        with pytest.raises(error, match=match):
            jl.load(model, mesh=mesh)
    with pytest.raises(ValueError, match="mesh must be left out for a model that is loaded"):
        jl.evaluate(one, [{"text": "the cat"}], mesh="data=1")
    monkeypatch.setattr(sys, "argv", ["jaxrl-llm", "generate", "the cat", "--model", model])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(SystemExit):
        cli.main()
    assert "several processes share one mesh: give --mesh, such as --mesh data=-1." in capsys.readouterr().err
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    for variables, arguments, message in [
        ({}, [], "must be given to each process, but JAX_NUM_PROCESSES and JAX_PROCESS_ID are not."),
        ({"JAX_NUM_PROCESSES": "two"}, ["--mesh", "data=-1"], "JAX_NUM_PROCESSES must be a number, but is 'two'."),
    ]:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["jaxrl-llm", "generate", "the cat", "--model", model, *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        assert message in capsys.readouterr().err


def test_batches_are_filled_up_for_the_devices(monkeypatch):
    assert meshes.filled(5) == 5
    monkeypatch.setattr(meshes, "row_shards", lambda mesh: 4)
    with jax.set_mesh(meshes.make_mesh()):
        assert [meshes.filled(rows) for rows in (0, 1, 4, 5)] == [0, 4, 4, 8]
