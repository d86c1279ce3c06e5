"""Shared by the tests: tiny models with large random parameters, and naive references to hold results against."""

import gc
import io
import os
import sys
import warnings

from jaxrl_llm import runtime

# Thousands of tiny programs are compiled once and run once: without XLA's expensive passes that takes a third of the
# time. `make optimised` runs some of the tests with them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Compiling each in one piece, not in parts side by side, takes a fifth less.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")
# Small programs too are shared between the workers: an eighth less time in an empty cache.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
runtime.set_up()  # before jax: compiled programs are kept from one run to the next

from pathlib import Path  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import scipy.stats  # noqa: E402

from jaxrl_llm.models import Llama, LlamaConfig, StableLM, StableLMConfig  # noqa: E402
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config  # noqa: E402
from jaxrl_llm.models.t5 import (  # noqa: E402
    T5,
    T5LM,
    T5Config,
)
from jaxrl_llm.tabular import TabularLM  # noqa: E402

# The collector of cycles would walk through all imported modules every few tests.
gc.freeze()
gc.set_threshold(100_000, 50, 100)

hypothesis.settings.register_profile("house", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("house")

VOCAB, CONTEXT = 23, 42
TINY_T5 = T5(
    T5Config(
        vocab_size=VOCAB,
        d_model=16,
        d_kv=6,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
)
TINY = {
    "gpt2": GPT2(GPT2Config(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=16, n_layer=1, n_head=2)),
    "llama": Llama(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
        )
    ),
    "stablelm": StableLM(
        StableLMConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=CONTEXT,
            use_qkv_bias=True,
            qk_layernorm=True,
        )
    ),
    "t5": T5LM(TINY_T5.config, num_sources=1),
    "tabular": TabularLM(vocab_size=3, horizon=8),
}


MAPS, MOST_MAPS = Path("/proc/self/maps"), 4_000  # a few hundred programs; 1,300 are there from the start


@pytest.fixture(scope="module", autouse=True)
def _forget_programs_before_they_are_too_many():
    """Every compiled program keeps a few memory maps, and each makes the next take longer to compile.

    A worker runs thousands of tests. Linux allows a process 65,530 maps, and XLA crashes beyond; long before, after
    2,000 programs, the next takes a third more time than in a new process.
    """
    yield
    if MAPS.is_file() and len(MAPS.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()


def first_quick(cases, quick=1):
    """The cases of a test as parameters; those after the first ones are left to `make slow`."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[pytest.mark.slow] * (place >= quick))
        for place, case in enumerate(cases)
    ]


def random_params(lm, seed=0, *, dtype=jnp.float32):
    """Every parameter random, biases and norms too, and logits far from uniform; of a given T5, sources too."""
    if isinstance(lm, T5LM):
        t5, source = T5(lm.config), np.random.default_rng(seed).integers(0, lm.vocab_size, (lm.num_sources, 7))
        return t5.start(random_params(t5, seed, dtype=dtype), jnp.asarray(source)).params
    if isinstance(lm, TabularLM):
        logits = np.random.default_rng(seed).normal(size=(lm.num_prefixes, lm.vocab_size))
        return {"logits": jnp.asarray((1.5 * logits).astype(dtype))}

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        noise = np.random.default_rng([seed, *name.encode()]).normal(size=leaf.shape)
        std = 0.3 if isinstance(lm, T5) else 0.5  # its attention logits are not scaled down
        values = 1 + 0.2 * noise if "scale" in name else 0.2 * noise if "'bias'" in name else std * noise
        return jnp.asarray(values.astype(dtype))

    return jax.tree_util.tree_map_with_path(draw, lm.abstract_params)


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def neural(request):
    """GPT-2 and Llama: the model and its parameters."""
    lm = TINY[request.param]
    return lm, random_params(lm)


@pytest.fixture(scope="session")
def gpt2():
    """GPT-2 alone."""
    return TINY["gpt2"], random_params(TINY["gpt2"])


@pytest.fixture(scope="session")
def tabular():
    """A table of 3 tokens and 4 steps: 81 sequences."""
    lm = TabularLM(vocab_size=3, horizon=4)
    return lm, random_params(lm, 1)


@pytest.fixture
def run(monkeypatch, capsys):
    """`jaxrl-llm` with these arguments and this standard input: exit status, standard output, standard error."""

    from jaxrl_llm import cli  # imports much, and few tests need it

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["jaxrl-llm", *map(str, arguments)])
        monkeypatch.setattr(os, "_exit", sys.exit)
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # the command sets its own
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
        monkeypatch.setattr(sys, "stdin", stdin if isinstance(stdin, io.StringIO) else io.StringIO(stdin))
        capsys.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def assert_follows(outcomes, probabilities, *, level=1e-4):
    """χ²: the outcomes (indices) are draws from `probabilities`. Cells expected fewer than 5 times are merged."""
    counts = np.bincount(np.asarray(outcomes), minlength=len(probabilities))
    probabilities = np.asarray(probabilities, np.float64)
    assert len(counts) == len(probabilities)
    np.testing.assert_allclose(probabilities.sum(), 1, atol=1e-5)
    assert not counts[probabilities == 0].any(), "an impossible outcome was drawn"
    expected = counts.sum() * probabilities / probabilities.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert len(expected) > 1 or not (~rare).all(), "one cell tests nothing"
    statistic = (np.square(observed - expected) / expected).sum()
    p_value = scipy.stats.chi2.sf(statistic, len(expected) - 1)
    assert p_value > level, f"χ² = {statistic:.1f} with {len(expected) - 1} degrees of freedom, p = {p_value:.1e}"


def log_softmax(logits):
    """In float64, by its definition."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kept_by_top_k(row, k):
    """Which tokens of one row top-k keeps, by sorting."""
    row = np.asarray(row, np.float64)
    return row >= np.sort(row)[::-1][min(k, len(row)) - 1]


def kept_by_top_p(row, p):
    """Which tokens of one row the nucleus keeps, by sorting, in float64."""
    row = np.asarray(row, np.float64)
    if p >= 1:
        return np.ones(len(row), bool)
    ordered = np.sort(row)[::-1]
    mass = np.cumsum(np.exp(log_softmax(ordered)))
    return row >= ordered[min(np.searchsorted(mass, p), len(row) - 1)]
