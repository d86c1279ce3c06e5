"""Rewards of completions: functions of text or tokens, reward models, and weighted sums of several."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrl_llm import text
from jaxrl_llm.data.records import Prompt, Text
from jaxrl_llm.language_model import Params
from jaxrl_llm.mesh import on_host, together, without_mesh
from jaxrl_llm.models.heads import LoadedReward, ScalarHead
from jaxrl_llm.numerics import is_concrete
from jaxrl_llm.scoring import Sequences
from jaxrl_llm.training.rollout import Rollout

RewardFn = Callable[[Rollout], Float[Array, "batch"]]
TextReward = Callable[..., Sequence[float | None]]  # (prompts, completions, and the entries of the lines that it takes)
GIVEN = ("prompts", "completions", "completion_ids")  # parameters of a reward of text that are no entries of a line

# Functions of text ----------------------------------------------------------------------------------------------------


def of_text(
    function: TextReward,
    tokenizer: Any,
    *,
    records: Sequence[Prompt] | None = None,
    ends: Collection[int] = (),
) -> RewardFn:
    """Return the reward `function(prompts, completions)` of texts, which runs on the host.

    It returns one number for each completion, or None for one that it does not judge. Its parameters are given by name
    if `completions` or `completion_ids` is one of them, else the first two are prompts and completions. Its further
    parameters, or `**fields`, receive the entries of these names as lists, one value for each completion, None for a
    prompt without the entry.

    Completions are strings, decoded without special tokens. With `records`, a prompt is as its record has it: a string,
    or a list of messages, neither cut nor in the chat template; without, it is decoded from the tokens.

    Args:
        function: of two lists.
        tokenizer: decodes the tokens.
        records: the prompts of the batch, with the entries beside them, such as solutions.
        ends: as `texts`.

    Raises:
        ValueError: if the function takes an entry that no prompt has, or too few parameters; or if the completions are
            spread over several processes; `of_tokens` is for these.
    """
    check_entries(function, records or [])

    def reward(rollout: Rollout) -> Sequence[float | None]:
        prompts, completions = texts(rollout.sequences, tokenizer, ends)
        each = len(completions) // len(records) if records else 1
        if records:
            prompts = [_as_given(record.prompt) for record in records for _ in range(each)]
        entries = dict.fromkeys(name for record in records or [] for name in record.fields)
        columns = {name: [record.fields.get(name) for record in records for _ in range(each)] for name in entries}
        return call(function, prompts, completions, completion_ids(rollout.sequences), columns)

    return reward


def call(
    function: TextReward,
    prompts: Sequence[Any],
    completions: Sequence[str],
    ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
) -> Sequence[float | None]:
    """Call a reward of text, as `of_text` says, with the entries beside the prompts as columns."""
    given = {"prompts": prompts, "completions": completions, "completion_ids": ids}
    by_name, named, required, any_name = _parameters(function)
    columns = {name: [None] * len(completions) for name in required} | dict(columns)
    taken = {name: column for name, column in columns.items() if any_name or name in named}
    if not by_name:
        return function(prompts, completions, **{name: taken[name] for name in taken if name not in GIVEN})
    return function(**taken | {name: given[name] for name in GIVEN if any_name or name in named})


def check_entries(function: TextReward, records: Iterable[Prompt]) -> None:
    """Raise ValueError if a reward of text requires an entry that no record has, or does not take completions.

    A function requires the entries that its parameters without a default name, and one of its attribute `one_of`.
    """
    missing = [(name,) for name in _parameters(function)[2]]
    one_of = getattr(getattr(function, "func", function), "one_of", ())  # of a partial
    missing += [one_of] if one_of and not set(one_of) & set(getattr(function, "keywords", ())) else []
    known: dict[str, None] = {}
    for record in records if missing else ():
        known |= dict.fromkeys(record.fields)
        missing = [names for names in missing if not known.keys() & set(names)]
        if not missing:
            return
    if missing:
        known = ", ".join(known) or "no entry beside the prompt"
        wanted = ", ".join(" or ".join(names) for names in missing)
        raise ValueError(f"the reward function takes {wanted}, but the data have {known}.")


def _parameters(function: TextReward) -> tuple[bool, list[str], list[str], bool]:
    """Return whether texts are given by name, the entries that it can take, those that it must, and if it takes any."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some functions written in C have no signature
        return False, [], [], False
    plain = [each for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    by_name = any(each.name in GIVEN[1:] and each.kind != each.POSITIONAL_ONLY for each in plain)
    if not by_name:
        positional = [each for each in plain if each.kind != each.KEYWORD_ONLY]
        if len(positional) < 2 and not any(each.kind == each.VAR_POSITIONAL for each in parameters):
            raise ValueError(f"a reward function must take (prompts, completions), but takes {_names(parameters)}.")
        plain = plain[2:]
    further = [each for each in plain if each.name not in GIVEN or not by_name]
    required = [each.name for each in further if each.default is each.empty]
    return by_name, [each.name for each in plain], required, any(each.kind == each.VAR_KEYWORD for each in parameters)


def _names(parameters: Iterable[inspect.Parameter]) -> str:
    return f"({', '.join(str(each).split(':')[0] for each in parameters)})"


def _as_given(asked: Text) -> str | list[dict[str, Any]]:
    return asked if isinstance(asked, str) else list(asked)


def texts(sequences: Sequences, tokenizer: Any, ends: Collection[int] = ()) -> tuple[list[str], list[str]]:
    """Return prompts and completions as text, without special tokens.

    Args:
        ends: tokens that end a completion. The text leaves them out, even if they are ordinary tokens of the tokenizer.
    """
    tokens, mask, scored = _on_host(sequences)
    written = scored & ~np.isin(tokens, list(ends))
    sides = [[row[real].tolist() for row, real in zip(tokens, each, strict=True)] for each in (mask & ~scored, written)]
    return tuple([tokenizer.decode(row, skip_special_tokens=True) for row in side] for side in sides)


def completion_ids(sequences: Sequences) -> list[list[int]]:
    """Return the tokens of each completion, its EOS token among them."""
    tokens, _, scored = _on_host(sequences)
    return [row[real].tolist() for row, real in zip(tokens, scored, strict=True)]


def _on_host(sequences: Sequences) -> tuple[np.ndarray, ...]:
    if any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in sequences):
        raise ValueError("completions of several processes need a reward of tokens: `of_tokens` or `of_model`.")
    return tuple(map(np.asarray, sequences))


# Functions by their place ---------------------------------------------------------------------------------------------


def function_at(place: str, *, name: str = "reward") -> Callable[..., Any]:
    """Return the function at "file.py:function" or "module:function".

    A file is imported as the module of its name, so that worker processes can import it too, and its folder is put on
    the path, so that it can import what lies beside it. Modules are found in the current folder too.

    Args:
        place: a file or a module, and the function's name.
        name: of the option, for errors.

    Raises:
        ValueError: if there is none, or it cannot be imported.
    """
    where, _, function = place.rpartition(":")
    try:
        found = getattr(_file_module(where) if where.endswith(".py") else _module(where), function)
    except Exception as error:  # whatever a module raises when it is run
        raise ValueError(
            f'{name} must be a function at "file.py:function" or "module:function", but is {place}: '
            f"{type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise ValueError(f"{name} must be a function, but {place} is a {type(found).__name__}.")
    return found


_LOADED: dict[str, tuple[ModuleType, bytes]] = {}  # by path, with their source


def _module(where: str) -> ModuleType:
    importlib.invalidate_caches()
    if os.getcwd() not in sys.path:  # a console script does not have it
        sys.path.append(os.getcwd())
    return importlib.import_module(where)


def _file_module(where: str) -> ModuleType:
    """Import a file as Python does what lies beside a script; a file that has not changed is run once."""
    path = Path(where).expanduser().resolve()
    source = path.read_bytes()
    module, before = _LOADED.get(str(path), (None, None))
    if before == source:
        return module
    name = path.stem
    other = sys.modules.get(name)
    if other is not None and Path(getattr(other, "__file__", None) or "").resolve() != path:
        name = f"{name}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"  # another module has the name
        other = sys.modules.get(name)
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    importlib.invalidate_caches()
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path))
    sys.modules[name] = module  # before it is run: dataclasses look their module up there
    try:
        exec(compile(source, path, "exec"), module.__dict__)  # not from bytecode, which can be of another edit
    except BaseException:
        del sys.modules[name]
        if other is not None:
            sys.modules[name] = other
        raise
    _LOADED[str(path)] = module, source
    return module


# Functions of tokens, and reward models -------------------------------------------------------------------------------


def of_tokens(function: Callable[[Sequences], Float[Array, "batch"]]) -> RewardFn:
    """Return the reward `function(sequences)` of tokens; written in jax, it can be part of a jitted run."""
    return lambda rollout: function(rollout.sequences)


def of_model(head: ScalarHead, params: Params) -> RewardFn:
    """Return the score of a reward model that has the policy's tokenizer."""
    scores = jax.jit(lambda params, sequences: head.scores(params, sequences.tokens, mask=sequences.mask))
    return lambda rollout: scores(params, rollout.sequences)


def of_loaded(
    found: LoadedReward,
    tokenizer: Any,
    *,
    records: Sequence[Prompt],
    same_tokens: bool,
    ends: Collection[int] = (),
) -> RewardFn:
    """Return the score of a reward model with its own tokenizer, which runs on the host.

    With the same tokens as the policy's it scores those that were drawn, after prompts that are strings. Otherwise, and
    for conversations, completions are decoded and read with their prompts as `LoadedReward.score` does, in the reward
    model's own chat template, with the end that completions have there even if their limit cut them off. A text that is
    too long for the model's context loses its beginning.

    Args:
        found: the reward model.
        tokenizer: of the policy, decodes the tokens.
        records: the prompts of the batch.
        same_tokens: the tokens of the policy are those of the reward model.
        ends: as `texts`.
    """

    def reward(rollout: Rollout) -> Float[Array, "batch"]:
        _, completions = texts(rollout.sequences, tokenizer, ends)
        tokens, mask, _ = _on_host(rollout.sequences)
        each, rows = len(completions) // len(records), []
        for place, written in enumerate(completions):
            record = records[place // each]
            asked = record.prompt
            if found.tokenizer is None or (same_tokens and isinstance(asked, str)):
                rows.append(tokens[place][mask[place]].tolist())
                continue
            said = written if isinstance(asked, str) else [{"role": "assistant", "content": written}]
            variables = text.read_by(found.tokenizer, record.template)
            rows.append(text.whole(found.tokenizer, asked, said, **variables)[-found.max_length :])
        return jnp.asarray(found.score_tokens(rows, batch_size=len(rows)))

    return reward


# Rewards of a batch ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def told(name: str) -> Iterator[None]:
    """Raise what a reward raises as RuntimeError, with its name and place."""
    try:
        yield
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(at.filename).name}, line {at.lineno}"
        raise RuntimeError(f"{name} raised {type(error).__name__}: {error} ({place})") from error


def rewards_of(reward: RewardFn, rollout: Rollout, *, name: str = "the reward function") -> Float[Array, "batch"]:
    """Return the rewards of a rollout, checked: NaN for each completion that was not judged, whose reward is None.

    Raises:
        ValueError: unless there is one finite number, or None, for each completion, naming the first row without.
        RuntimeError: from any error that the function itself raises.
    """
    count = rollout.sequences.tokens.shape[0]
    with told(name):
        given = reward(rollout)
    unjudged = np.zeros(count, bool)
    try:
        if isinstance(given, jax.Array):
            found = given
        else:
            values = list(given)
            unjudged = np.asarray([each is None for each in values], bool)
            found = jnp.asarray(np.asarray([0.0 if each is None else each for each in values]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must return {count} numbers, but returned {given!r}.") from error
    if found.shape != (count,) or not (jnp.issubdtype(found.dtype, jnp.floating) or found.dtype.kind in "iub"):
        raise ValueError(
            f"{name} must return one number for each of {count} completions, "
            f"but returned {found.dtype}{list(found.shape)}."
        )
    found = found.astype(jnp.promote_types(found.dtype, jnp.float32) if found.dtype.kind == "f" else jnp.float32)
    if is_concrete(found) and not bool(jnp.isfinite(found).all()):  # of all processes
        row = int(jnp.isfinite(found).argmin())
        raise ValueError(f"rewards must be finite, but that of completion {row} is {float(found[row])}.")
    return jnp.where(unjudged, jnp.nan, found) if unjudged.any() else found


class Judged(NamedTuple):
    """The rewards of completions; NaN where none was given."""

    total: Float[Array, "batch"]
    each: Mapping[str, Float[Array, "batch"]]  # of each reward by itself, by name


def judge(rewards: Mapping[str, RewardFn], rollout: Rollout, *, weights: Sequence[float] = ()) -> Judged:
    """Return the rewards of a rollout by several functions, and their weighted sum.

        r_i = Σ_k w_k r_ki          over the rewards k that judge completion i

    A completion that none judges has the sum NaN.

    Args:
        rewards: by name.
        weights: of each reward; by default 1.

    Raises:
        ValueError, RuntimeError: as `rewards_of`, naming the reward.
    """
    each = {name: rewards_of(reward, rollout, name=spoken(name, rewards)) for name, reward in rewards.items()}
    return summed(each, weights)


def spoken(name: str, rewards: Collection[str]) -> str:
    """Return what an error calls a reward."""
    return "the reward function" if len(rewards) == 1 else f"the reward {name}"


def summed(each: Mapping[str, Float[Array, "batch"]], weights: Sequence[float] = ()) -> Judged:
    """Return rewards with their weighted sum; see `judge`."""
    weighted = jnp.stack([w * r for w, r in zip(weights or [1.0] * len(each), each.values(), strict=True)])
    none = jnp.isnan(weighted).all(axis=0)
    return Judged(jnp.where(none, jnp.nan, jnp.nansum(weighted, axis=0)), each)


Of = Callable[[list[Prompt]], RewardFn]  # a reward, given the records of the prompts


def of_own(of: Of, asked: list[Prompt], rollout: Rollout, *, name: str) -> Float[np.ndarray, "batch"]:
    """Return the rewards of a rollout by a function; of several processes each calls it for its share of the prompts.

    It is called without a mesh, so that it can use jax on the process's own device.

    Args:
        rollout: of several processes, on the host.

    Raises:
        ValueError, RuntimeError: as `rewards_of`; RuntimeError if another process raises.
    """
    rows = rollout.sequences.tokens.shape[0]
    share = np.array_split(np.arange(rows).reshape(len(asked), -1), jax.process_count())[jax.process_index()]
    prompts = (share[:, 0] * len(asked) // rows).tolist()

    def judged() -> np.ndarray:
        found = np.zeros(rows, jnp.result_type(float))
        if prompts:
            whole = len(prompts) == len(asked)
            part = rollout if whole else jax.tree.map(lambda leaf: leaf[share.ravel()], rollout)
            found[share.ravel()] = rewards_of(of([asked[place] for place in prompts]), part, name=name)
        return found

    with without_mesh():
        return together(judged).sum(axis=0)


def of_all(of: Of, asked: list[Prompt], rollout: Rollout, *, name: str) -> Float[np.ndarray, "batch"]:
    """Return the rewards of a rollout by a model, on all devices.

    Raises:
        ValueError, RuntimeError: as `rewards_of`.
    """
    return on_host(rewards_of(of(asked), rollout, name=name))


def only_judged(rollout: Rollout, rewards: Float[Array, "batch"]) -> tuple[Rollout, Float[Array, "batch"]]:
    """Take completions without a reward, NaN, out of the batch: none of their tokens counts, and the reward is 0.

    They then count neither in the loss nor in the mean of their group.
    """
    if not is_concrete(rewards) or not bool(jnp.isnan(rewards).any()):
        return rollout, rewards
    judged = ~jnp.isnan(rewards)
    sequences = rollout.sequences._replace(completion_mask=rollout.sequences.completion_mask & judged[:, None])
    logp_sampler = jnp.where(sequences.completion_mask, rollout.logp_sampler, 0)
    return rollout._replace(sequences=sequences, logp_sampler=logp_sampler), jnp.where(judged, rewards, 0)
