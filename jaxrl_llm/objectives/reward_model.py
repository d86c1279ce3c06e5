"""Losses of a reward model: scores of whole completions, in units of log-odds; unbounded, and defined up to a shift."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.numerics import finite_gradient, times
from jaxrl_llm.objectives.objective import objective


@objective(constants=("margin",), label_noise="[0, 1]")
def pairwise_loss(
    score_chosen: Float[Array, "*batch"],
    score_rejected: Float[Array, "*batch"],
    *,
    margin: float | Float[Array, "*batch"] = 0.0,
    label_noise: float = 0.0,
) -> Float[Array, "*batch"]:
    """Negative log-likelihood of a preference under the model of Bradley and Terry.

        L = −(1 − ε) log σ(x) − ε log σ(−x),   x = r_w − r_l − m          (eq. 1, where ε = m = 0)

    At equal scores and m = 0 it is log 2, with the slope −(½ − ε). A pair whose label holds with probability p has its
    optimum at r_w − r_l = logit p: labels of p = 1 push the scores apart without end.

    Args:
        score_chosen, score_rejected: r_w and r_l.
        margin: m, the lead that the chosen one should have: a number, or one per pair; a constant.
        label_noise: ε, the assumed share of flipped labels.

    Source: Ouyang et al. 2022; the margin: Touvron et al. 2023.
    """
    x = finite_gradient(score_chosen - score_rejected - margin)
    return times(1 - label_noise, -jax.nn.log_sigmoid(x)) + times(label_noise, -jax.nn.log_sigmoid(-x))


@pairwise_loss.gradient
def _(score_chosen, score_rejected, *, margin, label_noise):
    """(ε − σ(−x)) · (1, −1)."""
    x = score_chosen - score_rejected - margin
    slope = jnp.where(jnp.isfinite(x), label_noise - jax.nn.sigmoid(-x), 0)
    return slope, -slope


@objective(coefficient="[0, inf)")
def centering_loss(
    score_chosen: Float[Array, "*batch"], score_rejected: Float[Array, "*batch"], *, coefficient: float = 0.01
) -> Float[Array, "*batch"]:
    """A penalty that keeps the sum of a pair's scores near 0, and so fixes their shift; added to `pairwise_loss`.

        L = c (r_w + r_l)²

    Args:
        score_chosen, score_rejected: r_w and r_l.
        coefficient: c.

    Source: Eisenstein et al. 2023.
    """
    return coefficient * jnp.square(finite_gradient(score_chosen + score_rejected))


@centering_loss.gradient
def _(score_chosen, score_rejected, *, coefficient):
    """2c (r_w + r_l) · (1, 1)."""
    total = score_chosen + score_rejected
    slope = jnp.where(jnp.isfinite(total), 2 * coefficient * total, 0)
    return slope, slope


@objective(constants=("margin",))
def k_choose_2_loss(
    scores: Float[Array, "*batch completion"],
    ranks: Int[Array, "*batch completion"],
    mask: Bool[Array, "*batch completion"] | None = None,
    *,
    margin: float | Float[Array, "*batch"] = 0.0,
) -> Float[Array, "*batch"]:
    """The mean pairwise loss over all pairs of K ranked completions of one prompt: one value per prompt.

        L = 1/|P| Σ_{(i, j) ∈ P} −log σ(r_i − r_j − m),   P the pairs where i ranks before j          (eq. 1, if m = 0)

    P has K(K − 1)/2 pairs if nothing ties; a tie makes no pair, and where no pair is left the loss is 0. No derivative
    is larger than (K − 1)/|P|, which is 2/K without ties: all pairs of a prompt weigh as one example.

    Args:
        scores: r, of each completion.
        ranks: 0 for the best; equal ranks are ties.
        mask: the completions that count; masked entries may hold anything.
        margin: m, the lead that the better one should have: a number, or one per prompt; a constant.

    Source: Ouyang et al. 2022; the margin: Touvron et al. 2023.
    """
    lead, pairs = _pairs(scores, ranks, mask)
    lead = lead - jnp.asarray(margin)[..., None, None]
    losses = jnp.where(pairs, jax.nn.softplus(-lead), 0).sum(axis=(-2, -1))
    return losses / jnp.maximum(pairs.sum(axis=(-2, -1)), 1)


@k_choose_2_loss.gradient
def _(scores, ranks, mask, *, margin):
    """1/|P| (Σ_{i before k} σ(r_k − r_i + m) − Σ_{j after k} σ(r_j − r_k + m))."""
    lead, pairs = _pairs(scores, ranks, mask)
    lead = lead - jnp.asarray(margin)[..., None, None]
    of_pair = jnp.where(pairs & jnp.isfinite(lead), jax.nn.sigmoid(-lead), 0)
    return (of_pair.sum(axis=-2) - of_pair.sum(axis=-1)) / jnp.maximum(pairs.sum(axis=(-2, -1)), 1)[..., None]


@objective
def plackett_luce_loss(
    scores: Float[Array, "*batch completion"], mask: Bool[Array, "*batch completion"] | None = None
) -> Float[Array, "*batch"]:
    """Negative log-likelihood of a whole ranking, drawn one completion after the other without replacement.

        L = Σ_k [log Σ_{j ≥ k} exp r_j − r_k]

    For two completions it is `pairwise_loss`; at equal scores it is log K!.

    Args:
        scores: r, of the completions in the order of the ranking, the best first.
        mask: the completions that count; masked entries may be anywhere, and hold anything.

    Source: Plackett 1975; Luce 1959.
    """
    ahead, _ = _ahead(scores, mask)
    return jax.nn.logsumexp(ahead, axis=-1).sum(axis=-1)


@plackett_luce_loss.gradient
def _(scores, mask):
    """Σ_{k ≤ j} p_kj − 1, p_kj = exp r_j / Σ_{i ≥ k} exp r_i."""
    ahead, pairs = _ahead(scores, mask)
    drawn = jnp.where(pairs & jnp.isfinite(ahead), jax.nn.softmax(ahead, axis=-1), 0)  # j > k in the place of k
    return drawn.sum(axis=-2) - drawn.sum(axis=-1)


def _pairs(scores: Array, ranks: Array, mask: Array) -> tuple[Array, Array]:
    """r_i − r_j at [i, j], 0 where it makes no pair; and the pairs, true where i ranks before j."""
    pairs = (ranks[..., :, None] < ranks[..., None, :]) & mask[..., :, None] & mask[..., None, :]
    lead = finite_gradient(scores[..., :, None] - scores[..., None, :])
    return jnp.where(pairs, lead, 0), pairs


def _ahead(scores: Array, mask: Array) -> tuple[Array, Array]:
    """r_j − r_k at [k, j] for j ranked after k, 0 for k itself, else `-inf`; and the pairs, true where j is after k."""
    order = jnp.arange(scores.shape[-1])
    lead, after = _pairs(scores, jnp.broadcast_to(order, scores.shape), mask)
    return jnp.where(order[:, None] == order, 0, jnp.where(after, -lead, -jnp.inf)), after
