"""Texts that are longer than the model's context: a window that moves on by half, read anew each time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from jaxrl_llm import language_model, text
from jaxrl_llm.decoding import core
from jaxrl_llm.decoding.constraints import StopStrings
from jaxrl_llm.decoding.core import Generation, Request
from jaxrl_llm.decoding.generate import State, advance_jit, choose, start
from jaxrl_llm.decoding.transforms import Transform
from jaxrl_llm.language_model import LanguageModel, Params

PIECE = 16  # steps of a program; the last ones before a window is full are single


def slide(
    lm: LanguageModel,
    params: Params,
    prompts: Int[Array, "batch prompt"] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Int[Array, "batch"],
    transform: Transform | Sequence[Transform] | None = None,
    greedy: bool = False,
    key: Key[Array, "*#batch"] | None = None,
    prompt_mask: Bool[Array, "batch prompt"] | None = None,
    eos_id: int | Sequence[int] | Int[Array, "*eos"] | None = None,
    pad_id: int | Int[Array, ""] = 0,
    stop: StopStrings | None = None,
    n: int = 1,
) -> Generation:
    """Continue each prompt as `generate` does, beyond the model's context of C tokens.

    The model sees a window of the text. The first is the prompt, or its last C // 2 tokens if it has C or more. Tokens
    are added to the window until it has C; then the window is the last C // 2 of them, which the model reads anew, as a
    text that begins there (at position 0, without the tokens before). So every token is chosen by between C // 2 and
    C − 1 tokens before it, once the first window is full:

        p(y_t | x, y_<t) = p(y_t | window),   and `logp` is the logarithm of that

    Transforms and stop strings see the whole text, as in `generate`. Rows are decoded one after the other. Where the
    prompt and its new tokens fit the context, the tokens are those of `generate`.

    The arguments are those of `generate`; there is no `guidance`.

    Raises:
        ValueError, FloatingPointError: as `generate` does, but for a prompt that leaves no room in the context.
    """
    request = core.request(
        lm, prompts, prompt_mask, max_new_tokens=max_new_tokens, transform=transform, greedy=greedy, key=key,
        eos_id=eos_id, pad_id=pad_id, stop=stop, n=n, bounded=False,
    )  # fmt: skip
    batch, length = request.limits.shape[0], core.longest(max_new_tokens)
    rows = [_joined(windows(lm, params, request.take(jnp.asarray([row]))), request, length) for row in range(batch)]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)


def slide_stream(
    lm: LanguageModel,
    params: Params,
    prompt: Int[Array, "1 prompt"] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Int[Array, "1"],
    transform: Transform | Sequence[Transform] | None = None,
    greedy: bool = False,
    key: Key[Array, "*#1"] | None = None,
    prompt_mask: Bool[Array, "1 prompt"] | None = None,
    eos_id: int | Sequence[int] | Int[Array, "*eos"] | None = None,
    pad_id: int | Int[Array, ""] = 0,
    stop: StopStrings | None = None,
) -> Iterator[Generation]:
    """The tokens of `slide` for a single prompt, in pieces as they are known. The arguments are those of `slide`."""
    request = core.request(
        lm, prompt, prompt_mask, max_new_tokens=max_new_tokens, transform=transform, greedy=greedy, key=key,
        eos_id=eos_id, pad_id=pad_id, stop=stop, bounded=False,
    )  # fmt: skip
    if request.limits.shape[0] != 1:
        raise ValueError(f"slide_stream takes one prompt, but is given {request.limits.shape[0]}.")
    return windows(lm, params, request)


def windows(lm: LanguageModel, params: Params, request: Request) -> Iterator[Generation]:
    """Decode the one row of a request."""
    context = lm.max_length
    if context < 2:
        raise ValueError(f"a context that slides must have at least 2 tokens, but has {context}.")
    written = np.asarray(request.prompts)[np.asarray(request.mask)].tolist()
    window, state, count = written if len(written) < context else written[-(context // 2) :], None, 0
    while state is None or not bool(state.done.all()):
        room = context - len(window)
        tokens, mask = text.left_pad([window], length=core.prompt_bucket(len(window)))
        slots = tokens.shape[1] + core.step_bucket(room)
        state, piece = _read(lm, params, request, state, tokens, mask, num_slots=slots)
        piece = jax.tree.map(lambda leaf: leaf[:, None], piece)
        while True:
            new = np.asarray(piece.tokens)[np.asarray(piece.mask)].tolist()
            yield core.check_generation(jax.tree.map(lambda leaf, new=new: leaf[:, : len(new)], piece), start=count)
            window, room, count = window + new, room - len(new), count + len(new)
            if room == 0 or bool(state.done.all()):
                break
            state, piece = advance_jit(lm, params, state, request, num_steps=PIECE if room >= PIECE else 1)
        window = window[-(context // 2) :]


def _joined(pieces: Iterator[Generation], request: Request, length: int) -> Generation:
    """The pieces of a row as one, padded to `length`."""
    whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *pieces)
    missing = ((0, 0), (0, length - whole.tokens.shape[1]))
    padded = jax.tree.map(lambda leaf: jnp.pad(leaf, missing), whole)
    return dataclasses.replace(padded, tokens=jnp.where(padded.mask, padded.tokens, request.pad_id))


@functools.partial(jax.jit, static_argnames=("lm", "num_slots"))
def _read(
    lm: LanguageModel,
    params: Params,
    request: Request,
    state: State | None,
    tokens: Array,
    mask: Array,
    *,
    num_slots: int,
) -> tuple[State, Generation]:
    """Read a window into an empty cache, and choose the next token."""
    cache = lm.init_cache(1, num_slots, dtype=language_model.params_dtype(params))
    found = core.read(lm, params, cache, tokens, mask)
    logits = lm.logits(params, found.last)
    if state is None:
        return start(request, logits, found.cache)
    return choose(request, logits, dataclasses.replace(state, cache=found.cache))
