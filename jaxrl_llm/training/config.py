"""The options of training, each declared once: those of `jaxrl_llm.train`, the command line and a run's `run.json`.

Imports nothing heavy, so that `jaxrl-llm train --help` answers at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxrl_llm.options import STATIC, Checked, Range, number

Data = str | Path | Iterable[Mapping[str, Any]]  # a file of JSON lines, or dicts
if TYPE_CHECKING:
    DataOption, Function = Data | None, str | Callable[..., Any]
    Losses = Function | Sequence[Function]
else:  # on the command line
    DataOption, Function = Path | None, str
    Losses = str | tuple[str, ...]
Cut = Literal["left", "right", "raise"]
OnBad = Literal["raise", "skip"]
Divergence = Literal["reverse", "forward"]


# All runs -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """Options of every run."""

    steps: int = number(1000, 1)
    """Optimiser steps; of grpo and ppo, batches of completions."""
    batch_size: int = number(16, 1)
    """Examples of a step; of grpo and ppo, completions."""
    microbatches: int = number(1, 1)
    """Parts that a batch is split into, their gradients accumulated: less memory, the same step."""
    learning_rate: float = number(1e-5, 0)
    """The peak, after the warm-up; from there it decays linearly to 0."""
    warmup: float = number(0.05, 0, 1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = number(0.0, 0)
    """Weight decay of AdamW."""
    clip_norm: float = number(1.0, 0, above=True)
    """Gradients of a larger norm are scaled down to it."""
    max_length: int | None = number(None, 1)
    """Most tokens of prompt and completion together; by default the model's context."""
    cut: Cut = "left"
    """The part that longer examples lose: "left", the beginning of the prompt; "right", the end of the completion;
    "raise" refuses them."""
    on_bad: OnBad = "raise"
    """Malformed examples stop the run, or are skipped and reported."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; the weights stay in float32."""
    lora_rank: int = number(0, 0)
    """Train LoRA adapters of this rank instead of all weights; 0 trains all weights."""
    lora_alpha: float = number(16.0, 0, above=True)
    """Adapters are scaled by lora_alpha / lora_rank."""
    checkpoint_blocks: bool = False
    """Recompute the inside of the layers for the gradient: less memory, more time."""
    log_every: int = number(10, 1)
    """Steps between two lines of log.jsonl."""
    save_every: int = number(100, 1)
    """Steps between two checkpoints, held-out losses and samples of text."""
    keep: int = number(2, 1)
    """Number of checkpoints that are kept."""
    seed: int = number(0, 0, 2**32 - 1)
    """Random seed: of the order of the examples, of new parameters and of samples."""
    resume: bool = False
    """Continue from the last checkpoint in the output folder."""
    tensorboard: bool = False
    """Write the log as TensorBoard events too."""

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size % self.microbatches:
            raise ValueError(f"microbatches must divide batch_size, {self.batch_size}, but is {self.microbatches}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfflineConfig(Config):
    """Options of every run on given completions."""

    eval_data: DataOption = None
    """Held-out data of the same format, for the held-out loss."""


LOGGING = ("eval_data", "log_every", "save_every", "keep", "resume", "tensorboard")  # they do not identify a run


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(OfflineConfig):
    """Fine-tune on completions: examples of prompt and completion, of messages, or of text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(OfflineConfig):
    """Train a reward model on prompt, chosen and rejected, or on prompt, answers and ranks."""

    centering: float = number(0.0, 0)
    """Weight of the squared sum of two scores, which holds the scores around 0."""

    def __post_init__(self):
        super().__post_init__()
        if self.lora_rank:
            raise ValueError(f"lora_rank must be 0, as a reward model is trained whole, but is {self.lora_rank}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig(OfflineConfig):
    """Optimise preferences: prompt, chosen and rejected (for kto: prompt, completion and label)."""

    loss: Losses = "dpo"
    """dpo, robust_dpo, ipo, hinge, exo, nca, bco, sppo, apo_zero, apo_down, discopop, f_dpo, length_normalised_dpo,
    length_normalised_ipo, ld_dpo, wpo, aot, aot_unpaired, simpo, alphapo, orpo, cpo, sft or kto; or your own
    loss(a, b, *, beta, ...) of the two log-ratios to the reference: the function, or on the command line its place
    "file.py:function". Further numbers of a row are given to its keywords; dpo takes margin. Of several losses the sum
    is minimised."""
    loss_weights: tuple[float, ...] = ()
    """Weights of several losses, in their order; by default 1 each."""
    beta: float | None = number(None, 0, above=True)
    """Weight of the KL, in units of reward per nat; by default the loss's own, which is 0.1."""
    loss_kwargs: dict[str, float | str] = dataclasses.field(default_factory=dict)
    """Further hyperparameters of the loss, such as label_smoothing 0.1, or divergence jensen_shannon of f_dpo."""

    def __post_init__(self):
        super().__post_init__()
        for each in self.losses:
            if not isinstance(each, str) and not callable(each):
                raise TypeError(f"loss must be a name or a function, or several, but is {self.loss!r}.")
        if self.loss_weights and len(self.loss_weights) != len(self.losses):
            raise ValueError(
                f"loss_weights must have a weight for each of {len(self.losses)} losses, "
                f"but has {len(self.loss_weights)}."
            )
        for weight in self.loss_weights:
            Range(0).check("loss_weights", weight, integer=False)
        if self.loss == "kto" and self.microbatches > 1:
            raise ValueError(
                f"microbatches must be 1 for kto, which compares all rows of a batch, but is {self.microbatches}."
            )

    @property
    def losses(self) -> list[Any]:
        """The losses of the sum, or the one loss."""
        return list(self.loss) if isinstance(self.loss, list | tuple) else [self.loss]


# Online methods -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyOptions(Checked):
    """Hyperparameters of all online methods."""

    group_size: int = number(4, 1, static=True)
    """Completions of each prompt."""
    beta: float = number(0.05, 0)
    """Weight of KL(policy‖reference), in units of reward per nat."""
    kl_loss: Divergence | None = dataclasses.field(default=None, metadata=STATIC)
    """Add this divergence to the loss as a term; by default the KL penalty is part of the reward."""
    gamma: float = number(0.0, 0)
    """Weight of the pretraining term gamma E[log policy], in units of reward per nat of a token."""
    epochs: int = number(1, 1, static=True)
    """Passes over each batch of completions."""
    minibatches: int = number(1, 1, static=True)
    """Parts of each batch, with one update after the other."""
    clip_low: float = number(0.2, 0)
    """Probability ratios are clipped below 1 - clip_low."""
    clip_high: float = number(0.2, 0)
    """Probability ratios are clipped above 1 + clip_high."""
    importance_cap: float = number(2.0, 0, above=True)
    """Largest importance weight of a token that was not sampled from the policy itself, such as by top-p."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticOptions(Checked):
    """Hyperparameters of methods with a critic."""

    discount: float = number(1.0, 0, 1)
    """Discount factor γ for each token."""
    lambda_: Annotated[float, tyro.conf.arg(name="lambda")] = number(0.95, 0, 1)
    """λ of GAE: at 1 advantages use the observed rewards alone, at 0 the critic's next value."""
    value_coefficient: float = number(0.5, 0)
    """Weight of the critic's loss."""
    value_clip: float | None = number(0.2, 0, static=True)
    """Largest move of a value in one batch before its loss is clipped, in units of reward; None: no clipping."""
    dual_clip: float | None = number(None, 1, above=True, static=True)
    """Largest ratio that counts for a negative advantage; None: no bound."""
    whiten: bool = dataclasses.field(default=False, metadata=STATIC)
    """Normalise the advantages of a batch to mean 0 and variance 1."""
    bootstrap: bool = dataclasses.field(default=False, metadata=STATIC)
    """Value the end of a completion without EOS by the critic; by default it is worth 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOConfig(PolicyOptions, Config):
    """Optimise rewards of the model's own completions, each compared with the others of its prompt."""

    method: Literal["grpo", "rloo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce"] = "grpo"
    """Advantage and surrogate loss."""
    reward_model: Path | None = None
    """Folder of a reward model that `train reward` wrote, with the policy's tokenizer."""
    reward: Function | None = None
    """A function(prompts, completions) that returns a number for each completion, at "file.py:function" or
    "module:function". Its further parameters receive the entries of these names in the prompts' lines."""
    max_new_tokens: int = number(64, 1)
    """Most tokens of a completion."""
    temperature: float = number(1.0, 0, above=True)
    """Temperature of the policy, in sampling and in all log-probabilities."""
    top_p: float = number(1.0, 0, 1, above=True)
    """Sample from the smallest set of tokens of this probability; importance weights correct for it."""
    clip_low: float | None = number(None, 0)
    """Probability ratios are clipped below 1 - clip_low; by default 0.2, of gspo 3e-4, of cispo 1."""
    clip_high: float | None = number(None, 0)
    """Probability ratios are clipped above 1 + clip_high; by default 0.2, of dapo 0.28, of gspo 4e-4, of cispo 4."""
    text: DataOption = None
    """Pretraining text for the term of gamma: examples as `train sft` takes them."""

    def __post_init__(self):
        super().__post_init__()
        if (self.reward is None) == (self.reward_model is None):
            given = "neither" if self.reward is None else "both"
            raise ValueError(f"one of reward and reward_model must be given, but {given} is.")
        if (self.gamma > 0) != (self.text is not None):
            raise ValueError(
                f"gamma and text must be given together, but gamma is {self.gamma} and text is {self.text}."
            )
        if self.batch_size % self.group_size:
            raise ValueError(f"group_size must divide batch_size, {self.batch_size}, but is {self.group_size}.")
        if self.batch_size % (self.minibatches * self.microbatches):
            raise ValueError(
                f"minibatches × microbatches must divide batch_size, {self.batch_size}, "
                f"but is {self.minibatches} × {self.microbatches}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig(CriticOptions, GRPOConfig):
    """Optimise rewards of the model's own completions against a critic, with clipped updates."""

    method: Literal["ppo"] = "ppo"
    """Advantage and surrogate loss."""
    group_size: int = number(1, 1, static=True)
    epochs: int = number(4, 1, static=True)
    whiten: bool = dataclasses.field(default=True, metadata=STATIC)
