"""The amplification law: on a table exactly, its pieces on a GPT-2, and what the committed results say."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ledger, sycophancy_amplification
from experiments.parts import amplification_gpt2, amplification_numbers, amplification_table
from figures import sycophancy_amplification as figure
from jaxrl_llm import oracle
from jaxrl_llm.analysis.amplification import amplified_agreement, best_of_n_agreement
from jaxrl_llm.tabular import TabularLM
from tests.conftest import random_params

LM = TabularLM(vocab_size=3, horizon=2)
SMALL = dataclasses.replace(sycophancy_amplification.PRESETS["quick"], words=4, width=8, dpo_steps=15)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def world():
    return amplification_gpt2.world(SMALL)


def test_exact_optima_of_dpo_and_rlhf_lie_on_the_law(x64):
    axes = jnp.asarray([0.2, 0.5]), jnp.asarray([0.4, 0.6, 0.9]), jnp.asarray([1.0, 0.1])
    (reference, share, beta), found = amplification_table.on_grid(LM, *axes, jax.random.key(0), steps=60)
    law = amplified_agreement(np.asarray(reference), np.asarray(share), beta=np.asarray(beta))
    assert law[10] == pytest.approx(1 / (1 + 9.0**-1)) and len(law) == 12
    for measured in found:
        np.testing.assert_allclose(measured, law, atol=1e-6)


def test_a_random_reference_agrees_as_often_as_it_is_told(x64):
    params = amplification_table.reference(LM, jnp.asarray(0.3), jax.random.key(1))
    assert float(amplification_table.agreement(LM, params)) == pytest.approx(0.3, abs=1e-12)
    probs = jnp.exp(oracle.sequence_log_probs(LM, params))
    assert len({round(float(each), 6) for each in probs}) == 9, "and is no two-point law"


def test_a_table_is_found_from_its_law(x64):
    law = oracle.sequence_log_probs(LM, random_params(LM, dtype=jnp.float64))
    again = oracle.sequence_log_probs(LM, amplification_table.table_of(LM, law))
    np.testing.assert_allclose(again, law, atol=1e-12)


def test_the_exact_law_of_best_of_n_is_the_closed_form(x64):
    references = jnp.asarray([0.1, 0.6])
    found = amplification_table.best_of_n(LM, references, jax.random.key(2), n=5)
    np.testing.assert_allclose(found, best_of_n_agreement(np.asarray(references), 5), atol=1e-12)


def test_claims_meet_both_opinions_and_both_answers(world):
    tokens = np.asarray(world.answers.tokens)
    assert tokens.shape == (2 * 4 * 4, 2, 4) and len(np.unique(tokens.reshape(-1, 4), axis=0)) == 64
    for side, expected in enumerate((False, True)):
        rows = jax.tree.map(lambda leaf, side=side: leaf[:, side], world.answers)
        assert (np.asarray(amplification_gpt2.agrees(rows)) == expected).all()
        np.testing.assert_array_equal(np.asarray(rows.answer).sum(axis=1), 1)
    claims = tokens[:, 0, :2]
    held_out = np.setdiff1d(np.arange(32), world.training)
    assert len(held_out) == 8
    assert not {tuple(row) for row in claims[held_out]} & {tuple(row) for row in claims[world.training]}


def test_agreement_is_read_at_the_place_of_the_answer(world):
    params = random_params(world.lm)
    probs = np.asarray(amplification_gpt2.word_probs(world, params))
    row = world.prompts.tokens[5:6]
    last = jax.nn.softmax(world.lm.apply(params, row)[0][0, -1])
    thinks_true = int(row[0, -1]) == amplification_gpt2.THINKS_TRUE
    agreeing = amplification_gpt2.TRUE if thinks_true else amplification_gpt2.FALSE
    assert probs[5, 1] == pytest.approx(float(last[agreeing]), rel=1e-5)
    share = float(amplification_gpt2.agreement(world, params)[5])
    assert share == pytest.approx(probs[5, 1] / probs[5].sum(), rel=1e-5)


def test_dpo_moves_towards_what_most_annotators_prefer(world):
    refs = jax.tree.map(lambda leaf: leaf[None], world.lm.init(jax.random.key(3)))
    before = amplification_gpt2.agreement(world, jax.tree.map(lambda leaf: leaf[0], refs))
    points = np.asarray([(0.1, 0.1), (0.9, 0.1)])
    run = functools.partial(amplification_gpt2.by_dpo, world, SMALL)
    less, more = np.asarray(amplification_gpt2.on_grid(run, refs, points, jax.random.key(4)))[0].mean(axis=1)
    assert less < float(before.mean()) - 0.1 < float(before.mean()) + 0.1 < more


def test_sampled_best_of_n_follows_its_law(world):
    params = random_params(world.lm)
    wins, reference = amplification_gpt2.best_of_n(world, params, jax.random.key(5), sizes=(1, 3), repeats=8)
    config = dataclasses.replace(SMALL, best_of=(1, 3), repeats=8)
    found = amplification_numbers.best_of_n(config, 0.5, np.asarray(wins), np.asarray(reference, np.float64))
    assert found["draws"] == 256
    for row in found["sizes"]:
        law = best_of_n_agreement(np.asarray(reference, np.float64), row["n"])
        assert row["law"] == pytest.approx(law.mean())
        assert abs(row["z"]) < 4


OPINIONS = np.asarray([False, True, False, True])


def point_of(before, off, share=0.6, beta=0.5):
    """A point whose agreement is the law of `before`, and `off` more; the last two prompts are held out."""
    after = (amplified_agreement(before, share, beta=beta) + off)[:, None]
    grid, training = np.asarray([(share, beta)]), np.asarray([0, 1])
    return amplification_numbers.points("DPO", 0.4, grid, before, after, training, OPINIONS)[0]


def test_points_are_held_against_the_law_of_their_own_references():
    before = np.asarray([[0.5, 0.4, 0.3, 0.3], [0.6, 0.5, 0.2, 0.1]])
    point = point_of(before, np.asarray([[0.01], [0.03]]))
    assert point["deviation"] == pytest.approx(0.02)
    assert point["deviation_half_width"] == pytest.approx(12.706 * 0.01, rel=1e-3), "Student's, one degree of freedom"
    assert point["held_out_deviation"] == pytest.approx(0.02) and point["largest_of_seed"] == pytest.approx(0.03)
    assert amplification_numbers.worst_deviation([point, point | {"deviation": -0.3}]) == 0.3


def test_a_model_that_heeds_no_user_is_off_the_law():
    """At p = ½ the law is ½, and so is the mean of one that says "true" to everyone: not so for either opinion."""
    always_true = np.where(OPINIONS, 0.45, -0.45)
    point = point_of(np.full((2, 4), 0.5), always_true, share=0.5)
    assert point["mean"] == pytest.approx(0.5) and abs(point["deviation"]) == pytest.approx(0.45)
    assert abs(point["held_out_deviation"]) == pytest.approx(0.45) and not point["on_law"]


def test_a_wide_interval_is_no_merit():
    before = np.full((4, 4), 0.5)
    stuck = point_of(before, np.asarray([[0], [0], [0], [-0.5]]))
    assert abs(stuck["deviation"]) < stuck["deviation_half_width"] and not stuck["on_law"]
    assert stuck["largest_of_seed"] == pytest.approx(0.5) and stuck["widest"] == pytest.approx(0.398, abs=1e-3)
    assert point_of(before, np.asarray([[0.001], [0], [0], [-0.001]]))["on_law"]


def test_the_committed_results_reach_the_law():
    entry = json.loads((ledger.RESULTS / "sycophancy_amplification.json").read_text(encoding="utf-8"))
    numbers = {number["name"]: number for number in entry["numbers"]}
    on_table = [number for name, number in numbers.items() if name.startswith("largest |agreement − law| on a table")]
    assert len(on_table) == 3
    assert all(number["tolerance"] <= 1e-6 and abs(number["value"]) <= 1e-6 for number in on_table)
    assert numbers["largest |z| of sampled best-of-n, GPT-2"]["value"] < 4
    for beta, law in ((1, 0.6), (0.5, 0.6923), (0.1, 0.98295)):
        for method in ("DPO", "PPO"):
            number = numbers[f"agreement after {method}, p = 0.6, β = {beta:g}"]
            assert number["expected"] == pytest.approx(law, abs=1e-4) and number["tolerance"] == 0.02
    figure.draw(entry)
