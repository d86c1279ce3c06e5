"""PPO's clipped surrogate over ratio and advantage, and where its gradient is gone, beside CISPO's and REINFORCE's.

    python -m experiments.ppo_clip_surface --preset quick

Values by the losses, gradients by their closed forms; the gradient is that of the loss with respect to log π.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxrl_llm import runtime

runtime.set_up()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import tyro  # noqa: E402
from jaxtyping import Array, Float  # noqa: E402

from experiments import ledger  # noqa: E402
from experiments.ledger import rounded  # noqa: E402
from jaxrl_llm.objectives import policy_gradient  # noqa: E402

PPO, DUAL = "Schulman et al. 2017, eq. 7", "Ye et al. 2020, eq. 5"


@dataclasses.dataclass(frozen=True)
class Config:
    """Clips, and the grid."""

    clip: float = 0.2
    wider_clip_high: float = 0.28
    dual_clip: float = 3.0
    largest_ratio: float = 4.0
    largest_advantage: float = 2.0
    ratio_points: int = 50
    advantage_points: int = 21
    line_points: int = 201
    seed: int = 0  # nothing is drawn


def variants(config: Config) -> dict[str, dict[str, float]]:
    """The clips of PPO that are drawn."""
    symmetric = {"clip_low": config.clip, "clip_high": config.clip}
    return {
        "symmetric": symmetric,
        "asymmetric": {"clip_low": config.clip, "clip_high": config.wider_clip_high},
        "dual": symmetric | {"dual_clip": config.dual_clip},
    }


def run(config: Config) -> dict[str, Any]:
    """Surfaces, sections at A = ±1, and the numbers, in float64."""
    with jax.enable_x64(True):
        data = {
            "clips": variants(config),
            "surfaces": {name: surface(config, clips) for name, clips in variants(config).items()},
            "sections": sections(config),
        }
        numbers = [*at_one(config), *beyond_the_clip(config), *of_the_others(config)]
    return {
        "claim": "PPO's clip does not bound the ratio, it takes the gradient away: beyond the clip, on the side "
        "that the advantage rewards, it is exactly 0, and nowhere else. CISPO's gradient is never 0, and the dual "
        "clip bounds the loss, at c|A|, where the advantage is negative.",
        "numbers": numbers,
        "data": rounded(data),
    }


def surface(config: Config, clips: dict[str, float]) -> dict[str, Any]:
    """Objective (minus the loss) and gradient over the plane of ratio and advantage."""
    ratio = jnp.linspace(config.largest_ratio / config.ratio_points, config.largest_ratio, config.ratio_points)
    advantage = jnp.linspace(-config.largest_advantage, config.largest_advantage, config.advantage_points)
    logp, advantages = jnp.broadcast_arrays(jnp.log(ratio), advantage[:, None])
    old = jnp.zeros_like(logp)
    return {
        "ratio": ratio,
        "advantage": advantage,
        "objective": -policy_gradient.ppo_clip_loss(logp, old, advantages, **clips),
        "gradient": policy_gradient.ppo_clip_loss_grad(logp, old, advantages, **clips)[0],
    }


def sections(config: Config) -> dict[str, Any]:
    """Loss and gradient along the ratio at A = +1 and A = −1, for PPO's variants, CISPO and REINFORCE."""
    ratio = jnp.linspace(0.005, config.largest_ratio, config.line_points)
    logp, old = jnp.log(ratio), jnp.zeros_like(ratio)
    drawn = {"ratio": ratio}
    for sign, name in ((1.0, "positive"), (-1.0, "negative")):
        advantages = sign * jnp.ones_like(ratio)
        drawn[name] = {
            variant: {
                "objective": -policy_gradient.ppo_clip_loss(logp, old, advantages, **clips),
                "gradient": policy_gradient.ppo_clip_loss_grad(logp, old, advantages, **clips)[0],
            }
            for variant, clips in variants(config).items()
        }
        drawn[name]["cispo"] = {"gradient": policy_gradient.cispo_loss_grad(logp, old, advantages)[0]}
        drawn[name]["reinforce"] = {"gradient": policy_gradient.reinforce_loss_grad(logp, advantages)[0]}
    return drawn


def gradient(ratio: Array, advantage: Array, **clips: float) -> Float[Array, "..."]:
    """PPO's gradient at ratios and advantages that broadcast."""
    logp, advantages = jnp.broadcast_arrays(jnp.log(ratio), advantage)
    return policy_gradient.ppo_clip_loss_grad(logp, jnp.zeros_like(logp), advantages, **clips)[0]


def at_one(config: Config) -> list[dict[str, Any]]:
    """At ratio 1 every variant is REINFORCE."""
    advantage = jnp.linspace(-config.largest_advantage, config.largest_advantage, config.line_points)
    return [
        ledger.number(
            f"largest |gradient + A| at ratio 1, {name} clip",
            float(jnp.abs(gradient(jnp.ones(1), advantage, **clips) + advantage).max()),
            expected=0.0,
            tolerance=0.0,
            unit="units of A",
            source=PPO,
        )
        for name, clips in variants(config).items()
    ]


def beyond_the_clip(config: Config) -> list[dict[str, Any]]:
    """Exactly 0 beyond the clip on the side that A rewards, −ρA on all other places."""
    ratio = jnp.linspace(0.005, config.largest_ratio, config.line_points)
    entries = []
    for name, clips in variants(config).items():
        gone = {1.0: ratio > 1 + clips["clip_high"], -1.0: ratio < 1 - clips["clip_low"]}
        gone[-1.0] |= ratio > clips.get("dual_clip", jnp.inf)
        for sign, where in gone.items():
            found, side = gradient(ratio, sign * jnp.ones_like(ratio), **clips), "A > 0" if sign > 0 else "A < 0"
            wrong = jnp.where(where, found != 0, found == 0).sum()
            entries.append(
                ledger.number(
                    f"ratios where the gradient is 0 and should not be, or the reverse, {name} clip, {side}",
                    int(wrong),
                    expected=0,
                    tolerance=0,
                    unit=f"of {config.line_points} ratios",
                    source=DUAL if "dual_clip" in clips else PPO,
                )
            )
            kept = jnp.where(where, 0, found + ratio * sign)
            entries.append(
                ledger.number(
                    f"largest |gradient + ρA| elsewhere, {name} clip, {side}",
                    float(jnp.abs(kept).max()),
                    expected=0.0,
                    tolerance=1e-12,
                    unit="units of A",
                    source=PPO,
                )
            )
    return entries


def of_the_others(config: Config) -> list[dict[str, Any]]:
    """The dual clip's bound, the plain clip's lack of one, and CISPO's gradient."""
    far, minus = jnp.log(jnp.asarray([10.0, 100.0, 1000.0])), -jnp.ones(3)
    names = variants(config)
    largest = {
        name: float(policy_gradient.ppo_clip_loss(far, jnp.zeros(3), minus, **names[name]).max())
        for name in ("symmetric", "dual")
    }
    ratio = jnp.linspace(0.005, config.largest_ratio, config.line_points)
    cispo = policy_gradient.cispo_loss_grad(jnp.log(ratio), jnp.zeros_like(ratio), jnp.ones_like(ratio))[0]
    return [
        ledger.number(
            "largest loss at A = −1, ratio up to 1000, dual clip",
            largest["dual"],
            expected=config.dual_clip,
            tolerance=1e-12,
            unit="units of A",
            source=f"−cA, {DUAL}",
        ),
        ledger.number(
            "largest loss at A = −1, ratio up to 1000, symmetric clip",
            largest["symmetric"],
            expected=1000.0,
            tolerance=1e-9,
            unit="units of A",
            source=f"−ρA, {PPO}: no bound",
        ),
        ledger.number(
            "smallest |gradient| of CISPO over min(ρ, 5)",
            float((jnp.abs(cispo) / jnp.minimum(ratio, 5)).min()),
            expected=1.0,
            tolerance=1e-12,
            unit="units of A",
            source="MiniMax 2025, eqs. 4-5",
        ),
    ]


PRESETS = {"quick": Config(), "full": Config(ratio_points=100, advantage_points=41, line_points=401)}


def main(preset: Literal["quick", "full"] = "quick") -> None:
    """Write `results/ppo_clip_surface.json`.

    Args:
        preset: full has a grid twice as fine.
    """
    ledger.run_and_write("ppo_clip_surface", run, PRESETS[preset], preset)


if __name__ == "__main__":
    tyro.cli(main)
