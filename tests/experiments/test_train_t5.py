"""tiny-t5: what it was trained on, what it can do, and what its results promise."""

import json

import numpy as np
import pytest

from experiments import ledger, train_t5
from jaxrl_llm import models
from jaxrl_llm.data import number_names


def test_training_names_are_drawn_by_length_and_never_held_out():
    split = number_names.split()
    batches = train_t5.Names(split.train, batch_size=64, seed=0)
    words = [int(row.sum()) - 1 for step in range(4) for row in batches(step).source_mask]
    assert set(words) == set(range(1, 10))
    np.testing.assert_array_equal(batches(3).source, train_t5.Names(split.train, batch_size=64, seed=0)(3).source)
    assert [batches.tokens(steps) for steps in (3, 1, 4)] == [
        sum(int(batches(step).target_mask.sum()) for step in range(steps)) for steps in (3, 1, 4)
    ]
    texts = {tuple(row[kept]) for batch in map(batches, range(4)) for row, kept in zip(*batch[:2], strict=True)}
    held_out = train_t5.encoded(split.held_out)
    assert not texts & {tuple(row[kept]) for row, kept in zip(*held_out[:2], strict=True)}


@pytest.mark.slow
def test_the_embedded_model_translates_names_that_it_has_not_seen():
    """A sample of all lengths; the experiment measures the rest."""
    rows = train_t5.exact_by_length(models.load("tiny-t5"), number_names.split().held_out[::10])
    names, exact = (sum(row[field] for row in rows) for field in ("names", "exact"))
    assert names > 100 and exact >= 0.99 * names


def test_the_results_say_what_they_must():
    entry = json.loads((ledger.RESULTS / "train_t5.json").read_text(encoding="utf-8"))
    numbers = {each["name"]: each for each in entry["numbers"]}
    assert numbers["held-out names, exact"]["interval"][0] >= 0.99
    assert numbers["size of the folder"]["interval"][1] <= 6
