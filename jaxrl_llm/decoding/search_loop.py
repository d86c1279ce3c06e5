"""What the searches share: their prompts, the scan over steps, and checks before and after."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm import language_model
from jaxrl_llm.decoding import checks, loop
from jaxrl_llm.decoding.generate import STEP_BUCKET
from jaxrl_llm.decoding.transforms.base import Transform
from jaxrl_llm.language_model import Cache, LanguageModel, Params
from jaxrl_llm.numerics import is_concrete

State = TypeVar("State")


def request(
    lm: LanguageModel,
    prompts: Array,
    prompt_mask: Array | None,
    max_new_tokens: int | Array,
    transform: Transform | None,
) -> tuple[Int[Array, "batch bucket"], Bool[Array, "batch bucket"], Int[Array, "batch"], int]:
    """The prompts and their mask, checked and with all padding on the left; the rows' limits; the longest of them."""
    prompts = jnp.asarray(prompts)
    limits = checks.row_limits(max_new_tokens, prompts.shape[0] if prompts.ndim else 1, transform, per_row=False)
    prompts, mask = checks.bucketed_prompts(lm, prompts, prompt_mask, max_new_tokens=limits)
    order = jnp.argsort(mask, axis=1, stable=True)
    prompts, mask = (jnp.take_along_axis(each, order, axis=1) for each in (prompts, mask))
    return prompts, mask, jnp.asarray(limits), int(np.max(max_new_tokens, initial=1))


def step_bucket(max_new_tokens: int) -> int:
    """Steps to compile for after the first token, which comes with the prompt."""
    return max(1, -(-(max_new_tokens - 1) // STEP_BUCKET)) * STEP_BUCKET


def prefill(
    lm: LanguageModel, params: Params, prompts: Array, prompt_mask: Array, *, num_slots: int
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """The logits after prompts that are padded on the left, and their cache, of `num_slots` slots."""
    cache = lm.init_cache(prompts.shape[0], num_slots, dtype=language_model.params_dtype(params))
    hidden, cache = lm.hidden(params, prompts, cache, mask=prompt_mask)
    return lm.logits(params, hidden[:, -1]), cache


def run_blocks(
    step: Callable[[State], State], state: State, unfinished: Callable[[State], Array], *, num_steps: int
) -> State:
    """Up to `num_steps` steps, in scans of `loop.BLOCK`; the end is looked for between the scans."""
    block = math.gcd(num_steps, loop.BLOCK)

    def goes_on(carry: tuple[State, Array]) -> Array:
        return (carry[1] < num_steps) & unfinished(carry[0])

    def run_block(carry: tuple[State, Array]) -> tuple[State, Array]:
        state = jax.lax.scan(lambda state, _: (step(state), None), carry[0], length=block)[0]
        return state, carry[1] + block

    return jax.lax.while_loop(goes_on, run_block, (state, jnp.zeros((), jnp.int32)))[0]


def check_law(log_prob: Float[Array, "batch ..."]) -> None:
    """Raise where the model's law broke down, which shows as NaN."""
    if is_concrete(log_prob):
        broken = np.isnan(log_prob).any(axis=tuple(range(1, log_prob.ndim)))
        if broken.any():
            raise FloatingPointError(
                f"row {broken.argmax()} could not be continued: the model's logits are NaN, +inf, or all −inf."
            )


def check_sizes(**sizes: tuple[int, int]) -> None:
    """Raise unless each named (size, least) is an integer of at least that."""
    for name, (size, least) in sizes.items():
        if not isinstance(size, int | np.integer) or isinstance(size, bool) or size < least:
            raise ValueError(f"{name} must be an integer of at least {least}, but is {size!r}.")


def length_exponent(value: float | Array, longest: int) -> Float[Array, ""]:
    """The length penalty, refused where length**penalty would leave the range of float32."""
    number = penalty("length_penalty", value)
    if is_concrete(number) and abs(float(number)) * math.log(longest + 1) > 80:
        raise ValueError(f"length_penalty is {value}: a length of {longest} to that power is out of range.")
    return number


def penalty(name: str, value: float | Array, *, low: float = -math.inf) -> Float[Array, ""]:
    """A penalty as an array: one finite number of at least `low`."""
    number = jnp.asarray(value, jnp.result_type(float))
    if number.ndim or (is_concrete(number) and not (jnp.isfinite(number) and number >= low)):
        least = "" if low == -math.inf else f" of at least {low}"
        raise ValueError(f"{name} must be one finite number{least}, but is {value}.")
    return number
