"""Packed rows: losses, metrics and gradients of the rows they hold, every record once an epoch, little padding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import train
from jaxrl_llm.language_model import LanguageModel
from jaxrl_llm.models import GPT2, GPT2Config, load
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.scoring import log_probs
from jaxrl_llm.training import packing, recipes, steps
from jaxrl_llm.training.batches import KINDS, Rows, preferences, prompt_completions
from jaxrl_llm.training.loop import RunLog
from jaxrl_llm.training.packing import PackedOrder, pack
from jaxrl_llm.training.preference import preference_loss, with_reference
from jaxrl_llm.training.reward_model import reward_loss
from jaxrl_llm.training.steps import Frozen
from jaxrl_llm.training.supervised import sft_loss
from tests.conftest import random_params
from tests.models.test_conformance import MODELS

KEY = jax.random.key(0)
TABLE = MODELS["tabular"]
COUNT, LENGTH = 7, 20


def rows_of(lm, texts, *, count=COUNT, seed=0):
    """Records of random tokens: prompts of 1 to 3 tokens, and each with so many completions of 1 to 5."""
    rng = np.random.default_rng(seed)

    def tokens(least, most):
        return rng.integers(0, lm.vocab_size, rng.integers(least, most + 1)).tolist()

    def record():
        completions = [tokens(1, 5) for _ in range(texts)]
        return Rows(tokens(1, 3), completions, label=[*range(texts)], margins=rng.normal(size=texts).tolist())

    return [record() for _ in range(count)]


def packed(batch, rows, *, length=LENGTH, size=None):
    """The batch of these rows, in bins; with a size, among empty ones."""
    bins = pack([each.lengths for each in rows], length=length, seed=0)
    bins += [[]] * ((size or len(bins)) - len(bins))
    order = np.asarray([each.record for one in bins for each in one])
    return packing.packed(jax.tree.map(lambda leaf: leaf[order], batch), bins, length=length, most=max(map(len, bins)))


def cases(lm):
    """Each objective with its parameters: name -> (loss, kind of data, texts of a record)."""
    return {
        "sft": (sft_loss(lm), "prompt-completion", 1),
        "dpo": (preference_loss(lm, "dpo"), "preference", 2),
        "orpo": (preference_loss(lm, "orpo"), "preference", 2),
        "length-averaged ipo": (preference_loss(lm, "length_normalised_ipo"), "preference", 2),
        "ld_dpo, bco and sft": (preference_loss(lm, ["ld_dpo", "bco", "sft"]), "preference", 2),
        "reward": (reward_loss(ScalarHead(lm), centering=0.1), "ranked", 3),
    }


@functools.cache
def gradients(lm, name, kind_of_rows, microbatches, dtype):
    """The gradient and the metrics of an objective on packed or unpacked rows."""
    loss, kind, texts = cases(lm)[name]
    rows = rows_of(lm, texts)
    batch = KINDS[kind].collate(rows, 1)
    batch = batch if kind_of_rows == "unpacked" else packed(batch, rows, size=4)
    params = random_params(lm, dtype=dtype)
    if name == "reward":
        params = {"model": params, "head": jnp.ones(16 if lm is not TABLE else lm.vocab_size, dtype)}

    @jax.jit
    def of(params, batch):
        frozen = Frozen(ref=jax.tree.map(lambda leaf: 0.7 * leaf, params), running=jnp.asarray(0.3))
        return steps.gradients(
            lambda *given: loss(*given[:2], frozen, KEY), params, batch, KEY, microbatches=microbatches
        )

    return jax.device_get(of(params, jax.tree.map(jnp.asarray, batch)))


def assert_close(found, expected, tolerance):
    assert optax.tree.norm(expected[0]) > 1e-3
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), found, expected)


SLOW = [
    *[(name, "dpo") for name in ("windows", "learned positions", "experts", "llama", "alibi")],
    *[(name, loss) for name in ("gpt2", "windows") for loss in ("sft", "reward")],
    ("alibi", "reward"),
    ("alibi", "sft"),
    ("tabular", "length-averaged ipo"),
]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *[("tabular", name) for name in cases(TABLE) if name != "length-averaged ipo"],
        ("gpt2", "dpo"),
        *[pytest.param(*each, marks=pytest.mark.slow) for each in SLOW],
    ],
)
def test_packed_rows_have_the_gradients_and_metrics_of_the_rows_they_hold(model, name):
    """Among empty bins, and in microbatches, one of which holds none but empty ones."""
    with jax.enable_x64(True):
        of = functools.partial(gradients, MODELS[model], name, dtype=jnp.float64)
        expected = of("unpacked", 1)
        assert_close(of("packed", 4 if model == "tabular" else 1), expected, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo", "reward"])
def test_packed_rows_have_the_gradients_of_the_rows_they_hold_in_float32(name):
    found, expected = (gradients(MODELS["gpt2"], name, kind, 1, jnp.float32) for kind in ("packed", "unpacked"))
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("name", ["dpo", pytest.param("ipo", marks=pytest.mark.slow)])
def test_stored_log_probabilities_of_the_reference_are_those_of_the_step(name):
    loss, rows = preference_loss(TABLE, name), rows_of(TABLE, 2)
    batch = packed(preferences(rows, 1), rows)
    params, reference = random_params(TABLE), random_params(TABLE, 1)
    stored, compute = with_reference(TABLE, reference, batch), jax.jit(loss)
    found, expected = (
        compute(params, each, Frozen(ref=ref), KEY) for each, ref in ((stored, None), (batch, reference))
    )
    assert_close((found.metrics, found.value, found.weight), (expected.metrics, expected.value, expected.weight), 1e-5)


def test_a_loss_of_ones_own_takes_the_numbers_of_each_pair():
    def loss(a, b, *, margin):
        return (a - b - margin) ** 2

    rows = rows_of(TABLE, 2)
    given = {"fields": {"margin": np.arange(1.0, COUNT + 1)}, "weight": np.arange(1.0, COUNT + 1)}
    batch, frozen = preferences(rows, 1)._replace(**given), Frozen(ref=random_params(TABLE, 1))
    of_batch = jax.jit(preference_loss(TABLE, loss))
    values = [of_batch(random_params(TABLE), each, frozen, KEY).value for each in (packed(batch, rows), batch)]
    assert float(values[0]) == pytest.approx(float(values[1]), rel=1e-5)


def test_only_the_mean_over_tokens_is_known_of_packed_rows():
    batch = packed(prompt_completions(rows_of(TABLE, 1), 1), rows_of(TABLE, 1))
    with pytest.raises(ValueError, match="mode must be token_mean for packed rows, but is sequence_sum"):
        sft_loss(TABLE, mode="sequence_sum")(random_params(TABLE), batch, None, KEY)


def test_a_model_of_one_text_a_row_is_refused():
    class Plain(LanguageModel):
        vocab_size, max_length, min_prompt_length = 3, 10, 1

        def hidden(self, params, tokens, cache=None, *, mask=None):
            raise AssertionError

    with pytest.raises(ValueError, match="must take segments, but Plain reads one text a row: train it without pack"):
        log_probs(Plain(), None, packed(prompt_completions(rows_of(TABLE, 1), 1), rows_of(TABLE, 1)))


# Bins -----------------------------------------------------------------------------------------------------------------


def lengths_of(count, texts, *, seed=0, most=512):
    return np.random.default_rng(seed).integers(32, most + 1, (count, texts)).tolist()


@pytest.mark.parametrize("texts", [1, 2, 3])
def test_every_record_is_in_one_bin_and_fits_its_rows(texts):
    lengths = lengths_of(800, texts)
    bins = pack(lengths, length=512, seed=0)
    assert sorted(each.record for one in bins for each in one) == list(range(800))
    assert all(bins)
    for one in bins:
        filled = np.zeros(texts, int)
        for each in one:
            np.add.at(filled, list(each.rows), lengths[each.record])
        assert filled.max() <= 512
    assert bins == pack(lengths, length=512, seed=0) != pack(lengths, length=512, seed=1)


@pytest.mark.parametrize(("texts", "bound"), [(1, 0.01), (2, 0.03)])
def test_little_of_packed_rows_is_padding(texts, bound):
    """Of texts of 32 to 512 tokens in rows of 1024; alone in rows of 512, 47% would be."""
    lengths = lengths_of(3000, texts)
    places = len(pack(lengths, length=1024, seed=0)) * texts * 1024
    assert 0 <= 1 - np.sum(lengths) / places < bound


def test_a_text_that_is_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="length must be at least the 9 tokens of the longest text, but is 8"):
        pack([[3], [9]], length=8, seed=0)


def test_every_record_comes_once_an_epoch_in_even_batches_that_seed_and_epoch_fix():
    lengths = lengths_of(200, 2)
    order, other = (PackedOrder(lengths, length=512, batch_size=16, seed=seed) for seed in (0, 1))
    per_epoch = order.steps_per_epoch
    epochs = [[order(epoch * per_epoch + place) for place in range(per_epoch)] for epoch in (0, 1)]
    for bins in epochs:
        assert sorted(each.record for batch in bins for one in batch for each in one) == list(range(200))
        sizes = {len(batch) for batch in bins}
        assert max(sizes) <= 16 and max(sizes) - min(sizes) <= 1
    assert epochs[0] != epochs[1] != other.epoch(1)
    assert epochs[1] == PackedOrder(lengths, length=512, batch_size=16, seed=0).epoch(1)
    bins = len(order.all)
    with pytest.raises(ValueError, match=f"1 to {bins}, the bins of 2 rows of 512 tokens .* fill, but is {bins + 1}"):
        PackedOrder(lengths, length=512, batch_size=bins + 1, seed=0)


# Runs -----------------------------------------------------------------------------------------------------------------

SMALL = GPT2(GPT2Config(vocab_size=4096, n_positions=64, n_embd=16, n_layer=1, n_head=2))
DATA = {
    "sft": [{"prompt": f"Say {i}:", "completion": " it is" * (i % 5 + 1)} for i in range(12)],
    "dpo": [{"prompt": f"Say {i}:", "chosen": " yes" * (i % 3 + 1), "rejected": " no," * 4} for i in range(12)],
    "reward": [{"prompt": f"Say {i}:", "answers": [" a", " b b", " c"][: 2 + i % 2]} for i in range(12)],
}


@pytest.fixture(scope="module")
def small():
    return dataclasses.replace(load("tiny-gpt2"), model=SMALL, params=jax.jit(SMALL.init)(KEY))


@pytest.mark.slow
@pytest.mark.parametrize("kind", DATA)
def test_a_packed_run_of_all_data_at_once_is_the_unpacked_one(small, kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recipes, "sampler_of", lambda *_: lambda params: "a text")
    rows, bins = {}, 2 if kind == "reward" else 4
    for name, sizes in (
        ("packed", {"packing": True, "max_length": 40, "batch_size": bins, "microbatches": 2}),
        ("unpacked", {"batch_size": 12}),
    ):
        options = {"steps": 3, "learning_rate": 1e-3, "log_every": 1, "eval_data": DATA[kind]} | sizes
        getattr(train, kind)(small, DATA[kind], out=tmp_path / name, **options)
        rows[name] = RunLog(tmp_path / name / "log.jsonl").rows()
    rows_of_bins = {"sft": 1, "dpo": 2, "reward": 3}[kind] * bins
    assert f"completions truncated, packed into {rows_of_bins} rows of 40 tokens, " in capsys.readouterr().out
    for packed_row, row in zip(rows["packed"], rows["unpacked"], strict=True):
        assert packed_row["tokens"] == row["tokens"]
        for metric in row.keys() - {"tokens", "tokens_per_second", "seconds", "sample"}:
            assert packed_row[metric] == pytest.approx(row[metric], rel=1e-4, abs=1e-5), metric


def test_data_that_fill_too_few_rows_and_losses_that_compare_rows_are_refused(small):
    with pytest.raises(ValueError, match="batch_size must be from 1 to 1, the rows of 64 tokens that"):
        train.sft(small, DATA["sft"][:1], packing=True, batch_size=2, max_length=64)
    with pytest.raises(ValueError, match="packing must be False for kto, which compares all examples of a batch"):
        train.dpo(small, DATA["dpo"], loss="kto", packing=True)
    with pytest.raises(ValueError, match=r"packing must be False for dpo\+wpo, which weighs examples by the policy"):
        train.dpo(small, DATA["dpo"], loss=["dpo", "wpo"], packing=True)
