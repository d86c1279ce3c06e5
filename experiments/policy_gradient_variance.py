"""The exact variance and bias of policy-gradient estimators: baselines, leave-one-out, group normalisation, critics.

    python -m experiments.policy_gradient_variance --preset quick

Many random tabular models; the model with the median effect of the mean baseline, in detail; and a coin, a
counter-example in closed form.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Key

from experiments import ledger, statistics
from experiments.frame import experiment
from jaxrl_llm import oracle
from jaxrl_llm.objectives import advantages, kl
from jaxrl_llm.objectives.policy_gradient import ppo_clip_loss, reinforce_loss
from jaxrl_llm.tabular import TabularLM

SOURCE = "oracle.gradient_moments, against oracle.objective_grad"
GROUPS = {"RLOO": advantages.rloo, "centred": advantages.centered, "GRPO": advantages.grpo}


@dataclasses.dataclass(frozen=True)
class Config:
    """Random models, and the estimators that are measured."""

    searched: int = 200  # random models
    p: float = 0.8  # of the coin's rewarded side: above 2/3 the mean baseline raises the variance
    beta: float = 0.1  # the price of a nat where k1 is in the reward
    group_sizes: tuple[int, ...] = (2, 3)
    seed: int = 0


@experiment(quick=Config(), full=Config(searched=1_000), seeds=5)
def run(config: Config) -> dict[str, Any]:
    """Compare constant baselines on many models; then measure every estimator on the median model and on the coin."""
    keys = jax.random.split(jax.random.key(config.seed), config.searched)
    with jax.enable_x64(True):
        search = {name: np.asarray(value) for name, value in jax.jit(jax.vmap(search_one))(keys).items()}
        middle = np.argsort(search["mean baseline"], kind="stable")[config.searched // 2]
        cases = {
            "typical": measure_case(config, functools.partial(problem, keys[middle])),
            "coin": measure_case(config, functools.partial(coin, config.p)),
        }
    raised = int((search["mean baseline"] > 1).sum())
    by_coin = cases["coin"]["estimators"]["mean baseline"]["relative variance"]
    return {
        "claim": "Unbiased policy-gradient estimators differ in variance: subtracting the mean reward lowers it in "
        f"most random models, but raises it in {raised / config.searched:.0%} of {config.searched}, and "
        f"{by_coin:.3g} times for a coin; the optimal baseline never does.",
        "numbers": search_numbers(search, raised) + coin_numbers(config, cases["coin"]) + case_numbers(cases),
        "data": {"search": {name: search[name] for name in ("mean baseline", "optimal baseline")}, "cases": cases}
        | {"p": config.p},
    }


# Estimators -----------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A policy, a reference, and a reward for every token in its place."""

    lm: TabularLM
    params: dict[str, Array]
    ref_params: dict[str, Array]
    rewards: Float[Array, "sequences time"]


def problem(key: Key[Array, ""]) -> Problem:
    """Draw normal logits and normal rewards of 27 sequences."""
    lm = TabularLM(vocab_size=3, horizon=3)
    policy, ref, rewards = (
        jax.random.normal(each, (lm.num_prefixes, lm.vocab_size), jnp.float64) for each in jax.random.split(key, 3)
    )
    sequences = oracle.enumerate_sequences(lm)
    rows = oracle.next_token_logits(lm, {"logits": rewards}, sequences)  # a reward is looked up as a logit is
    per_token = jnp.take_along_axis(rows, sequences[..., None], axis=-1)[..., 0]
    return Problem(lm, {"logits": 1.5 * policy}, {"logits": 1.5 * ref}, per_token)


def coin(p: float) -> Problem:
    """Return a policy on two tokens: the reward is 1 for the first, of probability p, and 0 for the second.

    Without a baseline the gradient has the variance 2p(1 − p)³, less the mean reward 2p(1 − p)(2p − 1)², less b* none.
    """
    params = {"logits": jnp.log(jnp.asarray([[p, 1 - p]], jnp.float64))}
    ref_params = {"logits": jnp.zeros((1, 2), jnp.float64)}
    return Problem(TabularLM(vocab_size=2, horizon=1), params, ref_params, jnp.asarray([[1.0], [0.0]], jnp.float64))


def baselines(given: Problem) -> tuple[Array, Array]:
    """Return E[r], and the constant that minimises the variance."""
    probs = jnp.exp(oracle.sequence_log_probs(given.lm, given.params))
    rewards = given.rewards.sum(axis=1)
    scores = jax.jacrev(functools.partial(oracle.sequence_log_probs, given.lm))(given.params)["logits"]
    norms = jnp.square(scores).sum(axis=(1, 2))
    return probs @ rewards, advantages.optimal_baseline(rewards, norms, probabilities=probs)


def single(given: Problem, loss: Any) -> oracle.Moments:
    """Return the moments of an estimator on one sequence; `loss` gives a value for each sequence."""
    return oracle.gradient_moments(given.lm, given.params, lambda params, groups: loss(params)[groups[:, 0]])


def single_losses(given: Problem, beta: float) -> dict[str, Any]:
    """Return losses on single sequences: functions of the parameters, with a value for each sequence."""
    whole, to_go = given.rewards.sum(axis=1), advantages.returns_to_go(given.rewards)
    mean, best = baselines(given)
    critic = advantages.gae(given.rewards, exact_values(given, to_go), discount=1.0, lambda_=1.0)
    ref = oracle.sequence_log_probs(given.lm, given.ref_params)

    def log_probs(params):
        return oracle.sequence_log_probs(given.lm, params)

    def per_token(params, advantage):
        tokens = oracle.token_log_probs_of(given.lm, params, oracle.enumerate_sequences(given.lm))
        return reinforce_loss(tokens, advantage).sum(axis=1)

    def ppo(params):
        return ppo_clip_loss(log_probs(params), stop_gradient(log_probs(params)), whole)

    def penalised(params):
        return reinforce_loss(log_probs(params), whole - beta * kl.k1(stop_gradient(log_probs(params)), ref))

    return {
        "no baseline": lambda params: reinforce_loss(log_probs(params), whole),
        "PPO-clip, first step": ppo,
        "mean baseline": lambda params: reinforce_loss(log_probs(params), whole - mean),
        "optimal baseline": lambda params: reinforce_loss(log_probs(params), whole - best),
        "reward-to-go": lambda params: per_token(params, to_go),
        "exact critic": lambda params: per_token(params, critic),
        "k1 in the reward": penalised,
    }


def exact_values(given: Problem, to_go: Float[Array, "sequences time"]) -> Float[Array, "sequences time_plus_one"]:
    """Return V(y_<t) = E[rewards from t on | y_<t] along every sequence, and 0 at the end."""
    probs = jnp.exp(oracle.sequence_log_probs(given.lm, given.params))
    columns = []
    for time in range(given.lm.horizon):
        same_prefix = probs.reshape(given.lm.vocab_size**time, -1)
        value = (same_prefix * to_go[:, time].reshape(same_prefix.shape)).sum(axis=1) / same_prefix.sum(axis=1)
        columns.append(jnp.repeat(value, same_prefix.shape[1]))
    return jnp.stack([*columns, jnp.zeros_like(probs)], axis=1)


def grouped(given: Problem, advantage: Any, size: int) -> oracle.Moments:
    """Return the moments of REINFORCE averaged over a group, each advantage from the whole group."""
    whole = given.rewards.sum(axis=1)

    def loss(params, groups):
        log_probs = oracle.sequence_log_probs(given.lm, params)[groups]
        return reinforce_loss(log_probs, advantage(whole[groups])).mean(axis=1)

    return oracle.gradient_moments(given.lm, given.params, loss, group_size=size)


def search_one(key: Key[Array, ""]) -> dict[str, Array]:
    """Return the variance with both constant baselines, relative to none."""
    given = problem(key)
    rewards = given.rewards.sum(axis=1)
    plain, *others = (
        single(given, lambda params, b=b: reinforce_loss(oracle.sequence_log_probs(given.lm, params), rewards - b))
        for b in (0.0, *baselines(given))
    )
    names = ("mean baseline", "optimal baseline")
    return {name: each.total_variance / plain.total_variance for name, each in zip(names, others, strict=True)}


def measure_case(config: Config, make: Callable[[], Problem]) -> dict[str, Any]:
    """Return variances for an equal number of samples, relative to no baseline; relative bias; cosine with ∇J."""
    measured, (mean, best) = jax.jit(lambda: (measure(config, make()), baselines(make())))()
    entries = {name: {field: float(value) for field, value in each.items()} for name, each in measured.items()}
    plain = entries["no baseline"]["variance"]
    for entry in entries.values():
        entry["relative variance"] = entry.pop("variance") / plain
    return {"estimators": entries, "mean reward": float(mean), "b*": float(best)}


def measure(config: Config, given: Problem) -> dict[str, dict[str, Array]]:
    """Measure every estimator of this experiment on one problem."""
    whole = given.rewards.sum(axis=1)
    exact, held = (
        oracle.objective_grad(given.lm, given.params, given.ref_params, whole, beta=beta)["logits"]
        for beta in (0.0, config.beta)
    )
    found = {
        name: compared(single(given, loss), held if name.startswith("k1") else exact, 1)
        for name, loss in single_losses(given, config.beta).items()
    }
    for size in config.group_sizes:
        for name, advantage in GROUPS.items():
            found[f"{name}, groups of {size}"] = compared(grouped(given, advantage, size), exact, size)
    return found


def compared(found: oracle.Moments, exact: Array, size: int) -> dict[str, Array]:
    """Compare with the true gradient; the variance is per sample: that of a group times its size."""
    mean = -found.mean["logits"]  # of a loss
    length = jnp.linalg.norm(exact)
    return {
        "variance": size * found.total_variance,
        "bias": jnp.linalg.norm(mean - exact) / length,
        "cosine": (mean * exact).sum() / (jnp.linalg.norm(mean) * length),
        "length": (mean * exact).sum() / length**2,
    }


def search_numbers(search: dict[str, np.ndarray], raised: int) -> list[dict[str, Any]]:
    """Count the models in which the mean baseline raises the variance; the optimal one never does."""
    mean, best, searched = search["mean baseline"], search["optimal baseline"], len(search["mean baseline"])
    share = statistics.share(raised, searched)
    return [
        ledger.measurement(
            "share of random models in which the mean baseline raises the variance",
            *share,
            unit="1",
            source=f"exact total variances of {searched} models of normal logits and rewards; Clopper and Pearson",
        ),
        ledger.test(
            "the same: upper end of its 95% interval",
            share[2],
            at_most=0.5,
            wrong=0.6,
            unit="1",
            source="it lowers the variance in most of them",
        ),
        ledger.identity(
            "largest Var(optimal baseline)/min(Var(no baseline), Var(mean baseline)) − 1, if above 0",
            max(0.0, float((best / np.minimum(1, mean)).max() - 1)),
            tolerance=1e-12,
            unit=f"1, over {searched} models",
            source="Greensmith et al. 2004",
        ),
    ]


def coin_numbers(config: Config, case: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare the variance of the coin with its closed form."""
    return [
        ledger.identity(
            "coin: variance with the mean baseline over none",
            case["estimators"]["mean baseline"]["relative variance"],
            expected=((2 * config.p - 1) / (1 - config.p)) ** 2,
            tolerance=1e-9,
            unit="1",
            source=f"((2p − 1)/(1 − p))², p = {config.p:g}: 2p(1 − p)(2p − 1)² over 2p(1 − p)³",
        )
    ]


def case_numbers(cases: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the bias of the estimators in length and direction, and the variance of each on the median model."""
    typical, coin_case = (cases[name]["estimators"] for name in ("typical", "coin"))
    both = [*typical.items(), *coin_case.items()]
    centred = [(int(name.rpartition(" ")[2]), each) for name, each in both if name.startswith("centred")]
    turned = min(1 - each["cosine"] for name, each in typical.items() if name.startswith("GRPO"))
    unit = "1, over both models"
    entries = [
        ledger.identity(
            "largest ‖bias‖/‖∇J‖ of the unbiased estimators",
            max(each["bias"] for name, each in both if not name.startswith(("centred", "GRPO"))),
            tolerance=1e-10,
            unit=unit,
            source=SOURCE,
        ),
        ledger.identity(
            "largest ‖E[estimate] − (1 − 1/N) ∇J‖/‖∇J‖ of centred groups of N",
            max(abs(each["bias"] - 1 / size) + 1 - each["cosine"] for size, each in centred),
            tolerance=1e-10,
            unit=unit,
            source="the mean includes the sample itself",
        ),
        ledger.measurement(
            "least 1 − cosine of E[GRPO] with ∇J",
            turned,
            unit="1, on the median model",
            source=f"division by the spread of a group also turns the gradient; {SOURCE}",
        ),
    ]
    entries += [
        ledger.measurement(
            f"variance with {name} over none, for equal numbers of samples",
            typical[name]["relative variance"],
            unit="1, on the median model",
            source="exact total variance",
        )
        for name in ("mean baseline", "optimal baseline", "reward-to-go", "exact critic", "RLOO, groups of 3")
    ]
    return entries
