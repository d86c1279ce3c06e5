"""Which rows are in which batch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.data.order import EpochOrder


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60), batch_size=st.integers(1, 9), seed=st.integers(0, 5)
)
def test_every_row_comes_at_most_once_an_epoch_and_epochs_differ_only_in_order(lengths, batch_size, seed):
    batch_size = min(batch_size, len(lengths))
    order = EpochOrder(lengths, batch_size=batch_size, seed=seed)
    for epoch in range(2):
        rows = np.concatenate([order(epoch * order.steps_per_epoch + step) for step in range(order.steps_per_epoch)])
        assert len(set(rows)) == len(rows) == len(lengths) // batch_size * batch_size
        assert set(rows) <= set(range(len(lengths)))


def test_a_batch_depends_on_seed_and_step_alone():
    lengths = np.random.default_rng(0).integers(1, 90, 64)
    whole = EpochOrder(lengths, batch_size=4, seed=3)
    batches = [whole(step) for step in range(40)]
    for step in (39, 0, 17, 16, 15):
        np.testing.assert_array_equal(EpochOrder(lengths, batch_size=4, seed=3)(step), batches[step])
        np.testing.assert_array_equal(whole(step), batches[step])
    assert any((EpochOrder(lengths, batch_size=4, seed=4)(step) != batches[step]).any() for step in range(8))


def test_an_epoch_is_the_batches_of_its_steps_and_says_how_many_rows_it_leaves_out():
    order = EpochOrder(np.random.default_rng(0).integers(1, 90, 30), batch_size=4, seed=3)
    assert (order.steps_per_epoch, order.left_over) == (7, 2)
    for number in (1, 0):
        np.testing.assert_array_equal(order.epoch(number), [order(7 * number + step) for step in range(7)])


def test_rows_of_like_length_stand_together():
    lengths = np.random.default_rng(0).integers(1, 90, 640)

    def waste(pool):
        rows = lengths[EpochOrder(lengths, batch_size=8, seed=0, pool=pool).epoch(0)]
        return 1 - rows.sum() / (8 * rows.max(axis=1)).sum()

    assert waste(16) < 0.1 < 0.3 < waste(1)


def test_a_batch_size_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="batch_size must be from 1 to the 3 rows, but is 4"):
        EpochOrder([1, 2, 3], batch_size=4, seed=0)
