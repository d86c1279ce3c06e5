"""The options of training, each declared once: those of `jaxrl_llm.train`, the command line and a run's `run.json`.

Imports nothing heavy, so that `jaxrl-llm train --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxrl_llm.options import STATIC, Checked, Range, number

Data = str | Path | Iterable[Mapping[str, Any]]  # a file, or dicts
if TYPE_CHECKING:
    DataOption, Function, ModelOption = Data | None, str | Callable[..., Any], Any
    Functions, Strings, Numbers = Function | Sequence[Any], str | Sequence[str], Sequence[float]
    Targets = str | Sequence[str] | None
    Losses = Function | Sequence[Function]
else:  # on the command line
    DataOption, Function, ModelOption = Path | None, str, str | None
    Functions, Strings, Numbers = tuple[str, ...], tuple[str, ...], tuple[float, ...]
    Targets = tuple[str, ...] | None
    Losses = str | tuple[str, ...]
Cut = Literal["left", "right", "raise", "skip"]
TrainOn = Literal["all", "last", "completion"]
OnBad = Literal["raise", "skip"]
KL = Literal["reward", "reverse", "forward"]
Scale = Literal["group", "batch", "none"]
Importance = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Dtype = Literal["float32", "bfloat16"]
Attention = Literal["exact", "cudnn"]
Schedule = Literal["linear", "cosine", "constant", "inverse_sqrt"]
Optimizer = Literal["adamw", "adam", "sgd", "lion", "adafactor", "muon"]
OPTIMIZERS: dict[str, tuple[str, ...]] = {  # with the hyperparameters that can be set, by optax's names
    "adamw": ("b1", "b2", "eps"),
    "adam": ("b1", "b2", "eps"),
    "sgd": ("momentum",),
    "lion": ("b1", "b2"),
    "adafactor": ("decay_rate", "clipping_threshold", "momentum"),
    "muon": ("beta", "adam_b1", "adam_b2"),
}


def check_optimizer(name: str, hyperparameters: Iterable[str]) -> None:
    """Raise ValueError for an unknown optimiser, or a hyperparameter that it does not have."""
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, but is {name!r}.")
    if unknown := sorted(set(hyperparameters) - set(OPTIMIZERS[name])):
        listed = ", ".join(OPTIMIZERS[name])
        raise ValueError(f"the optimizer {name} has no {', '.join(unknown)}: its hyperparameters are {listed}.")


BETTER = {  # by the last word of a metric: 1 if larger values are better, -1 if smaller ones are
    **dict.fromkeys(("accuracy", "margin", "reward", "score", "logp", "rate"), 1),
    **dict.fromkeys(("loss", "perplexity", "kl"), -1),
}


def kind_of(metric: str) -> str:
    """Return the last word of a metric's name: that of held_out_reward and of reward/exact_match is reward."""
    return metric.partition("/")[0].split("_")[-1]


def direction(metric: str) -> tuple[str, int]:
    """Return the name of the metric of `keep_best`, and 1 if larger values are better or -1 if smaller ones are.

    Raises:
        ValueError: if neither the name's last word nor "max:" or "min:" before it says which.
    """
    if metric.startswith(("max:", "min:")):
        return metric[4:], 1 if metric.startswith("max:") else -1
    sign = BETTER.get(kind_of(metric))
    if sign is None:
        raise ValueError(
            f'keep_best must be a metric that ends in {", ".join(BETTER)}, or have "max:" or "min:" before it, '
            f"but is {metric!r}."
        )
    return metric, sign


# All runs -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """Options of every run."""

    steps: int = number(1000, 1)
    """Optimiser steps; of grpo and ppo, batches of completions."""
    num_epochs: float | None = number(None, 0, above=True)
    """Passes over the data, instead of a number of steps."""
    batch_size: int = number(16, 1)
    """Examples of a step; of grpo and ppo, completions."""
    microbatches: int = number(1, 1)
    """Parts that a batch is split into, their gradients accumulated: less memory, the same step."""
    learning_rate: float = number(1e-5, 0)
    """The peak of the learning rate, after the warm-up."""
    schedule: Schedule = "linear"
    """The learning rate after the warm-up: "linear" and "cosine" decay to 0 at the end of the run, "inverse_sqrt" as
    1/√step; the last two, "constant" and "inverse_sqrt", do not depend on the number of steps."""
    warmup: float = number(0.05, 0)
    """Steps in which the learning rate rises; below 1 their share of all steps. Where it decays to 0 afterwards, at
    most all steps but the last."""
    optimizer: Optimizer = "adamw"
    """The optimiser; muon is Muon on the weight matrices and Adam on all else."""
    optimizer_kwargs: dict[str, float] = dataclasses.field(default_factory=dict)
    """Further hyperparameters of the optimiser by optax's names, such as b2 0.95 (of muon adam_b2)."""
    weight_decay: float = number(0.0, 0)
    """Weight decay; norms, biases and embeddings are left alone."""
    clip_norm: float = number(1.0, 0, above=True)
    """Gradients of a larger norm are scaled down to it."""
    max_length: int | None = number(None, 1)
    """Most tokens of prompt and completion together; by default the model's context."""
    cut: Cut = "left"
    """The part that longer examples lose: "left", the beginning of the prompt; "right", the end of the completion;
    "skip" leaves them out and reports them; "raise" refuses them."""
    train_on: TrainOn = "all"
    """The tokens of a conversation that count: "all", every turn of the assistant after the prompt; "last", the last
    turn; "completion", all that follows the prompt, also others' words. A string counts as a whole."""
    on_bad: OnBad = "raise"
    """Malformed examples, and those that cannot be cut to max_length, stop the run, or are skipped and reported."""
    cache: bool = True
    """Keep the tokens of data that take long in the user's cache folder, for the next run on the same data."""
    show_mask: bool = False
    """Print the first example as the model reads it, with the tokens that count between ⟦ and ⟧."""
    dtype: Dtype = "float32"
    """Type of the computation."""
    param_dtype: Dtype = "float32"
    """Type of the weights. With bfloat16, which needs dtype bfloat16 too, the optimiser's moments are still in float32,
    and updated weights are rounded at random, so that small steps add up."""
    lora_rank: int = number(0, 0)
    """Train LoRA adapters of this rank instead of all weights; 0 trains all weights."""
    lora_alpha: float | None = number(None, 0, above=True)
    """Adapters are scaled by lora_alpha / lora_rank; by default it is 16."""
    lora_targets: Targets = None
    """Layers that have adapters: names or their ends, such as c_attn or mlp.up_proj, regular expressions of whole
    names, or all-linear; by default those of attention queries and values."""
    lora_rslora: bool = False
    """Scale adapters by lora_alpha / √lora_rank instead."""
    lora_from: Path | None = None
    """Folder of an adapter of this model, whose training is continued with its rank, scale and layers."""
    checkpoint_blocks: bool = False
    """Recompute the inside of the layers for the gradient: less memory, more time."""
    attention: Attention = "exact"
    """Form of attention of the model, its reference and its teacher: "exact", or "cudnn", NVIDIA's fused kernel, which
    needs dtype bfloat16. Critics, given reward models and printed samples stay exact."""
    log_every: int = number(10, 1)
    """Steps between two lines of log.jsonl."""
    save_every: int = number(100, 1)
    """Steps between two checkpoints, held-out losses and samples of text."""
    keep: int = number(2, 1)
    """Number of checkpoints that are kept."""
    mesh: str | None = None
    """Devices as data=4,fsdp=2,model=1: a batch is split over data × fsdp, the weights over fsdp × model. The product
    must be the number of all devices; -1 is as many as are left, such as data=-1. By default one device, or those of a
    model in memory. batch_size is that of all devices together."""
    seed: int = number(0, 0, 2**32 - 1)
    """Random seed: of the order of the examples, of new parameters and of samples."""
    resume: bool = False
    """Continue from the last checkpoint in the output folder."""
    keep_best: str | None = None
    """The model is that of the checkpoint at which this number of the held-out evaluation was best, such as
    held_out_loss or held_out_accuracy; "max:" or "min:" before a name of one's own says which values are better."""
    tensorboard: bool = False
    """Write the log as TensorBoard events too."""
    wandb: bool = False
    """Send the log to Weights & Biases too; WANDB_PROJECT, WANDB_NAME and WANDB_MODE in the environment count."""

    def __post_init__(self):
        super().__post_init__()
        if self.num_epochs is not None and self.steps != Config.steps:
            raise ValueError(
                f"one of steps and num_epochs must be given, but both are, {self.steps} and {self.num_epochs:g}."
            )
        if self.batch_size % self.microbatches:
            raise ValueError(f"microbatches must divide batch_size, {self.batch_size}, but is {self.microbatches}.")
        if isinstance(self.lora_targets, str):
            object.__setattr__(self, "lora_targets", (self.lora_targets,))
        if self.lora_from is not None and (self.lora_rank or self.lora_alpha or self.lora_targets or self.lora_rslora):
            raise ValueError(
                "lora_rank, lora_alpha, lora_targets and lora_rslora must be left out with lora_from, which has them."
            )
        for name in ("lora_alpha", "lora_targets", "lora_rslora"):
            if getattr(self, name) and not self.lora_rank:
                raise ValueError(f"{name} is of adapters, which lora_rank asks for, but lora_rank is 0.")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup must be a share below 1 or a whole number of steps, but is {self.warmup}.")
        if self.param_dtype == "bfloat16" and self.dtype != "bfloat16":
            raise ValueError(f"dtype must be bfloat16 if param_dtype is, but is {self.dtype}.")
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ValueError(f"dtype must be bfloat16 for attention cudnn, but is {self.dtype}.")
        check_optimizer(self.optimizer, self.optimizer_kwargs)
        if self.keep_best is not None:
            direction(self.keep_best)
            if getattr(self, "eval_data", None) is None:
                raise ValueError("keep_best needs held-out data: eval_data must be given, but is None.")

    @property
    def has_adapters(self) -> bool:
        """True if adapters are trained, not all weights."""
        return self.lora_rank > 0 or self.lora_from is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfflineConfig(Config):
    """Options of every run on given completions."""

    eval_data: DataOption = None
    """Held-out data of the same format, for the held-out loss."""
    packing: bool = False
    """Put several examples into each row, each read as if it stood alone, so that little is padding. batch_size then
    counts rows of max_length tokens, by default 1024 or those of the longest example; of preferences and rankings, bins
    of as many such rows as an example has completions."""
    lora_dropout: float = number(0.0, 0, 1)
    """Share of the inputs of adapters that training drops, for each token anew."""

    def __post_init__(self):
        super().__post_init__()
        if self.lora_dropout and not self.has_adapters:
            raise ValueError(
                "lora_dropout is of adapters, which lora_rank or lora_from asks for, but neither is given."
            )
        if self.lora_dropout == 1:
            raise ValueError("lora_dropout must be below 1, but is 1.")


LOGGING = (
    "eval_data",
    "log_every",
    "save_every",
    "keep",
    "keep_best",
    "resume",
    "tensorboard",
    "wandb",
    "cache",
    "show_mask",
)
FREE = (
    *LOGGING,
    "mesh",
    "microbatches",
    "checkpoint_blocks",
    "attention",
    "model",
    "reward_model",
    "lora_from",
    "reference",
    "precompute_reference",
    "teacher",
)  # a run can be resumed with others: its steps are the same


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(OfflineConfig):
    """Fine-tune on completions: examples of prompt and completion, of messages, or of text."""

    chunk: bool = False
    """Train on texts longer than max_length in parts that share a token, so that every token is predicted once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(OfflineConfig):
    """Train a reward model on prompt, chosen and rejected, or on prompt, answers and ranks."""

    centering: float = number(0.0, 0)
    """Weight of the squared sum of two scores, which holds the scores around 0."""
    score_margin: float = number(0.0, 0)
    """Margin of a pair per unit of the difference between "score_chosen" and "score_rejected", or between the "scores"
    of answers, which every line must then have; at 0 they do not count. The "margin" of a line always counts."""

    def __post_init__(self):
        super().__post_init__()
        if self.train_on != "all":
            raise ValueError(f'train_on must be "all", as a reward model scores whole texts, but is "{self.train_on}".')


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig(OfflineConfig):
    """Optimise preferences: prompt, chosen and rejected (for kto: prompt, completion and label)."""

    loss: Losses = "dpo"
    """dpo, robust_dpo, ipo, hinge, exo, nca, bco, sppo, apo_zero, apo_down, discopop, f_dpo, length_normalised_dpo,
    length_normalised_ipo, ld_dpo, wpo, aot, aot_unpaired, simpo, alphapo, orpo, cpo, sft or kto; or your own
    loss(a, b, *, beta, ...) of the two log-ratios to the reference: the function, or its place "file.py:function".
    Further numbers of a row are given to its keywords; dpo takes margin. Of several losses the sum is minimised."""
    loss_weights: tuple[float, ...] = ()
    """Weights of several losses, in their order; by default 1 each."""
    beta: float | None = number(None, 0, above=True)
    """Weight of the KL, in units of reward per nat; by default the loss's own, which is 0.1."""
    loss_kwargs: dict[str, float | str] = dataclasses.field(default_factory=dict)
    """Further hyperparameters of the loss, such as label_smoothing 0.1, or divergence jensen_shannon of f_dpo."""
    reference: ModelOption = None
    """The reference model, with the tokenizer of the trained one; by default the trained model as it was given."""
    precompute_reference: bool = False
    """Compute the reference's log-probabilities once, before the first step, and keep them in the output folder: the
    same losses, without the reference's weights."""

    def __post_init__(self):
        if isinstance(self.loss, list | tuple) and len(self.loss) == 1:
            object.__setattr__(self, "loss", self.loss[0])
        super().__post_init__()
        for each in self.losses:
            if not isinstance(each, str) and not callable(each):
                raise TypeError(f"loss must be a name or a function, or several, but is {self.loss!r}.")
        if self.loss_weights and len(self.loss_weights) != len(self.losses):
            raise ValueError(
                f"loss_weights must have a weight for each of {len(self.losses)} losses, "
                f"but has {len(self.loss_weights)}."
            )
        if self.loss_weights and not any(self.loss_weights):
            raise ValueError("loss_weights must not all be 0.")
        for weight in self.loss_weights:
            Range(0).check("loss_weights", weight, integer=False)
        if self.loss == "kto" and self.microbatches > 1:
            raise ValueError(
                f"microbatches must be 1 for kto, which compares all rows of a batch, but is {self.microbatches}."
            )
        if self.packing and self.precompute_reference:
            raise ValueError("precompute_reference must be False with packing, but is True.")
        if self.loss == "kto" and self.precompute_reference:
            raise ValueError(
                "precompute_reference must be False for kto, whose reference point is of completions that change "
                "their prompts with the batch, but is True."
            )

    @property
    def losses(self) -> list[Any]:
        """The losses of the sum, or the one loss."""
        return list(self.loss) if isinstance(self.loss, list | tuple) else [self.loss]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(OfflineConfig):
    """Learn the next-token distributions of a teacher (GKD): examples of prompt and completion, or prompts alone."""

    teacher: ModelOption = None
    """The teacher, a model with the tokenizer of the trained one."""
    divergence: Literal["jensen_shannon", "forward_kl", "reverse_kl"] = "jensen_shannon"
    """The divergence of teacher and student at each token: the generalised Jensen-Shannon divergence,
    KL(teacher‖student) or KL(student‖teacher)."""
    mixture: float | None = number(None, 0, 1, above=True)
    """The teacher's share of the mixture of jensen_shannon, below 1; by default 0.5."""
    on_policy: float = number(0.5, 0, 1)
    """Share of the steps whose completions the student samples itself; at 1 the examples need no completions."""
    max_new_tokens: int = number(64, 1)
    """Most tokens of a sampled completion."""
    temperature: float = number(1.0, 0, above=True)
    """Temperature of student and teacher, in sampling and in the divergence."""

    def __post_init__(self):
        super().__post_init__()
        if self.packing:
            raise ValueError("packing must be False for distillation, but is True.")
        if self.teacher is None:
            raise ValueError("teacher must be a model, its name or its path, but is None.")
        if self.mixture is not None and (self.divergence != "jensen_shannon" or self.mixture == 1):
            wanted = "below 1" if self.mixture == 1 else f"None for {self.divergence}, which has none"
            raise ValueError(f"mixture must be {wanted}, but is {self.mixture}.")


# Online methods -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyOptions(Checked):
    """Hyperparameters of all online methods."""

    group_size: int = number(4, 1, static=True)
    """Completions of each prompt."""
    beta: float = number(0.05, 0)
    """Weight of KL(policy‖reference), in units of reward per nat. A group's spread never divides it."""
    kl: KL = dataclasses.field(default="reward", metadata=STATIC)
    """Place of the KL penalty: "reward", k1 of each token is subtracted from its reward; "reverse" or "forward", a term
    of the loss whose gradient is that of KL(policy‖reference) or of KL(reference‖policy)."""
    scale_rewards: Scale = dataclasses.field(default="none", metadata=STATIC)
    """Rewards less the mean of their group are divided by the standard deviation of the group or of the batch."""
    gamma: float = number(0.0, 0)
    """Weight of the pretraining term gamma E[log policy], in units of reward per nat of a token."""
    entropy_coefficient: float = number(0.0, 0, static=True)
    """Weight of the entropy bonus, in units of reward per nat of a token."""
    epochs: int = number(1, 1, static=True)
    """Passes over each batch of completions."""
    minibatches: int = number(1, 1, static=True)
    """Parts of each batch, with one update after the other."""
    clip_low: float = number(0.2, 0)
    """Probability ratios are clipped below 1 - clip_low."""
    clip_high: float = number(0.2, 0)
    """Probability ratios are clipped above 1 + clip_high."""
    importance_mode: Importance = dataclasses.field(default="token_truncate", metadata=STATIC)
    """Importance weights for what was not sampled from the policy itself, such as by top-p: of tokens or of whole
    completions ("sequence"), which beyond importance_floor and importance_cap are truncated to them or are 0 ("mask").
    """
    importance_cap: float = number(2.0, 0, above=True)
    """Largest importance weight."""
    importance_floor: float = number(0.0, 0)
    """Smallest importance weight."""
    overlong_buffer: float = number(0.0, 0, 1)
    """Share of max_new_tokens, at its end, over which a completion's reward falls by up to 1, linearly."""
    mask_truncated: bool = dataclasses.field(default=False, metadata=STATIC)
    """Leave completions that did not end within max_new_tokens out of the loss."""
    normaliser: float | None = number(None, 0, above=True)
    """Tokens that the sum over a completion is divided by, of dr_grpo; by default max_new_tokens."""


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
    """Folder of a reward model that `train reward` wrote."""
    reward: Functions = ()
    """One or more functions(prompts, completions) that return a number for each completion, or None for one that they
    do not judge, at "file.py:function" or "module:function", such as jaxrl_llm.rewards:exact_match; further parameters
    receive the entries of these names in the prompts' lines. Or folders of reward models."""
    reward_weights: Numbers = ()
    """Weights of the rewards, in their order, that of reward_model last; by default 1 each."""
    dynamic_sampling: int | None = number(None, 0)
    """Most further draws of a step, in which groups without a difference in reward are replaced by groups of further
    prompts; by default 0, of dapo 9."""
    max_new_tokens: int = number(64, 1)
    """Most tokens of a completion."""
    temperature: float = number(1.0, 0, above=True)
    """Temperature of the policy, in sampling and in all log-probabilities."""
    top_p: float = number(1.0, 0, 1, above=True)
    """Sample from the smallest set of tokens of this probability; importance weights correct for it."""
    top_k: int | None = number(None, 1)
    """Sample from the k most probable tokens; importance weights correct for it."""
    min_p: float | None = number(None, 0, 1)
    """Sample from the tokens of at least this share of the most probable one's probability; importance weights correct
    for it."""
    stop: Strings = ()
    """Strings that end a completion; they belong to it."""
    eval_data: DataOption = None
    """Held-out prompts: their mean rewards, KL and lengths, and samples, at every checkpoint."""
    beta: float | None = number(None, 0)
    """Weight of KL(policy‖reference), in units of reward per nat; by default 0.05, of grpo 0.04, of dr_grpo, dapo, gspo
    and cispo 0. A group's spread never divides it."""
    kl: KL | None = dataclasses.field(default=None, metadata=STATIC)
    """Place of the KL penalty: "reward", k1 of each token is subtracted from its reward; "reverse" or "forward", a term
    of the loss whose gradient is that of KL(policy‖reference) or of KL(reference‖policy). By default "reward", of grpo
    "forward", as published."""
    scale_rewards: Scale | None = dataclasses.field(default=None, metadata=STATIC)
    """Rewards less the mean of their group are divided by the standard deviation of the group or of the batch; by
    default "none", of grpo, dapo, gspo and cispo "group"."""
    overlong_buffer: float | None = number(None, 0, 1)
    """Share of max_new_tokens, at its end, over which a completion's reward falls by up to 1, linearly; by default 0,
    of dapo 0.2."""
    clip_low: float | None = number(None, 0)
    """Probability ratios are clipped below 1 - clip_low; by default 0.2, of gspo 3e-4, of cispo 1."""
    clip_high: float | None = number(None, 0)
    """Probability ratios are clipped above 1 + clip_high; by default 0.2, of dapo 0.28, of gspo 4e-4, of cispo 4."""
    text: DataOption = None
    """Pretraining text for the term of gamma: examples as `train sft` takes them."""

    def __post_init__(self):
        super().__post_init__()
        count = len(self.rewards)
        if not count:
            raise ValueError("reward or reward_model must be given, or both, but neither is.")
        weights = tuple(self.reward_weights)
        if len(weights) not in (0, count) or not all(_is_finite(each) for each in weights):
            raise ValueError(
                f"reward_weights must be {count} finite number{'s' * (count > 1)}, one for each reward, "
                f"but are {list(weights)}."
            )
        object.__setattr__(self, "reward_weights", weights)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(each, str) and each for each in stop):
            raise ValueError(f"stop must be strings that are not empty, but is {list(stop)}.")
        object.__setattr__(self, "stop", stop)
        if self.keep_best is not None and self.eval_data is None:
            raise ValueError("keep_best needs held-out data: eval_data must be given, but is None.")
        if self.dynamic_sampling and self.group_size < 2:
            raise ValueError(
                f"dynamic_sampling must be 0 for a group_size of {self.group_size}, in which no completions differ, "
                f"but is {self.dynamic_sampling}."
            )
        if (self.gamma > 0) != (self.text is not None):
            raise ValueError(
                f"gamma and text must be given together, but gamma is {self.gamma} and text is {self.text}."
            )
        if self.importance_mode.startswith("sequence") and (self.top_p < 1 or self.top_k or self.min_p):
            raise ValueError(
                "importance_mode must be token_truncate or token_mask with top_p, top_k or min_p, as weights of whole "
                f"completions vanish with their length, but is {self.importance_mode}."
            )
        if self.importance_floor > self.importance_cap:
            raise ValueError(
                f"importance_floor must be at most importance_cap, {self.importance_cap}, "
                f"but is {self.importance_floor}."
            )
        if self.batch_size % self.group_size:
            raise ValueError(f"group_size must divide batch_size, {self.batch_size}, but is {self.group_size}.")
        if self.batch_size % (self.minibatches * self.microbatches):
            raise ValueError(
                f"minibatches × microbatches must divide batch_size, {self.batch_size}, "
                f"but is {self.minibatches} × {self.microbatches}."
            )

    @property
    def rewards(self) -> tuple[Any, ...]:
        """All rewards, the reward model last."""
        several = isinstance(self.reward, Sequence) and not isinstance(self.reward, str)
        given = tuple(self.reward) if several else () if self.reward is None else (self.reward,)
        model = Path(self.reward_model) if isinstance(self.reward_model, str) else self.reward_model
        return given if model is None else (*given, model)

    @property
    def redraws(self) -> int:
        """Most further draws of a step."""
        return {"dapo": 9}.get(self.method, 0) if self.dynamic_sampling is None else self.dynamic_sampling


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig(CriticOptions, GRPOConfig):
    """Optimise rewards of the model's own completions against a critic, with clipped updates."""

    method: Literal["ppo"] = "ppo"
    """Advantage and surrogate loss."""
    group_size: int = number(1, 1, static=True)
    epochs: int = number(4, 1, static=True)
    whiten: bool = dataclasses.field(default=True, metadata=STATIC)


# A finished model -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Checked):
    """Options of the evaluation of a model."""

    reference: ModelOption = None
    """A model: the accuracy of preferences is also that of the log-ratios to it, DPO's implicit rewards."""
    reward: Function | None = None
    """Complete the prompts, and judge the completions: a function as in `train grpo`, at "file.py:function"."""
    reward_model: Path | None = None
    """A folder of a reward model that judges the completions."""
    against: ModelOption = None
    """Another model: the win rate is the share of prompts whose completion has a larger reward than its."""
    max_new_tokens: int = number(64, 1)
    """Most tokens of a completion."""
    temperature: float = number(1.0, 0, above=True)
    """Temperature of the completions."""
    batch_size: int = number(16, 1)
    """Rows of one forward pass."""
    max_length: int | None = number(None, 1)
    """Most tokens of prompt and completion together; by default the model's context."""
    cut: Cut = "left"
    """The part that longer examples lose, as in `train`."""
    on_bad: OnBad = "raise"
    """Malformed examples stop the evaluation, or are skipped and reported."""
    seed: int = number(0, 0, 2**32 - 1)
    """Random seed of the completions."""
