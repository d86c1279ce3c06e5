"""One step: what accumulates, what is donated, what stays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import scoring
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.training import steps
from jaxrl_llm.training.preference import PairBatch, UnpairedBatch, preference_loss
from jaxrl_llm.training.reward_model import RankedBatch, reward_loss
from jaxrl_llm.training.steps import Frozen, Loss, compute_in
from jaxrl_llm.training.supervised import sft_loss
from tests.conftest import TINY, random_params

GPT2, TABLE = TINY["gpt2"], TINY["tabular"]
OPTIMIZER = optax.sgd(0.1)
KEY = jax.random.key(0)


def answers(lm=TABLE, count=8, seed=0):
    """Rows of very different lengths."""
    rng, length = np.random.default_rng(seed), min(12, lm.max_length)
    prompts = [rng.integers(0, lm.vocab_size, size).tolist() for size in rng.integers(1, 4, count)]
    given = [rng.integers(0, lm.vocab_size, size).tolist() for size in rng.integers(1, length - 2, count)]
    return jax.tree.map(np.asarray, scoring.pad_completions(prompts, given, length=length))


PAIRS = PairBatch(
    answers(seed=0), answers(seed=1), weight=np.random.default_rng(0).uniform(0.1, 2, 8).astype(np.float32)
)
RANKED = RankedBatch(
    jax.tree.map(lambda leaf: leaf.reshape(4, 3, -1), answers(count=12, seed=2)),
    np.asarray([[0, 1, 2], [1, 0, 0], [0, 1, 1], [2, 0, 1]]),
    np.asarray([[True, True, True], [True, True, False], [True, True, True], [True, False, True]]),
)
POLICY, REFERENCE = random_params(TABLE), random_params(TABLE, 1)
HEAD = ScalarHead(TABLE)
CASES = {
    "sft": (sft_loss(TABLE), answers(), POLICY),
    "sft by sequence": (sft_loss(TABLE, mode="sequence_mean"), answers(), POLICY),
    "reward": (reward_loss(HEAD, centering=0.1), RANKED, HEAD.init(KEY, POLICY)),
    "dpo": (preference_loss(TABLE, "dpo"), PAIRS, POLICY),
    "orpo": (preference_loss(TABLE, "orpo"), PAIRS, POLICY),
}


@pytest.mark.parametrize(("name", "microbatches"), [(name, 2 if place % 2 else 4) for place, name in enumerate(CASES)])
def test_parts_of_a_batch_add_up_to_the_whole(name, microbatches):
    """Though they hold different numbers of tokens."""
    loss, batch, params = CASES[name]
    found = []
    for parts in (1, microbatches):
        state = steps.initial_state(params, OPTIMIZER, KEY)
        found.append(steps.make_step(loss, OPTIMIZER, microbatches=parts)(state, batch, Frozen(ref=REFERENCE)))
    (whole, metrics), (added, added_metrics) = found
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), added.params, whole.params)
    assert added_metrics.keys() == metrics.keys()
    for metric, value in metrics.items():
        assert float(added_metrics[metric]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), metric


def test_a_metric_is_a_mean_over_what_its_weight_counts():
    """Tokens, though the loss is a mean over rows; a metric over nothing is 0."""

    def loss(params, rows, frozen, key):
        counts, tokens = rows
        metrics = {"token": (counts * tokens).sum() / counts.sum(), "row": tokens.mean(), "none": tokens.sum()}
        return Loss(params["w"] * tokens.mean(), tokens.shape[0], metrics, {"token": counts.sum(), "none": 0})

    rows, params = (np.asarray([1.0, 2, 3, 10]), np.asarray([1.0, 2, 3, 4])), {"w": jnp.ones(())}
    for parts in (1, 2, 4):
        step = steps.make_step(loss, OPTIMIZER, microbatches=parts)
        _, found = step(steps.initial_state(params, OPTIMIZER, KEY), rows)
        assert {name: float(value) for name, value in found.items()} == pytest.approx(
            {"loss": 2.5, "token": 54 / 16, "row": 2.5, "none": 0, "grad_norm": 2.5}
        )
    with pytest.raises(ValueError, match="weights must be of metrics, , but has kl"):
        Loss(jnp.ones(()), weights={"kl": 1}).totals()


def test_rows_that_the_parts_do_not_divide_are_refused():
    step = steps.make_step(sft_loss(TABLE), OPTIMIZER, microbatches=3)
    with pytest.raises(ValueError, match="a number of rows that 3 microbatches divide"):
        step(steps.initial_state(POLICY, OPTIMIZER, KEY), answers())


def test_the_state_is_donated_and_nothing_else():
    pairs, frozen = jax.tree.map(jnp.asarray, PAIRS), Frozen(ref=REFERENCE)
    state = steps.initial_state(POLICY, optax.adam(1e-2), KEY)
    new, _ = steps.make_step(preference_loss(TABLE, "dpo"), optax.adam(1e-2))(state, pairs, frozen)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    for kept in (POLICY, frozen, pairs):
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(kept))
    assert not KEY.is_deleted() and int(new.step) == 1


def test_without_a_copy_the_parameters_themselves_are_donated():
    params, step = {"w": jnp.ones(3)}, steps.make_step(lambda p, *_: Loss((p["w"] ** 2).sum()), OPTIMIZER)
    copied, _ = step(steps.initial_state(params, OPTIMIZER, jax.random.key(0)), None)
    given, _ = step(steps.initial_state(params, OPTIMIZER, jax.random.key(0), copy=False), None)
    assert params["w"].is_deleted()
    np.testing.assert_array_equal(given.params["w"], copied.params["w"])


def test_every_step_has_a_key_of_its_own_that_depends_on_seed_and_step():
    def loss(params, batch, frozen, key):
        return Loss(params["w"] ** 2, metrics={"drawn": jax.random.uniform(key)})

    step = steps.make_step(loss, OPTIMIZER)
    state, drawn = steps.initial_state({"w": jnp.ones(())}, OPTIMIZER, KEY), []
    for _ in range(3):
        state, metrics = step(state, None)
        drawn.append(float(metrics["drawn"]))
    expected = [float(jax.random.uniform(jax.random.fold_in(KEY, place))) for place in range(3)]
    assert drawn == expected and len(set(drawn)) == 3


def test_a_whole_run_is_a_function_of_its_key_and_maps_over_seeds():
    def initial(key):
        return steps.initial_state({"w": jax.random.normal(key, (3,))}, OPTIMIZER, key)

    def loss(params, batch, frozen, key):
        return Loss(jnp.square(params["w"] - jax.random.normal(key, (3,))).sum())

    run = steps.whole_run(initial, lambda state: steps.update(loss, OPTIMIZER, state, None), steps=5)
    keys = jax.random.split(KEY, 3)
    states, metrics = jax.jit(jax.vmap(run))(keys)
    assert metrics["loss"].shape == (3, 5)
    for place, key in enumerate(keys):
        state, alone = jax.jit(run)(key)
        np.testing.assert_allclose(states.params["w"][place], state.params["w"], rtol=1e-6)
        np.testing.assert_allclose(metrics["loss"][place], alone["loss"], rtol=1e-6)


@pytest.mark.parametrize(("lm", "microbatches"), [(TABLE, 1), (GPT2, 2)])
def test_bfloat16_computes_and_float32_remembers(lm, microbatches):
    """And of a GPT-2, parts of a batch add up to the whole."""
    loss, batch, begun = sft_loss(lm), answers(lm), random_params(lm)
    optimizer = optax.sgd(1e-4)  # steps far below bfloat16's spacing of 2⁻⁸
    plain = steps.make_step(loss, optimizer)
    narrow = steps.make_step(loss, optimizer, microbatches=microbatches, view=compute_in(jnp.bfloat16))
    states = [steps.initial_state(begun, optimizer, KEY) for _ in range(2)]
    for _ in range(3):
        (states[0], wide), (states[1], low) = plain(states[0], batch), narrow(states[1], batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(states[1].params)} == {jnp.dtype(jnp.float32)}
    assert float(low["loss"]) == pytest.approx(float(wide["loss"]), rel=0.02)
    flat = [
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(each)])
        for each in (begun, *(state.params for state in states))
    ]
    flat = [each - flat[0] for each in flat[1:]]
    cosine = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert cosine > 0.97, "small steps add up, and in the same direction"
    with pytest.raises(ValueError, match="dtype must be a floating type, but is int32"):
        compute_in(jnp.int32)


def test_parts_of_a_batch_of_kto_are_refused():
    """Its reference point is that of the whole batch."""
    batch = UnpairedBatch(answers(seed=0), np.arange(8) % 2 == 0, answers(seed=3))
    step = steps.make_step(preference_loss(TABLE, "kto"), OPTIMIZER, microbatches=2)
    with pytest.raises(ValueError, match="microbatches must be 1 for a loss that compares with all rows"):
        step(steps.initial_state(POLICY, OPTIMIZER, KEY), batch, Frozen(ref=REFERENCE))
