"""Logits transforms: pytrees whose numbers are leaves, so another temperature never recompiles.

A stateless one is called as `transform(logits [..., V]) -> logits [..., V]`, with −inf where a token is removed; one
that looks back as `transform(logits, tokens [..., L], mask [..., L])`. Those with a state of their own (`MinLength`,
`ForcedTokens`, `Mirostat`) are for decoders. A filter keeps at least one token and all ties, and does not change the
logits of the tokens that it keeps; `kept_mass` is their probability. Numbers may be arrays of one value for each row.
To write one, see `Transform`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import operator
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxrl_llm.numerics import host, is_concrete, largest, violated, wide
from jaxrl_llm.objectives.logprobs import entropy, token_log_probs


def pytree(cls: type) -> type:
    """Make a class a frozen dataclass and a pytree whose fields are its leaves, so that no number recompiles.

    JAX rebuilds it without its checks, for its trees also hold gradients and shapes.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]

    def flatten(self: Any) -> tuple[list, None]:
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names], None

    def unflatten(_: None, leaves: tuple) -> Any:
        rebuilt = object.__new__(cls)
        for name, leaf in zip(names, leaves, strict=True):
            object.__setattr__(rebuilt, name, leaf)
        return rebuilt

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


class Seen(NamedTuple):
    """The state of a transform that looks back: the tokens of each row, and which of them count."""

    tokens: Int[Array, "batch slot"]
    mask: Bool[Array, "batch slot"]
    end: Int[Array, "batch"]  # the slot of the next token


@typing.dataclass_transform(frozen_default=True)
class Transform:
    """Base class of all transforms. A subclass becomes a frozen dataclass and a pytree, whose fields are its leaves.

    There are three kinds:
    - A stateless transform defines `__call__(logits)`.
    - One that looks back sets `looks_back = True` and defines `__call__(logits, tokens, mask)`. It is given the tokens
      of each row so far, without those of the prompt if `sees_prompt = False`.
    - One with a state of its own, a tree of arrays [batch, ...], defines `init`, `apply` and `update`:

        class Cooling(Transform):
            \"\"\"Temperature t at the first new token of a row, multiplied by `rate` after each.\"\"\"

            t: float
            rate: float

            def init(self, prompts, mask, limits):
                return jnp.full(limits.shape, self.t)

            def apply(self, temperature, logits):
                return logits / temperature[:, None]

            def update(self, temperature, token, logits):
                return temperature * self.rate

        generate(lm, params, prompts, max_new_tokens=20, transform=[Cooling(2.0, 0.9), TopP(0.9)], key=key)

    A decoder calls `init` once, then `apply` and `update` for every token.
    """

    looks_back: ClassVar[bool] = False
    sees_prompt: ClassVar[bool] = True
    reweighs: ClassVar[bool] = True  # False: it removes tokens, and changes no other logit
    axes: ClassVar[Mapping[str, int]] = {}  # of fields that are arrays for all rows; others are one number for all

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        pytree(cls)

    def __call__(self, logits: Float[Array, "batch vocab"], *context: Array) -> Float[Array, "batch vocab"]:
        raise NotImplementedError(f"{type(self).__name__} has a state: give it to a decoder, or call `apply`.")

    def check(self, limits: Int[np.ndarray, "batch"]) -> None:
        """Raise a ValueError if rows that may have so many new tokens cannot be served; called before decoding."""
        for field in dataclasses.fields(self):
            value, axes = getattr(self, field.name), self.axes.get(field.name, 0)
            shape = () if value is None else jnp.shape(value)
            if value is not None and len(shape) != axes and shape[: -axes or None] != limits.shape:
                one = "number" if axes == 0 else f"array of {axes} {'axis' if axes == 1 else 'axes'}"
                raise ValueError(
                    f"{field.name} of {type(self).__name__} must be one {one}, or one for each of {len(limits)} rows, "
                    f"but has the shape {list(shape)}."
                )

    def take(self, rows: Int[Array, "row"]) -> Transform:
        """Return the transform of these rows of the batch, as for the beams of each; most serve all rows alike."""
        taken = copy.copy(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if getattr(value, "ndim", 0) > self.axes.get(field.name, 0):
                object.__setattr__(taken, field.name, value[rows])
        return taken

    def plain(self) -> Transform:
        """Return the transform with Python's numbers for scalars of every other type: one program serves them all."""
        taken = copy.copy(self)
        for field in dataclasses.fields(self):
            annotation = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
            value, kind = getattr(self, field.name), _KINDS.get(annotation.split("[")[0])
            if kind and value is not None and self.axes.get(field.name, 0) == 0 and is_concrete(value):
                array = jnp.asarray(value)
                if array.ndim and not jnp.issubdtype(array.dtype, jnp.floating if kind is float else jnp.integer):
                    array = array.astype(jnp.result_type(kind))
                object.__setattr__(taken, field.name, array if array.ndim else kind(value))
        return taken

    def init(
        self, prompts: Int[Array, "batch slot"], mask: Bool[Array, "batch slot"], limits: Int[Array, "batch"]
    ) -> PyTree[Array]:
        """The state before the first new token.

        Args:
            prompts: with free slots on the right, enough for all new tokens.
            mask: false at padding and at free slots.
            limits: the most new tokens of each row.
        """
        if not self.looks_back:
            return ()
        end = jnp.where(mask, jnp.arange(1, mask.shape[1] + 1), 0).max(axis=1)
        return Seen(prompts, mask if self.sees_prompt else jnp.zeros_like(mask), end)

    def apply(self, state: PyTree[Array], logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        """The transformed logits."""
        return self(logits, state.tokens, state.mask) if self.looks_back else self(logits)

    def update(
        self, state: PyTree[Array], token: Int[Array, "batch"], logits: Float[Array, "batch vocab"]
    ) -> PyTree[Array]:
        """The state after one more token of each row, chosen where the *model* gave `logits`.

        For a row that has ended, decoders keep the state from before.
        """
        if not self.looks_back:
            return state
        here = jnp.arange(state.mask.shape[1]) == state.end[:, None]
        return Seen(jnp.where(here, token[:, None], state.tokens), state.mask | here, state.end + 1)

    def may_end(self, state: PyTree[Array]) -> Bool[Array, "batch"] | bool:
        """True for rows that a stop string may end with the next token."""
        return True

    def kept_mass(self, logits: Float[Array, "batch vocab"], *context: Array) -> Float[Array, "batch"]:
        """The probability, under softmax(logits), of the tokens that the transform keeps."""
        logits = wide(logits)
        kept = self(logits, *context) > -jnp.inf
        return jnp.where(kept, jax.nn.softmax(logits, axis=-1), 0).sum(axis=-1)


class Chain(Transform):
    """Apply transforms one after the other, each to what the one before left."""

    transforms: tuple[Transform, ...]

    def __post_init__(self):
        object.__setattr__(self, "transforms", tuple(map(as_transform, self.transforms)))

    @property
    def looks_back(self) -> bool:  # type: ignore[override]
        """True if any of them does."""
        return any(transform.looks_back for transform in self.transforms)

    @property
    def reweighs(self) -> bool:  # type: ignore[override]
        """True if any of them does."""
        return any(transform.reweighs for transform in self.transforms)

    def __call__(self, logits: Float[Array, "*batch vocab"], *context: Array) -> Float[Array, "*batch vocab"]:
        def apply(transform: Transform, logits: Array) -> Array:
            return transform(logits, *context) if transform.looks_back else transform(logits)

        return self._applied([functools.partial(apply, transform) for transform in self.transforms], logits)

    def _applied(self, steps: Sequence[Callable[[Array], Array]], logits: Array) -> Array:
        """Apply each transform by its step; top-k and top-p that follow one another share the sorted head."""
        head = None
        for transform, step in zip(self.transforms, steps, strict=True):
            shares = type(transform) in (TopK, TopP)  # a subclass may compute something else in its step
            logits, head = transform.cut(logits, head) if shares else (step(logits), None)
        return logits

    def check(self, limits: Int[np.ndarray, "batch"]) -> None:
        for transform in self.transforms:
            transform.check(limits)

    def take(self, rows: Int[Array, "row"]) -> Chain:
        return Chain(tuple(transform.take(rows) for transform in self.transforms))

    def plain(self) -> Chain:
        return Chain(tuple(transform.plain() for transform in self.transforms))

    def may_end(self, state: PyTree[Array]) -> Bool[Array, "batch"] | bool:
        pairs = zip(self.transforms, state, strict=True)
        return functools.reduce(operator.and_, [transform.may_end(own) for transform, own in pairs], True)

    def init(
        self, prompts: Int[Array, "batch slot"], mask: Bool[Array, "batch slot"], limits: Int[Array, "batch"]
    ) -> PyTree[Array]:
        return tuple(transform.init(prompts, mask, limits) for transform in self.transforms)

    def apply(self, state: PyTree[Array], logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        pairs = zip(self.transforms, state, strict=True)
        return self._applied([functools.partial(transform.apply, own) for transform, own in pairs], logits)

    def update(
        self, state: PyTree[Array], token: Int[Array, "batch"], logits: Float[Array, "batch vocab"]
    ) -> PyTree[Array]:
        pairs = zip(self.transforms, state, strict=True)
        return tuple(transform.update(own, token, logits) for transform, own in pairs)


def as_transform(transform: Transform | Sequence[Transform] | None) -> Transform:
    """A transform as it is, a sequence of them as a chain, none as the empty chain.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(transform, Transform):
        return transform
    if transform is None or isinstance(transform, list | tuple):
        return Chain(transform or ())
    raise ValueError(f"transform must be a Transform or a sequence of them, but is {transform!r}.")


def update_alive(
    transform: Transform,
    state: PyTree[Array],
    token: Int[Array, "batch"],
    logits: Float[Array, "batch vocab"],
    alive: Bool[Array, "batch"],
) -> PyTree[Array]:
    """The state after one more token of the rows that are alive."""

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(alive.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return jax.tree.map(choose, transform.update(state, token, logits), state)


def require(holds: bool | Array, name: str, expected: str, value: object) -> None:
    """Raise a ValueError unless `holds`, where that can be read: a traced number was checked when it was made."""
    if violated(holds):
        raise ValueError(f"{name} must be {expected}, but is {value}.")


def token_ids(name: str, ids: int | Sequence[int] | Int[Array, "*ids"] | None) -> Int[Array, "ids"]:
    """No token, one or several as an array. An id outside the vocabulary stands for no token.

    Raises:
        ValueError: naming the argument, if it holds anything but integers.
    """
    try:
        array = host([] if ids is None else ids)
        array = array if array.ndim else array[None]
        integers = array.ndim == 1 and (not array.size or jnp.issubdtype(array.dtype, jnp.integer))
    except (TypeError, ValueError):  # no numbers, or not of one shape
        integers = False
    if not integers:
        raise ValueError(f"{name} must be a token id or several, but is {ids!r}.")
    if isinstance(array, np.ndarray) and array.size and max(abs(int(array.min())), int(array.max())) >= 2**31:
        raise ValueError(f"{name} must be a token id or several, of 32 bits, but is {ids!r}.")
    return array.astype(np.int32)


def per_row(number: Array | float) -> Array | float:
    """A number as it is; one for each row as a column."""
    return number if jnp.ndim(number) == 0 else jnp.asarray(number)[..., None]


_KINDS = {"Float": float, "float": float, "Int": int, "int": int}  # of numbers, by the annotation of their field


# Stateless: temperature, and filters that remove the tail of the distribution -----------------------------------------

# The threshold of a filter, the k-th largest logit or the last score that fills a mass, is found without sorting the
# vocabulary. A short sorted head answers most calls. Where it does not reach, bisection on the bits of the floats finds
# the threshold exactly. The answer for a row never depends on the other rows.

TINY = float(np.finfo(np.float32).tiny)  # below it, processors take a number for 0
HEAD = 128  # tokens that are sorted at once; this costs 1/50 of sorting a vocabulary of 50,000


class Temperature(Transform):
    """logits / t: below 1 sharper, above 1 flatter.

    Raises:
        ValueError: unless t is finite and positive; greedy decoding is `greedy=True`, not t = 0.
    """

    t: Float[Array, "..."] | float

    def __post_init__(self):
        expected = "a finite number of at least 1.2e-38 (decode greedily for the most probable token)"
        require((self.t >= TINY) & (self.t < jnp.inf), "the temperature", expected, self.t)

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        return logits / per_row(self.t)


class Cut(Transform):
    """A filter of tokens whose logit is below a threshold. Mostly the largest logits, the head, suffice to find it."""

    reweighs: ClassVar[bool] = False

    def threshold(
        self, logits: Float[Array, "*batch vocab"], head: Float[Array, "*batch head"]
    ) -> Float[Array, "*batch"]:
        """Return the threshold of each row, from the logits and their sorted head."""
        raise NotImplementedError

    def cut(
        self, logits: Float[Array, "*batch vocab"], head: Float[Array, "*batch head"] | None = None
    ) -> tuple[Float[Array, "*batch vocab"], Float[Array, "*batch head"]]:
        """Return the logits, −inf below the threshold, and their sorted head, which is found if it is not given."""
        head = _head(logits) if head is None else head
        threshold = self.threshold(logits, head)[..., None]
        return tuple(jnp.where(values >= threshold, values, -jnp.inf) for values in (logits, head))

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        return self.cut(logits)[0]


class TopK(Cut):
    """Keep the k most probable tokens (Fan et al. 2018), and all that tie with the k-th.

    A k above the vocabulary keeps all.

    Raises:
        ValueError: unless k is an integer of at least 1.
    """

    k: Int[Array, "..."] | int

    def __post_init__(self):
        _check_count(self.k, "k")

    def threshold(
        self, logits: Float[Array, "*batch vocab"], head: Float[Array, "*batch head"]
    ) -> Float[Array, "*batch"]:
        return kth_largest(logits, self.k, head)


class TopP(Cut):
    """Nucleus: keep the smallest set of most probable tokens with mass at least p (Holtzman et al. 2020, eq. 2).

    The token that crosses p is kept, and all that tie with it; p = 1 keeps every token of positive probability.

    Args:
        min_tokens_to_keep: keep at least so many of the most probable tokens, as far as their probability is positive.

    Raises:
        ValueError: unless 0 < p ≤ 1, and min_tokens_to_keep is an integer of at least 1.
    """

    p: Float[Array, "..."] | float
    min_tokens_to_keep: Int[Array, "..."] | int | None = None

    def __post_init__(self):
        require((self.p > 0) & (self.p <= 1), "p", "in (0, 1]", self.p)
        if self.min_tokens_to_keep is not None:
            _check_count(self.min_tokens_to_keep, "min_tokens_to_keep")

    def threshold(
        self, logits: Float[Array, "*batch vocab"], head: Float[Array, "*batch head"]
    ) -> Float[Array, "*batch"]:
        threshold = nucleus_threshold(logits, self.p, head)
        if self.min_tokens_to_keep is None:
            return threshold
        return jnp.minimum(threshold, kth_largest(logits, self.min_tokens_to_keep, head))


class MinP(Transform):
    """Keep the tokens at least p times as probable as the most probable one (Nguyen et al. 2024).

    p = 0 keeps all, p = 1 only the most probable.

    Raises:
        ValueError: unless 0 ≤ p ≤ 1.
    """

    reweighs: ClassVar[bool] = False

    p: Float[Array, "..."] | float

    def __post_init__(self):
        _check_interval(self.p, "p")

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        given = wide(logits)
        return _at_least(logits, given.max(axis=-1, keepdims=True) + _log(self.p, given))


class Typical(Transform):
    """Locally typical: keep the smallest set of most typical tokens with mass at least p (Meister et al. 2023).

    A token is more typical, the nearer its information −log p_i is to the entropy H of the distribution, both in nats:

        |−log p_i − H| = |z_i − Σ_v p_v z_v|,   z the logits

    The token that crosses p is kept, and all tokens as typical; p = 1 keeps every token of positive probability. The
    most probable token may be removed.

    Raises:
        ValueError: unless 0 < p ≤ 1.
    """

    reweighs: ClassVar[bool] = False

    p: Float[Array, "..."] | float

    def __post_init__(self):
        require((self.p > 0) & (self.p <= 1), "p", "in (0, 1]", self.p)

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        given = wide(jax.lax.stop_gradient(logits))
        possible = given > -jnp.inf
        below = jnp.where(possible, given - _highest(given), 0)
        weights = jnp.where(possible, jnp.exp(below), 0)
        total = jnp.maximum(weights.sum(axis=-1, keepdims=True), 1)  # 0 where no token is possible
        expected = (weights * below).sum(axis=-1, keepdims=True) / total
        scores = jnp.where(possible, -jnp.abs(below - expected), -jnp.inf)
        return jnp.where(scores >= mass_threshold(scores, weights, self.p)[..., None], logits, -jnp.inf)


class Epsilon(Transform):
    """Keep the tokens of probability at least ε, or the most probable if there is none (Hewitt et al. 2022).

    Raises:
        ValueError: unless 0 ≤ ε ≤ 1.
    """

    reweighs: ClassVar[bool] = False

    e: Float[Array, "..."] | float

    def __post_init__(self):
        _check_interval(self.e, "ε")

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        given = wide(logits)
        return _at_least(logits, _log(self.e, given) + jax.nn.logsumexp(given, axis=-1, keepdims=True))


class Eta(Transform):
    """Keep the tokens of probability at least η, or the most probable if there is none (Hewitt et al. 2022).

        η = min(ε, √ε e^{−H}),   H the entropy in nats

    Raises:
        ValueError: unless 0 ≤ ε ≤ 1.
    """

    reweighs: ClassVar[bool] = False

    e: Float[Array, "..."] | float

    def __post_init__(self):
        _check_interval(self.e, "ε")

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        given = wide(logits)
        log_epsilon = _log(self.e, given)
        log_eta = jnp.minimum(log_epsilon, log_epsilon / 2 - entropy(given)[..., None])
        return _at_least(logits, log_eta + jax.nn.logsumexp(given, axis=-1, keepdims=True))


class TopNSigma(Transform):
    """Top-nσ: keep the logits at most n standard deviations below the largest (Tang et al. 2024).

    σ is that of the row's logits as a population, without those of −inf. The tokens that are kept do not depend on a
    temperature before it.

    Raises:
        ValueError: unless n is finite and not negative.
    """

    reweighs: ClassVar[bool] = False

    n: Float[Array, "..."] | float

    def __post_init__(self):
        require((self.n >= 0) & (self.n < jnp.inf), "n", "a finite number of at least 0", self.n)

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        given = wide(logits)
        possible = given > -jnp.inf
        below = jnp.where(possible, given - _highest(given), 0)
        count = jnp.maximum(possible.sum(axis=-1, keepdims=True), 1)
        mean = below.sum(axis=-1, keepdims=True) / count
        variance = jnp.where(possible, jnp.square(below - mean), 0).sum(axis=-1, keepdims=True) / count
        return _at_least(logits, _highest(given) - per_row(self.n) * jnp.sqrt(jax.lax.stop_gradient(variance)))


def _check_interval(number: Float[Array, "..."] | float, name: str) -> None:
    require((number >= 0) & (number <= 1), name, "in [0, 1]", number)


def _check_count(count: Int[Array, "..."] | int, name: str) -> None:
    array = jnp.asarray(count)
    require(jnp.issubdtype(array.dtype, jnp.integer) and array >= 1, name, "an integer of at least 1", count)


def _log(number: Float[Array, "..."] | float, like: Float[Array, "*batch vocab"]) -> Float[Array, "*#batch 1"]:
    """The logarithm of a number, or of one number for each row, as a column; log 0 = −inf."""
    return jnp.log(per_row(jnp.asarray(number, like.dtype)))


def _highest(logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch 1"]:
    """The largest logit of each row; 0 where all are −inf, so that it can be subtracted."""
    highest = logits.max(axis=-1, keepdims=True)
    return jnp.where(highest > -jnp.inf, highest, 0)


def _at_least(
    logits: Float[Array, "*batch vocab"], threshold: Float[Array, "*batch 1"]
) -> Float[Array, "*batch vocab"]:
    """The logits that reach the threshold, and always the largest of each row; −inf elsewhere."""
    given = wide(logits)
    return jnp.where((given >= threshold) | (given >= given.max(axis=-1, keepdims=True)), logits, -jnp.inf)


# Thresholds -----------------------------------------------------------------------------------------------------------


def kth_largest(
    logits: Float[Array, "*batch vocab"],
    k: Int[Array, "*#batch"] | int,
    head: Float[Array, "*batch head"] | None = None,
) -> Float[Array, "*batch"]:
    """The k-th largest logit of each row (the smallest, if k exceeds the vocabulary)."""
    logits, head = wide(logits), _head(logits) if head is None else head
    vocab = logits.shape[-1]
    k = jnp.broadcast_to(jnp.minimum(jnp.asarray(k, jnp.int32), vocab), logits.shape[:-1])
    size = head.shape[-1]
    fast = jnp.take_along_axis(head, jnp.minimum(k, size)[..., None] - 1, axis=-1)[..., 0]

    def slow() -> Array:
        return _largest(logits, lambda kept: kept.sum(axis=-1) >= k)

    return _fast_where(k <= size, fast, slow)


def nucleus_threshold(
    logits: Float[Array, "*batch vocab"],
    p: Float[Array, "*#batch"] | float,
    head: Float[Array, "*batch head"] | None = None,
) -> Float[Array, "*batch"]:
    """The largest threshold with Σ softmax(logits)[logits ≥ threshold] ≥ p in each row (−inf if p = 1)."""
    logits, head = wide(logits), _head(logits) if head is None else head
    highest = logits.max(axis=-1, keepdims=True)
    return _fill(logits, jnp.exp(logits - highest), p, head, jnp.exp(head - highest))


def mass_threshold(
    scores: Float[Array, "*batch vocab"], weights: Float[Array, "*batch vocab"], p: Float[Array, "*#batch"] | float
) -> Float[Array, "*batch"]:
    """The largest threshold with Σ weights[scores ≥ threshold] ≥ p Σ weights in each row (−inf if p = 1).

    Like `nucleus_threshold`, with tokens that fill the mass in another order than that of their probabilities.
    """
    scores, weights = wide(scores), wide(weights)
    head, places = largest(scores, min(HEAD, scores.shape[-1]))
    return _fill(scores, weights, p, head, jnp.take_along_axis(weights, places, axis=-1))


def _fill(
    scores: Float[Array, "*batch vocab"],
    weights: Float[Array, "*batch vocab"],
    p: Float[Array, "*#batch"] | float,
    head: Float[Array, "*batch head"],
    head_weights: Float[Array, "*batch head"],
) -> Float[Array, "*batch"]:
    """`mass_threshold`, given the largest scores in descending order and their weights."""
    p = jnp.broadcast_to(jnp.asarray(p, weights.dtype), weights.shape[:-1])
    needed = p * weights.sum(axis=-1)
    enough = jnp.cumsum(head_weights, axis=-1) >= needed[..., None]
    fast = jnp.take_along_axis(head, jnp.argmax(enough, axis=-1)[..., None], axis=-1)[..., 0]

    def slow() -> Array:
        return _largest(scores, lambda kept: jnp.where(kept, weights, 0).sum(axis=-1) >= needed)

    threshold = _fast_where(enough[..., -1] | (p >= 1), fast, slow)
    return jnp.where(p >= 1, -jnp.inf, threshold)


def _head(logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch head"]:
    """Return the largest logits of each row, in descending order, in float32 or wider."""
    return largest(wide(logits), min(HEAD, logits.shape[-1]))[0]


def _fast_where(
    reached: Bool[Array, "*batch"], fast: Float[Array, "*batch"], slow: Callable[[], Array]
) -> Float[Array, "*batch"]:
    """`fast` where it is right, else `slow()`, which runs only if some row needs it."""
    return jax.lax.cond(reached.all(), lambda: fast, lambda: jnp.where(reached, fast, slow()))


def _largest(
    logits: Float[Array, "*batch vocab"], holds: Callable[[Bool[Array, "*batch vocab"]], Bool[Array, "*batch"]]
) -> Float[Array, "*batch"]:
    """The largest float x for which `holds(logits >= x)`, a condition that fails from some x on; −inf always holds.

    Floats are ordered like the integers of their bits (reversed for negative numbers), so bisection over the integers
    finds x exactly, in as many halvings as there are bits.
    """
    integer = jnp.int32 if logits.dtype == jnp.float32 else jnp.int64
    flip = jnp.iinfo(integer).max

    def to_float(order: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
        return jax.lax.bitcast_convert_type(jnp.where(order < 0, order ^ flip, order), logits.dtype)

    def to_order(value: float) -> Int[Array, ""]:
        bits = jax.lax.bitcast_convert_type(jnp.asarray(value, logits.dtype), integer)
        return jnp.where(bits < 0, bits ^ flip, bits)

    def halve(_: int, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = interval  # holds at low, not at high
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        inside = holds(logits >= to_float(middle)[..., None])
        return jnp.where(inside, middle, low), jnp.where(inside, high, middle)

    low = jnp.full(logits.shape[:-1], to_order(-jnp.inf))
    high = jnp.full(logits.shape[:-1], to_order(jnp.inf))
    found = to_float(jax.lax.fori_loop(0, jnp.iinfo(integer).bits, halve, (low, high))[0])
    # Return a logit: on processors that flush subnormal numbers to 0, `found` may be one of them.
    return jnp.where(logits <= found[..., None], logits, -jnp.inf).max(axis=-1)


# Looking back: penalties for repetition, and blocked n-grams ----------------------------------------------------------


def looking_back(look_back: Callable[..., Array]) -> Callable[..., Array]:
    """Make a method of (logits, tokens, mask) a `__call__` that checks them, and computes in float32 or wider."""

    def call(
        self: Transform,
        logits: Float[Array, "*batch vocab"],
        tokens: Int[Array, "*batch slot"],
        mask: Bool[Array, "*batch slot"],
    ) -> Float[Array, "*batch vocab"]:
        """The transformed logits, in their dtype.

        Raises:
            ValueError: if the shapes do not match, or the tokens are not integers.
        """
        tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)
        shapes = f"{tokens.dtype}{list(tokens.shape)} and {mask.dtype}{list(mask.shape)}"
        rows = logits.shape[:-1]
        if tokens.shape != mask.shape or tokens.shape[:-1] != rows or tokens.ndim != logits.ndim:
            raise ValueError(
                f"tokens and mask must be {[*rows, 'slot']}, one row for each of logits, but are {shapes}."
            )
        if not jnp.issubdtype(tokens.dtype, jnp.integer) or mask.dtype != jnp.bool_:
            raise ValueError(f"tokens must be integers and mask boolean, but they are {shapes}.")
        return look_back(self, wide(logits), tokens, mask).astype(logits.dtype)

    return call


class RepetitionPenalty(Transform):
    """Make the tokens of the row, prompt included, less probable (Keskar et al. 2019).

    Their logits are divided by r if positive and multiplied by r if negative, once however often they occur. r < 1
    rewards repetition. Unlike all other transforms it is not invariant to a shift of the logits.

    Raises:
        ValueError: unless r is finite and positive.
    """

    looks_back: ClassVar[bool] = True

    r: Float[Array, "..."] | float

    def __post_init__(self):
        require((self.r > 0) & (self.r < jnp.inf), "the repetition penalty", "a finite number above 0", self.r)

    @looking_back
    def __call__(self, logits: Array, tokens: Array, mask: Array) -> Array:
        r = per_row(self.r)
        return jnp.where(
            count_tokens(tokens, mask, logits.shape[-1]) > 0, jnp.where(logits > 0, logits / r, logits * r), logits
        )


class PresencePenalty(Transform):
    """Subtract p, once, from the logit of every token that was generated; the prompt does not count.

    The penalty of that name in the OpenAI API. A negative one is a reward.

    Raises:
        ValueError: unless p is finite.
    """

    looks_back: ClassVar[bool] = True
    sees_prompt: ClassVar[bool] = False

    p: Float[Array, "..."] | float

    def __post_init__(self):
        require(jnp.abs(self.p) < jnp.inf, "the presence penalty", "finite", self.p)

    @looking_back
    def __call__(self, logits: Array, tokens: Array, mask: Array) -> Array:
        return jnp.where(count_tokens(tokens, mask, logits.shape[-1]) > 0, logits - per_row(self.p), logits)


class FrequencyPenalty(Transform):
    """Subtract f from the logit of a token each time it was generated; the prompt does not count.

    The penalty of that name in the OpenAI API. A negative one is a reward.

    Raises:
        ValueError: unless f is finite.
    """

    looks_back: ClassVar[bool] = True
    sees_prompt: ClassVar[bool] = False

    f: Float[Array, "..."] | float

    def __post_init__(self):
        require(jnp.abs(self.f) < jnp.inf, "the frequency penalty", "finite", self.f)

    @looking_back
    def __call__(self, logits: Array, tokens: Array, mask: Array) -> Array:
        return logits - per_row(self.f) * count_tokens(tokens, mask, logits.shape[-1])


class NoRepeatNgram(Transform):
    """Remove the tokens that would complete an n-gram that the row, prompt included, already contains.

    n = 1 removes every token of the row. Padding between two tokens does not separate them. A row in which no possible
    token would be left is unchanged: only there an n-gram repeats. (Paulus et al. 2018 block trigrams in beam search.)

    Raises:
        ValueError: unless n is an integer of at least 1.
    """

    looks_back: ClassVar[bool] = True
    reweighs: ClassVar[bool] = False

    n: Int[Array, "..."] | int

    def __post_init__(self):
        _check_count(self.n, "n")

    @looking_back
    def __call__(self, logits: Array, tokens: Array, mask: Array) -> Array:
        if tokens.shape[-1] == 0:
            return logits
        tokens, real = last_tokens(tokens, mask, tokens.shape[-1])
        repeats = real & _follows_repetition(tokens, real, per_row(jnp.asarray(self.n, jnp.int32)) - 1)
        kept = count_tokens(tokens, repeats, logits.shape[-1]) == 0
        kept = kept | ~(kept & (logits > -jnp.inf)).any(axis=-1, keepdims=True)
        return jnp.where(kept, logits, -jnp.inf)


def last_tokens(
    tokens: Int[Array, "*batch slot"], mask: Bool[Array, "*batch slot"], count: int
) -> tuple[Int[Array, "*batch count"], Bool[Array, "*batch count"]]:
    """The last `count` real tokens of each row without gaps, aligned to the right, and a mask of those that exist."""
    behind = jnp.cumsum(mask[..., ::-1], axis=-1)[..., ::-1]  # real tokens from here to the end
    place = jnp.where(mask & (behind <= count), count - behind, count)  # the place `count` is dropped

    def write(place: Array, tokens: Array) -> tuple[Array, Array]:
        empty = jnp.zeros(count, tokens.dtype)
        return empty.at[place].set(tokens, mode="drop"), empty.astype(bool).at[place].set(True, mode="drop")

    return row_by_row(write, place, tokens)


def _follows_repetition(
    tokens: Int[Array, "*batch slot"], real: Bool[Array, "*batch slot"], length: Int[Array, "*#batch #1"]
) -> Bool[Array, "*batch slot"]:
    """True at tokens that follow a repetition of the row's last `length` tokens. Padding must be on the left."""
    slots = tokens.shape[-1]
    longest = jnp.minimum(length.max(initial=0), slots)

    def unsettled(carry: tuple[Array, Array, Array, Array]) -> Array:
        back, _, _, same = carry
        return (back <= longest) & same.any()

    def compare(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        back, shifted, exists, same = carry  # shifted[j] = tokens[j - back + 1]; the next one is compared now
        wanted = jnp.take(tokens, jnp.asarray(slots) - back, axis=-1)[..., None]
        shifted = jnp.roll(shifted, 1, axis=-1)
        exists = jnp.roll(exists, 1, axis=-1).at[..., 0].set(False)
        return back + 1, shifted, exists, same & ((exists & (shifted == wanted)) | (back > length))

    start = (jnp.ones((), jnp.int32), tokens, real, jnp.ones_like(real))
    return jax.lax.while_loop(unsettled, compare, start)[-1]


def count_tokens(
    tokens: Int[Array, "*batch slot"], mask: Bool[Array, "*batch slot"], vocab: int
) -> Int[Array, "*batch vocab"]:
    """The number of times that each token of the vocabulary occurs where the mask is true."""
    place = jnp.where(mask & (tokens >= 0) & (tokens < vocab), tokens, vocab)  # beyond the end, where it is dropped
    return row_by_row(lambda place: jnp.zeros(vocab, jnp.int32).at[place].add(1, mode="drop"), place)


def row_by_row(function, *arrays: Array):
    """`jax.vmap` over all axes but the last."""
    for _ in range(arrays[0].ndim - 1):
        function = jax.vmap(function)
    return function(*arrays)


# Control of the text: biases, forbidden words, forced tokens, a minimum length, Mirostat ------------------------------


class LogitBias(Transform):
    """Add a bias to each logit; −inf removes a token. Decoders raise where no token is left.

    Raises:
        ValueError: unless the biases are numbers below +inf; when called, unless there is one for each token, or one
            for each token of each row.
    """

    axes: ClassVar[Mapping[str, int]] = {"bias": 1}

    bias: Float[Array, "*#batch vocab"]

    def __post_init__(self):
        expected = "an array [vocab] or [batch, vocab]"
        require(not isinstance(self.bias, Mapping), "the bias", expected, self.bias)
        bias = jnp.asarray(self.bias)
        require(bias.ndim >= 1, "the bias", expected, self.bias)
        require((bias < jnp.inf).all(), "the bias", "a number below +inf for each token", self.bias)
        object.__setattr__(self, "bias", bias)

    def __call__(self, logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
        bias = jnp.asarray(self.bias)
        if bias.shape[-1] != logits.shape[-1] or bias.shape[:-1] not in ((), logits.shape[:-1]):
            raise ValueError(
                f"the bias must have the shape {[logits.shape[-1]]} or {list(logits.shape)}, "
                f"but has {list(bias.shape)}."
            )
        return (wide(logits) + bias).astype(logits.dtype)


class BadWords(Transform):
    """Remove the last token of a forbidden sequence if the row, prompt included, ends with the tokens before it.

    Build it with `bad_words`. Padding between two tokens does not separate them. EOS can be a forbidden token, as any
    other. Decoders raise where no token is left.
    """

    looks_back: ClassVar[bool] = True
    reweighs: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, int]] = {"before": 2, "last": 1}

    before: Int[Array, "sequence longest"]  # aligned to the right, −1 where the sequence is shorter
    last: Int[Array, "sequence"]

    @looking_back
    def __call__(self, logits: Array, tokens: Array, mask: Array) -> Array:
        ending, real = last_tokens(tokens, mask, self.before.shape[-1])
        same = real[..., None, :] & (ending[..., None, :] == self.before)
        completed = (same | (self.before < 0)).all(axis=-1)
        last = jnp.broadcast_to(self.last, completed.shape)
        return jnp.where(count_tokens(last, completed, logits.shape[-1]) == 0, logits, -jnp.inf)


def bad_words(vocab_size: int, sequences: Sequence[Sequence[int]]) -> BadWords:
    """Return the transform that forbids sequences of one token or more, as a table on the device.

    Raises:
        ValueError: if no sequence is given, one is empty, or a token is not in the vocabulary.
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
    """Remove the tokens `eos_ids` until a row has n new tokens, and hold back stop strings as long.

    Text before the n-th new token is not searched for stop strings. Decoders raise where no token is left.

    Raises:
        ValueError: unless n is an integer of at least 0 and `eos_ids` is a token id or several.
    """

    reweighs: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, int]] = {"eos_ids": 1}

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
        return jnp.where(~ends | (count >= self.n)[..., None], logits, -jnp.inf)

    def update(self, count: Int[Array, "batch"], token: Array, logits: Array) -> Int[Array, "batch"]:
        return count + 1

    def may_end(self, count: Int[Array, "batch"]) -> Bool[Array, "batch"]:
        return count + 1 >= self.n


class ForcedTokens(Transform):
    """Force the i-th new token of a row to be `tokens[i]`; it is free where that is −1, and after the last.

    A forced token keeps its logit; its log-probability under the sampling distribution is 0. Decoders raise where it is
    outside the vocabulary, or excluded by the model or by another transform.

    Raises:
        ValueError: unless the tokens are integers [number] or [batch, number], at least −1 and at least one.
    """

    reweighs: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, int]] = {"tokens": 1}

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
        return jnp.where(free | (jnp.arange(logits.shape[-1]) == forced), logits, -jnp.inf)

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

    reweighs: ClassVar[bool] = False

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
