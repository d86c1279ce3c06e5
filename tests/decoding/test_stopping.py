"""Stop strings against plain `in` on the text, and generation that ends where one is complete."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm import models, text
from jaxrl_llm.decoding import beam_search, generate, stop_strings, stream
from jaxrl_llm.decoding.constraints import TextBias, banned_text, text_bias
from jaxrl_llm.decoding.generate import decode
from jaxrl_llm.decoding.transforms import MinLength
from jaxrl_llm.tabular import TabularLM
from tests.conftest import VOCAB, random_params
from tests.decoding.decoders import expected, run, tokens_and_mask

# Ids 0 to 15: nothing, single bytes, several, parts of characters (é is c3 a9, 🙂 is f0 9f 99 82).
PIECES = [
    b"", b"a", b"b", b"aa", b"ab", b"ba", b"aab", b"bab", b"\n", b"\n\n", b"\xc3", b"\xa9", b"\xa9a", b"\xf0\x9f",
    b"\x99\x82", b"\x82b",
]  # fmt: skip
STOPS = [
    ("a",),
    ("aab",),
    ("aab", "bb"),
    ("abab", "ba"),
    ("é",),
    ("🙂b", "é"),
    ("\n\n", "a\n"),
    ("b\n\nab",),
    ("aba", "b"),
]


@functools.cache
def compiled(strings, pieces=tuple(PIECES)):
    return np.asarray(stop_strings(pieces, strings).transitions)


def stops_at(strings, tokens):
    """The number of tokens after which the automaton has first reached its end, or None."""
    table = compiled(strings)
    state = 0
    for count, token in enumerate(tokens, 1):
        state = table[state, token]
        if state == len(table) - 1:
            return count
    return None


def contains_at(strings, tokens):
    """The same by plain search in the bytes so far."""
    texts = [b"".join(PIECES[token] for token in tokens[:count]) for count in range(1, len(tokens) + 1)]
    return next((n for n, each in enumerate(texts, 1) if any(s.encode() in each for s in strings)), None)


@pytest.mark.parametrize("strings", STOPS, ids=repr)
@given(tokens=st.lists(st.integers(0, len(PIECES) - 1), max_size=12))
def test_a_row_stops_with_the_token_that_completes_a_stop_string(strings, tokens):
    assert stops_at(strings, tokens) == contains_at(strings, tokens)


@given(
    st.lists(st.text("abé", min_size=1, max_size=5), min_size=1, max_size=4),
    st.lists(st.integers(0, len(PIECES) - 1), max_size=20),
)
def test_any_stop_strings(strings, tokens):
    assert stops_at(tuple(strings), tokens) == contains_at(strings, tokens)


@pytest.mark.parametrize(
    ("strings", "tokens", "count"),
    [
        (("aab",), [1, 1, 2], 3),  # a, a, b
        (("aab",), [1, 1, 1, 2], 4),  # the first a is given up, not both
        (("aab",), [7, 6, 1], 2),  # in one token
        (("aab",), [5, 4, 2], 2),  # b[a, a]b
        (("bb",), [4, 7], 2),  # a[b, b]ab: from the middle of a token to the middle of the next
        (("é",), [1, 10, 0, 12], 4),  # a character in two tokens, a special token between
        (("é",), [1, 10, 1, 11], None),
        (("🙂b",), [13, 14, 2], 3),
        (("ba", "abab"), [1, 2, 2, 5], 4),
    ],
)
def test_stop_strings_at_and_across_the_boundaries_of_tokens(strings, tokens, count):
    assert contains_at(strings, tokens) == count
    assert stops_at(strings, tokens) == count


def test_the_end_is_never_left():
    assert (compiled(("aab",))[-1] == 15).all()


def test_a_token_beyond_the_vocabulary_adds_no_text():
    stop = stop_strings([b"a", b"b"], ["ab"])
    state = stop.advance(stop.start(1), jnp.asarray([0]))
    for token in (2, 10**6, -1):
        state = stop.advance(state, jnp.asarray([token]))
        assert not stop.reached(state)
    assert stop.reached(stop.advance(state, jnp.asarray([1])))


@pytest.mark.parametrize("strings", [[], [""], ["a", ""], "ab"])
def test_without_a_stop_string_there_is_nothing_to_compile(strings):
    with pytest.raises(ValueError, match="stop strings must be given in a sequence and not be empty"):
        stop_strings(PIECES, strings)


# In generation --------------------------------------------------------------------------------------------------------

LM = TabularLM(vocab_size=3, horizon=8)
PARAMS = random_params(LM, 3)
LETTERS = [b"a", b"ab", b"\n"]
PROMPTS = jnp.asarray(np.random.default_rng(0).integers(0, 3, (64, 2)))
OPTIONS = {"max_new_tokens": 6, "key": jax.random.key(1), "pad_id": 7, "eos_id": 99}


def cut(row, strings, pieces):
    """The tokens of a row up to the one that completes a stop string."""
    for count in range(1, len(row) + 1):
        string = b"".join(pieces[token] for token in row[:count])
        if any(each.encode() in string for each in strings):
            return row[:count]
    return row


@pytest.mark.parametrize("strings", [["b"], ["ba", "\n\n"], ["aaa"], ["zz"]], ids=repr)
def test_a_row_is_the_one_without_stop_strings_cut_where_its_own_text_contains_one(strings):
    """The prompt does not count, and rows end independently."""
    stop = stop_strings(LETTERS, strings)
    stopped = generate(LM, PARAMS, PROMPTS, stop=stop, **OPTIONS)
    free = generate(LM, PARAMS, PROMPTS, stop=stop_strings(LETTERS, ["never"]), **OPTIONS)
    assert free.mask.all()
    expected = [cut(row, strings, LETTERS) for row in np.asarray(free.tokens).tolist()]
    lengths = np.asarray([len(row) for row in expected])
    np.testing.assert_array_equal(stopped.mask, np.arange(6) < lengths[:, None])
    leaves = map(np.asarray, (stopped.tokens, stopped.logp, free.logp))
    for row, tokens, logp, whole in zip(expected, *leaves, strict=True):
        np.testing.assert_array_equal(tokens, row + [7] * (6 - len(row)))
        np.testing.assert_allclose(logp, np.where(np.arange(6) < len(row), whole, 0), atol=1e-6)
    assert (strings == ["zz"]) == (lengths == 6).all()


def test_eos_and_limits_end_rows_as_well():
    stop = stop_strings(LETTERS, ["ba"])
    stopped = generate(LM, PARAMS, PROMPTS, stop=stop, **OPTIONS | {"eos_id": 2})
    for row, mask in zip(np.asarray(stopped.tokens).tolist(), np.asarray(stopped.mask), strict=True):
        row = row[: mask.sum()]
        assert 2 not in row[:-1] and len(cut(row, ["ba"], LETTERS)) == len(row)
        assert len(row) == 6 or row[-1] == 2 or b"ba" in b"".join(LETTERS[token] for token in row)


@pytest.mark.slow
def test_a_stream_stops_where_generation_does():
    stop = stop_strings(LETTERS, ["ba", "\n\n"])
    whole = generate(LM, PARAMS, PROMPTS, stop=stop, **OPTIONS)
    pieces = list(stream(LM, PARAMS, PROMPTS, stop=stop, tokens_at_a_time=2, **OPTIONS))
    tokens = np.concatenate([piece.tokens for piece in pieces], axis=1)
    np.testing.assert_array_equal(tokens, np.asarray(whole.tokens)[:, : tokens.shape[1]])
    assert not np.asarray(whole.mask)[:, tokens.shape[1] :].any()


def test_other_stop_strings_do_not_compile_again():
    generate(LM, PARAMS, PROMPTS, stop=stop_strings(LETTERS, ["b"]), **OPTIONS)
    before = decode._cache_size()
    generate(LM, PARAMS, PROMPTS, stop=stop_strings(LETTERS, ["a\na", "baba", "\n\n"]), **OPTIONS)
    assert decode._cache_size() == before


@pytest.mark.slow
def test_what_a_model_writes_ends_with_the_stop_string():
    loaded = models.load("tiny-gpt2")
    strings, tokenizer = [".", " a"], loaded.tokenizer
    stop = stop_strings(text.token_bytes(tokenizer, loaded.model.vocab_size), strings)
    prompts = jnp.asarray([tokenizer("This is a sentence. It is a")["input_ids"]] * 16)
    written = generate(loaded.model, loaded.params, prompts, max_new_tokens=16, key=jax.random.key(0), stop=stop)
    ended = 0
    for tokens, mask in zip(np.asarray(written.tokens), np.asarray(written.mask), strict=True):
        string, before = (tokenizer.decode(tokens[: mask.sum() - less]) for less in (0, 1))
        ended += any(each in string for each in strings)
        assert not any(each in before for each in strings)
        assert mask.all() or any(each in string for each in strings)
        trimmed = text.trim_at_stop(string, strings)
        assert string.startswith(trimmed) and not any(each in trimmed for each in strings)
    assert ended > 4


# Bans and biases of strings -------------------------------------------------------------------------------------------

CUT = [b"a", b"b", b"ab", b""]
WORDS = TabularLM(vocab_size=4, horizon=5)


def masked(params, tokens, change):
    """Σ log p of tokens under the model after a change of its logits, and whether all are possible."""
    total, table, vocab = 0.0, np.asarray(params["logits"], np.float64), WORDS.vocab_size
    for place in range(len(tokens)):
        prefix = sum(token * vocab**power for power, token in enumerate(reversed(tokens[:place])))
        before = b"".join(CUT[token] for token in tokens[:place])
        logits = table[(vocab**place - 1) // (vocab - 1) + prefix] + [change(before, before + piece) for piece in CUT]
        total += logits[tokens[place]] - np.logaddexp.reduce(logits)
    return total


@pytest.mark.parametrize(
    ("transform", "change"),
    [
        (banned_text(CUT, "ba"), lambda before, after: -np.inf if b"ba" in after else 0.0),
        (
            text_bias(CUT, "ba", 1.3),
            lambda before, after: 1.3 if after.count(b"ba") > before.count(b"ba") else 0.0,
        ),
    ],
    ids=["ban", "bias"],
)
def test_a_string_is_banned_or_biased_however_it_is_cut_into_tokens(transform, change):
    params = random_params(WORDS)
    prompts = jnp.zeros((64, 0), jnp.int32)
    found = jax.jit(
        lambda params: generate(WORDS, params, prompts, max_new_tokens=5, key=jax.random.key(1), transform=transform)
    )(params)
    rows = np.asarray(found.tokens).tolist()
    assert any(b"ba" in b"".join(CUT[token] for token in row) for row in rows) == isinstance(transform, TextBias)
    expected = [masked(params, row, change) for row in rows]
    np.testing.assert_allclose(np.asarray(found.logp_sampler).sum(axis=1), expected, atol=1e-4)
    beams = beam_search(WORDS, params, prompts[:1], num_beams=4, max_new_tokens=5, transform=transform)
    for row, log_prob in zip(np.asarray(beams.tokens)[0].tolist(), np.asarray(beams.log_prob)[0], strict=True):
        if isinstance(transform, TextBias):
            assert log_prob == pytest.approx(masked(params, row, change), abs=1e-4)
        else:
            assert b"ba" not in b"".join(CUT[token] for token in row)


def test_a_bias_is_a_finite_number():
    with pytest.raises(ValueError, match="the bias must be a finite number, but is -inf"):
        text_bias(CUT, "ba", -np.inf)


# In the other decoders ------------------------------------------------------------------------------------------------

SINGLES = [bytes([97 + token]) for token in range(VOCAB)]  # of the tiny models


@pytest.mark.parametrize("name", [pytest.param("speculative", marks=pytest.mark.slow), "look-up", "contrastive"])
def test_decoders_of_several_tokens_at_once_end_at_stop_strings_too(name):
    """Rows are those without stop strings, up to the token that completes one."""
    tokens, mask = tokens_and_mask(expected(name))
    letters = [b"".join(SINGLES[token] for token in row).decode() for row in tokens]
    strings = [letters[0][4:6], letters[1][9], letters[2][-1]]
    found = tokens_and_mask(run(name, stop=stop_strings(SINGLES, strings)))
    ends = 0
    for row, text_ in enumerate(letters):
        length = min([text_.find(each) + len(each) for each in strings if each in text_], default=len(text_))
        assert found[1][row].sum() == length and (found[0][row][:length] == tokens[row][:length]).all()
        ends += length < mask[row].sum()
    assert ends >= 2


def test_drafts_that_hold_a_stop_string_end_there_but_not_before_the_minimum_length():
    tokens = tokens_and_mask(expected("greedy"))[0]
    strings = ["".join(SINGLES[token].decode() for token in tokens[0, 2:4]), SINGLES[tokens[1, 6]].decode()]
    options = {"transform": [MinLength(5, [])], "stop": stop_strings(SINGLES, strings)}
    plain, drafted = (tokens_and_mask(run(name, **options)) for name in ("greedy", "look-up"))
    np.testing.assert_array_equal(plain[1], drafted[1])
    np.testing.assert_array_equal(plain[0], drafted[0])
    assert plain[1].sum(axis=1).min() < tokens.shape[1] and plain[1].sum(axis=1).min() >= 5
