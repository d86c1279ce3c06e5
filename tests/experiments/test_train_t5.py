"""tiny-t5: the names it was trained on, those it translates, and where a training writes its model."""

import dataclasses
import importlib
import json

import jax
import numpy as np
import pytest

from experiments import embedded, ledger, train_t5
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


def test_a_wrong_name_costs_more_than_the_right_one():
    """The surprise is that of the whole gold name, by its length."""
    loaded = models.load("tiny-t5")
    numbers = np.asarray([7, 21, 81, 321_987])
    rows = train_t5.nats_by_length(loaded, numbers)
    assert [row["words"] for row in rows] == [1, 2, 9]
    assert all(0 < row["median"] <= row["largest"] < 0.1 for row in rows)
    swapped = models.Loaded(loaded.model, jax.tree.map(np.zeros_like, loaded.params), loaded.tokenizer, loaded.config)
    uniform = train_t5.nats_by_length(swapped, numbers)[0]
    assert uniform["median"] == pytest.approx(2 * np.log(loaded.model.vocab_size), rel=1e-5), "the name and its end"


@pytest.mark.parametrize("name", ["train_t5", "pretrain_gpt2"])
def test_a_training_replaces_the_model_of_the_package_only_when_told_to(name):
    config, model = importlib.import_module(f"experiments.{name}").Config(), name.split("_")[1]
    assert not config.train and embedded.folder(config, model) == embedded.EMBEDDED / model
    trained = dataclasses.replace(config, train=True)
    assert embedded.folder(trained, model) == config.work_dir / model
    replaced = dataclasses.replace(trained, replace_embedded=True)
    assert embedded.folder(replaced, model) == embedded.EMBEDDED / model
    with pytest.raises(ValueError, match="must be given together with --train"):
        embedded.folder(dataclasses.replace(config, replace_embedded=True), model)


@pytest.mark.slow
def test_a_trained_model_and_its_record_are_in_the_work_directory(tmp_path):
    small = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "batch_size": 8}
    short = {"steps": 2, "warmup_steps": 1, "decay_steps": 1, "eval_every": 1}
    config = train_t5.Config(train=True, every=100, work_dir=tmp_path, **small, **short)
    before = {path: path.stat().st_mtime_ns for path in (embedded.EMBEDDED / "tiny-t5").iterdir()}
    result = train_t5.run(config)
    assert {path: path.stat().st_mtime_ns for path in (embedded.EMBEDDED / "tiny-t5").iterdir()} == before
    record = json.loads((tmp_path / "tiny-t5" / "training.json").read_text(encoding="utf-8"))
    assert len(result["data"]["log"]) == len(record["log"]) == 2 and record["config"]["seed"] == 0
    assert "2 steps of 8 pairs" in (tmp_path / "tiny-t5" / "README.md").read_text(encoding="utf-8")
    assert [ledger.holds(each) for each in result["numbers"] if each["kind"] == "test"] == [False]
