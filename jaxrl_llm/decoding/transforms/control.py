"""Transforms that control the text: biases, forbidden words, forced tokens, a minimum length, Mirostat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrl_llm.decoding.transforms.base import Transform, keep, require, token_ids
from jaxrl_llm.decoding.transforms.penalties import count_tokens, last_tokens, looking_back
from jaxrl_llm.numerics import wide
from jaxrl_llm.objectives.logprobs import token_log_probs


class LogitBias(Transform):
    """Add a bias to each logit; −inf removes a token. A row in which no possible token would be left is unchanged.

    Raises:
        ValueError: unless the biases are numbers below +inf; when called, unless there is one for each token, or one
            for each token of each row.
    """

    numbers: ClassVar[tuple[str, ...]] = ()

    bias: Float[Array, "*#batch vocab"]

    def __post_init__(self):
        bias = jnp.asarray(self.bias)
        require(bias.ndim >= 1, "the bias", "an array [vocab] or [batch, vocab]", self.bias)
        require((bias < jnp.inf).all(), "the bias", "a number below +inf for each token", self.bias)
        object.__setattr__(self, "bias", bias)

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        bias = jnp.asarray(self.bias)
        if bias.shape[-1] != logits.shape[-1] or bias.shape[:-1] not in ((), logits.shape[:-1]):
            raise ValueError(
                f"the bias must have the shape {[logits.shape[-1]]} or {list(logits.shape)}, "
                f"but has {list(bias.shape)}."
            )
        removed = bias == -jnp.inf
        biased = (wide(logits) + jnp.where(removed, 0, bias)).astype(logits.dtype)
        left = (~removed & (logits > -jnp.inf)).any(axis=-1, keepdims=True)
        return jnp.where(left, jnp.where(removed, -jnp.inf, biased), logits)


class BadWords(Transform):
    """Remove the last token of a forbidden sequence if the row, prompt included, ends with the tokens before it.

    Build it with `bad_words`. Padding between two tokens does not separate them. A row in which no possible token would
    be left is unchanged.
    """

    looks_back: ClassVar[bool] = True
    numbers: ClassVar[tuple[str, ...]] = ()

    before: Int[Array, "sequence longest"]  # aligned to the right, −1 where the sequence is shorter
    last: Int[Array, "sequence"]

    @looking_back
    def __call__(self, logits: Array, tokens: Array, mask: Array) -> Array:
        ending, real = last_tokens(tokens, mask, self.before.shape[-1])
        same = real[..., None, :] & (ending[..., None, :] == self.before)
        completed = (same | (self.before < 0)).all(axis=-1)
        last = jnp.broadcast_to(self.last, completed.shape)
        return keep(logits, count_tokens(last, completed, logits.shape[-1]) == 0)


def bad_words(vocab_size: int, sequences: Sequence[Sequence[int]]) -> BadWords:
    """Return the transform that forbids sequences of one token or more, as a table on the device.

    Raises:
        ValueError: if there is no sequence, one is empty, or a token is not in the vocabulary.
    """
    sequences = [[sequence] if isinstance(sequence, int | np.integer) else list(sequence) for sequence in sequences]
    if not sequences or not all(sequences):
        raise ValueError(f"sequences must not be empty, nor any of them, but are {sequences}.")
    for sequence in sequences:
        if not all(isinstance(token, int | np.integer) and 0 <= token < vocab_size for token in sequence):
            raise ValueError(f"forbidden tokens must be integers in [0, {vocab_size}), but one sequence is {sequence}.")
    longest = max(map(len, sequences)) - 1
    before = np.full((len(sequences), longest), -1, np.int32)
    for row, sequence in enumerate(sequences):
        before[row, longest + 1 - len(sequence) :] = sequence[:-1]
    return BadWords(jnp.asarray(before), jnp.asarray([sequence[-1] for sequence in sequences], jnp.int32))


class MinLength(Transform):
    """Remove the tokens `eos_ids` until a row has n new tokens. A row in which no other token is possible is unchanged.

    Raises:
        ValueError: unless n is an integer of at least 0 and `eos_ids` is a token id or several.
    """

    numbers: ClassVar[tuple[str, ...]] = ("n",)

    n: Int[Array, "..."] | int
    eos_ids: Int[Array, "eos"] | Sequence[int] | int

    def __post_init__(self):
        n, eos_ids = jnp.asarray(self.n), token_ids("eos_ids", self.eos_ids)
        require(jnp.issubdtype(n.dtype, jnp.integer) and n >= 0, "n", "an integer of at least 0", self.n)
        require(eos_ids >= 0, "eos_ids", "a token id or several", self.eos_ids)
        object.__setattr__(self, "eos_ids", eos_ids)

    def init(self, prompts: Array, mask: Array, limits: Int[Array, "batch"]) -> Int[Array, "batch"]:
        return jnp.zeros_like(limits)

    def apply(self, count: Int[Array, "batch"], logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        ends = jnp.zeros(logits.shape[-1], bool).at[self.eos_ids].set(True, mode="drop")
        return keep(logits, ~ends | (count >= self.n)[..., None])

    def update(self, count: Int[Array, "batch"], token: Array, logits: Array) -> Int[Array, "batch"]:
        return count + 1


class ForcedTokens(Transform):
    """Force the i-th new token of a row to be `tokens[i]`; it is free where that is −1, and after the last.

    A forced token keeps its logit; its log-probability under the sampling distribution is 0. A token that the model
    excludes (−inf) or that is outside the vocabulary is not forced: the row is then unchanged.

    Raises:
        ValueError: unless the tokens are integers [number] or [batch, number], at least −1 and at least one.
    """

    numbers: ClassVar[tuple[str, ...]] = ()

    tokens: Int[Array, "*#batch number"] | Sequence[int]

    def __post_init__(self):
        tokens = jnp.asarray(self.tokens)
        shaped = tokens.ndim in (1, 2) and tokens.shape[-1] > 0 and jnp.issubdtype(tokens.dtype, jnp.integer)
        require(shaped, "tokens", "integers [number] or [batch, number]", self.tokens)
        require(tokens >= -1, "tokens", "tokens, or −1 where nothing is forced", self.tokens)
        object.__setattr__(self, "tokens", tokens.astype(jnp.int32))

    def init(self, prompts: Array, mask: Array, limits: Int[Array, "batch"]) -> Int[Array, "batch"]:
        return jnp.zeros_like(limits)

    def apply(self, count: Int[Array, "batch"], logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        tokens = jnp.broadcast_to(self.tokens, (*logits.shape[:-1], self.tokens.shape[-1]))
        number = tokens.shape[-1]
        forced = jnp.take_along_axis(tokens, jnp.minimum(count, number - 1)[..., None], axis=-1)
        free = (count >= number)[..., None] | (forced < 0)
        return keep(logits, free | (jnp.arange(logits.shape[-1]) == forced))

    def update(self, count: Int[Array, "batch"], token: Array, logits: Array) -> Int[Array, "batch"]:
        return count + 1


class Mirostat(Transform):
    """Hold the mean surprise of a text at τ bits a token: Mirostat 2.0 (Basu et al. 2021, algorithm 2).

    Keeps the tokens of surprise −log₂ p ≤ μ, and always the most probable. μ, the state, starts at 2τ and is updated
    after each token:

        μ ← μ − η (s − τ),   s the token's surprise in bits under the *model*

    s is not the surprise under the truncated distribution, as in llama.cpp, where it can stay below τ for ever. A
    transform before this one does not change s, though it changes which tokens are removed.

    Raises:
        ValueError: unless τ is finite and positive, and η finite and not negative.
    """

    tau: Float[Array, "..."] | float
    eta: Float[Array, "..."] | float

    def __post_init__(self):
        require((self.tau > 0) & (self.tau < jnp.inf), "τ", "a finite number of bits above 0", self.tau)
        require((self.eta >= 0) & (self.eta < jnp.inf), "η", "a finite number of at least 0", self.eta)

    def init(self, prompts: Array, mask: Array, limits: Int[Array, "batch"]) -> Float[Array, "batch"]:
        dtype = jnp.promote_types(jnp.asarray(self.tau).dtype, jnp.float32)
        return jnp.broadcast_to(2 * jnp.asarray(self.tau, dtype), limits.shape)

    def apply(self, mu: Float[Array, "batch"], logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        given = wide(logits)
        highest = given.max(axis=-1, keepdims=True)
        threshold = jax.nn.logsumexp(given, axis=-1, keepdims=True) - math.log(2) * mu[..., None]
        return jnp.where((given >= threshold) | (given >= highest), logits, -jnp.inf)

    def update(
        self, mu: Float[Array, "batch"], token: Int[Array, "batch"], logits: Float[Array, "batch vocab"]
    ) -> Float[Array, "batch"]:
        surprise = -token_log_probs(logits, token) / math.log(2)
        known = jnp.isfinite(surprise)  # not that of a token that the model excludes
        moved = mu - self.eta * (jnp.where(known, surprise, self.tau) - self.tau)
        return jnp.where(known, moved, mu).astype(mu.dtype)
