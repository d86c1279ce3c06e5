import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrl_llm.decoding import generate
from jaxrl_llm.decoding.transforms import (
    Chain,
    FrequencyPenalty,
    NoRepeatNgram,
    PresencePenalty,
    RepetitionPenalty,
    bad_words,
)
from tests.conftest import VOCAB

ROWS, SLOTS, SMALL = 3, 10, 7
call = jax.jit(lambda transform, *given: transform(*given))
mass = jax.jit(lambda transform, *given: transform.kept_mass(*given))
FORBIDDEN = [[3], [2, 5], [0, 1, 2], [1, 1, 1, 6], [4, 4]]
VALUES = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 5.0, -np.inf]), st.floats(-30, 30, width=32))


# Each by its definition, for one row of real tokens -------------------------------------------------------------------


def removed(row, banned):
    """The row without the banned tokens, or as it was if none would be left."""
    result = [-np.inf if token in banned else logit for token, logit in enumerate(row)]
    return row if max(result) == -np.inf else result


def by_definition(transform, row, text):
    """Apply a transform to one row of logits after the real tokens `text`, in plain Python."""
    row, text = [float(logit) for logit in row], [int(token) for token in text]
    if isinstance(transform, RepetitionPenalty):
        r = float(transform.r)
        for token in set(text):
            row[token] = row[token] / r if row[token] > 0 else row[token] * r
        return row
    if isinstance(transform, PresencePenalty):
        return [logit - float(transform.p) * (token in text) for token, logit in enumerate(row)]
    if isinstance(transform, FrequencyPenalty):
        return [logit - float(transform.f) * text.count(token) for token, logit in enumerate(row)]
    if isinstance(transform, NoRepeatNgram):
        n = int(transform.n)
        grams = {tuple(text[start : start + n]) for start in range(len(text) - n + 1)}
        return removed(
            row, [t for t in range(len(row)) if len(text) >= n - 1 and (*text[len(text) - n + 1 :], t) in grams]
        )
    banned = [s[-1] for s in FORBIDDEN if len(text) >= len(s) - 1 and text[len(text) - len(s) + 1 :] == s[:-1]]
    return removed(row, banned)


KINDS = {
    "repetition": lambda number: RepetitionPenalty(jnp.float32(number)),
    "presence": lambda number: PresencePenalty(jnp.float32(number - 1)),
    "frequency": lambda number: FrequencyPenalty(jnp.float32(number - 1)),
    "n-gram": lambda number: NoRepeatNgram(jnp.int32(np.ceil(2 * number))),
    "bad words": lambda number: bad_words(SMALL, FORBIDDEN),
}


@st.composite
def contexts(draw):
    """Logits, tokens that repeat, and any mask; where it is false stands any number at all."""
    logits = draw(hnp.arrays(np.float32, (ROWS, SMALL), elements=VALUES))
    logits[(logits == -np.inf).all(axis=1), 0] = 1
    few = draw(st.integers(1, SMALL))
    tokens = draw(hnp.arrays(np.int32, (ROWS, SLOTS), elements=st.integers(0, few - 1)))
    mask = draw(hnp.arrays(bool, (ROWS, SLOTS), elements=st.booleans() if draw(st.booleans()) else st.just(True)))
    anything = st.sampled_from([-(2**31), -100, -1, 0, 3, SMALL - 1, SMALL, 10**6, 2**31 - 1])
    padding = draw(hnp.arrays(np.int32, (ROWS, SLOTS), elements=anything))
    return logits, np.where(mask, tokens, padding), mask


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80)
@given(context=contexts(), number=st.floats(0.125, 4, width=32))
def test_what_a_transform_does_is_what_its_definition_does(kind, context, number):
    transform = KINDS[kind](number)
    logits, tokens, mask = context
    result = np.asarray(call(transform, *context))
    expected = [
        by_definition(transform, *row) for row in zip(logits, map(lambda t, m: t[m], tokens, mask), strict=True)
    ]
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    assert not np.isnan(result).any() and (result > -np.inf).any(axis=1).all()
    assert (result[logits == -np.inf] == -np.inf).all()
    if kind in ("n-gram", "bad words"):
        np.testing.assert_array_equal(call(transform, result, tokens, mask), result)  # idempotent
        kept = np.where(result > -np.inf, np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float64), 0)
        total = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float64).sum(axis=1)
        np.testing.assert_allclose(mass(transform, *context), kept.sum(axis=1) / total, rtol=1e-4)
    else:
        np.testing.assert_allclose(mass(transform, *context), 1, rtol=1e-5)


# By hand --------------------------------------------------------------------------------------------------------------


ROW = jnp.asarray([[2.0, -2.0, 0.0, 1.0, -jnp.inf]])
TEXT = jnp.asarray([[1, 0, 1, 1, 4]])
ALL = jnp.ones((1, 5), bool)


def test_repetition_is_penalised_once_and_lowers_negative_logits_too():
    np.testing.assert_array_equal(call(RepetitionPenalty(2.0), ROW, TEXT, ALL), [[1, -4, 0, 1, -np.inf]])
    np.testing.assert_array_equal(call(RepetitionPenalty(1.0), ROW, TEXT, ALL), ROW)


def test_presence_and_frequency():
    np.testing.assert_array_equal(call(PresencePenalty(0.5), ROW, TEXT, ALL), [[1.5, -2.5, 0, 1, -np.inf]])
    np.testing.assert_array_equal(call(FrequencyPenalty(0.5), ROW, TEXT, ALL), [[1.5, -3.5, 0, 1, -np.inf]])
    np.testing.assert_array_equal(call(FrequencyPenalty(-1.0), ROW, TEXT, ALL), [[3, 1, 0, 1, -np.inf]])


def penalties(*, r=1.0, p=0.0, f=0.0, n=10**6):
    """All of them, as one program; those that are not asked for do nothing."""
    return Chain((RepetitionPenalty(r), PresencePenalty(p), FrequencyPenalty(f), NoRepeatNgram(n)))


def banned(transform, text, mask=None, *, vocab=6):
    """The tokens that are removed after this text, of which only what the mask keeps is real."""
    mask, room = np.ones(len(text)) if mask is None else mask, (SLOTS - len(text), 0)
    given = np.zeros((1, vocab), np.float32), np.pad(text, room)[None], np.pad(mask, room)[None].astype(bool)
    return set(np.flatnonzero(np.isinf(call(transform, *given)[0])).tolist())


def test_n_grams_by_hand():
    text = [1, 2, 3, 1, 2, 4, 1, 2]
    assert banned(NoRepeatNgram(1), text) == {1, 2, 3, 4}
    assert banned(NoRepeatNgram(2), text) == banned(NoRepeatNgram(3), text) == {3, 4}
    assert banned(NoRepeatNgram(4), text) == set()
    assert banned(NoRepeatNgram(4), [3, *text[:-2], 3, 1, 2]) == {3, 4}
    for n in (2, 3, 4):
        assert banned(NoRepeatNgram(n), [5] * (n - 1)) == set()
        assert banned(NoRepeatNgram(n), [5] * n) == {5}
    assert banned(NoRepeatNgram(9), text) == banned(NoRepeatNgram(10**9), text) == set()


def test_an_n_gram_across_padding_is_one():
    assert banned(NoRepeatNgram(3), [1, 9, 2, 3, 0, 1, -1, 2], [1, 0, 1, 1, 0, 1, 0, 1]) == {3}
    assert banned(bad_words(6, [[1, 2, 3]]), [1, 9, 2, -7], [1, 0, 1, 0]) == {3}
    assert banned(bad_words(6, [[1, 2, 3]]), [1, 4, 2, -7], [1, 1, 1, 0]) == set()


def test_where_blocked_n_grams_would_leave_nothing_all_stays():
    assert banned(NoRepeatNgram(1), [0, 1, 2, 3], vocab=4) == set()
    assert banned(NoRepeatNgram(1), [0, 1, 2, 3, 3], vocab=5) == {0, 1, 2, 3}
    assert banned(bad_words(2, [[0], [1]]), [0], vocab=2) == {0, 1}, "decoders refuse that"
    only = jnp.asarray([[0.0, -jnp.inf, -jnp.inf]])  # the one possible token is a repeated one
    np.testing.assert_array_equal(call(NoRepeatNgram(1), only, jnp.asarray([[0]]), jnp.ones((1, 1), bool)), only)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_tokens_stays_as_it_is_but_for_single_bad_words(kind):
    expected = np.zeros((2, SMALL), np.float32)
    expected[:, 3] = -np.inf if kind == "bad words" else 0
    for shape in [(2, 0), (2, 4)]:
        result = call(KINDS[kind](1.5), np.zeros((2, SMALL), np.float32), np.full(shape, 2), np.zeros(shape, bool))
        np.testing.assert_array_equal(result, expected)


# Padding, batches, shapes, dtypes, compilation ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_neither_padding_nor_the_other_rows_change_a_row(kind):
    transform = KINDS[kind](1.25)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, SMALL)).astype(np.float32)
    texts = [list(rng.integers(0, 4, length)) for length in (8, 5, 2, 7)]

    @jax.jit
    def each_alone(transform):
        rows = zip(logits, map(np.asarray, texts), strict=True)
        return jnp.stack([transform(row, text, np.ones(text.shape, bool)) for row, text in rows])

    alone = each_alone(transform)
    for place in ("left", "right", "between"):
        tokens, mask = rng.integers(-9, 99, (4, 12)), np.zeros((4, 12), bool)
        for row, text in enumerate(texts):
            slots = {"left": range(12 - len(text), 12), "right": range(len(text))}.get(place)
            slots = np.sort(rng.permutation(12)[: len(text)]) if slots is None else np.asarray(slots)
            tokens[row, slots], mask[row, slots] = text, True
        np.testing.assert_array_equal(call(transform, logits, tokens, mask), alone)


@pytest.mark.parametrize("kind", KINDS)
def test_leading_axes_vmap_and_single_rows_agree(kind):
    transform = KINDS[kind](1.25)
    rng = np.random.default_rng(2)
    logits, tokens = rng.normal(size=(2, 3, SMALL)).astype(np.float32), rng.integers(0, 3, (2, 3, SLOTS))
    mask = rng.random((2, 3, SLOTS)) < 0.8

    @jax.jit
    def in_three_ways(transform, *given):
        mapped = jax.vmap(transform)(*given)
        return transform(*given), mapped, transform(*(each[1, 2] for each in given))

    result, mapped, single = in_three_ways(transform, logits, tokens, mask)
    np.testing.assert_allclose(mapped, result, rtol=1e-6)
    np.testing.assert_allclose(single, result[1, 2], rtol=1e-6)


def test_gradients():
    def total(transform, logits):
        return jax.nn.logsumexp(transform(logits, TEXT, ALL))

    chain = Chain((RepetitionPenalty(2.0), FrequencyPenalty(0.5), NoRepeatNgram(2)))
    by_transform, by_logits = jax.jit(jax.grad(total, argnums=(0, 1), allow_int=True))(chain, ROW)
    shifted = np.asarray([1 - 0.5, -4 - 1.5, 0, 1, -np.inf])  # after 4 nothing is known
    distribution = np.exp(shifted) / np.exp(shifted).sum()
    np.testing.assert_allclose(by_logits[0], distribution * [0.5, 2, 1, 1, 0], rtol=1e-5)
    np.testing.assert_allclose(by_transform.transforms[1].f, -(distribution * [1, 3, 0, 0, 0]).sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (np.zeros((1, 5), int), np.ones((1, 4), bool), r"\[1, 'slot'\].*int.*\[1, 5\] and bool\[1, 4\]"),
        (np.zeros((2, 5), int), np.ones((2, 5), bool), r"\[1, 'slot'\]"),
        (np.zeros(5, int), np.ones(5, bool), r"\[1, 'slot'\]"),
        (np.zeros((1, 5)), np.ones((1, 5), bool), "tokens must be integers"),
        (np.zeros((1, 5), int), np.ones((1, 5), int), "mask boolean"),
    ],
)
def test_contexts_that_do_not_fit_are_named(tokens, mask, message):
    for transform in (RepetitionPenalty(1.5), NoRepeatNgram(2)):
        with pytest.raises(ValueError, match=message):
            transform(ROW, tokens, mask)


# In a decoder ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_no_output_repeats_a_blocked_n_gram(gpt2, side):
    lengths = np.asarray([9, 4, 1, 6])
    mask = np.arange(9) < lengths[:, None] if side == "right" else np.arange(9) >= 9 - lengths[:, None]
    prompts = np.zeros((4, 9), int)
    prompts[mask] = np.random.default_rng(0).integers(0, VOCAB, lengths.sum())
    runs = {}
    for n in (2, 3, 10**6):
        options = {"prompt_mask": mask, "max_new_tokens": 17, "transform": penalties(n=n), "greedy": True}
        runs[n] = np.asarray(generate(*gpt2, prompts, **options).tokens)
    for n, row in itertools.product((2, 3), range(4)):
        text = [*prompts[row][mask[row]], *runs[n][row]]
        grams = [tuple(text[start : start + n]) for start in range(len(text) - n + 1)]
        old = max(lengths[row] - n + 1, 0)  # those within the prompt may repeat
        assert len(set(grams[old:])) == len(grams) - old and not set(grams[old:]) & set(grams[:old])
    assert (runs[10**6] != runs[2]).any() and (runs[2] != runs[3]).any(), "there was something to block"


def test_penalties_of_generated_tokens_do_not_count_the_prompt(gpt2):
    lm, params = gpt2
    params = jax.tree.map(jnp.zeros_like, params)  # all logits 0
    prompts = np.asarray([[0, 1, 0, 2]] * 4)
    for transform, expected in [
        (penalties(r=2.0), [0, 0, 0, 0, 0]),  # 0 has no sign
        (penalties(p=1.0), [0, 1, 2, 3, 4]),
        (penalties(f=0.1), [0, 1, 2, 3, 4]),
        (penalties(n=1), [3, 4, 5, 6, 7]),
    ]:
        tokens = generate(lm, params, prompts, max_new_tokens=5, transform=transform, greedy=True).tokens
        np.testing.assert_array_equal(tokens, [expected] * 4)
