"""Mixed precision: of bfloat16 parameters every matrix product, forward and backward, is of bfloat16 operands."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import products, scoring
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config
from jaxrl_llm.models.lora import lora
from jaxrl_llm.products import product, ragged_product, rows_at
from jaxrl_llm.training import steps
from jaxrl_llm.training.preference import PairBatch, preference_loss
from jaxrl_llm.training.steps import compute_in
from jaxrl_llm.training.supervised import sft_loss
from tests.conftest import TINY, TINY_T5, random_params
from tests.models.test_conformance import MODELS

U = 2.0**-8  # the most by which rounding to bfloat16 changes a number, relatively
LINEAR = ("ni,io->no", (5, 7), (7, 3))
EQUATIONS = {
    "linear": LINEAR,
    "unembedding": ("nd,vd->nv", (5, 7), (9, 7)),
    "scores": ("bkgtd,bksd->bkgts", (2, 3, 2, 4, 5), (2, 3, 6, 5)),
    "values": ("bkgts,bksd->bkgtd", (2, 3, 2, 4, 6), (2, 3, 6, 5)),
}


def drawn(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]


def assert_rounded_twice(found, equation, *given):
    """Each entry of a gradient Σ c y is within 2u Σ |c y|: the cotangent is rounded, and the sum."""
    given = [np.asarray(each, np.float64) for each in given]
    exact, size = np.einsum(equation, *given), np.einsum(equation, *map(np.abs, given))
    assert found.dtype == jnp.bfloat16
    assert (np.abs(np.asarray(found, np.float64) - exact) <= 2.01 * U * size + 1e-6).all()


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize("name", EQUATIONS)
def test_gradients_are_of_rounded_cotangents_and_summed_in_float32(name, cpu, monkeypatch):
    monkeypatch.setattr(products, "on_cpu", lambda: cpu)
    equation, *shapes = EQUATIONS[name]
    (left, right), result = equation.split("->")[0].split(","), equation.split("->")[1]
    x, y = drawn(*shapes)
    value, pull = jax.vjp(functools.partial(product, equation), x, y)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, np.einsum(equation, np.float64(x), np.float64(y)), rtol=1e-5, atol=1e-5)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=value.shape), jnp.float32)
    of_x, of_y = jax.jit(pull)(cotangent)
    assert_rounded_twice(of_x, f"{result},{right}->{left}", cotangent, y)
    assert_rounded_twice(of_y, f"{left},{result}->{right}", x, cotangent)


def test_experts_and_batches_of_products_are_products():
    """Rows 0 and 1 of the first expert, none of the second, 2 to 4 of the third; and under `vmap` and `checkpoint`."""
    (x, _), (kernel,) = drawn(*LINEAR[1:]), drawn((3, 7, 3))
    weight, of = jnp.arange(15.0).reshape(5, 3) - 6, functools.partial(product, LINEAR[0])

    def one(x, kernel):
        return (weight[:2] * of(x[:2], kernel[0])).sum() + (weight[2:] * of(x[2:], kernel[2])).sum()

    def ragged(x, kernel):
        return (weight * ragged_product(x, kernel, jnp.asarray([2, 0, 3]))).sum()

    expected = jax.jit(jax.grad(one, (0, 1)))(x, kernel)
    for each in (ragged, jax.checkpoint(one)):
        jax.tree.map(np.testing.assert_array_equal, jax.jit(jax.grad(each, (0, 1)))(x, kernel), expected)
    both = jax.jit(jax.vmap(jax.grad(one, (0, 1))))(jnp.stack([x, 2 * x]), jnp.stack([kernel, kernel]))
    jax.tree.map(lambda leaf, alone: np.testing.assert_array_equal(leaf[0], alone), both, expected)


def test_gradients_of_many_uses_are_summed_in_float32(monkeypatch):
    """1024 times 1: in bfloat16 the sum would stop at 256. Of an embedding's row, and of a head over chunks."""
    table = jnp.ones((3, 2), jnp.bfloat16)
    found = jax.grad(lambda table: rows_at(table, jnp.ones(1024, jnp.int32)).sum())(table)
    np.testing.assert_array_equal(found, [[0, 0], [1024, 1024], [0, 0]])
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 3)
    summed = jax.jit(jax.grad(lambda table: scoring.by_chunks(of_rows, 3, table, jnp.ones((1, 1024, 2))).sum()))
    np.testing.assert_array_equal(summed(table), np.full((3, 2), 1024))


def of_rows(table, hidden):
    return product("nd,vd->nv", hidden[0].astype(table.dtype), table).sum(axis=-1)[None]


def rows_of(lm, count=4, length=9):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, lm.vocab_size, (count, length)), jnp.int32)
    real = jnp.ones(tokens.shape, bool)
    return scoring.Sequences(tokens, real, real & (jnp.arange(length) > 2))


def losses(name):
    """A loss of parameters, and random ones."""
    if name == "t5":
        source = jnp.asarray([[3, 1, 4, 1, 5]] * 4)
        return lambda params: -scoring.log_probs(*TINY_T5.start(params, source), rows_of(TINY_T5)).sum(), TINY_T5
    lm = MODELS[name]
    return lambda params: -scoring.log_probs(lm, params, rows_of(lm)).sum(), lm


def cast(params, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


DOT = re.compile(r"(?:dot_general|ragged_dot).*: \(([^)]*)\) -> ")
FAMILIES = ["gpt2", "windows", "t5", "experts", "llama"]  # "windows" is Gemma 2


@pytest.mark.parametrize("name", FAMILIES)
def test_no_product_of_a_bfloat16_step_has_float32_operands(name):
    loss, lm = losses(name)
    params = jax.eval_shape(lambda: cast(random_params(lm), jnp.bfloat16))
    text = jax.jit(jax.grad(loss)).trace(params).lower(lowering_platforms=("cuda",)).as_text()
    operands = DOT.findall(text)
    assert len(operands) > 20
    assert not [each for each in operands if "f32" in each]


def test_nor_has_one_of_adapters_with_dropout():
    lm = TINY["llama"]
    adapters = lora(lm, rank=2, dropout=0.1)

    def loss(adapter, base):
        params = compute_in("bfloat16")(adapters.merge(base, adapter, jax.random.key(0)), None)
        return scoring.log_probs(lm, params, rows_of(lm)).sum()

    text = jax.jit(jax.grad(loss)).lower(adapters.init(jax.random.key(0)), random_params(lm)).as_text()
    assert not [each for each in DOT.findall(text) if "f32" in each]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "gpt2")) for name in FAMILIES])
def test_gradients_differ_from_those_of_float32_by_roundings(name):
    """At fresh weights, which do not amplify them: independent, each of at most u/2 in the mean, one a product.

    So the sum of all is u/2 √(number of products) at most.
    """
    loss, lm = losses(name)
    params = lm.init(jax.random.key(0))
    narrow, wide = (jax.jit(jax.grad(loss))(cast(params, dtype)) for dtype in (jnp.bfloat16, jnp.float32))
    narrow, wide = (
        np.concatenate([np.ravel(leaf).astype(float) for leaf in jax.tree.leaves(each)]) for each in (narrow, wide)
    )
    count = len(DOT.findall(jax.jit(jax.grad(loss)).lower(cast(params, jnp.bfloat16)).as_text()))
    assert np.linalg.norm(narrow - wide) < U / 2 * count**0.5 * np.linalg.norm(wide)


CURVE_LM = GPT2(GPT2Config(vocab_size=48, n_positions=16, n_embd=64, n_layer=2, n_head=4))


def counting(seed, count=16, length=16):
    """Rows that count up from a random number, of which some go astray; the first two tokens are the prompt."""
    rng = np.random.default_rng(seed)
    tokens = (rng.integers(0, 48, (count, 1)) + np.arange(length)) % 48
    tokens = jnp.asarray(np.where(rng.random(tokens.shape) < 0.1, rng.integers(0, 48, tokens.shape), tokens), jnp.int32)
    real = jnp.ones(tokens.shape, bool)
    return scoring.Sequences(tokens, real, real & (jnp.arange(length) > 1))


def astray(seed):
    """The same prompts, with random answers."""
    rows = counting(seed)
    noise = jax.random.randint(jax.random.key(seed), rows.tokens.shape, 0, 48)
    return rows._replace(tokens=jnp.where(rows.completion_mask, noise, rows.tokens))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_the_loss_falls_in_bfloat16_as_it_does_in_float32(name):
    """Over 60 steps, as means over 5, the curves differ by less than a hundredth of the fall."""
    loss = sft_loss(CURVE_LM) if name == "sft" else preference_loss(CURVE_LM, "dpo", beta=0.1)
    start, optimizer, curves = CURVE_LM.init(jax.random.key(0)), optax.adamw(1e-3), {}
    for dtype in ("float32", "bfloat16"):
        view = compute_in(dtype)
        step = steps.make_step(loss, optimizer, view=view)
        state, curves[dtype] = steps.initial_state(start, optimizer, jax.random.key(1)), []
        for place in range(60):
            batch = counting(place) if name == "sft" else PairBatch(counting(place), astray(place))
            state, metrics = step(state, batch, steps.Frozen(ref=view(start, None)))
            curves[dtype].append(float(metrics["loss"]))
    wide, narrow = (np.mean(np.reshape(curves[dtype], (12, 5)), axis=1) for dtype in ("float32", "bfloat16"))
    assert np.abs(narrow - wide).max() < 0.01 * (wide[0] - wide[-1])
