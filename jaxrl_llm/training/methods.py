"""Policy-gradient methods as data: the choices and hyperparameters in which they differ."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import numpy as np

from jaxrl_llm.numerics import check_range, is_concrete
from jaxrl_llm.objectives.aggregate import Mode

Advantage = Literal["returns", "rloo", "grpo", "centered", "gae"]
Surrogate = Literal["reinforce", "ppo_clip", "gspo", "cispo"]
Divergence = Literal["reverse", "forward"]

RANGES = {
    "beta": (0, float("inf")),
    "gamma": (0, float("inf")),
    "clip_low": (0, float("inf")),
    "clip_high": (0, float("inf")),
    "importance_cap": (0, float("inf")),
    "discount": (0, 1),
    "lambda_": (0, 1),
    "value_coefficient": (0, float("inf")),
    "normaliser": (0, float("inf")),
}
CHOICE = {"static": True}  # marks a field that programs are compiled for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Method:
    """A policy-gradient method: an advantage estimator and a surrogate loss. `METHODS` has presets.

    Numbers are leaves: another value of one never recompiles. Choices are fixed when compiling, and so are `value_clip`
    and `dual_clip`, which may be None.

    The penalty β KL(π‖π_ref) is in the reward of each token as −β k1, the estimator whose expectation and policy
    gradient are both right. With `kl_loss` it is a term of the loss instead, by the estimator whose gradient is that of
    the divergence named. "reverse" is KL(π‖ref) of whole answers, by k2 of their summed log-ratios, divided by what
    `mode` divides the surrogate by, so that β weighs the same against the reward. "forward" is k3 token by token, as in
    the paper of GRPO: its gradient is E_π[Σ_t ∇KL_t(ref‖π)], not ∇KL(ref‖π) of whole answers. They are different
    penalties with different optima: see `objectives.kl`.

    The presets are not the papers': all have the KL in the reward. GRPO as published (Shao et al. 2024) has k3 in the
    loss (`kl_loss="forward"`), which has another fixed point than the optimum of RLHF. DAPO (Yu et al. 2025), Dr. GRPO
    (Liu et al. 2025) and CISPO (MiniMax 2025) have no KL (`beta=0`). Of DAPO's four techniques "dapo" has two,
    clip-higher and the mean over tokens.

    Args:
        advantage: "returns": the rewards to come, no baseline; "rloo", "grpo", "centered": within the group of answers
            to one prompt; "gae": against a critic.
        surrogate: the loss of `objectives.policy_gradient`.
        mode: the aggregation of its values (`objectives.aggregate`); `normaliser`: tokens a row, for "constant".
        group_size: answers to each prompt.
        beta: β in units of reward per nat. gamma: γ of the term γ E[log π] over pretraining text, per token.
        clip_low, clip_high, dual_clip: of the ratio, as in `ppo_clip_loss`.
        importance_cap: C of the weight min(π_old/μ, C) per token, μ the distribution that tokens were really drawn from
            (after top-p, say, or in another precision). It is 1 where μ is the policy. Tokens that μ removes are never
            sampled.
        epochs, minibatches: number of passes over each batch of answers, and of parts in each pass.
        discount, lambda_: γ and λ of GAE. value_coefficient, value_clip: of the critic's loss, a mean over tokens with
            the mode "token_mean", else over answers of their means.
        whiten: advantages of the batch to mean 0 and variance 1.
        bootstrap: value the end of an answer that was cut off, without EOS, by the critic (for "gae"), as though it
            went on. Otherwise it ends there, which is right where the reward is of the cut-off text.
    """

    advantage: Advantage = dataclasses.field(default="rloo", metadata=CHOICE)
    surrogate: Surrogate = dataclasses.field(default="reinforce", metadata=CHOICE)
    mode: Mode = dataclasses.field(default="sequence_sum", metadata=CHOICE)
    group_size: int = dataclasses.field(default=4, metadata=CHOICE)
    kl_loss: Divergence | None = dataclasses.field(default=None, metadata=CHOICE)
    epochs: int = dataclasses.field(default=1, metadata=CHOICE)
    minibatches: int = dataclasses.field(default=1, metadata=CHOICE)
    value_clip: float | None = dataclasses.field(default=0.2, metadata=CHOICE)
    dual_clip: float | None = dataclasses.field(default=None, metadata=CHOICE)
    whiten: bool = dataclasses.field(default=False, metadata=CHOICE)
    bootstrap: bool = dataclasses.field(default=False, metadata=CHOICE)
    beta: float = 0.05
    gamma: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    importance_cap: float = 2.0
    discount: float = 1.0
    lambda_: float = 0.95
    value_coefficient: float = 0.5
    normaliser: float = 1.0

    def __post_init__(self):
        self._check_choices()
        for name, value in vars(self).items():
            if name in RANGES and _is_known(value):
                low, high = RANGES[name]
                check_range(low, high, open_low=name in ("importance_cap", "normaliser"), **{name: value})
        if self.surrogate in ("ppo_clip", "gspo") and _is_known(self.clip_low):
            check_range(0, 1, clip_low=self.clip_low)

    def _check_choices(self) -> None:
        for name, choices in (("advantage", Advantage), ("surrogate", Surrogate), ("mode", Mode)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, is {getattr(self, name)!r}.")
        if self.kl_loss not in (None, *get_args(Divergence)):
            raise ValueError(
                f'kl_loss must name a divergence, "reverse" or "forward", or be None, but is {self.kl_loss!r}: '
                "as a loss, k1 has the gradient 0 in expectation, and k3 that of the forward divergence."
            )
        if self.group_size < 1 or self.epochs < 1 or self.minibatches < 1:
            raise ValueError(
                "group_size, epochs and minibatches must be at least 1, but are "
                f"{self.group_size}, {self.epochs}, {self.minibatches}."
            )
        if self.advantage in ("rloo", "grpo", "centered") and self.group_size < 2:
            raise ValueError(f"{self.advantage} compares the answers to a prompt: group_size must be 2 or more.")
        if self.surrogate == "gspo" and self.mode != "sequence_mean":
            raise ValueError(f"gspo has one ratio for each answer: its mode is sequence_mean, not {self.mode}.")
        if self.dual_clip is not None and self.surrogate != "ppo_clip":
            raise ValueError(f"dual_clip is for the surrogate ppo_clip, not for {self.surrogate}.")

    @property
    def has_critic(self) -> bool:
        """True if a critic is trained beside the policy."""
        return self.advantage == "gae"


def _is_known(value: Any) -> bool:
    """True for a number or a concrete array of them: a leaf may be traced, or a placeholder of jax."""
    return isinstance(value, int | float | np.number | np.ndarray) or (
        isinstance(value, jax.Array) and is_concrete(value)
    )


METHODS: dict[str, Method] = {
    "reinforce": Method(advantage="returns", group_size=1),
    "rloo": Method(advantage="rloo"),
    "ppo": Method(advantage="gae", surrogate="ppo_clip", mode="token_mean", group_size=1, epochs=4, whiten=True),
    "grpo": Method(advantage="grpo", surrogate="ppo_clip", mode="sequence_mean"),
    "dr_grpo": Method(advantage="centered", surrogate="ppo_clip", mode="constant", normaliser=32.0),
    "dapo": Method(advantage="grpo", surrogate="ppo_clip", mode="token_mean", clip_high=0.28),
    "gspo": Method(advantage="grpo", surrogate="gspo", mode="sequence_mean", clip_low=3e-4, clip_high=4e-4),
    "cispo": Method(advantage="grpo", surrogate="cispo", mode="token_mean", clip_low=1.0, clip_high=4.0),
}
