"""Every decoder, loss and training step lowers for CUDA and TPU, also on a machine that has neither."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import numerics, products
from jaxrl_llm.decoding import core
from jaxrl_llm.models import layers
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.training import policy, reward_fns, steps
from jaxrl_llm.training.policy import METHODS
from jaxrl_llm.training.preference import LOSSES, UnpairedBatch, preference_loss
from jaxrl_llm.training.rollout import Sampler
from tests.conftest import random_params
from tests.decoding.decoders import DECODERS
from tests.training.mesh_program import batches

PLATFORMS = ("cuda", "tpu")
# Of a size that no other test has: a program that was traced for a CPU is not taken again.
LM = GPT2(GPT2Config(vocab_size=67, n_positions=32, n_embd=16, n_layer=1, n_head=2))
OPTIMIZER = optax.sgd(0.1)


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch):
    """As on a machine whose backend is no CPU."""
    monkeypatch.setattr(numerics, "on_cpu", lambda: False)
    for module in (core, layers, products):
        monkeypatch.setattr(module, "on_cpu", lambda: False)


def lowered(function, *arguments):
    """The program for both platforms, as text; nothing is compiled."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=PLATFORMS).as_text()


def state(critic=None):
    """The shapes of a training state."""

    def begun(key):
        params = LM.init(key)
        params = params if critic is None else {"policy": params, "critic": critic.init(key, params)}
        return steps.initial_state(params, OPTIMIZER, key)

    return jax.eval_shape(begun, jax.random.key(0))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "beam")) for name in DECODERS if name != "stream"]
)
def test_every_decoder_lowers(name):
    options = {"max_new_tokens": 4, "eos_id": 3, "key": jax.random.key(0)}
    prompts = jnp.asarray([[1, 2, 3]])
    params = random_params(LM, dtype=jnp.bfloat16)
    text = lowered(lambda params: DECODERS[name](LM, params, prompts, **options), params)
    assert "stablehlo.while" in text


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "dpo")) for name in LOSSES])
def test_every_preference_loss_lowers_with_its_step(name):
    pairs, _ = batches()
    batch = pairs
    if name == "kto":
        batch = UnpairedBatch(pairs.chosen, np.arange(8) % 2 == 0, pairs.rejected)
    step = steps.make_step(preference_loss(LM, name), OPTIMIZER)
    frozen = steps.Frozen(LM.abstract_params)
    assert "dot_general" in step.trace(state(), batch, frozen).lower(lowering_platforms=PLATFORMS).as_text()


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "grpo")) for name in METHODS])
def test_every_online_step_lowers_with_its_rollout(name):
    _, prompts = batches()
    reward = reward_fns.of_tokens(lambda rows: jnp.where(rows.completion_mask, rows.tokens % 7, 0).sum(axis=1) * 1.0)
    critic = ScalarHead(LM) if METHODS[name].has_critic else None
    trainer = policy.online(LM, OPTIMIZER, critic=critic)

    def step(state, frozen):
        return trainer.step(state, prompts, reward, method=METHODS[name], sampler=Sampler(6), frozen=frozen)

    text = lowered(step, state(critic), steps.Frozen(LM.abstract_params))
    assert "stablehlo.while" in text


def test_the_forms_for_cpus_are_for_cpus_alone(monkeypatch):
    row, table = jnp.ones((1, 8), jnp.bfloat16), jnp.ones((67, 8), jnp.float32)
    assert not layers.is_one_bfloat16_row(row)
    assert "transpose" not in str(jax.make_jaxpr(layers.unembed)(jnp.ones((2, 8)), table))
    assert "argmax" in str(jax.make_jaxpr(core.greedy)(jnp.ones((2, 8))))
