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
        ValueError: if one is not a number, is outside its range or NaN, or if the shapes do not broadcast.
    """
    reference = _within("reference", reference, 0, 1)
    share = _within("share", share, 0, 1, open_=True)
    beta = _within("beta", beta, 0, np.inf, open_=True)
    _check_shapes(reference=reference, share=share, beta=beta)
    with np.errstate(over="ignore", invalid="ignore"):  # a tiny β: an infinite gain, or ∞ − ∞ where none counts
        log_odds = _logit(reference) + _logit(share) / beta
        agreement = np.exp(-np.logaddexp(0, -log_odds))
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
        ValueError: if `reference` is not a number in [0, 1], n is not an integer of at least 1, or the shapes do not
            broadcast.
    """
    reference, count = _within("reference", reference, 0, 1), _numbers("n", n)
    if not np.issubdtype(count.dtype, np.integer) or (count < 1).any():
        raise ValueError(f"n must be integers of at least 1, but is {n}.")
    _check_shapes(reference=reference, n=count)
    with np.errstate(divide="ignore"):
        return -np.expm1(count * np.log1p(-reference))


def _logit(probability: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(probability) - np.log1p(-probability)


def _within(name: str, value: object, low: float, high: float, *, open_: bool = False) -> np.ndarray:
    array = _numbers(name, value).astype(np.float64)
    inside = (array > low) & (array < high) if open_ else (array >= low) & (array <= high)
    if not inside.all():
        interval = f"({low:g}, {high:g})" if open_ else f"[{low:g}, {high:g}]"
        raise ValueError(f"{name} must lie in {interval}, but is {value}.")
    return array


def _numbers(name: str, value: object) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):  # a tracer, or rows of several lengths
        array = np.asarray(None)
    if array.dtype.kind in "OSUMmc":
        raise ValueError(f"{name} must be a number or an array of numbers, but is {value!r}.")
    return array


def _check_shapes(**arrays: np.ndarray) -> None:
    try:
        np.broadcast_shapes(*(array.shape for array in arrays.values()))
    except ValueError:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise ValueError(f"the shapes must broadcast, but are {shapes}.") from None
