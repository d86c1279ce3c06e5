"""Cases of `objectives.rlhf` and `objectives.aggregate`."""

import numpy as np

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


def per_token(rng, n):
    modes = ["token_mean", "sequence_mean", "sequence_sum", "constant"]
    mode = modes[rng.integers(4)]
    settings = {"mode": mode} | ({"normaliser": 3.5} if mode == "constant" else {})
    real = mask(rng, n.batch, n.time, kept=n.kept)
    real[0, 0] |= n.kept > 0  # or the gradient would be 0 and test nothing
    return Case((np.asarray(rng.normal(size=(n.batch, n.time))),), (real,), settings)


CASES = {
    rlhf.regularised_objective: policy_and_rewards,
    rlhf.optimal_value: reference_and_rewards,
    rlhf.ptx_bonus: pretraining_tokens,
    aggregate.aggregate: per_token,
}
