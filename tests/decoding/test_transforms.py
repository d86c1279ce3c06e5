"""The conformance suite of all transforms, found by walking the subclasses of `Transform`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_llm.decoding.constraints import Constrained, banned_text, from_grammar, from_regex, text_bias
from jaxrl_llm.decoding.healing import Healing
from jaxrl_llm.decoding.transforms import (
    Chain,
    Cut,
    Epsilon,
    Eta,
    ForcedTokens,
    FrequencyPenalty,
    LogitBias,
    MinLength,
    MinP,
    Mirostat,
    NoRepeatNgram,
    PresencePenalty,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopNSigma,
    TopP,
    Transform,
    Typical,
    bad_words,
    update_alive,
)
from tests.conftest import kept_by_top_k, log_softmax
from tests.goldens import make_transform_goldens as goldens

VOCAB, SLOTS = 6, 5
PIECES = [b"a", b"b", b"c", b"d", b"e", b"f"]
PAIRS = {  # two of every kind, with other numbers
    "temperature": (Temperature(0.7), Temperature(2.0)),
    "top-k": (TopK(2), TopK(4)),
    "top-p": (TopP(0.6), TopP(0.9)),
    "min-p": (MinP(0.2), MinP(0.02)),
    "typical": (Typical(0.6), Typical(0.3)),
    "ε": (Epsilon(0.1), Epsilon(0.02)),
    "η": (Eta(0.3), Eta(0.1)),
    "nσ": (TopNSigma(0.8), TopNSigma(1.5)),
    "repetition": (RepetitionPenalty(1.5), RepetitionPenalty(0.5)),
    "presence": (PresencePenalty(0.5), PresencePenalty(-1.0)),
    "frequency": (FrequencyPenalty(0.5), FrequencyPenalty(-0.2)),
    "n-gram": (NoRepeatNgram(1), NoRepeatNgram(2)),
    "bad words": (bad_words(VOCAB, [[3], [2, 5], [0, 1]]), bad_words(VOCAB, [[1], [1, 4], [2, 2]])),
    "bias": (LogitBias(np.float32([0, 1, -np.inf, 2, 0, -1])), LogitBias(np.float32([1, 0, 0, -np.inf, 3, 0]))),
    "length": (MinLength(3, [1, 4]), MinLength(9, [0, 2])),
    "forced": (ForcedTokens([-1, 2, 3]), ForcedTokens([0, -1, 5])),
    "mirostat": (Mirostat(1.0, 0.3), Mirostat(2.0, 0.1)),
    "constraint": (
        Constrained(from_regex("[ab]{2,4}c?", "abcdef"), 5),
        Constrained(from_regex("[ab]{3,9}", "abcdef"), 5),
    ),
    "grammar": (
        from_grammar('start: ("a" | "b")~2..4 "c"?', PIECES, 5),
        from_grammar('start: ("a" | "b")~3..9', PIECES, 5),
    ),
    "ban": (banned_text(PIECES, "ab"), banned_text(PIECES, "ba")),
    "text bias": (text_bias(PIECES, "ab", 0.5), text_bias(PIECES, "c", -1.5)),
    "chain": (
        Chain((RepetitionPenalty(1.2), Mirostat(1.5, 0.2), TopP(0.9))),
        Chain((RepetitionPenalty(1.5), Mirostat(1.0, 0.1), TopP(0.5))),
    ),
}
ROWS_OF_NUMBERS = {
    kind: [kind(number) for number in numbers]
    for kind, numbers in {
        **dict.fromkeys((Temperature, TopNSigma, RepetitionPenalty), (0.5, 1.0, 2.0, 3.0)),
        **dict.fromkeys((PresencePenalty, FrequencyPenalty), (0.5, -1.0, 2.0, 3.0)),
        **dict.fromkeys((TopK, NoRepeatNgram), (1, 2, 3, 4)),
        **dict.fromkeys((TopP, MinP, Typical, Epsilon, Eta), (0.05, 0.2, 0.5, 0.9)),
        functools.partial(MinLength, eos_ids=[1, 4]): (0, 2, 4, 9),
        functools.partial(Mirostat, eta=0.3): (0.5, 1.0, 2.0, 3.0),
    }.items()
}
RNG = np.random.default_rng(0)
LOGITS = np.float32([[2, 1, 1, -1, -np.inf, 0.5], [0] * 6, [-3, -0.5, 4, 3.5, -0.5, -0.5], RNG.normal(size=6)])
TOKENS = RNG.integers(0, 2, (4, SLOTS))
MASK = np.asarray([[0, 1, 0, 0, 0], [1, 0, 0, 1, 0], [0, 0, 1, 0, 1], [1, 1, 0, 1, 1]], bool)
ALONG = RNG.normal(size=(SLOTS, 4, VOCAB)).astype(np.float32)  # the model's logits where these tokens were chosen
call = jax.jit(lambda transform, logits: transform(logits))
every_transform = pytest.mark.parametrize("name", PAIRS)


@jax.jit
def state_and_result(transform, tokens, mask, along, logits):
    """The state after these new tokens, of which those outside the mask were not emitted, and the new logits."""
    rows, slots = tokens.shape
    nothing = jnp.zeros((rows, slots), jnp.int32)
    state = transform.init(nothing, nothing > 0, jnp.full(rows, slots))

    def step(state, column):
        token, mask, logits = column
        return update_alive(transform, state, token, logits, mask), None

    state, _ = jax.lax.scan(step, state, (tokens.T, mask.T, along))
    return state, transform.apply(state, logits)


def applied(transform, logits, *, rows=slice(None)):
    """Return the transformed logits after the tokens above, or after those of some rows."""
    return np.asarray(state_and_result(transform, TOKENS[rows], MASK[rows], ALONG[:, rows], logits)[1])


def test_every_transform_of_the_library_is_tested():
    def below(cls):
        return {each for child in cls.__subclasses__() for each in {child} | below(child)}

    library = {cls for cls in below(Transform) if cls.__module__.startswith("jaxrl_llm.")}
    alone = {Healing}  # its rows must begin with a text, which the tokens here do not: test_healing.py
    assert library - {Cut} == {type(one) for one, _ in PAIRS.values()} | alone  # a base class of filters


@every_transform
def test_tokens_are_removed_but_never_all_and_nothing_is_brought_back(name):
    for transform in PAIRS[name]:
        result = applied(transform, LOGITS)
        assert result.shape == LOGITS.shape and not np.isnan(result).any()
        assert (result > -np.inf).any(axis=1).all() and (result[-np.inf == LOGITS] == -np.inf).all()
        assert (result != LOGITS).any(), "it does something"


@every_transform
def test_a_row_without_possible_tokens_stays_so_and_the_order_of_rows_does_not_matter(name):
    order = np.asarray([2, 0, 3, 1])
    for transform in PAIRS[name]:
        whole, empty = applied(transform, LOGITS), LOGITS.copy()
        np.testing.assert_array_equal(applied(transform, LOGITS[order], rows=order), whole[order])
        empty[1] = -np.inf
        result = applied(transform, empty)
        assert (result[1] == -np.inf).all()
        np.testing.assert_array_equal(np.delete(result, 1, axis=0), np.delete(whole, 1, axis=0))


@every_transform
def test_it_is_a_tree_of_its_numbers_and_other_numbers_do_not_compile_again(name):
    one, other = PAIRS[name]
    assert jax.tree.structure(one) == jax.tree.structure(other)
    result, before = applied(one, LOGITS), state_and_result._cache_size()
    np.testing.assert_array_equal(applied(jax.tree.map(lambda leaf: leaf, one), LOGITS), result)
    assert (result != applied(other, LOGITS)).any(), "its numbers matter"
    assert state_and_result._cache_size() == before


@jax.jit
def in_other_ways(transform, state, logits, kept, narrow, wide):
    """The results for other dtypes, and the gradient with respect to the logits."""
    gradient = jax.grad(lambda logits: jnp.where(kept, transform.apply(state, logits), 0).sum())(logits)
    return [transform.apply(state, each) for each in (*narrow, wide)], gradient


@every_transform
def test_the_dtype_of_the_logits_is_kept_and_the_gradient_is_finite(name):
    one = PAIRS[name][0]
    state, result = state_and_result(one, TOKENS, MASK, ALONG, LOGITS)
    narrow, wide = [LOGITS.astype(dtype) for dtype in (jnp.bfloat16, jnp.float16)], LOGITS.astype(np.float64)
    with jax.enable_x64(True):
        results, gradient = in_other_ways(one, state, LOGITS, result > -np.inf, narrow, wide)
    assert [each.dtype for each in (*results, result)] == [jnp.bfloat16, jnp.float16, jnp.float64, jnp.float32]
    assert not any(np.isnan(np.asarray(each, np.float64)).any() for each in results)
    assert gradient.dtype == jnp.float32 and np.isfinite(gradient).all()


@every_transform
def test_rows_that_are_over_keep_their_state(name):
    """A row that is over emits nothing: its column of the mask is false."""
    states = []
    for alive in ([False] * 4, [True, False, True, False]):
        mask = np.concatenate([MASK[:, :-1], np.asarray(alive)[:, None]], axis=1)
        states.append(jax.tree.leaves(state_and_result(PAIRS[name][0], TOKENS, mask, ALONG, LOGITS)[0]))
    for old, new in zip(*states, strict=True):
        np.testing.assert_array_equal(np.asarray(new)[1::2], np.asarray(old)[1::2])
        assert old.shape[0] == 4, "a state is one for each row"


@jax.jit
def by_hand(transform, logits, tokens, mask):
    """The result without a state; of one that does not look back also under vmap."""
    if transform.looks_back:
        return (transform(logits, tokens, mask),)
    return transform(logits), jax.vmap(call, in_axes=(None, 0))(transform, jnp.stack([logits, logits[::-1]]))[0]


@every_transform
def test_by_hand_it_is_what_it_is_in_a_decoder(name):
    """A stateless one as t(logits), one that looks back as t(logits, tokens, mask); others are for decoders."""
    one = PAIRS[name][0]
    if name in ("length", "forced", "mirostat", "constraint", "ban", "text bias", "chain"):
        with pytest.raises((NotImplementedError, TypeError)):
            one(jnp.asarray(LOGITS))
        if name == "chain":  # of one of each kind; without `jit` as well
            state, result = state_and_result(one, TOKENS, MASK, ALONG, LOGITS)
            np.testing.assert_allclose(one.apply(state, jnp.asarray(LOGITS)), result, rtol=1e-6)
        return
    for result in by_hand(one, LOGITS, TOKENS, MASK):
        np.testing.assert_allclose(result, applied(one, LOGITS), rtol=1e-6)
    if not one.looks_back:
        assert not jax.tree.leaves(state_and_result(one, TOKENS, MASK, ALONG, LOGITS)[0])


@pytest.mark.parametrize("sees_prompt", [True, False])
def test_what_looks_back_sees_the_prompt_or_does_not(sees_prompt):
    transform = (RepetitionPenalty if sees_prompt else PresencePenalty)(2.0)
    slots, mask = np.asarray([[3, 1, 0, 0, 0]]), np.asarray([[True, True, False, False, False]])

    @jax.jit
    def changed():
        state, logits = transform.init(jnp.asarray(slots), jnp.asarray(mask), np.asarray([3])), jnp.ones((1, VOCAB))
        changes = []
        for token in (2, 4):
            changes.append(transform.apply(state, logits)[0] != 1)
            state = transform.update(state, jnp.asarray([token]), logits)
        return changes

    found = [set(np.flatnonzero(each).tolist()) for each in changed()]
    assert found == ([{1, 3}, {1, 2, 3}] if sees_prompt else [set(), {2}])


@pytest.mark.parametrize("kind", ROWS_OF_NUMBERS, ids=str)
def test_a_number_for_each_row_is_that_of_the_row_alone(kind):
    each = ROWS_OF_NUMBERS[kind]
    together = jax.tree.map(lambda *leaves: leaves[0] if jnp.ndim(leaves[0]) else jnp.stack(jnp.asarray(leaves)), *each)
    together.check(np.full(4, SLOTS))
    for row, one in enumerate(each):
        np.testing.assert_allclose(applied(together, LOGITS)[row], applied(one, LOGITS)[row], rtol=1e-6)
    with pytest.raises(ValueError, match="must be one number, or one for each of 3 rows"):
        together.check(np.full(3, SLOTS))
    picked = together.take(jnp.asarray([2, 2, 0, 1]))
    np.testing.assert_allclose(applied(picked, LOGITS)[0], applied(each[2], LOGITS)[0], rtol=1e-6)


# Numbers that are refused ---------------------------------------------------------------------------------------------

OUT_OF_RANGE = [
    *[
        (Temperature, t, "temperature must be a finite number of at least 1.2e-38")
        for t in (0, 1e-320, 1e-38, -1.0, np.inf, -np.inf, np.nan)
    ],
    *[(kind, p, r"p must be in \(0, 1\]") for kind in (TopP, Typical) for p in (0, 0.0, -0.1, 1.0001, np.inf, np.nan)],
    *[(functools.partial(TopP, 0.5), k, "min_tokens_to_keep must be an integer of at least 1") for k in (0, 1.5)],
    *[(MinP, p, r"p must be in \[0, 1\]") for p in (-0.1, 1.0001, np.inf, np.nan)],
    *[(kind, e, r"ε must be in \[0, 1\]") for kind in (Epsilon, Eta) for e in (-0.1, 1.0001, np.nan)],
    *[(TopNSigma, n, "n must be a finite number of at least 0") for n in (-0.1, np.inf, np.nan)],
    *[(TopK, k, "k must be an integer of at least 1") for k in (0, -1, np.nan)],
    *[(RepetitionPenalty, r, "repetition penalty must be a finite number above 0") for r in (0.0, -1.0, np.nan)],
    *[(PresencePenalty, p, "presence penalty must be finite") for p in (np.inf, -np.inf, np.nan)],
    *[(FrequencyPenalty, f, "frequency penalty must be finite") for f in (np.inf, -np.inf, np.nan)],
    *[(NoRepeatNgram, n, "n must be an integer of at least 1") for n in (0, -1, 2.0)],
    *[(functools.partial(MinLength, eos_ids=0), n, "n must be an integer of at least 0") for n in (-1, 1.5)],
    *[(functools.partial(Mirostat, eta=0.1), t, "τ must be a finite number of bits above 0") for t in (0.0, np.inf)],
    *[(functools.partial(Mirostat, 3.0), n, "η must be a finite number of at least 0") for n in (-0.1, np.nan)],
]
REFUSED = [
    (lambda: MinLength(1, -1), "eos_ids must be a token id or several"),
    (lambda: MinLength(1, [0.5]), "eos_ids must be a token id or several"),
    (lambda: MinLength(1, [[1]]), "eos_ids must be a token id or several"),
    (lambda: ForcedTokens([1, -2]), "tokens must be tokens, or −1"),
    (lambda: ForcedTokens([]), r"tokens must be integers \[number\]"),
    (lambda: ForcedTokens([1.0]), r"tokens must be integers \[number\]"),
    (lambda: ForcedTokens([[[1]]]), r"tokens must be integers \[number\]"),
    (lambda: LogitBias([0.0, np.inf]), "the bias must be"),
    (lambda: LogitBias([np.nan, 0.0]), "the bias must be"),
    (lambda: LogitBias(1.0), "the bias must be"),
    (lambda: bad_words(9, []), "sequences must not be empty"),
    (lambda: bad_words(9, [[1], []]), "must not be empty, nor any"),
    (lambda: bad_words(9, [[9]]), r"\[0, 9\).*\[9\]"),
    (lambda: bad_words(9, [[1, -1]]), r"\[1, -1\]"),
    (lambda: bad_words(9, [[1.0]]), r"\[1.0\]"),
    (lambda: bad_words(9, [["a"]]), r"\['a'\]"),
    (lambda: Chain([Temperature(1.0), "top-k"]), "transform must be a Transform or a sequence of them, but is 'top-k'"),
    (lambda: Chain([None, lambda logits: logits]), "transform must be a Transform or a sequence of them"),
]


@pytest.mark.parametrize(("kind", "number", "message"), OUT_OF_RANGE)
def test_numbers_out_of_range_are_named(kind, number, message):
    for given in (number, jnp.asarray([1, number])):  # one bad row is enough
        with pytest.raises(ValueError, match=message):
            kind(given)


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_no_transform_can_be_made_of_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_traced_number_is_taken_on_trust():
    result = jax.jit(lambda t: Temperature(t)(jnp.asarray([1.0, 2.0])))(0.5)
    np.testing.assert_allclose(result, [2, 4])


# Chains, gradients, one's own -----------------------------------------------------------------------------------------


def test_temperature_divides_and_leaves_impossible_tokens_impossible():
    for t in (0.25, 1.0, 7.0):
        np.testing.assert_allclose(Temperature(t)(jnp.asarray(LOGITS)), LOGITS / t, rtol=1e-6)


def test_a_chain_applies_its_transforms_in_their_order():
    logits = jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.1]))
    sharpened_first = call(
        Chain((Temperature(0.25), TopP(0.65))), logits
    )  # 256 : 81 : 16 : 1, of which the first is 72%
    cut_first = call(Chain((TopP(0.65), Temperature(0.25))), logits)
    np.testing.assert_array_equal(np.isfinite(sharpened_first), [True, False, False, False])
    np.testing.assert_array_equal(np.isfinite(cut_first), [True, True, False, False])
    np.testing.assert_allclose(cut_first[:2], 4 * logits[:2], rtol=1e-6)


def test_a_nucleus_after_top_k_is_that_of_what_top_k_left():
    logits = jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.1]))
    assert np.isfinite(call(Chain((TopK(2), TopP(0.55))), logits)).sum() == 1  # 4 / 7 of what is left
    assert np.isfinite(call(Chain((TopP(0.55), TopK(2))), logits)).sum() == 2


def test_a_chain_of_none_or_of_chains_is_a_chain():
    logits = jnp.asarray(LOGITS)
    np.testing.assert_array_equal(Chain(())(logits), logits)
    nested, flat = Chain([Chain((Temperature(0.5),)), TopK(2)]), Chain((Temperature(0.5), TopK(2)))
    np.testing.assert_array_equal(call(nested, logits), call(flat, logits))


def test_transforms_are_trees_of_their_numbers():
    chain = Chain((Temperature(0.5), TopK(4), [TopP(0.9)]))
    assert jax.tree.leaves(chain) == [0.5, 4, 0.9]
    assert jax.tree.map(lambda number: number, chain) == chain
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(chain)]
    assert names == [".transforms[0].t", ".transforms[1].k", ".transforms[2].transforms[0].p"]


def test_gradients_with_respect_to_the_temperature_and_the_logits():
    logits = jnp.asarray(LOGITS[2])
    by_transform = jax.jit(jax.grad(lambda transform: transform(logits)[2]))(Temperature(0.5))
    np.testing.assert_allclose(by_transform.t, -4.0 / 0.5**2)  # a gradient need not be a valid temperature
    chain = Chain((TopK(2), Temperature(0.5)))
    by_logits = jax.jit(jax.grad(lambda logits: jax.nn.logsumexp(chain(logits))))(logits)
    expected = np.exp(log_softmax(np.where(kept_by_top_k(logits, 2), logits, -np.inf) / 0.5)) / 0.5
    np.testing.assert_allclose(by_logits, expected, rtol=1e-5)


def test_ones_own_is_a_class():
    """That of the docstring of `Transform`."""

    class Cooling(Transform):
        t: float
        rate: float

        def init(self, prompts, mask, limits):
            return jnp.full(limits.shape, self.t)

        def apply(self, temperature, logits):
            return logits / temperature[:, None]

        def update(self, temperature, token, logits):
            return temperature * self.rate

    assert repr(Cooling(2.0, rate=0.5)).endswith("Cooling(t=2.0, rate=0.5)")
    assert jax.tree.leaves(Cooling(2.0, 0.5)) == [2.0, 0.5]
    steps = MASK.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(applied(Cooling(2.0, 0.5), LOGITS), LOGITS / (2.0 * 0.5**steps), rtol=1e-5)


# Goldens: what transformers makes of the same logits ------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    return load_file(goldens.PATH)


def test_the_goldens_are_of_these_inputs_and_cases(golden):
    expected = goldens.inputs(0)
    assert set(golden) == set(goldens.CASES) | set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(golden[name], array)


@pytest.mark.parametrize("name", goldens.CASES)
def test_a_transform_is_the_processor_of_transformers(golden, name):
    result = goldens.ours(name, golden["logits"], golden["tokens"])
    np.testing.assert_allclose(result, golden[name], rtol=1e-6, atol=1e-6)
