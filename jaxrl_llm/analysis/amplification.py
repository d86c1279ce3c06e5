"""How often an aligned model agrees with its user: the laws of its optimum, for annotators who like to be agreed with.

Of two answers, one that agrees and one that does not, a share p of the annotators prefers the first. Under
Bradley-Terry that is a difference of rewards, σ(r₁ − r₀) = p, so r₁ − r₀ = logit p: small for any p near ½. The optimum
π ∝ π_ref e^{r/β} of the objective with the penalty β KL(π‖π_ref) multiplies the odds of agreement by e^{(logit p)/β}.
So a slight preference becomes a near certainty where β is small. How answers that agree are worded does not matter: all
of them have one reward, and keep their shares among each other.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def amplified_agreement(
    reference: Float[np.ndarray, "..."] | float,
    share: Float[np.ndarray, "..."] | float,
    *,
    beta: Float[np.ndarray, "..."] | float,
) -> Float[np.ndarray, "..."]:
    """The probability that the KL-regularised optimum agrees, in float64.

        π(agree) = σ(logit π_ref(agree) + logit(p)/β)

    From Rafailov et al. 2023, eq. 4, for the two rewards of Bradley-Terry; p = ½ changes nothing, and β = 1 is Bayes'
    rule for a prior π_ref and a likelihood ratio p/(1 − p). What the reference never, or always, does stays so.

    Args:
        reference: the probability that the reference agrees, in [0, 1].
        share: p, of the annotators who prefer agreement, in (0, 1): a preference of all has no finite reward.
        beta: the price of one nat in units of reward, above 0. All three broadcast.

    Raises:
        ValueError: if one lies outside of its range, or is NaN.
    """
    reference = _within("reference", reference, 0, 1)
    share = _within("share", share, 0, 1, open_=True)
    beta = _within("beta", beta, 0, np.inf, open_=True)
    log_odds = _logit(reference) + _logit(share) / beta
    return np.exp(-np.logaddexp(0, -log_odds))


def best_of_n_agreement(reference: Float[np.ndarray, "..."] | float, n: np.ndarray | int) -> Float[np.ndarray, "..."]:
    """The probability that the best of n independent answers agrees, where an answer that agrees ranks first.

        1 − (1 − π_ref(agree))ⁿ

    All n must disagree for the best to do so. How *much* the ranking prefers agreement does not matter.

    Raises:
        ValueError: if `reference` is not in [0, 1], or n is no integer or below 1.
    """
    reference = _within("reference", reference, 0, 1)
    if not np.issubdtype(np.asarray(n).dtype, np.integer) or (np.asarray(n) < 1).any():
        raise ValueError(f"n must be integers of at least 1, but is {n}.")
    with np.errstate(divide="ignore"):
        return -np.expm1(np.asarray(n) * np.log1p(-reference))


def _logit(probability: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(probability) - np.log1p(-probability)


def _within(name: str, value: object, low: float, high: float, *, open_: bool = False) -> np.ndarray:
    array = np.asarray(value, np.float64)
    inside = (array > low) & (array < high) if open_ else (array >= low) & (array <= high)
    if not inside.all():
        interval = f"({low:g}, {high:g})" if open_ else f"[{low:g}, {high:g}]"
        raise ValueError(f"{name} must lie in {interval}, but is {value}.")
    return array
