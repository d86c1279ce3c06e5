"""Log-probabilities of answers: shifted, masked, the same however rows are padded and however places are cut."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import oracle, scoring
from jaxrl_llm.objectives import kl
from jaxrl_llm.scoring import Sequences
from jaxrl_llm.training.supervised import Seq2SeqBatch, pair_loss
from tests.conftest import TINY, VOCAB, log_softmax, random_params

ROWS = [([3, 1, 4], [1, 5, 9, 2]), ([6], [5, 3]), ([5, 8, 9, 7], [9])]  # prompts and answers, of 3 to 7 tokens
LENGTH = 12
MODELS = {name: TINY[name] for name in ("gpt2", "llama")}
log_probs = functools.partial(jax.jit, static_argnums=0)(scoring.log_probs)
measures = functools.partial(jax.jit, static_argnums=0)(scoring.measures)


def batch(side, length=LENGTH):
    right = scoring.pad_completions(*zip(*ROWS, strict=True), length=length)
    if side == "right":
        return right
    shifts = length - right.mask.sum(axis=1)
    return Sequences(*(np.stack([np.roll(row, by) for row, by in zip(leaf, shifts, strict=True)]) for leaf in right))


@functools.cache
def model(name):
    """The model, its parameters, and its compiled logits of one row."""
    lm, params = MODELS[name], random_params(MODELS[name])
    return lm, params, jax.jit(lambda tokens: lm.apply(params, tokens)[0])


def by_hand(name, temperature=1.0):
    """Σ log p of each answer, row by row without padding to speak of, in float64."""
    *_, apply = model(name)
    sums = []
    for prompt, answer in ROWS:
        row = np.zeros(LENGTH, np.int32)
        row[: len(prompt) + len(answer)] = prompt + answer  # what follows changes nothing before it
        logits = np.asarray(apply(row[None])[0], np.float64) / temperature
        places = np.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
        sums.append(log_softmax(logits)[places, answer].sum())
    return np.asarray(sums)


@pytest.mark.parametrize(
    ("name", "side", "temperature"),
    [("gpt2", "left", 1.0), ("gpt2", "right", 0.7), ("llama", "left", 0.7), ("llama", "right", 1.0)],
)
def test_they_are_the_models_own_of_the_tokens_that_count(name, side, temperature):
    lm, params, _ = model(name)
    rows = batch(side)
    found = log_probs(lm, params, rows, temperature=temperature)
    assert (np.asarray(found)[~rows.completion_mask] == 0).all() and (np.asarray(found)[rows.completion_mask] < 0).all()
    np.testing.assert_allclose(found.sum(axis=1), by_hand(name, temperature), rtol=2e-5)


@pytest.mark.parametrize("length", [8, 17])
def test_the_bucket_changes_nothing(gpt2, length):
    lm, params = gpt2
    found = log_probs(lm, params, batch("right", length)).sum(axis=1)
    np.testing.assert_allclose(found, log_probs(lm, params, batch("right")).sum(axis=1), rtol=1e-5)


def test_a_model_with_a_root_predicts_first_tokens_too(tabular):
    lm, params = tabular
    tokens = np.asarray([[0, 2, 1, 1], [1, 0, 0, 2]])
    whole = np.ones(tokens.shape, bool)
    rows = np.asarray(params["logits"], np.float64)
    expected = []
    for sequence in tokens:
        index, total = 0, 0.0
        for time, token in enumerate(sequence):
            first = sum(3**shorter for shorter in range(time))
            total += log_softmax(rows[first + index])[token]
            index = index * 3 + token
        expected.append(total)
    found = log_probs(lm, params, Sequences(tokens, whole, whole))
    np.testing.assert_allclose(found.sum(axis=1), expected, rtol=1e-5)


@pytest.mark.slow
def test_places_that_are_cut_give_the_same_values_and_gradients(gpt2, monkeypatch):
    lm, params = gpt2
    rows = batch("left", 13)

    def total(params):
        return scoring.log_probs(lm, params, rows).sum()

    whole = jax.jit(jax.value_and_grad(total))(params)
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 4 * 3 * VOCAB)  # 4 places of 13 at a time
    assert "scan" in str(jax.make_jaxpr(lambda params: scoring.log_probs(lm, params, rows))(params))
    cut = jax.jit(jax.value_and_grad(lambda params: total(params)))(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), cut, whole)


@pytest.mark.parametrize("name", ["log_probs", "next_token_log_probs", "pair_loss"])
def test_no_gradient_holds_the_logits_of_all_places(gpt2, monkeypatch, name):
    lm, params = gpt2
    rows = batch("right", 13)
    tokens, real = jnp.asarray(rows.tokens), jnp.ones(rows.tokens.shape, bool)
    count, time = tokens.shape
    total = {
        "log_probs": lambda params: scoring.log_probs(lm, params, rows).sum(),
        "next_token_log_probs": lambda params: scoring.next_token_log_probs(lm, params, tokens).sum(),
        "pair_loss": lambda params: pair_loss(lm, params, Seq2SeqBatch(tokens[:, :4], real[:, :4], tokens, real)),
    }[name]
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 4 * count * VOCAB)
    program = str(jax.make_jaxpr(jax.grad(total))(params))
    assert f"[{count},4,{VOCAB}]" in program or f"[{count},3,{VOCAB}]" in program
    assert not [each for each in (time - 1, time) if f"[{count},{each},{VOCAB}]" in program]


def test_measures_are_those_of_both_distributions(gpt2):
    lm, params = gpt2
    ref, rows = random_params(lm, 1), batch("left")
    found = measures(lm, params, ref, rows)
    np.testing.assert_allclose(found.logp_policy, log_probs(lm, params, rows), atol=1e-5)
    np.testing.assert_allclose(found.logp_ref, log_probs(lm, ref, rows), atol=1e-5)
    apply = jax.jit(lambda params: lm.apply(params, rows.tokens, mask=rows.mask)[0][:, :-1])
    distributions = apply(params), apply(ref)
    expected = np.asarray(jax.jit(kl.exact_kl)(*distributions))
    np.testing.assert_allclose(
        found.kl[:, 1:][rows.completion_mask[:, 1:]], expected[rows.completion_mask[:, 1:]], rtol=1e-4
    )
    log_p = log_softmax(distributions[0])
    entropy = -(np.exp(log_p) * log_p).sum(axis=-1)
    np.testing.assert_allclose(
        found.entropy[:, 1:][rows.completion_mask[:, 1:]], entropy[rows.completion_mask[:, 1:]], rtol=1e-4
    )
    assert all((np.asarray(leaf)[~rows.completion_mask] == 0).all() for leaf in found)


def test_rows_that_cannot_be_trained_on_are_named(gpt2):
    lm, _ = gpt2
    rows = batch("right")
    scoring.check_sequences(lm, rows)
    cases = [
        (rows._replace(completion_mask=~rows.mask), "must mark real tokens, but marks padding in row 0"),
        (
            rows._replace(completion_mask=rows.completion_mask & (np.arange(3) != 1)[:, None]),
            "row 1 of sequences has no completion",
        ),
        (rows._replace(completion_mask=rows.mask), "row 0 of sequences has a completion without 1 token before it"),
        (rows._replace(tokens=rows.tokens + 20), "must lie in"),
        (rows._replace(completion_mask=rows.completion_mask[:, :3]), "must have the shape of"),
    ]
    for wrong, said in cases:
        with pytest.raises(ValueError, match=said):
            scoring.check_sequences(lm, wrong)
    with pytest.raises(ValueError, match="completion 1 is empty"):
        scoring.pad_completions([[1], [2]], [[3], []])
    with pytest.raises(ValueError, match="there are 2 for 1"):
        scoring.pad_completions([[1]], [[3], [4]])
    with pytest.raises(ValueError, match=r"one padded length, but have \[8, 12\]"):
        scoring.stacked(batch("right"), batch("right", 8))


@pytest.mark.parametrize(("name", "batch_size"), [("gpt2", 1), ("gpt2", 2), ("gpt2", 5), ("llama", 2)])
def test_ragged_completions_are_scored_in_batches(name, batch_size):
    lm, params, _ = model(name)
    prompts, completions = zip(*ROWS, strict=True)
    found = scoring.completion_log_probs(lm, params, prompts, completions, batch_size=batch_size, multiple=4)
    assert [len(row) for row in found] == [len(completion) for completion in completions]
    np.testing.assert_allclose([row.sum() for row in found], by_hand(name), rtol=2e-5)


def test_ragged_completions_of_the_enumerable_model_are_exact(tabular):
    lm, params = tabular
    found = scoring.completion_log_probs(lm, params, [[]] * 2, [[0, 1], [1, 1]])
    exact = jax.jit(functools.partial(oracle.sequence_log_probs, lm))(params)
    every = np.asarray(list(itertools.product(range(3), repeat=4)))[:, :2]
    for row, tokens in zip(found, ([0, 1], [1, 1]), strict=True):
        total = np.log(np.exp(exact)[(every == tokens).all(axis=1)].sum())
        np.testing.assert_allclose(row.sum(), total, rtol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "completions", "options", "message"),
    [
        ([[1]], [[2], [3]], {}, "there must be one completion for each prompt, but there are 2 for 1"),
        ([[1], [2]], [[2], []], {}, "completion 1 is empty"),
        ([[1], []], [[2], [2]], {}, "prompt 1 is empty: this model needs at least one token"),
        ([[1], [1]], [[2] * 99, [2]], {"batch_size": 1}, "text 0 has 100 tokens, which do not fit the model's context"),
        ([[1]], [[VOCAB]], {}, "sequences.tokens must lie in"),
        ([[1]], [[2]], {"batch_size": 0}, "batch_size must be at least 1, but is 0"),
    ],
)
def test_bad_completions_are_refused(prompts, completions, options, message, gpt2):
    with pytest.raises(ValueError, match=message):
        scoring.completion_log_probs(*gpt2, prompts, completions, **options)
