"""The attention maps of one text, with the tokens that their rows and columns belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxrl_llm import text, translation
from jaxrl_llm.analysis.attention import allowed_keys
from jaxrl_llm.models import T5, Loaded
from jaxrl_llm.models.conditional import given

Kind = Literal["encoder", "decoder", "cross", "self"]
START = "⟨start⟩"  # what a T5's decoder reads first; its tokenizer calls it padding


class TextMaps(NamedTuple):
    """All heads of one kind of attention over one text.

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


class Link(NamedTuple):
    """The key that a query looks at most, and its weight."""

    query: int
    key: int
    weight: float


def text_maps(
    loaded: Loaded, source: str, *, kind: Kind | None = None, target: str | None = None, max_new_tokens: int = 64
) -> TextMaps:
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
    return TextMaps(kind, np.asarray(weights)[:, 0], _allowed(tokens, causal=True), names, names, source, None)


def _translated(loaded: Loaded, source: str, tokens: list[int], kind: Kind, target: str | None, limit: int) -> TextMaps:
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
    return TextMaps(kind, weights, allowed, queries, keys, source, shown)


def _greedy(loaded: Loaded, source: Any, limit: int) -> list[int]:
    """The tokens of the model's own translation, its end included."""
    task = given(loaded.model, loaded.params, source, jnp.ones(source.shape, bool))
    eos = text.eos_ids(loaded.tokenizer, loaded.config)
    return translation.decoded(task, num_beams=1, length_penalty=1.0, limit=limit, eos=eos)[0]


def strongest_links(maps: TextMaps, *, layers: Sequence[int], heads: Sequence[int]) -> list[Link]:
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
