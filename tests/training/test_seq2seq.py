"""Training on pairs of source and target: only targets count, padding changes nothing, and it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.models import GPT2, T5, GPT2Config, T5Config
from jaxrl_llm.training import supervised
from jaxrl_llm.training.steps import initial_state

pytestmark = pytest.mark.slow

VOCAB, EOS = 13, 1
MODELS = {
    "t5": T5(T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)),
    "gpt2": GPT2(GPT2Config(vocab_size=VOCAB, n_positions=24, n_embd=16, n_layer=1, n_head=2)),
}
OPTIMIZER = optax.adam(1e-2)
RNG = np.random.default_rng(0)
SOURCES = [[*RNG.integers(3, VOCAB, length).tolist(), 2] for length in RNG.integers(1, 6, 40)]
TARGETS = [[*reversed(source[:-1]), EOS] for source in SOURCES]  # the source read backwards


@pytest.fixture(params=sorted(MODELS))
def model(request):
    return MODELS[request.param]


@functools.cache
def initial(model, seed=0, factor=1.0):
    return jax.tree.map(lambda leaf: factor * leaf, model.init(jax.random.key(seed)))


loss_of = jax.jit(supervised.pair_loss, static_argnums=0)
FIVE = [4, 4, 4, 2, 2]  # lengths of the sources below: two shapes, so that little is compiled
PAIRS = [[*RNG.integers(3, VOCAB, length).tolist(), 2] for length in FIVE], [[5, 6, EOS]] * 3 + [[7, EOS]] * 2


@functools.cache
def alone(model):
    """log p of each target token, in float64, of every pair by itself, without padding."""

    @jax.jit
    def logits(params, source, target):
        if not isinstance(model, T5):
            return model.apply(params, jnp.concatenate([source, target[:, :-1]], axis=1))[0][:, source.shape[1] - 1 :]
        lm, given = model.start(params, source)
        return lm.apply(given, jnp.concatenate([jnp.zeros((1, 1), int), target[:, :-1]], axis=1))[0]

    rows = []
    for source, target in zip(*PAIRS, strict=True):
        z = np.asarray(logits(initial(model), jnp.asarray([source]), jnp.asarray([target]))[0], np.float64)
        rows.append(z[np.arange(len(target)), target] - np.log(np.exp(z).sum(axis=-1)))
    return rows


# The loss -------------------------------------------------------------------------------------------------------------


def test_log_probs_are_those_of_each_pair_alone(model):
    batch = supervised.pad_pairs(*PAIRS, multiple=8)
    log_probs = np.asarray(jax.jit(supervised.target_log_probs, static_argnums=0)(model, initial(model), batch))
    assert log_probs.shape == batch.target.shape == (5, 8)
    for row, expected in zip(log_probs, alone(model), strict=True):
        np.testing.assert_allclose(row[: len(expected)], expected, rtol=0, atol=1e-5)


def test_the_loss_is_the_mean_over_target_tokens_with_their_end(model):
    every = np.concatenate(alone(model))
    assert len(every) == 13
    loss = float(loss_of(model, initial(model), supervised.pad_pairs(*PAIRS, multiple=8)))
    assert loss == pytest.approx(-every.mean(), abs=1e-5)


def test_what_stands_at_padding_changes_neither_loss_nor_gradient(model):
    batch = supervised.pad_pairs(*PAIRS, multiple=8)
    other = batch._replace(
        source=np.where(batch.source_mask, batch.source, 7), target=np.where(batch.target_mask, batch.target, 9)
    )
    assert (other.source != batch.source).any() and (other.target != batch.target).any()
    value = jax.jit(jax.value_and_grad(lambda params, batch: supervised.pair_loss(model, params, batch)))
    (loss, grads), (same, same_grads) = value(initial(model), batch), value(initial(model), other)
    assert float(loss) == pytest.approx(float(same), abs=1e-6)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=0, atol=1e-6), grads, same_grads)


def test_sources_that_end_in_padding_are_refused_but_of_a_t5():
    batch = supervised.pad_pairs(*PAIRS, multiple=8)
    turned = batch._replace(source=batch.source.copy(), source_mask=batch.source_mask.copy())
    for side in (turned.source, turned.source_mask):
        side[2] = np.roll(side[2], len(PAIRS[0][2]))  # from the right end to the left
    gpt2 = MODELS["gpt2"]
    said = "must be padded on the left, .* false at the end of row 2"
    with pytest.raises(ValueError, match=said):
        supervised.target_log_probs(gpt2, initial(gpt2), turned)
    with pytest.raises(ValueError, match=said):
        supervised.held_out_loss(gpt2, [batch, turned])
    with pytest.raises(ValueError, match=said):
        supervised.make_pair_step(gpt2, OPTIMIZER)(initial_state(initial(gpt2), OPTIMIZER, jax.random.key(0)), turned)
    t5 = MODELS["t5"]
    assert float(loss_of(t5, initial(t5), turned)) == pytest.approx(float(loss_of(t5, initial(t5), batch)), abs=1e-5)


def test_the_held_out_loss_weighs_tokens_and_not_batches(model):
    """One pair of 3 target tokens, repeated to the shape of four others with 10."""
    first = supervised.pad_pairs(PAIRS[0][:1], PAIRS[1][:1], multiple=8)
    others = supervised.pad_pairs(*(side[1:] for side in PAIRS), multiple=8)
    first = jax.tree.map(lambda leaf: np.repeat(leaf, 4, axis=0), first)
    first = first._replace(target_mask=first.target_mask & (np.arange(4) == 0)[:, None])
    measured = supervised.held_out_loss(model, [first, others])(initial(model))
    assert measured == pytest.approx(-np.concatenate(alone(model)).mean(), abs=1e-5)


# Batches --------------------------------------------------------------------------------------------------------------


def test_sources_are_padded_on_the_left_and_targets_on_the_right():
    batch = supervised.pad_pairs([[5], [6, 7]], [[8, 9, 1], [1]], multiple=4, pad_id=3)
    np.testing.assert_array_equal(batch.source, [[3, 3, 3, 5], [3, 3, 6, 7]])
    np.testing.assert_array_equal(batch.target, [[8, 9, 1, 3], [1, 3, 3, 3]])
    np.testing.assert_array_equal(batch.source_mask, [[0, 0, 0, 1], [0, 0, 1, 1]])
    np.testing.assert_array_equal(batch.target_mask, [[1, 1, 1, 0], [1, 0, 0, 0]])


@pytest.mark.parametrize(
    ("sources", "targets", "said"),
    [
        ([], [], "one target for each source, but there are 0 for 0"),
        ([[1]], [[1], [1]], "one target for each source, but there are 2 for 1"),
        ([[1], []], [[1], [1]], "source 1 is empty"),
        ([[1], [1]], [[1], []], "target 1 is empty"),
    ],
)
def test_pairs_that_are_none_are_refused(sources, targets, said):
    with pytest.raises(ValueError, match=said):
        supervised.pad_pairs(sources, targets)


def test_a_batch_is_a_function_of_its_step():
    epochs, again = (supervised.Epochs(SOURCES, TARGETS, batch_size=6, seed=3) for _ in range(2))
    assert epochs.steps_per_epoch == 6
    with pytest.raises(ValueError, match="batch_size must be from 1 to the 40 pairs, but is 41"):
        supervised.Epochs(SOURCES, TARGETS, batch_size=41, seed=0)
    for step in (9, 0, 14, 3):
        jax.tree.map(np.testing.assert_array_equal, epochs(step), again(step))
    rows = epochs.rows(3)
    jax.tree.map(
        np.testing.assert_array_equal,
        epochs(3),
        supervised.pad_pairs([SOURCES[row] for row in rows], [TARGETS[row] for row in rows], multiple=8),
    )


def test_target_tokens_are_counted():
    epochs = supervised.Epochs(SOURCES, TARGETS, batch_size=6, seed=3)
    assert epochs.tokens(0) == 0
    assert epochs.tokens(9) == sum(int(epochs(step).target_mask.sum()) for step in range(9))


def test_it_learns(model):
    epochs = supervised.Epochs(SOURCES, TARGETS, batch_size=8, seed=0, multiple=8)
    step, losses = supervised.make_pair_step(model, OPTIMIZER), []
    state = initial_state(initial(model), OPTIMIZER, jax.random.key(0))
    for done in range(60):
        state, metrics = step(state, epochs(done))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-20:]) < 0.75 * np.mean(losses[:20]), "from log 13 = 2.6 or worse"
