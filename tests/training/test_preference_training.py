"""Preference losses by name: their values at the reference, what they are given, and where they end."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import oracle
from jaxrl_llm.objectives import preference as objectives
from jaxrl_llm.objectives import rlhf
from jaxrl_llm.scoring import Sequences, log_probs
from jaxrl_llm.tabular import TabularLM
from jaxrl_llm.training import steps
from jaxrl_llm.training.preference import NAMES, PairBatch, UnpairedBatch, pair_sums, preference_loss, with_reference
from jaxrl_llm.training.steps import Frozen
from tests.conftest import log_softmax, random_params
from tests.training.test_steps import KEY, PAIRS, POLICY, REFERENCE, answers
from tests.training.test_steps import TABLE as LM

BETA = 0.1
SUMS = jax.jit(functools.partial(pair_sums, LM, needs=("tails", "alignments")))
UNWEIGHTED = PAIRS._replace(weight=None)
AT_REFERENCE = {  # the value of a loss whose log-ratios are all 0
    "dpo": math.log(2),
    "robust_dpo": math.log(2),
    "length_normalised_dpo": math.log(2),
    **dict.fromkeys(("ld_dpo", "aot", "aot_unpaired"), math.log(2)),
    "length_normalised_ipo": (1 / (2 * BETA)) ** 2,
    "hinge": 1.0,
    "ipo": (1 / (2 * BETA)) ** 2,
    "kto": 0.5,
    "apo_zero": 1.0,
    "bco": 2 * math.log(2),
}
AOT = ("aot", "aot_unpaired")  # of which a value is not that of one pair
UNPAIRED = UnpairedBatch(answers(seed=0), np.arange(8) % 2 == 0, answers(seed=3))


def batch_of(name):
    return UNPAIRED if name == "kto" else UNWEIGHTED


def first_step(name, params, batch, frozen, **settings):
    optimizer = optax.sgd(0.01)
    step = steps.make_step(preference_loss(LM, name, **settings), optimizer)
    return step(steps.initial_state(params, optimizer, KEY), batch, frozen)


@pytest.mark.parametrize("name", AT_REFERENCE)
def test_the_first_step_at_the_reference_has_the_known_loss(name):
    batch = with_reference(LM, REFERENCE, batch_of(name))
    _, metrics = first_step(name, REFERENCE, batch, None, beta=BETA)
    assert float(metrics["loss"]) == pytest.approx(AT_REFERENCE[name], rel=1e-5)
    assert float(metrics["margin"]) == pytest.approx(0, abs=1e-5) and float(metrics["grad_norm"]) > 0


@pytest.mark.parametrize(
    ("name", "batch"), [*zip(objectives.PAIR_LOSSES, itertools.cycle([UNWEIGHTED, PAIRS]), strict=False)]
)
def test_a_loss_is_its_objective_of_sums_or_averages(name, batch):
    """The mean over the pairs, with their weights if they have any."""
    policy, ref = SUMS(POLICY, UNWEIGHTED), SUMS(REFERENCE, UNWEIGHTED)
    loss, settings = objectives.PAIR_LOSSES[name], {}
    batch = UNWEIGHTED if "batch" in loss.needs else batch
    of = [policy, ref] if "reference" in loss.needs else [policy]
    lengths = policy.length_chosen, policy.length_rejected
    sums = [(each.chosen, each.rejected) for each in of]
    if "means" in loss.needs:
        sums = [(chosen / lengths[0], rejected / lengths[1]) for chosen, rejected in sums]
    if "tails" in loss.needs:
        sums += [(each.tail_chosen, each.tail_rejected) for each in of]
    sums += [lengths] * ("lengths" in loss.needs)
    sums += [(policy.alignment_chosen, policy.alignment_rejected)] * ("alignments" in loss.needs)
    if name == "bco":  # without a state, the mean reward of the batch
        rewards = BETA * (policy.chosen - ref.chosen + policy.rejected - ref.rejected) / 2
        settings = {"reward_shift": float(np.average(rewards, weights=batch.weight))}

    @jax.jit
    def both(params, reference, sums):
        found = preference_loss(LM, name)(params, batch, Frozen(ref=reference), KEY).value
        return found, loss(*(each for pair in sums for each in pair), **settings)

    found, expected = both(POLICY, REFERENCE, sums)
    assert float(found) == pytest.approx(float(np.average(expected, weights=batch.weight)), rel=1e-4)


def test_tails_and_alignments_token_by_token():
    """From the table of logits itself: the k-th token of a completion is in the tail if the other one has no k-th."""
    found = SUMS(POLICY, UNWEIGHTED)
    sides = {"chosen": (UNWEIGHTED.chosen, UNWEIGHTED.rejected), "rejected": (UNWEIGHTED.rejected, UNWEIGHTED.chosen)}
    for side, (rows, others) in sides.items():
        logits, _ = jax.jit(LM.apply)(
            POLICY, np.pad(rows.tokens[:, :-1], ((0, 0), (1, 0))), mask=np.pad(rows.mask[:, :-1], ((0, 0), (1, 0)))
        )
        log_p = log_softmax(logits)
        for row in range(8):
            places = np.flatnonzero(rows.completion_mask[row])
            per_token = log_p[row, places, rows.tokens[row, places]]
            shared = min(len(places), others.completion_mask[row].sum())
            assert getattr(found, f"tail_{side}")[row] == pytest.approx(per_token[shared:].sum(), abs=1e-4)
            collisions = np.log((np.exp(log_p[row, places]) ** 2).sum(axis=-1))
            expected = (per_token - collisions).mean()
            assert getattr(found, f"alignment_{side}")[row] == pytest.approx(expected, abs=1e-4)


ALWAYS = ("dpo", "simpo", "orpo", "ld_dpo", "wpo")


@pytest.mark.parametrize(
    "name",
    [
        *ALWAYS,
        *(pytest.param(name, marks=pytest.mark.slow) for name in objectives.PAIR_LOSSES if name not in (*ALWAYS, *AOT)),
    ],
)
def test_a_pair_of_weight_0_without_a_completion_changes_nothing(name):
    """Such rows fill a batch: neither the loss nor its gradient may be NaN."""
    weight = np.ones(8, np.float32)
    weight[5] = 0
    empty = [each._replace(completion_mask=each.completion_mask.copy()) for each in (PAIRS.chosen, PAIRS.rejected)]
    for each in empty:
        each.completion_mask[5] = False
    batches = [
        UNWEIGHTED._replace(chosen=chosen, rejected=rejected, weight=weight)
        for chosen, rejected in ((UNWEIGHTED.chosen, UNWEIGHTED.rejected), empty)
    ]
    loss = preference_loss(LM, name)
    value = jax.jit(
        jax.value_and_grad(lambda params, batch: loss(params, batch, Frozen(ref=REFERENCE), KEY)[::2], has_aux=True)
    )
    (expected, filled) = (value(POLICY, batch) for batch in batches)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(filled))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), filled, expected)


def test_every_pair_loss_of_the_objectives_has_its_name():
    public = {name.removesuffix("_loss") for name in vars(objectives) if name.endswith("_loss") and name != "pair_loss"}
    assert public == set(NAMES)


def test_a_sum_of_losses_is_the_weighted_sum_and_each_takes_the_hyperparameters_that_it_has():
    """MPO, and a loss of one's own in it."""

    @jax.jit
    def values(params, reference):
        def value(loss, **settings):
            return preference_loss(LM, loss, **settings)(params, PAIRS, Frozen(ref=reference), KEY).value

        return (
            value(["dpo", "bco", "sft"], weights=[0.8, 0.2, 1.0], beta=0.3, label_smoothing=0.1),
            0.8 * value("dpo", beta=0.3, label_smoothing=0.1) + 0.2 * value("bco", beta=0.3) + value("sft"),
            value(("dpo", own_loss), beta=0.3, margin=0.5),  # the margin of both
            value("dpo", beta=0.3, margin=0.5) + value(own_loss, beta=0.3, margin=0.5),
        )

    found = values(POLICY, REFERENCE)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
    np.testing.assert_allclose(found[2], found[3], rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        (["dpo", "kto"], {}, "kto, which has no pairs, cannot be a term of a sum"),
        (["dpo", "sft"], {"weights": [1.0]}, "one weight for each of 2 losses, but there are 1"),
        (
            ["dpo", "sft"],
            {"gamma": 1.0},
            r"the loss dpo\+sft has no gamma: their hyperparameters are beta, label_smoothing",
        ),
        ([], {}, "at least one loss"),
        ("sft", {"beta": 0.1}, "the loss sft has no beta: it takes none"),
    ],
)
def test_sums_of_losses_that_do_not_fit_are_refused(loss, settings, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(LM, loss, **settings)


def test_a_margin_of_each_pair_is_an_offset_of_dpo_alone():
    batch = UNWEIGHTED._replace(fields=MARGINS)
    policy, ref = SUMS(POLICY, UNWEIGHTED), SUMS(REFERENCE, UNWEIGHTED)
    sums = policy.chosen, policy.rejected, ref.chosen, ref.rejected

    @jax.jit
    def values(params, reference):
        return [
            preference_loss(LM, name)(params, each, Frozen(ref=reference), KEY).value
            for name, each in (("dpo", batch), ("ipo", batch), ("ipo", UNWEIGHTED))
        ]

    of_dpo, of_ipo, without = values(POLICY, REFERENCE)
    expected = objectives.dpo_loss(*sums, margin=MARGINS["margin"]).mean()
    assert float(of_dpo) == pytest.approx(float(expected), rel=1e-5) and float(of_ipo) == float(without)


def test_the_divergence_of_f_dpo_reaches_the_loss():
    policy, ref = SUMS(POLICY, UNWEIGHTED), SUMS(REFERENCE, UNWEIGHTED)
    sums = policy.chosen, policy.rejected, ref.chosen, ref.rejected
    settings = [{"divergence": "jensen_shannon"}, {"divergence": "alpha", "alpha": 0.3}]

    @jax.jit
    def values(params, reference):
        frozen = Frozen(ref=reference)
        return [preference_loss(LM, "f_dpo", **each)(params, UNWEIGHTED, frozen, KEY).value for each in settings]

    found = values(POLICY, REFERENCE)
    np.testing.assert_allclose(found, [objectives.f_dpo_loss(*sums, **each).mean() for each in settings], rtol=1e-4)
    assert len({round(float(each), 3) for each in (*found, objectives.dpo_loss(*sums).mean())}) == 3


def test_losses_of_sorted_pairs_refuse_parts_of_a_batch_and_weights():
    step = steps.make_step(preference_loss(LM, "aot"), optax.sgd(0.1), microbatches=2)
    with pytest.raises(ValueError, match="microbatches must be 1"):
        step(steps.initial_state(POLICY, optax.sgd(0.1), KEY), UNWEIGHTED, Frozen(ref=REFERENCE))
    with pytest.raises(
        ValueError, match="the loss aot, which sorts the pairs of a batch, must not be given their weights"
    ):
        jax.eval_shape(preference_loss(LM, "aot"), POLICY, PAIRS, Frozen(ref=REFERENCE), KEY)


@pytest.mark.parametrize(
    ("loss", "weights"), [("bco", ()), pytest.param(["dpo", "bco"], (0.5, 2.0), marks=pytest.mark.slow)]
)
def test_the_shift_of_bco_is_the_mean_reward_of_the_steps_before_and_does_not_see_microbatches(loss, weights):
    optimizer, beta = optax.sgd(0.05), 0.5
    mean_loss = preference_loss(LM, loss, weights=weights, beta=beta)
    found = {}
    for parts in (1, 2):
        step = steps.make_step(mean_loss, optimizer, microbatches=parts)
        state, kept = steps.initial_state(POLICY, optimizer, KEY, loss=mean_loss), []
        for _ in range(3):
            policy, ref = SUMS(state.params, UNWEIGHTED), SUMS(REFERENCE, UNWEIGHTED)
            rewards = beta * (policy.chosen - ref.chosen + policy.rejected - ref.rejected) / 2
            state, metrics = step(state, PAIRS, Frozen(ref=REFERENCE))
            kept.append((float(np.average(rewards, weights=PAIRS.weight)), metrics))
        found[parts] = kept
    for before, (_, metrics) in enumerate(found[1]):
        expected = np.mean([mean for mean, _ in found[1][:before]]) if before else 0.0
        assert float(metrics["reward_shift"]) == pytest.approx(expected, abs=1e-5)
    assert abs(expected) > 0.1, "a shift of 0 tests nothing"
    terms = {"dpo": objectives.dpo_loss, "bco": functools.partial(objectives.bco_loss, reward_shift=expected)}
    sums = policy.chosen, policy.rejected, ref.chosen, ref.rejected
    losses = [loss] if isinstance(loss, str) else loss
    value = sum(
        weight * np.average(terms[name](*sums, beta=beta), weights=PAIRS.weight)
        for name, weight in zip(losses, weights or [1.0], strict=True)
    )
    assert float(metrics["loss"]) == pytest.approx(value, rel=1e-5)
    for (_, whole), (_, split) in zip(found[1], found[2], strict=True):
        for name in ("loss", "reward_shift", "grad_norm"):
            assert float(split[name]) == pytest.approx(float(whole[name]), rel=1e-4)


MARGINS = {"margin": jnp.arange(8.0), "unused": jnp.ones(8)}


def own_loss(a, b, *, beta=0.1, margin):
    return jax.nn.relu(margin - beta * (a - b))


def everything(a, b, beta=0.1, **fields):
    return beta * (a - b) + sum(fields.values())


def test_a_function_of_the_log_ratios_is_a_loss_and_takes_the_fields_that_it_names():
    policy, ref = SUMS(POLICY, UNWEIGHTED), SUMS(REFERENCE, UNWEIGHTED)
    difference = BETA * ((policy.chosen - ref.chosen) - (policy.rejected - ref.rejected))
    batch = UNWEIGHTED._replace(fields=MARGINS)

    @jax.jit
    def values(params, reference):
        def value(loss, batch=batch, **hyperparameters):
            return preference_loss(LM, loss, **hyperparameters)(params, batch, Frozen(ref=reference), KEY).value

        own = [own_loss, objectives.pair_loss(own_loss)]
        return {
            "of fields": [value(loss) for loss in own],
            "of arguments": [value(loss, UNWEIGHTED, margin=2.0) for loss in own],
            "of all fields": value(everything),
            "dpo": [
                value("dpo", batch._replace(fields={"beta": jnp.ones(8)})),
                value(objectives.dpo_loss, UNWEIGHTED),
                value("dpo", UNWEIGHTED),
            ],
        }

    found = values(POLICY, REFERENCE)
    expected = jax.nn.relu(MARGINS["margin"] - difference).mean()
    np.testing.assert_allclose(found["of fields"], expected, rtol=1e-4)
    np.testing.assert_allclose(found["of arguments"], jax.nn.relu(2 - difference).mean(), rtol=1e-4)
    np.testing.assert_allclose(found["of all fields"], difference.mean() + 4.5, rtol=1e-4)
    assert len({float(each) for each in found["dpo"]}) == 1
    split = steps.make_step(preference_loss(LM, own_loss), optax.sgd(0.01), microbatches=2)
    _, metrics = split(steps.initial_state(POLICY, optax.sgd(0.01), KEY), batch, Frozen(ref=REFERENCE))
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "hyperparameters", "message"),
    [
        (own_loss, {}, r"the loss own must be given margin, .* but the batch has no fields\."),
        (lambda a, b, *, unused: a, {"unused": 1.0}, r"unused must be given once, .* a field of the batch\."),
        (
            lambda a, b: (a - b).mean(),
            {},
            r"the loss <lambda> must return one value per pair, \[8\], but returned \[\]",
        ),
        (own_loss, {"alpha": 1.0}, r"the loss own has no alpha: its hyperparameters are beta, margin\."),
        (lambda a: a, {}, "a preference loss must take a, b, but <lambda> takes a\\."),
        (lambda a, b: None, {}, r"the loss <lambda> must return one value per pair, \[8\], but returned NoneType"),
        ("my_own.py", {}, r"the loss must be one of .* but is 'my_own.py': your own is .file.py:function."),
    ],
)
def test_a_loss_of_ones_own_that_does_not_fit_is_refused(loss, hyperparameters, message):
    batch = UNWEIGHTED if loss is own_loss else UNWEIGHTED._replace(fields=MARGINS)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(preference_loss(LM, loss, **hyperparameters), POLICY, batch, Frozen(ref=REFERENCE), KEY)


def test_hyperparameters_of_a_loss_can_be_set_by_partial():
    def value(loss, **hyperparameters):
        return jax.jit(preference_loss(LM, loss, **hyperparameters))(POLICY, UNWEIGHTED, Frozen(ref=REFERENCE), KEY)

    def plain(a, b, *, beta, margin=0.0):
        return objectives.hinge_loss(a, b, 0 * a, 0 * b, beta=beta) + margin

    for declared in (plain, objectives.pair_loss(plain)):
        half = functools.partial(declared, beta=0.5)
        assert value(half).value == value(declared, beta=0.5).value != value(half, beta=0.2).value
        assert value(half, margin=1.0).value == value(declared, beta=0.5, margin=1.0).value
    with pytest.raises(ValueError, match="the loss plain has no delta: its hyperparameters are beta, margin"):
        value(half, delta=1.0)
    with pytest.raises(ValueError, match=r"must take a, b, but functools.partial\(<function .*\) takes a\."):
        value(functools.partial(lambda a: a))
    with pytest.raises(TypeError, match="too many positional arguments"):
        value(functools.partial(declared, 0.5, beta=0.5))


def test_kto_takes_its_reference_point_from_mismatched_answers():
    def sums(params, rows):
        return SUMS(params, PairBatch(rows, rows)).chosen

    point = objectives.kto_reference_point(sums(POLICY, UNPAIRED.mismatched), sums(REFERENCE, UNPAIRED.mismatched))
    expected = objectives.kto_loss(
        sums(POLICY, UNPAIRED.completions), sums(REFERENCE, UNPAIRED.completions), UNPAIRED.desirable, point
    )
    found = jax.jit(preference_loss(LM, "kto"))(POLICY, UNPAIRED, Frozen(ref=REFERENCE), KEY)
    assert float(found.value) == pytest.approx(float(expected.mean()), rel=1e-4)


@pytest.mark.slow
def test_what_kto_reports_of_each_side_is_a_mean_over_that_side():
    """Weighted as the loss is; of a side without completions there is nothing, which no mean counts."""
    loss = jax.jit(preference_loss(LM, "kto"))
    weight = np.asarray([1, 2, 0, 1, 3, 1, 1, 0.5], np.float32)
    logp = np.asarray(jax.jit(functools.partial(log_probs, LM))(POLICY, UNPAIRED.completions).sum(axis=1))
    ref = np.asarray(jax.jit(functools.partial(log_probs, LM))(REFERENCE, UNPAIRED.completions).sum(axis=1))
    found = loss(POLICY, UNPAIRED._replace(weight=weight), Frozen(ref=REFERENCE), KEY)
    sides = {"chosen": UNPAIRED.desirable, "rejected": ~UNPAIRED.desirable}
    for side, there in sides.items():
        share = weight * there / (weight * there).sum()
        assert float(found.metrics[f"{side}_logp"]) == pytest.approx((share * logp).sum(), rel=1e-5)
        assert float(found.metrics[f"kl_{side}"]) == pytest.approx((share * (logp - ref)).sum(), rel=1e-4)
        assert float(found.totals()[f"{side}_logp"][1]) == (weight * there).sum()
    assert float(found.metrics["margin"]) == pytest.approx(
        float(found.metrics["kl_chosen"] - found.metrics["kl_rejected"])
    )
    absent = preference_loss(LM, "kto").absent
    assert absent(UNPAIRED) == set()
    good = UNPAIRED._replace(desirable=np.ones(8, bool))
    assert absent(good) == {"rejected_logp", "kl_rejected", "margin"}
    assert absent(good._replace(desirable=np.zeros(8, bool))) == {"chosen_logp", "kl_chosen", "margin"}
    weights = {name: float(total[1]) for name, total in loss(POLICY, good, Frozen(ref=REFERENCE), KEY).totals().items()}
    assert {name for name, each in weights.items() if not each} == absent(good)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_the_reference_in_the_step_or_once_ahead(name):
    batch = batch_of(name)
    inside, _ = first_step(name, POLICY, batch, Frozen(ref=REFERENCE))
    ahead, _ = first_step(name, POLICY, with_reference(LM, REFERENCE, batch), None)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), ahead.params, inside.params)
    with pytest.raises(ValueError, match="the reference is needed"):
        first_step(name, POLICY, batch, None)


@pytest.mark.parametrize(
    "name", ["dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ipo", "simpo", "kto"))]
)
def test_no_step_changes_the_reference(name):
    before = jax.tree.map(np.asarray, REFERENCE)
    optimizer = optax.adam(0.01)
    step = steps.make_step(preference_loss(LM, name), optimizer)
    state = steps.initial_state(REFERENCE, optimizer, KEY)
    for _ in range(3):
        state, _ = step(state, batch_of(name), Frozen(ref=REFERENCE))
    jax.tree.map(np.testing.assert_array_equal, REFERENCE, before)
    assert any((new != old).any() for new, old in zip(*map(jax.tree.leaves, (state.params, REFERENCE)), strict=True))


@pytest.mark.slow
def test_on_the_populations_preferences_dpo_ends_at_the_optimum_of_rlhf():
    """And the metrics say what happens: the margin grows from 0."""
    lm, beta = TabularLM(3, 2), 0.5
    ref = random_params(lm)
    every = oracle.enumerate_sequences(lm)
    rewards = jax.random.normal(KEY, (len(every),))
    log_probs = oracle.sequence_log_probs(lm, ref)
    distribution = oracle.population_preferences(log_probs, rewards)
    first, second = (each.ravel() for each in jnp.indices(distribution.shape))
    whole = jnp.ones((len(first), 2), bool)
    batch = PairBatch(*(Sequences(every[at], whole, whole) for at in (first, second)), weight=distribution.ravel())
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 300))
    loss = preference_loss(lm, "dpo", beta=beta)
    run = steps.whole_run(
        lambda key: steps.initial_state(ref, optimizer, key),
        lambda state: steps.update(loss, optimizer, state, batch, Frozen(ref=ref)),
        steps=300,
    )
    state, metrics = jax.jit(run)(KEY)
    found, best = oracle.sequence_log_probs(lm, state.params), rlhf.gibbs_optimum(log_probs, rewards, beta=beta)
    assert float((jnp.exp(found) * (found - best)).sum()) < 1e-4
    assert float(metrics["loss"][0]) == pytest.approx(math.log(2), abs=1e-6)
    assert float(metrics["margin"][0]) == pytest.approx(0, abs=1e-6) and float(metrics["margin"][-1]) > 0.1


@pytest.mark.parametrize(
    ("name", "batch", "hyperparameters", "message"),
    [
        ("ppo", UNWEIGHTED, {}, r"the loss must be one of dpo, .*kto, but is 'ppo'"),
        ("ipo", UNWEIGHTED, {"label_smoothing": 0.1}, r"the loss ipo has no label_smoothing: .* are beta\."),
        (
            "kto",
            UNPAIRED,
            {"gamma": 0.1},
            r"the loss kto has no gamma: .* are beta, desirable_weight, undesirable_weight\.",
        ),
        ("dpo", UNPAIRED, {}, "must be a PairBatch, but is UnpairedBatch"),
        ("kto", UNWEIGHTED, {}, "must be an UnpairedBatch, but is PairBatch"),
    ],
)
def test_wrong_names_hyperparameters_and_batches_are_refused(name, batch, hyperparameters, message):
    with pytest.raises(ValueError, match=message):
        first_step(name, POLICY, batch, Frozen(ref=REFERENCE), **hyperparameters)
