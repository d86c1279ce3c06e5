"""Constraints against regular expressions that Python's `re` matches, and distributions against enumeration."""

import collections
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm import models, text
from jaxrl_llm.decoding import automata, constraints, generate, stream
from jaxrl_llm.decoding.beam import beam_search
from jaxrl_llm.decoding.constraints import Automaton, Constrained
from jaxrl_llm.decoding.generate import decode
from jaxrl_llm.decoding.transforms import Chain, Temperature, TopK, TopP
from jaxrl_llm.tabular import TabularLM
from tests.conftest import first_quick, kept_by_top_p, log_softmax, random_params
from tests.decoding.decoders import DECODERS, NO_TRANSFORM, assert_texts_follow, texts_of, tokens_and_mask

LM = TabularLM(vocab_size=4, horizon=4)
PARAMS = jax.tree.map(lambda leaf: leaf / 2, random_params(LM, 4))
LETTERS = ["a", "b", "c", "$"]  # of which the last is EOS, where there is one
EOS = 3
DRAWS = 10_000
NOTHING = jnp.zeros((DRAWS, 0), jnp.int32)


# From a pattern to an automaton over bytes ----------------------------------------------------------------------------

PATTERNS = [
    "a|ab", "(no|not)", "a*?", "(a|ab)(b|ba)", "[^a]", r"\d+", "é|b", "(?i)aB", "(?i:é)b", "a{2,3}?b?", "^ab$", "", ".",
    "(|a)+", "(a*)*b", "(?s:.)b", r"[^\W\d]", r"(?a:\w)+", "a{0}", "((a|b){1,2}é?)+", r"\S\s*", "(?x) a  b # c",
    r"\Aa\Z", "[a-bé-🙂]{2}", r"(?P<n>[ab\d])🙂?", "a{,2}b{1,}",
]  # fmt: skip


def accepts(compiled, content):
    """True if the bytes are accepted, read one by one."""
    state, part, symbols = 0, 0, compiled.step.shape[1]
    for byte in content:
        code = compiled.spelling[part, byte]
        part = max(code - symbols, 0)
        if 0 <= code < symbols:
            state = compiled.step[state, code]
        if code < 0 or state < 0:
            return False
    return bool(compiled.accepting[state]) and part == 0


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_accepts_what_re_matches(pattern):
    compiled = automata.from_pattern(pattern)
    for length in range(4):
        for letters in itertools.product("abéÉ1٣\n 🙂ü", repeat=length):
            string = "".join(letters)
            assert accepts(compiled, string.encode()) == bool(re.fullmatch(pattern, string)), string


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), st.binary(max_size=4))
def test_any_text_but_no_other_bytes(string, content):
    compiled = automata.from_pattern(r"(?s:.)*")
    assert accepts(compiled, string.encode())
    try:
        content.decode()
    except UnicodeDecodeError:
        assert not accepts(compiled, content)
    else:
        assert accepts(compiled, content)


@pytest.mark.parametrize("content", [b"\xc0\x80", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xff"])
def test_what_is_not_utf8_is_no_text(content):
    assert not accepts(automata.from_pattern("(?s:.)*"), content)


def test_equal_states_are_one():
    for pattern in ("(yes|no|now)", "(yes)|(no(w?))", "(y|y)es|now|no"):
        assert len(automata.from_pattern(pattern).step) == 6  # "", y, ye, n, no, the end


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_two_states_accept_the_same_texts(pattern):
    step, accepting, _ = automata.from_pattern(pattern)
    of_state = {state: bool(accepts) for state, accepts in enumerate([*accepting, False])}  # the last: NOWHERE, −1
    for _ in of_state:
        keys = {
            state: (of_state[state], *(of_state[t % len(of_state)] for t in step[state])) for state in range(len(step))
        }
        keys[len(step)] = (of_state[len(step)], *[of_state[len(step)]] * step.shape[1])
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys.values()))}
        of_state = {state: numbers[key] for state, key in keys.items()}
    assert len(set(of_state.values())) == len(step) + 1


ANCHORED = [
    *["^a|b$", "(^yes$)|(^no$)", "^^a$", "a$\n", "a$\n?", "(a$|b)\n*", "a*^b", r"a\Z\n?", r"\Aa", "a^", "a($)*", "$^"],
    *["(?m)^a$\n^b$", "(?m)(^a\n?)*", "(?m)a$.b", "(?ms)a$.b", "(?m)\\n^a", "(?:^a|b)+$\n?"],
]


@pytest.mark.parametrize("pattern", ANCHORED)
def test_anchors_are_those_of_re(pattern):
    compiled = automata.from_pattern(pattern)
    for length in range(5):
        for string in map("".join, itertools.product("ab\n", repeat=length)):
            assert accepts(compiled, string.encode()) == bool(re.fullmatch(pattern, string)), string


@pytest.mark.parametrize(
    "pattern", [r"a\b", "(?=a)a", r"(a)\1", "a++", "(?>a)b", "(", "[b-a]", "(a)(?(1)a|b)", "(?<!a)b"]
)
def test_what_is_no_pattern_or_not_regular_is_an_error(pattern):
    with pytest.raises(ValueError, match=r"is not a regular expression|uses .* no finite automaton"):
        automata.from_pattern(pattern)


@pytest.mark.parametrize("pattern", ["[ab]*a[ab]{14}", "(a{1,1000}){1,1000}"])
def test_too_many_states_are_an_error(pattern):
    with pytest.raises(ValueError, match=r"needs more than 10000 states, .* such as \(\?a\)\\w or \[A-Za-z"):
        automata.from_pattern(pattern)


def test_too_large_a_table_is_an_error_that_names_a_way_out(monkeypatch):
    monkeypatch.setattr(automata, "MAX_ENTRIES", 1000)
    constraints.from_regex("[ab]{31}", ["a", "bb"])
    with pytest.raises(ValueError, match=r"more than 1000 entries, 65 states .* use .* such as \(\?a\)\\w or \[A-Za-z"):
        constraints.from_regex("[ab]{64}", ["a", "bb"])


# Over tokens ----------------------------------------------------------------------------------------------------------


def run(automaton, tokens):
    """The state after the tokens, −1 when a transition was missing."""
    state = 0
    for token in tokens:
        state = int(automaton.transitions[state, token]) if state >= 0 else -1
    return state


@pytest.mark.parametrize("pattern", ["(yes|no)", "[0-9]{2}(-[0-9])?", "é+", "(ab|a)*", "n?o.{0,2}"])
def test_every_tokenisation_of_a_match_and_nothing_else_is_accepted(pattern):
    pieces = b"|y|e|es|yes|n|o|no|\xc3|\xa9|\xa9\xc3|1|23-|4|ab".split(b"|")
    automaton = constraints.from_regex(pattern, pieces)
    accepting, table = np.asarray(automaton.accepting), np.asarray(automaton.transitions).tolist()
    found = 0
    for length in range(5):
        for tokens in itertools.product(range(len(pieces)), repeat=length):
            state = functools.reduce(lambda state, token: table[state][token] if state >= 0 else -1, tokens, 0)
            content = b"".join(pieces[token] for token in tokens)
            matches = re.fullmatch(pattern, content.decode(errors="surrogateescape")) is not None
            expected = matches and 0 not in tokens and content.decode(errors="ignore").encode() == content
            assert (state >= 0 and accepting[state]) == expected, tokens
            found += expected
    assert found > 1


LARGE = [
    (r"\w{1,64}", 65),
    (r"[^\W\d_]{1,30}", 31),
    (".{0,1000}", 1001),
    (r"[\w.+-]{1,64}@[\w-]{1,63}(\.[\w-]{2,63}){1,3}", 321),
]


@pytest.mark.parametrize(("pattern", "states"), LARGE)
def test_repetitions_of_large_classes_have_small_tables(pattern, states):
    """One state for each character of the text, however many characters the class has."""
    pieces = tiny()[1]
    automaton, after = constraints.from_regex(pattern, pieces), jax.jit(Automaton.after)
    assert automaton.table.shape[0] == 1 << (states - 1).bit_length()
    assert len(automata.from_pattern(pattern).step) == states
    assert sum(leaf.size for leaf in jax.tree.leaves(automaton)) < 1_100_000
    random = np.random.default_rng(0)
    for string in (
        "é",
        "ab_c",
        "日本" * 15,
        "the" * 21,
        "the" * 22,
        "x@y.ß1",
        "é.the+c@all-of.f1.gh",
        "\n",
        "🙂a",
        "",
        "a\n",
    ):
        content, state = string.encode(), jnp.int32(0)
        while content and state >= 0:
            token = random.choice([token for token, piece in enumerate(pieces) if piece and content.startswith(piece)])
            content, state = content[len(pieces[token]) :], after(automaton, state, token)
        assert (state >= 0 and automaton.accepting[state]) == bool(re.fullmatch(pattern, string)), string


def test_an_automaton_is_trimmed_and_knows_its_distances():
    #  0 -a-> 1 -a-> 2 (accepting);  0 -b-> 3, from which nothing leads on but itself
    automaton = Automaton(np.asarray([[1, 3], [2, -1], [-1, -1], [3, 3]]), np.asarray([False, False, True, False]))
    np.testing.assert_array_equal(automaton.transitions, [[1, -1], [2, -1], [-1, -1], [-1, -1]])
    np.testing.assert_array_equal(automaton.distance, [2, 1, 0, constraints.UNREACHABLE])


def test_an_automaton_without_missing_transitions_may_be_unsigned():
    automaton = Automaton(np.asarray([[1, 0], [1, 1]], np.uint8), np.asarray([False, True]))
    np.testing.assert_array_equal(automaton.transitions, [[1, 0], [1, 1]])
    np.testing.assert_array_equal(automaton.without([0]).distance, [constraints.UNREACHABLE, 0])
    np.testing.assert_array_equal(automaton.without([0]).transitions, [[-1, -1], [-1, 1]])


def test_distances_are_those_of_the_shortest_texts():
    automaton = constraints.from_regex("(ab)+c|b{4}|a", ["a", "b", "bc", "c"])
    for length in range(4):
        for tokens in itertools.product(range(4), repeat=length):
            state = run(automaton, tokens)
            if state >= 0:
                ways = (
                    more
                    for more in range(5)
                    for rest in itertools.product(range(4), repeat=more)
                    if (end := run(automaton, [*tokens, *rest])) >= 0 and automaton.accepting[end]
                )
                assert automaton.distance[state] == next(ways)
        if length == 2:
            break


def test_choices_are_literal_texts():
    automaton = constraints.from_choices(["a.", "(b", ".*"], ["a", ".", "(", "b", "*", "a."])
    accepted = {
        tokens
        for length in range(4)
        for tokens in itertools.product(range(6), repeat=length)
        if (state := run(automaton, tokens)) >= 0 and automaton.accepting[state]
    }
    assert accepted == {(0, 1), (5,), (2, 3), (1, 4)}


@pytest.mark.parametrize(
    ("transitions", "accepting", "message"),
    [
        (np.zeros((2, 3)), np.ones(2, bool), r"integers \[state, vocab\], but are float64\[2, 3\]"),
        (np.zeros((0, 3), int), np.ones(0, bool), "integers"),
        (np.zeros((2, 3), int), np.ones(3, bool), r"accepting must be bool\[2\].*bool\[3\]"),
        (np.zeros((2, 3), int), np.ones(2), "accepting must be bool"),
        (np.full((2, 3), 2), np.ones(2, bool), r"state in \[0, 2\) or be -1, but range from 2 to 2"),
        (np.full((2, 3), -2), np.ones(2, bool), "range from -2 to -2"),
    ],
)
def test_tables_that_are_no_automaton_are_an_error(transitions, accepting, message):
    with pytest.raises(ValueError, match=message):
        Automaton(transitions, accepting)


@pytest.mark.parametrize("strings", [[], "yes"])
def test_choices_come_in_a_sequence(strings):
    with pytest.raises(ValueError, match="choices must be a sequence of strings"):
        constraints.from_choices(strings, LETTERS)


def test_what_the_vocabulary_cannot_spell_is_an_error():
    with pytest.raises(ValueError, match="no text that 'x' matches can be spelt"):
        constraints.from_regex("x", LETTERS)
    with pytest.raises(ValueError, match=r"no text that .* can be spelt"):
        constraints.from_regex(r"[^\s\S]", LETTERS)
    with pytest.raises(ValueError, match="the automaton accepts no text"):
        Constrained(constraints.from_regex(r"\$", LETTERS), EOS)  # the bytes of EOS are no text


def test_eos_is_of_the_vocabulary():
    with pytest.raises(ValueError, match=r"eos_ids must lie in \[0, 4\).* \[4\]"):
        Constrained(constraints.from_regex("a", LETTERS), 4)


# The distribution, by enumeration -------------------------------------------------------------------------------------


@functools.cache
def ends(pattern, limit, eos):
    """All whole rows: a match and EOS, or, at the limit, a match."""
    letters = range(EOS) if eos else range(EOS + 1)
    rows = set()
    for length in range(limit + 1):
        for tokens in itertools.product(letters, repeat=length):
            if re.fullmatch(pattern, "".join(LETTERS[token] for token in tokens)):
                rows |= {tokens} if length == limit else {(*tokens, EOS)} if eos else set()
    return rows


def conditional_distribution(pattern, limit, eos, warp=lambda row: row):
    """The next-token distribution after each prefix of an allowed row: the model's, masked, warped and renormalised."""
    table = np.asarray(PARAMS["logits"], np.float64)
    prefixes = [p for length in range(4) for p in itertools.product(range(4), repeat=length)]
    rows = dict(zip(prefixes, table, strict=True))
    distributions = {}
    allowed = collections.defaultdict(set)
    for row in ends(pattern, limit, eos):
        for cut, token in enumerate(row):
            allowed[row[:cut]].add(token)
    for prefix, tokens in allowed.items():
        masked = np.where([token in tokens for token in range(4)], rows[prefix], -np.inf)
        distributions[prefix] = log_softmax(warp(masked))
    return distributions


def constrained(pattern, eos):
    return Constrained(constraints.from_regex(pattern, LETTERS), EOS if eos else None, max_tokens=4)


def drawn(pattern, *, eos=True, t=1.0, p=1.0, params=PARAMS, **options):
    """Rows that are sampled, or greedy, under the constraint."""
    transform = [constrained(pattern, eos), Temperature(t), TopP(p)]
    options = {"max_new_tokens": 4, "eos_id": EOS if eos else 99, "key": jax.random.key(0)} | options
    return generate(LM, params, NOTHING, transform=transform, **options)


CASES = [(pattern, True) for pattern in ("(ab|c)*", "a?b{1,3}", "[abc]{2,}", ".*c")]
CASES += [("(a[bc$])+", False), ("a.*", False)]


@pytest.mark.parametrize(("pattern", "eos"), first_quick(CASES, 3))
@pytest.mark.parametrize("warped", [False, True], ids=["alone", "in a chain"])
def test_rows_follow_the_masked_distribution(pattern, eos, warped):
    number = 0.9 if warped else 1.0

    def warp(row):
        return np.where(kept_by_top_p(row / number, number), row / number, -np.inf)

    distribution, every = conditional_distribution(pattern, 4, eos, warp), ends(pattern, 4, eos)
    generation = drawn(pattern, eos=eos, t=number, p=number)
    exact = {row: [distribution[row[:t]][row[t]] for t in range(len(row))] for row in every}
    with np.errstate(invalid="ignore"):
        found = assert_texts_follow(generation, {row: np.exp(sum(exact[row])) for row in every})
    for row, logp in zip(found[:300], np.asarray(generation.logp_sampler)[:300], strict=True):
        np.testing.assert_allclose(logp[: len(row)], exact[row], atol=1e-5)


@pytest.mark.parametrize(("pattern", "eos"), CASES)
def test_greedy_takes_the_most_probable_of_what_is_allowed(pattern, eos):
    distribution, row = conditional_distribution(pattern, 4, eos), ()
    while row not in ends(pattern, 4, eos):
        row += (int(np.argmax(distribution[row])),)
    assert set(texts_of(drawn(pattern, eos=eos, greedy=True))) == {row}


def test_a_row_ends_accepted_within_its_own_limit():
    """If few tokens remain, only those are kept from which an end can still be reached."""
    limits, pattern = np.arange(DRAWS) % 3 + 2, "a|(b|c)[abc]+b"
    found = texts_of(drawn(pattern, max_new_tokens=limits))
    for limit in (2, 3, 4):
        of_limit = {row for row, own in zip(found, limits, strict=True) if own == limit}
        assert of_limit <= ends(pattern, limit, True)
        assert {len(row) for row in of_limit} == {2, limit}
    assert ends(pattern, 2, True) == {(0, EOS)}


def test_without_eos_a_row_has_exactly_its_limit():
    found = texts_of(drawn("(a[bc$])+", eos=False, max_new_tokens=np.arange(DRAWS) % 2 * 2 + 2))
    assert set(found) == ends("(a[bc$])+", 2, False) | ends("(a[bc$])+", 4, False)


def test_after_eos_comes_nothing_but_eos():
    """If the decoder was not told of it."""
    assert set(texts_of(drawn("a|bc", eos_id=99))) == {(0, EOS, EOS, EOS), (1, 2, EOS, EOS)}


def test_padding_and_batch_mates_change_nothing():
    mask = jnp.asarray([[True, True], [True, False], [True, True]])
    options = {"max_new_tokens": 2, "transform": constrained("a|b[abc]", True), "eos_id": EOS}
    keys = jax.random.split(jax.random.key(2), 3)
    prompts = jnp.asarray([[0, 1], [2, 3], [1, 1]])
    whole = generate(LM, PARAMS, prompts, prompt_mask=mask, key=keys, **options)
    others = jnp.asarray([[2, 2], [3, 2], [0, 0]])
    left = generate(LM, PARAMS, others, prompt_mask=mask[:, ::-1], key=keys, **options)
    np.testing.assert_array_equal(whole.tokens[1], left.tokens[1])
    np.testing.assert_allclose(whole.logp_sampler[1], left.logp_sampler[1], atol=1e-6)
    pieces = list(stream(LM, PARAMS, prompts, prompt_mask=mask, key=keys, **options))
    np.testing.assert_array_equal(np.concatenate([piece.tokens for piece in pieces], axis=1), whole.tokens)


# No dead end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "eos", "limits", "message"),
    [
        ("abc", True, 2, "row 0 may have 2 new tokens, but the shortest .* has 3"),
        ("abc", True, [3, 4, 2], "row 2 may have 2 new tokens"),
        ("abc", False, 4, "row 0 has 4 new tokens, but the constraint accepts no text of exactly so many"),
        ("(ab)*", False, [2, 3, 4], "row 1 has 3 new tokens"),
        ("a*", False, 5, "max_new_tokens must be at most 4, .* but is 5"),
    ],
)
def test_a_limit_within_which_no_text_ends_is_an_error_before_decoding(pattern, eos, limits, message):
    transform = constrained(pattern, eos)
    limits = np.broadcast_to(limits, 3)
    with pytest.raises(ValueError, match=message):
        transform.check(limits)
    lm = TabularLM(vocab_size=4, horizon=5)
    for nested in (transform, Chain((Chain((transform,)), Temperature(0.5)))):
        with pytest.raises(ValueError, match=message):
            generate(lm, None, NOTHING[:3], max_new_tokens=limits, transform=nested, greedy=True)
        with pytest.raises(ValueError, match=message):
            stream(lm, None, NOTHING[:3], max_new_tokens=limits, transform=nested, greedy=True)


def test_without_eos_a_large_automaton_serves_few_tokens(monkeypatch):
    monkeypatch.setattr(automata, "MAX_ENTRIES", 1000)
    automaton = constraints.from_regex("[ab]{31}", LETTERS)  # 32 states
    Constrained(automaton, max_tokens=30)
    with pytest.raises(ValueError, match=r"max_tokens must be at most 30 for an automaton of 32 states .*, but is 31"):
        Constrained(automaton, max_tokens=31)


def test_what_is_just_feasible_is_no_error():
    assert set(texts_of(drawn("abc", max_new_tokens=3, greedy=True))) == {(0, 1, 2)}
    constrained("abc", False).check(np.asarray([3]))


def test_a_model_that_excludes_all_that_is_allowed_is_an_error():
    with pytest.raises(FloatingPointError, match="no token could be drawn in row 0 at new token 0"):
        drawn("ab", params={"logits": PARAMS["logits"].at[0, 0].set(-jnp.inf)})


def test_an_automaton_of_another_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="the model has 3 tokens, but the automaton was built for 4"):
        generate(
            TabularLM(3, 4), random_params(TabularLM(3, 4)), NOTHING[:2], max_new_tokens=4, greedy=True,
            transform=constrained("ab", True),
        )  # fmt: skip


def test_rows_that_are_over_or_went_astray_are_left_alone():
    """So that a decoder's rows that count no more are never NaN."""
    transform, nothing = constrained("ab", True), jnp.zeros((3, 5), jnp.int32)
    state, apply = transform.init(nothing, nothing > 0, jnp.asarray([4, 4, 0])), jax.jit(transform.apply)
    logits = jnp.zeros((3, 4))
    np.testing.assert_array_equal(apply(state, logits)[:2] > -jnp.inf, [[1, 0, 0, 0]] * 2)
    np.testing.assert_array_equal(apply(state, logits)[2], logits[2])
    state = transform.update(state, jnp.asarray([2, 0, 0]), logits)
    np.testing.assert_array_equal(state[1], [3, 3, -1])
    np.testing.assert_array_equal(apply(state, logits) > -jnp.inf, [[1, 1, 1, 1], [0, 1, 0, 0], [1, 1, 1, 1]])


def test_an_automaton_of_the_same_shape_does_not_compile_again():
    patterns = "a[bc]c?", "b[ab]c?", "ab?b"
    assert len({constrained(pattern, True).automaton.transitions.shape for pattern in patterns}) == 1
    drawn(patterns[0])
    before = decode._cache_size()
    rows = [set(texts_of(drawn(pattern))) for pattern in patterns]
    assert decode._cache_size() == before
    assert not rows[0] & rows[1]


# A model that writes --------------------------------------------------------------------------------------------------


@functools.cache
def tiny():
    loaded = models.load("tiny-gpt2")
    return loaded, text.token_bytes(loaded.tokenizer, loaded.model.vocab_size)


def written_under(build, pattern, *, seed=0, t=1.3, p=0.95):
    """The texts of 16 rows under the constraint."""
    loaded, pieces = tiny()
    eos = loaded.tokenizer.eos_token_id
    prompts = jnp.asarray([loaded.tokenizer("The answer is")["input_ids"]] * 16)
    constraint = Constrained(build(pattern, pieces), eos)
    options = {"max_new_tokens": 16, "key": jax.random.key(seed), "eos_id": eos}
    transform = [constraint, Temperature(t), TopP(p)]
    generation = generate(loaded.model, loaded.params, prompts, transform=transform, **options)
    decode_text = functools.partial(loaded.tokenizer.decode, skip_special_tokens=True)
    return [decode_text(row, clean_up_tokenization_spaces=False) for row in texts_of(generation)]


@pytest.mark.parametrize(
    "pattern",
    [
        *("( yes| no)", r"(?a:\w+@\w+)\.(com|org)", r"🙂{1,2}[ ½]*"),
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("[0-9]{4}-[0-9]{2}", "(?i) the [a-zé]{3,12}!", '{"n": "[^"]{2,9}"}')
        ),
    ],
)  # fmt: skip
def test_what_a_model_writes_matches_the_pattern(pattern):
    written = {text for seed in (0, 1) for text in written_under(constraints.from_regex, pattern, seed=seed)}
    assert len(written) > 1
    for string in written:
        assert re.fullmatch(pattern, string), string


@pytest.mark.slow
def test_choices_are_all_written():
    choices = [" red", " green", " greenish"]
    assert set(written_under(constraints.from_choices, choices, t=4.0, p=1.0)) == set(choices)


# In beam search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "eos"), [("(ab|c)*", True), ("a?b{1,3}", True), ("(a[bc$])+", False)])
def test_a_wide_beam_finds_all_that_is_allowed_and_nothing_else(pattern, eos):
    """Ranked by the model's own log-probability."""
    beams = beam_search(
        LM, PARAMS, NOTHING[:2], num_beams=16, max_new_tokens=4, transform=constrained(pattern, eos),
        eos_id=EOS if eos else 99,
    )  # fmt: skip
    table = np.asarray(PARAMS["logits"], np.float64)
    prefixes = [p for length in range(4) for p in itertools.product(range(4), repeat=length)]
    distribution = dict(zip(prefixes, log_softmax(table), strict=True))
    totals = {row: sum(distribution[row[:t]][row[t]] for t in range(len(row))) for row in ends(pattern, 4, eos)}
    found = np.asarray(beams.log_prob[1]) > -np.inf
    tokens, mask = np.asarray(beams.tokens[1])[found].tolist(), np.asarray(beams.mask[1])[found]
    rows = [tuple(row[: valid.sum()]) for row, valid in zip(tokens, mask, strict=True)]
    assert rows == sorted(totals, key=totals.get, reverse=True)
    np.testing.assert_allclose(np.asarray(beams.log_prob[1])[found], [totals[row] for row in rows], atol=1e-5)


@pytest.mark.parametrize("name", [name for name in DECODERS if name not in NO_TRANSFORM])
def test_every_decoder_refuses_what_no_row_can_finish(name):
    """Before it decodes anything."""
    lm = TabularLM(vocab_size=3, horizon=4)
    three = Constrained(constraints.from_regex("aaa", ["a", "b", "c"]))
    with pytest.raises(ValueError, match="row 0 has 2 new tokens, but the constraint accepts no text of exactly"):
        DECODERS[name](lm, None, [[]], max_new_tokens=2, key=jax.random.key(0), transform=[three])


@pytest.mark.parametrize("name", ["greedy", "look-up"])
def test_greedy_says_when_nothing_is_left_and_takes_no_token_that_was_removed(name):
    """A filter before the constraint may keep only tokens that it forbids."""
    lm = TabularLM(vocab_size=3, horizon=4)
    params = {"logits": np.float32([[3, 0, 0]] * lm.num_prefixes)}
    only_b = Constrained(constraints.from_regex("bbb", ["a", "b", "c"]))

    def decoded(before, after):
        transform = [TopK(before), only_b, TopK(after)]
        return DECODERS[name](lm, params, [[]], max_new_tokens=3, transform=transform, key=None)

    with pytest.raises(FloatingPointError, match="no token could be drawn in row 0 at new token 0"):
        decoded(1, 3)
    np.testing.assert_array_equal(tokens_and_mask(decoded(3, 1))[0], [[1, 1, 1]])
