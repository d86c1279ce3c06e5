"""Cases of `objectives.rlhf` and `objectives.aggregate`."""

from jaxrl_llm.objectives import aggregate, rlhf
from tests.conftest import log_softmax
from tests.objectives.cases import Case, log_probs, mask


def policy_and_rewards(rng, n):
    both = [log_softmax(rng.normal(size=(n.batch, n.vocab))) for _ in range(2)]
    return Case((*both, rng.normal(size=(n.batch, n.vocab))), settings={"beta": n.beta})


def reference_and_rewards(rng, n):
    case = policy_and_rewards(rng, n)
    return Case(case.differentiable[1:], settings=case.settings)


def pretraining_tokens(rng, n):
    return Case((log_probs(rng, n.batch, n.time),), settings={"gamma": n.beta})


def per_token(mode, **settings):
    def build(rng, n):
        real = mask(rng, n.batch, n.time, kept=n.kept)
        real[0, 0] |= n.kept > 0  # or the gradient would be 0 and test nothing
        return Case((rng.normal(size=(n.batch, n.time)),), (real,), {"mode": mode, **settings})

    return build


CASES = {
    rlhf.regularised_objective: policy_and_rewards,
    rlhf.optimal_value: reference_and_rewards,
    rlhf.ptx_bonus: pretraining_tokens,
    aggregate.aggregate: {
        "token_mean": per_token("token_mean"),
        "sequence_mean": per_token("sequence_mean"),
        "sequence_sum": per_token("sequence_sum"),
        "constant": per_token("constant", normaliser=3.5),
    },
}
