"""The one idea: a language model is a pure function of its parameters, with an explicit append-only cache."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxrl_llm.numerics import is_concrete

Params = PyTree[Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a model remembers of a batch of rows; append-only.

    All rows write at the same slot. `valid` says which slots count, so left padding, right padding, ragged prompts,
    finished rows and rejected drafts are one thing: a slot that is not valid. Slots are in causal order, and a token's
    position is the number of valid tokens before it in its row.
    """

    memory: PyTree  # the model's own; every leaf is [batch, ...]
    valid: Bool[Array, "batch slot"]
    length: Int[Array, ""]  # slots written so far
    given: PyTree = None  # what no token changes, such as which source a row reads; every leaf is [batch, ...]

    @property
    def max_length(self) -> int:
        """Number of slots."""
        return self.valid.shape[1]

    def append(self, mask: Bool[Array, "batch time"]) -> Cache:
        """Claim the next `time` slots; those where `mask` is false never count. The memory is the model's to write.

        Raises:
            ValueError: if the batch is another, or the slots do not suffice. (Under `jit` the number of slots written
                cannot be read: there, what does not fit overwrites the last ones. Size the cache for all to come.)
        """
        time = mask.shape[1]
        if mask.shape[0] != self.valid.shape[0]:
            raise ValueError(f"the cache holds {self.valid.shape[0]} rows, but {mask.shape[0]} are to be appended.")
        if time > self.max_length or (is_concrete(self.length) and int(self.length) + time > self.max_length):
            written = int(self.length) if is_concrete(self.length) else "some"
            raise ValueError(
                f"the cache has {self.max_length} slots, {written} are written and {time} more do not fit."
            )
        valid = jax.lax.dynamic_update_slice(self.valid, mask, (jnp.zeros_like(self.length), self.length))
        return dataclasses.replace(self, valid=valid, length=self.length + time)

    def take(self, rows: Int[Array, "rows"]) -> Cache:
        """The cache of `rows` of the batch, in that order; a row may be taken many times."""
        memory, valid, given = jax.tree.map(lambda leaf: leaf[rows], (self.memory, self.valid, self.given))
        return dataclasses.replace(self, memory=memory, valid=valid, given=given)


class LanguageModel(Protocol):
    """Turns tokens into next-token logits. Implementations are hashable by their configuration.

    Without a cache, `hidden` scores whole sequences; with one it appends `tokens` to it (prefill is the call with many
    tokens, a decoding step the one with one). `mask` is false at padding, on either side; what stands there changes
    nothing elsewhere, and the outputs at padded places mean nothing, except that a model with `min_prompt_length` 0
    gives there the hidden state of what stands before (of the empty sequence, if nothing does).
    """

    vocab_size: int
    max_length: int  # tokens of a row that the model can hold: its context
    min_prompt_length: int  # valid tokens that must precede the first prediction: 1, or 0 for a model with a root state

    def init(self, key: Array) -> Params:
        """Random parameters: a plain nested dict of arrays."""

    def init_cache(self, batch_size: int, max_length: int, *, dtype: Any = jnp.float32) -> Cache:
        """An empty cache of `max_length` slots; `dtype` is that of the parameters it will be used with."""

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "batch time"],
        cache: Cache | None = None,
        *,
        mask: Bool[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time width"], Cache | None]:
        """The last hidden state at each token, and the cache with the tokens appended."""

    def logits(self, params: Params, hidden: Float[Array, "... width"]) -> Float[Array, "... vocab"]:
        """Unembed hidden states: the unnormalised log-probabilities of the next token."""

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "batch time"],
        cache: Cache | None = None,
        *,
        mask: Bool[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time vocab"], Cache | None]:
        """`logits` of `hidden`: at each token, the logits of the token after it."""
        hidden, cache = self.hidden(params, tokens, cache, mask=mask)
        return self.logits(params, hidden), cache


def params_dtype(params: Params) -> jnp.dtype:
    """The floating dtype of the parameters."""
    return jnp.result_type(*jax.tree.leaves(params))


def check_tokens(
    lm: LanguageModel, tokens: Array, mask: Array | None, cache: Cache | None = None, *, name: str = "tokens"
) -> None:
    """Raise for tokens that `lm` cannot take.

    Rank, dtype and mask shape are always checked; ids outside the vocabulary, and rows that are longer than the model's
    context, with what the cache already holds, where values can be read.
    """
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers [batch, time], but is {tokens.dtype}{list(tokens.shape)}.")
    if mask is not None and (mask.shape != tokens.shape or mask.dtype != jnp.bool_):
        raise ValueError(f"the mask of {name} must be bool{list(tokens.shape)}, but is {mask.dtype}{list(mask.shape)}.")
    readable = all(is_concrete(each) for each in (tokens, mask, None if cache is None else cache.valid))
    if not readable or tokens.size == 0:
        return
    real = np.asarray(tokens) if mask is None else np.asarray(tokens)[np.asarray(mask)]
    if real.size and (real.min() < 0 or real.max() >= lm.vocab_size):
        raise ValueError(
            f"{name} must lie in [0, {lm.vocab_size}), the model's vocabulary, "
            f"but range from {real.min()} to {real.max()}."
        )
    held = 0 if cache is None else np.asarray(cache.valid).sum(axis=1)
    lengths = np.atleast_1d(held + (tokens.shape[1] if mask is None else np.asarray(mask).sum(axis=1)))
    if lengths.max() > lm.max_length:
        raise ValueError(
            f"row {lengths.argmax()} of {name} comes to {lengths.max()} tokens, "
            f"which do not fit the model's context of {lm.max_length}."
        )
