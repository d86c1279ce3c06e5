"""Cases of `objectives.policy_gradient`."""

from jaxrl_llm.objectives import policy_gradient
from tests.objectives.cases import Case, log_probs, mask


def scored(rng, n):
    shape = (n.batch, n.time)
    return Case((log_probs(rng, *shape),), (rng.normal(size=shape),))


def against_another(**settings):
    """Ratios on both sides of the clips, advantages of both signs."""

    def build(rng, n):
        shape = (n.batch, n.time)
        logp_policy = log_probs(rng, *shape)
        return Case((logp_policy,), (logp_policy + rng.normal(size=shape), rng.normal(size=shape)), settings)

    return build


def sequences(rng, n):
    shape = (n.batch, n.time)
    logp_policy = log_probs(rng, *shape)
    constants = (logp_policy + 0.2 * rng.normal(size=shape), rng.normal(size=n.batch), mask(rng, *shape, kept=n.kept))
    return Case((logp_policy,), constants, {"clip_low": 0.1, "clip_high": 0.15})


def whole(rng, n):
    case = sequences(rng, n)
    return Case(case.differentiable, (case.constants[0], case.constants[2]))


def critic(rng, n):
    shape = (n.batch, n.time)
    values = rng.normal(size=shape)
    return Case((values,), (values + 0.4 * rng.normal(size=shape), rng.normal(size=shape)))


def distribution(rng, n):
    return Case((2 * rng.normal(size=(n.batch, n.vocab)),))


CASES = {
    policy_gradient.reinforce_loss: scored,
    policy_gradient.ppo_clip_loss: against_another(clip_low=0.3, clip_high=0.6, dual_clip=2.0),
    policy_gradient.gspo_loss: sequences,
    policy_gradient.completion_log_ratio: whole,
    policy_gradient.cispo_loss: against_another(clip_low=0.4, clip_high=0.8),
    policy_gradient.off_policy_reinforce_loss: against_another(cap=1.5),
    policy_gradient.value_loss: critic,
    policy_gradient.entropy_loss: distribution,
}
