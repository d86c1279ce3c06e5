"""DPO on answers that end: probabilities of words and of EOS, and what becomes of a promise that fails."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments import eos_displacement, ledger, sycophancy_amplification
from figures import eos_displacement as figure
from tests.conftest import random_params

SMALL = dataclasses.replace(eos_displacement.run.presets["quick"], words=4, width=8)


@pytest.mark.slow
def test_words_and_eos_are_read_at_their_places():
    given = sycophancy_amplification.world(SMALL, ends=True)
    params = random_params(given.lm)
    found = np.asarray(eos_displacement.answer_log_probs(given, params))
    assert found.shape == (32, 2, 2)
    for prompt, side in ((0, 0), (5, 1)):
        row = given.answers.tokens[prompt, side]
        distributions = jax.nn.log_softmax(given.lm.apply(params, row[None])[0][0])
        assert int(row[-1]) == sycophancy_amplification.EOS
        np.testing.assert_allclose(found[prompt, side], [distributions[2, row[3]], distributions[3, row[4]]], rtol=1e-4)


def answers(agree, eos, *, seeds=5):
    """Log-probabilities [seed, prompt, answer, token] of words that agree so often and EOS after either."""
    words = np.log([1 - agree, agree])
    jitter = 1e-4 * np.arange(seeds)[:, None, None, None]
    return np.broadcast_to(np.stack([words, np.log(eos)], axis=-1), (seeds, 4, 2, 2)) + jitter * [[[[0, 0], [1, 0]]]]


OPINIONS = np.asarray([False, True, False, True])


def points(word, eos):
    after = answers(0.75, (1.0, 1.0))
    after[0] = answers(word, eos)[0]
    return [{"beta": 1.0} | eos_displacement.summary(answers(0.5, (1.0, 1.0)), after, 0.75, 1.0, OPINIONS)]


def test_a_word_may_be_off_the_distribution_where_the_whole_answer_is_on_it():
    """From ½, three to one is p = ¾: by words that agree with ¾, or by EOS that is 9 times likelier after agreement."""
    on, off = points(0.75, (1.0, 1.0)), points(0.25, (0.1, 0.9))
    numbers = eos_displacement.numbers(off)
    assert ledger.verdict(eos_displacement.numbers(on)) and ledger.verdict(numbers) is False
    assert [ledger.holds(number) for number in numbers[:2]] == [False, True]
    assert numbers[2]["value"] == pytest.approx(0.5, abs=1e-3) and numbers[3]["value"] < 1e-3
    assert [number["value"] for number in numbers[4:]] == pytest.approx([0.2, 0.1], rel=1e-3)
    full = eos_displacement.run.presets["full"]
    assert "by up to 0.50 in the word, by more than 0.1 in 1 of 16 seeds" in eos_displacement.claim(off, full)
    assert "in this small run" in eos_displacement.claim(off, SMALL)
    assert eos_displacement.claim(off, full).endswith("The difference is in the EOS after the word.")
    assert "too short to tell" in eos_displacement.claim(points(0.25, (1.0, 1.0)), full), "no EOS makes up for it"
    drawn = figure.draw({"data": {"points": ledger.rounded(off)}, "config": dataclasses.asdict(full)})
    assert "off the prediction by up to 0.50 for the word, 0.00 for the whole" in drawn.get_suptitle()
    plt.close(drawn)


@pytest.mark.slow
def test_a_run_gives_every_seed_at_every_beta(monkeypatch):
    monkeypatch.setattr(sycophancy_amplification, "fine_tuned", lambda given, aim, key, config: given.lm.init(key))
    monkeypatch.setattr(sycophancy_amplification, "trained_by_dpo", lambda given, config, ref, *lane: ref)
    found = eos_displacement.run(dataclasses.replace(SMALL, betas=(1.0, 0.5, 0.1)))
    assert [point["beta"] for point in found["data"]["points"]] == [1.0, 0.5, 0.1]
    assert np.shape(found["data"]["points"][0]["word_off"]) == (2, SMALL.seeds)
    assert jnp.all(jnp.asarray(found["data"]["points"][2]["word_off"]) < 0), "nobody trained: too little agreement"
    with pytest.raises(ValueError, match=r"share and reference must be in \(0, 1\)"):
        eos_displacement.run(dataclasses.replace(SMALL, share=1.0))


def test_the_guide_counts_the_seeds_of_the_committed_results():
    entry = json.loads((ledger.RESULTS / "eos_displacement.json").read_text(encoding="utf-8"))
    guide = " ".join((ledger.RESULTS.parent / "docs" / "sycophancy.md").read_text(encoding="utf-8").split())
    count = eos_displacement.displaced(entry["data"]["points"])
    assert f"in {count} of {entry['config']['seeds']} seeds the model goes on saying the word" in guide
