"""Losses of a reward model: scores of whole answers, in units of log-odds; unbounded, and free up to a shift."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.numerics import check_range, checked, checked_mask, finite_gradient, floating
from jaxrl_llm.objectives._margins import logistic, logistic_slope, of_margin


def pairwise_loss(
    score_chosen: Float[Array, "..."],
    score_rejected: Float[Array, "..."],
    *,
    margin: float | Float[Array, "..."] = 0.0,
    label_noise: float = 0.0,
) -> Float[Array, "..."]:
    """Negative log-likelihood of a preference under the model of Bradley and Terry.

        L = −(1 − ε) log σ(r_w − r_l − m) − ε log σ(−(r_w − r_l − m))          (eq. 1, where ε = m = 0)

    At equal scores and m = 0 it is log 2, with the slope −(½ − ε). A pair whose label holds with probability p has its
    optimum at r_w − r_l = logit p: labels of p = 1 push the scores apart for ever.

    Args:
        score_chosen, score_rejected: r_w and r_l.
        margin: m, by how much the chosen one should lead: a number, or one per pair; a constant.
        label_noise: ε, the share of labels taken to be flipped.

    Raises:
        ValueError: if the shapes differ, a dtype is not floating, or ε lies outside [0, 1].

    Source: Ouyang et al. 2022; the margin: Touvron et al. 2023.
    """
    return logistic(_lead(score_chosen, score_rejected, margin), label_noise)


def pairwise_loss_grad(
    score_chosen: Float[Array, "..."],
    score_rejected: Float[Array, "..."],
    *,
    margin: float | Float[Array, "..."] = 0.0,
    label_noise: float = 0.0,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Closed-form gradient of `pairwise_loss`: (ε − σ(−(r_w − r_l − m))) · (1, −1)."""
    lead = _lead(score_chosen, score_rejected, margin)
    return of_margin(lead, logistic_slope(lead, label_noise))[:2]


def centering_loss(
    score_chosen: Float[Array, "..."], score_rejected: Float[Array, "..."], *, coefficient: float = 0.01
) -> Float[Array, "..."]:
    """Holds the free shift of the scores: a pair's sum near 0. An addition to `pairwise_loss`.

        L = c (r_w + r_l)²

    Args:
        score_chosen, score_rejected: r_w and r_l.
        coefficient: c.

    Raises:
        ValueError: if the shapes differ, a dtype is not floating, or c is negative.

    Source: Eisenstein et al. 2023.
    """
    return coefficient * jnp.square(_sum(score_chosen, score_rejected, coefficient))


def centering_loss_grad(
    score_chosen: Float[Array, "..."], score_rejected: Float[Array, "..."], *, coefficient: float = 0.01
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Closed-form gradient of `centering_loss`: 2c (r_w + r_l) · (1, 1)."""
    total = _sum(score_chosen, score_rejected, coefficient)
    slope = jnp.where(jnp.isfinite(total), 2 * coefficient * total, 0)
    return slope, slope


def k_choose_2_loss(
    scores: Float[Array, "*batch answer"],
    ranks: Int[Array, "*batch answer"],
    mask: Bool[Array, "*batch answer"] | None = None,
) -> Float[Array, "*batch"]:
    """The pairwise loss over all pairs of K ranked answers to one prompt, their mean: one value per prompt.

        L = 1/|P| Σ_{(i, j) ∈ P} −log σ(r_i − r_j),   P the pairs where i ranks before j          (eq. 1)

    P has K(K − 1)/2 pairs if nothing ties; a tie makes none, and where none is left the loss is 0. No answer's
    derivative is larger than (K − 1)/|P|, which is 2/K without ties: all pairs of a prompt weigh as one example.

    Args:
        scores: r, of each answer.
        ranks: 0 for the best; equal ranks are ties.
        mask: which answers count; what it hides may be anything.

    Raises:
        ValueError: if the scores are not floating, the ranks not integers, or a shape does not match.

    Source: Ouyang et al. 2022.
    """
    lead, pairs = _pairs(scores, ranks, mask)
    losses = jnp.where(pairs, jax.nn.softplus(-lead), 0).sum(axis=(-2, -1))
    return losses / jnp.maximum(pairs.sum(axis=(-2, -1)), 1)


def k_choose_2_loss_grad(
    scores: Float[Array, "*batch answer"],
    ranks: Int[Array, "*batch answer"],
    mask: Bool[Array, "*batch answer"] | None = None,
) -> tuple[Float[Array, "*batch answer"]]:
    """Closed-form gradient of `k_choose_2_loss`: 1/|P| (Σ_{i before k} σ(r_k − r_i) − Σ_{j after k} σ(r_j − r_k))."""
    lead, pairs = _pairs(scores, ranks, mask)
    pull = jnp.where(pairs & jnp.isfinite(lead), jax.nn.sigmoid(-lead), 0)  # of each pair
    return ((pull.sum(axis=-2) - pull.sum(axis=-1)) / jnp.maximum(pairs.sum(axis=(-2, -1)), 1)[..., None],)


def plackett_luce_loss(
    scores: Float[Array, "*batch answer"], mask: Bool[Array, "*batch answer"] | None = None
) -> Float[Array, "*batch"]:
    """Negative log-likelihood of a whole ranking, drawn one answer after the other without replacement.

        L = Σ_k [log Σ_{j ≥ k} exp r_j − r_k]

    For two answers it is `pairwise_loss`; at equal scores it is log K!.

    Args:
        scores: r, of the answers in the order of the ranking, the best first.
        mask: which answers there are; holes may stand anywhere, and hold anything.

    Raises:
        ValueError: if the scores are not floating or have no axis, or the mask does not match.

    Source: Plackett 1975; Luce 1959.
    """
    ahead, _ = _ahead(scores, mask)
    return jax.nn.logsumexp(ahead, axis=-1).sum(axis=-1)


def plackett_luce_loss_grad(
    scores: Float[Array, "*batch answer"], mask: Bool[Array, "*batch answer"] | None = None
) -> tuple[Float[Array, "*batch answer"]]:
    """Closed-form gradient of `plackett_luce_loss`: Σ_{k ≤ j} p_kj − 1, p_kj = exp r_j / Σ_{i ≥ k} exp r_i."""
    ahead, pairs = _ahead(scores, mask)
    drawn = jnp.where(pairs & jnp.isfinite(ahead), jax.nn.softmax(ahead, axis=-1), 0)  # j > k in the place of k
    return (drawn.sum(axis=-2) - drawn.sum(axis=-1),)


def _lead(chosen: Array, rejected: Array, margin: float | Array) -> Array:
    """r_w − r_l − m, checked."""
    chosen, rejected = checked(score_chosen=chosen, score_rejected=rejected)
    margin = jnp.asarray(margin, chosen.dtype)
    if margin.shape not in ((), chosen.shape):
        wanted, found = list(chosen.shape), list(margin.shape)
        raise ValueError(f"margin must be a number or have the shape of score_chosen, {wanted}, but has {found}.")
    return finite_gradient(chosen - rejected - jax.lax.stop_gradient(margin))


def _sum(chosen: Array, rejected: Array, coefficient: float) -> Array:
    """r_w + r_l, checked."""
    chosen, rejected = checked(score_chosen=chosen, score_rejected=rejected)
    check_range(0, coefficient=coefficient)
    return finite_gradient(chosen + rejected)


def _pairs(scores: Array, ranks: Array, mask: Array | None) -> tuple[Array, Array]:
    """r_i − r_j at [i, j], 0 where it makes no pair, and which do: those where i ranks before j."""
    scores, ranks = floating("scores", scores, ndim=1), jnp.asarray(ranks)
    if ranks.shape != scores.shape:
        raise ValueError(f"ranks must have the shape of scores, {list(scores.shape)}, but have {list(ranks.shape)}.")
    if not jnp.issubdtype(ranks.dtype, jnp.integer):
        raise ValueError(f"ranks must be integers, but are {ranks.dtype}.")
    mask = checked_mask(mask, scores.shape, of="scores")
    pairs = (ranks[..., :, None] < ranks[..., None, :]) & mask[..., :, None] & mask[..., None, :]
    lead = finite_gradient(scores[..., :, None] - scores[..., None, :])
    return jnp.where(pairs, lead, 0), pairs


def _ahead(scores: Array, mask: Array | None) -> tuple[Array, Array]:
    """r_j − r_k at [k, j] for the answers j ranked after k, 0 for k itself, else `-inf`; and which are ranked after."""
    scores = floating("scores", scores, ndim=1)
    order = jnp.arange(scores.shape[-1])
    lead, after = _pairs(scores, jnp.broadcast_to(order, scores.shape), mask)
    return jnp.where(order[:, None] == order, 0, jnp.where(after, -lead, -jnp.inf)), after
