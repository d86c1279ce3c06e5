"""DPO on samples: the asymptotic median, samples without a minimum; and what the committed gradient shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import dpo_equivalence
from tests.experiments import entry


def test_the_asymptotic_median_of_two_answers_is_that_of_a_square():
    wins, optimum, config = np.asarray([[0.1, 0.5], [0.3, 0.1]]), np.asarray([0.7, 0.3]), dpo_equivalence.Config()
    information = 0.5 * 0.3 / 0.8  # of a comparison, about the difference of the scores
    expected = 0.7 * 0.3 / (2 * config.beta**2 * information) * 0.4549  # the median of χ² with one degree of freedom
    assert dpo_equivalence.asymptotic_median(wins, optimum, config) == pytest.approx(expected, rel=0.02)


def test_samples_in_which_an_answer_never_loses_have_no_minimum_and_count_as_infinitely_far():
    config = dpo_equivalence.Config(pairs=(5,), repeats=3)
    always = jnp.asarray([[0.0, 1.0], [0.0, 0.0]])
    (row,) = dpo_equivalence.from_samples(None, None, always, jnp.log(jnp.ones(2) / 2), config, jax.random.key(0))
    assert row == {"pairs": 5, "kl": [], "without_minimum": 3}
    assert dpo_equivalence.medians([{"kl": [1.0, 2.0], "without_minimum": 1}]) == [2.0]


def test_the_wrong_sign_of_the_sigmoid_is_seen_only_away_from_the_reference():
    exact = entry("dpo_gradient")["data"]["exact"]
    assert exact["turned start"] < 1e-12 < 0.1 < exact["turned later"]
