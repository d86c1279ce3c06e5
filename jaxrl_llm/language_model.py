"""The central protocol: a language model is a pure function of its parameters, with an explicit append-only cache."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxrl_llm import mesh
from jaxrl_llm.numerics import is_concrete

Params = PyTree[Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The append-only cache of a batch of rows.

    All rows write at the same slot, and `valid` marks the slots that count. So left padding, right padding, ragged
    prompts, finished rows and rejected drafts are all slots that are not valid. Slots are in causal order, and the
    position of a token is the number of valid tokens before it in its row.
    """

    memory: PyTree  # the model's state, such as keys and values; every leaf is [batch, ...], any slots along one axis
    valid: Bool[Array, "batch slot"]
    length: Int[Array, ""]  # slots written so far
    given: PyTree = None  # constant state, such as the index of a row's source; every leaf is [batch, ...]

    @property
    def max_length(self) -> int:
        """Return the number of slots."""
        return self.valid.shape[1]

    def append(self, mask: Bool[Array, "batch time"]) -> Cache:
        """Reserve the next `time` slots, valid where `mask` is true; the model then writes its memory.

        Raises:
            ValueError: if the batch size differs, or there are too few slots. Under `jit` the number of written slots
                is unknown, and tokens that do not fit overwrite the last slots: size the cache for the whole sequence.
        """
        time = mask.shape[1]
        if mask.shape[0] != self.valid.shape[0]:
            raise ValueError(
                f"the mask must have the {self.valid.shape[0]} rows of the cache, but has {mask.shape[0]}."
            )
        if time > self.max_length or (is_concrete(self.length) and int(self.length) + time > self.max_length):
            written = int(self.length) if is_concrete(self.length) else "some"
            raise ValueError(
                f"the cache has {self.max_length} slots, {written} are written and {time} more do not fit."
            )
        valid = jax.lax.dynamic_update_slice(self.valid, mask, (jnp.zeros_like(self.length), self.length))
        return dataclasses.replace(self, valid=valid, length=self.length + time)

    def take(self, rows: Int[Array, "rows"], *, groups: int = 1) -> Cache:
        """Return the cache of these rows of the batch, in this order; rows may repeat.

        Args:
            groups: the batch is this many runs of equally many rows, such as the beams of each prompt, and the equally
                many runs of `rows` each name rows of their own. So no device of a mesh needs the cache of another.
        """

        def taken(leaf: Array) -> Array:
            if not mesh.is_set():
                return leaf[rows]
            parts = leaf.reshape(groups, -1, *leaf.shape[1:])
            own = rows.reshape(groups, -1) - jnp.arange(groups)[:, None] * parts.shape[1]
            return jax.vmap(lambda part, rows: part[rows])(parts, own).reshape(-1, *leaf.shape[1:])

        memory, valid, given = jax.tree.map(taken, (self.memory, self.valid, self.given))
        return dataclasses.replace(self, memory=memory, valid=valid, given=given)


class LanguageModel(Protocol):
    """A model of next-token logits. Implementations are hashable by their configuration.

    Without a cache, `hidden` scores whole sequences. With a cache it appends `tokens`: prefill is a call with many
    tokens, a decoding step a call with one. `mask` is false at padding, on either side. Tokens at padding have no
    effect elsewhere, and outputs at padding are undefined; only a model with `min_prompt_length` 0 returns there the
    hidden state of the tokens before (of the empty sequence, if there are none).

    A row may hold several texts, one after the other, of which each is read as if it stood alone: `segments` numbers
    the text of every token, padding included, and never falls along a row. A cache takes one text a row.
    """

    vocab_size: int
    max_length: int  # context length: the largest number of tokens in a row
    min_prompt_length: int  # valid tokens required before the first prediction: 1, or 0 for a model with a root state

    def init(self, key: Array) -> Params:
        """Return random parameters, a plain nested dict of arrays."""

    def init_cache(self, batch_size: int, max_length: int, *, dtype: Any = jnp.float32) -> Cache:
        """Return an empty cache of `max_length` slots; `dtype` must be that of the parameters."""

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "batch time"],
        cache: Cache | None = None,
        *,
        mask: Bool[Array, "batch time"] | None = None,
        segments: Int[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time width"], Cache | None]:
        """Return the last hidden state at each token, and the cache with the tokens appended."""

    def logits(self, params: Params, hidden: Float[Array, "... width"]) -> Float[Array, "... vocab"]:
        """Unembed hidden states into unnormalised log-probabilities of the next token."""

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "batch time"],
        cache: Cache | None = None,
        *,
        mask: Bool[Array, "batch time"] | None = None,
        segments: Int[Array, "batch time"] | None = None,
    ) -> tuple[Float[Array, "batch time vocab"], Cache | None]:
        """Return `logits` of `hidden`: at each token the logits of the next one."""
        hidden, cache = self.hidden(params, tokens, cache, mask=mask, **several_texts(self, segments))
        return self.logits(params, hidden), cache


def several_texts(lm: LanguageModel, segments: Array | None) -> dict[str, Array]:
    """Return the keyword arguments of `lm.hidden` for these segments: {} for None.

    Raises:
        ValueError: for segments, if the model reads one text a row.
    """
    if segments is None:
        return {}
    if "segments" not in inspect.signature(lm.hidden).parameters:
        raise ValueError(
            f"a model of packed rows must take segments, but {type(lm).__name__} reads one text a row: "
            "train it without packing."
        )
    return {"segments": segments}


def segment_starts(segments: Int[Array, "batch time"]) -> Bool[Array, "batch time"]:
    """Return where a segment follows another one in its row."""
    return (segments != jnp.roll(segments, 1, axis=1)) & (jnp.arange(segments.shape[1]) > 0)


def params_dtype(params: Params) -> jnp.dtype:
    """Return the floating dtype of the parameters."""
    return jnp.result_type(*jax.tree.leaves(params))


def check_tokens(
    lm: LanguageModel,
    tokens: Array,
    mask: Array | None,
    cache: Cache | None = None,
    *,
    segments: Array | None = None,
    name: str = "tokens",
    bounded: bool = True,
) -> None:
    """Check that tokens are valid input of `lm`.

    Rank, dtype and mask shape are always checked. Values are checked unless they are traced: ids must be in the
    vocabulary, and if `bounded` rows, with the tokens in the cache, must fit the context; of rows with segments, each
    segment.

    Raises:
        ValueError: naming what is wrong.
    """
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers [batch, time], but is {tokens.dtype}{list(tokens.shape)}.")
    if mask is not None and (mask.shape != tokens.shape or mask.dtype != jnp.bool_):
        raise ValueError(f"the mask of {name} must be bool{list(tokens.shape)}, but is {mask.dtype}{list(mask.shape)}.")
    if segments is not None and cache is not None:
        raise ValueError("segments must be None with a cache, which takes one text a row.")
    if segments is not None and (segments.shape != tokens.shape or not jnp.issubdtype(segments.dtype, jnp.integer)):
        found = f"{segments.dtype}{list(segments.shape)}"
        raise ValueError(f"the segments of {name} must be integers {list(tokens.shape)}, but are {found}.")
    readable = all(is_concrete(each) for each in (tokens, mask, segments, None if cache is None else cache.valid))
    if not readable or tokens.size == 0:
        return
    real = np.asarray(tokens) if mask is None else np.asarray(tokens)[np.asarray(mask)]
    if real.size and (real.min() < 0 or real.max() >= lm.vocab_size):
        raise ValueError(
            f"{name} must lie in [0, {lm.vocab_size}), the model's vocabulary, "
            f"but range from {real.min()} to {real.max()}."
        )
    if segments is not None:
        _check_segments(
            lm, np.ones(tokens.shape, bool) if mask is None else np.asarray(mask), np.asarray(segments), name
        )
        return
    held = 0 if cache is None else np.asarray(cache.valid).sum(axis=1)
    lengths = np.atleast_1d(held + (tokens.shape[1] if mask is None else np.asarray(mask).sum(axis=1)))
    if bounded and lengths.max() > lm.max_length:
        raise ValueError(
            f"row {lengths.argmax()} of {name} comes to {lengths.max()} tokens, "
            f"which do not fit the model's context of {lm.max_length}."
        )


def _check_segments(lm: LanguageModel, mask: np.ndarray, segments: np.ndarray, name: str) -> None:
    falls = (np.diff(segments, axis=1) < 0).any(axis=1)
    if falls.any():
        raise ValueError(f"the segments of {name} must never fall along a row, but do in row {falls.argmax()}.")
    texts, lengths = np.unique(np.stack([np.nonzero(mask)[0], segments[mask]]), axis=1, return_counts=True)
    if lengths.size and lengths.max() > lm.max_length:
        row, segment = texts[:, lengths.argmax()]
        raise ValueError(
            f"segment {segment} in row {row} of {name} has {lengths.max()} tokens, "
            f"which do not fit the model's context of {lm.max_length}."
        )
