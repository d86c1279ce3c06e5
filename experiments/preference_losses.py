"""Preference losses and their slopes against the margin, and where each drives the two log-probabilities.

    python -m experiments.preference_losses --preset quick

Gradients are the losses' closed forms. Losses that are not functions of the margin alone are drawn on the
symmetric path a = −b = Δ/2. The plane shows −gradient by log π_w and log π_l, and a run of DPO on one pair of a tabular
model; such runs on many random pairs measure how often DPO lowers the chosen response.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments import ledger, statistics
from experiments.frame import experiment
from jaxrl_llm import oracle
from jaxrl_llm.objectives import preference
from jaxrl_llm.tabular import TabularLM

LM = TabularLM(vocab_size=3, horizon=3)
START = "β/2 ⟨∇log π_w, ∇log π_w − ∇log π_l⟩, Rafailov et al. 2023, section 4"
PARAMETRISATIONS = ("own", "shared")
OF_THE_MARGIN = ("dpo", "cdpo", "robust_dpo", "ipo", "hinge", "exo", "discopop")
OF_BOTH = ("nca", "bco", "sppo", "apo_zero", "apo_down", "kto", "f_dpo")
WITHOUT_REFERENCE = ("simpo", "orpo", "cpo")
PLANE = ("dpo", "simpo", "orpo")


@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters of the losses, the range of the margin, and the runs of DPO."""

    beta: float = 0.1
    beta_without_reference: float = 1.0
    """β of losses that take log-probabilities per token."""
    smoothing: float = 0.1
    """Label smoothing of cDPO, robust DPO and EXO."""
    temperature: float = 0.05
    """Temperature of DiscoPOP."""
    largest_margin: float = 6.0
    """βΔ, to either side."""
    points: int = 97
    deepest: float = -9.0
    """The lowest log-probability of the plane."""
    arrows: int = 11
    start: tuple[float, ...] = (0.2, 0.3, 0.5)
    """Distribution of every token where the drawn run of DPO starts."""
    pair: tuple[tuple[int, ...], ...] = ((0, 1, 2), (0, 1, 1))
    """Chosen and rejected response of that run."""
    pairs: int = 64
    """Random pairs on which DPO is run."""
    beta_of_run: float = 0.5
    steps: int = 150
    learning_rate: float = 0.2
    seed: int = 0
    """Random seed of the pairs and of the distributions where their runs start."""


@experiment(quick=Config(), full=Config(points=241, arrows=13, pairs=256), seeds=5)
def run(config: Config) -> dict[str, Any]:
    """Compute curves, identities, arrows and runs, in float64."""
    with jax.enable_x64(True):
        drawn = example(config)
        starts, pairs = random_problems(config)
        runs = {name: many(name, starts, pairs, config) for name in PARAMETRISATIONS}
        data = {
            "beta": config.beta,
            "smoothing": config.smoothing,
            "curves": curves(config),
            "plane": {name: arrows(name, config) for name in PLANE},
            "reference": reference_of_run(config),
            "run": drawn,
            "changes": {name: change(paths) for name, (paths, _) in runs.items()},
        }
        numbers = [*run_numbers(config, starts, pairs, runs), *identities(config), *rising(config)]
    share = float((data["changes"]["shared"] < 0).mean())
    return {
        "claim": "A loss of the margin alone does not determine the two log-probabilities. With the same margin at "
        f"every step, DPO lowers the chosen response of {100 * share:.0f}% of random pairs where all positions share "
        "their logits, and never where each prefix has its own.",
        "numbers": numbers,
        "data": data,
    }


# Curves ---------------------------------------------------------------------------------------------------------------


def keywords(config: Config) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return, for every drawn loss, its function's stem in `objectives.preference` and its keyword arguments."""
    beta, of_averages = {"beta": config.beta}, {"beta": config.beta_without_reference}
    smoothed = beta | {"label_smoothing": config.smoothing}
    plain = {name: (name, beta) for name in (*OF_THE_MARGIN, *OF_BOTH)}
    plain |= {name: (name, of_averages) for name in WITHOUT_REFERENCE}
    discopop = ("discopop", beta | {"temperature": config.temperature})
    return (
        plain
        | {"cdpo": ("dpo", smoothed), "robust_dpo": ("robust_dpo", smoothed), "exo": ("exo", smoothed)}
        | {"discopop": discopop, "f_dpo": ("f_dpo", beta | {"divergence": "jensen_shannon"})}
    )


def evaluate(
    name: str,
    w: Array,
    l: Array,  # noqa: E741
    config: Config,
    reference: tuple[float, float] = (0.0, 0.0),
) -> tuple[Array, Array, Array]:
    """Return the loss and its derivatives by log π_w and log π_l; KTO sums a good and a bad answer, z = 0."""
    stem, settings = keywords(config)[name]
    loss = getattr(preference, f"{stem}_loss")
    ref_w, ref_l = (jnp.full_like(w, each) for each in reference)
    if name == "kto":
        good, bad = jnp.ones(w.shape, bool), jnp.zeros(w.shape, bool)
        of_good, of_bad = (w, ref_w, good, 0.0), (l, ref_l, bad, 0.0)
        total = loss(*of_good, **settings) + loss(*of_bad, **settings)
        return total, loss.grad(*of_good, **settings)[0], loss.grad(*of_bad, **settings)[0]
    arguments = (w, l) if name in WITHOUT_REFERENCE else (w, l, ref_w, ref_l)
    by_chosen, by_rejected, *_ = loss.grad(*arguments, **settings)
    return loss(*arguments, **settings), by_chosen, by_rejected


def curves(config: Config) -> dict[str, Any]:
    """Return the loss against x = βΔ, and its slope per unit of x: on a = −b = Δ/2, that is (∂L/∂a − ∂L/∂b)/(2β)."""
    x = jnp.linspace(-config.largest_margin, config.largest_margin, config.points)
    x = jnp.unique(
        jnp.concatenate([x, jnp.linspace(-0.5, 0.5, 41), jnp.asarray([1 - 1e-9, 1.0])])
    )  # DiscoPOP turns there, and the hinge at 1
    drawn = {"x": x}
    for name, (_, settings) in keywords(config).items():
        half = x / settings["beta"] / 2
        below = -config.largest_margin if name in WITHOUT_REFERENCE else 0.0  # log-probabilities are negative
        loss, by_chosen, by_rejected = evaluate(name, below + half, below - half, config)
        drawn[name] = {"loss": loss, "slope": (by_chosen - by_rejected) / (2 * settings["beta"])}
    return drawn


def arrows(name: str, config: Config) -> dict[str, Any]:
    """Return −gradient over the plane of log π_w and log π_l."""
    axis = jnp.linspace(config.deepest, -0.25, config.arrows)
    w, l = jnp.meshgrid(axis, axis)  # noqa: E741
    as_in_run = dataclasses.replace(config, beta=config.beta_of_run)
    _, by_chosen, by_rejected = evaluate(name, w, l, as_in_run, reference_of_run(config))
    return {"axis": axis, "chosen": -by_chosen, "rejected": -by_rejected}


def reference_of_run(config: Config) -> tuple[float, float]:
    """Return the log-probability of the chosen and the rejected response where the run of DPO starts."""
    return tuple(float(np.log(np.asarray(config.start)[list(response)]).sum()) for response in config.pair)


def at(name: str, x: float, config: Config) -> tuple[float, float, float]:
    """Return loss and derivatives per unit of βa and βb at βΔ = x, on the symmetric path."""
    half = jnp.asarray([x / config.beta / 2])
    loss, by_chosen, by_rejected = evaluate(name, half, -half, config)
    return float(loss[0]), float(by_chosen[0]) / config.beta, float(by_rejected[0]) / config.beta


def random_problems(config: Config) -> tuple[Array, Array]:
    """Draw distributions of a token, uniform over the simplex, and pairs of responses that differ in the last token."""
    random = np.random.default_rng(config.seed)
    starts = random.dirichlet(np.ones(LM.vocab_size), config.pairs)
    prefixes = random.integers(LM.vocab_size, size=(config.pairs, 1, LM.horizon - 1)).repeat(2, axis=1)
    last = np.stack([random.permutation(LM.vocab_size)[:2] for _ in range(config.pairs)])
    return jnp.asarray(starts), jnp.asarray(np.concatenate([prefixes, last[..., None]], axis=2))


def example(config: Config) -> dict[str, Any]:
    """Run DPO on the pair of the config, with logits of its own for each prefix and shared ones."""
    shown = np.unique(np.geomspace(1, config.steps, 60).astype(int)) - 1
    start, pair = (jnp.asarray(each)[None] for each in (config.start, config.pair))
    paths = {name: np.asarray(many(name, start, pair, config)[0])[0, shown] for name in PARAMETRISATIONS}
    runs = {name: {"chosen": path[:, 0], "rejected": path[:, 1]} for name, path in paths.items()}
    return {"step": shown, "start": config.start, "pair": config.pair, "beta": config.beta_of_run, **runs}


def many(name: str, starts: Array, pairs: Array, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Run DPO on each pair: log π of both responses at each step, and the speed of log π_w at the start."""
    prefixes = (LM.num_prefixes, LM.vocab_size)
    ids = pairs @ LM.vocab_size ** jnp.arange(LM.horizon)[::-1]

    def log_probs(params: Array, pair: Array) -> Array:
        return oracle.sequence_log_probs(LM, {"logits": jnp.broadcast_to(params, prefixes)})[pair]

    def of_one(probs: Array, pair: Array) -> tuple[Array, Array]:
        row = jnp.log(probs)
        start = jnp.broadcast_to(row, prefixes) if name == "own" else row
        return descend(start, functools.partial(log_probs, pair=pair), config)

    paths, speeds = jax.jit(jax.vmap(of_one))(starts, ids)
    return np.asarray(paths), np.asarray(speeds)


def descend(start: Array, log_probs: Callable[[Array], Array], config: Config) -> tuple[Array, Array]:
    """Return log π of the pair along gradient descent on DPO's loss, and the rate of log π_w at the start."""
    reference = log_probs(start)

    def loss(params: Array) -> tuple[Array, Array]:
        pair = log_probs(params)
        return preference.dpo_loss(*pair, *reference, beta=config.beta_of_run), pair

    def step(params: Array, _: None) -> tuple[Array, Array]:
        slopes, pair = jax.grad(loss, has_aux=True)(params)
        return params - config.learning_rate * slopes, pair

    upwards = jax.grad(lambda params: log_probs(params)[0])(start)
    speed = -(upwards * jax.grad(loss, has_aux=True)(start)[0]).sum()
    return jax.lax.scan(step, start, length=config.steps)[1], speed


def change(paths: np.ndarray) -> np.ndarray:
    """Return the change of log π of the chosen response over each run."""
    return paths[:, -1, 0] - paths[:, 0, 0]


def run_numbers(config: Config, starts: Array, pairs: Array, runs: dict[str, Any]) -> list[dict[str, Any]]:
    """Test the share of chosen responses that fall, their speed at the start, and the equality of the margins."""
    source = f"{config.steps} steps of DPO on each of {config.pairs} random pairs"
    fell = {name: int((change(paths) < 0).sum()) for name, (paths, _) in runs.items()}
    share = statistics.share(fell["shared"], config.pairs)
    margins = [paths[..., 0] - paths[..., 1] for paths, _ in runs.values()]
    expected = speeds(np.asarray(starts), np.asarray(pairs))
    off = max(np.abs(runs[name][1] - config.beta_of_run / 2 * expected[name]).max() for name in PARAMETRISATIONS)
    return [
        ledger.measurement("share of pairs whose chosen response falls, shared logits", *share, unit="", source=source),
        ledger.test(
            "low end of the 95% interval of that share",
            share[1],
            at_least=0.1,
            wrong=0.0,
            unit="",
            source=f"Clopper and Pearson; {source}",
        ),
        ledger.identity(
            "share of pairs whose chosen response falls, own logits",
            fell["own"] / config.pairs,
            tolerance=0.0,
            unit="",
            source="what the two responses share cancels, and each moves its own logits alone",
        ),
        exact(
            "largest difference of the two runs' margins",
            np.abs(margins[0] - margins[1]).max(),
            unit="nats",
            source="∇Δ is the same in both",
        ),
        exact("largest error of the speed of log π_w at the start", off, unit="nats per unit of time", source=START),
    ]


def speeds(starts: np.ndarray, pairs: np.ndarray) -> dict[str, np.ndarray]:
    """Return ⟨∇log π_w, ∇log π_w − ∇log π_l⟩ at the start, for pairs that differ in the last token."""
    each = np.arange(len(starts))
    chosen, rejected = pairs[:, 0, -1], pairs[:, 1, -1]
    lead = starts[each, chosen] - starts[each, rejected]
    count = [(pairs[:, 0] == token[:, None]).sum(axis=1) for token in (chosen, rejected)]
    return {"own": 1 - lead, "shared": count[0] - count[1] - pairs.shape[-1] * lead}


# Identities -----------------------------------------------------------------------------------------------------------


def identities(config: Config) -> list[dict[str, Any]]:
    """Compare the losses with their closed forms, in float64."""
    x = jnp.linspace(-5, 5, 101) / config.beta
    robust, clean, kto, apo = (
        evaluate(name, x / 2, -x / 2, config)[0] for name in ("robust_dpo", "dpo", "kto", "apo_zero")
    )
    flipped = evaluate("robust_dpo", -x / 2, x / 2, config)[0]
    debiased = (1 - config.smoothing) * robust + config.smoothing * flipped - clean
    value = max(abs(at(name, 0, config)[0] / expected - 1) for name, expected in at_the_reference(config).items())
    slope = max(abs(at(name, place, config)[1]) for name, place in flat_places(config))
    return [
        exact("largest relative difference of a loss from its closed form at the reference", value, unit=""),
        exact("largest |slope| where a loss is stated to be least or flat", slope, unit="per unit of βa"),
        exact("largest |mean of robust DPO over flipped labels − DPO|", jnp.abs(debiased).max(), unit="nats"),
        exact("largest |KTO − APO-zero|, equal weights, z = 0", jnp.abs(kto - apo).max(), unit=""),
    ]


def exact(name: str, value: Any, *, unit: str, source: str = "closed forms of objectives.preference") -> dict[str, Any]:
    """Return an identity of float64: 0 to rounding."""
    return ledger.identity(name, float(value), tolerance=1e-12, unit=unit, source=source)


def at_the_reference(config: Config) -> dict[str, float]:
    """Return each loss at Δ = 0."""
    smoothing, beta, log_two = config.smoothing, config.beta, math.log(2)
    return {
        "dpo": log_two,
        "cdpo": log_two,
        "robust_dpo": log_two,
        "f_dpo": log_two,
        "exo": -log_two - 0.5 * math.log(smoothing * (1 - smoothing)),
        "ipo": 1 / (4 * beta**2),
        "hinge": 1.0,
        "discopop": log_two / 2 + 0.5,
        "nca": 2 * log_two,
        "bco": 2 * log_two,
        "sppo": 1 / (2 * beta**2),
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "kto": 1.0,
    }


def flat_places(config: Config) -> list[tuple[str, float]]:
    """Return losses with a margin βΔ where their slope by the chosen reward is 0, on the path a = −b."""
    optimum = math.log((1 - config.smoothing) / config.smoothing)
    least = [("cdpo", optimum), ("exo", optimum), ("ipo", 0.5), ("sppo", 1.0), ("nca", 2 * math.log(2))]
    return [*least, ("apo_down", 0.0), ("hinge", 1.0), ("hinge", 5.0)]


def rising(config: Config) -> list[dict[str, Any]]:
    """Measure the range of margins over which DiscoPOP rises."""
    x = jnp.linspace(-1, 1, 20_001)
    _, by_chosen, _ = evaluate("discopop", x / config.beta / 2, -x / config.beta / 2, config)
    uphill = x[by_chosen > 0]
    return [
        ledger.measurement(
            f"DiscoPOP rises with the margin {word}",
            float(place),
            unit="βΔ",
            source=f"slope > 0 at temperature {config.temperature:g}; Lu et al. 2024: the loss is not convex",
        )
        for word, place in (("from", uphill.min()), ("up to", uphill.max()))
    ]
