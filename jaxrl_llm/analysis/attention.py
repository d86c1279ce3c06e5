"""Attention of a model: the maps of a text with its tokens, and measures of any weights.

Weights are those of `attention` of any model of the library, [layer, batch, head, query, key]: a row sums to 1 over the
keys that its query may attend to, and is 0 where the query is padding. Measures keep one value for each query;
`mean_over_queries` alone takes means, one for each sequence, so that intervals can be taken over sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxrl_llm import text, translation
from jaxrl_llm.language_model import check_tokens
from jaxrl_llm.mesh import everywhere
from jaxrl_llm.models import T5, Loaded
from jaxrl_llm.models.conditional import given
from jaxrl_llm.models.t5 import T5LM

ROUNDING = 1e-3  # of a row's sum, also in bfloat16


def allowed_keys(
    queries: Bool[np.ndarray, "batch query"],
    keys: Bool[np.ndarray, "batch key"] | None = None,
    *,
    causal: bool = False,
) -> Bool[np.ndarray, "batch query key"]:
    """Return the attention mask: valid keys, with `causal` only up to the query; none for queries that are padding.

    Args:
        queries: true for valid queries.
        keys: true for valid keys; by default `queries`, as in self-attention.

    Raises:
        ValueError: for masks that are not [batch, time], or causal attention between two sequences.
    """
    queries = np.asarray(queries, bool)
    if causal and keys is not None:
        raise ValueError("causal attention must be self-attention: leave out keys.")
    keys = queries if keys is None else np.asarray(keys, bool)
    if queries.ndim != 2 or keys.ndim != 2 or len(queries) != len(keys):
        raise ValueError(f"masks must be [batch, time], but are {list(queries.shape)} and {list(keys.shape)}.")
    allowed = queries[:, :, None] & keys[:, None, :]
    return allowed & np.tri(queries.shape[1], dtype=bool) if causal else allowed


def entropy(weights: Float[Any, "*batch query key"]) -> Float[np.ndarray, "*batch query"]:
    """Return the entropy of each query's weights, in nats.

        H = −Σ_k w_k log w_k,    0 log 0 = 0

    H is 0 if one key has all weight, and log n for n equal weights; exp H is the effective number of keys.

    Raises:
        ValueError: if a row is neither a distribution nor 0, as for padding.
    """
    weights = _checked(weights)
    return -(weights * np.log(np.where(weights > 0, weights, 1.0))).sum(axis=-1) + 0.0


def normalised_entropy(
    weights: Float[Any, "layer batch head query key"], allowed: Bool[np.ndarray, "batch query key"]
) -> Float[np.ndarray, "layer batch head query"]:
    """Return H / log n, where n is the number of allowed keys of the query: from 0 for one key to 1 for equal weights.

    It makes rows of different length comparable. A query with one allowed key gets 0: leave it out of means,
    `mean_over_queries(values, allowed.sum(axis=-1) > 1)`.

    Raises:
        ValueError: as `entropy`, and if a key that is not allowed has weight.
    """
    weights, allowed = _paired(weights, allowed)
    counts = allowed.sum(axis=-1)[None, :, None]
    return entropy(weights) / np.log(np.maximum(counts, 2))


class Shares(NamedTuple):
    """The shares of each query's weight on each kind of key; they sum to 1.

    A key of two kinds (the first may also be the previous one) counts for the kind that is listed first.
    """

    own: Float[np.ndarray, "layer batch head query"]  # the query's own position
    previous: Float[np.ndarray, "layer batch head query"]  # the position before it
    next: Float[np.ndarray, "layer batch head query"]  # the position after it
    first: Float[np.ndarray, "layer batch head query"]  # the first valid position of the sequence
    last: Float[np.ndarray, "layer batch head query"]  # the last valid position: `</s>` in an encoder's source
    other: Float[np.ndarray, "layer batch head query"]


def shares(weights: Float[Any, "layer batch head query key"], allowed: Bool[np.ndarray, "batch query key"]) -> Shares:
    """Return the shares of self-attention weight by position, relative to the query and the ends of the sequence.

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
    """Return the mean of each sequence over the marked queries.

    Raises:
        ValueError: if the shapes do not fit, or a sequence has no marked query.
    """
    values, queries = np.asarray(values, float), np.asarray(queries, bool)
    if values.ndim != 4 or queries.shape != (values.shape[1], values.shape[3]):
        raise ValueError(
            "values must be [layer, batch, head, query] and queries [batch, query], "
            f"but are {list(values.shape)} and {list(queries.shape)}."
        )
    counts = queries.sum(axis=1)
    if not counts.all():
        raise ValueError(
            f"queries must mark a query of every sequence, but sequence {np.flatnonzero(counts == 0)[0]} has none."
        )
    return np.where(queries[None, :, None], values, 0).sum(axis=-1) / counts[None, :, None]


def _checked(weights: Any) -> np.ndarray:
    """Return the weights in float64; raise if a row is neither a distribution nor 0, as in a transposed map."""
    weights = np.asarray(weights, float)
    if weights.ndim < 2:
        raise ValueError(f"attention weights must be [..., query, key], but are {list(weights.shape)}.")
    sums = weights.sum(axis=-1)
    if not ((weights >= 0).all() and (np.isclose(sums, 1, rtol=0, atol=ROUNDING) | (sums == 0)).all()):
        raise ValueError("a row of attention weights must sum to 1, or be 0 if the query is padding.")
    return weights


def _paired(weights: Any, allowed: Any) -> tuple[np.ndarray, np.ndarray]:
    weights, allowed = _checked(weights), np.asarray(allowed, bool)
    if weights.ndim != 5 or allowed.shape != (weights.shape[1], *weights.shape[3:]):
        raise ValueError(
            "weights must be [layer, batch, head, query, key] and allowed [batch, query, key], "
            f"but are {list(weights.shape)} and {list(allowed.shape)}."
        )
    if np.where(allowed[None, :, None], 0, weights).any():
        raise ValueError("a key that is not allowed must have weight 0, but one has more.")
    return weights, allowed


# Maps of a text -------------------------------------------------------------------------------------------------------

Kind = Literal["encoder", "decoder", "cross", "self"]
START = "⟨start⟩"  # the first token that a T5's decoder reads; in its tokenizer it is the padding token


NAMES: dict[Kind, str] = {
    "cross": "cross-attention",
    "encoder": "encoder self-attention",
    "decoder": "decoder self-attention",
    "self": "self-attention",
}


class AttentionMaps(NamedTuple):
    """All heads of one kind of attention over one text, with the tokens of their rows and columns.

    Rows of self-attention belong to the token that is read. Rows of cross-attention belong to the token that is
    predicted, which is the word that is being translated.
    """

    kind: Kind
    weights: Float[np.ndarray, "layer head query key"]
    allowed: Bool[np.ndarray, "query key"]
    queries: list[str]
    keys: list[str]
    source: str
    target: str | None  # for an encoder-decoder: as given, or as generated, without special tokens

    @property
    def name(self) -> str:
        """Return the kind in words, such as "cross-attention"."""
        return NAMES[self.kind]

    @property
    def axis_names(self) -> tuple[str, str]:
        """Return the names of queries and keys, for a figure."""
        return ("target", "source") if self.kind == "cross" else ("query", "key")


class Link(NamedTuple):
    """The key with the largest weight of a query, and the weight."""

    query: int
    key: int
    weight: float


def attention_maps(
    loaded: Loaded, source: str, *, kind: Kind | None = None, target: str | None = None, max_new_tokens: int = 64
) -> AttentionMaps:
    """Compute the attention maps of a text under a loaded model.

    Args:
        source: the text; for an encoder-decoder the text to translate, in the form of `translation.Form.of`.
        kind: "cross" (the default), "encoder" or "decoder" for an encoder-decoder, else "self".
        target: the output of an encoder-decoder; by default it is decoded greedily, with at most `max_new_tokens`.

    Raises:
        ValueError: if the model has no tokenizer or no attention of this kind, or a text is empty, too long or has a
            word that is not in the tokenizer's vocabulary.
    """
    if loaded.tokenizer is None:
        raise ValueError("the model must have a tokenizer, but its folder has no tokenizer files.")
    kinds = ("cross", "encoder", "decoder") if isinstance(loaded.model, T5) else ("self",)
    kind = kinds[0] if kind is None else kind
    if kind not in kinds:
        raise ValueError(f"kind must be one of {', '.join(kinds)} for this model, but is {kind}.")
    translates = isinstance(loaded.model, T5)  # other models read the text unchanged
    form = translation.Form.of(loaded) if translates else None
    tokens = translation.known_tokens(loaded.tokenizer, source, form=form)
    if translates:
        return _translated(loaded, source, tokens, kind, target, max_new_tokens)
    if target is not None:
        raise ValueError("a target must be left out for a decoder-only model: it has no text but its own.")
    weights = _attention(loaded, jnp.asarray([tokens], jnp.int32))
    names = text.token_texts(loaded.tokenizer, tokens)
    return AttentionMaps(kind, np.asarray(weights)[:, 0], _allowed(tokens, causal=True), names, names, source, None)


def _translated(
    loaded: Loaded, source: str, tokens: list[int], kind: Kind, target: str | None, limit: int
) -> AttentionMaps:
    """Compute the maps of an encoder-decoder."""
    tokenizer, batch = loaded.tokenizer, jnp.asarray([tokens], jnp.int32)
    eos = text.eos_ids(tokenizer, loaded.config | {"vocab_size": loaded.model.vocab_size})
    written = (
        _greedy(loaded, batch, limit, eos)
        if target is None
        else translation.known_tokens(tokenizer, target, name="the target")
    )
    shown = translation.decoded_text(tokenizer, written, eos) if target is None else target
    read = [loaded.model.config.decoder_start_token_id, *written[:-1]]
    maps = _attention(loaded, batch, jnp.asarray([read], jnp.int32))
    weights = np.asarray(getattr(maps, kind))[:, 0]
    words, predicted = (text.token_texts(tokenizer, each) for each in (tokens, written))
    before = [START, *predicted[:-1]]
    queries, keys, allowed = {
        "encoder": (words, words, _allowed(tokens)),
        "decoder": (before, before, _allowed(read, causal=True)),
        "cross": (predicted, words, _allowed(read, tokens)),
    }[kind]
    return AttentionMaps(kind, weights, allowed, queries, keys, source, shown)


_compiled = jax.jit(lambda model, params, *tokens: everywhere(model.attention(params, *tokens)), static_argnums=0)


def _attention(loaded: Loaded, *tokens: Array) -> Any:
    """Return `attention` of the model as one program; inside of it the ids could not be checked."""
    lm = T5LM(loaded.model.config, 1) if isinstance(loaded.model, T5) else loaded.model
    for each in tokens:
        check_tokens(lm, each, None)
    return _compiled(loaded.model, loaded.params, *tokens)


def _greedy(loaded: Loaded, source: Any, limit: int, eos: Sequence[int]) -> list[int]:
    """Return the tokens of the model's greedy translation, EOS included."""
    task = given(loaded.model, loaded.params, source, jnp.ones(source.shape, bool))
    return translation.decoded(task, num_beams=1, length_penalty=1.0, limit=limit, eos=eos)[0]


def strongest_links(maps: AttentionMaps, *, layers: Sequence[int], heads: Sequence[int]) -> list[Link]:
    """Return the key with the largest weight for each query with more than one allowed key, in the order of the text.

    The weights are means over these layers and heads. A maximum over heads would show only heads that attend to one key
    for every query.
    """
    mean = maps.weights[np.ix_(layers, heads)].mean(axis=(0, 1))
    queries = np.flatnonzero(maps.allowed.sum(axis=-1) > 1)
    return [Link(int(query), int(mean[query].argmax()), float(mean[query].max())) for query in queries]


def _allowed(queries: Sequence[int], keys: Sequence[int] | None = None, *, causal: bool = False) -> np.ndarray:
    valid = [None if side is None else np.ones((1, len(side)), bool) for side in (queries, keys)]
    return allowed_keys(*valid, causal=causal)[0]
