"""`jaxrl-llm train --mesh`: the numbers of one device on eight, from two processes, and after a change of devices."""

import inspect
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxrl_llm as jl
from jaxrl_llm import mesh as meshes
from jaxrl_llm import models, train
from jaxrl_llm.models import GPT2, GPT2Config
from jaxrl_llm.training import recipes
from jaxrl_llm.training.batches import KINDS, Batches
from jaxrl_llm.training.config import GRPOConfig, PPOConfig, SFTConfig
from jaxrl_llm.training.encoding import Encoder
from jaxrl_llm.training.loop import RunLog
from jaxrl_llm.training.packing import PackedBatches

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [" is wise.", " of troubles and arms.", " went.", " are here, my lord.", " end.", " so.", ", I will.", "!"]
LINES = {
    "sft": [{"prompt": f"Say {i}:", "completion": text} for i, text in enumerate(TEXTS)],
    "pairs": [{"prompt": f"Say {i}:", "chosen": text, "rejected": " no"} for i, text in enumerate(TEXTS)],
    "held_out": [{"prompt": f"Say {i}:", "chosen": text, "rejected": " no"} for i, text in enumerate(TEXTS[:7])],
    "unpaired": [{"prompt": f"Say {i}:", "completion": text, "label": i % 3 > 0} for i, text in enumerate(TEXTS)],
    "ranked": [{"prompt": f"Say {i}:", "answers": [*TEXTS[i : i + 3], " no"]} for i in range(8)],
}
COMMON = ["--steps", "3", "--batch-size", "8", "--learning-rate", "1e-3", "--warmup", "0", "--optimizer", "sgd"]
COMMON += ["--log-every", "1", "--save-every", "2"]
SAMPLED = ["--reward", "reward.py:vowels", "--max-new-tokens", "6"]
RUNS = {  # the held-out lines are 7, which no number of devices divides
    "sft": ["sft", "--data", "sft.jsonl", "--eval-data", "sft.jsonl"],
    "reward": ["reward", "--data", "pairs.jsonl", "--eval-data", "held_out.jsonl", "--microbatches", "2"],
    "dpo": ["dpo", "--data", "pairs.jsonl", "--eval-data", "held_out.jsonl"],
    "grpo": ["grpo", "--data", "sft.jsonl", "--eval-data", "sft.jsonl", *SAMPLED],
    "ppo": ["ppo", "--data", "sft.jsonl", *SAMPLED, "--minibatches", "2", "--epochs", "2"],
}


def vowels(prompts, completions):
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of every kind, and a small model that has tiny-gpt2's tokens."""
    folder = tmp_path_factory.mktemp("runs")
    for name, lines in LINES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "reward.py").write_text(inspect.getsource(vowels))
    lm = GPT2(GPT2Config(vocab_size=4096, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    params = jax.tree.map(lambda leaf: 3 * leaf, lm.init(jax.random.key(0)))
    ends = {"eos_token_id": 0, "bos_token_id": 0}
    models.save(folder / "model", lm, params, models.load("tiny-gpt2").tokenizer, config=ends)
    return folder


def start(folder, *runs, devices, processes=1, first=""):
    """Start the commands, trainers or others, one after the other, in each of several processes, after some lines."""
    address = "127.0.0.1:1"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    environment = os.environ | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}"}
    environment["PYTHONPATH"] = str(ROOT)
    program = f"{first}\nimport json, sys\nfrom jaxrl_llm import cli\n"
    program += "for words in json.loads(sys.argv[1]):\n    sys.argv = ['jaxrl-llm', *words]\n    cli.main()"
    common = ["--model", "model", *COMMON]
    words = [["train", each[0], *common, *each[1:]] if each[0] in RUNS else [*each, *common[:2]] for each in runs]
    command = [sys.executable, "-c", program, json.dumps(words)]
    started = []
    for process in range(processes):
        several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(process)}
        given = environment | (several if processes > 1 else {})
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, cwd=folder, env=given, **pipes))
    return started


GLOO = r"\[Gloo\] Rank |is connected to | peer ranks\. *|Expected number of connected peer ranks is : "


def done(started):
    """Return what the processes said, without the pieces of lines that Gloo's threads write across each other."""
    said = [process.communicate(timeout=900)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(said)[-4000:]
    return [re.sub(GLOO, "", each) for each in said]


def rows(folder):
    return [
        {name: value for name, value in row.items() if "second" not in name}
        for row in RunLog(folder / "log.jsonl").rows()
    ]


def assert_same(found, expected):
    """Losses to 1e-5, and all else that was measured and sampled."""
    for row, wanted in zip(rows(found), rows(expected), strict=True):
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            if isinstance(value, str):
                assert row[name] == value, name
            else:
                np.testing.assert_allclose(row[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    ours, theirs = (json.loads((each / "run.json").read_text()) for each in (found, expected))
    free = {"mesh": None, "resume": None}
    assert ours | free == theirs | free
    ours, theirs = (models.load(each).params for each in (found, expected))
    jax.tree.map(lambda *pair: np.testing.assert_allclose(*pair, atol=1e-5), ours, theirs)


@pytest.fixture(scope="module")
def alone(folder):
    """The five recipes on one device."""
    done(start(folder, *([*words, "--out", f"alone_{name}"] for name, words in RUNS.items()), devices=1))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_eight_devices_give_the_numbers_of_one(alone, processes):
    mesh = ["--mesh", "data=2,fsdp=2,model=2"]
    each = ([*words, *mesh, "--out", f"{processes}_{name}"] for name, words in RUNS.items())
    said = done(start(alone, *each, devices=8 // processes, processes=processes))
    for name in RUNS:
        assert_same(alone / f"{processes}_{name}", alone / f"alone_{name}")
    assert "The model is in" in said[0]
    assert not re.search("[a-z]", "".join(said[1:])), f"the first process alone prints, but the others say {said[1:]}"


@pytest.mark.slow
def test_a_run_that_was_cut_on_four_devices_goes_on_on_one_two_and_eight(folder):
    endless = [*RUNS["dpo"], "--schedule", "constant"]
    done(start(folder, [*endless, "--steps", "4", "--out", "whole"], devices=1))
    done(start(folder, [*endless, "--steps", "2", "--out", "cut", "--mesh", "data=2,fsdp=2"], devices=4))
    for devices, mesh in {1: [], 2: ["--mesh", "fsdp=2"], 8: ["--mesh", "data=2,fsdp=2,model=2"]}.items():
        out = f"resumed_{devices}"
        shutil.copytree(folder / "cut", folder / out)
        done(start(folder, [*endless, "--steps", "4", "--resume", "--out", out, *mesh], devices=devices))
        assert_same(folder / out, folder / "whole")


ENDED = (
    "jaxrl-llm: another process of this run has ended: what it printed says why. Run the same command in every process"
)
KILLED = """
import os, signal
from jaxrl_llm.training.checkpoints import Checkpoints
save = Checkpoints.save
def save_or_die(self, step, state):
    if step == 6 and os.environ["JAX_PROCESS_ID"] == "{}":
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, step, state)
Checkpoints.save = save_or_die
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["step", "checkpoint"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_is_resumed(folder, victim, moment):
    name = f"killed_{victim}_{moment}"
    run = [*RUNS["sft"], "--steps", "300", "--schedule", "constant", "--mesh", "data=2,fsdp=2", "--out", name]
    both = start(folder, run, devices=2, processes=2, first=KILLED.format(victim) if moment == "checkpoint" else "")
    while not (folder / name / "checkpoints" / "4").is_dir():
        assert all(process.poll() is None for process in both)
        time.sleep(0.1)
    if moment == "step":
        both[victim].send_signal(signal.SIGKILL)
    said, _ = both[1 - victim].communicate(timeout=60)
    assert both[1 - victim].returncode == 2
    assert f"{ENDED} again, with resume (--resume) to go on from the last checkpoint.\n" in said, said[-3000:]
    last = max(int(each.name) for each in (folder / name / "checkpoints").iterdir() if each.name.isdecimal())
    again = [*run, "--steps", str(last + 2), "--resume"]
    done(start(folder, again, devices=2, processes=2))
    done(start(folder, [*again[:-1], "--mesh", "data=1", "--out", f"{name}_alone"], devices=1))
    assert_same(folder / name, folder / f"{name}_alone")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_of_a_command(folder, victim):
    command = ["generate", "Say", "--max-new-tokens", "60", "--mesh", "data=-1"]
    both = start(folder, command, devices=2, processes=2)
    while "[Gloo]" not in (line := both[victim].stdout.readline()):  # they are connected, and nothing is decoded
        assert line
    both[victim].send_signal(signal.SIGKILL)
    said, _ = both[1 - victim].communicate(timeout=60)
    assert both[1 - victim].returncode == 2 and f"{ENDED} again.\n" in said, said[-3000:]


# On one device --------------------------------------------------------------------------------------------------------


def test_a_mesh_is_checked_before_the_run(monkeypatch):
    for config, match in [
        (SFTConfig(mesh="data=2"), "the sizes of the mesh must multiply to all devices, 1, but are data 2"),
        (SFTConfig(mesh="rows=2"), "mesh must be sizes of data, fsdp, model, each once, such as data=4,fsdp=2"),
    ]:
        with pytest.raises(ValueError, match=match):
            recipes.begin("tiny-gpt2", config, verbose=False)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(ValueError, match="mesh must be given to 2 processes, such as data=-1, but is None"):
            recipes.begin("tiny-gpt2", SFTConfig(), verbose=False)
    monkeypatch.setattr(meshes, "row_shards", lambda mesh: 4)
    two = {"reward": vowels, "group_size": 2}
    for config, match in [
        (SFTConfig(mesh="data=-1", batch_size=6), "a multiple of the 4 devices of data × fsdp, but is 6"),
        (SFTConfig(mesh="data=-1", batch_size=12, microbatches=2), "4 devices of data × fsdp × microbatches, 2, but"),
        (GRPOConfig(mesh="data=-1", batch_size=10, **two), "a multiple of the 4 devices of data × fsdp, but is 10"),
        (PPOConfig(mesh="data=-1", batch_size=12, minibatches=3, microbatches=2, **two), "microbatches, 2 × minib"),
    ]:
        with pytest.raises(ValueError, match=match):
            recipes.begin("tiny-gpt2", config, verbose=False)


def test_idle_devices_are_named(monkeypatch, capsys):
    recipes.begin("tiny-gpt2", SFTConfig())
    assert "devices" not in capsys.readouterr().out
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    recipes.begin("tiny-gpt2", SFTConfig())
    assert '1 of 8 devices is used: mesh="data=-1" (--mesh data=-1) uses all.' in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_on_a_mesh_of_one_device_is_that_without(folder):
    options = {"steps": 2, "batch_size": 4, "learning_rate": 1e-2, "eval_data": LINES["sft"], "verbose": False}
    plain = train.sft(jl.load(folder / "model"), LINES["sft"], **options)
    tuned = train.sft(jl.load(folder / "model"), LINES["sft"], mesh="data=1", **options)
    jax.tree.map(lambda *pair: np.testing.assert_allclose(*pair, rtol=1e-6, atol=1e-7), tuned.params, plain.params)
    assert all(isinstance(leaf.sharding, jax.sharding.NamedSharding) for leaf in jax.tree.leaves(tuned.params))


@pytest.mark.parametrize(
    ("kind", "lines"), [("prompt-completion", "sft"), ("prompt-only", "sft"), ("preference", "pairs"),
                        ("unpaired-preference", "unpaired"), ("ranked", "ranked")]
)  # fmt: skip
def test_a_process_makes_its_own_rows_of_the_whole_arrays(kind, lines):
    tokenizer = models.load("tiny-gpt2").tokenizer
    records = [KINDS[kind].parse(line) for line in LINES[lines]]
    batches = Batches(records, KINDS[kind], Encoder(tokenizer, max_length=40), batch_size=6, seed=0, multiple=2)
    loaders = [batches]
    if kind in ("prompt-completion", "preference", "ranked"):
        loaders.append(PackedBatches(batches, length=16, batch_size=3, seed=0))
    for loader in loaders:
        whole = loader(1)
        for own in ([0, 1], [1], [2], [0, 2]):
            part = loader(1, np.asarray(own))
            jax.tree.map(
                lambda leaf, all_rows, own=own: np.testing.assert_array_equal(leaf, all_rows[own]), part, whole
            )


def test_a_batch_is_placed_by_the_rows_that_a_process_has():
    mesh = meshes.make_mesh()
    assert meshes.own_rows(6, mesh).tolist() == list(range(6))
    placed = meshes.place_rows({"x": np.arange(6)}, 6, mesh)["x"]
    assert placed.sharding.spec == jax.sharding.PartitionSpec(("data", "fsdp"))
    np.testing.assert_array_equal(meshes.on_host(placed), np.arange(6))


def test_held_out_rows_are_split_into_parts_that_the_devices_divide():
    for count, size, shards in [(7, 4, 1), (7, 4, 2), (23, 8, 4), (3, 8, 4), (8, 8, 8), (5, 2, 4), (12, 6, 4)]:
        order, whole, most = np.arange(count), count - count % shards, max(1, size // shards)
        parts = recipes._parts(order[:whole], size, shards=shards) + recipes._parts(order[whole:], most)
        np.testing.assert_array_equal(np.concatenate(parts), order)
        assert all(0 < len(part) <= max(size, shards) for part in parts)
        assert all(len(part) % shards == 0 or len(part) <= most for part in parts)


@pytest.mark.parametrize(
    ("environment", "match"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, "but JAX_NUM_PROCESSES and JAX_PROCESS_ID are not"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "to each process, but JAX_COORDINATOR_ADDRESS is not"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES must be a number, but is 'two'"),
    ],
)
def test_processes_are_found_in_the_environment(environment, match, monkeypatch):
    for name in meshes.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    meshes.join()  # there is one process: nothing is done
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=match):
        meshes.join()


def test_jobs_of_several_processes_are_known(monkeypatch):
    joined = []
    monkeypatch.setattr(meshes, "_watch", lambda: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: joined.append(given["num_processes"]))
    for environment, known in [
        ({"SLURM_NTASKS": "4"}, False),  # a script of sbatch, not a step of srun
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "a"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
    ]:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            meshes.join()
        assert bool(joined) == known, environment
        joined.clear()


def test_what_ends_with_another_process_is_said_in_plain_words(monkeypatch):
    raised = RuntimeError("step 3 failed")
    raised.__cause__ = jax.errors.JaxRuntimeError("INTERNAL: Gloo AllGather failed: Connection closed by peer")
    with pytest.raises(RuntimeError, match="step 3 failed"), meshes.one_run():
        raise raised
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(meshes, "_again", "")
    with pytest.raises(ValueError, match="of its own"), meshes.one_run(resume=True):
        raise ValueError("an error of its own: barrier unavailable")
    for resume, match in [(False, "in every process again.$"), (True, r"again, with resume \(--resume\) to go on")]:
        with pytest.raises(RuntimeError, match=f"^another process of this run has ended.*{match}"):  # noqa: SIM117
            with meshes.one_run(), meshes.one_run(resume=resume):
                raise raised
