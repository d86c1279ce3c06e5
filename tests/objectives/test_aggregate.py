import functools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrl_llm.objectives.aggregate import aggregate

X = np.float32([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
MASK = np.asarray([[True, True, False], [False, True, False], [False, False, False]])
SETTINGS = {"token_mean": {}, "sequence_mean": {}, "sequence_sum": {}, "constant": {"normaliser": 4.0}}
compiled = jax.jit(aggregate, static_argnames=("mode", "normaliser"))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_mean", (1 + 2 + 5) / 3),
        ("sequence_mean", (1.5 + 5 + 0) / 3),
        ("sequence_sum", (3 + 5 + 0) / 3),
        ("constant", 8 / (3 * 4)),
    ],
)
def test_by_hand_on_a_ragged_mask_with_an_empty_row(mode, expected):
    np.testing.assert_allclose(compiled(X, MASK, mode=mode, **SETTINGS[mode]), expected, rtol=1e-6)


@pytest.mark.parametrize("mode", SETTINGS)
def test_what_the_mask_hides_does_not_matter_and_a_batch_without_tokens_is_zero(mode):
    function = functools.partial(aggregate, mode=mode, **SETTINGS[mode])
    everything = jax.jit(
        lambda *given: (*jax.value_and_grad(function)(*given), aggregate.grad(*given, mode, **SETTINGS[mode])[0])
    )
    for hidden in (np.nan, np.inf, -np.inf):
        value, gradient, closed = everything(np.where(MASK, X, np.float32(hidden)), MASK)
        np.testing.assert_array_equal(value, everything(X, MASK)[0])
        np.testing.assert_array_equal(gradient, closed)
        assert (gradient[~MASK] == 0).all() and (gradient[MASK] > 0).all()
    value, gradient, _ = everything(X, np.zeros_like(MASK))
    assert value == 0 and (gradient == 0).all()
    assert function(np.zeros((0, 3), np.float32), np.zeros((0, 3), bool)) == 0


@pytest.mark.parametrize("mode", SETTINGS)
@given(mask=hnp.arrays(bool, (3, 4)), left=st.integers(0, 3))
def test_padding_on_either_side_changes_nothing(mode, mask, left):
    values, sides = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32), ((0, 0), (left, 3 - left))
    found = compiled(values, mask, mode=mode, **SETTINGS[mode])
    padded = compiled(np.pad(values, sides, constant_values=9), np.pad(mask, sides), mode=mode, **SETTINGS[mode])
    np.testing.assert_allclose(padded, found, rtol=1e-6)


@pytest.mark.parametrize("mode", SETTINGS)
def test_every_shard_returns_the_global_mean(mode):
    """Shards of unequal token counts: the mean of their own means would be another number."""
    values = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    mask = np.arange(5) < np.asarray([5, 1, 2, 0])[:, None]
    function = functools.partial(aggregate, mode=mode, **SETTINGS[mode])

    @jax.jit
    def found(values, mask):
        shards = values.reshape(2, 2, 5), mask.reshape(2, 2, 5)
        by_shard = jax.vmap(functools.partial(function, axis_name="shard"), axis_name="shard")
        return function(values, mask), by_shard(*shards), jax.vmap(function)(*shards).mean()

    whole, split, own = found(values, mask)
    np.testing.assert_allclose(split, [whole] * 2, rtol=1e-5)
    assert (abs(own - split[0]) > 0.01) == (mode == "token_mean")


EIGHT_DEVICES = """
import functools
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxrl_llm.objectives.aggregate import aggregate

mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
rows = PartitionSpec("data")
values = jnp.asarray(np.random.default_rng(0).normal(size=(16, 5)), jnp.float32)
mask = jnp.arange(5) < jnp.arange(16)[:, None] % 6
for mode in ("token_mean", "sequence_mean", "sequence_sum"):
    expected = aggregate(values, mask, mode)
    spread = [jax.device_put(array, NamedSharding(mesh, rows)) for array in (values, mask)]
    by_jit = jax.jit(aggregate, static_argnames="mode")(*spread, mode=mode)
    function = functools.partial(aggregate, mode=mode, axis_name="data")
    by_map = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(rows, rows), out_specs=PartitionSpec()))(*spread)
    assert len(spread[0].sharding.device_set) == 8
    np.testing.assert_allclose([by_jit, by_map], [expected, expected], rtol=1e-5)
print("same means")
"""


@pytest.mark.slow
def test_eight_devices_give_the_global_mean():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", EIGHT_DEVICES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "same means" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((X, MASK, "mean"), {}, "mode must be one of token_mean, sequence_mean, sequence_sum, constant, but is 'mean'"),
        ((X[0], MASK[0], "token_mean"), {}, r"must be \[batch, time\], but has the shape \[3\]"),
        ((X, X, "token_mean"), {}, "mask must be boolean, or 0 and 1"),
        ((X, MASK, "constant"), {}, "normaliser is for the mode constant and needed there, but is None"),
        ((X, MASK, "token_mean"), {"normaliser": 3.0}, "but is 3.0 for token_mean"),
        ((X, MASK, "constant"), {"normaliser": 0.0}, r"normaliser must lie in \(0, inf\), but is 0.0"),
    ],
)
def test_bad_input_is_named(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        aggregate(*arguments, **settings)


def test_a_mask_of_zeros_and_ones_is_taken():
    assert aggregate(X, MASK.astype(np.int32), "token_mean") == aggregate(X, MASK, "token_mean")
