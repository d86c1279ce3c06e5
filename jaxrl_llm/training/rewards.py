"""Rewards of completions: functions of text or tokens, or a reward model."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
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
TextReward = Callable[..., Sequence[float]]  # (prompts, completions, and the entries of the lines that it takes)


def of_text(function: TextReward, tokenizer: Any, *, fields: Sequence[Mapping[str, Any]] | None = None) -> RewardFn:
    """Return the reward `function(prompts, completions)` of texts, which runs on the host.

    It returns one number for each completion. Its further parameters, or `**fields`, receive the entries of these names
    as lists, one value for each completion, None for a prompt without the entry.

    Args:
        function: of two lists of strings.
        tokenizer: decodes the tokens.
        fields: the entries beside each prompt, such as its solution.

    Raises:
        ValueError: if the function takes an entry that no prompt has, or if the completions are spread over several
            processes; `of_tokens` is for these.
    """
    names = _taken(function, dict.fromkeys(name for each in fields or [] for name in each))

    def reward(rollout: Rollout) -> Sequence[float]:
        prompts, completions = texts(rollout.sequences, tokenizer)
        columns = {
            name: [each.get(name) for each in fields for _ in range(len(completions) // len(fields))] for name in names
        }
        return function(prompts, completions, **columns)

    return reward


def _taken(function: TextReward, there: Iterable[str]) -> list[str]:
    """Return the names of entries that a function has parameters for, among those that there are."""
    try:
        further = list(inspect.signature(function).parameters.values())[2:]
    except ValueError:  # some functions written in C have no signature
        return []
    if any(each.kind == each.VAR_KEYWORD for each in further):
        return list(there)
    named = [each for each in further if each.kind != each.VAR_POSITIONAL]
    missing = [each.name for each in named if each.default is each.empty and each.name not in there]
    if missing:
        known = ", ".join(there) or "no entry beside the prompt"
        raise ValueError(f"the reward function takes {', '.join(missing)}, but the data have {known}.")
    return [each.name for each in named if each.name in there]


def function_at(place: str, *, name: str = "reward") -> Callable[..., Any]:
    """Return the function at "file.py:function" or "module:function".

    Args:
        place: a file or a module, and the function's name.
        name: of the option, for errors.

    Raises:
        ValueError: if there is none, or it cannot be imported.
    """
    where, _, function = place.rpartition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        found = getattr(module, function)
    except Exception as error:  # whatever a module raises when it is run
        raise ValueError(
            f'{name} must be a function at "file.py:function" or "module:function", but is {place}: '
            f"{type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise ValueError(f"{name} must be a function, but {place} is a {type(found).__name__}.")
    return found


def of_tokens(function: Callable[[Sequences], Float[Array, "batch"]]) -> RewardFn:
    """Return the reward `function(sequences)` of tokens; written in jax, it can be part of a jitted run."""
    return lambda rollout: function(rollout.sequences)


def of_model(head: ScalarHead, params: Params) -> RewardFn:
    """Return the score of a reward model that has the policy's tokenizer."""
    scores = jax.jit(lambda params, sequences: head.scores(params, sequences.tokens, mask=sequences.mask))
    return lambda rollout: scores(params, rollout.sequences)


def texts(sequences: Sequences, tokenizer: Any) -> tuple[list[str], list[str]]:
    """Return prompts and completions as text, without special tokens."""
    if any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in sequences):
        raise ValueError("completions of several processes need a reward of tokens: `of_tokens` or `of_model`.")
    tokens, mask, scored = map(np.asarray, sequences)
    sides = [[row[real].tolist() for row, real in zip(tokens, each, strict=True)] for each in (mask & ~scored, scored)]
    return tuple([tokenizer.decode(row, skip_special_tokens=True) for row in side] for side in sides)


def rewards_of(reward: RewardFn, rollout: Rollout) -> Float[Array, "batch"]:
    """Return the rewards of a rollout, checked.

    Raises:
        ValueError: unless there is one finite number for each completion, naming the first row without.
        RuntimeError: from any error that the function itself raises.
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
            f"the reward function must return one number for each of {count} completions, "
            f"but returned {found.dtype}{list(found.shape)}."
        )
    found = found.astype(jnp.promote_types(found.dtype, jnp.float32) if found.dtype.kind == "f" else jnp.float32)
    if is_concrete(found) and not bool(jnp.isfinite(found).all()):  # of all processes
        row = int(jnp.isfinite(found).argmin())
        raise ValueError(f"rewards must be finite, but that of completion {row} is {float(found[row])}.")
    return found
