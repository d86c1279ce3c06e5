"""A window that moves on, against a plain reference that reads it anew for every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.decoding import core, generate, slide, slide_stream, stop_strings
from jaxrl_llm.decoding.transforms import MinLength, RepetitionPenalty, Temperature
from jaxrl_llm.tabular import TabularLM
from tests.conftest import CONTEXT, TINY, VOCAB, log_softmax, random_params
from tests.decoding.decoders import apply, joined, params_of

GPT2 = TINY["gpt2"]
TABLE = TabularLM(vocab_size=3, horizon=5)
MODELS = {"gpt2": (GPT2, params_of("gpt2")), "table": (TABLE, random_params(TABLE))}
KEYS = jax.random.split(jax.random.key(3), 4)
PROMPTS = {
    "gpt2": [np.random.default_rng(row).integers(0, VOCAB, size).tolist() for row, size in enumerate((12, 21, 90, 42))],
    "table": [[], [1, 2], [0, 1, 2, 2], [2, 1, 0, 1, 2, 0]],
}
NEW = {"gpt2": 70, "table": 12}


def logits_after(name, window):
    """The logits after a text, by a pass without a cache."""
    lm, params = MODELS[name]
    width = lm.max_length + (name == "table")
    tokens, mask = np.zeros((1, width), int), np.zeros((1, width), bool)
    place = slice(1, 1 + len(window)) if name == "table" else slice(len(window))  # the first: the root of the table
    tokens[0, place], mask[0, place] = window, True
    return np.asarray(apply(lm, params, tokens, mask))[0, place.stop - 1]


def reference(name, prompt, choose, *, new, ends=lambda written: False):
    """Tokens and log-probabilities under the model, one after the other."""
    context = MODELS[name][0].max_length
    window = prompt if len(prompt) < context else prompt[-(context // 2) :]
    written, logps = [], []
    while len(written) < new and not ends(written):
        logits = logits_after(name, window)
        token = choose(logits, prompt + written, len(written))
        logps.append(log_softmax(logits)[token])
        written, window = [*written, token], [*window, token]
        if len(window) == context:
            window = window[-(context // 2) :]
    return written, logps


def assert_is(found, row, expected):
    tokens, logps = expected
    mask = np.asarray(found.mask[row])
    assert np.asarray(found.tokens[row])[mask].tolist() == tokens
    np.testing.assert_allclose(np.asarray(found.logp[row])[mask], logps, atol=2e-4)
    assert not mask[len(tokens) :].any()


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.slow), "table"])
def test_greedy_tokens_are_those_of_a_window_read_anew(name):
    found = slide(*MODELS[name], PROMPTS[name], max_new_tokens=NEW[name], greedy=True)
    for row, prompt in enumerate(PROMPTS[name]):
        assert_is(found, row, reference(name, prompt, lambda logits, *_: int(logits.argmax()), new=NEW[name]))


@jax.jit
def drawn(key, time, logits, tokens, mask):
    """The token that is drawn after the penalty, the minimum length and the temperature of the test below."""
    logits = RepetitionPenalty(1.3)(logits, tokens, mask)
    logits = jnp.where((jnp.arange(VOCAB) == 7) & (time < 45), -jnp.inf, logits) / 0.7
    return core.sample(jax.random.fold_in(key, time)[None], logits[None])[0]


@pytest.mark.slow
def test_transforms_keys_limits_and_ends_see_the_whole_text():
    limits, stop = (
        np.asarray([70, 5, 60, 70]),
        stop_strings([*map(str.encode, "abcdefghijklmnopqrstuvw")], ["kl", "ts"]),
    )
    transform, eos = [RepetitionPenalty(1.3), MinLength(45, 7), Temperature(0.7)], 7

    def choose(row, logits, written, time):
        tokens = np.pad(written, (0, 160 - len(written)))
        return int(drawn(KEYS[row], time, logits, tokens, np.arange(160) < len(written)))

    def ends(written):
        text = "".join("abcdefghijklmnopqrstuvw"[token] for token in written[44:])
        return eos in written or "kl" in text or "ts" in text

    options = {"transform": transform, "key": KEYS, "eos_id": eos, "stop": stop, "pad_id": 1}
    found = slide(*MODELS["gpt2"], PROMPTS["gpt2"], max_new_tokens=limits, **options)
    for row, prompt in enumerate(PROMPTS["gpt2"]):
        chosen = functools.partial(choose, row)
        assert_is(found, row, reference("gpt2", prompt, chosen, new=limits[row], ends=ends))
    assert (np.asarray(found.tokens)[~np.asarray(found.mask)] == 1).all()
    pieces = slide_stream(*MODELS["gpt2"], PROMPTS["gpt2"][2:3], max_new_tokens=60, **options | {"key": KEYS[2:3]})
    np.testing.assert_array_equal(joined(list(pieces), length=70, pad_id=1).tokens[0], found.tokens[2])


def test_within_the_context_it_is_generate():
    inside = generate(*MODELS["gpt2"], PROMPTS["gpt2"][:1], max_new_tokens=CONTEXT - 12, greedy=True)
    found = slide(*MODELS["gpt2"], PROMPTS["gpt2"], max_new_tokens=70, greedy=True)
    np.testing.assert_array_equal(inside.tokens[0], found.tokens[0, : CONTEXT - 12])
    np.testing.assert_allclose(inside.logp[0], found.logp[0, : CONTEXT - 12], atol=2e-4)
    with pytest.raises(ValueError, match=f"do not fit with it in the model's context of {CONTEXT}"):
        generate(*MODELS["gpt2"], PROMPTS["gpt2"][:1], max_new_tokens=CONTEXT - 11, greedy=True)


def test_what_cannot_slide_is_refused():
    with pytest.raises(ValueError, match="slide_stream takes one prompt, but is given 2"):
        slide_stream(*MODELS["gpt2"], [[1], [2]], max_new_tokens=3, greedy=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'align'"):
        slide_stream(*MODELS["gpt2"], [[1]], max_new_tokens=3, greedy=True, align=True)
    lm = TabularLM(vocab_size=3, horizon=1)
    with pytest.raises(ValueError, match="a context that slides must have at least 2 tokens, but has 1"):
        slide(lm, random_params(lm), [[]], max_new_tokens=3, greedy=True)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        slide(*MODELS["gpt2"], [[]], max_new_tokens=3, greedy=True)
