"""Cases of `objectives.reward_model`."""

from jaxrl_llm.objectives import reward_model
from tests.objectives.cases import Case, mask


def scores(**settings):
    return lambda rng, n: Case((3 * rng.normal(size=n.batch), 3 * rng.normal(size=n.batch)), (), settings)


def ranked(rng, n):
    shape = (n.batch, n.time)
    ranks = rng.integers(0, 4, shape)  # with ties
    return Case((3 * rng.normal(size=shape),), (ranks, mask(rng, *shape, kept=n.kept)), {"margin": 0.4})


def in_order(rng, n):
    shape = (n.batch, n.time)
    return Case((3 * rng.normal(size=shape),), (mask(rng, *shape, kept=n.kept),))


CASES = {
    reward_model.pairwise_loss: scores(margin=0.5, label_noise=0.1),
    reward_model.centering_loss: scores(),
    reward_model.k_choose_2_loss: ranked,
    reward_model.plackett_luce_loss: in_order,
}
