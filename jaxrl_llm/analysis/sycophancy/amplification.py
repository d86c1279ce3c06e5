"""Agreement of an aligned model with its user, at the optimum, for annotators who prefer to be agreed with.

Of two answers, one that agrees and one that does not, a share p of the annotators prefers the first. Under
Bradley-Terry that is a difference of rewards, σ(r₁ − r₀) = p, so r₁ − r₀ = logit p: small for any p near ½. The optimum
π ∝ π_ref e^{r/β} of the objective with the penalty β KL(π‖π_ref) multiplies the odds of agreement by e^{(logit p)/β}.
So a slight preference becomes near certainty as β falls towards 0; how small β must be for that depends on π_ref. The
wording of answers that agree does not matter: all of them have one reward, and keep their relative probabilities.

The mechanism, a reward gap by Bradley-Terry that tilts the reference, is that of Shapira, Benadè and Procaccia 2026,
*How RLHF amplifies sycophancy* (arXiv 2602.01002).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.special import expit, logit

from jaxrl_llm.numerics import check_range


def amplified_agreement(
    reference: Float[np.ndarray, "..."] | float,
    share: Float[np.ndarray, "..."] | float,
    *,
    beta: Float[np.ndarray, "..."] | float,
) -> Float[np.ndarray, "..."]:
    """Return the probability that the KL-regularised optimum agrees, in float64.

        π(agree) = σ(logit π_ref(agree) + logit(p)/β)

    From Rafailov et al. 2023, eq. 4, for the two rewards of Bradley-Terry. p = ½ changes nothing. β = 1 is Bayes' rule
    for the prior π_ref and the likelihood ratio p/(1 − p), any other β the rule with the likelihood raised to 1/β
    (Korbak et al. 2022, arXiv 2205.11275). A probability of 0 or 1 in the reference stays 0 or 1.

    Args:
        reference: the probability that the reference agrees, in [0, 1].
        share: p, of the annotators who prefer agreement, in (0, 1): a preference of all has no finite reward.
        beta: the price of one nat in units of reward, above 0 and finite. All three broadcast.

    Raises:
        ValueError: if one is outside its range or NaN, or, by NumPy, not a number, or if the shapes do not broadcast.
    """
    reference, share, beta = map(np.float64, (reference, share, beta))
    check_range(0, 1, reference=reference)
    check_range(0, 1, open_low=True, open_high=True, share=share)
    check_range(0, open_low=True, beta=beta)
    with np.errstate(over="ignore", invalid="ignore"):  # a tiny β: an infinite gain, or ∞ − ∞ where none counts
        agreement = expit(logit(reference) + logit(share) / beta)
    return np.where((reference == 0) | (reference == 1), reference, agreement)[()]


def best_of_n_agreement(reference: Float[np.ndarray, "..."] | float, n: np.ndarray | int) -> Float[np.ndarray, "..."]:
    """Return the probability that the best of n independent answers agrees, if an answer that agrees ranks first.

        1 − (1 − π_ref(agree))ⁿ

    All n must disagree for the best to do so. The strength of the preference does not matter. It is the distribution of
    the best of n in Beirami et al. 2024 (arXiv 2401.01879), for a reward with two values.

    Args:
        reference: the probability that one answer of the reference agrees, in [0, 1].
        n: answers drawn, integers of at least 1. Both broadcast.

    Raises:
        ValueError: if `reference` lies outside [0, 1], n is not an integer of at least 1, or the shapes do not
            broadcast.
    """
    reference, count = np.float64(reference), np.asarray(n)
    check_range(0, 1, reference=reference)
    if not np.issubdtype(count.dtype, np.integer) or (count < 1).any():
        raise ValueError(f"n must be integers of at least 1, but is {n}.")
    with np.errstate(divide="ignore"):
        return -np.expm1(count * np.log1p(-reference))
