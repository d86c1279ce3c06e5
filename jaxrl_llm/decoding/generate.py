"""Generation as one compiled scan, whole or in pieces."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from jaxrl_llm.decoding import checks, loop
from jaxrl_llm.decoding.checks import Guidance
from jaxrl_llm.decoding.loop import Generation, Rules
from jaxrl_llm.decoding.stopping import StopStrings
from jaxrl_llm.decoding.transforms import Transform
from jaxrl_llm.language_model import LanguageModel, Params

STEP_BUCKET = 2 * loop.BLOCK


def generate(
    lm: LanguageModel,
    params: Params,
    prompts: Int[Array, "batch prompt"],
    *,
    max_new_tokens: int | Int[Array, "batch"],
    transform: Transform | None = None,
    greedy: bool = False,
    key: Key[Array, "*#batch"] | None = None,
    prompt_mask: Bool[Array, "batch prompt"] | None = None,
    eos_id: int | Sequence[int] | Int[Array, "*eos"] | None = None,
    pad_id: int | Int[Array, ""] = 0,
    stop: StopStrings | None = None,
    guidance: Guidance | None = None,
) -> Generation:
    """Continue each prompt by up to `max_new_tokens` tokens, drawn from the model or greedily.

    One compiled program serves all temperatures, keys, prompts and numbers of tokens of a bucket (prompts: the next
    power of two, at least 16; new tokens: the next multiple of 16). When all rows have ended it stops computing.

    Args:
        max_new_tokens: of all rows, or of each. The longest is what the program is compiled for.
        transform: warps the logits before a token is chosen (`jaxrl_llm.decoding.transforms`).
        greedy: take the most probable token; no key is needed then.
        key: one key, from which each row derives its own by its index, or one key a row. A row's tokens depend on its
            prompt and its key alone, not on the batch, the padding or the bucket, as far as rounding lets them: in
            bfloat16 the logits of other batch sizes differ by about 0.01, which can turn a close choice.
        prompt_mask: false at padding, which may stand on the left, on the right or between.
        eos_id: the token, or any of the tokens, that ends a row.
        stop: strings that end a row when its new text contains one (`decoding.stopping.stop_strings`); the token that
            completes one is the row's last.
        guidance: a second prompt of every row, and how far to move away from what follows it (classifier-free
            guidance). `logp` stays that of the first prompt.

    Raises:
        ValueError: for shapes, dtypes and token ids that do not fit, a prompt that is empty (where the model has no
            root state) or leaves no room in the model's context, or a missing key.
        FloatingPointError: if the model's logits are NaN, or no token is possible. (Under an outer `jit` values cannot
            be read: there `logp` is not finite from that token on.)
    """
    prompt, rules, longest = _request(
        lm, prompts, max_new_tokens, transform, greedy, key, prompt_mask, eos_id, pad_id, stop, guidance
    )
    generation = decode(lm, params, *prompt, rules, longest, num_steps=_step_bucket(longest))
    return checks.check_finite(jax.tree.map(lambda leaf: leaf[:, :longest], generation))


def stream(
    lm: LanguageModel,
    params: Params,
    prompts: Int[Array, "batch prompt"],
    *,
    max_new_tokens: int | Int[Array, "batch"],
    tokens_at_a_time: int = 8,
    transform: Transform | None = None,
    greedy: bool = False,
    key: Key[Array, "*#batch"] | None = None,
    prompt_mask: Bool[Array, "batch prompt"] | None = None,
    eos_id: int | Sequence[int] | Int[Array, "*eos"] | None = None,
    pad_id: int | Int[Array, ""] = 0,
    stop: StopStrings | None = None,
    guidance: Guidance | None = None,
) -> Iterator[Generation]:
    """The same tokens as `generate`, as soon as they are known: the first, then pieces of `tokens_at_a_time`."""
    if tokens_at_a_time < 1:
        raise ValueError(f"tokens_at_a_time must be at least 1, but is {tokens_at_a_time}.")
    prompt, rules, longest = _request(
        lm, prompts, max_new_tokens, transform, greedy, key, prompt_mask, eos_id, pad_id, stop, guidance
    )
    return _pieces(lm, params, prompt, rules, longest, tokens_at_a_time)  # checked now, generated when asked for


def _pieces(
    lm: LanguageModel,
    params: Params,
    prompt: tuple[Int[Array, "batch prompt"], Bool[Array, "batch prompt"]],
    rules: Rules,
    max_new_tokens: int,
    tokens_at_a_time: int,
) -> Iterator[Generation]:
    num_slots = prompt[0].shape[1] + _step_bucket(max_new_tokens)
    state, first = _prefill_jit(lm, params, *prompt, rules, num_slots=num_slots)
    yield checks.check_finite(jax.tree.map(lambda leaf: leaf[:, None], first))
    remaining = max_new_tokens - 1
    while remaining > 0 and not bool(state.done.all()):
        state, piece = _advance_jit(lm, params, state, rules, max_new_tokens, num_steps=tokens_at_a_time)
        piece = jax.tree.map(lambda leaf, count=remaining: leaf[:, :count], piece)
        yield checks.check_finite(piece, start=max_new_tokens - remaining)
        remaining -= tokens_at_a_time


def _request(
    lm, prompts, max_new_tokens, transform, greedy, key, prompt_mask, eos_id, pad_id, stop, guidance
) -> tuple[tuple[Array, Array], Rules, int]:
    """What was asked for, checked: the bucketed prompts with their mask, the rules, the most tokens of a row."""
    prompts = jnp.asarray(prompts)
    limits = checks.row_limits(max_new_tokens, prompts.shape[0] if prompts.ndim else 1, transform)
    longest = int(np.max(max_new_tokens, initial=1))
    prompts, mask = checks.bucketed_prompts(lm, prompts, prompt_mask, max_new_tokens=limits)
    if stop is not None and not isinstance(stop, StopStrings):
        raise ValueError(f"stop must be made by decoding.stop_strings, but is {stop!r}.")
    batch = prompts.shape[0]
    scale = None
    if guidance is not None:
        prompts, mask, scale = checks.with_guidance(lm, prompts, mask, guidance, max_new_tokens=limits)
    rules = Rules(
        transform=transform,
        keys=None if greedy else checks.row_keys(key, batch),
        eos_ids=checks.eos_array(eos_id),
        pad_id=jnp.asarray(pad_id, jnp.int32),
        limits=jnp.asarray(limits),
        stop=stop,
        guidance_scale=scale,
    )
    return (prompts, mask), rules, longest


def _step_bucket(max_new_tokens: int) -> int:
    """Steps to compile for: the first token comes with the prefill, the others are rounded up to a bucket."""
    return max(1, -(-(max_new_tokens - 1) // STEP_BUCKET)) * STEP_BUCKET


@functools.partial(jax.jit, static_argnames=("lm", "num_steps"))
def decode(
    lm: LanguageModel,
    params: Params,
    prompts: Int[Array, "batch prompt"],
    prompt_mask: Bool[Array, "batch prompt"],
    rules: Rules,
    max_new_tokens: Int[Array, ""],
    *,
    num_steps: int,
) -> Generation:
    """The compiled whole of `generate`: prefill, then up to `num_steps` steps."""
    state, first = loop.prefill(lm, params, prompts, prompt_mask, rules, num_slots=prompts.shape[1] + num_steps)
    _, rest = loop.advance(lm, params, state, rules, max_new_tokens, num_steps=num_steps)
    return jax.tree.map(lambda head, tail: jnp.concatenate([head[:, None], tail], axis=1), first, rest)


_prefill_jit = functools.partial(jax.jit, static_argnames=("lm", "num_slots"))(loop.prefill)
_advance_jit = functools.partial(jax.jit, static_argnames=("lm", "num_steps"), donate_argnames="state")(loop.advance)
