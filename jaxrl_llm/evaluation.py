"""Evaluate a finished model on data: perplexity, preference accuracy, rewards of its completions, win rates."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from jaxrl_llm import mesh as meshes
from jaxrl_llm import models
from jaxrl_llm.data import records
from jaxrl_llm.interface import LM, Completion
from jaxrl_llm.language_model import Params
from jaxrl_llm.models import huggingface, loading
from jaxrl_llm.models.heads import LoadedReward, ScalarHead
from jaxrl_llm.options import takes
from jaxrl_llm.train import RewardModel
from jaxrl_llm.training import recipes, reward_fns
from jaxrl_llm.training.config import Data, EvaluateConfig, OfflineConfig
from jaxrl_llm.training.encoding import Parser
from jaxrl_llm.training.preference import PairBatch, pair_sums
from jaxrl_llm.training.recipes import Objective, Trained
from jaxrl_llm.training.reward_fns import function_at
from jaxrl_llm.training.reward_model import reward_loss
from jaxrl_llm.training.steps import Frozen, Loss, LossFn
from jaxrl_llm.training.supervised import sft_loss

Z95 = 1.959963984540054  # of a 95% interval
ANSWERED = ("completion", "answer", "messages", "text", "conversations", "output", "response")


@takes(EvaluateConfig)
def evaluate(
    lm: Any,
    data: Data,
    *,
    config: EvaluateConfig | None = None,
    mesh: str | Mesh | None = None,
    verbose: bool = False,
    **options: Any,
) -> dict[str, float]:
    """Evaluate a model on the rows of a file or on dicts, in any of the formats of `jl.train`.

        jl.evaluate("tuned", "pairs.jsonl", reference="tiny-gpt2")
        jl.evaluate("tuned", "prompts.jsonl", reward="mine.py:function", against="tiny-gpt2")

    Args:
        lm: a model (`jl.load`), a reward model (`jl.train.RewardModel`), or the name or path of either.
        data: a path or dicts. With a reward, the rows' prompts are completed.
        config: all options in one object.
        mesh: devices that share the work, as `jl.load` takes them; left out for a model that is loaded.
        verbose: print what was skipped and truncated.

    Options: listed here.

    Returns:
        Of completions `loss`, −log p of their tokens in nats, the mean over all tokens, and `perplexity`, exp(loss).
        Of preferences `accuracy`, the share of pairs whose chosen completion is more probable (a tie counts half),
        `accuracy_per_token` by the mean log-probability of a token, `chosen_logp` and `rejected_logp`; with a reference
        `implicit_accuracy` and `implicit_margin` of the log-ratios log p − log p_ref, DPO's implicit rewards. Of a
        reward model `accuracy`, `margin` and `score` over all pairs, and its `loss`.
        With a reward `reward`, the mean over one completion of each prompt (of those that it judges), `reward_stderr`,
        its standard error where there are several, and `length` in tokens; with `against` its `against_reward`,
        `win_rate`, the share of prompts where the model's reward is larger (a tie counts half), and Wilson's 95%
        interval from `win_rate_low` to `win_rate_high`.
        Everywhere `rows`, their number.

    Raises:
        TypeError: if an argument is of the wrong type, or an option is unknown.
        ValueError: for an option out of range or without an effect, a mesh for a model that is loaded already,
            malformed data (rows and lines are named), or a reference of another tokenizer or too short a context.
    """
    config = EvaluateConfig(**options) if config is None else dataclasses.replace(config, **options)
    sharding = meshes.sharding_of(mesh)
    if sharding is not None:
        if not isinstance(lm, str | os.PathLike):
            raise ValueError("mesh must be left out for a model that is loaded: jl.load(name, mesh=...) takes it.")
        lm = _scorer(lm, sharding) or _as_lm(lm, sharding)
    with meshes.on_mesh_of(getattr(lm, "params", None)):
        return _measured(lm, data, config, verbose)


def _measured(lm: Any, data: Data, config: EvaluateConfig, verbose: bool) -> dict[str, float]:
    data = data if isinstance(data, str | os.PathLike) else list(data) if hasattr(data, "__iter__") else data
    first = records.read(data, dict, on_bad=config.on_bad)[0]
    pairs, answered = bool({"chosen", "answers"} & set(first)), any(name in first for name in ANSWERED)
    sharding = meshes.sharding_of(meshes.lies_on(getattr(lm, "params", None)))
    judged = _reward_of(config, sharding)
    if config.against is not None and judged is None:
        raise ValueError("against compares rewards: reward or reward_model must be given, but neither is.")
    for name in ("max_new_tokens", "temperature"):
        if judged is None and getattr(config, name) != getattr(EvaluateConfig, name):
            raise ValueError(f"{name} is of completions, which a reward asks for: give reward or reward_model too.")
    scorer = _scorer(lm)
    if scorer is not None:
        lm = models.Loaded(scorer.head.lm, scorer.params["model"], scorer.tokenizer, scorer.config)
        if unused := [name for name in ("reference", "reward", "reward_model") if getattr(config, name) is not None]:
            raise ValueError(f"{unused[0]} must be left out for a reward model, whose accuracy needs none.")
    if not pairs and (scorer is not None or config.reference is not None):
        needs = "a reward model" if scorer is not None else "reference"
        raise ValueError(f"{needs} needs preferences, rows with chosen and rejected, but has {', '.join(first)}.")
    if not pairs and not answered and judged is None:
        raise ValueError(f"the data must have completions, or reward must be given, but rows have {', '.join(first)}.")
    offline = OfflineConfig(
        batch_size=config.batch_size,
        max_length=config.max_length,
        cut=config.cut,
        on_bad=config.on_bad,
        seed=config.seed,
        eval_data=data,
    )
    run = recipes.begin(lm, offline, verbose=verbose)
    found: dict[str, float] = {}
    if scorer is not None:
        objective = Objective("reward", reward_loss(ScalarHead(run.lm)), "ranked", ())
        found |= _held_out(run, objective, scorer.params, None)
    elif pairs:
        reference = None if config.reference is None else recipes.reference_of(run, config.reference)
        objective = Objective("pairs", pair_measures(run.lm, reference and reference.lm), "preference", ())
        found |= _held_out(run, objective, run.loaded.params, reference and reference.params)
        del found["loss"]
    elif answered:
        found |= _held_out(run, Objective("sft", sft_loss(run.lm), "prompt-completion", ()), run.loaded.params, None)
    if judged is not None:
        against = None if config.against is None else _as_lm(config.against, sharding)
        found |= _completed(LM(run.loaded, run.name), against, data, judged, config)
    return found


def _as_lm(lm: Any, sharding: huggingface.ShardingRule | None) -> LM:
    return LM(models.load(lm, sharding=sharding), os.fspath(lm)) if isinstance(lm, str | os.PathLike) else lm


def _scorer(lm: Any, sharding: huggingface.ShardingRule | None = None) -> LoadedReward | None:
    """Return a reward model, if it is one or the path of one."""
    if isinstance(lm, LoadedReward):
        return lm
    if not isinstance(lm, str | os.PathLike):
        return None
    path = loading.locate(lm)
    named = (path / "config.json").is_file() and huggingface.read_config(path).get("architectures")
    is_reward = named and named[0].endswith("ForSequenceClassification")
    return models.load_reward_model(path, sharding=sharding) if is_reward else None


# Given completions ----------------------------------------------------------------------------------------------------


def _held_out(run: recipes.Run, objective: Objective, params: Params, ref: Params | None) -> dict[str, float]:
    measured = recipes.held_out(run, objective, Trained(params, Frozen(ref)), name="data")
    return {name.removeprefix("held_out_"): value for name, value in measured(params).items()} | {"rows": measured.rows}


def pair_measures(lm: Any, reference: Any = None) -> LossFn:
    """Return the measures of pairs under a model as a loss function, whose value is −log p of the chosen completions.

    Args:
        reference: a model whose parameters are `frozen.ref`, for the measures of log-ratios.
    """

    def measures(params: Params, batch: PairBatch, frozen: Frozen | None, key: Array) -> Loss:
        policy = pair_sums(lm, params, batch)
        per_token = policy.chosen / policy.length_chosen - policy.rejected / policy.length_rejected
        found = {
            "accuracy": _positive(policy.chosen - policy.rejected),
            "accuracy_per_token": _positive(per_token),
            "chosen_logp": policy.chosen.mean(),
            "rejected_logp": policy.rejected.mean(),
        }
        if reference is not None:
            ref = pair_sums(reference, frozen.ref, batch)
            margin = (policy.chosen - ref.chosen) - (policy.rejected - ref.rejected)
            found |= {"implicit_accuracy": _positive(margin), "implicit_margin": margin.mean()}
        return Loss(-policy.chosen.mean(), policy.chosen.shape[0], found)

    return measures


def _positive(differences: Array) -> Array:
    """Return the share of positive differences; 0 counts half."""
    return ((differences > 0) + (differences == 0) / 2).mean()


# Completions of the model ---------------------------------------------------------------------------------------------

Judged = Callable[[Sequence[records.Prompt], Sequence[Completion]], np.ndarray]  # NaN where it judges none


def _reward_of(config: EvaluateConfig, sharding: huggingface.ShardingRule | None) -> Judged | None:
    """Return the reward of completions of records, if the configuration has one."""
    given = config.reward if config.reward is not None else config.reward_model
    if config.reward is not None and config.reward_model is not None:
        raise ValueError("one of reward and reward_model must be given, but both are.")
    if given is None:
        return None
    is_folder = isinstance(given, str) and Path(given).expanduser().is_dir()
    if isinstance(given, LoadedReward) or config.reward_model is not None or is_folder:
        found = given if isinstance(given, LoadedReward) else models.load_reward_model(given, sharding=sharding)
        scorer = RewardModel(found.head, found.params, found.tokenizer, found.config)

        def scored(asked: Sequence[records.Prompt], written: Sequence[Completion]) -> np.ndarray:
            rows = [
                scorer.tokens(each.prompt, completion.text, template=each.template)
                for each, completion in zip(asked, written, strict=True)
            ]
            return np.asarray(scorer.score_tokens(rows, batch_size=config.batch_size), np.float64)

        return scored
    function = function_at(given) if isinstance(given, str) else given
    if not callable(function):
        raise TypeError(f"reward must be a function or a reward model, but is a {type(function).__name__}.")

    def called(asked: Sequence[records.Prompt], written: Sequence[Completion]) -> np.ndarray:
        names = dict.fromkeys(name for each in asked for name in each.fields)
        columns = {name: [each.fields.get(name) for each in asked] for name in names}
        prompts = [each.prompt if isinstance(each.prompt, str) else list(each.prompt) for each in asked]
        texts, ids = [each.text for each in written], [each.tokens for each in written]
        with reward_fns.told("the reward function"):
            given = reward_fns.call(function, prompts, texts, ids, columns)
        found = np.asarray(given, np.float64)  # None, not judged, is NaN
        if found.shape != (len(asked),) or not all(one is None or np.isfinite(one) for one in given):
            raise ValueError(
                f"the reward must be one finite number for each of {len(asked)} completions, but is {given}."
            )
        return found

    def judged(asked: Sequence[records.Prompt], written: Sequence[Completion]) -> np.ndarray:
        """Return the rewards; each of several processes calls the function on its own share, without the mesh."""
        own = np.array_split(np.arange(len(asked)), jax.process_count())[jax.process_index()]

        def of_own() -> np.ndarray:
            found = np.zeros(len(asked))
            if own.size:
                found[own] = called([asked[row] for row in own], [written[row] for row in own])
            return found.view(np.uint32)  # arrays of jax would be rounded

        reward_fns.check_entries(function, asked)
        with meshes.without_mesh():
            return meshes.together(of_own).view(np.float64).sum(axis=0)

    return judged


def _completed(lm: LM, against: LM | None, data: Data, judged: Judged, config: EvaluateConfig) -> dict[str, float]:
    """Return the rewards of one completion of each prompt, and of another model's."""
    own, length = _rewards(lm, data, judged, config)
    known = own[~np.isnan(own)]
    if not known.size:
        raise ValueError(f"the reward must judge one of the {len(own)} completions, but is None for all.")
    found = {"reward": float(known.mean()), "length": length, "rows": len(own)}
    if known.size > 1:
        found["reward_stderr"] = float(known.std(ddof=1) / math.sqrt(known.size))
    if against is None:
        return found
    others, _ = _rewards(against, data, judged, config)
    both = ~np.isnan(own) & ~np.isnan(others)
    if not both.any():
        raise ValueError("the reward must judge completions of both models for one prompt, but does for none.")
    rate = float(((own > others) + (own == others) / 2)[both].mean())
    low, high = wilson(rate, int(both.sum()))
    return found | {
        "against_reward": float(np.nanmean(others)),
        "win_rate": rate,
        "win_rate_low": low,
        "win_rate_high": high,
    }


def _rewards(lm: LM, data: Data, judged: Judged, config: EvaluateConfig) -> tuple[np.ndarray, float]:
    """Return the rewards of one completion of each prompt, read as in training, and their mean length."""
    parse = Parser(records.prompt, bool(getattr(lm.tokenizer, "chat_template", None)))
    asked = list(records.read(data, parse, on_bad=config.on_bad))
    sampled = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature, "seed": config.seed}
    written = [
        lm.generate(
            [each.prompt if isinstance(each.prompt, str) else list(each.prompt) for each in part],
            chat=not isinstance(part[0].prompt, str) and (part[0].template or True),
            batch_size=config.batch_size,
            **sampled,
        )
        for part in _alike(asked)
    ]
    written = [each for part in written for each in part]
    return judged(asked, written), float(np.mean([len(each.tokens) for each in written]))


def _alike(asked: Sequence[records.Prompt]) -> list[Sequence[records.Prompt]]:
    """Return the prompts in runs of strings, and of conversations with the same variables of the chat template."""
    kinds = [(isinstance(each.prompt, str), each.template) for each in asked]
    ends = [place for place in range(1, len(asked)) if kinds[place] != kinds[place - 1]]
    return [asked[start:end] for start, end in zip([0, *ends], [*ends, len(asked)], strict=True)]


def wilson(share: float, count: int, *, z: float = Z95) -> tuple[float, float]:
    """Return Wilson's score interval of a share of `count` trials, by default of 95%.

        (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n)

    Source: Wilson 1927.
    """
    centre, scale = share + z**2 / (2 * count), 1 + z**2 / count
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return (centre - half) / scale, (centre + half) / scale
