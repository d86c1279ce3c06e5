"""Estimators of the KL divergence between a policy π and a reference, and what their gradients estimate.

With d = log π(y) − log ref(y), for one token or, summed, for one sequence:

    k1 = d        k2 = d²/2        k3 = e^{−d} − 1 + d          (Schulman 2020, joschu.net/blog/kl-approx.html)

The first table has the expectations of their values and gradients. y is a whole sequence, drawn from π (on-policy) or
from another distribution μ (off-policy), and ρ = π(y)/μ(y); `sg` stops the gradient. KL alone is KL(π‖ref).

| | k1 | k2 | k3 |
|---|---|---|---|
| value, E_π[k] | KL | E_π[d²]/2: biased | KL |
| as a loss, E_π[∇k] | 0 | ∇KL | ∇KL(ref‖π) |
| as a reward, E_π[k ∇log π] | ∇KL | ∇E_π[k2] − ∇KL | ∇KL − ∇KL(ref‖π) |
| value off-policy, E_μ[k] | KL(μ‖ref) − KL(μ‖π) | E_μ[d²]/2 | KL(μ‖ref) − KL(μ‖π) + E_μ[ref/π] − 1 |
| value with the ratio, E_μ[ρ k] | KL | E_π[d²]/2 | KL |
| off-policy loss, E_μ[∇k] | −∇KL(μ‖π) | E_μ[d ∇log π] | E_μ[(1 − ref/π) ∇log π] |
| with a constant ratio, E_μ[sg(ρ) ∇k] | 0 | ∇KL | ∇KL(ref‖π) |
| through the ratio, E_μ[∇(ρ k)] | ∇KL | ∇E_π[k2] | ∇KL |

So take k1 in the *reward*; as a *loss* take k2 (off-policy with a constant ratio), or k1 or k3 through the ratio.

Variance: close to the reference Var k1 ≈ 2 KL, while Var k2 ≈ Var k3 ≈ ¼ Var d² is of higher order. At any distance
Var k2 ≤ (sup |d|)² Var k1, and Var k3 ≤ Var k1 where ref ≤ 2π. A small KL alone does not suffice: one rare token with a
large |d| makes k2 or k3 vary more than k1.

Token by token, d_t = log π(y_t | y_<t) − log ref(y_t | y_<t). With KL_t and KL_t(ref‖π), the divergences of the two
next-token distributions after y_<t, the sums over the positions of a sampled sequence estimate

| summed over positions | value | as a loss |
|---|---|---|
| k1 | KL | 0 |
| k2 | E_π[Σ_t d_t²]/2: biased | E_π[Σ_t ∇KL_t] |
| k3 | KL | E_π[Σ_t ∇KL_t(ref‖π)] |
| KL_t (`rao_blackwell_kl`) | KL | E_π[Σ_t ∇KL_t] |

None of these gradients is that of a divergence of whole sequences:

    ∇KL = E_π[Σ_t ∇KL_t + Σ_t KL_t ∇log π(y_<t)],    ∇KL(ref‖π) = E_ref[Σ_t ∇KL_t(ref‖π)].

k2 and Rao-Blackwell leave out that early tokens decide which prefixes are reached; k3 has the prefixes of π in place of
those of ref. k1 as a reward has both terms of ∇KL if each token is credited with the k1 of its own position, the first
term, and of all later ones, the second (Tang and Munos 2025, arXiv 2506.09477).
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.numerics import exp_minus_one, log_ratio, log_softmax
from jaxrl_llm.objectives.objective import objective


@objective
def k1(logp_policy: Float[Array, "*batch"], logp_ref: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The unbiased log-ratio estimator of KL(π‖ref) from samples of π, in nats; it may be negative.

        k1 = log π(y) − log ref(y)

    Value, on-policy: unbiased. Gradient as a loss: 0 in expectation, so it restrains nothing. As a reward: that of
    KL(π‖ref). Off-policy: see the table above.

    Args:
        logp_policy, logp_ref: log-probabilities of the same tokens, or sums of them over the same sequences.
    """
    return log_ratio(logp_policy, logp_ref)


@k1.gradient
def _(logp_policy, logp_ref):
    """(1, −1)."""
    one = jnp.isfinite(logp_policy - logp_ref).astype(logp_policy.dtype)
    return one, -one


@objective
def k2(logp_policy: Float[Array, "*batch"], logp_ref: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The squared estimator, in nats²: biased in value, and right as a loss.

        k2 = ½ (log π(y) − log ref(y))²

    Value, on-policy: ½ E[d²] = KL + E[d³]/6 − E[d⁴]/24 + …. Gradient as a loss: E[d ∇log π] = ∇KL(π‖ref). Off-policy:
    see above.

    Args:
        logp_policy, logp_ref: as in `k1`.
    """
    return jnp.square(log_ratio(logp_policy, logp_ref)) / 2


@k2.gradient
def _(logp_policy, logp_ref):
    """(d, −d)."""
    d = logp_policy - logp_ref
    slope = jnp.where(jnp.isfinite(d), d, 0)
    return slope, -slope


@objective
def k3(logp_policy: Float[Array, "*batch"], logp_ref: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The control-variate estimator of KL(π‖ref), in nats: unbiased and never negative.

        k3 = (r − 1) − log r,   r = ref(y)/π(y) = e^{−d}

    Value, on-policy: unbiased where π > 0 wherever ref > 0 (else short by the mass of ref that π never draws); its
    variance is infinite for heavy ratios. Gradient as a loss: that of the *other* divergence, KL(ref‖π), of whole
    sequences for sums of log-probabilities; for tokens see the second table above. Beyond log r = 80 (float64: 700) r
    is held at its value there, so that nothing overflows.

    Args:
        logp_policy, logp_ref: as in `k1`.
    """
    d = log_ratio(logp_policy, logp_ref)
    # Near 0 the two terms cancel to d²/2, and a series keeps what the difference would lose.
    near = jnp.abs(d) < 0.05
    x = jnp.where(near, d, 0)
    series = jnp.square(x) / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5 * (1 - x / 6 * (1 - x / 7 * (1 - x / 8))))))
    return jnp.where(near, series, exp_minus_one(-d) + d)


@k3.gradient
def _(logp_policy, logp_ref):
    """(1 − r, r − 1)."""
    d = logp_policy - logp_ref
    slope = jnp.where(jnp.isfinite(d), -exp_minus_one(-d), 0)
    return slope, -slope


@objective
def exact_kl(
    logits_policy: Float[Array, "*batch vocab"], logits_ref: Float[Array, "*batch vocab"]
) -> Float[Array, "*batch"]:
    """The reverse divergence KL(π‖ref) of two next-token distributions, over the whole vocabulary, in nats.

        KL = Σ_v π_v (log π_v − log ref_v),   π = softmax(logits_policy), ref = softmax(logits_ref)

    Nothing is sampled, so it has no variance; the gradient is that of KL at this position, given the tokens before it.
    A token whose logit is `-inf` under the policy adds nothing; one that only the reference excludes makes the
    divergence infinite. A row of the policy that is all `-inf` gives 0.
    """
    return _divergence(log_softmax(logits_policy), log_softmax(logits_ref))


@exact_kl.gradient
def _(logits_policy, logits_ref):
    """(π_v (d_v − KL), ref_v − π_v), with d = log π − log ref."""
    log_policy, log_ref = log_softmax(logits_policy), log_softmax(logits_ref)
    policy, divergence = jnp.exp(log_policy), _divergence(log_policy, log_ref)[..., None]
    excess = jnp.where(policy > 0, log_policy - log_ref - divergence, 0)
    of_ref = jnp.exp(log_ref) * policy.sum(axis=-1, keepdims=True) - policy
    finite = jnp.isfinite(divergence)
    return jnp.where(finite, policy * excess, 0), jnp.where(finite, of_ref, 0)


@objective
def exact_forward_kl(
    logits_policy: Float[Array, "*batch vocab"], logits_ref: Float[Array, "*batch vocab"]
) -> Float[Array, "*batch"]:
    """The forward divergence KL(ref‖π) of two next-token distributions, in nats: k3 of a token as a loss descends it.

        KL(ref‖π) = Σ_v ref_v (log ref_v − log π_v)

    The arguments are in the order of `exact_kl`, the policy first.
    """
    return _divergence(log_softmax(logits_ref), log_softmax(logits_policy))


@exact_forward_kl.gradient
def _(logits_policy, logits_ref):
    """That of `exact_kl` with the two distributions exchanged."""
    of_ref, of_policy = exact_kl.grad(logits_ref, logits_policy)
    return of_policy, of_ref


@objective(mixture="(0, 1)")
def jensen_shannon(
    logits_policy: Float[Array, "*batch vocab"], logits_ref: Float[Array, "*batch vocab"], *, mixture: float = 0.5
) -> Float[Array, "*batch"]:
    """The generalised Jensen-Shannon divergence of two next-token distributions, in nats; at most H(β).

        JSD = β KL(ref‖m) + (1 − β) KL(π‖m),   m = β ref + (1 − β) π

    Divided by β it passes into KL(ref‖π) as β → 0, and divided by 1 − β into KL(π‖ref) as β → 1. It is finite where one
    of the two excludes a token, too. The arguments are in the order of `exact_kl`, the policy first.

    Args:
        mixture: β, the share of the reference in the mixture.

    Source: Agarwal et al. 2024, eq. 1 (there P is the reference, a teacher).
    """
    log_policy, log_ref = log_softmax(logits_policy), log_softmax(logits_ref)
    log_mixture = _log_mixture(log_policy, log_ref, mixture)
    return mixture * _divergence(log_ref, log_mixture) + (1 - mixture) * _divergence(log_policy, log_mixture)


@jensen_shannon.gradient
def _(logits_policy, logits_ref, *, mixture):
    """((1 − β) π_v (log π_v/m_v − KL(π‖m)), β ref_v (log ref_v/m_v − KL(ref‖m)))."""
    logs = log_softmax(logits_policy), log_softmax(logits_ref)
    log_mixture = _log_mixture(*logs, mixture)

    def slope(log_p: Array) -> Array:
        excess = log_p - log_mixture - _divergence(log_p, log_mixture)[..., None]
        return jnp.exp(log_p) * jnp.where(log_p > -jnp.inf, excess, 0)

    return (1 - mixture) * slope(logs[0]), mixture * slope(logs[1])


def _log_mixture(log_policy: Array, log_ref: Array, mixture: float | Array) -> Array:
    return jnp.logaddexp(jnp.log(mixture) + log_ref, jnp.log1p(-jnp.asarray(mixture)) + log_policy)


@objective
def rao_blackwell_kl(
    logits_policy: Float[Array, "*batch time vocab"],
    logits_ref: Float[Array, "*batch time vocab"],
    mask: Bool[Array, "*batch time"] | None = None,
) -> Float[Array, "*batch"]:
    """Sequence-level KL(π‖ref) from sampled prefixes and exact next-token divergences, in nats per sequence.

        Σ_t KL(π(· | y_<t) ‖ ref(· | y_<t))

    Value, on-policy: unbiased. Each term is the conditional mean of its k1, so that at one position the variance can
    only fall. The *sum* usually has far less variance too, but need not, where later terms of k1 undo earlier ones:
    Amini et al. 2025 (arXiv 2504.10637) state that it never has more, and the tests have a counter-example. Gradient as
    a loss: E[Σ_t ∇KL_t] alone, which is *not* ∇KL of the sequences (see above).

    Args:
        mask: the positions that count.

    Source: Amini et al. 2025.
    """
    return jnp.where(mask, exact_kl(logits_policy, logits_ref), 0).sum(axis=-1)


@rao_blackwell_kl.gradient
def _(logits_policy, logits_ref, mask):
    """That of `exact_kl` where the mask is true, 0 elsewhere."""
    return tuple(jnp.where(mask[..., None], each, 0) for each in exact_kl.grad(logits_policy, logits_ref))


def _divergence(log_p: Array, log_q: Array) -> Array:
    """Σ p (log p − log q). A token that p excludes adds nothing; one that q alone excludes adds infinity, not NaN."""
    possible = log_p > -jnp.inf
    infinite = (possible & (log_q == -jnp.inf)).any(axis=-1)
    use = possible & ~infinite[..., None]
    d = jnp.where(use, log_p, 0) - jnp.where(use, log_q, 0)  # inside, so that the gradient is finite too
    return jnp.where(infinite, jnp.inf, (jnp.where(use, jnp.exp(log_p), 0) * d).sum(axis=-1))
