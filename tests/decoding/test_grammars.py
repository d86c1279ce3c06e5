"""Grammars against a plain recogniser, and distributions against enumeration."""

import dataclasses
import itertools
import json
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.decoding import constraints, generate, grammars, stream
from jaxrl_llm.decoding.beam import beam_search
from jaxrl_llm.decoding.generate import decode
from jaxrl_llm.decoding.transforms import Temperature, TopP
from jaxrl_llm.tabular import TabularLM
from tests.conftest import TINY, kept_by_top_p, log_softmax, random_params
from tests.decoding.decoders import (
    DECODERS,
    NO_TRANSFORM,
    assert_texts_follow,
    exact_log_probs,
    params_of,
    texts_of,
    tokens_and_mask,
)

# Rules: of each name, the ways to write it. A symbol that is not a name is one character.
BRACKETS = {"start": [["(", "start", ")", "start"], []]}
SUMS = {
    "start": [["term", "more"]],
    "more": [["+", "term", "more"], []],
    "term": [["1"], ["-", "term"], ["(", "start", ")"]],
}
JSON = {
    "start": [["string"], ["1"], ["[", "]"], ["[", "start", "items", "]"], ["{", "}"], ["{", "pair", "pairs", "}"]],
    "items": [[",", "start", "items"], []],
    "pair": [["string", ":", "start"]],
    "pairs": [[",", "pair", "pairs"], []],
    "string": [['"', "rest"]],
    "rest": [["é", "rest"], ['"']],
}
LANGUAGES = {
    "brackets": (BRACKETS, ["(", ")", "()", "((", ")(", "(", "", "x", "$"]),
    "sums": (SUMS, ["1", "+", "-", "(", ")", "1+", ")+(", "--1", "", "$"]),
    "json": (JSON, ['"', b"\xc3", b"\xa9", "1", "[", "]", "{", "}", ":", ",", '":', '"é"', "[[", "}]", "", "$"]),
}


def lark_of(rules):
    """The same rules as llguidance reads them."""

    def written(symbol):
        return symbol if symbol in rules else json.dumps(symbol, ensure_ascii=False)

    return "\n".join(f"{name}: {' | '.join(' '.join(map(written, way)) for way in rules[name])}" for name in rules)


def expanded(rules, stacks):
    """All stacks whose first symbol is a character, and the empty one."""
    done, pending = set(), list(stacks)
    while pending:
        stack = pending.pop()
        if stack and stack[0] in rules:
            pending += [(*way, *stack[1:]) for way in rules[stack[0]]]
        else:
            done.add(stack)
    return done


def read(rules, content):
    """The stacks of symbols that may follow these bytes; all of them can be written, so none means no text."""
    by_byte = {
        name: [[s if s in rules else byte for s in way for byte in ([s] if s in rules else s.encode())] for way in ways]
        for name, ways in rules.items()
    }
    stacks = expanded(by_byte, {("start",)})
    for byte in content:
        stacks = expanded(by_byte, {stack[1:] for stack in stacks if stack and stack[0] == byte})
    return stacks


def followers(rules, pieces, prefix):
    """The tokens that may follow; None if the prefix itself is not possible. The last piece is EOS."""
    encoded = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
    content, eos = b"".join(encoded[token] for token in prefix), len(pieces) - 1
    if eos in prefix:
        return {eos} if followers(rules, pieces, prefix[: prefix.index(eos)]) else None
    stacks = read(rules, content)
    if not stacks or any(not encoded[token] for token in prefix):
        return None
    found = {token for token, piece in enumerate(encoded[:-1]) if piece and read(rules, content + piece)}
    return found | ({eos} if () in stacks else set())


def compiled(name):
    rules, pieces = LANGUAGES[name]
    return constraints.from_grammar(lark_of(rules), pieces, len(pieces) - 1)


@pytest.mark.parametrize(("name", "length"), [("brackets", 4), ("sums", 4), ("json", 3)])
def test_the_tokens_that_may_follow_are_those_of_a_plain_recogniser(name, length):
    """After every prefix that is possible; after one that is not, all are kept."""
    rules, pieces = LANGUAGES[name]
    expected, level = {}, {(): followers(rules, pieces, ())}
    while level:
        expected |= level
        nexts = [(*prefix, token) for prefix, kept in level.items() if kept for token in range(len(pieces))]
        nexts = nexts if len(next(iter(level))) < length else []
        level = {prefix: followers(rules, pieces, prefix) for prefix in nexts}
    tokens = np.zeros((len(expected), length + 3), int)
    mask = np.zeros(tokens.shape, bool)
    for row, prefix in enumerate(expected):
        tokens[row, 2 : 2 + len(prefix)], mask[row, 2 : 2 + len(prefix)] = prefix, True
    kept = compiled(name)(jnp.zeros((len(expected), len(pieces))), tokens, mask) > -jnp.inf
    wanted = [[allowed is None or t in allowed for t in range(len(pieces))] for allowed in expected.values()]
    np.testing.assert_array_equal(kept, wanted)
    assert sum(map(any, np.asarray(wanted)[:, :-1])) > 100


# The distribution, by enumeration -------------------------------------------------------------------------------------

LM = TabularLM(vocab_size=4, horizon=4)
PARAMS = jax.tree.map(lambda leaf: leaf / 2, random_params(LM, 4))
PIECES, EOS, DRAWS = ["(", ")", "()", "$"], 3, 4000
NOTHING = jnp.zeros((DRAWS, 0), jnp.int32)
PREFIXES = [prefix for length in range(4) for prefix in itertools.product(range(4), repeat=length)]
LOGITS = dict(zip(PREFIXES, np.asarray(PARAMS["logits"], np.float64), strict=True))


def grammar(rules=BRACKETS):
    return constraints.from_grammar(lark_of(rules), PIECES, EOS)


def exact_rows(rules=BRACKETS, warp=lambda row: row):
    """The log-probabilities of the tokens of every row that can be drawn: the model's, masked and renormalised."""
    rows, pending = {}, {(): []}
    while pending:
        prefix, logps = pending.popitem()
        if len(prefix) == 4 or EOS in prefix:
            rows[prefix] = logps
            continue
        allowed = followers(rules, PIECES, prefix)
        logp = log_softmax(warp(np.where([token in allowed for token in range(4)], LOGITS[prefix], -np.inf)))
        pending |= {(*prefix, token): [*logps, logp[token]] for token in range(4) if logp[token] > -np.inf}
    return rows


def drawn(transform, **options):
    options = {"max_new_tokens": 4, "eos_id": EOS, "key": jax.random.key(0)} | options
    return generate(LM, PARAMS, NOTHING, transform=transform, **options)


@pytest.mark.parametrize("number", [1.0, 0.8])
def test_rows_follow_the_masked_distribution(number):
    def warp(row):
        return np.where(kept_by_top_p(row / number, number), row / number, -np.inf)

    exact = exact_rows(warp=warp)
    generation = drawn([grammar(), Temperature(number), TopP(number)])
    found = assert_texts_follow(generation, {row: np.exp(sum(logps)) for row, logps in exact.items()})
    for row, logp in zip(found[:300], np.asarray(generation.logp_sampler)[:300], strict=True):
        np.testing.assert_allclose(logp[: len(row)], exact[row], atol=1e-5)


def test_the_oracle_knows_the_distribution():
    """Sequences go on after EOS, with EOS alone."""
    exact = {(*row, *[EOS] * (4 - len(row))): sum(logps) for row, logps in exact_rows().items()}
    every = itertools.product(range(4), repeat=4)
    found = exact_log_probs(LM, PARAMS, grammar())
    for row, logp in zip(every, np.asarray(found), strict=True):
        np.testing.assert_allclose(logp, exact.get(row, -np.inf), atol=1e-5)


@pytest.mark.slow
def test_each_row_may_have_a_grammar_of_its_own_and_the_program_stays():
    ones = [grammar(), grammar({"start": [["(", "start"], [")"]]})]
    drawn(ones[0])
    before = decode._cache_size()
    numbers = jnp.arange(DRAWS) % 2
    both = dataclasses.replace(ones[0], number=jnp.asarray([one.number for one in ones])[numbers])
    apart = [drawn(one) for one in ones]
    assert decode._cache_size() == before
    found = drawn(both)
    for number in (0, 1):
        np.testing.assert_array_equal(found.tokens[number::2], apart[number].tokens[number::2])
    assert {*texts_of(apart[0])} != {*texts_of(apart[1])}


def test_a_wide_beam_finds_all_rows_and_nothing_else():
    beams = beam_search(LM, PARAMS, NOTHING[:2], num_beams=48, max_new_tokens=4, transform=grammar(), eos_id=EOS)
    totals = {row: sum(log_softmax(LOGITS[row[:t]])[row[t]] for t in range(len(row))) for row in exact_rows()}
    assert len(totals) < 48
    found = np.asarray(beams.log_prob[1]) > -np.inf
    tokens, mask = np.asarray(beams.tokens[1])[found].tolist(), np.asarray(beams.mask[1])[found]
    rows = [tuple(row[: valid.sum()]) for row, valid in zip(tokens, mask, strict=True)]
    assert rows == sorted(totals, key=totals.get, reverse=True)
    np.testing.assert_allclose(np.asarray(beams.log_prob[1])[found], [totals[row] for row in rows], atol=1e-5)


LETTERS = ["(", ")", "()", "((", "))", *"abcdefghijklmnopq", "$"]  # 23, as the tiny models have
SLOW = set(DECODERS) - NO_TRANSFORM - {"sampled"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=[pytest.mark.slow] * (each in SLOW)) for each in DECODERS if each != "contrastive"],
)
def test_every_decoder_stays_in_the_grammar(name):
    transform = constraints.from_grammar(lark_of(BRACKETS), LETTERS, 22)
    prompts = jnp.asarray([[1, 2, 3], [4, 5, 6], [7, 8, 22]])
    found = DECODERS[name](
        TINY["gpt2"], params_of("gpt2"), prompts, max_new_tokens=np.asarray([3, 8, 16]), key=jax.random.key(0),
        prompt_mask=None, eos_id=22, transform=transform,
    )  # fmt: skip
    tokens, mask = (each.reshape(-1, each.shape[-1]) for each in tokens_and_mask(found))
    for row, valid in zip(tokens, mask, strict=True):
        prefix = tuple(row[valid].tolist())
        for end in range(len(prefix)):
            assert prefix[end] in followers(BRACKETS, LETTERS, prefix[:end])
    assert mask.sum() > 2 * len(prompts), "texts are not all empty"


def test_a_stream_gives_the_same():
    options = {"max_new_tokens": 4, "eos_id": EOS, "key": jax.random.key(0), "transform": grammar()}
    pieces = list(stream(LM, PARAMS, NOTHING, **options))
    joined = np.concatenate([piece.tokens for piece in pieces], axis=1)
    np.testing.assert_array_equal(joined, drawn(grammar()).tokens[:, : joined.shape[1]])


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lark", "vocabulary", "eos", "message"),
    [
        (
            "start: foo",
            PIECES,
            EOS,
            r"grammar must be in llguidance's Lark syntax, but is not: .*unknown name: \"foo\"",
        ),
        ('start: "x"', PIECES, EOS, "no text of the grammar can be spelt in this vocabulary"),
        ('start: "("', PIECES, 4, r"eos_ids must be tokens in \[0, 4\), the vocabulary, .* but are \[4\]"),
        ('start: "("', PIECES, (), r"eos_ids must be tokens .* but are \[\]"),
    ],
)
def test_what_is_no_grammar_is_an_error(lark, vocabulary, eos, message):
    with pytest.raises(ValueError, match=message):
        constraints.from_grammar(lark, vocabulary, eos)


def test_another_vocabulary_is_an_error():
    lm = TabularLM(3, 4)
    with pytest.raises(ValueError, match="the model has 3 tokens, but the grammar was compiled for 4"):
        generate(lm, random_params(lm), NOTHING[:2], max_new_tokens=2, greedy=True, transform=grammar())


def test_what_the_vocabulary_cannot_continue_is_an_error():
    dead = constraints.from_grammar('start: "(" "x"', PIECES, EOS)
    with pytest.raises(FloatingPointError, match="no token could be drawn in row 0 at new token 1"):
        drawn(dead)


def test_without_llguidance_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxrl_llm\[grammar\]'"):
        constraints.from_grammar('start: "()" "()" "()"', PIECES, EOS)


OTHERS = ["(", "x", ")", "$"]


@pytest.fixture
def kept(monkeypatch):
    """No grammars yet, and room for places of three tokens in all."""
    monkeypatch.setattr(grammars, "KEPT", 3 * (grammars.MATCHER + 4 * grammars.TOKEN))
    monkeypatch.setattr(grammars, "_kept", grammars.Kept())
    return grammars._kept


def test_matchers_that_were_dropped_are_computed_anew(kept):
    one = grammar()
    rows = [prefix for prefix in PREFIXES if followers(BRACKETS, PIECES, prefix)]
    tokens, mask = np.zeros((len(rows), 3), int), np.zeros((len(rows), 3), bool)
    for row, prefix in enumerate(rows):
        tokens[row, : len(prefix)], mask[row, : len(prefix)] = prefix, True
    found = np.asarray(one(jnp.zeros((len(rows), 4)), tokens, mask) > -jnp.inf)
    assert [set(np.flatnonzero(row).tolist()) for row in found] == [followers(BRACKETS, PIECES, row) for row in rows]
    assert 0 < kept.size <= grammars.KEPT


def test_the_places_of_all_grammars_have_one_limit(kept):
    for rules in (BRACKETS, SUMS):
        number = np.full(4, grammar(rules).number)
        grammars.places(number, np.asarray([[0], [1], [2], [3]]), words=1)
        grammars.places(number, np.asarray([[0, 0, 0]]).repeat(4, axis=0), words=1)
        assert 0 < kept.size <= grammars.KEPT
    assert [bool(each.places) for each in kept.grammars.values()] == [False, True]


def test_what_is_kept_of_many_grammars_is_bounded(kept, monkeypatch):
    """The matchers of the last two, and the texts of about three; what is forgotten is an error."""
    monkeypatch.setattr(grammars, "GRAMMARS", 2)
    texts = [f'start: "(" | "{")" * count}"' for count in range(1, 5)]
    monkeypatch.setattr(grammars, "TEXTS", sum(map(len, texts[:3])))
    made, matchers = [], []
    for each in texts[:3]:
        made.append(constraints.from_grammar(each, PIECES, EOS))
        drawn(made[-1])
        matchers.append(weakref.ref(kept.grammars[made[-1].number]))
    assert [each() is None for each in matchers] == [True, False, False]
    numbers = [each.number for each in made]
    assert [constraints.from_grammar(each, PIECES, EOS).number for each in texts[:3]] == numbers
    assert {*texts_of(drawn(made[0]))} == {(0, EOS), (1, EOS)}, "a matcher is made anew"
    assert len(kept.grammars) == 2 and kept.size == sum(
        grammars._bytes(*place) for each in kept.grammars.values() for place in each.places.items()
    )
    fourth = constraints.from_grammar(texts[3], PIECES, EOS)
    drawn(made[0])
    assert [*kept.sources] == [fourth.number, numbers[0]] and kept.characters == len(texts[0] + texts[3])
    with pytest.raises(
        ValueError, match=f"grammar {numbers[1]} must be one of those made last, but is not known: make it again"
    ):
        drawn(made[1])
    assert constraints.from_grammar(texts[1], PIECES, EOS).number == numbers[1], "the same text has the same number"
    assert {*texts_of(drawn(made[1]))} == {(0, EOS), (1, 1, EOS)}
    assert kept.size == sum(grammars._bytes(*place) for each in kept.grammars.values() for place in each.places.items())


def test_grammars_of_one_text_over_two_vocabularies_are_two(kept, monkeypatch):
    text = 'start: "()"'
    one, other = (constraints.from_grammar(text, pieces, EOS) for pieces in (PIECES, OTHERS))
    assert one.number != other.number
    assert {*texts_of(drawn(one))} == {(0, 1, EOS), (2, EOS)} and {*texts_of(drawn(other))} == {(0, 2, EOS)}
    monkeypatch.setattr(grammars, "TEXTS", len(text))
    assert constraints.from_grammar(text, OTHERS, EOS).number == other.number, "the first is forgotten"
    with pytest.raises(ValueError, match=f"grammar {one.number} must be one of those made last"):
        drawn(one)


def test_the_host_takes_the_values_of_arrays_and_calls_nothing_of_them():
    """A jax operation within the callback may wait for the program that waits for it."""

    class OfDevice:
        def __init__(self, value):
            self.value, self.shape = np.asarray(value), np.shape(value)

        def __array__(self, dtype=None, copy=None):
            return self.value

        def reshape(self, *shape, **options):
            raise AssertionError("a jax operation")

    bits, status = grammars.places(OfDevice([grammar().number] * 2), OfDevice([[0], [1]]), words=1)
    assert status.tolist() == [grammars.OPEN, grammars.LOST] and bits.shape == (2, 1)
