"""Rows of tokens with the tokens that count, and what a language model says of them: what every trainer stands on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxrl_llm.language_model import LanguageModel, Params, check_tokens
from jaxrl_llm.numerics import is_concrete
from jaxrl_llm.objectives import kl
from jaxrl_llm.objectives.logprobs import entropy, token_log_probs

CHUNK_LOGITS = 2**24  # of the logits that are held at once: 64 MiB in float32
Out = TypeVar("Out", bound=PyTree)


class Sequences(NamedTuple):
    """Rows of tokens, padded on either side. Further axes may stand before `time`, such as answers of a prompt."""

    tokens: Int[Array, "*batch time"]
    mask: Bool[Array, "*batch time"]  # real tokens
    answer: Bool[Array, "*batch time"]  # those that count: an answer's, EOS among them, and not its prompt's


def pad_answers(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, multiple: int = 1, length: int = 0
) -> Sequences:
    """Prompts with their answers as one batch, padded on the right to a multiple of `multiple`, at least to `length`.

    Raises:
        ValueError: if there are none, prompts and answers differ in number, or an answer is empty.
    """
    if not answers or len(prompts) != len(answers):
        raise ValueError(f"each answer needs its prompt, but there are {len(prompts)} prompts for {len(answers)}.")
    if not all(map(len, answers)):
        raise ValueError(f"answer {next(i for i, row in enumerate(answers) if not len(row))} is empty.")
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    length = -(-max(length, *map(len, rows), 1) // multiple) * multiple
    tokens = np.zeros((len(rows), length), np.int32)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    ends, starts = (np.asarray([*map(len, each)])[:, None] for each in (rows, prompts))
    index = np.arange(length)
    return Sequences(tokens, index < ends, (index >= starts) & (index < ends))


def check_sequences(lm: LanguageModel, sequences: Sequences, *, name: str = "sequences") -> None:
    """Raise unless each row is tokens of the model, with an answer of a token or more that something precedes.

    Raises:
        ValueError: naming what is wrong. Under `jit` only shapes and dtypes can be read.
    """
    flat = rows_of(sequences)
    check_tokens(lm, jnp.asarray(flat.tokens), jnp.asarray(flat.mask), name=f"{name}.tokens")
    if flat.answer.shape != flat.mask.shape:
        raise ValueError(f"{name}.answer must have the shape of {name}.mask, but has {list(flat.answer.shape)}.")
    if not all(map(is_concrete, flat)):
        return
    answer, mask = np.asarray(flat.answer), np.asarray(flat.mask)
    if (answer & ~mask).any():
        raise ValueError(f"{name}.answer must mark real tokens, but marks padding in row {_first(answer & ~mask)}.")
    if not answer.any(axis=1).all():
        raise ValueError(f"row {answer.any(axis=1).argmin()} of {name} has no answer.")
    unpreceded = answer & (np.cumsum(mask, axis=1) <= lm.min_prompt_length)
    if unpreceded.any():
        raise ValueError(
            f"row {_first(unpreceded)} of {name} has an answer without {lm.min_prompt_length} token before it."
        )


def rows_of(sequences: Sequences) -> Sequences:
    """The same rows along one axis."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), sequences)


def stacked(*parts: Sequences) -> Sequences:
    """Batches of one length, one after the other.

    Raises:
        ValueError: if their lengths differ.
    """
    lengths = {part.tokens.shape[-1] for part in parts}
    if len(lengths) > 1:
        raise ValueError(f"sequences of one batch must have one padded length, but have {sorted(lengths)}.")
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def log_probs(
    lm: LanguageModel, params: Params, sequences: Sequences, *, temperature: float | Array = 1.0
) -> Float[Array, "batch time"]:
    """log π of every token of an answer given what stands before it, in nats; 0 at all other places.

    Of the law softmax(logits / temperature). The logits are held for a part of the places at a time, in the gradient
    too.
    """

    def of_places(hidden: Array, tokens: Array) -> Array:
        return token_log_probs(lm.logits(params, hidden) / temperature, tokens)

    hidden = hidden_before(lm, params, sequences)
    tokens = jnp.where(sequences.answer, sequences.tokens, 0)
    found = by_places(of_places, lm.vocab_size, hidden, tokens)
    return jnp.where(sequences.answer, found, 0)


class Measures(NamedTuple):
    """What policy and reference say of the tokens of answers, in nats; 0 at all other places."""

    logp_policy: Float[Array, "batch time"]
    logp_ref: Float[Array, "batch time"]
    entropy: Float[Array, "batch time"]  # of the policy's law of the token
    kl: Float[Array, "batch time"]  # KL(policy‖ref) of the two laws of the token: its sum is Rao-Blackwell's estimate


def measures(
    lm: LanguageModel, params: Params, ref_params: Params, sequences: Sequences, *, temperature: float | Array = 1.0
) -> Measures:
    """`log_probs` of policy and reference, and what their whole laws say; no gradient is meant to flow."""

    def of_places(hidden: Array, hidden_ref: Array, tokens: Array) -> Measures:
        policy = lm.logits(params, hidden) / temperature
        ref = lm.logits(ref_params, hidden_ref) / temperature
        return Measures(
            token_log_probs(policy, tokens), token_log_probs(ref, tokens), entropy(policy), kl.exact_kl(policy, ref)
        )

    hidden, hidden_ref = (hidden_before(lm, each, sequences) for each in (params, ref_params))
    tokens = jnp.where(sequences.answer, sequences.tokens, 0)
    found = by_places(of_places, lm.vocab_size, hidden, hidden_ref, tokens)
    return jax.tree.map(lambda leaf: jax.lax.stop_gradient(jnp.where(sequences.answer, leaf, 0)), found)


def hidden_before(lm: LanguageModel, params: Params, sequences: Sequences) -> Float[Array, "batch time width"]:
    """The hidden state that each token is predicted from. Of a model without a root, it means nothing at the first."""
    tokens, mask = sequences.tokens, sequences.mask
    if lm.min_prompt_length:
        hidden, _ = lm.hidden(params, tokens[:, :-1], mask=mask[:, :-1])
        return jnp.pad(hidden, ((0, 0), (1, 0), (0, 0)))
    before = ((0, 0), (1, 0))  # a place that is padding has the state of what stands before: of nothing, the root's
    hidden, _ = lm.hidden(params, jnp.pad(tokens[:, :-1], before), mask=jnp.pad(mask[:, :-1], before))
    return hidden


def by_places(function: Callable[..., Out], vocab_size: int, *arrays: Array) -> Out:
    """`function` of arrays [batch, time, ...] for some places in time at once, if their logits are many.

    What it computes inside is computed anew for the gradient, and never held for all places.
    """
    batch, time = arrays[0].shape[:2]
    size = max(1, CHUNK_LOGITS // max(1, batch * vocab_size))
    if size >= time:
        return function(*arrays)
    chunks = -(-time // size)
    size = -(-time // chunks)  # even ones

    def cut(array: Array) -> Array:
        padding = [(0, 0)] * array.ndim
        padding[1] = (0, chunks * size - time)
        return jnp.moveaxis(jnp.pad(array, padding).reshape(batch, chunks, size, *array.shape[2:]), 1, 0)

    found = jax.lax.map(jax.checkpoint(lambda parts: function(*parts)), tuple(map(cut, arrays)))
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(batch, chunks * size)[:, :time], found)


def _first(marked: Bool[np.ndarray, "batch time"]) -> int:
    return int(marked.any(axis=1).argmax())
