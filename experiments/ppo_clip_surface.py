"""PPO's clipped surrogate over ratio and advantage, where its gradient is gone, and where its ratios go all the same.

    python -m experiments.ppo_clip_surface --preset quick

Values by the losses, gradients by their closed forms; the gradient is that of the loss with respect to log π. Ratios
are those after training on one batch: a linear softmax policy, which the samples share, takes steps of Adam on
random advantages.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from experiments import ledger, statistics
from experiments.frame import experiment
from jaxrl_llm.objectives import policy_gradient

PPO, DUAL, CISPO = "Schulman et al. 2017, eq. 7", "Ye et al. 2020, eq. 5", "MiniMax 2025, eqs. 4-5"
NO_CLIP = {"clip_low": 1.0, "clip_high": 1e9}


@dataclasses.dataclass(frozen=True)
class Config:
    """Clips, the grid, and the batches on which a policy is trained."""

    clip: float = 0.2
    wider_clip_high: float = 0.28
    dual_clip: float = 3.0
    largest_ratio: float = 4.0
    largest_advantage: float = 2.0
    ratio_points: int = 50
    advantage_points: int = 20
    """Even, so that no row has the advantage 0."""
    line_points: int = 201
    batches: int = 16
    """Independent problems, each of one policy and one batch."""
    samples: int = 256
    features: int = 16
    actions: int = 8
    steps: int = 64
    learning_rate: float = 0.03
    """Learning rate of Adam, on logits that are linear in standard normal features."""
    seed: int = 0
    """Random seed of policies, features, actions and advantages."""


def variants(config: Config) -> dict[str, dict[str, float]]:
    """Return the clips of PPO that are drawn."""
    symmetric = {"clip_low": config.clip, "clip_high": config.clip}
    return {
        "symmetric": symmetric,
        "asymmetric": {"clip_low": config.clip, "clip_high": config.wider_clip_high},
        "dual": symmetric | {"dual_clip": config.dual_clip},
    }


@experiment(quick=Config(), full=Config(line_points=401, batches=32), seeds=5)
def run(config: Config) -> dict[str, Any]:
    """Compute surfaces, sections at A = ±1, ratios after a batch, and the numbers, in float64."""
    with jax.enable_x64(True):
        moved = {"clip": moves(config, variants(config)["symmetric"]), "no clip": moves(config, NO_CLIP)}
        data = {
            "clips": variants(config),
            "surfaces": {name: surface(config, clips) for name, clips in variants(config).items()},
            "sections": sections(config),
            "steps": config.steps,
            "shares": {name: beyond(*each, config.clip) for name, each in moved.items()},
            "histogram": histogram(config, moved),
        }
        numbers = [*ratio_numbers(config, data["shares"]), *identities(config)]
    shares = {name: f"{100 * float(each.mean()):.0f}%" for name, each in data["shares"].items()}
    return {
        "claim": "Beyond PPO's clip, on the side that the advantage rewards, the gradient is 0, and nowhere else. "
        f"This does not bound the ratio: {config.steps} steps of Adam on one batch take {shares['clip']} of its "
        "samples beyond the clip on that side.",
        "numbers": numbers,
        "data": data,
    }


def ratio_edges(config: Config) -> Array:
    """Return equally spaced ratios with every clip among them, so that no cell of a map lies on both sides of one."""
    clips = [1 - config.clip, 1 + config.clip, 1 + config.wider_clip_high, config.dual_clip]
    return jnp.unique(
        jnp.concatenate([jnp.linspace(0, config.largest_ratio, config.ratio_points + 1), jnp.asarray(clips)])
    )


def surface(config: Config, clips: dict[str, float]) -> dict[str, Any]:
    """Return the objective (minus the loss) at the corners of cells of ratio and advantage, and the cells' gradient."""
    ratio = ratio_edges(config)
    advantage = jnp.linspace(-config.largest_advantage, config.largest_advantage, config.advantage_points + 1)
    corners = jnp.broadcast_arrays(jnp.log(jnp.maximum(ratio, 1e-9)), advantage[:, None])
    middle = (ratio[:-1] + ratio[1:]) / 2, ((advantage[:-1] + advantage[1:]) / 2)[:, None]
    return {
        "ratio": ratio,
        "advantage": advantage,
        "objective": -policy_gradient.ppo_clip_loss(corners[0], jnp.zeros_like(corners[0]), corners[1], **clips),
        "gradient": gradient(*middle, **clips),
    }


def sections(config: Config) -> dict[str, Any]:
    """Return loss and gradient along the ratio at A = ±1, for PPO's variants, CISPO and REINFORCE.

    At each clip there is a ratio on either side, a billionth away, so that a jump is drawn as one.
    """
    clips = jnp.asarray([1 - config.clip, 1 + config.clip, 1 + config.wider_clip_high, config.dual_clip])
    ratio = jnp.linspace(config.largest_ratio / config.line_points, config.largest_ratio, config.line_points)
    ratio = jnp.sort(jnp.concatenate([ratio, clips * (1 - 1e-9), clips * (1 + 1e-9)]))
    logp, old = jnp.log(ratio), jnp.zeros_like(ratio)
    drawn = {"ratio": ratio}
    for sign, name in ((1.0, "positive"), (-1.0, "negative")):
        advantages = sign * jnp.ones_like(ratio)
        drawn[name] = {
            variant: {
                "objective": -policy_gradient.ppo_clip_loss(logp, old, advantages, **clips),
                "gradient": gradient(ratio, advantages, **clips),
            }
            for variant, clips in variants(config).items()
        }
        drawn[name]["cispo"] = {"gradient": policy_gradient.cispo_loss.grad(logp, old, advantages)[0]}
        drawn[name]["reinforce"] = {"gradient": policy_gradient.reinforce_loss.grad(logp, advantages)[0]}
    return drawn


def gradient(ratio: Array, advantage: Array, **clips: float) -> Float[Array, "..."]:
    """Return PPO's gradient at ratios and advantages that broadcast."""
    logp, advantages = jnp.broadcast_arrays(jnp.log(ratio), advantage)
    return policy_gradient.ppo_clip_loss.grad(logp, jnp.zeros_like(logp), advantages, **clips)[0]


def moves(config: Config, clips: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """Train a policy on each batch; return the ratio of each sample at the end, and its advantage."""

    def one(key: Key[Array, ""]) -> tuple[Array, Array]:
        start_key, features_key, action_key, advantage_key = jax.random.split(key, 4)
        start = jax.random.normal(start_key, (config.features, config.actions)) / config.features**0.5
        features = jax.random.normal(features_key, (config.samples, config.features))
        actions = jax.random.categorical(action_key, features @ start)
        advantages = jax.random.normal(advantage_key, (config.samples,))

        def log_probs(weights: Array) -> Array:
            return jnp.take_along_axis(jax.nn.log_softmax(features @ weights), actions[:, None], axis=1)[:, 0]

        old, optimiser = log_probs(start), optax.adam(config.learning_rate)

        def loss(weights: Array) -> Array:
            return policy_gradient.ppo_clip_loss(log_probs(weights), old, advantages, **clips).mean()

        def step(state: tuple, _: None) -> tuple[tuple, None]:
            weights, optimiser_state = state
            updates, optimiser_state = optimiser.update(jax.grad(loss)(weights), optimiser_state)
            return (optax.apply_updates(weights, updates), optimiser_state), None

        (weights, _), _ = jax.lax.scan(step, (start, optimiser.init(start)), length=config.steps)
        return jnp.exp(log_probs(weights) - old), advantages

    keys = jax.random.split(jax.random.key(config.seed), config.batches)
    ratios, advantages = jax.jit(jax.vmap(one))(keys)
    return np.asarray(ratios), np.asarray(advantages)


def beyond(ratios: np.ndarray, advantages: np.ndarray, clip: float) -> np.ndarray:
    """Return for each batch the share of samples beyond the clip, on the side that their advantage rewards."""
    return np.where(advantages > 0, ratios > 1 + clip, ratios < 1 - clip).mean(axis=1)


def histogram(config: Config, moved: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Return the share of samples of positive advantage in each interval of the ratio; the last one has no end."""
    edges = np.linspace(0, config.largest_ratio, 41)
    counts = {
        name: np.histogram(np.minimum(ratios[advantages > 0], edges[-1]), edges)[0]
        for name, (ratios, advantages) in moved.items()
    }
    return {"edges": edges, **{name: count / count.sum() for name, count in counts.items()}}


def ratio_numbers(config: Config, shares: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Test that many samples go beyond the clip, and fewer than without one."""
    source = f"{config.steps} steps of Adam on each of {config.batches} batches of {config.samples} samples"
    share, without = statistics.student(shares["clip"]), statistics.student(shares["no clip"])
    return [
        ledger.measurement("share of samples beyond the clip at the end", *share, unit="", source=source),
        ledger.measurement(
            "share of samples beyond the same ratios at the end, without a clip", *without, unit="", source=source
        ),
        ledger.test(
            "low end of the 95% interval of the share beyond the clip",
            share[1],
            at_least=0.05,
            wrong=0.0,
            unit="",
            source=f"Student; {source}",
        ),
    ]


def identities(config: Config) -> list[dict[str, Any]]:
    """Compare the gradients with their closed forms."""
    ratio = jnp.linspace(0.005, config.largest_ratio, config.line_points)
    advantage = jnp.linspace(-config.largest_advantage, config.largest_advantage, config.line_points)
    misplaced, off, at_one = 0, [], []
    for clips in variants(config).values():
        at_one.append(jnp.abs(gradient(jnp.ones(1), advantage, **clips) + advantage).max())
        gone = {1.0: ratio > 1 + clips["clip_high"], -1.0: ratio < 1 - clips["clip_low"]}
        gone[-1.0] |= ratio > clips.get("dual_clip", jnp.inf)
        for sign, where in gone.items():
            found = gradient(ratio, sign * jnp.ones_like(ratio), **clips)
            misplaced += int(jnp.where(where, found != 0, found == 0).sum())
            off.append(jnp.abs(jnp.where(where, 0, found + ratio * sign)).max())
    far, minus = jnp.log(jnp.asarray([10.0, 100.0, 1000.0])), -jnp.ones(3)
    bounded = policy_gradient.ppo_clip_loss(far, jnp.zeros(3), minus, **variants(config)["dual"]).max()
    cispo = policy_gradient.cispo_loss.grad(jnp.log(ratio), jnp.zeros_like(ratio), jnp.ones_like(ratio))[0]
    three = "symmetric, asymmetric and dual clip"
    rows = (
        ("largest |gradient + A| at ratio 1", max(at_one), 0.0, f"{PPO}; {three}"),
        ("largest |gradient + ρA| where it is not 0, A = ±1", max(off), 1e-12, f"{PPO}; {three}"),
        (
            "largest |loss − c| at A = −1, ratio from 10 to 1000, dual clip",
            jnp.abs(bounded - config.dual_clip),
            1e-12,
            DUAL,
        ),
        (
            "largest ||gradient of CISPO| − min(ρ, 5)|",
            jnp.abs(jnp.abs(cispo) - jnp.minimum(ratio, 5)).max(),
            1e-12,
            CISPO,
        ),
    )
    return [
        ledger.identity(
            "ratios where the gradient is 0 and should not be, or the reverse",
            misplaced,
            tolerance=0,
            unit=f"of 6 × {config.line_points} ratios",
            source=f"{PPO}, and {DUAL}; {three}, A = ±1",
        ),
        *(
            ledger.identity(name, float(value), tolerance=tolerance, unit="units of A", source=source)
            for name, value, tolerance, source in rows
        ),
    ]
