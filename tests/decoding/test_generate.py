import dataclasses
import importlib
import itertools
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.decoding import Generation, Guidance, Memory, core, generate, stream
from jaxrl_llm.decoding.generate import advance, begin
from jaxrl_llm.decoding.transforms import RepetitionPenalty, Temperature, TopK, TopP
from jaxrl_llm.language_model import Cache, LanguageModel
from jaxrl_llm.tabular import TabularLM
from tests.conftest import CONTEXT, TINY, VOCAB, assert_follows, log_softmax, random_params
from tests.decoding.decoders import (
    DRAWN,
    KEYS,
    NEVER,
    NEW,
    PLAIN,
    ROWS,
    assert_same,
    assert_texts_follow,
    ended_distribution,
    exact_log_probs,
    expected,
    index_of,
    joined,
    log_probs_of,
    near,
    programs_of,
    rows_of,
    run,
    spread,
    token_log_probs,
    uncached_logits,
)

DRAWS = 20_000
module = importlib.import_module("jaxrl_llm.decoding.generate")
NOTHING = jnp.zeros((DRAWS, 0), jnp.int32)  # the empty prompt, many times


# The exact distribution, on a table -----------------------------------------------------------------------------------


FILTERED = [[TopK(3), Temperature(2.0), TopP(0.75)], [TopK(2), Temperature(0.6), TopP(1.0)]]


@pytest.mark.parametrize("transform", [None, *FILTERED], ids=str)
def test_sequences_follow_the_exact_distribution(tabular, transform):
    lm, params = tabular
    options = {"max_new_tokens": 4, "key": jax.random.key(0), "eos_id": NEVER}
    generation = generate(lm, params, NOTHING, transform=transform, **options)
    outcomes = index_of(lm, generation.tokens)
    log_probs = exact_log_probs(lm, params, transform)
    assert_follows(outcomes, np.exp(log_probs))
    assert generation.mask.all()
    np.testing.assert_allclose(generation.logp_sampler.sum(axis=1), log_probs[outcomes], atol=1e-5)
    tokens = generation.tokens[:500]
    np.testing.assert_allclose(generation.logp[:500], token_log_probs(lm, params, tokens), atol=1e-5)


@pytest.mark.parametrize("slots", [[4, 5], [0, 1], [1, 4]], ids=["left", "right", "interior"])
def test_continuations_of_a_prompt_follow_its_conditional_distribution(tabular, slots):
    lm, params = tabular
    prompts, mask = np.full((DRAWS, 6), 1), np.zeros((DRAWS, 6), bool)
    prompts[:, slots], mask[:, slots] = [2, 0], True
    generation = generate(lm, params, prompts, prompt_mask=mask, max_new_tokens=2, key=jax.random.key(3), eos_id=NEVER)
    assert_follows(index_of(lm, generation.tokens), np.exp(exact_log_probs(lm, params, prompt=(2, 0))))


def test_a_fully_masked_prompt_is_the_empty_prompt(tabular):
    lm, params = tabular
    options = {"max_new_tokens": 4, "key": jax.random.key(0), "eos_id": NEVER}
    masked = generate(lm, params, np.ones((DRAWS, 5), int), prompt_mask=np.zeros((DRAWS, 5), bool), **options)
    assert_same(masked, generate(lm, params, NOTHING, **options))


@pytest.mark.parametrize("eos", [[2, 2], [0, 2]], ids=["one end", "two ends"])
def test_ended_sequences_follow_their_distribution_and_count_the_end(tabular, eos):
    lm, params = tabular
    generation = generate(lm, params, NOTHING, max_new_tokens=4, key=jax.random.key(1), eos_id=eos, pad_id=7)
    distribution = ended_distribution(lm, exact_log_probs(lm, params), eos)
    found = assert_texts_follow(generation, distribution)
    np.testing.assert_allclose(generation.logp.sum(axis=1), np.log([distribution[row] for row in found]), atol=1e-5)


@pytest.mark.parametrize("transform", [None, Temperature(3.0)], ids=str)
def test_greedy_follows_the_argmax_and_is_no_draw(tabular, transform):
    lm, params = tabular
    path, first, number = (), 0, 0  # of the prefix: where those of its length begin in the table, and its number
    while len(path) < 4:
        token = int(np.argmax(params["logits"][first + number]))
        path, first, number = (*path, token), first + 3 ** len(path), 3 * number + token
    options = {"max_new_tokens": 4, "eos_id": NEVER, "transform": transform}
    generation = generate(lm, params, NOTHING[:2], greedy=True, **options)
    np.testing.assert_array_equal(generation.tokens, [path, path])
    exact = token_log_probs(lm, params, generation.tokens)
    np.testing.assert_allclose(generation.logp, exact, atol=1e-5)
    np.testing.assert_array_equal(generation.logp_sampler, np.zeros((2, 4)))


def test_log_probabilities_of_bfloat16_parameters_are_exact_in_float32(tabular):
    lm, params = tabular
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    options = {"max_new_tokens": 4, "key": jax.random.key(2), "transform": Temperature(0.7)}
    generation = generate(lm, narrow, NOTHING, **options)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    log_probs = exact_log_probs(lm, wide, Temperature(0.7))
    outcomes = index_of(lm, generation.tokens)
    assert_follows(outcomes, np.exp(log_probs))
    np.testing.assert_allclose(generation.logp_sampler.sum(axis=1), log_probs[outcomes], atol=1e-5)
    exact = token_log_probs(lm, wide, generation.tokens[:500])
    np.testing.assert_allclose(generation.logp[:500], exact, atol=1e-5)


def test_log_probabilities_of_float64_parameters_are_exact_in_float64():
    with jax.enable_x64(True):
        lm = TabularLM(3, 4)
        params = random_params(lm, 1, dtype=jnp.float64)
        generation = generate(lm, params, NOTHING[:50], max_new_tokens=4, key=jax.random.key(0))
        prefixes = [p for length in range(4) for p in itertools.product(range(3), repeat=length)]
        after = dict(zip(prefixes, log_softmax(params["logits"]), strict=True))
        exact = [[after[tuple(row[:t])][row[t]] for t in range(4)] for row in generation.tokens.tolist()]
        np.testing.assert_allclose(generation.logp, exact, rtol=1e-12, atol=1e-14)


# Neural models, against a pass without padding or cache ---------------------------------------------------------------


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_greedy_tokens_are_the_argmax_of_the_uncached_model(model):
    generation = expected("greedy", model)
    logits = uncached_logits(model, generation.tokens)
    np.testing.assert_array_equal(generation.tokens, logits.argmax(axis=-1))
    assert len({tuple(row) for row in np.asarray(generation.tokens).tolist()}) >= 4


@pytest.mark.parametrize("model", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_log_probabilities_are_those_of_the_uncached_model(model):
    generation = expected("sampled", model)
    logits = uncached_logits(model, generation.tokens)
    for found, distribution in [(generation.logp, logits), (generation.logp_sampler, logits / 1.5)]:
        np.testing.assert_allclose(found, log_probs_of(distribution, generation.tokens), atol=1e-4)
    assert len({tuple(row) for row in np.asarray(generation.tokens).tolist()}) == ROWS


@pytest.mark.parametrize(
    ("model", "length"), [*itertools.product(["gpt2"], [1, 15, 16, 17, 32]), ("llama", 1), ("llama", 16)]
)
def test_prompts_without_padding_are_continued_as_the_uncached_model_would(model, length):
    """On both sides of a bucket's edge, and up to the last place of the context."""
    prompts = np.random.default_rng(length).integers(0, VOCAB, (ROWS, length))
    generation = run("greedy", model, prompts=prompts, prompt_mask=None, max_new_tokens=min(NEW, CONTEXT - length))
    logits = uncached_logits(model, generation.tokens, prompts=prompts, lengths=[length] * ROWS)
    np.testing.assert_array_equal(generation.tokens, logits.argmax(axis=-1))


@pytest.mark.slow
def test_a_row_alone_is_the_row_in_its_batch():
    for row in range(ROWS):
        assert_same(run("sampled", rows=slice(row, row + 1)), rows_of(expected("sampled"), slice(row, row + 1)))


@pytest.mark.parametrize("count", [1, 2, 5, 15, pytest.param(20, marks=pytest.mark.slow)])
def test_fewer_or_more_new_tokens_share_what_both_have(count):
    generation = run("sampled", max_new_tokens=count)
    assert generation.tokens.shape == (ROWS, count)
    shared = np.s_[:, : min(count, NEW)]
    assert_same(rows_of(generation, shared), rows_of(expected("sampled"), shared))


def test_equal_prompts_of_one_key_are_drawn_apart():
    tokens = run("sampled", prompts=np.asarray([[3, 4]] * ROWS), prompt_mask=None, key=jax.random.key(9)).tokens
    assert len({tuple(row) for row in np.asarray(tokens).tolist()}) == ROWS


# Ending ---------------------------------------------------------------------------------------------------------------


def cut(generation, eos, *, pad_id=0):
    """Return a generation without an end, ended by these tokens."""
    tokens = np.asarray(generation.tokens)
    ends = np.isin(tokens, eos)
    mask = np.cumsum(ends, axis=1) - ends == 0
    values = [np.where(mask, leaf, 0) for leaf in (generation.logp, generation.logp_sampler)]
    return Generation(np.where(mask, tokens, pad_id), mask, *values)


@pytest.mark.parametrize("times", [[2, 2], [3, 9]], ids=str)
@pytest.mark.parametrize("name", ["greedy", "sampled"])
def test_ending_early_changes_nothing_before_the_end(name, times):
    full = expected(name)
    eos = [int(full.tokens[0, time]) for time in times]
    for eos_id in (eos, jnp.asarray(eos)):
        generation = run(name, eos_id=eos_id, pad_id=3)
        assert_same(generation, cut(full, eos, pad_id=3))
    assert 0 < generation.mask.sum() < ROWS * NEW


CALLS = []


class Successor(LanguageModel):
    """After token t comes t + 1; it counts the times it really runs."""

    vocab_size, max_length, min_prompt_length = 100, 10**6, 1

    def init_cache(self, batch_size, max_length, *, dtype=jnp.float32):
        return Cache((), jnp.zeros((batch_size, max_length), bool), jnp.zeros((), jnp.int32))

    def hidden(self, params, tokens, cache=None, *, mask=None):
        jax.debug.callback(lambda: CALLS.append(tokens.shape[1]))
        return 30.0 * jax.nn.one_hot(tokens + 1, 100), cache.append(
            jnp.ones(tokens.shape, bool) if mask is None else mask
        )

    def logits(self, params, hidden):
        return hidden


SUCCESSOR = Successor()


def steps_of(run):
    """Return the result of `run`, and how many times the model ran on one token a row."""
    CALLS.clear()
    result = jax.block_until_ready(run())
    jax.effects_barrier()
    assert sum(length > 1 for length in CALLS) == 1, "one prefill"
    return result, CALLS.count(1)


@pytest.mark.parametrize(
    ("starts", "max_new_tokens", "steps"),
    [
        ([98, 98], 60, 0),  # the first token, which comes with the prefill, ends both rows
        ([98, 97], 60, 8),  # one block of steps
        ([97, 90], 60, 8),
        ([98, 89], 60, 16),
        ([0, 1], 60, 64),  # no row ends
        ([0, 1], 50, 56),
        ([0, 1], 9, 8),
        ([0, 1], 10, 16),
        ([0, 1], 1, 0),
    ],
)
def test_nothing_is_computed_once_all_rows_have_ended_or_have_enough(starts, max_new_tokens, steps):
    prompts, params = jnp.asarray(starts)[:, None], {"none": jnp.zeros(())}
    options = {"max_new_tokens": max_new_tokens, "greedy": True, "eos_id": 99}
    generation, taken = steps_of(lambda: generate(SUCCESSOR, params, prompts, **options))
    assert taken == steps
    row = np.asarray(starts)[:, None] + 1 + np.arange(max_new_tokens)
    np.testing.assert_array_equal(generation.mask, row <= 99)
    np.testing.assert_array_equal(generation.tokens, np.where(row <= 99, row, 0))


def test_the_cache_counts_the_tokens_of_a_row_up_to_its_end_and_no_padding_after_it():
    params, prompts = {"none": jnp.zeros(())}, jnp.asarray([[97, 0], [0, 90]])
    request = core.request(SUCCESSOR, prompts, prompts > 0, max_new_tokens=99, greedy=True, eos_id=99)

    @jax.jit
    def run(request):
        state, _ = begin(SUCCESSOR, params, request, num_slots=32)
        return advance(SUCCESSOR, params, state, request, num_steps=8)

    state, rest = run(request)
    np.testing.assert_array_equal(rest.tokens, [[99] + [0] * 7, range(92, 100)])
    np.testing.assert_array_equal(state.cache.valid.sum(axis=1), [1 + 2, 1 + 8])  # 98 and 99; 91 to 98, 99 is to be fed
    np.testing.assert_array_equal(state.done, [True, True])
    assert int(state.time) == 9


# Streams --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "name", "tokens_at_a_time"), [("gpt2", "greedy", 1), ("gpt2", "sampled", 3)])
def test_a_stream_is_the_generation_in_pieces(model, name, tokens_at_a_time):
    lm, full = TINY[model], expected(name, model)
    last = [int(full.tokens[row, 12]) for row in (0, 1)]
    options = {"greedy": True} | PLAIN if name == "greedy" else {"key": KEYS} | DRAWN
    options |= spread() | {"pad_id": 5, "tokens_at_a_time": tokens_at_a_time}
    for count, eos in [(16, NEVER), (11, NEVER), (16, last)]:
        pieces = list(stream(lm, random_params(lm), **options, max_new_tokens=count, eos_id=eos))
        sizes = [piece.tokens.shape[1] for piece in pieces]
        assert sizes[0] == 1 and set(sizes[1:-1]) <= {tokens_at_a_time} and sum(sizes) <= count
        assert_same(joined(pieces, length=count, pad_id=5), rows_of(cut(full, eos, pad_id=5), np.s_[:, :count]))


@pytest.mark.parametrize(("start", "pieces", "steps"), [(98, 1, 0), (95, 2, 3), (94, 3, 4), (90, 4, 8), (0, 7, 18)])
def test_a_stream_stops_when_all_rows_have_ended(start, pieces, steps):
    prompts, params = jnp.asarray([[98], [start]]), {"none": jnp.zeros(())}
    options = {"max_new_tokens": 19, "greedy": True, "eos_id": 99, "tokens_at_a_time": 3}
    result, taken = steps_of(lambda: list(stream(SUCCESSOR, params, prompts, **options)))
    assert (len(result), taken) == (pieces, steps)


@pytest.mark.parametrize(
    "model", [*(pytest.param(each, marks=pytest.mark.slow) for each in ("gpt2", "llama")), "table"]
)
def test_a_prompt_is_read_once_for_its_completions(model, monkeypatch):
    lm = TabularLM(3, 13) if model == "table" else TINY[model]
    params, read = random_params(lm), []
    real = core.read
    monkeypatch.setattr(core, "read", lambda *a: read.append(a[3].shape) or real(*a))
    limits, guidance = np.asarray([5, 2, 4, 3, 5, 1]), Guidance([[1], [2]], 1.4)
    options = {"max_new_tokens": limits, "key": jax.random.key(2), "transform": RepetitionPenalty(1.5)}
    found = generate(lm, params, [[2, 0, 1], [1]], n=3, guidance=guidance, **options)
    assert read == [(4, 16)], "two prompts, guided and not"
    prompts = [[2, 0, 1]] * 3 + [[1]] * 3
    assert_same(found, generate(lm, params, prompts, guidance=guidance.repeat(3), **options))
    with pytest.raises(ValueError, match="n must be an integer of at least 1, but is 0"):
        generate(lm, params, prompts, n=0, **options)


@pytest.mark.parametrize(
    "model", [*(pytest.param(each, marks=pytest.mark.slow) for each in ("gpt2", "llama")), "table"]
)
def test_with_a_memory_only_what_is_new_of_a_text_is_read(model, monkeypatch):
    lm = TabularLM(3, 13) if model == "table" else TINY[model]
    params, memory, begun = random_params(lm), Memory(), []
    real = module._begin_jit
    monkeypatch.setattr(module, "_begin_jit", lambda *a, **o: begun.append(o["num_slots"]) or real(*a, **o))
    options = {"max_new_tokens": 3, "key": jax.random.key(0), "transform": RepetitionPenalty(1.5)}
    text = [2, 0]
    for turn, slots in enumerate([[32], [64], [], [32]]):  # read at first, anew with room for more, not; another text
        text = text if turn < 3 else [0, 2]
        plain = joined(list(stream(lm, params, [text], **options)), length=3)
        begun.clear()
        pieces = list(stream(lm, params, [text], memory=memory, tokens_at_a_time=2, **options))
        assert_same(joined(pieces, length=3), plain)
        assert begun == slots
        whole = text + np.asarray(plain.tokens)[0].tolist()
        assert memory.tokens == whole[:-1], "the last token is not fed to the model"
        text = [*whole, 0]


def test_a_memory_is_of_one_text(gpt2):
    with pytest.raises(ValueError, match="a memory is of one text: prompts must be a single one, and guidance None"):
        stream(*gpt2, [[1], [2]], max_new_tokens=2, greedy=True, memory=Memory())


# Inside other transformations -----------------------------------------------------------------------------------------


def test_generate_under_vmap_over_keys_and_over_parameters(gpt2):
    lm, params = gpt2
    other = near(params)
    both = jax.tree.map(lambda *leaves: np.stack(leaves), params, other)
    keys = jnp.stack([KEYS, jax.random.split(jax.random.key(77), ROWS)])
    options = spread() | DRAWN | {"max_new_tokens": NEW, "eos_id": NEVER}
    results = jax.jit(jax.vmap(lambda params, keys: generate(lm, params, **options, key=keys)))(both, keys)
    assert_same(rows_of(results, 0), expected("sampled"))
    assert_same(rows_of(results, 1), generate(lm, other, **options, key=keys[1]))


MESH = """
    import sys
    sys.path.insert(0, sys.argv[1])
    from tests.conftest import TINY, random_params
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from jaxrl_llm.decoding import generate
    from jaxrl_llm.decoding.transforms import Temperature, TopP

    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())
    lm, params = TINY["gpt2"], random_params(TINY["gpt2"])
    prompts = np.random.default_rng(0).integers(0, lm.vocab_size, (16, 9))
    mask = np.arange(9) >= np.arange(16)[:, None] % 9
    keys = jax.random.split(jax.random.key(0), 16)
    options = {"max_new_tokens": 12, "transform": [Temperature(1.5), TopP(0.95)], "eos_id": [3, 7, 8]}
    single = generate(lm, params, prompts, prompt_mask=mask, key=keys, **options)
    shared = jax.device_put((prompts, mask, keys), rows)
    spread = generate(
        lm, jax.device_put(params, everywhere), shared[0], prompt_mask=shared[1], key=shared[2], **options
    )
    assert len(spread.tokens.sharding.device_set) == 8, spread.tokens.sharding
    assert {shard.data.shape for shard in spread.tokens.addressable_shards} == {(2, 12)}, spread.tokens.sharding
    np.testing.assert_array_equal(spread.tokens, single.tokens)
    np.testing.assert_array_equal(spread.mask, single.mask)
    np.testing.assert_allclose(spread.logp, single.logp, atol=1e-4)
    assert 0 < spread.mask.sum() < 16 * 12
    print("same tokens")
"""


@pytest.mark.slow
def test_a_batch_spread_over_eight_devices_gives_the_same_tokens():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(MESH), str(Path(__file__).resolve().parents[2])]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "same tokens" in result.stdout, result.stderr[-3000:]


# Programs and what cannot be ------------------------------------------------------------------------------------------


def test_a_bucket_of_prompts_and_of_new_tokens_is_one_program():
    def call(length, count):
        prompts = np.ones((7, length), int)  # of as many rows as in no other test
        return lambda: generate(SUCCESSOR, {"none": jnp.zeros(())}, prompts, max_new_tokens=count, greedy=True)

    assert programs_of(call(1, 1), call(15, 9), call(16, 17)) == 1
    assert programs_of(call(17, 1), call(32, 17)) == 1
    assert programs_of(call(1, 18), call(16, 33)) == 1


def test_a_stream_compiles_nothing_but_its_two_programs(gpt2, caplog):
    """The first text of a session waits for every program: none is compiled to bring the arguments into form."""
    lm, params = gpt2
    with jax.log_compiles(True):
        options = {
            "max_new_tokens": [9, 5, 5, 5, 5],
            "tokens_at_a_time": 5,
            "eos_id": [22],
            "pad_id": 3,
            "greedy": True,
        }
        list(stream(lm, params, [[1] * 17, [2], [3], [4], [5]], **options))
    compiled = set(re.findall(r"Compiling jit\((\w+)\)", caplog.text))
    assert {"begin", "advance"} <= compiled <= {"begin", "advance", "_reduce_all"}


@pytest.mark.parametrize("tokens_at_a_time", [0, -1, 1.5])
def test_a_stream_of_no_tokens_at_a_time_is_refused(gpt2, tokens_at_a_time):
    with pytest.raises(ValueError, match="tokens_at_a_time must be an integer of at least 1"):
        stream(*gpt2, [[1]], max_new_tokens=4, greedy=True, tokens_at_a_time=tokens_at_a_time)


@pytest.mark.parametrize("decoder", [generate, lambda *a, **o: list(stream(*a, **o))], ids=["generate", "stream"])
@pytest.mark.parametrize("kind", ["NaN", "all NaN", "+inf", "all -inf"])
def test_broken_logits_are_named_by_row_and_token(tabular, decoder, kind):
    lm, params = tabular
    options = {"max_new_tokens": 3, "eos_id": NEVER}
    values = {"NaN": [jnp.nan, 0, 0], "all NaN": [jnp.nan] * 3, "+inf": [0, jnp.inf, 0], "all -inf": [-jnp.inf] * 3}
    drawn = {"key": KEYS[0], "transform": TopK(2)}
    begins = params["logits"].at[0].set(jnp.asarray([-jnp.inf, -jnp.inf, 0]))
    for row, time in [(0, 0), (1 + 2, 1)]:  # at the root; after token 2, which the table is made to begin with
        table = {"logits": begins.at[row].set(jnp.asarray(values[kind]))}
        for choice in ({"greedy": True}, drawn) if decoder is generate else (drawn,):
            with pytest.raises(FloatingPointError, match=f"row 0 at new token {time}: .* NaN, \\+inf, or all −inf"):
                decoder(lm, table, NOTHING[:2], **options | choice)
    ended = generate(lm, table, NOTHING[:2], **options | drawn | {"eos_id": (2, 2)})
    assert (ended.tokens[:, 0] == 2).all() and np.isfinite(ended.logp).all(), "nothing is read after the end"


def test_under_an_outer_jit_broken_logits_show_as_nan_from_that_token_on(tabular):
    lm, params = tabular
    inside = jax.jit(lambda params: generate(lm, params, NOTHING[:2], max_new_tokens=3, greedy=True))
    logp = inside({"logits": params["logits"].at[0, 2].set(9.0).at[1 + 2].set(jnp.nan)}).logp
    np.testing.assert_array_equal(np.isnan(logp), [[False, True, False]] * 2)


# Guidance -------------------------------------------------------------------------------------------------------------


def test_guidance_of_scale_one_is_generation_and_of_others_excludes_what_either_prompt_does():
    lm = TabularLM(vocab_size=3, horizon=3)
    params = {"logits": np.random.default_rng(0).normal(size=(lm.num_prefixes, 3)).astype(np.float32)}
    params["logits"][1, 2] = params["logits"][2, 0] = -np.inf  # after "0" and after "1"
    keys, second = jax.random.split(jax.random.key(0), 400), np.ones((400, 1), int)
    rows = {"prompts": np.zeros((400, 1), int), "max_new_tokens": 1, "key": keys}
    guided = generate(lm, params, **rows, guidance=Guidance(second, 1.0))
    np.testing.assert_array_equal(guided.tokens, generate(lm, params, **rows).tokens)
    assert set(np.unique(guided.tokens)) == {0, 1}
    between = generate(lm, params, **rows, guidance=Guidance(second, 0.5))
    assert set(np.unique(between.tokens)) == {1}


def test_guidance_mixes_the_two_distributions_whatever_the_padding():
    lm = TabularLM(vocab_size=3, horizon=3)
    params = {"logits": jnp.asarray(np.random.default_rng(1).normal(size=(lm.num_prefixes, 3)), jnp.float32)}
    own, other = (log_softmax(params["logits"][row]) for row in (1, 2))  # after "0" and after "1"
    expected = log_softmax(other + 2.5 * (own - other))
    padded = Guidance(np.asarray([[1, 0, 0]] * 400), 2.5, np.asarray([[True, False, False]] * 400))
    keys = jax.random.split(jax.random.key(3), 400)
    found = generate(lm, params, np.zeros((400, 1), int), max_new_tokens=1, key=keys, guidance=padded)
    np.testing.assert_allclose(found.logp_sampler[0, 0], expected[found.tokens[0, 0]], rtol=1e-5)
    np.testing.assert_allclose(found.logp[0, 0], own[found.tokens[0, 0]], rtol=1e-5)
    scales = np.where(np.arange(400) % 2, 2.5, 1.0).astype(np.float32)
    each = dataclasses.replace(padded, scale=scales)
    mixed = generate(lm, params, np.zeros((400, 1), int), max_new_tokens=1, key=keys, guidance=each)
    np.testing.assert_array_equal(mixed.tokens[1::2], found.tokens[1::2])
    plain = own[np.asarray(mixed.tokens)[::2, 0]]
    np.testing.assert_allclose(mixed.logp_sampler[::2, 0], plain, rtol=1e-5)


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        (Guidance([[1]], 2.0), "guidance needs a second prompt for each of 2 rows"),
        (
            Guidance([[1], [1]], [1.0, 2.0, 3.0]),
            "the guidance scale must be one finite number, or one for each of 2 rows",
        ),
        (Guidance([[1], [1]], np.inf), "the guidance scale must be one finite number"),
        (Guidance([[1], []], 2.0), "prompt 1 is empty"),
        (Guidance("text", 2.0), "guidance.prompts must be token ids"),
    ],
)
def test_guidance_that_is_none_is_named(gpt2, guidance, message):
    with pytest.raises(ValueError, match=message):
        generate(*gpt2, [[1], [2]], max_new_tokens=2, greedy=True, guidance=guidance)


@pytest.mark.slow
def test_stop_strings_are_compiled_before(gpt2):
    with pytest.raises(ValueError, match=r"stop must be made by decoding.stop_strings, but is \['x'\]"):
        generate(*gpt2, [[1]], max_new_tokens=2, greedy=True, stop=["x"])
