import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_llm import models
from jaxrl_llm.decoding import generate, stop_strings
from jaxrl_llm.decoding.beam import beam_search, search
from jaxrl_llm.decoding.transforms import MinLength, Temperature, TopK, Transform, as_transform
from jaxrl_llm.tabular import TabularLM
from tests.conftest import TINY, assert_follows, first_quick, log_softmax, random_params
from tests.decoding.decoders import (
    LENGTHS,
    NEVER,
    NEW,
    PROMPTS,
    ROWS,
    assert_same,
    ended_distribution,
    exact_log_probs,
    log_probs_of,
    params_of,
    spread,
    uncached_logits,
)

GOLDENS = Path(__file__).parents[1] / "goldens"
GOLDEN_MODELS = ("gpt2-1", "llama-1")
PENALTIES = (-1.0, 0.0, 0.5, 1.0, 2.0)
TWO = (2, 2)  # as many tokens as NEVER, so that one program serves with and without an end
ends = pytest.mark.parametrize("eos", [NEVER, TWO], ids=["no end", "an end"])


@pytest.fixture(autouse=True, scope="module")
def float64():
    """The tables are; the neural models' parameters stay float32."""
    with jax.enable_x64(True):
        yield


# The same by definition, in plain Python ------------------------------------------------------------------------------


@functools.cache
def table(vocab, horizon, seed):
    """A random tabular model, its parameters, and the log-probabilities after each prefix."""
    lm = TabularLM(vocab, horizon)
    params = random_params(lm, seed, dtype=jnp.float64)
    prefixes = [p for length in range(horizon) for p in itertools.product(range(vocab), repeat=length)]
    return lm, params, dict(zip(prefixes, log_softmax(params["logits"]), strict=True))


def all_hypotheses(distribution, vocab, count, eos, prompt=()):
    """Every sequence that ends, or has `count` tokens, with its log-probability."""
    found = []
    for length in range(1, count + 1):
        for tokens in itertools.product(range(vocab), repeat=length):
            if not set(tokens[:-1]) & set(eos) and (length == count or tokens[-1] in eos):
                found.append((tokens, sum(distribution[(*prompt, *tokens[:t])][tokens[t]] for t in range(length))))
    return found


def ranked(hypotheses, penalty, count):
    scored = [(tokens, log_prob, log_prob / len(tokens) ** penalty) for tokens, log_prob in hypotheses]
    return sorted(scored, key=lambda each: -each[2])[:count]


def repeats(text, n):
    """Return whether the last n-gram stands in the text before."""
    grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
    return n > 0 and len(grams) > 0 and grams[-1] in grams[:-1]


def contains(text, strings):
    """Return True if the text of some tokens contains a string."""
    return any(string.encode() in b"".join(PIECES[token] for token in text) for string in strings)


def plain_beam(
    distribution, width, count, *, penalty=0.0, eos=(), prompt=(), groups=1, diversity=0.0, by="token", n=0,
    whole_beam=False, strings=(), least=0,
):  # fmt: skip
    """Beam search with lists."""

    def blocked(tokens):
        gram, others = (*prompt, *tokens)[-n:], texts if whole_beam else []
        return repeats((*prompt, *tokens), n) or any(
            gram == text[i : i + n] for text in others for i in range(len(text))
        )

    def rank(tokens, log_prob, chosen):
        places = range(len(tokens))[-1:] if by == "token" else range(len(tokens))
        same = sum(tokens[place] == other[place] for other in chosen for place in places)
        return (
            log_prob * (1 + diversity * same / len(tokens)) if by == "hamming-factor" else log_prob - diversity * same
        )

    def ends(tokens):
        return tokens[-1] in eos or contains(tokens[max(least - 1, 0) :], strings)

    width //= groups
    live, finished = [[((), 0.0)]] + [[((), 0.0)] for _ in range(groups - 1)], [[] for _ in range(groups)]
    for time in range(1, count + 1):
        chosen, texts = [], [(*prompt, *tokens) for pool in live for tokens, _ in pool]
        for group in range(groups):
            options = [
                ((*tokens, v), log_prob + logp)
                for tokens, log_prob in live[group]
                for v, logp in enumerate(distribution[(*prompt, *tokens)])
                if not blocked((*tokens, v))
            ]
            ended, onwards, earlier = [], [], tuple(chosen)
            for number in range(len(options)):  # one after the other
                others = earlier if by == "token" else tuple(tokens for tokens, _ in onwards)
                best = max(options, key=lambda option, others=others: rank(*option, others))
                options.remove(best)
                if not ends(best[0]) and len(onwards) < width:
                    onwards.append(best)
                elif ends(best[0]) and number < width:
                    ended.append(best)
            chosen += [tokens for tokens, _ in onwards]
            new = ended + (onwards if time == count else [])
            pool = [(tokens, log_prob) for tokens, log_prob, _ in ranked(finished[group] + new, penalty, width)]
            finished[group], live[group] = pool, onwards
            if len(pool) == width:
                worst = min(log_prob / len(tokens) ** penalty for tokens, log_prob in pool)
                hope = [log_prob / t**penalty for _, log_prob in onwards for t in range(time + 1, count + 1)]
                if not any(score > worst for score in hope):
                    live[group] = []
    return ranked([each for pool in finished for each in pool], penalty, width * groups)


def assert_found(beams, row, expected, *, atol=1e-12):
    """The hypotheses of a row, best first; those that cannot be are empty."""
    tokens, mask, log_prob, score = (
        np.asarray(each)[row] for each in (beams.tokens, beams.mask, beams.log_prob, beams.score)
    )
    found = [tuple(each[valid].tolist()) for each, valid in zip(tokens, mask, strict=True)]
    assert found == [each[0] for each in expected] + [()] * (len(found) - len(expected))
    np.testing.assert_allclose(log_prob[: len(expected)], [each[1] for each in expected], atol=atol)
    np.testing.assert_allclose(score[: len(expected)], [each[2] for each in expected], atol=atol)
    assert (log_prob[len(expected) :] == -np.inf).all() and (score[len(expected) :] == -np.inf).all()
    np.testing.assert_array_equal(mask, np.arange(mask.shape[1]) < mask.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(np.where(mask.any(axis=1), np.asarray(beams.logp)[row].sum(axis=1), log_prob), log_prob)


PIECES = [b"a", b"ab", b"c"]
ROOTS = np.asarray([[0, 0], [0, 1], [2, 1]]), np.asarray([[False, False], [False, True], [True, True]])
AFTER = ((), (1,), (2, 1))


def on_table(seed, horizon=8, **options):
    """The beams of the three prompts, and the log-probabilities after each prefix."""
    lm, params, distribution = table(3, horizon, seed)
    return beam_search(lm, params, ROOTS[0], prompt_mask=ROOTS[1], **options), distribution


@ends
@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_beam_of_all_sequences_is_exhaustive(penalty, eos):
    for seed in range(3):
        beams, distribution = on_table(seed, 5, num_beams=27, max_new_tokens=3, length_penalty=penalty, eos_id=eos)
        assert beams.log_prob.dtype == beams.score.dtype == jnp.float64
        for row, prompt in enumerate(AFTER):
            assert_found(beams, row, ranked(all_hypotheses(distribution, 3, 3, eos, prompt), penalty, 27))


@ends
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_small_beam_is_a_plain_beam(width, penalty, eos):
    for seed in range(3):
        beams, distribution = on_table(seed, num_beams=width, max_new_tokens=6, length_penalty=penalty, eos_id=eos)
        for row, prompt in enumerate(AFTER):
            assert_found(beams, row, plain_beam(distribution, width, 6, penalty=penalty, eos=eos, prompt=prompt))


def test_the_plain_beam_tries_what_it_should():
    """Somewhere a row stops early, an ended hypothesis is displaced, and a beam is not exhaustive."""
    short, long, missed = 0, 0, 0
    for seed in range(6):
        distribution = table(3, 8, seed)[2]
        found = plain_beam(distribution, 2, 6, eos=TWO)
        short += all(len(tokens) < 6 for tokens, _, _ in found)
        long += any(len(tokens) == 6 for tokens, _, _ in plain_beam(distribution, 2, 6, penalty=2.0, eos=TWO))
        missed += ranked(all_hypotheses(distribution, 3, 6, TWO), 2.0, 2) != plain_beam(
            distribution, 2, 6, penalty=2.0, eos=TWO
        )
    assert short and long and missed


@ends
@pytest.mark.parametrize(("groups", "diversity"), [(2, 0.0), (2, 0.7), (4, 0.7), (4, 50.0)])
@pytest.mark.parametrize("penalty", [-1.0, 1.0])
def test_diverse_beams_are_plain_diverse_beams(groups, diversity, penalty, eos):
    options = {"num_groups": groups, "diversity_penalty": diversity, "length_penalty": penalty, "eos_id": eos}
    plain = {"groups": groups, "diversity": diversity, "penalty": penalty, "eos": eos}
    for seed in range(3):
        beams, distribution = on_table(seed, num_beams=4, max_new_tokens=6, **options)
        for row, prompt in enumerate(AFTER):
            assert_found(beams, row, plain_beam(distribution, 4, 6, prompt=prompt, **plain))


def test_one_group_is_beam_search_whatever_the_penalty():
    options = {"num_beams": 3, "max_new_tokens": 6, "eos_id": TWO}
    assert_same(on_table(0, **options)[0], on_table(0, **options, diversity_penalty=5.0)[0], atol=0)


def test_groups_without_a_penalty_are_beams_of_their_width():
    options = {"max_new_tokens": 6, "eos_id": TWO}
    grouped, narrow = on_table(0, **options, num_beams=4, num_groups=2)[0], on_table(0, **options, num_beams=2)[0]
    np.testing.assert_array_equal(grouped.tokens, np.repeat(narrow.tokens, 2, axis=1))
    np.testing.assert_array_equal(grouped.score, np.repeat(narrow.score, 2, axis=1))


@ends
@pytest.mark.parametrize("n", [1, 2])
def test_blocked_beams_are_plain_blocked_beams(n, eos):
    died = 0
    for seed in range(3):
        beams, distribution = on_table(seed, num_beams=3, max_new_tokens=6, no_repeat_ngram=n, eos_id=eos)
        for row, prompt in enumerate(AFTER):
            expected = plain_beam(distribution, 3, 6, eos=eos, prompt=prompt, n=n)
            died += len(expected) < 3
            assert_found(beams, row, expected)
    assert died or n > 1


def assert_plain(plain, **options):
    """The beams of three tables and three prompts are those of the reference."""
    for seed in range(3):
        beams, distribution = on_table(seed, num_beams=4, max_new_tokens=6, **options)
        for row, prompt in enumerate(AFTER):
            assert_found(beams, row, plain_beam(distribution, 4, 6, prompt=prompt, **plain))


@ends
@pytest.mark.parametrize(("groups", "n"), first_quick([(1, 2), (2, 1)]))
def test_ngrams_can_be_blocked_against_the_whole_beam(groups, n, eos):
    options = {"no_repeat_ngram": n, "no_repeat_in": "beam", "num_groups": groups, "diversity_penalty": 0.3}
    assert_plain({"n": n, "whole_beam": True, "groups": groups, "diversity": 0.3, "eos": eos}, eos_id=eos, **options)


@ends
@pytest.mark.parametrize(
    ("diversity", "by"), first_quick([(2.0, "hamming"), (0.3, "hamming-factor"), (0.1, "hamming")])
)
def test_diversity_can_be_by_the_hamming_distance_of_whole_sequences(diversity, by, eos):
    options = {"diversity_penalty": diversity, "diversity_by": by, "eos_id": eos, "no_repeat_ngram": 2}
    assert_plain({"diversity": diversity, "by": by, "eos": eos, "n": 2}, **options)


def test_the_rules_of_diversity_and_of_blocking_differ():
    rules = [{"by": by} for by in ("token", "hamming", "hamming-factor")]
    rules += [{"n": 2, "whole_beam": whole} for whole in (False, True)]
    options = {"diversity": 0.3, "eos": NEVER}
    found = [[plain_beam(table(3, 8, seed)[2], 4, 6, **options, **rule) for seed in range(6)] for rule in rules]
    assert not any(one == other for one, other in itertools.combinations(found, 2))


@pytest.mark.parametrize(("strings", "least"), first_quick([(["ba", "cc"], 0), (["a"], 3), (["b"], 0)]))
@pytest.mark.parametrize("groups", first_quick([1, 2]))
def test_a_hypothesis_ends_at_a_stop_string(groups, strings, least):
    held = {"transform": MinLength(least, NEVER), "stop": stop_strings(PIECES, strings), "eos_id": TWO}
    plain = {"groups": groups, "diversity": 0.7, "eos": TWO, "strings": strings, "least": least}
    assert_plain(plain, num_groups=groups, diversity_penalty=0.7, **held)


def test_penalties_may_be_those_of_rows():
    penalties, diversities, limits = [-1.0, 0.5, 2.0], [0.0, 0.7, 50.0], [6, 3, 1]
    options = {"num_groups": 2, "max_new_tokens": np.asarray(limits), "eos_id": TWO}
    beams, distribution = on_table(
        0, num_beams=4, length_penalty=penalties, diversity_penalty=jnp.asarray(diversities), **options
    )
    for row, (penalty, diversity, limit) in enumerate(zip(penalties, diversities, limits, strict=True)):
        plain = {"groups": 2, "eos": TWO, "penalty": penalty, "diversity": diversity, "prompt": AFTER[row]}
        assert_found(beams, row, plain_beam(distribution, 4, limit, **plain))


# Beam sampling: the distribution by enumeration -----------------------------------------------------------------------


def orders(candidates, width, ends):
    """Every order in which candidates are drawn without replacement until `width` do not end, with its probability."""
    if not candidates or width == 0:
        yield (), 1.0
        return
    total = sum(weight for _, weight in candidates)
    for place, (tokens, weight) in enumerate(candidates):
        left = candidates[:place] + candidates[place + 1 :]
        for order, probability in orders(left, width - (not ends(tokens)), ends):
            yield (tokens, *order), weight / total * probability


def exact_sampled_beams(distribution, width, count, *, penalty, eos):
    """The probability of every outcome: the hypotheses, best first."""

    def log_prob(tokens):
        return sum(distribution[tokens[:t]][tokens[t]] for t in range(len(tokens)))

    def ends(tokens):
        return tokens[-1] in eos

    states, outcomes = {((), ((),)): 1.0}, {}  # hypotheses and live beams
    for time in range(1, count + 1):
        states, before = {}, states
        for (finished, live), probability in before.items():
            candidates = [((*tokens, v), np.exp(log_prob((*tokens, v)))) for tokens in live for v in range(3)]
            for order, chance in orders([each for each in candidates if each[1] > 0], width, ends):
                onwards = [tokens for tokens in order if not ends(tokens)]
                pool = [*finished, *filter(ends, order[:width]), *(onwards if time == count else ())]
                pool.sort(key=lambda tokens: -log_prob(tokens) / len(tokens) ** penalty)
                key, over = (tuple(pool[:width]), tuple(sorted(onwards))), time == count or len(pool) >= width
                where = outcomes if over else states
                key = key[0] if over else key
                where[key] = where.get(key, 0) + probability * chance
    return outcomes


@pytest.mark.parametrize(
    ("width", "penalty", "numbers"),
    first_quick([(1, 0.0, (0.7, 2)), (2, 1.0, (2.0, 2)), (2, 0.5, (1.0, 3))]),
)
def test_sampled_beams_follow_their_distribution(width, penalty, numbers):
    """Which for one beam is that of `generate`."""
    lm, params, distribution = table(3, 3, 1)
    transform = as_transform((Temperature(numbers[0]), TopK(numbers[1])))
    rows = log_softmax(transform(jnp.asarray(list(distribution.values()))))
    drawn = dict(zip(distribution, rows, strict=True))
    options = {"length_penalty": penalty, "transform": transform, "eos_id": TWO, "key": jax.random.key(3)}
    beams = beam_search(lm, params, jnp.zeros((4000, 0), jnp.int32), num_beams=width, max_new_tokens=3, **options)
    outcomes = exact_sampled_beams(drawn, width, 3, penalty=penalty, eos=TWO)
    tokens, lengths = np.asarray(beams.tokens), np.asarray(beams.mask).sum(axis=2)
    rows = [
        [tuple(each[:n].tolist()) for each, n in zip(*row, strict=True)] for row in zip(tokens, lengths, strict=True)
    ]
    place = {outcome: index for index, outcome in enumerate(outcomes)}
    assert_follows([place[tuple(filter(None, row))] for row in rows], list(outcomes.values()))
    if width == 1:
        texts = ended_distribution(lm, exact_log_probs(lm, params, transform), TWO)
        np.testing.assert_allclose([outcomes.get((text,), 0) for text in texts], list(texts.values()), atol=1e-12)
    of_beams = [[sum(drawn[each[:t]][each[t]] for t in range(len(each))) for each in row] for row in rows]
    np.testing.assert_allclose(beams.log_prob, np.where(lengths > 0, of_beams, -np.inf), atol=1e-12)


@pytest.mark.parametrize(
    "rules",
    [
        pytest.param({"key": jax.random.key(5), "no_repeat_ngram": 2, "no_repeat_in": "beam"}, marks=pytest.mark.slow),
        pytest.param({"diversity_by": "hamming", "stop": stop_strings(PIECES, ["b"])}, marks=pytest.mark.slow),
    ],
    ids=["sampled", "by the Hamming distance"],
)
def test_beams_are_the_same_under_jit_and_vmap(rules):
    lm, params, _ = table(3, 3, 0)
    scales = jnp.asarray([1.0, 0.5])

    def found(scale):
        scaled = {"logits": params["logits"] * scale}
        options = {"num_beams": 2, "max_new_tokens": 3, "length_penalty": scale, "diversity_penalty": scale}
        return beam_search(lm, scaled, jnp.zeros((2, 0), jnp.int32), eos_id=TWO, **options, **rules)

    assert_same(found(scales[1]), jax.tree.map(lambda leaf: leaf[1], jax.jit(jax.vmap(found))(scales)), atol=1e-12)


# GPT-2; Llama: the goldens --------------------------------------------------------------------------------------------

ENDS = {"num_beams": 4, "eos_id": (1, 5, 9, 17)}
CHOICES = {
    "beam": ENDS | {"length_penalty": 1.0},
    "diverse, blocked": ENDS | {"num_groups": 2, "diversity_penalty": 1.5, "no_repeat_ngram": 2},
}


@functools.cache
def searched(model, choice):
    return beam_search(TINY[model], params_of(model), **spread(), max_new_tokens=NEW, **CHOICES[choice])


@pytest.mark.parametrize("choice", ["beam", pytest.param("diverse, blocked", marks=pytest.mark.slow)])
def test_log_prob_is_that_of_a_forward_pass_without_cache(choice):
    beams = searched("gpt2", choice)
    mask = np.asarray(beams.mask)
    assert mask.any(axis=2).all() and beams.log_prob.dtype == jnp.float32
    of_tokens = log_probs_of(uncached_logits("gpt2", beams.tokens), beams.tokens)
    np.testing.assert_allclose(beams.logp, np.where(mask, of_tokens, 0), atol=1e-4)
    np.testing.assert_allclose(beams.log_prob, np.where(mask, of_tokens, 0).sum(axis=2), atol=2e-4)
    lengths = mask.sum(axis=2) ** CHOICES[choice].get("length_penalty", 0.0)
    np.testing.assert_allclose(beams.score, beams.log_prob / lengths, rtol=1e-6)


@pytest.mark.parametrize("choice", CHOICES)
def test_hypotheses_are_sorted_distinct_and_end_once(choice):
    beams = searched("gpt2", choice)
    assert (np.diff(beams.score, axis=1) <= 0).all()
    tokens, mask = np.asarray(beams.tokens), np.asarray(beams.mask)
    eos = np.isin(tokens, CHOICES[choice]["eos_id"]) & mask
    lengths = mask.sum(axis=2)
    last = np.take_along_axis(eos, lengths[..., None] - 1, axis=2)[..., 0]
    assert (last | (lengths == NEW)).all() and last.any()
    assert (eos.sum(axis=2) == last).all() and (tokens[~mask] == 0).all()
    found = [
        len({tuple(each[valid]) for each, valid in zip(*row, strict=True)}) for row in zip(tokens, mask, strict=True)
    ]
    assert min(found) > 2 if choice != "beam" else min(found) == 4  # groups share nothing: two may find the same


@pytest.mark.parametrize("eos", [NEVER, (3, 11)], ids=["no end", "an end"])
def test_one_beam_is_greedy(gpt2, eos):
    lm, params = gpt2
    options = {**spread(), "max_new_tokens": NEW, "eos_id": eos, "pad_id": 9}
    generation, beams = generate(lm, params, **options, greedy=True), beam_search(lm, params, **options, num_beams=1)
    np.testing.assert_array_equal(beams.tokens[:, 0], generation.tokens)
    np.testing.assert_array_equal(beams.mask[:, 0], generation.mask)
    np.testing.assert_allclose(beams.log_prob[:, 0], generation.logp.sum(axis=1), atol=1e-4)


def test_no_output_repeats_a_blocked_ngram():
    def repeating(beams):
        tokens, mask = np.asarray(beams.tokens), np.asarray(beams.mask)
        count = 0
        for row, beam in itertools.product(range(ROWS), range(4)):
            text = [*PROMPTS[row, : LENGTHS[row]], *tokens[row, beam][mask[row, beam]]]
            count += any(repeats(text[:end], 2) for end in range(LENGTHS[row] + 1, len(text) + 1))
        return count

    assert repeating(searched("gpt2", "beam")) and not repeating(searched("gpt2", "diverse, blocked"))


# Transforms remove, and do not re-weigh -------------------------------------------------------------------------------


class Alternate(Transform):
    """With a state: after a token only those of the other parity may come. Halves the logits that it leaves."""

    reweighs = False  # so that beams keep the model's log-probabilities

    def init(self, prompts, mask, limits):
        return {"last": jnp.full(limits.shape, -1, jnp.int32)}

    def apply(self, state, logits):
        tokens = jnp.arange(logits.shape[1])
        same = (tokens % 2 == state["last"][:, None] % 2) & (state["last"][:, None] >= 0)
        return jnp.where(same, -jnp.inf, logits / 2)

    def update(self, state, token, logits):
        return {"last": token}


class NotAgain(Transform):
    """Looks back: no token of the generated part comes twice."""

    looks_back = True
    sees_prompt = False
    reweighs = False

    def __call__(self, logits, tokens, mask):
        seen = (jnp.arange(logits.shape[1]) == tokens[..., None]) & mask[..., None]
        return jnp.where(seen.any(axis=1), -jnp.inf, logits)


def test_transforms_with_a_memory_or_that_look_back_follow_their_beams():
    rules = {
        Alternate(): lambda tokens: all((a - b) % 2 for a, b in itertools.pairwise(tokens)),
        NotAgain(): lambda tokens: len(set(tokens)) == len(tokens),
    }
    for transform, allowed in rules.items():
        for seed in range(3):
            options = {"max_new_tokens": 3, "length_penalty": 0.5, "eos_id": TWO, "transform": transform}
            beams, distribution = on_table(seed, 5, num_beams=27, **options)
            for row, prompt in enumerate(AFTER):
                possible = [each for each in all_hypotheses(distribution, 3, 3, TWO, prompt) if allowed(each[0])]
                assert_found(beams, row, ranked(possible, 0.5, 27))


def test_impossible_tokens_make_no_hypothesis():
    lm, params, _ = table(3, 5, 0)
    only = {"logits": jnp.where(jnp.arange(3) == 1, params["logits"], -jnp.inf)}
    beams = beam_search(lm, only, ROOTS[0], prompt_mask=ROOTS[1], num_beams=27, max_new_tokens=3, eos_id=TWO)
    for row in range(3):
        assert_found(beams, row, [((1, 1, 1), 0.0, 0.0)])


# What cannot be -------------------------------------------------------------------------------------------------------


MISTAKES = {
    "no beams": ({"num_beams": 0}, "num_beams must be an integer of at least 1, but is 0"),
    "half a beam": ({"num_beams": 1.5}, "num_beams must be an integer of at least 1, but is 1.5"),
    "no groups": ({"num_groups": 0}, "num_groups must be an integer of at least 1"),
    "uneven groups": ({"num_groups": 3}, "multiple of num_groups, but they are 4 and 3"),
    "a negative n": ({"no_repeat_ngram": -1}, "no_repeat_ngram must be an integer of at least 0"),
    "an infinite penalty": (
        {"length_penalty": np.inf},
        "length_penalty must be one finite number, or one for each of 1 rows, but is inf",
    ),
    "several penalties": ({"length_penalty": [0.0, 1.0]}, "length_penalty must be one finite number"),
    "a reward for sameness": ({"diversity_penalty": -1.0}, "diversity_penalty must be one finite number of at least 0"),
    "an unknown rule": ({"num_groups": 2, "diversity_by": "bigram"}, "must be one of token, hamming, hamming-factor"),
    "a rule for no groups": ({"num_groups": 2, "diversity_by": "hamming"}, "diversity_by='hamming' needs num_groups=1"),
    "a rule that draws nothing": (
        {"key": jax.random.key(0), "diversity_by": "hamming"},
        "needs num_groups=1 and no key",
    ),
    "groups that are drawn": (
        {"key": jax.random.key(0), "num_groups": 2},
        "num_groups must be 1 for beams that are sam",
    ),
    "a rule for n-grams": ({"no_repeat_in": "beam"}, "no_repeat_in='beam' needs no_repeat_ngram"),
    "a penalty out of range": ({"length_penalty": 200.0}, "out of range"),
    "numbers of other rows": ({"transform": Temperature(jnp.ones(2))}, "must be one number, or one for each of 1 rows"),
}


@pytest.mark.parametrize(("wrong", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named_before_anything_is_compiled(gpt2, wrong, message):
    before = search._cache_size()
    with pytest.raises(ValueError, match=message):
        beam_search(*gpt2, **{"prompts": [[1, 2]], "num_beams": 4, "max_new_tokens": 4} | wrong)
    assert search._cache_size() == before


# What transformers finds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "n"), first_quick([("gpt2-1", 2), ("gpt2-1", 0), ("llama-1", 0), ("llama-1", 2)]))
def test_beams_are_those_of_transformers(name, n):
    """Made by tests/goldens/make_beam_goldens.py."""
    loaded, inputs = models.load(GOLDENS / name), load_file(GOLDENS / name / "expected.safetensors")
    expected = load_file(GOLDENS / "beam" / f"{name}.safetensors")
    for index in np.flatnonzero(expected["settings"][:, 1] == n):
        beams = beam_search(
            loaded.model,
            loaded.params,
            inputs["tokens"],
            prompt_mask=inputs["mask"],
            num_beams=4,
            max_new_tokens=12,
            length_penalty=float(expected["settings"][index, 0]),
            no_repeat_ngram=n,
            eos_id=(1, 3, 8, 13),
        )
        np.testing.assert_array_equal(beams.tokens, expected["tokens"][index])
        np.testing.assert_allclose(beams.score, expected["scores"][index], rtol=1e-5)


def test_the_goldens_try_what_they_should():
    every = [load_file(GOLDENS / "beam" / f"{name}.safetensors") for name in GOLDEN_MODELS]
    lengths = np.concatenate([(each["tokens"] != 0).sum(axis=-1).ravel() for each in every])
    assert (lengths < 12).any() and (lengths == 12).any()
    settings = every[0]["settings"]
    assert {*settings[:, 0]} == {-1.0, 0.0, 1.0, 2.0} and {*settings[:, 1]} == {0, 2}
    for each in every:  # another penalty finds other beams
        assert len({tokens.tobytes() for tokens in each["tokens"]}) >= 3
