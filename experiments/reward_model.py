"""The reward-model loss over all pairs of a prompt: its bounds, and a comparison with shuffled pairs.

    python -m experiments.reward_model --preset quick

Gradient flow on two free scores, the gradient of one answer, the optimum under noisy labels and the free shift, in
float64; then the same ranked answers given to an over-parameterised linear reward model in three ways, trained from
zero by SGD and by Adam.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int
from scipy.optimize import brentq

from experiments import ledger, statistics
from experiments.frame import experiment
from jaxrl_llm.objectives import reward_model

MEASURED = {"margin": ("margin", "log-odds"), "held_out_loss": ("held-out loss", "nats")}
REMOVED, LEFT = 0.1, 0.5  # "removes the gap" leaves less than a tenth of it; "does not" leaves more than half
PAPER = "Ouyang et al. 2022, eq. 1"
ARMS = ("grouped", "shuffled", "matched")
OPTIMISERS = {"SGD": optax.sgd, "Adam": optax.adam}


@dataclasses.dataclass(frozen=True)
class Config:
    """The exact part, and the reward models trained in three ways."""

    end: float = 1000.0  # of the gradient flow
    flow_steps: int = 20_000
    sizes: tuple[int, ...] = (2, 4, 9)
    draws: int = 20_000  # of random scores, for the bound of the gradient
    label_probabilities: tuple[float, ...] = (0.5, 0.6, 0.7, 0.9, 0.95, 0.99)
    agreement: float = 0.726  # of two labellers, Ouyang et al. 2022
    prompts: int = 60
    fewest: int = 4  # answers to a prompt
    most: int = 9
    features: int = 384
    spread: float = 2.0  # standard deviation of the true scores
    sgd_rates: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
    adam_rates: tuple[float, ...] = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
    shown_rates: tuple[float, float] = (16.0, 0.32)  # of SGD and of Adam, along all epochs
    batch: int = 5
    epochs: int = 8
    checkpoints: int = 4  # in an epoch
    seeds: int = 12
    seed: int = 0


@experiment(quick=Config(), full=Config(seeds=48, epochs=16))
def run(config: Config) -> dict[str, Any]:
    """Compute the exact part in float64, then the three arms under both optimisers."""
    data_key, order_key, scores_key = jax.random.split(jax.random.key(config.seed), 3)
    with jax.enable_x64(True):
        flow, flow_number = gradient_flow(config)
        bounds, bound_number = gradient_bounds(config, scores_key)
        optima, optimum_number = label_noise(config)
        shift_numbers = free_shift(scores_key)
    trained = three_ways(config, data_key, order_key)
    numbers = arm_numbers(config, trained)
    data = {
        "flow": flow,
        "bounds": bounds,
        "optima": optima,
        "arms": {name: summary(config, each) for name, each in trained.items()},
        "seeds": config.seeds,
    }
    return {
        "claim": _claim(config, {number["name"]: number["value"] for number in numbers}),
        "numbers": [flow_number, bound_number, optimum_number, *shift_numbers, *numbers],
        "data": data,
    }


def _claim(config: Config, values: dict[str, float]) -> str:
    sgd, adam = (values[f"{name}: share of the gap in the margin left at the matched rate"] for name in OPTIMISERS)
    return (
        "The loss over all pairs of a prompt bounds the gradient on an answer by 2/K, but not the margin. On a linear "
        f"model, {config.seeds} seeds, a rate matched per comparison leaves {abs(sgd):.0%} of what shuffling adds to "
        f"the margin under SGD, and {adam:.0%} under Adam. Each at its best rate, shuffling has the smaller held-out "
        "loss."
    )


# Exact properties -----------------------------------------------------------------------------------------------------


def gradient_flow(config: Config) -> tuple[dict[str, Any], ledger.Number]:
    """Follow two free scores from equality down the loss's own gradient, by Runge-Kutta."""
    step_size = config.end / config.flow_steps

    def velocity(scores: Array) -> Array:
        return -jnp.stack(reward_model.pairwise_loss.grad(scores[0], scores[1]))

    def step(scores: Array, _: None) -> tuple[Array, Array]:
        k1 = velocity(scores)
        k2 = velocity(scores + step_size / 2 * k1)
        k3 = velocity(scores + step_size / 2 * k2)
        k4 = velocity(scores + step_size * k3)
        scores = scores + step_size / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return scores, scores[0] - scores[1]

    _, later = jax.jit(lambda start: jax.lax.scan(step, start, length=config.flow_steps))(jnp.zeros(2))
    margin = np.concatenate([[0.0], np.asarray(later)])
    time = step_size * np.arange(config.flow_steps + 1)
    exact = brentq(lambda x: math.exp(x) + x - 2 * config.end - 1, 0, 20, xtol=1e-14)
    shown = np.unique(np.geomspace(1, config.flow_steps, 120).astype(int))
    number = ledger.identity(
        f"margin of one pair after t = {config.end:g}",
        float(margin[-1]),
        expected=exact,
        tolerance=1e-6,
        unit="log-odds",
        source="dΔ/dt = 2 σ(−Δ), so e^Δ + Δ = 2t + 1",
    )
    return {"time": time[shown], "margin": margin[shown]}, number


def gradient_bounds(config: Config, key: Array) -> tuple[list[dict[str, Any]], ledger.Number]:
    """Find the largest gradient of any answer: over random scores, and where the ranking is upside down."""
    curves, largest, gradient_of = [], [], jax.jit(lambda *args: reward_model.k_choose_2_loss.grad(*args)[0])
    for size in config.sizes:
        ranks = jnp.arange(size)
        scale = jnp.asarray(np.geomspace(0.03, 100, 40))
        draws = jax.random.normal(jax.random.fold_in(key, size), (config.draws // 40, 40, size), jnp.float64)
        upside_down = jnp.broadcast_to(50.0 * ranks, (1, 40, size))
        scores = jnp.concatenate([draws * scale[:, None], upside_down])
        gradient = jnp.abs(gradient_of(scores, jnp.broadcast_to(ranks, scores.shape)))
        curves.append({"size": size, "scale": scale, "largest": gradient[:-1].max(axis=(0, 2))})
        largest.append(float(gradient.max()) * size / 2)
    number = ledger.identity(
        f"largest gradient of an answer over 2/K, K = {', '.join(map(str, config.sizes))}: farthest from 1",
        max(largest, key=lambda value: abs(value - 1)),
        expected=1.0,
        tolerance=1e-12,
        unit="1",
        source=f"(K − 1)/C(K, 2) = 2/K, {PAPER}",
    )
    return curves, number


def label_noise(config: Config) -> tuple[dict[str, Any], ledger.Number]:
    """Descend on Δ where the label holds with probability p, for each p, and for the p of the labellers' agreement."""
    p_of_agreement = (1 + math.sqrt(2 * config.agreement - 1)) / 2  # two labellers agree with p² + (1 − p)²
    probabilities = jnp.asarray([*config.label_probabilities, p_of_agreement])

    def step(margin: Array, _: None) -> tuple[Array, None]:
        slope = jax.vmap(lambda lead, p: reward_model.pairwise_loss.grad(lead, 0.0 * lead, label_noise=1 - p)[0])
        return margin - slope(margin, probabilities), None

    found, _ = jax.jit(lambda start: jax.lax.scan(step, start, length=10_000))(jnp.zeros_like(probabilities))
    number = ledger.identity(
        "largest |Δ* − logit p| over label probabilities p",
        float(jnp.abs(found - jnp.log(probabilities / (1 - probabilities))).max()),
        tolerance=1e-9,
        unit="log-odds",
        source="the mean loss is least where σ(Δ) = p",
    )
    agreed = {"agreement": config.agreement, "probability": p_of_agreement, "margin": found[-1]}
    return {"probability": config.label_probabilities, "margin": found[:-1], "agreed": agreed}, number


def free_shift(key: Array) -> list[ledger.Number]:
    """Add a constant to all scores, which changes no loss; the centring loss alone decides where they lie."""
    scores = 3 * jax.random.normal(key, (200, 9), jnp.float64)
    ranks = jnp.broadcast_to(jnp.arange(9), scores.shape)
    shifts = jnp.asarray([0.0, -1000.0, -10.0, -1.0, 1.0, 10.0, 1000.0])
    loss, *moved = jax.jit(jax.vmap(lambda shift: reward_model.k_choose_2_loss(scores + shift, ranks)))(shifts)

    @functools.partial(jax.jit, static_argnames="coefficient")
    def descend(coefficient: float) -> Array:
        def step(pair: Array, _: None) -> tuple[Array, None]:
            slopes = jnp.stack(reward_model.pairwise_loss.grad(*pair, label_noise=0.27))
            slopes += jnp.stack(reward_model.centering_loss.grad(*pair, coefficient=coefficient))
            return pair - slopes, None

        return jax.lax.scan(step, jnp.asarray([5.0, 5.0]), length=1000)[0]

    return [
        ledger.identity(
            "largest change of the loss under a shift of all scores by up to 1000",
            float(jnp.abs(jnp.stack(moved) - loss).max()),
            tolerance=1e-10,
            unit="nats",
            source=f"only differences enter, {PAPER}",
        ),
        ledger.identity(
            "sum of a pair's scores, begun at 10, with the centring loss",
            float(descend(0.01).sum()),
            tolerance=1e-9,
            unit="log-odds",
            source="Eisenstein et al. 2023",
        ),
    ]


# Three ways to train --------------------------------------------------------------------------------------------------


class Answers(NamedTuple):
    """Answers to prompts, ragged in K: their features, true scores, ranks, and which are real."""

    features: Float[Array, "prompt answer feature"]
    scores: Float[Array, "prompt answer"]
    ranks: Int[Array, "prompt answer"]
    mask: Bool[Array, "prompt answer"]


class Pairs(NamedTuple):
    """Every comparison: its prompt, the chosen and the rejected answer, and 1/(number of its prompt's comparisons)."""

    prompt: Int[Array, "pair"]
    chosen: Int[Array, "pair"]
    rejected: Int[Array, "pair"]
    share: Float[Array, "pair"]


def answers_per_prompt(config: Config) -> np.ndarray:
    """Return K of each prompt: each value from `fewest` to `most` equally often."""
    return config.fewest + np.arange(config.prompts) % (config.most - config.fewest + 1)


def comparisons(config: Config) -> int:
    """Return Σ C(K, 2) over the prompts."""
    sizes = answers_per_prompt(config)
    return int((sizes * (sizes - 1) // 2).sum())


def draw_answers(key: Array, direction: Float[Array, "feature"], config: Config) -> Answers:
    """Draw answers with normal features, of length about 1, and one noisy ranking of each prompt's answers."""
    features_key, noise_key = jax.random.split(key)
    shape = (config.prompts, config.most)
    features = jax.random.normal(features_key, (*shape, config.features)) / jnp.sqrt(config.features)
    mask = jnp.arange(config.most) < jnp.asarray(answers_per_prompt(config))[:, None]
    scores = features @ direction
    drawn = jnp.where(mask, scores + jax.random.gumbel(noise_key, shape), -jnp.inf)
    ranks = (drawn[:, None, :] > drawn[:, :, None]).sum(axis=-1)  # how many answers are better
    return Answers(features, scores, ranks, mask)


def all_pairs(answers: Answers, count: int) -> Pairs:
    """Return the `count` pairs of answers to one prompt, each once, the better ranked first."""
    better = answers.ranks[:, :, None] < answers.ranks[:, None, :]
    better &= answers.mask[:, :, None] & answers.mask[:, None, :]
    prompt, chosen, rejected = jnp.nonzero(better, size=count)
    return Pairs(prompt, chosen, rejected, 1 / better.sum(axis=(1, 2))[prompt])


def measure(weights: Array, train: Answers, pairs: Pairs, held_out: Answers) -> dict[str, Array]:
    """Return the mean margin on training pairs, and the mean loss on held-out ones under the population's labels."""
    scores, new_scores = train.features @ weights, held_out.features @ weights
    lead = scores[pairs.prompt, pairs.chosen] - scores[pairs.prompt, pairs.rejected]
    upper = jnp.triu(jnp.ones((new_scores.shape[1],) * 2, bool), 1)
    counted = upper & held_out.mask[:, :, None] & held_out.mask[:, None, :]
    first, second = new_scores[:, :, None], new_scores[:, None, :]
    true_lead = held_out.scores[:, :, None] - held_out.scores[:, None, :]
    first, second = jnp.broadcast_arrays(first, second)
    right = jax.nn.sigmoid(true_lead)  # how often the population prefers the first
    right_loss, wrong_loss = reward_model.pairwise_loss(first, second), reward_model.pairwise_loss(second, first)
    expected = right * right_loss + (1 - right) * wrong_loss
    return {"margin": lead.mean(), "held_out_loss": jnp.where(counted, expected, 0).sum() / counted.sum()}


@functools.partial(jax.jit, static_argnames="config")
def draw_data(keys: Array, config: Config) -> tuple[Answers, Pairs, Answers]:
    """Draw, for each key, answers to train on, their comparisons, and held-out answers of the same true model."""

    def draw(key: Array) -> tuple[Answers, Pairs, Answers]:
        direction_key, train_key, held_out_key = jax.random.split(key, 3)
        direction = config.spread * jax.random.normal(direction_key, (config.features,))
        answers = draw_answers(train_key, direction, config)
        return answers, all_pairs(answers, comparisons(config)), draw_answers(held_out_key, direction, config)

    return jax.vmap(draw)(keys)


def draw_batches(key: Array, config: Config, arm: str) -> Int[Array, "seed part step element"]:
    """Draw, for each seed and epoch, an order of the prompts or comparisons, cut into parts and batches."""
    elements = config.prompts if arm == "grouped" else comparisons(config)
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    shape = (config.seeds, config.epochs, elements)
    orders = generator.permuted(np.broadcast_to(np.arange(elements), shape), axis=-1)
    return jnp.asarray(orders.reshape(config.seeds, config.epochs * config.checkpoints, -1, config.batch))


@functools.partial(jax.jit, static_argnames=("arm", "optimiser"))
def train(
    data: tuple[Answers, Pairs, Answers],
    batches: Int[Array, "seed part step element"],
    learning_rates: Float[Array, "rate"],
    *,
    arm: str,
    optimiser: str,
) -> dict[str, Float[Array, "rate seed checkpoint"]]:
    """Train from zero for each learning rate and seed; return `measure` at the start and after each part."""
    once = functools.partial(_train_once, arm=arm, name=optimiser)
    return jax.vmap(jax.vmap(once, in_axes=(0, 0, None)), in_axes=(None, None, 0))(data, batches, learning_rates)


def _train_once(data: tuple, batches: Array, learning_rate: Array, *, arm: str, name: str) -> dict[str, Array]:
    answers, pairs, _ = data
    optimiser = OPTIMISERS[name](learning_rate)

    def loss(weights: Array, batch: Array) -> Array:
        if arm == "grouped":
            of_batch = jax.tree.map(lambda leaf: leaf[batch], answers)
            return reward_model.k_choose_2_loss(of_batch.features @ weights, of_batch.ranks, of_batch.mask).mean()
        chosen, rejected = (
            answers.features[pairs.prompt[batch], which[batch]] @ weights for which in (pairs.chosen, pairs.rejected)
        )
        weight = pairs.share[batch] if arm == "matched" else 1.0
        return (weight * reward_model.pairwise_loss(chosen, rejected)).mean()

    def step(state: tuple, batch: Array) -> tuple[tuple, None]:
        weights, optimiser_state = state
        updates, optimiser_state = optimiser.update(jax.grad(loss)(weights, batch), optimiser_state)
        return (optax.apply_updates(weights, updates), optimiser_state), None

    def part(state: tuple, steps: Array) -> tuple[tuple, dict[str, Array]]:
        state, _ = jax.lax.scan(step, state, steps)
        return state, measure(state[0], *data)

    start = jnp.zeros(answers.features.shape[-1])
    _, measured = jax.lax.scan(part, (start, optimiser.init(start)), batches)
    return jax.tree.map(lambda first, later: jnp.concatenate([first[None], later]), measure(start, *data), measured)


def three_ways(config: Config, data_key: Array, order_key: Array) -> dict[str, dict[str, Any]]:
    """Train each optimiser's arms on the same answers: along all epochs at one rate, and one epoch at every rate."""
    data = draw_data(jax.random.split(data_key, config.seeds), config)
    orders = {arm: draw_batches(jax.random.fold_in(order_key, arm == "grouped"), config, arm) for arm in ARMS}
    trained = {}
    for name, rates, shown in zip(OPTIMISERS, (config.sgd_rates, config.adam_rates), config.shown_rates, strict=True):
        along, at_rates = {}, {}
        for arm, batches in orders.items():
            once = {"arm": arm, "optimiser": name}
            along[arm] = jax.tree.map(np.asarray, train(data, batches, jnp.asarray([shown]), **once))
            one_epoch = train(data, batches[:, : config.checkpoints], jnp.asarray(rates), **once)
            at_rates[arm] = np.asarray(one_epoch["held_out_loss"][:, :, -1])
        trained[name] = {"shown": shown, "rates": rates, "along": along, "at_rates": at_rates}
    return trained


def summary(config: Config, trained: dict[str, Any]) -> dict[str, Any]:
    """Average over the seeds, with 95% intervals."""
    epoch = np.arange(config.epochs * config.checkpoints + 1) / config.checkpoints
    described = {
        arm: {
            **{name: _with_interval(values[0]) for name, values in trained["along"][arm].items()},
            "after_one_epoch": _with_interval(trained["at_rates"][arm].T),
        }
        for arm in ARMS
    }
    return {"shown": trained["shown"], "rates": trained["rates"], "epoch": epoch, "arms": described}


def _with_interval(values: np.ndarray) -> dict[str, list[float]]:
    """Return the mean over the first axis, and Student's 95% interval, for each column."""
    return dict(
        zip(("mean", "low", "high"), np.transpose([statistics.student(each) for each in values.T]), strict=True)
    )


def arm_numbers(config: Config, trained: dict[str, Any]) -> list[dict[str, Any]]:
    """Test the share of the gap that a matched rate leaves, and the arms at their own best rates; measure the rest."""
    measured, p_values = [], {}
    for name, each in trained.items():
        source = f"{config.seeds} seeds, paired, one epoch of {name} at {each['shown']:g}"
        for field, (label, unit) in MEASURED.items():
            grouped, shuffled, matched = (each["along"][arm][field][0, :, config.checkpoints] for arm in ARMS)
            gap, left = shuffled - grouped, matched - grouped
            title = f"{name}: {label}, shuffled − grouped"
            measured.append(ledger.measurement(title, *statistics.student(gap), unit=unit, source=source))
            title = f"{name}: share of the gap in the {label} left at the matched rate"
            measured.append(ledger.measurement(title, *_ratio(left, gap), unit="share", source=source))
            if name == "SGD":
                sides = [statistics.above_zero(REMOVED * gap + sign * left) for sign in (1, -1)]
                p_values[f"{name}: the matched rate leaves less than {REMOVED:.0%} of the gap in the {label}"] = max(
                    sides
                )
            else:
                over = statistics.above_zero(left - LEFT * gap)
                p_values[f"{name}: the matched rate leaves more than {LEFT:.0%} of the gap in the {label}"] = over
        best = {arm: _at_best_rate(each["at_rates"][arm]) for arm in ("grouped", "shuffled")}
        source = "the rate chosen on every other seed, the loss measured on the rest, one epoch"
        for arm, losses in best.items():
            title = f"{name}: held-out loss of {arm} at its best rate"
            measured.append(ledger.measurement(title, *statistics.student(losses), unit="nats", source=source))
        better = statistics.above_zero(best["grouped"] - best["shuffled"])
        p_values[f"{name}: shuffled has less held-out loss than grouped, each at its best rate"] = better
    source = f"one-sided Wilcoxon over seeds, Holm over {len(p_values)}"
    named = {f"p, {name}": p for name, p in p_values.items()}
    return [*statistics.significant(named, unit="1", source=source), *measured]


def _ratio(part: np.ndarray, whole: np.ndarray) -> tuple[float, float, float]:
    """Return the ratio of two means of paired values, with its 95% interval to first order."""
    ratio = float(part.mean() / whole.mean())
    _, low, high = statistics.student((part - ratio * whole) / whole.mean())
    return ratio, ratio + low, ratio + high


def _at_best_rate(losses: np.ndarray) -> np.ndarray:
    """Return the losses [rate, seed] of the odd seeds at the rate that is best on the even ones."""
    return losses[losses[:, ::2].mean(axis=1).argmin(), 1::2]
