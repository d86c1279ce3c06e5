"""`jaxrl-llm train`: fine-tune, train a reward model, optimise preferences or rewards, from files of JSON lines."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

LossName = Literal[
    "dpo", "robust_dpo", "ipo", "hinge", "exo", "nca", "bco", "sppo", "apo_zero", "apo_down", "discopop", "f_dpo",
    "length_normalised_dpo", "simpo", "orpo", "cpo", "kto",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """What every run has."""

    data: Path
    """A file of JSON lines."""
    out: Path
    """The folder of the run and, at its end, of the model."""
    model: str = "tiny-gpt2"
    """A folder, one of the built-in models, or a name on the Hugging Face hub."""
    eval_data: Path | None = None
    """A file of the same kind, for the loss on what is not trained on."""
    steps: int = 1000
    """Optimiser steps (online: batches of answers)."""
    batch_size: int = 16
    """Records of a step (online: answers)."""
    microbatches: int = 1
    """Parts that a batch is cut into: less memory, the same step."""
    learning_rate: float = 1e-5
    """At its highest, after the warm-up; it then falls linearly to 0."""
    warmup: float = 0.05
    """The share of the steps that warm up."""
    weight_decay: float = 0.0
    """AdamW's."""
    clip_norm: float = 1.0
    """The largest norm of a gradient."""
    max_length: int | None = None
    """Tokens of prompt and answer; by default the model's context."""
    cut: Literal["left", "right", "raise"] = "left"
    """What over-long rows lose: the beginning of the prompt, or the end of the answer; or they are refused."""
    on_bad: Literal["raise", "skip"] = "raise"
    """Bad lines stop the run, or are skipped and named."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; the weights are kept in float32."""
    lora_rank: int = 0
    """Train adapters of this rank instead of all weights; 0 for none."""
    lora_alpha: float = 16.0
    """Adapters count alpha / rank."""
    checkpoint_blocks: bool = False
    """Compute what is inside the layers anew for the gradient: less memory, more time."""
    log_every: int = 10
    """Steps between two lines of log.jsonl."""
    save_every: int = 100
    """Steps between two checkpoints, evaluations and samples of text."""
    keep: int = 2
    """Checkpoints that stay."""
    seed: int = 0
    """Of the order of the records, of adapters and of samples."""
    resume: bool = False
    """Go on from the last checkpoint in the output folder."""
    tensorboard: bool = False
    """Write the log as TensorBoard's events too."""

    def settings(self) -> object:
        """As the recipes take them."""
        from jaxrl_llm.training.recipes import Run

        shared = {field.name for field in dataclasses.fields(Run)}
        return Run(**{name: value for name, value in vars(self).items() if name in shared})


@dataclasses.dataclass(frozen=True)
class Sft(Options):
    """Fine-tune on answers: lines of prompt and answer, of messages, or of text."""

    def run(self) -> None:
        """Train, and write the model."""
        from jaxrl_llm.training import recipes

        recipes.sft(self.settings())


@dataclasses.dataclass(frozen=True)
class Reward(Options):
    """Train a reward model on prompt, chosen and rejected, or on prompt, answers and ranks."""

    centering: float = 0.0
    """Weight of the squared sum of two scores, which holds them around 0."""

    def run(self) -> None:
        """Train, and write the reward model."""
        from jaxrl_llm.training import recipes

        recipes.reward(self.settings(), centering=self.centering)


@dataclasses.dataclass(frozen=True)
class Dpo(Options):
    """Optimise preferences: prompt, chosen and rejected (for kto: prompt, answer and label)."""

    loss: LossName = "dpo"
    """Which loss; the model as it came is the reference of those that need one."""
    beta: float | None = None
    """In units of reward per nat; by default the loss's own, 0.1."""
    knobs: dict[str, float] = dataclasses.field(default_factory=dict)
    """Further numbers of the loss, such as label_smoothing 0.1."""

    def run(self) -> None:
        """Train, and write the model."""
        from jaxrl_llm.training import recipes

        beta = {} if self.beta is None else {"beta": self.beta}
        recipes.preference(self.settings(), loss=self.loss, knobs=beta | self.knobs)


@dataclasses.dataclass(frozen=True)
class Grpo(Options):
    """Optimise the rewards of the model's own answers, each against the others to its prompt."""

    method: Literal["grpo", "rloo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce"] = "grpo"
    """Which method."""
    reward_model: Path | None = None
    """A folder that `train reward` wrote, on the same tokens."""
    reward: str | None = None
    """A function(prompts, answers) that returns a number for each answer: "file.py:name" or "module:name"."""
    group_size: int = 4
    """Answers to each prompt."""
    max_new_tokens: int = 64
    """The most tokens of an answer."""
    temperature: float = 1.0
    """Of the policy, in sampling and in all log-probabilities."""
    top_p: float = 1.0
    """Draw from the smallest set of this probability; importance weights correct for it."""
    beta: float = 0.05
    """Weight of KL(policy‖reference), in units of reward per nat."""
    kl_loss: Literal["reverse", "forward"] | None = None
    """The divergence as a term of the loss, named; by default it is in the reward."""
    text: Path | None = None
    """Pretraining text, lines as `train sft` takes them, for the term gamma E[log policy]."""
    gamma: float = 0.0
    """Weight of that term, in units of reward per nat of a token."""
    epochs: int = 1
    """Updates by each batch of answers."""
    minibatches: int = 1
    """Parts of each batch, updated on one after the other."""
    clip_low: float | None = None
    """A ratio below 1 - clip_low is clipped; by default as the method has it."""
    clip_high: float | None = None
    """A ratio above 1 + clip_high is clipped; by default as the method has it."""
    importance_cap: float = 2.0
    """The largest weight of a token that another law than the policy drew."""

    def run(self) -> None:
        """Train, and write the model."""
        from jaxrl_llm.decoding.transforms import TopP
        from jaxrl_llm.training import recipes
        from jaxrl_llm.training.methods import METHODS, Method
        from jaxrl_llm.training.rollout import Sampler

        names = {field.name for field in dataclasses.fields(Method)}
        changes = {name: value for name, value in vars(self).items() if name in names and value is not None}
        if isinstance(self, Ppo):
            changes["value_clip"] = self.value_clip
        transform = None if self.top_p >= 1 else TopP(self.top_p)
        recipes.policy_gradient(
            self.settings(),
            method=dataclasses.replace(METHODS[self.method], **changes),
            sampler=Sampler(self.max_new_tokens, self.temperature, transform),
            reward_model=None if self.reward_model is None else str(self.reward_model),
            reward_function=self.reward,
            text=self.text,
        )


@dataclasses.dataclass(frozen=True)
class Ppo(Grpo):
    """Optimise the rewards of the model's own answers against a critic, with clipped updates."""

    method: Literal["ppo"] = "ppo"
    """The method."""
    group_size: int = 1
    """Answers to each prompt."""
    epochs: int = 4
    """Updates by each batch of answers."""
    discount: float = 1.0
    """Of rewards a token later."""
    lambda_: Annotated[float, tyro.conf.arg(name="lambda")] = 0.95
    """Of GAE: 1 trusts the rewards that came, 0 the critic."""
    value_coefficient: float = 0.5
    """Weight of the critic's loss."""
    value_clip: float | None = 0.2
    """How far a value may move in one batch before its loss is held, in units of reward; None for no such bound."""
    dual_clip: float | None = None
    """The largest ratio that counts against an answer, above 1; None for no such bound."""
    whiten: bool = True
    """Advantages of a batch to mean 0 and variance 1."""
    bootstrap: bool = False
    """An answer that was cut off is worth what the critic says of its end."""


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model from files of JSON lines. The output folder loads here and in transformers."""

    what: (
        Annotated[Sft, tyro.conf.subcommand("sft")]
        | Annotated[Reward, tyro.conf.subcommand("reward")]
        | Annotated[Dpo, tyro.conf.subcommand("dpo")]
        | Annotated[Grpo, tyro.conf.subcommand("grpo")]
        | Annotated[Ppo, tyro.conf.subcommand("ppo")]
    )

    def run(self) -> None:
        """Train."""
        self.what.run()
