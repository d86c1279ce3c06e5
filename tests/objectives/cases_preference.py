"""Cases of `objectives.preference`."""

from jaxrl_llm.objectives import preference
from tests.objectives.cases import Case, log_probs


def pairs(**settings):
    """Four log-probabilities of each pair."""

    def build(rng, n):
        logps = tuple(4 * log_probs(rng, n.batch) for _ in range(4))
        drawn = {name: setting(rng) if callable(setting) else setting for name, setting in settings.items()}
        return Case(logps, (), {"beta": n.beta, **drawn})

    return build


def pairs_of_lengths(rng, n):
    case = pairs(label_smoothing=0.1)(rng, n)
    return Case(case.differentiable, tuple(rng.integers(1, 9, (2, n.batch))), case.settings)


def pairs_with_tails(rng, n):
    case = pairs(label_smoothing=0.1, alpha=lambda rng: rng.uniform(0, 1))(rng, n)
    return Case((*case.differentiable, *(log_probs(rng, n.batch) for _ in range(4))), (), case.settings)


def aligned_pairs(rng, n):
    case = pairs(label_smoothing=0.1)(rng, n)
    return Case(case.differentiable, tuple(rng.normal(0, 1, (2, n.batch))), case.settings)


def without_reference(**settings):
    return lambda rng, n: Case((log_probs(rng, n.batch), log_probs(rng, n.batch)), (), {"beta": n.beta, **settings})


def single_answers(rng, n):
    constants = rng.random(n.batch) < 0.5, rng.normal(size=n.batch)
    settings = {"beta": n.beta, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    return Case((4 * log_probs(rng, n.batch), 4 * log_probs(rng, n.batch)), constants, settings)


CASES = {
    preference.dpo_loss: pairs(label_smoothing=0.1, margin=0.4),
    preference.robust_dpo_loss: pairs(label_smoothing=0.2),
    preference.ipo_loss: pairs(),
    preference.hinge_loss: pairs(),
    preference.exo_loss: pairs(),
    preference.nca_loss: pairs(),
    preference.bco_loss: pairs(reward_shift=0.4),
    preference.sppo_loss: pairs(),
    preference.apo_zero_loss: pairs(),
    preference.apo_down_loss: pairs(),
    preference.discopop_loss: pairs(temperature=lambda rng: rng.uniform(0.05, 2.0)),
    preference.f_dpo_loss: {
        **{each: pairs(divergence=each) for each in ("reverse_kl", "forward_kl", "jensen_shannon")},
        "alpha": pairs(divergence="alpha", alpha=lambda rng: rng.uniform(0.0, 1.5)),
    },
    preference.length_normalised_dpo_loss: pairs_of_lengths,
    preference.length_normalised_ipo_loss: pairs(),
    preference.ld_dpo_loss: pairs_with_tails,
    preference.wpo_loss: aligned_pairs,
    preference.aot_loss: pairs(label_smoothing=0.1),
    preference.aot_unpaired_loss: pairs(label_smoothing=0.1),
    preference.simpo_loss: without_reference(gamma=0.7),
    preference.alphapo_loss: {"": without_reference(gamma=0.7, alpha=0.3), "below 0": without_reference(alpha=-0.8)},
    preference.sft_loss: lambda rng, n: Case((log_probs(rng, n.batch), log_probs(rng, n.batch)), (), {}),
    preference.orpo_loss: without_reference(nll_weight=0.8),
    preference.cpo_loss: without_reference(label_smoothing=0.1, nll_weight=0.8),
    preference.kto_loss: single_answers,
}
