"""What answers are worth: functions of text or tokens, or a reward model."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrl_llm.language_model import Params
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.numerics import is_concrete
from jaxrl_llm.scoring import Sequences
from jaxrl_llm.training.rollout import Rollout

RewardFn = Callable[[Rollout], Float[Array, "batch"]]
TextReward = Callable[..., Sequence[float]]  # (prompts, answers), and fields if it has such a parameter


def of_text(function: TextReward, tokenizer: Any, *, fields: Sequence[Mapping[str, Any]] | None = None) -> RewardFn:
    """The reward `function(prompts, answers)` of texts: one number for each answer; it runs on the host.

    Args:
        fields: what else is known of each prompt, such as its right answer. A function that has a parameter of this
            name is given it, once for each answer.

    Raises:
        ValueError: when answers lie on several processes, of which none reads them all: `of_tokens` is for these.
    """

    def reward(rollout: Rollout) -> Sequence[float]:
        prompts, answers = texts(rollout.sequences, tokenizer)
        if fields is None or not _takes_fields(function):
            return function(prompts, answers)
        group = len(answers) // len(fields)
        return function(prompts, answers, fields=[each for each in fields for _ in range(group)])

    return reward


def _takes_fields(function: Callable[..., Any]) -> bool:
    try:
        return "fields" in inspect.signature(function).parameters
    except ValueError:  # some functions written in C have none
        return False


def function_at(place: str) -> Callable[..., Any]:
    """The function at "file.py:name" or "module:name".

    Raises:
        ValueError: if there is none, or what stands there cannot be imported.
    """
    where, _, name = place.rpartition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        found = getattr(module, name)
    except Exception as error:  # whatever a module raises when it is run
        raise ValueError(
            f'a reward function is given as "file.py:name" or "module:name"; {place}: {type(error).__name__}: {error}'
        ) from error
    if not callable(found):
        raise ValueError(f"{place} must be a function(prompts, answers), but is a {type(found).__name__}.")
    return found


def of_tokens(function: Callable[[Sequences], Float[Array, "batch"]]) -> RewardFn:
    """The reward `function(sequences)` of tokens; of jax, it can be part of a jitted run."""
    return lambda rollout: function(rollout.sequences)


def of_model(head: ScalarHead, params: Params) -> RewardFn:
    """The score of a reward model that reads the policy's own tokens."""
    scores = jax.jit(lambda params, sequences: head.scores(params, sequences.tokens, mask=sequences.mask))
    return lambda rollout: scores(params, rollout.sequences)


def texts(sequences: Sequences, tokenizer: Any) -> tuple[list[str], list[str]]:
    """Prompts and answers as text, without special tokens."""
    if any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in sequences):
        raise ValueError("the answers lie on several processes: take a reward of tokens, `of_tokens` or `of_model`.")
    tokens, mask, answer = map(np.asarray, sequences)
    sides = [[row[real].tolist() for row, real in zip(tokens, each, strict=True)] for each in (mask & ~answer, answer)]
    return tuple([tokenizer.decode(row, skip_special_tokens=True) for row in side] for side in sides)


def rewards_of(reward: RewardFn, rollout: Rollout) -> Float[Array, "batch"]:
    """The rewards of a rollout, checked.

    Raises:
        ValueError: if there is not one real number for each answer, or one is not finite, naming the first such row.
        RuntimeError: from whatever error the function itself raises.
    """
    count = rollout.sequences.tokens.shape[0]
    try:
        given = reward(rollout)
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(at.filename).name}, line {at.lineno}"
        raise RuntimeError(f"the reward function raised {type(error).__name__}: {error} ({place})") from error
    try:
        found = jnp.asarray(given if isinstance(given, jax.Array) else np.asarray(given))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the reward function must return {count} numbers, but returned {given!r}.") from error
    if found.shape != (count,) or not (jnp.issubdtype(found.dtype, jnp.floating) or found.dtype.kind in "iub"):
        raise ValueError(
            f"the reward function must return one number for each of {count} answers, "
            f"but returned {found.dtype}{list(found.shape)}."
        )
    found = found.astype(jnp.promote_types(found.dtype, jnp.float32) if found.dtype.kind == "f" else jnp.float32)
    if is_concrete(found) and not bool(jnp.isfinite(found).all()):  # of all processes, which may hold some rows each
        row = int(jnp.isfinite(found).argmin())
        raise ValueError(f"the reward of answer {row} is {float(found[row])}: rewards must be finite.")
    return found
