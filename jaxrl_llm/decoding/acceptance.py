"""The rule by which speculative decoding accepts drafts, and what it draws instead of those it rejects."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_llm.decoding import sampling


def acceptance_probability(
    p: Float[Array, "... vocab"], q: Float[Array, "... vocab"], token: Int[Array, "..."]
) -> Float[Array, "..."]:
    """min(1, p(x) / q(x)) for a draft x ~ q (Leviathan et al. 2023, section 2.3); 0 where q(x) = 0: no draft was made.

    With `residual` for what is rejected, Σ_x q(x) [a(x) δ_x + (1 − a(x)) residual] = p.
    """
    p, q = (jnp.take_along_axis(law, token[..., None], axis=-1)[..., 0] for law in (p, q))
    return jnp.where(q > 0, jnp.minimum(p / jnp.where(q > 0, q, 1), 1), 0)


def residual(p: Float[Array, "... vocab"], q: Float[Array, "... vocab"]) -> Float[Array, "... vocab"]:
    """max(p − q, 0), normalised: the law of the token instead of a rejected draft (Leviathan et al. 2023, section 2.3).

    Of q = 0 it is p; so it is where rounding leaves nothing of the difference.
    """
    excess = jnp.maximum(p - q, 0)
    total = excess.sum(axis=-1, keepdims=True)
    return jnp.where(total > 0, excess / jnp.where(total > 0, total, 1), p)


def verify(
    keys: Key[Array, "batch"],
    drafts: Int[Array, "batch draft"],
    p: Float[Array, "batch draft+1 vocab"],
    q: Float[Array, "batch draft vocab"],
) -> tuple[Int[Array, "batch"], Int[Array, "batch"]]:
    """How many drafts of each row are accepted, and the token after them.

    Args:
        p: the target's law before each draft, and after the last.
        q: the law that each draft was drawn from; all 0 where there is no draft.
    """
    pairs = jax.vmap(jax.random.split)(keys)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, drafts.shape[1:], p.dtype))(pairs[:, 0])
    accepts = uniform < acceptance_probability(p[:, :-1], q, drafts)
    accepted = jnp.cumprod(accepts, axis=1, dtype=jnp.int32).sum(axis=1, dtype=jnp.int32)
    q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))  # after the last draft nothing is subtracted
    p, q = (jnp.take_along_axis(law, accepted[:, None, None], axis=1)[:, 0] for law in (p, q))
    return accepted, sampling.sample(pairs[:, 1], jnp.log(residual(p, q)))


def verify_greedy(
    drafts: Int[Array, "batch draft"], exists: Bool[Array, "batch draft"], best: Int[Array, "batch draft+1"]
) -> tuple[Int[Array, "batch"], Int[Array, "batch"]]:
    """The same where the target takes its `best` tokens: drafts are accepted while they are these."""
    accepted = jnp.cumprod((drafts == best[:, :-1]) & exists, axis=1, dtype=jnp.int32).sum(axis=1, dtype=jnp.int32)
    return accepted, jnp.take_along_axis(best, accepted[:, None], axis=1)[:, 0]
