"""Attention of a model: the maps of a text with its tokens, and measures of any weights.

Weights are those of `attention` of any model of the library, [layer, batch, head, query, key]: a row sums to 1 over the
keys that its query may attend to, and is 0 where the query is padding. Measures keep one value for each query;
`mean_over_queries` alone takes means, one for each sequence, so that intervals can be taken over sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxrl_llm import text, translation
from jaxrl_llm.models import T5, Loaded
from jaxrl_llm.models.conditional import given

ROUNDING = 1e-3  # of a row's sum, also in bfloat16


def allowed_keys(
    queries: Bool[np.ndarray, "batch query"],
    keys: Bool[np.ndarray, "batch key"] | None = None,
    *,
    causal: bool = False,
) -> Bool[np.ndarray, "batch query key"]:
    """Which keys a query may look at: valid ones, and with `causal` none behind itself; none for padding.

    Args:
        queries: which queries are valid.
        keys: which keys are; those of self-attention are the queries, the default.

    Raises:
        ValueError: for masks that are not [batch, time], or causal attention between two sequences.
    """
    queries = np.asarray(queries, bool)
    if causal and keys is not None:
        raise ValueError("causal attention is self-attention: give no keys.")
    keys = queries if keys is None else np.asarray(keys, bool)
    if queries.ndim != 2 or keys.ndim != 2 or len(queries) != len(keys):
        raise ValueError(f"masks must be [batch, time], but are {list(queries.shape)} and {list(keys.shape)}.")
    allowed = queries[:, :, None] & keys[:, None, :]
    return allowed & np.tri(queries.shape[1], dtype=bool) if causal else allowed


def entropy(weights: Float[Any, "*batch query key"]) -> Float[np.ndarray, "*batch query"]:
    """The entropy of each query's weights, in nats: H = −Σ_k w_k log w_k, with 0 log 0 = 0.

    0 where one key has all weight, log n for n keys alike; exp H is how many keys the query in effect looks at.

    Raises:
        ValueError: if a row is no distribution, nor 0 as of padding.
    """
    weights = _checked(weights)
    return -(weights * np.log(np.where(weights > 0, weights, 1.0))).sum(axis=-1) + 0.0


def normalised_entropy(
    weights: Float[Any, "layer batch head query key"], allowed: Bool[np.ndarray, "batch query key"]
) -> Float[np.ndarray, "layer batch head query"]:
    """`entropy` / log n, where n is the number of keys that the query may look at: 0 for one key, 1 for all alike.

    With it, rows of unequal length can be compared. A query with one key has no choice and gets 0: leave it out of
    means, `mean_over_queries(values, allowed.sum(axis=-1) > 1)`.

    Raises:
        ValueError: as `entropy`, and if a key has weight that is not allowed.
    """
    weights, allowed = _paired(weights, allowed)
    counts = allowed.sum(axis=-1)[None, :, None]
    return entropy(weights) / np.log(np.maximum(counts, 2))


class Shares(NamedTuple):
    """Of each query's weight, the parts that fall on each kind of key; they sum to 1.

    A key that is of two kinds (the first may be the one before) counts for the kind that is listed first.
    """

    own: Float[np.ndarray, "layer batch head query"]  # the query's own place
    previous: Float[np.ndarray, "layer batch head query"]  # the place before it
    next: Float[np.ndarray, "layer batch head query"]  # the place behind it
    first: Float[np.ndarray, "layer batch head query"]  # the sequence's first valid place
    last: Float[np.ndarray, "layer batch head query"]  # its last one: of an encoder's source, `</s>`
    other: Float[np.ndarray, "layer batch head query"]


def shares(weights: Float[Any, "layer batch head query key"], allowed: Bool[np.ndarray, "batch query key"]) -> Shares:
    """Where self-attention looks, relative to the query and to the ends of the sequence.

    Raises:
        ValueError: as `normalised_entropy`, and if there are not as many keys as queries.
    """
    weights, allowed = _paired(weights, allowed)
    if weights.shape[-2] != weights.shape[-1]:
        found = f"{weights.shape[-1]} and {weights.shape[-2]}"
        raise ValueError(f"self-attention must have as many keys as queries, but here are {found}.")
    place, valid = np.arange(weights.shape[-1]), allowed.any(axis=1)
    first, last = valid.argmax(axis=1), len(place) - 1 - valid[:, ::-1].argmax(axis=1)
    kinds = [np.broadcast_to(place[None, None, :] == place[None, :, None] + step, allowed.shape) for step in (0, -1, 1)]
    kinds += [np.broadcast_to(place == end[:, None, None], allowed.shape) for end in (first, last)]
    parts, left = [], np.ones(allowed.shape, bool)
    for kind in (*kinds, left):
        parts.append((weights * (kind & left)[None, :, None]).sum(axis=-1))
        left = left & ~kind
    return Shares(*parts)


def mean_over_queries(
    values: Float[np.ndarray, "layer batch head query"], queries: Bool[np.ndarray, "batch query"]
) -> Float[np.ndarray, "layer batch head"]:
    """The mean of each sequence over the queries that count.

    Raises:
        ValueError: if the shapes do not fit, or a sequence has no query that counts.
    """
    values, queries = np.asarray(values, float), np.asarray(queries, bool)
    if values.ndim != 4 or queries.shape != (values.shape[1], values.shape[3]):
        raise ValueError(
            "values must be [layer, batch, head, query] and queries [batch, query], "
            f"but are {list(values.shape)} and {list(queries.shape)}."
        )
    counts = queries.sum(axis=1)
    if not counts.all():
        raise ValueError(f"sequence {np.flatnonzero(counts == 0)[0]} has no query to take the mean over.")
    return np.where(queries[None, :, None], values, 0).sum(axis=-1) / counts[None, :, None]


def _checked(weights: Any) -> np.ndarray:
    """In float64, each row a distribution or 0: logits, or a transposed map, are neither."""
    weights = np.asarray(weights, float)
    if weights.ndim < 2:
        raise ValueError(f"attention weights must be [..., query, key], but are {list(weights.shape)}.")
    sums = weights.sum(axis=-1)
    if not ((weights >= 0).all() and (np.isclose(sums, 1, rtol=0, atol=ROUNDING) | (sums == 0)).all()):
        raise ValueError("a row of attention weights must sum to 1, or be 0 where the query is padding.")
    return weights


def _paired(weights: Any, allowed: Any) -> tuple[np.ndarray, np.ndarray]:
    weights, allowed = _checked(weights), np.asarray(allowed, bool)
    if weights.ndim != 5 or allowed.shape != (weights.shape[1], *weights.shape[3:]):
        raise ValueError(
            "weights must be [layer, batch, head, query, key] and allowed [batch, query, key], "
            f"but are {list(weights.shape)} and {list(allowed.shape)}."
        )
    if np.where(allowed[None, :, None], 0, weights).any():
        raise ValueError("a key has weight that its query may not look at.")
    return weights, allowed


# Maps of a text -------------------------------------------------------------------------------------------------------

Kind = Literal["encoder", "decoder", "cross", "self"]
START = "⟨start⟩"  # what a T5's decoder reads first; its tokenizer calls it padding


NAMES: dict[Kind, str] = {
    "cross": "cross-attention",
    "encoder": "encoder self-attention",
    "decoder": "decoder self-attention",
    "self": "self-attention",
}


class AttentionMaps(NamedTuple):
    """All heads of one kind of attention over one text, with the tokens of their rows and columns.

    Rows of self-attention belong to the token that is read; those of cross-attention to the token that is predicted,
    for this is the word which is being translated.
    """

    kind: Kind
    weights: Float[np.ndarray, "layer head query key"]
    allowed: Bool[np.ndarray, "query key"]
    queries: list[str]
    keys: list[str]
    source: str
    target: str | None  # of an encoder-decoder: given or, without special tokens, generated

    @property
    def name(self) -> str:
        """The kind in words, such as "cross-attention"."""
        return NAMES[self.kind]

    @property
    def axis_names(self) -> tuple[str, str]:
        """Names of the queries and of the keys, for a figure."""
        return ("target", "source") if self.kind == "cross" else ("query", "key")


class Link(NamedTuple):
    """The key that a query looks at most, and its weight."""

    query: int
    key: int
    weight: float


def attention_maps(
    loaded: Loaded, source: str, *, kind: Kind | None = None, target: str | None = None, max_new_tokens: int = 64
) -> AttentionMaps:
    """The maps of a text under a loaded model.

    Args:
        source: the text; of an encoder-decoder, what is to be translated, put to it as `translation.Form.of` says.
        kind: of an encoder-decoder "cross" (the default), "encoder" or "decoder"; else "self".
        target: an encoder-decoder's output; by default what greedy decoding gives, in at most `max_new_tokens`.

    Raises:
        ValueError: if the model has no tokenizer or no attention of this kind, or a text is empty, has a word that the
            tokenizer does not know, or does not fit.
    """
    if loaded.tokenizer is None:
        raise ValueError("the model has no tokenizer files, so that text cannot be turned into tokens.")
    kinds = ("cross", "encoder", "decoder") if isinstance(loaded.model, T5) else ("self",)
    kind = kinds[0] if kind is None else kind
    if kind not in kinds:
        raise ValueError(f"this model has attention of kind {', '.join(kinds)}, but none of kind {kind}.")
    translates = isinstance(loaded.model, T5)  # another model reads the text as it stands
    form = translation.Form.of(loaded) if translates else None
    tokens = translation.known_tokens(loaded.tokenizer, source, form=form)
    if translates:
        return _translated(loaded, source, tokens, kind, target, max_new_tokens)
    if target is not None:
        raise ValueError("a target is for encoder-decoder models: this one has no other text than its own.")
    weights = loaded.model.attention(loaded.params, jnp.asarray([tokens], jnp.int32))
    names = _names(loaded.tokenizer, tokens)
    return AttentionMaps(kind, np.asarray(weights)[:, 0], _allowed(tokens, causal=True), names, names, source, None)


def _translated(
    loaded: Loaded, source: str, tokens: list[int], kind: Kind, target: str | None, limit: int
) -> AttentionMaps:
    """Of an encoder-decoder."""
    tokenizer, batch = loaded.tokenizer, jnp.asarray([tokens], jnp.int32)
    written = (
        _greedy(loaded, batch, limit)
        if target is None
        else translation.known_tokens(tokenizer, target, name="the target")
    )
    shown = tokenizer.decode(written, skip_special_tokens=True) if target is None else target
    read = [loaded.model.config.decoder_start_token_id, *written[:-1]]
    maps = loaded.model.attention(loaded.params, batch, jnp.asarray([read], jnp.int32))
    weights = np.asarray(getattr(maps, kind))[:, 0]
    words, predicted = _names(tokenizer, tokens), _names(tokenizer, written)
    before = [START, *predicted[:-1]]
    queries, keys, allowed = {
        "encoder": (words, words, _allowed(tokens)),
        "decoder": (before, before, _allowed(read, causal=True)),
        "cross": (predicted, words, _allowed(read, tokens)),
    }[kind]
    return AttentionMaps(kind, weights, allowed, queries, keys, source, shown)


def _greedy(loaded: Loaded, source: Any, limit: int) -> list[int]:
    """The tokens of the model's own translation, its end included."""
    task = given(loaded.model, loaded.params, source, jnp.ones(source.shape, bool))
    eos = text.eos_ids(loaded.tokenizer, loaded.config)
    return translation.decoded(task, num_beams=1, length_penalty=1.0, limit=limit, eos=eos)[0]


def strongest_links(maps: AttentionMaps, *, layers: Sequence[int], heads: Sequence[int]) -> list[Link]:
    """For each query that has a choice, the key of most weight; in the order of the text.

    The weights are means over these layers and heads: a head that looks at one key whatever the query is counts as one
    among them, where a maximum would show nothing else.
    """
    mean = maps.weights[np.ix_(layers, heads)].mean(axis=(0, 1))
    queries = np.flatnonzero(maps.allowed.sum(axis=-1) > 1)
    return [Link(int(query), int(mean[query].argmax()), float(mean[query].max())) for query in queries]


def _allowed(queries: Sequence[int], keys: Sequence[int] | None = None, *, causal: bool = False) -> np.ndarray:
    valid = [None if side is None else np.ones((1, len(side)), bool) for side in (queries, keys)]
    return allowed_keys(*valid, causal=causal)[0]


def _names(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    return [tokenizer.decode([token]) for token in tokens]
