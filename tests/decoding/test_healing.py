"""Token healing against enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.decoding import generate, stop_strings
from jaxrl_llm.decoding.healing import beginnings, healing, taken_back
from jaxrl_llm.tabular import TabularLM
from tests.conftest import log_softmax, random_params
from tests.decoding.decoders import assert_texts_follow, exact_log_probs, texts_of

PIECES = [b"a", b"ab", b"b", b"abba", b""]
EOS, LIMIT, DRAWS = 4, 3, 6000
LM = TabularLM(vocab_size=5, horizon=4)
PARAMS = jax.tree.map(lambda leaf: leaf / 2, random_params(LM, 4))
PREFIXES = [prefix for length in range(4) for prefix in itertools.product(range(5), repeat=length)]
LOGITS = dict(zip(PREFIXES, np.asarray(PARAMS["logits"], np.float64), strict=True))


def begins(piece, rest):
    """True if the token writes a part of the text, or all of it and more."""
    return bool(piece) and (piece.startswith(rest) or rest.startswith(piece))


def can_write(rest, tokens):
    """True if so many tokens can write the text, or more than it."""
    ways = (piece for piece in PIECES if begins(piece, rest))
    return not rest or (tokens > 0 and any(can_write(rest[len(piece) :], tokens - 1) for piece in ways))


def exact_rows(text, prompt=(2,), limit=LIMIT):
    """The log-probabilities of the tokens of every row: at each token, the model's among those that fit the text."""
    rows, pending = {}, {(): []}
    while pending:
        row, logps = pending.popitem()
        if len(row) == limit or EOS in row:
            rows[row] = logps
            continue
        rest = text[sum(len(PIECES[token]) for token in row) :]
        left = limit - len(row) - 1
        fits = [not rest or (begins(piece, rest) and can_write(rest[len(piece) :], left)) for piece in PIECES]
        logp = log_softmax(np.where(fits, LOGITS[(*prompt, *row)], -np.inf))
        pending |= {(*row, token): [*logps, logp[token]] for token in range(5) if logp[token] > -np.inf}
    return rows


def drawn(texts, **options):
    options = {"max_new_tokens": LIMIT, "eos_id": EOS, "key": jax.random.key(0)} | options
    prompts = jnp.full((len(texts), 1), 2)
    return generate(LM, PARAMS, prompts, transform=healing(PIECES, texts), **options)


def test_rows_follow_the_masked_distribution_each_with_its_own_text():
    texts = [b"a", b"abb", b""]
    found = drawn([texts[row % 3] for row in range(3 * DRAWS)])
    for number, text in enumerate(texts):
        exact, mine = exact_rows(text), jax.tree.map(lambda leaf, n=number: leaf[n::3], found)
        rows = assert_texts_follow(mine, {row: np.exp(sum(logps)) for row, logps in exact.items()})
        assert all(b"".join(PIECES[token] for token in row).startswith(text) for row in rows)
        for row, logp in zip(rows[:200], np.asarray(mine.logp_sampler)[:200], strict=True):
            np.testing.assert_allclose(logp[: len(row)], exact[row], atol=1e-5)


@pytest.mark.parametrize("text", [b"a", b"ab", b"bb"])
def test_the_oracle_knows_the_distribution(text):
    """Sequences go on after EOS, so that those that have one are left out."""
    exact = {row: sum(logps) for row, logps in exact_rows(text).items() if len(row) == LIMIT}
    found = exact_log_probs(LM, PARAMS, healing(PIECES, [text] * 125), prompt=(2,))
    for row, logp in zip(itertools.product(range(5), repeat=LIMIT), np.asarray(found), strict=True):
        if EOS not in row[:-1]:
            np.testing.assert_allclose(logp, exact.get(row, -np.inf), atol=1e-5)


def test_the_text_is_written_within_the_limit():
    assert set(texts_of(drawn([b"abb"] * 500, max_new_tokens=1))) == {(3,)}
    assert set(texts_of(drawn([b"abab"] * 500, max_new_tokens=2))) == {(1, 1), (1, 3)}
    with pytest.raises(ValueError, match=r"row 1 must have at least 2 new tokens to write .* again, but may have 1"):
        drawn([b"a", b"abab"], max_new_tokens=1)
    with pytest.raises(ValueError, match="no tokens of this vocabulary spell the text b'ac'"):
        healing(PIECES, [b"ac"])


def test_stop_strings_are_searched_after_it():
    found = drawn([b"ab"] * 500, stop=stop_strings(PIECES, ["b"]))
    rows = set(texts_of(found))
    assert (1, 2) in rows and (0, 2, 2) in rows and (3, 2) in rows and (1,) not in rows
    assert all(2 not in row[:-1] or row[0] == 0 for row in rows)


@pytest.mark.parametrize(
    ("prompt", "least", "count"),
    [
        ([0], 0, 1),  # a: ab, abba
        ([0], 1, 0),
        ([3, 1], 1, 1),  # ab: abba; abbaab begins nothing
        ([2, 0, 2, 2], 1, 3),  # abb, though neither b nor bb begins a token
        ([0, 2, 0], 0, 1),  # a
        ([4, 0, 4], 0, 0),  # a token without text stays
        ([0, 4, 0], 0, 1),
        ([3], 0, 0),
        ([], 0, 0),
    ],
)
def test_the_most_tokens_whose_text_begins_a_longer_one_are_taken_back(prompt, least, count):
    assert taken_back(beginnings(PIECES), PIECES, prompt, least=least) == count


def test_the_tables_of_many_prompts_grow_with_their_texts_and_with_the_vocabulary_but_not_with_the_product():
    pieces = [bytes(letters) for letters in itertools.product(range(97, 123), repeat=3)] + [b"a", b"b", b"c", b""]
    texts = [bytes(letters) for letters in itertools.product(b"abc", repeat=4)]
    found = healing(pieces, texts)
    assert sum(leaf.size for leaf in jax.tree.leaves(found)) < 2 * len(pieces)
    state = found.init(jnp.zeros((81, 0), int), jnp.zeros((81, 0), bool), jnp.full(81, 2))
    kept = np.asarray(found.apply(state, jnp.zeros((81, len(pieces)))) > -jnp.inf)
    for row, text in zip(kept, texts, strict=True):  # within 2 tokens
        assert {pieces[token] for token in np.flatnonzero(row)} == {text[:1], text[:3]}
