"""Attention by NVIDIA's cuDNN: against the exact form, lowered for CUDA, and where it is refused."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrl_llm as jl
from jaxrl_llm import models, numerics, products
from jaxrl_llm.analysis import landscape
from jaxrl_llm.decoding import core
from jaxrl_llm.models import GPT2, Config, Decoder, GPT2Config, layers
from jaxrl_llm.models.decoder import with_attention
from jaxrl_llm.scoring import Sequences
from jaxrl_llm.training import config, steps
from jaxrl_llm.training.config import SFTConfig
from jaxrl_llm.training.preference import PairBatch, preference_loss
from jaxrl_llm.training.supervised import sft_loss
from tests.conftest import TINY_T5, random_params
from tests.models import cudnn

ROOT = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(0)
BATCH, HEADS, KEYS, SIZE = 3, 4, 2, 8


@pytest.fixture
def _gpu(monkeypatch):
    cudnn.pretend(monkeypatch.setattr)


# Values ---------------------------------------------------------------------------------------------------------------


def drawn(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def causal(time, slots, *, window=100, left=(0, 0, 0)):
    """The last `time` of `slots` tokens, which see those from `left` on, and at most `window` of them."""
    query, slot = np.arange(slots - time, slots)[:, None], np.arange(slots)
    seen = (slot <= query) & (slot > query - window)
    return jnp.asarray(seen & (slot >= np.asarray(left)[:, None, None]))


def alibi(time, slots):
    distance = np.arange(slots) - np.arange(slots - time, slots)[:, None]
    return jnp.asarray(np.asarray([0.5, 0.25, 0.125, 0.0625])[None, :, None, None] * distance, jnp.float32)


CASES = {  # time, slots, and the options
    "causal": (10, 10, {"mask": causal(10, 10)}),
    "odd numbers of queries and slots": (7, 11, {"mask": causal(7, 11)}),
    "queries that attend to nothing": (9, 9, {"mask": causal(9, 9, left=(0, 3, 8))}),
    "a window": (9, 9, {"mask": causal(9, 9, window=3, left=(0, 5, 1))}),
    "a bias": (9, 9, {"mask": causal(9, 9, left=(0, 3, 8)), "bias": alibi(9, 9)}),
    "a bias of each row": (6, 8, {"mask": causal(6, 8), "bias": drawn(BATCH, HEADS, 6, 8)}),
    "one mask for all queries": (5, 8, {"mask": causal(8, 8, left=(0, 3, 8))[:, -1:]}),
}


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_exact_form(name, chunked, monkeypatch):
    """In float32, by JAX's own reference of the same function; also of the bias, and of grouped heads."""
    time, slots, options = CASES[name]
    given = drawn(BATCH, HEADS, time, SIZE), drawn(BATCH, KEYS, slots, SIZE), drawn(BATCH, KEYS, slots, SIZE)
    given = (*given, options.get("bias"))
    weight = drawn(BATCH, time, HEADS * SIZE)
    if chunked:
        monkeypatch.setattr(layers, "CHUNK_SCORES", 3 * BATCH * HEADS * slots)

    def found(attention):
        def total(query, key, value, bias):
            mixed = attention(query, (key, value), options["mask"], scale=0.4, bias=bias)
            return (weight * mixed).sum(), mixed

        argnums = (0, 1, 2) if given[3] is None else (0, 1, 2, 3)
        return jax.jit(jax.value_and_grad(total, argnums, has_aux=True))(*given)

    fused = found(functools.partial(layers.fused_attention, implementation="xla"))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, fused, found(layers.attention))


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("form", layers.FORMS)
def test_queries_that_attend_to_nothing_have_uniform_weights_and_finite_gradients(form):
    """With cuDNN's operands in bfloat16, where a masked score is −2^41, and an odd number of slots."""
    query, key, value = (drawn(1, 2, 5, SIZE).astype(jnp.bfloat16) for _ in range(3))
    mask = causal(5, 5, left=(4,))
    bias = 100 * drawn(1, 2, 5, 5)

    def mixed(query, key, value):
        return layers.attention(query, (key, value), mask, scale=1.0, bias=bias, form=form).astype(jnp.float32)

    found, pull = jax.vjp(mixed, query, key, value)
    mean = np.asarray(value, float).mean(axis=2).reshape(-1)
    np.testing.assert_allclose(found[0, :4], np.broadcast_to(mean, (4, 2 * SIZE)), atol=0.02)
    of_query, of_key, of_value = (np.asarray(each, float) for each in pull(jnp.ones_like(found)))
    assert not of_query.any() and not of_key.any(), "weights that are uniform, or of one slot, do not depend on them"
    np.testing.assert_allclose(of_value[0, :, :4], 0.8, atol=0.01)
    np.testing.assert_allclose(of_value[0, :, 4], 1.8, atol=0.01)


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("checkpoint_blocks", [False, True])
@pytest.mark.parametrize("name", cudnn.MODELS)
def test_loss_and_gradient_of_a_model_are_those_of_the_exact_form(name, checkpoint_blocks):
    """In bfloat16, up to a few roundings; the rows are padded on the left."""
    exact = cudnn.MODELS[name]
    params = cudnn.parameters(exact)
    fused = dataclasses.replace(exact, attention_form="cudnn", checkpoint_blocks=checkpoint_blocks)
    expected, found = (cudnn.loss_and_gradient(lm, params, cudnn.rows()) for lm in (exact, fused))
    assert abs(found[0] - expected[0]) < 1e-3 * abs(expected[0])
    assert 0 < cudnn.distance(found[1], expected[1]) < 0.01


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("name", cudnn.MODELS)
def test_prompts_are_read_in_the_fused_form_and_tokens_in_the_exact_one(name):
    lm = with_attention(cudnn.MODELS[name], "cudnn")
    params, tokens = cudnn.parameters(lm), cudnn.rows().tokens
    cache = lm.init_cache(8, 12, dtype=jnp.bfloat16)

    def calls(function, *given):
        return str(jax.make_jaxpr(function)(*given)).count("dot_product_attention_fwd_wrapper[")

    hidden, cache = lm.hidden(params, tokens, cache)
    expected, _ = cudnn.MODELS[name].hidden(params, tokens)
    np.testing.assert_allclose(hidden, expected, atol=0.05 * float(jnp.abs(expected).max()))
    assert calls(lambda tokens: lm.hidden(params, tokens)[0], tokens) == 2
    assert calls(lambda cache: lm.hidden(params, tokens, cache)[0], lm.init_cache(8, 12, dtype=jnp.bfloat16)) == 2
    assert calls(lambda cache: lm.hidden(params, tokens[:, :1], cache)[0], cache) == 0
    assert calls(lambda tokens: lm.attention(params, tokens), tokens) == 0


@pytest.mark.slow
def test_a_mesh_has_the_loss_and_the_gradient_of_one_device():
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    environment = {**os.environ, "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "tests.models.cudnn"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == len(cudnn.MODELS) * len(cudnn.MESHES)
    assert all(abs(each["loss"]) < 0.1 and each["d"] < 0.005 for each in found), found


# The program for CUDA -------------------------------------------------------------------------------------------------

TIME = 26  # read by the model, of which nothing else has this size
GPT = GPT2(GPT2Config(vocab_size=67, n_positions=32, n_embd=16, n_layer=2, n_head=2))
QWEN = Decoder(cudnn.QWEN.replace(vocab_size=67, hidden_size=16))
SCORES = re.compile(rf"dot_general.* -> tensor<(?:\d+x)*{TIME}x{TIME}xf32>")
CALLS = re.compile(r"custom_call @__cudnn\$(\w+)")


def batch_of(kind):
    time = jnp.arange(TIME + 1)  # the last token is not read
    tokens, real = jnp.ones((4, TIME + 1), jnp.int32), time >= jnp.arange(4)[:, None]
    rows = Sequences(tokens, real, real & (time > 5))
    return PairBatch(rows, rows) if kind == "dpo" else rows


def step_for_cuda(lm, kind):
    """The program of a step in bfloat16 on weights in float32, of a model with two layers."""
    view = steps.compute_in("bfloat16")
    loss = preference_loss(lm, "dpo") if kind == "dpo" else sft_loss(lm)
    step = steps.make_step(loss, optax.sgd(0.1), view=view)
    begun = lambda key: steps.initial_state(lm.init(key), optax.sgd(0.1), key)  # noqa: E731
    frozen = jax.eval_shape(lambda key: steps.Frozen(view(lm.init(key), None)), jax.random.key(0))
    traced = step.trace(jax.eval_shape(begun, jax.random.key(0)), batch_of(kind), frozen)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("kind", ["dpo", "sft"])
@pytest.mark.parametrize("lm", [GPT, QWEN], ids=["gpt2", "qwen3"])
def test_a_step_for_cuda_calls_cudnn_and_multiplies_no_scores(lm, kind, monkeypatch):
    for module in (core, layers, products, numerics):
        monkeypatch.setattr(module, "on_cpu", lambda: False)
    assert len(SCORES.findall(step_for_cuda(lm, kind))) >= 4, "the exact form does"
    text = step_for_cuda(with_attention(lm, "cudnn"), kind)
    assert not SCORES.findall(text)
    calls = CALLS.findall(text)
    assert calls.count("fmhaScaleBiasSoftmaxBackward") == 2
    assert calls.count("fmhaScaleBiasSoftmax") == (4 if kind == "dpo" else 2), "of the reference too"


# The choice -----------------------------------------------------------------------------------------------------------

SMALL = {**cudnn.SIZES, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
GEMMA = Config("gemma2", **SMALL, head_dim=8)
NARROW = "needs parameters in bfloat16 or float16, but they are in float32"
HEAD = "a head dimension that is a multiple of 8 and at most"
REFUSED = {
    "no GPU": (None, lambda: with_attention(GPT, "cudnn"), "needs an NVIDIA GPU .* but programs run on cpu"),
    "an old GPU": ((7, 5), lambda: with_attention(GPT, "cudnn"), "compute capability 8.0 or above, but it has 7.5"),
    "a cap": ((9, 0), lambda: Decoder(GEMMA, attention_form="cudnn"), "without a cap on scores, but its cap is 50"),
    "odd heads": ((9, 0), lambda: of_width(12), f"{HEAD} 256 on this GPU, but it is 12"),
    "wide heads, Hopper": ((9, 0), lambda: of_width(264), f"{HEAD} 256 on this GPU, but it is 264"),
    "wide heads, Ampere": ((8, 0), lambda: of_width(256), f"{HEAD} 128 on this GPU, but it is 256"),
    "wide heads, Blackwell": ((10, 0), lambda: of_width(256), f"{HEAD} 128 on this GPU, but it is 256"),
    "an unknown form": ((9, 0), lambda: with_attention(GPT, "flash"), "one of exact, cudnn, but is 'flash'"),
    "T5": ((9, 0), lambda: with_attention(TINY_T5, "cudnn"), 'must be "exact" for a T5, but is "cudnn"'),
    "T5 from a file": (
        (9, 0),
        lambda: models.load("tiny-t5", dtype="bfloat16", attention="cudnn"),
        'must be "exact" for a T5, but is "cudnn"',
    ),
    "float32": (
        (9, 0),
        lambda: jl.load("tiny-gpt2", attention="cudnn"),
        NARROW,
    ),
    "float32 parameters of a model": (
        (9, 0),
        lambda: with_attention(GPT, "cudnn").hidden(random_params(GPT), jnp.ones((1, 4), jnp.int32)),
        NARROW,
    ),
    "no GPU, from a file": (
        None,
        lambda: jl.load("tiny-gpt2", dtype="bfloat16", attention="cudnn"),
        "needs an NVIDIA GPU .* but programs run on cpu",
    ),
    "training in float32": (None, lambda: SFTConfig(attention="cudnn"), "dtype must be bfloat16 for attention cudnn"),
    "training without a GPU": (
        None,
        lambda: jl.train.sft("tiny-gpt2", [{"text": "a"}], attention="cudnn", dtype="bfloat16"),
        "needs an NVIDIA GPU .* but programs run on cpu",
    ),
    "an unknown form in training": (None, lambda: SFTConfig(attention="flash"), "one of exact, cudnn, but is 'flash'"),
}


def of_width(size):
    return Decoder(Config("llama", **SMALL, head_dim=size), attention_form="cudnn")


@pytest.mark.parametrize("version, capability", [("PJRT C API\ncuda 12090", (12, 1)), ("PJRT C API\nrocm 60300", None)])
def test_the_compute_capability_is_that_of_nvidias_gpus(version, capability, monkeypatch):
    device = types.SimpleNamespace(client=types.SimpleNamespace(platform_version=version), compute_capability="12.1")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert layers.compute_capability() == capability


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_have_it_is_refused(name, monkeypatch):
    capability, choose, sentence = REFUSED[name]
    if capability is not None:
        monkeypatch.setattr(layers, "compute_capability", lambda: capability)
    with pytest.raises(ValueError, match=sentence):
        choose()


@pytest.mark.usefixtures("_gpu")
def test_the_choice_is_the_models():
    assert get_args(config.Attention) == layers.FORMS
    lm = jl.load("tiny-gpt2", dtype="bfloat16", attention="cudnn")
    assert lm.model.attention_form == "cudnn"
    texts = [lm.generate("I have a dream", greedy=True, max_new_tokens=4)[0].text]
    texts += [jl.load("tiny-gpt2", dtype="bfloat16").generate("I have a dream", greedy=True, max_new_tokens=4)[0].text]
    assert texts[0] == texts[1]
    assert np.isfinite(lm.log_probs("I have a dream")).all()
    assert of_width(256).attention_form == "cudnn", "on Hopper"
    exact = landscape.next_token_loss(with_attention(lm.model, "exact"), jnp.ones((1, 4), jnp.int32))
    assert landscape.next_token_loss(lm.model, jnp.ones((1, 4), jnp.int32)) == exact, "it has second derivatives"


ROWS = [{"prompt": f"Say {i}:", "completion": " it is " * (i % 3 + 1)} for i in range(8)]
PAIRS = [{"prompt": f"Say {i}:", "chosen": " yes", "rejected": " no, " * (i % 2 + 1)} for i in range(8)]
ONLINE = {"max_new_tokens": 4, "group_size": 2, "reward": lambda prompts, completions: [len(c) for c in completions]}
RUNS = {
    "sft": ("sft", ROWS, {"eval_data": ROWS, "packing": True, "max_length": 12, "lora_rank": 2}),
    "dpo": ("dpo", PAIRS, {"eval_data": PAIRS, "reference": "given"}),
    "ahead": ("dpo", PAIRS, {"precompute_reference": True, "microbatches": 2}),
    "narrow": ("dpo", PAIRS, {"param_dtype": "bfloat16", "checkpoint_blocks": True}),
    "reward": ("reward", PAIRS, {}),
    "distill": ("distill", ROWS, {"teacher": "given", "on_policy": 0.5, "max_new_tokens": 4}),
    "grpo": ("grpo", ROWS, ONLINE | {"eval_data": ROWS}),
    "ppo": ("ppo", ROWS, ONLINE | {"epochs": 1}),
}
TINY = GPT2(GPT2Config(vocab_size=4096, n_positions=64, n_embd=16, n_layer=1, n_head=2))
STEPS = {"steps": 2, "batch_size": 4, "log_every": 1, "save_every": 1, "schedule": "constant", "warmup": 0}


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "dpo")) for name in RUNS])
def test_a_run_in_the_fused_form_writes_the_files_of_one_in_the_exact_form(name, tmp_path, monkeypatch):
    """With the same losses up to roundings; what began in the one form can go on in the other."""
    trainer, data, options = RUNS[name]
    model = models.Loaded(TINY, TINY.init(jax.random.key(0)), jl.load("tiny-gpt2").tokenizer, {"eos_token_id": 0})
    others = {each: model for each in ("reference", "teacher") if each in options}
    options = STEPS | {"dtype": "bfloat16", "verbose": False} | options | others
    run = functools.partial(getattr(jl.train, trainer), model, data)
    calls, whole, losses, files = [], layers.fused_attention, [], []
    monkeypatch.setattr(layers, "fused_attention", lambda *given, **named: calls.append(1) or whole(*given, **named))
    for form in layers.FORMS:
        out = tmp_path / form
        run(out=out, attention=form, **options)
        assert bool(calls) == (form == "cudnn")
        losses.append([json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()])
        paths = [path.relative_to(out).parts for path in out.rglob("*") if path.is_file()]
        files.append({path[:4] for path in paths})  # below, a checkpoint's files have random names
        assert json.loads((out / "run.json").read_text())["attention"] == form
    np.testing.assert_allclose(*losses, rtol=0.02, atol=0.02)
    assert files[0] == files[1]
    run(out=out, attention="exact", **options | {"steps": 3, "resume": True})


@pytest.mark.usefixtures("_gpu")
def test_a_model_in_memory_is_trained_in_the_form_that_is_asked_for(capsys):
    lm = jl.load("tiny-gpt2", dtype="bfloat16", attention="cudnn")
    tuned = jl.train.sft(lm, ROWS, **STEPS)
    assert "attention in training is exact, as its option says; the model's own is cudnn." in capsys.readouterr().out
    assert tuned.model.attention_form == "exact", "its weights are in float32"
    narrow = {"dtype": "bfloat16", "param_dtype": "bfloat16", "attention": "cudnn"}
    tuned = jl.train.sft(lm, ROWS, **STEPS, **narrow)
    assert "in training" not in capsys.readouterr().out
    assert tuned.model.attention_form == "cudnn" and np.isfinite(tuned.log_probs("I have a dream")).all()
