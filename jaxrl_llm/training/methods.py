"""Policy-gradient methods as data: an advantage estimator, a surrogate loss and hyperparameters."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax

from jaxrl_llm.objectives.aggregate import Mode
from jaxrl_llm.options import STATIC, Range, number
from jaxrl_llm.training.config import CriticOptions, GRPOConfig, PolicyOptions, PPOConfig

Advantage = Literal["returns", "rloo", "grpo", "centered", "gae"]
Surrogate = Literal["reinforce", "ppo_clip", "gspo", "cispo"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(PolicyOptions, CriticOptions):
    """A policy-gradient method: an advantage estimator and a surrogate loss. `METHODS` has presets.

    Numbers are leaves, so that another value never recompiles. Choices are static, and so are `value_clip` and
    `dual_clip`, which may be None.

    The penalty β KL(π‖π_ref) is in the reward of each token as −β k1, the estimator whose expectation and policy
    gradient are both right. With `kl_loss` it is a term of the loss instead, by the estimator whose gradient is that of
    the named divergence. "reverse" is KL(π‖ref) of whole completions, by k2 of their summed log-ratios, divided by what
    `mode` divides the surrogate by, so that β weighs the same against the reward. "forward" is k3 token by token, as in
    the GRPO paper: its gradient is E_π[Σ_t ∇KL_t(ref‖π)], not ∇KL(ref‖π) of whole completions. The two penalties have
    different optima: see `objectives.kl`.

    The presets differ from the papers: all have the KL in the reward. GRPO as published (Shao et al. 2024) has k3 in
    the loss (`kl_loss="forward"`), whose fixed point is not the optimum of RLHF. DAPO (Yu et al. 2025), Dr. GRPO (Liu
    et al. 2025) and CISPO (MiniMax 2025) have no KL (`beta=0`). "dapo" has two of DAPO's four techniques: clip-higher
    and the mean over tokens.

    The importance weight of a token is min(π_old/μ, `importance_cap`), where μ is the distribution it was sampled from
    (after top-p, or in another precision); it is 1 if μ is the policy. The critic's loss is a mean over tokens with the
    mode "token_mean", else a mean over completions of their means.
    """

    advantage: Advantage = dataclasses.field(default="rloo", metadata=STATIC)
    """"returns": rewards to go without a baseline; "rloo", "grpo", "centered": within the group of completions of a
    prompt; "gae": against a critic."""
    surrogate: Surrogate = dataclasses.field(default="reinforce", metadata=STATIC)
    """The loss of `objectives.policy_gradient`."""
    mode: Mode = dataclasses.field(default="sequence_sum", metadata=STATIC)
    """The aggregation of its values over tokens and rows, by `objectives.aggregate`."""
    normaliser: float = number(1.0, 0, above=True)
    """Tokens per row that the mode "constant" divides by."""

    def __post_init__(self):
        if self.kl_loss not in ("reverse", "forward", None):
            raise ValueError(
                f'kl_loss must name a divergence, "reverse" or "forward", or be None, but is {self.kl_loss!r}: '
                "as a loss, k1 has the gradient 0 in expectation, and k3 that of the forward divergence."
            )
        super().__post_init__()
        if self.advantage in ("rloo", "grpo", "centered") and self.group_size < 2:
            raise ValueError(
                f"group_size must be at least 2 for {self.advantage}, which compares the completions of a prompt, "
                f"but is {self.group_size}."
            )
        if self.surrogate in ("ppo_clip", "gspo"):
            Range(0, 1).check("clip_low", self.clip_low, integer=False)
        if self.surrogate == "gspo" and self.mode != "sequence_mean":
            raise ValueError(
                f"mode must be sequence_mean for gspo, which has one ratio per completion, but is {self.mode}."
            )
        if self.dual_clip is not None and self.surrogate != "ppo_clip":
            raise ValueError(f"dual_clip must be None for the surrogate {self.surrogate}, but is {self.dual_clip}.")

    @property
    def has_critic(self) -> bool:
        """True if a critic is trained beside the policy."""
        return self.advantage == "gae"


METHODS: dict[str, Method] = {
    "reinforce": Method(advantage="returns", group_size=1),
    "rloo": Method(advantage="rloo"),
    "ppo": Method(
        advantage="gae",
        surrogate="ppo_clip",
        mode="token_mean",
        group_size=PPOConfig.group_size,
        epochs=PPOConfig.epochs,
        whiten=PPOConfig.whiten,
    ),
    "grpo": Method(advantage="grpo", surrogate="ppo_clip", mode="sequence_mean"),
    "dr_grpo": Method(advantage="centered", surrogate="ppo_clip", mode="constant", normaliser=32.0),
    "dapo": Method(advantage="grpo", surrogate="ppo_clip", mode="token_mean", clip_high=0.28),
    "gspo": Method(advantage="grpo", surrogate="gspo", mode="sequence_mean", clip_low=3e-4, clip_high=4e-4),
    "cispo": Method(advantage="grpo", surrogate="cispo", mode="token_mean", clip_low=1.0, clip_high=4.0),
}


def method_of(config: GRPOConfig) -> Method:
    """Return the preset that the configuration names, with the hyperparameters that it sets.

    Raises:
        ValueError: as `Method`, if they do not fit the preset.
    """
    names = {field.name for field in dataclasses.fields(Method)}
    given: dict[str, Any] = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name in names and not (getattr(config, field.name) is None and field.default is None)
    }
    return dataclasses.replace(METHODS[config.method], **given)
