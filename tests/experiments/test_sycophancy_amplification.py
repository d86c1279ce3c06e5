"""The amplification prediction: on a table exactly, its pieces on a GPT-2, and what the committed results say."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats

from experiments import ledger
from experiments import sycophancy_amplification as experiment
from figures import sycophancy_amplification as figure
from jaxrl_llm import oracle
from jaxrl_llm.analysis.sycophancy import amplified_agreement, best_of_n_agreement
from jaxrl_llm.tabular import TabularLM
from tests.conftest import random_params

LM = TabularLM(vocab_size=3, horizon=2)
TABLE = {name: np.asarray([0.5, 0.6]) for name in ("prediction", "gibbs", "dpo", "rlhf")} | {"best_of_n_error": 0.0}
SMALL = dataclasses.replace(experiment.run.presets["quick"], words=4, width=8, dpo_steps=15)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def world():
    return experiment.world(SMALL)


@pytest.fixture(scope="module")
def table():
    axes = {"table_references": (0.2, 0.5), "table_shares": (0.4, 0.6, 0.9), "table_betas": (1.0, 0.1)}
    config = dataclasses.replace(SMALL, **axes, best_of=(5,))
    compiled = jax.jit(experiment.best_of_n_on_table, static_argnames=("lm", "n"))
    with pytest.MonkeyPatch.context() as patch:  # else each of its operations would be a program
        patch.setattr(experiment, "best_of_n_on_table", compiled)
        return experiment.on_table(config, jax.random.key(0))


@pytest.mark.slow
def test_exact_optima_of_dpo_and_rlhf_lie_on_the_distribution(table):
    assert (table["reference"][10], table["share"][10], table["beta"][10]) == (0.5, 0.9, 1)
    assert table["prediction"][10] == pytest.approx(1 / (1 + 9.0**-1)) and len(table["prediction"]) == 12
    for way in ("gibbs", "dpo", "rlhf"):
        np.testing.assert_allclose(table[way], table["prediction"], atol=1e-6)
    assert table["best_of_n_error"] < 1e-12


@pytest.mark.slow
def test_a_random_reference_agrees_as_often_as_it_is_told(x64):
    params = experiment.random_reference(LM, jnp.asarray(0.3), jax.random.key(1))
    assert float(experiment.table_agreement(LM, params)) == pytest.approx(0.3, abs=1e-12)
    probs = jnp.exp(oracle.sequence_log_probs(LM, params))
    assert len({round(float(each), 6) for each in probs}) == 9, "and is no two-point prediction"


def test_a_table_is_found_from_its_distribution(x64):
    @jax.jit
    def there_and_back(params):
        prediction = oracle.sequence_log_probs(LM, params)
        return oracle.sequence_log_probs(LM, experiment.table_of(LM, prediction)), prediction

    np.testing.assert_allclose(*there_and_back(random_params(LM, dtype=jnp.float64)), atol=1e-12)


def test_claims_meet_both_opinions_and_both_answers(world):
    tokens = np.asarray(world.answers.tokens)
    assert tokens.shape == (2 * 4 * 4, 2, 4) and len(np.unique(tokens.reshape(-1, 4), axis=0)) == 64
    for side, expected in enumerate((False, True)):
        rows = jax.tree.map(lambda leaf, side=side: np.asarray(leaf)[:, side], world.answers)
        assert (np.asarray(experiment.agrees(rows)) == expected).all()
        np.testing.assert_array_equal(rows.completion_mask.sum(axis=1), 1)
    claims = tokens[:, 0, :2]
    held_out = np.setdiff1d(np.arange(32), world.training)
    assert len(held_out) == 8
    assert not {tuple(row) for row in claims[held_out]} & {tuple(row) for row in claims[world.training]}


@pytest.mark.slow
def test_agreement_is_read_at_the_place_of_the_answer(world):
    params = random_params(world.lm)
    probs = np.asarray(experiment.word_probs(world, params))
    row = world.prompts.tokens[5:6]
    last = jax.nn.softmax(world.lm.apply(params, row)[0][0, -1])
    thinks_true = int(row[0, -1]) == experiment.THINKS_TRUE
    agreeing = experiment.TRUE if thinks_true else experiment.FALSE
    assert probs[5, 1] == pytest.approx(float(last[agreeing]), rel=1e-5)
    share = float(experiment.agreement(world, params)[5])
    assert share == pytest.approx(probs[5, 1] / probs[5].sum(), rel=1e-5)


@pytest.mark.slow
def test_dpo_moves_towards_what_most_annotators_prefer(world):
    refs = jax.tree.map(lambda leaf: leaf[None], world.lm.init(jax.random.key(3)))
    before = experiment.agreement(world, jax.tree.map(lambda leaf: leaf[0], refs))
    points = np.asarray([(0.1, 0.1), (0.9, 0.1)])
    run = functools.partial(experiment.by_dpo, world, SMALL)
    less, more = np.asarray(experiment.on_grid(run, refs, points, jax.random.key(4)))[0].mean(axis=1)
    assert less < float(before.mean()) - 0.1 < float(before.mean()) + 0.1 < more


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "rloo"])
def test_policy_gradients_reach_the_distribution(world, name):
    config = dataclasses.replace(SMALL, online_steps=40)
    params = world.lm.init(jax.random.key(3))
    before = np.asarray(experiment.agreement(world, params), np.float64)
    run = jax.jit(lambda ref, key: experiment.by_policy_gradient(name, world, config, ref, 0.6, 0.5, key))
    off = np.asarray(run(params, jax.random.key(4))) - amplified_agreement(before, 0.6, beta=0.5)
    assert abs(off[world.thinks_true].mean()) < 0.05 and abs(off[~world.thinks_true].mean()) < 0.05


@pytest.mark.slow
def test_fine_tuning_reaches_its_aim_for_either_opinion(world):
    config = dataclasses.replace(SMALL, sft_steps=60)
    tuned = jax.jit(lambda key: experiment.agreement(world, experiment.fine_tuned(world, 0.3, key, config)))
    found = np.asarray(tuned(jax.random.key(1)))
    for opinion in (False, True):
        assert found[world.thinks_true == opinion].mean() == pytest.approx(0.3, abs=0.05)


def test_names_have_keys_of_their_own():
    keys = [experiment.key_of(name, jax.random.key(0)) for name in ("ppo", "rloo", "rloo")]
    first, second, again = (np.asarray(jax.random.key_data(key)).tolist() for key in keys)
    assert first != second == again
    with pytest.raises(ValueError, match=r"online methods must be ppo or rloo, but one is 'grpo'"):
        experiment.method_named("grpo")


@pytest.mark.slow
def test_sampled_best_of_n_follows_its_distribution(world):
    params = random_params(world.lm)
    wins, reference = experiment.sampled_best_of_n(world, params, jax.random.key(5), sizes=(1, 3), repeats=8)
    config = dataclasses.replace(SMALL, best_of=(1, 3), repeats=8)
    found = experiment.best_of_n_point(config, 0.5, np.asarray(wins), np.asarray(reference, np.float64))
    assert found["draws"] == 256
    for row in found["sizes"]:
        prediction = best_of_n_agreement(np.asarray(reference, np.float64), row["n"])
        assert row["prediction"] == pytest.approx(prediction.mean())
        assert abs(row["z"]) < 4


def test_z_is_told_only_where_it_is_normal():
    config = dataclasses.replace(SMALL, best_of=(1, 4, 16), repeats=32)
    found = experiment.best_of_n_point(config, 0.5, np.asarray([2048, 3840, 4095]), np.full(128, 0.5))
    assert [row["z"] for row in found["sizes"]] == [0, 0, None], "one in 4096 fails where 0.06 were expected"
    z = experiment.numbers(TABLE, [point_of(np.full((2, 4), 0.5), 0)], [found])[-1]
    assert z["source"] == "4096 times for each n; n = 1, 4: 5 of either kind are expected"


OPINIONS = np.asarray([False, True, False, True])


def point_of(before, off, share=0.6, beta=0.5):
    """A point whose agreement is the prediction of `before`, and `off` more; the last two prompts are held out."""
    after = (amplified_agreement(before, share, beta=beta) + off)[:, None]
    grid, training = np.asarray([(share, beta)]), np.asarray([0, 1])
    return experiment.compared("DPO", 0.4, grid, before, after, training, OPINIONS)[0]


def test_points_are_held_against_the_distribution_of_their_own_references():
    before = np.asarray([[0.5, 0.4, 0.3, 0.3], [0.6, 0.5, 0.2, 0.1]])
    point = point_of(before, np.asarray([[0.01], [0.03]]))
    assert point["deviation"] == pytest.approx(0.02)
    half_width = (point["deviation_high"] - point["deviation_low"]) / 2
    assert half_width == pytest.approx(12.706 * 0.01, rel=1e-3), "Student's, one degree of freedom"
    assert point["held_out_deviation"] == pytest.approx(0.02) and point["largest_of_seed"] == pytest.approx(0.03)
    assert experiment.worst_deviation([point, point | {"deviation": -0.3}]) == 0.3


def test_a_model_that_heeds_no_user_is_off_the_distribution():
    """At p = ½ both the prediction and the mean of "true" to everyone are ½; for either opinion they differ."""
    always_true = np.where(OPINIONS, 0.45, -0.45)
    point = point_of(np.full((2, 4), 0.5), always_true, share=0.5)
    assert point["mean"] == pytest.approx(0.5) and abs(point["deviation"]) == pytest.approx(0.45)
    assert abs(point["held_out_deviation"]) == pytest.approx(0.45) and point["p"] == 1


def test_a_wide_interval_is_no_merit():
    before = np.full((4, 4), 0.5)
    stuck = point_of(before, np.asarray([[0], [0], [0], [-0.5]]))
    assert stuck["deviation_low"] < 0 < stuck["deviation_high"] and stuck["p"] > 0.5
    assert stuck["largest_of_seed"] == pytest.approx(0.5)
    assert point_of(before, np.asarray([[0.001], [0], [0], [-0.001]]))["p"] < 0.001


def test_means_are_shown_to_be_near_by_two_one_sided_tests():
    """With scipy's own one-sided t-tests against either margin."""
    values = np.asarray([0.004, -0.003, 0.011, 0.009])
    above = scipy.stats.ttest_1samp(values, -0.02, alternative="greater").pvalue
    below = scipy.stats.ttest_1samp(values, 0.02, alternative="less").pvalue
    assert experiment.beyond(values) == pytest.approx(max(above, below))
    assert experiment.beyond(np.asarray([0.02, 0.02])) == 1 and experiment.beyond(np.zeros(2)) == 0


def test_the_claim_says_what_was_shown_and_of_how_much():
    full, quick = (experiment.run.presets[preset] for preset in ("full", "quick"))
    on = point_of(np.full((2, 4), 0.5), np.asarray([[0.001], [0]]), share=0.6, beta=0.1)
    off = on | {"p": 0.3, "method": "PPO", "deviation": -0.03}
    told = experiment.claim(TABLE, [on, off], full)
    assert "0.983 from ½ at β = 0.1. Optima on tables lie on this prediction; a GPT-2 (layers: 1, width: 32" in told
    assert told.endswith("by DPO and PPO is shown to be within 0.02 of it at 1 of 2 points, in the mean over 6 seeds.")
    assert "at all 1 points" in experiment.claim(TABLE, [on], full)
    bent = TABLE | {"rlhf": np.asarray([0.5, 0.6 - 0.01])}
    told = experiment.claim(bent, [on], quick)
    assert "tables do not lie on this prediction; in this small run, a GPT-2" in told
    best = experiment.best_of_n_point(SMALL, 0.5, np.asarray([1024, 1536, 1920, 2040, 2048]), np.full(128, 0.5))
    assert ledger.verdict(experiment.numbers(TABLE, [on], [best]))
    assert ledger.verdict(experiment.numbers(TABLE, [on, off], [best])) is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 1}, r"an interval over seeds needs 2 or more, but seeds is 1"),
        ({"betas": (1.0, 0.0)}, r"betas must be finite and above 0, but are \(1.0, 0.0\)"),
        ({"online_betas": (math.nan,)}, r"online_betas must be finite and above 0, but are \(nan,\)"),
        ({"table_betas": ()}, r"table_betas must be finite and above 0, but are \(\)"),
        ({"shares": (0.6, 1.0)}, r"shares must be probabilities in \(0, 1\), but are \(0.6, 1.0\)"),
        ({"references": (0.0,)}, r"references must be probabilities in \(0, 1\), but are \(0.0,\)"),
        ({"online": ("rloo",), "online_batch": 126}, r"online_batch must be groups of 4 for rloo, but is 126"),
        ({"best_of": (0,)}, r"best_of and repeats must be 1 or more, but are \(0,\) and 16"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything(change, message, monkeypatch):
    monkeypatch.setattr(experiment, "on_table", lambda *_: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=message):
        experiment.run(dataclasses.replace(SMALL, **change))


@pytest.mark.slow
def test_a_run_whose_trainers_end_at_the_distribution_holds_and_is_drawn(table, monkeypatch):
    """The trainers are the prediction itself; what happens around them is what a run does."""

    def at_the_distribution(given, config, ref, share, beta, key):
        before = experiment.agreement(given, ref)
        return jax.nn.sigmoid(jax.scipy.special.logit(before) + jax.scipy.special.logit(share) / beta)

    monkeypatch.setattr(experiment, "on_table", lambda config, key: table)
    monkeypatch.setattr(experiment, "fine_tuned", lambda given, aim, key, config: given.lm.init(key))
    monkeypatch.setattr(experiment, "by_dpo", at_the_distribution)
    monkeypatch.setattr(experiment, "by_policy_gradient", lambda name, *lane: at_the_distribution(*lane))
    config = dataclasses.replace(SMALL, online=("ppo", "rloo"), shares=(0.45, 0.6), best_of=(1, 2), betas=(0.05,))
    found = experiment.run(config)
    assert ledger.verdict(found["numbers"])
    assert "trained by DPO, PPO and RLOO is shown to be within 0.02 of it at all 6 points" in found["claim"]
    assert [(point["method"], point["share"], point["beta"]) for point in found["data"]["gpt2"]] == [
        *(("DPO", share, 0.05) for share in (0.45, 0.6)),
        *((method, 0.6, beta) for method in ("PPO", "RLOO") for beta in config.online_betas),
    ]
    assert {curve["share"] for curve in found["data"]["curves"]} == {0.45, *config.table_shares}
    assert found["data"]["curves"][0]["inverse_beta"][-1] == 20, "as far as the smallest β of all"
    for holds, said in ((True, "Alignment amplifies"), (False, "is off it by up to 0.000")):
        drawn = figure.draw(ledger.rounded(found) | {"holds": holds, "config": dataclasses.asdict(config)})
        assert said in drawn.get_suptitle()
        plt.close(drawn)
