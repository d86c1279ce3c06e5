"""One step: what accumulates, what is donated, what stays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import scoring
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.models.lora import lora
from jaxrl_llm.training import steps
from jaxrl_llm.training.config import OPTIMIZERS, Config
from jaxrl_llm.training.preference import PairBatch, UnpairedBatch, preference_loss
from jaxrl_llm.training.reward_model import RankedBatch, reward_loss
from jaxrl_llm.training.steps import Frozen, Loss, compute_in
from jaxrl_llm.training.supervised import sft_loss
from tests.conftest import TINY, TINY_T5, first_quick, random_params

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


@pytest.mark.parametrize(
    ("name", "microbatches"), first_quick([(name, 4 - 2 * (place % 2)) for place, name in enumerate(CASES)])
)
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


@pytest.mark.parametrize(("lm", "microbatches"), first_quick([(GPT2, 2), (TABLE, 1)]))
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


# Learning rates and optimisers ----------------------------------------------------------------------------------------


def test_schedules_warm_up_to_the_peak_and_decay():
    at = lambda name, warmup, *places: [  # noqa: E731
        float(steps.schedule_of(name, 2.0, steps=10, warmup=warmup)(place)) for place in places
    ]
    assert at("linear", 0.2, 0, 1, 2, 6, 10) == pytest.approx([1, 1.5, 2, 1, 0])
    assert at("linear", 2, 0, 1, 2, 6, 10) == pytest.approx([1, 1.5, 2, 1, 0]), "as many steps as a share of them"
    assert at("linear", 0, 0, 5, 10) == pytest.approx([2, 1, 0])
    assert at("cosine", 0.2, 2, 4, 6, 10) == pytest.approx([2, 1 + np.cos(np.pi / 4), 1, 0])
    assert at("constant", 4, 0, 4, 10, 1000) == pytest.approx([0.5, 2, 2, 2])
    assert at("inverse_sqrt", 4, 0, 4, 16, 100) == pytest.approx([0.5, 2, 1, 0.4])
    for name in ("constant", "inverse_sqrt"):  # a run of 10 steps that is made longer goes on
        assert at(name, 20, 0, 10, 20) == pytest.approx([0.1, 1.05, 2])
    assert steps.warmup_steps(0.99, 3) == steps.warmup_steps(7, 3) == 2, "the last step is at the peak"
    with pytest.raises(ValueError, match="the schedule must be one of linear, cosine, constant, inverse_sqrt, but is"):
        steps.schedule_of("step", 1.0, steps=2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_descends_and_takes_its_hyperparameters(name):
    target = {"layer": {"kernel": jax.random.normal(KEY, (4, 4)), "bias": jnp.ones(4)}}

    def loss(params, *_):
        return Loss(sum(jnp.square(a - b).sum() for a, b in zip(*map(jax.tree.leaves, (params, target)), strict=True)))

    found = []
    for given in ({}, dict.fromkeys(OPTIMIZERS[name][:1], 0.5)):
        optimizer = steps.optimizer_of(name, 0.2, clip_norm=10.0, **given)
        state = steps.initial_state(jax.tree.map(jnp.zeros_like, target), optimizer, KEY)
        step = steps.make_step(loss, optimizer)
        losses = []
        for _ in range(8):
            state, metrics = step(state, None)
            losses.append(float(metrics["loss"]))
        assert losses[-1] < losses[0] - 1
        found.append(losses)
    assert found[0] != found[1], "the hyperparameter counts"
    with pytest.raises(
        ValueError, match=f"the optimizer {name} has no nu: its hyperparameters are {OPTIMIZERS[name][0]}"
    ):
        steps.optimizer_of(name, 0.1, nu=1.0)


@pytest.mark.parametrize(
    "lm", [TINY["gpt2"], TINY["llama"], TINY["stablelm"], TINY_T5, HEAD, lora(TINY["gpt2"], rank=2)]
)
def test_weight_decay_is_not_on_norms_biases_and_embeddings(lm):
    found = jax.tree_util.tree_leaves_with_path(steps.decayed(jax.eval_shape(lm.init, KEY)))
    spared = ("norm", "ln_", "bias", "embed", "wte", "wpe", "shared")
    for path, counted in found:
        assert counted != any(word in str(path).lower() for word in spared), path


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_leaves_all_but_the_weights_alone(name):
    """With a gradient of 0; only adam divides what is added to the gradient by its size."""
    optimizer = steps.optimizer_of(name, 0.1, weight_decay=0.5)
    params = {"wte": {"embedding": 2.0}, "ln": {"scale": 2.0, "bias": 2.0}, "attn": {"kernel": 2.0, "bias": 2.0}}
    params = jax.tree.map(lambda value: jnp.full((3, 3), value), params)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    moved = updates["attn"].pop("kernel")
    np.testing.assert_allclose(moved, -0.1 if name == "adam" else -0.1 * 0.5 * 2, rtol=1e-5)
    assert not any(bool((update != 0).any()) for update in jax.tree.leaves(updates))


def test_an_unknown_optimizer_or_a_warmup_that_is_neither_is_refused():
    for options, said in (
        ({"optimizer": "rmsprop"}, "optimizer must be one of adamw, adam, sgd"),
        ({"optimizer_kwargs": {"beta2": 0.9}}, "the optimizer adamw has no beta2: its hyperparameters are b1, b2, eps"),
        ({"warmup": 1.5}, "warmup must be a share below 1 or a whole number of steps, but is 1.5"),
        ({"param_dtype": "bfloat16"}, "dtype must be bfloat16 if param_dtype is, but is float32"),
        ({"schedule": "step"}, "schedule must be one of linear, cosine"),
    ):
        with pytest.raises(ValueError, match=said):
            Config(**options)


def test_bfloat16_parameters_have_wide_moments_and_small_steps_add_up():
    """A weight of 1 and steps of 2⁻¹², a 16th of the spacing below it: rounded to the nearest, it would never move."""
    optimizer, count, done = optax.adam(2.0**-12), 4096, 64
    state = steps.initial_state({"w": jnp.ones(count, jnp.bfloat16)}, optimizer, KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == {jnp.dtype(jnp.float32)}
    step = steps.make_step(lambda params, *_: Loss(params["w"].astype(jnp.float32).sum()), optimizer)
    for _ in range(done):
        state, _ = step(state, None)
    moved = 1 - np.asarray(state.params["w"], float)
    assert state.params["w"].dtype == jnp.bfloat16
    error = (moved.mean() - done * 2.0**-12) / (moved.std() / np.sqrt(count))
    assert abs(error) < 4


def test_bfloat16_parameters_save_memory():
    """Of a step's arguments: 2 + 8 bytes of each parameter instead of 4 + 8."""

    def size(params):
        state = jax.eval_shape(lambda: steps.initial_state(params, optax.adam(1e-3), KEY))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state._replace(key=None)))

    wide = {"w": jnp.ones((64, 64))}
    assert size(compute_in("bfloat16")(wide, None)) / size(wide) == pytest.approx(10 / 12, rel=1e-3)
