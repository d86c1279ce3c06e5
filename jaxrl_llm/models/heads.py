"""A scalar head on any language model."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class ScalarHead:
    """A head."""

    lm: object

    def init(self, key, lm_params=None, *, zero=False):
        p = self.lm.init(key) if lm_params is None else lm_params
        w = jax.eval_shape(lambda p: self.lm.hidden(p, jnp.zeros((1, 1), int))[0], p).shape[-1]
        return {"model": p, "head": jnp.zeros(w) if zero else jax.random.normal(key, (w,)) / jnp.sqrt(w + 1)}

    def values(self, params, tokens, mask=None):
        h, _ = self.lm.hidden(params["model"], tokens, mask=mask)
        return h @ params["head"]

    def scores(self, params, tokens, mask=None):
        v = self.values(params, tokens, mask)
        last = jnp.where(mask, jnp.arange(tokens.shape[1]), 0).max(axis=1)
        return jnp.take_along_axis(v, last[:, None], 1)[:, 0]
