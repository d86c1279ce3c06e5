"""Trainers: `sft`, `reward`, `dpo`, `distill`, `grpo` and `ppo`, from a model and data to a trained model.

    tuned = jl.train.dpo("tiny-gpt2", "pairs.jsonl", beta=0.1, steps=100)
    tuned = jl.train.grpo(tuned, [{"prompt": "The king"}], reward=lambda prompts, completions: [...], steps=20)

Every trainer takes

* a model: an `LM` (`jl.load`), its name or its path;
* data: the path of a file (JSON lines, JSON, CSV or Parquet), any iterable of dicts, or a `datasets.Dataset`;
* options by keyword, or all of them as `config`, a dataclass of `jaxrl_llm.training.config`.

Without `out` nothing is written. With `out`, a folder, a trainer does what `jaxrl-llm train` does: it writes
checkpoints, `log.jsonl` and the model there, and `resume=True` continues a run that was stopped.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax

from jaxrl_llm import models
from jaxrl_llm.interface import LM
from jaxrl_llm.models.heads import LoadedReward, ScalarHead, load_reward_model, save_reward_model
from jaxrl_llm.objectives.preference import kto_loss
from jaxrl_llm.options import takes
from jaxrl_llm.training import online, recipes
from jaxrl_llm.training.config import (
    Config,
    Data,
    DistillConfig,
    DPOConfig,
    GRPOConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
)
from jaxrl_llm.training.distillation import distill_loss
from jaxrl_llm.training.policy import Method, method_of
from jaxrl_llm.training.preference import OF_PAIRS, find_losses, name_of, needs_of, preference_loss
from jaxrl_llm.training.recipes import Objective
from jaxrl_llm.training.reward_fns import function_at
from jaxrl_llm.training.reward_model import reward_loss
from jaxrl_llm.training.supervised import sft_loss

__all__ = ["RewardModel", "distill", "dpo", "grpo", "ppo", "reward", "sft"]
Model = Any  # a loaded model, its name or its path
Folder = str | os.PathLike[str]


def _configured(cls: type[Config], config: Config | None, options: dict[str, Any]) -> Config:
    if config is None:
        return cls(**options)
    if not isinstance(config, cls):
        raise TypeError(f"config must be a {cls.__name__}, but is a {type(config).__name__}.")
    return dataclasses.replace(config, **options)


def _model(loaded: models.Loaded, run: recipes.Run) -> LM:
    return LM(loaded, f"{run.name}, trained") if run.out is None else LM(loaded, str(run.out), path=str(run.out))


@takes(SFTConfig)
def sft(
    lm: Model,
    data: Data,
    *,
    out: Folder | None = None,
    config: SFTConfig | None = None,
    verbose: bool = True,
    **options: Any,
) -> LM:
    """Fine-tune a model on completions (supervised fine-tuning).

        loss = −log π(completion | prompt), the mean over the completion tokens of a batch, in nats

        jl.train.sft("tiny-gpt2", [{"prompt": "The king", "completion": " is wise."}], batch_size=1, steps=10)

    Args:
        lm: a model (`jl.load`), its name or its path.
        data: a path or dicts, in one of three formats: {"prompt", "completion"} ("answer" is a synonym), {"messages"}
            that end with the assistant's, or {"text"}. Prompts and completions are strings or lists of messages, of
            which the assistant's count. ShareGPT's and Alpaca's forms are read too.
        out: a folder for checkpoints, log and model; None writes nothing.
        config: all options in one object.
        verbose: print what is done, with a progress bar.

    Options: listed here.

    Returns:
        The fine-tuned model. `lm` stays valid.

    Metrics: `loss`, `grad_norm`, and with `eval_data` `held_out_loss`.

    Raises:
        TypeError: if an argument is of the wrong type, or an option is unknown.
        ValueError: for an option out of range, malformed data (rows and lines are named), or a model that cannot be
            trained.
        FloatingPointError: if a metric becomes infinite or NaN.
    """
    run = recipes.begin(lm, _configured(SFTConfig, config, options), out, verbose=verbose)
    with run.on_mesh():
        return _offline(run, data, Objective("sft", sft_loss(run.lm), "prompt-completion", ("loss",)))


@takes(DPOConfig)
def dpo(
    lm: Model,
    data: Data,
    *,
    out: Folder | None = None,
    config: DPOConfig | None = None,
    verbose: bool = True,
    **options: Any,
) -> LM:
    """Optimise preferences, by DPO, any other preference loss or a sum of them.

    The reference is `lm` as it is given, unless `reference` is another model, its name or its path.

        pairs = [{"prompt": "The king", "chosen": " is wise.", "rejected": " is."}]
        jl.train.dpo("tiny-gpt2", pairs, batch_size=1)
        jl.train.dpo("tiny-gpt2", pairs, batch_size=1, loss=["dpo", "sft"], loss_weights=[1, 0.1])

    Args:
        lm: a model (`jl.load`), its name or its path.
        data: a path or dicts {"prompt", "chosen", "rejected"}; texts are strings or lists of messages. Without
            "prompt" it is what the two share. A number "margin" of a pair is the lead that "dpo" asks of its reward
            (ODPO). For "kto": {"prompt", "completion", "label"}.
        out: a folder for checkpoints, log and model; None writes nothing.
        config: all options in one object.
        verbose: print what is done, with a progress bar.

    Options: listed here.

    Returns:
        The trained model. `lm` stays valid.

    Metrics, in nats: `loss`; `chosen_logp` and `rejected_logp` of whole completions; for losses with a reference
    `margin`, the difference of the log-ratios, `accuracy`, the share of positive margins, and `kl_chosen`,
    `kl_rejected`, the log-ratios; `grad_norm`; and with `eval_data` `held_out_loss`.

    Raises:
        TypeError: if an argument is of the wrong type, or an option is unknown.
        ValueError: for an unknown loss or hyperparameter, an option out of range, malformed data (rows and lines are
            named), a model that cannot be trained, or a reference with another tokenizer.
        FloatingPointError: if a metric becomes infinite or NaN.
    """
    config = _configured(DPOConfig, config, options)
    named = [each for each in config.losses if isinstance(each, str) and ":" not in each]
    losses = [
        function_at(each, name="loss") if isinstance(each, str) and ":" in each else each for each in config.losses
    ]
    if config.beta is not None and "beta" in config.loss_kwargs:
        raise ValueError("beta must be given once, but is also in loss_kwargs.")
    beta = {} if config.beta is None else {"beta": config.beta}
    kwargs = dict(sorted((beta | config.loss_kwargs).items()))
    functions = find_losses(losses, kwargs)  # an unknown name is an error before anything is loaded
    needs, is_kto, called = needs_of(functions), functions == [kto_loss], "+".join(map(name_of, functions))
    if is_kto and config.batch_size < 2:
        raise ValueError(f"batch_size must be at least 2 for kto, which compares rows, but is {config.batch_size}.")
    if config.packing and needs & {"batch", "alignments"}:
        how = "compares all examples of a batch" if "batch" in needs else "weighs examples by the policy"
        raise ValueError(f"packing must be False for {called}, which {how}, but is True.")
    if "batch" in needs and config.microbatches > 1:
        raise ValueError(
            f"microbatches must be 1 for {called}, which compares all rows of a batch, but is {config.microbatches}."
        )
    taken = {name for function in functions for name in OF_PAIRS if name in function.hyperparameters}
    for name, default in (("reference", None), ("precompute_reference", False)):
        if getattr(config, name) != default and "reference" not in needs:
            raise ValueError(f"{name} must be {default} for {called}, which has no reference.")
    run = recipes.begin(lm, config, out, verbose=verbose)
    with run.on_mesh():
        reference = recipes.reference_of(run, config.reference) if "reference" in needs else None
        ahead = reference if config.precompute_reference else None
        ref_lm = None if config.reference is None else reference.lm
        objective = Objective(
            "dpo",
            preference_loss(run.lm, losses, weights=config.loss_weights, ref_lm=ref_lm, **kwargs),
            "unpaired-preference" if is_kto else "preference",
            ("loss", "margin", "chosen_logp", "rejected_logp"),
            {"loss_kwargs": kwargs, "reference_sha256": reference and reference.sha256},
            fields=frozenset(taken - set(kwargs)) if len(named) == len(losses) else True,
            ahead=ahead,
        )
        return _offline(run, data, objective, reference=False if reference is None or ahead else reference.params)


@takes(DistillConfig)
def distill(
    lm: Model,
    data: Data,
    *,
    out: Folder | None = None,
    config: DistillConfig | None = None,
    verbose: bool = True,
    **options: Any,
) -> LM:
    """Distil a teacher into a model, on given completions and on the model's own (generalised knowledge distillation).

        loss = D(teacher, π) of next-token distributions, the mean over the completion tokens of a batch, in nats

        jl.train.distill("tiny-gpt2", [{"prompt": "The king"}] * 16, teacher=larger, on_policy=1)

    Args:
        lm: a model (`jl.load`), its name or its path: the student.
        data: a path or dicts as in `sft`; with on_policy=1 prompts alone will do.
        out: a folder for checkpoints, log and model; None writes nothing.
        config: all options in one object.
        verbose: print what is done, with a progress bar.

    Options: listed here.

    Returns:
        The trained student. `lm` and the teacher stay valid.

    Metrics: `loss`; `length`, the tokens of a completion; `on_policy`, the share of steps on the model's own
    completions; `completion_tokens`; `grad_norm`; and with `eval_data` `held_out_loss`, on its completions.

    Raises:
        TypeError: if an argument is of the wrong type, or an option is unknown.
        ValueError: for an option out of range, malformed data (rows and lines are named), a model that cannot be
            trained, or a teacher with another vocabulary or tokenizer.
        FloatingPointError: if a metric becomes infinite or NaN.

    Source: Agarwal et al. 2024 (GKD), arXiv 2306.13649.
    """
    config = _configured(DistillConfig, config, options)
    run = recipes.begin(lm, config, out, verbose=verbose)
    with run.on_mesh():
        teacher = recipes.reference_of(run, config.teacher, name="teacher")
        loss = distill_loss(
            run.lm, teacher.lm, divergence=config.divergence, mixture=config.mixture, temperature=config.temperature
        )
        identity = {"teacher_sha256": teacher.sha256}
        objective = Objective("distill", loss, "prompt-completion", ("loss", "length"), identity)
        trained = recipes.trained_of(run, reference=teacher.params)
        return _model(recipes.finish(run, trained, recipes.fit_on_policy(run, data, objective, trained)), run)


@takes(RewardConfig)
def reward(
    lm: Model,
    data: Data,
    *,
    out: Folder | None = None,
    config: RewardConfig | None = None,
    verbose: bool = True,
    **options: Any,
) -> RewardModel:
    """Train a reward model on preferences or rankings.

        loss = −log σ(r_better − r_worse − margin), the mean over a prompt's pairs, then over prompts

        scorer = jl.train.reward("tiny-gpt2", "pairs.jsonl", steps=100)
        scorer.score(["The king"], [" is wise."])

    Args:
        lm: a model (`jl.load`), its name or its path; its weights are trained too. Or a `RewardModel` or its path,
            whose head is trained further.
        data: a path or dicts, in one of two formats: {"prompt", "chosen", "rejected"}, or {"prompt", "answers"}, best
            first or with "ranks", 0 for the best. A pair may have a "margin", the lead in score that it asks for (0
            otherwise); or the margin comes from scores in the data, see `score_margin`.
        out: a folder for checkpoints, log and model; None writes nothing.
        config: all options in one object.
        verbose: print what is done, with a progress bar.

    Options: listed here.

    Returns:
        A `RewardModel`, with `score(prompts, completions)` and `save(folder)`; `grpo` and `ppo` take it as `reward`.

    Metrics: `loss`; `accuracy`, the share of pairs in the right order; `margin`, their mean difference in score;
    `score`, the mean; `grad_norm`; and with `eval_data` `held_out_loss`.

    Raises:
        TypeError: if an argument is of the wrong type, or an option is unknown.
        ValueError: for an option out of range, malformed data (rows and lines are named), or a model that cannot be
            trained.
        FloatingPointError: if a metric becomes infinite or NaN.
    """
    config = _configured(RewardConfig, config, options)
    run = recipes.begin(lm, config, out, verbose=verbose)
    with run.on_mesh():
        head = ScalarHead(run.lm)
        kind, scale = ("rated", config.score_margin) if config.score_margin else ("ranked", 1.0)
        loss = reward_loss(head, centering=config.centering, margin_scale=scale)
        objective = Objective("reward", loss, kind, ("loss", "accuracy"))
        trained = recipes.trained_of(run, head=head)
        params = recipes.fit(run, data, objective, trained, samples=False)
        whole = params | {"model": trained.merged(params["model"])}
        found = RewardModel(ScalarHead(run.loaded.model), whole, run.loaded.tokenizer, run.loaded.config)
        if run.out is not None:
            found.save(run.out)
            recipes.save_adapters(run, trained, params["model"], head=params["head"])
            run.say(f"The reward model is in {run.out}.")
        return found


@takes(GRPOConfig)
def grpo(
    lm: Model,
    prompts: Data,
    *,
    out: Folder | None = None,
    config: GRPOConfig | None = None,
    verbose: bool = True,
    **options: Any,
) -> LM:
    """Optimise rewards of the model's own completions, by GRPO or another method that compares them in groups.

    The reference is `lm` as it is given; β KL(policy‖reference) is subtracted from the reward, or a term of the loss:
    see `kl`.

        jl.train.grpo("tiny-gpt2", [{"prompt": "The king"}] * 4, reward=lambda prompts, completions: [...])

    Args:
        lm: a model (`jl.load`), its name or its path.
        prompts: a path or dicts {"prompt", ...}, the prompt a string or a list of messages.
        out: a folder for checkpoints, log and model; None writes nothing.
        config: all options in one object.
        verbose: print what is done, with a progress bar.

    `reward` is a function(prompts, completions, **fields) that returns one number for each completion, or None for one
    that it does not judge. `prompts` are strings or lists of messages as they were given, `completions` are strings;
    `fields` are the other entries of the prompts, as lists with a value for each completion, and only those that it has
    parameters for are given. It may also be a `RewardModel` (`reward_model` is the folder of one), or a list of
    rewards, which are added with `reward_weights`. `jaxrl_llm.rewards` has rewards that check the right answer.

    Options: listed here.

    `method` may also be a `training.policy.Method`, whose hyperparameters are then the defaults.

    Returns:
        The trained model. `lm` stays valid.

    Metrics: `reward`; `reward_std`, the mean of the groups' standard deviations, and `frac_reward_zero_std`, the share
    of groups without a difference; `kl`, `kl_k1` and `kl_k3`, estimates of KL(policy‖reference) of whole completions in
    nats; `entropy` per token in nats; `length` in tokens; `ended`, the share of completions with EOS; `ratio` and
    `clip_fraction` over the updates of a step; `judged`, the share of completions with a reward; of several rewards
    each, as `reward/name`; `completion_tokens`; `loss`; `grad_norm`; with `text`, `text_loss`; with dynamic sampling
    `redraws`, the further draws of a step; and with `eval_data` `held_out_reward`, of several rewards each by its name,
    `held_out_kl`, `held_out_length` and `held_out_ended`.

    Raises:
        TypeError: if an argument is of the wrong type, or an option is unknown.
        ValueError: for an option out of range or options that do not fit together, malformed prompts (rows and lines
            are named), rewards that are not one finite number or None for each completion, a reward that cannot judge
            the prompts, or a model that cannot be trained.
        RuntimeError: if the reward function raises.
        FloatingPointError: if a metric becomes infinite or NaN.
    """
    return _online(GRPOConfig, "grpo", lm, prompts, out, config, verbose, options)


@takes(PPOConfig)
def ppo(
    lm: Model,
    prompts: Data,
    *,
    out: Folder | None = None,
    config: PPOConfig | None = None,
    verbose: bool = True,
    **options: Any,
) -> LM:
    """Optimise rewards of the model's own completions by PPO, with a critic that is trained beside the policy.

    The reference is `lm` as it is given; β KL(policy‖reference) is subtracted from the reward, or a term of the loss:
    see `kl`. `reward` is as in `grpo`.

        jl.train.ppo("tiny-gpt2", "prompts.jsonl", reward=scorer)

    Args:
        lm: a model (`jl.load`), its name or its path; the critic starts from its weights.
        prompts: as in `grpo`.
        out: a folder for checkpoints, log and model; None writes nothing.
        config: all options in one object.
        verbose: print what is done, with a progress bar.

    Options: listed here.

    Returns:
        The trained policy. `lm` stays valid.

    Metrics: as `grpo`; and `value_loss` and `explained_variance` of the critic.

    Raises:
        TypeError, ValueError, RuntimeError, FloatingPointError: as `grpo`.
    """
    return _online(PPOConfig, "ppo", lm, prompts, out, config, verbose, options)


def _offline(run: recipes.Run, data: Data, objective: Objective, *, reference: Any = False) -> LM:
    trained = recipes.trained_of(run, reference=reference)
    return _model(recipes.finish(run, trained, recipes.fit(run, data, objective, trained)), run)


def _online(
    cls: type[GRPOConfig],
    kind: str,
    lm: Model,
    prompts: Data,
    out: Folder | None,
    config: GRPOConfig | None,
    verbose: bool,
    options: dict[str, Any],
) -> LM:
    method = None
    if isinstance(options.get("method"), Method):
        if config is not None:
            raise ValueError("a Method must be given without config: both have the hyperparameters.")
        names = {field.name for field in dataclasses.fields(Method)}
        method = dataclasses.replace(
            options.pop("method"), **{name: value for name, value in options.items() if name in names}
        )
        shared = [field.name for field in dataclasses.fields(cls) if field.name in names]
        options |= {name: getattr(method, name) for name in shared}
    configured = _configured(cls, config, options)
    method = method_of(configured) if method is None else method
    run = recipes.begin(lm, configured, out, verbose=verbose)
    with run.on_mesh():
        return _model(online.optimise_rewards(run, prompts, kind, method=method), run)


class RewardModel(LoadedReward):
    """A reward model, as `reward` returns it and `RewardModel.load` reads it from a folder.

    It has the attributes `head`, `params`, `tokenizer` and `config`, and scores texts by `score`.
    """

    @classmethod
    def load(cls, folder: Folder) -> RewardModel:
        """Load a folder that `save`, `jaxrl-llm train reward` or transformers has written.

        Raises:
            FileNotFoundError, ValueError: as `models.load_reward_model`.
        """
        found = load_reward_model(folder)
        return cls(found.head, found.params, found.tokenizer, found.config)

    def __repr__(self) -> str:
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"RewardModel({type(self.head.lm).__name__}, {size / 1e6:.3g}M parameters)"

    def save(self, folder: Folder) -> None:
        """Write a folder that `load` and transformers load, as `...ForSequenceClassification` with one label."""
        save_reward_model(folder, self.head, self.params, self.tokenizer, config=self.config)


def __dir__() -> list[str]:
    return sorted(__all__)
