"""The tabular language model: small enough to enumerate, with the same protocol as the neural models."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm import language_model
from jaxrl_llm.language_model import Cache, Params


@dataclasses.dataclass(frozen=True)
class TabularLM(language_model.LanguageModel):
    """A free row of logits for every prefix of fewer than `horizon` tokens; the hidden state *is* the row of logits.

    The parameters are `{"logits": [prefixes, vocab]}`, with prefixes ordered by length, then as base-`vocab` numbers,
    from the empty prefix on. It has a root state, so that a prompt may be empty. After `horizon` tokens the sequence is
    over; the logits there are 0.
    """

    vocab_size: int
    horizon: int
    min_prompt_length = 0

    def __post_init__(self):
        if self.vocab_size < 1 or self.horizon < 1:
            raise ValueError(f"vocab_size and horizon must be at least 1, but are {self.vocab_size}, {self.horizon}.")
        if self.num_prefixes > 10**7:
            raise ValueError(f"the table must have at most {10**7} prefixes, but has {self.num_prefixes}.")

    @property
    def max_length(self) -> int:
        return self.horizon

    @property
    def num_prefixes(self) -> int:
        """Return the number of prefixes, Σ_{t < horizon} vocab^t."""
        return sum(self.vocab_size**length for length in range(self.horizon))

    def init(self, key: Array) -> Params:
        """Return standard normal logits."""
        return {"logits": jax.random.normal(key, (self.num_prefixes, self.vocab_size))}

    def init_cache(self, batch_size: int, max_length: int, *, dtype: jnp.dtype = jnp.float32) -> Cache:
        """Return an empty cache; its memory is each row's prefix as (number of tokens, base-vocab number)."""
        prefix = (jnp.zeros(batch_size, jnp.int32), jnp.zeros(batch_size, jnp.int32))
        return Cache(prefix, jnp.zeros((batch_size, max_length), bool), jnp.zeros((), jnp.int32))

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "batch time"],
        cache: Cache | None = None,
        *,
        mask: Bool[Array, "batch time"] | None = None,
        segments: Int[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time vocab"], Cache | None]:
        language_model.check_tokens(self, tokens, mask, cache, segments=segments)
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        starts = language_model.segment_starts(jnp.zeros_like(tokens) if segments is None else segments)
        start = self.init_cache(tokens.shape[0], 0).memory if cache is None else cache.memory

        def read(prefix: tuple[Array, Array], column: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
            token, valid, starts = column
            count, number = (jnp.where(starts, 0, each) for each in prefix)
            count = jnp.where(valid, count + 1, count)
            number = jnp.where(valid, number * self.vocab_size + token, number)
            return (count, number), self._row(params, count, number)

        columns = (tokens.T.astype(jnp.int32), mask.T, starts.T)
        prefix, rows = jax.lax.scan(read, start, columns)
        if cache is not None:
            cache = dataclasses.replace(cache.append(mask), memory=prefix)
        return jnp.moveaxis(rows, 0, 1), cache

    def logits(self, params: Params, hidden: Float[Array, "... vocab"]) -> Float[Array, "... vocab"]:
        """Return hidden, which is the logits."""
        return hidden

    def _row(
        self, params: Params, count: Int[Array, "batch"], number: Int[Array, "batch"]
    ) -> Float[Array, "batch vocab"]:
        first = jnp.asarray([sum(self.vocab_size**shorter for shorter in range(t)) for t in range(self.horizon + 1)])
        inside = count < self.horizon
        index = jnp.where(inside, first[jnp.minimum(count, self.horizon)] + number, 0)
        return jnp.where(inside[:, None], params["logits"][index], 0.0)
