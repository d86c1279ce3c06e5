"""The gradients of k1, k2 and k3 and what they descend: as losses, as rewards, off-policy, and token by token.

    python -m experiments.kl_gradients --preset quick

Everything is exact: expectations over all sequences of a tabular model, in float64.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.lax import stop_gradient
from scipy.optimize import minimize, root
from scipy.special import softmax
from scipy.stats import binom

from experiments import ledger
from experiments.frame import experiment
from jaxrl_llm import oracle
from jaxrl_llm.objectives import kl
from jaxrl_llm.objectives.policy_gradient import reinforce_loss
from jaxrl_llm.tabular import TabularLM

MODES = ("loss", "reward", "off-policy loss", "constant ratio", "through the ratio")
REVERSE, FORWARD = "∇KL(π‖ref)", "∇KL(ref‖π)"
SOURCE = "the table in objectives.kl, by oracle.gradient_moments"
LM = TabularLM(vocab_size=3, horizon=3)
ESTIMATORS = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}
Table = jax.Array  # one row of logits for each prefix
STICKY = ((0.50, 0.45, 0.05), 0.9)  # the reference: a first token, which is then repeated


@dataclasses.dataclass(frozen=True)
class Config:
    """Lengths of the descents, and the number of random models for the missing share."""

    steps: int = 600
    learning_rate: float = 1.0
    tied_steps: int = 3_000  # of the policy of independent tokens
    tied_learning_rate: float = 0.3
    horizons: tuple[int, ...] = (1, 2, 4)
    models: int = 12  # at each horizon
    seed: int = 0


@experiment(quick=Config(), full=Config(models=64, horizons=(1, 2, 3, 4, 5)), seeds=5)
def run(config: Config) -> dict[str, Any]:
    """Compute the table of gradients, the descents, the misspecified descents and the missing share."""
    tables_key, share_key = jax.random.split(jax.random.key(config.seed))
    with jax.enable_x64(True):
        policy, ref, sampler = (random_table(LM, key) for key in jax.random.split(tables_key, 3))
        table, numbers = gradient_table(policy, ref, sampler)
        curves, curve_numbers = descents(config, policy, ref)
        tied, tied_numbers = misspecified(config)
        share, share_numbers = missing_share(config, share_key)
    return {
        "claim": "As a loss, k1 has the expected gradient 0, k2 that of KL(π‖ref), and k3 that of KL(ref‖π). Towards a "
        "reference that a policy of independent tokens cannot match, k3 covers both modes and k2 picks one. Summed "
        "over tokens, k2 misses a part of ∇KL.",
        "numbers": [*numbers, *curve_numbers, *tied_numbers, *share_numbers],
        "data": {"table": table, "descents": curves, "misspecified": tied, "missing": share},
    }


# Exact expected gradients ---------------------------------------------------------------------------------------------


def random_table(lm: TabularLM, key: jax.Array) -> Table:
    """Return normal logits of standard deviation 1.5."""
    return 1.5 * jax.random.normal(key, (lm.num_prefixes, lm.vocab_size), jnp.float64)


def log_probs(table: Table) -> jax.Array:
    """Return the log-probability of every sequence."""
    return oracle.sequence_log_probs(LM, {"logits": table})


def reverse_kl(table: Table, ref: Table) -> jax.Array:
    """Return KL(π‖ref) of whole sequences."""
    return oracle.sequence_kl(LM, {"logits": table}, {"logits": ref})


def forward_kl(table: Table, ref: Table) -> jax.Array:
    """Return KL(ref‖π) of whole sequences."""
    return reverse_kl(ref, table)


def mean_gradient(loss: Callable[[Table], jax.Array], policy: Table, sampler: Table | None = None) -> Table:
    """Return E[∇loss] over sampled sequences, exactly."""
    return oracle.gradient_moments(
        LM,
        {"logits": policy},
        lambda params, groups: loss(params["logits"])[groups[:, 0]],
        sampler_params=None if sampler is None else {"logits": sampler},
    ).mean["logits"]


def expected_gradient(
    which: int | jax.Array, mode: str, policy: Table, ref: Table, sampler: Table | None = None
) -> Table:
    """Return the expected gradient of the `which`-th estimator, minimised in one of `MODES`."""
    logp_ref = log_probs(ref)

    def loss(table):
        logp_policy = log_probs(table)
        value = jnp.stack([estimator(logp_policy, logp_ref) for estimator in ESTIMATORS.values()])[which]
        if mode == "reward":
            return reinforce_loss(logp_policy, -stop_gradient(value))
        if mode in ("loss", "off-policy loss"):
            return value
        ratio = jnp.exp(logp_policy - log_probs(sampler))
        return (stop_gradient(ratio) if mode == "constant ratio" else ratio) * value

    return mean_gradient(loss, policy, None if mode in ("loss", "reward") else sampler)


def cosine(a: Table, b: Table) -> jax.Array:
    """Return the cosine of two gradients as long vectors; 0 where one is 0."""
    length = jnp.linalg.norm(a) * jnp.linalg.norm(b)
    return jnp.where(length > 1e-12, (a * b).sum() / jnp.maximum(length, 1e-12), 0)


def descend(start: Any, gradient_of: Callable, learning_rate: float, *, steps: int, every: int) -> tuple[Any, Any]:
    """Descend by SGD; return the parameters at the end, and every `every` steps from the start."""
    optimiser = optax.sgd(learning_rate)

    def step(state, _):
        params, moments = state
        updates, moments = optimiser.update(gradient_of(params), moments)
        return (optax.apply_updates(params, updates), moments), None

    def some(state, _):
        return jax.lax.scan(step, state, length=every)[0], state[0]

    (end, _), path = jax.lax.scan(some, (start, optimiser.init(start)), length=steps // every)
    return end, jax.tree.map(lambda whole, last: jnp.concatenate([whole, last[None]]), path, end)


@jax.jit
def compare(policy: Table, ref: Table, sampler: Table) -> dict[str, dict[str, jax.Array]]:
    """Compare each expected gradient with both divergences' gradients: cosine, relative error, size."""
    targets = {REVERSE: jax.grad(reverse_kl)(policy, ref), FORWARD: jax.grad(forward_kl)(policy, ref)}

    def entry(mode: str, which: jax.Array) -> dict[str, jax.Array]:
        gradient = expected_gradient(which, mode, policy, ref, sampler)
        compared = {"size": jnp.abs(gradient).max()}
        for target, exact in targets.items():
            compared[f"cosine {target}"] = cosine(gradient, exact)
            compared[f"error {target}"] = jnp.linalg.norm(gradient - exact) / jnp.linalg.norm(exact)
        return compared

    found = {mode: jax.vmap(functools.partial(entry, mode))(jnp.arange(len(ESTIMATORS))) for mode in MODES}
    return {
        f"{name}, {mode}": {field: value[which] for field, value in found[mode].items()}
        for which, name in enumerate(ESTIMATORS)
        for mode in MODES
    }


EXPECTED = {
    "k1, loss": "0",
    "k2, loss": REVERSE,
    "k3, loss": FORWARD,
    "k1, reward": REVERSE,
    "k1, constant ratio": "0",
    "k2, constant ratio": REVERSE,
    "k3, constant ratio": FORWARD,
    "k1, through the ratio": REVERSE,
    "k3, through the ratio": REVERSE,
}


def gradient_table(policy: Table, ref: Table, sampler: Table) -> tuple[list[dict[str, Any]], list[ledger.Number]]:
    """Return each cell with the target that it equals, if any, and the numbers that test it."""
    rows, on_policy, off_policy, others = [], [], [], []
    for cell, entry in compare(policy, ref, sampler).items():
        entry = {name: float(value) for name, value in entry.items()}
        errors = {"0": entry["size"], REVERSE: entry[f"error {REVERSE}"], FORWARD: entry[f"error {FORWARD}"]}
        equals = [target for target, error in errors.items() if error < 1e-10]
        estimator, mode = cell.split(", ")
        rows.append({"estimator": estimator, "mode": mode, "equals": equals[0] if equals else None} | entry)
        if cell not in EXPECTED:
            others.append(min(errors[REVERSE], errors[FORWARD]))
        elif "ratio" in mode:
            off_policy.append(errors[EXPECTED[cell]])
        else:
            target = EXPECTED[cell]
            about = {"unit": "nats" if target == "0" else "relative", "source": SOURCE}
            name = f"{cell}: distance of E∇ from {target}"
            on_policy.append(ledger.identity(name, errors[target], tolerance=1e-10, **about))
    about = {"unit": "relative", "source": SOURCE}
    return rows, [
        *on_policy,
        ledger.identity(
            f"off-policy with a ratio, {len(off_policy)} cells: largest distance of E∇ from what it equals",
            max(off_policy),
            tolerance=1e-10,
            **about,
        ),
        ledger.test(
            f"the other {len(others)} cells: smallest distance of E∇ from both divergences' gradients",
            min(others),
            at_least=0.05,
            wrong=0.0,
            **about,
        ),
    ]


def descents(config: Config, start: Table, ref: Table) -> tuple[dict[str, Any], list[ledger.Number]]:
    """Follow each expected gradient from the same start, and return KL(π‖ref) on the way."""
    every = max(1, config.steps // 60)

    def path(mode: str, which: int | jax.Array) -> jax.Array:
        gradient_of = functools.partial(_gradient_at, which, mode, ref)
        _, tables = descend(start, gradient_of, config.learning_rate, steps=config.steps, every=every)
        return jax.vmap(lambda table: reverse_kl(table, ref))(tables)

    as_losses = jax.jit(jax.vmap(functools.partial(path, "loss")))(jnp.arange(len(ESTIMATORS)))
    paths = {f"{name} as a loss": as_losses[which] for which, name in enumerate(ESTIMATORS)}
    paths["k1 as a reward"] = jax.jit(functools.partial(path, "reward", 0))()
    at_start = float(paths["k1 as a loss"][0])
    drift = float(jnp.abs(paths["k1 as a loss"] - at_start).max())
    apart = float(jnp.abs(paths["k1 as a reward"] - paths["k2 as a loss"]).max())
    zero = {"tolerance": 1e-10, "unit": "nats"}
    numbers = [
        ledger.identity("k1 as a loss: how far KL(π‖ref) moves", drift, source="descent on E∇k1 = 0", **zero),
        ledger.identity("k1 as a reward against k2 as a loss", apart, source="one expected gradient, one path", **zero),
        *(
            ledger.measurement(
                f"{name} as a loss: KL(π‖ref) after {config.steps} steps over that at the start",
                float(paths[f"{name} as a loss"][-1]) / at_start,
                unit="1",
                source="descent on the exact expected gradient",
            )
            for name in ("k2", "k3")
        ),
    ]
    return {"steps": [every * index for index in range(len(paths["k1 as a loss"]))], "kl": paths}, numbers


def _gradient_at(which: int | jax.Array, mode: str, ref: Table, policy: Table) -> Table:
    return expected_gradient(which, mode, policy, ref)


def missing_share(config: Config, key: jax.Array) -> tuple[dict[str, Any], list[ledger.Number]]:
    """Compute how much of ∇KL a loss over tokens leaves out, at each length of the sequences."""
    shares, medians = {}, {}
    for horizon in config.horizons:
        keys = jax.random.split(jax.random.fold_in(key, horizon), config.models)
        share = jax.jit(jax.vmap(functools.partial(_missing, TabularLM(LM.vocab_size, horizon))))(keys)
        shares[str(horizon)], medians[str(horizon)] = share, _median(np.asarray(share))
    longest = str(max(config.horizons))
    low = medians[longest][1]
    source = f"{config.models} random models; Tang and Munos 2025, arXiv 2506.09477"
    name = f"{longest} tokens: median share of ∇KL that Σ_t k2 misses"
    numbers = [
        ledger.identity(
            "one token: share of ∇KL that Σ_t k2 misses",
            float(shares["1"].max()),
            tolerance=1e-10,
            unit="1",
            source="a sequence of one token has no later ones",
        ),
        ledger.test(f"{name}, lower end of its 95% interval", low, at_least=0.05, wrong=0.01, unit="1", source=source),
        ledger.measurement(name, *medians[longest], unit="1", source=source),
    ]
    return {"share": shares, "median": medians}, numbers


def _median(values: np.ndarray) -> tuple[float, float, float]:
    """Return the median of independent values, and its 95% interval by order statistics; 6 values at least."""
    ordered, count = np.sort(values), len(values)
    beyond = int(binom.ppf(0.025, count, 0.5))
    return float(np.median(values)), float(ordered[beyond - 1]), float(ordered[count - beyond])


def _missing(lm: TabularLM, key: jax.Array) -> jax.Array:
    """‖∇KL − E∇Σ_t k2_t‖/‖∇KL‖ of one random policy and reference."""
    policy, ref = (random_table(lm, each) for each in jax.random.split(key))
    sequences = oracle.enumerate_sequences(lm)

    def loss(params, groups):
        tokens = [oracle.token_log_probs_of(lm, each, sequences) for each in (params, {"logits": ref})]
        return kl.k2(*tokens).sum(axis=1)[groups[:, 0]]

    found = oracle.gradient_moments(lm, {"logits": policy}, loss).mean["logits"]
    exact = oracle.sequence_kl_grad(lm, {"logits": policy}, {"logits": ref})["logits"]
    return jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)


# A reference out of reach ---------------------------------------------------------------------------------------------


def tie(row: jax.Array) -> Table:
    """Return a policy with one row of logits for all prefixes: its tokens are independent."""
    return jnp.broadcast_to(row, (LM.num_prefixes, LM.vocab_size))


def sticky_reference() -> Table:
    """Return a reference that repeats its first token with a high probability, as independent tokens cannot."""
    first, repeat = STICKY
    last = [row[-1] for row in _prefixes()]
    again = jnp.log(jnp.where(jnp.eye(LM.vocab_size) == 1, repeat, (1 - repeat) / (LM.vocab_size - 1)))
    return jnp.concatenate([jnp.log(jnp.asarray(first))[None], again[jnp.asarray(last)]])


def _prefixes() -> list[list[int]]:
    """Return all prefixes of at least one token that have a row in the table."""
    return [
        row.tolist()
        for length in range(1, LM.horizon)
        for row in oracle.enumerate_sequences(TabularLM(LM.vocab_size, length))
    ]


def misspecified(config: Config) -> tuple[dict[str, Any], list[ledger.Number]]:
    """Descend on k2 and on k3 where the policy cannot be the reference."""
    ref, start = sticky_reference(), jnp.asarray([0.1, 0.0, 0.0])
    steps = {"steps": config.tied_steps, "every": config.tied_steps}

    @jax.jit
    @jax.vmap
    def end(which: jax.Array) -> jax.Array:
        return descend(start, functools.partial(_tied_gradient_at, which, ref), config.tied_learning_rate, **steps)[0]

    names = ("k2", "k3")
    ends = dict(zip(names, end(jnp.asarray([list(ESTIMATORS).index(name) for name in names])), strict=True))
    marginal = (jnp.exp(jax.jit(log_probs)(ref))[:, None] * _token_shares()).sum(axis=0)
    best = lowest_divergence()
    policies = {"k2 as a loss": jax.nn.softmax(ends["k2"]), "k3 as a loss": jax.nn.softmax(ends["k3"])}
    policies |= {"argmin KL(π‖ref)": best, "argmin KL(ref‖π)": marginal}
    tied_reverse, tied_forward = (
        jax.jit(lambda probs, kl=kl: kl(tie(jnp.log(probs)), ref)) for kl in (reverse_kl, forward_kl)
    )
    divergences = {
        name: {"reverse": tied_reverse(probs), "forward": tied_forward(probs)} for name, probs in policies.items()
    }
    distance = {
        pair: float(jnp.abs(policies[pair[0]] - policies[pair[1]]).max())
        for pair in (("k2 as a loss", "argmin KL(π‖ref)"), ("k3 as a loss", "argmin KL(ref‖π)"))
    }
    sources = (
        "the lowest minimum of its closed form over a grid of starts",
        "its closed form: the mean of the reference's marginals",
    )
    numbers = [
        ledger.identity(f"{found} ends at {target}: distance", value, tolerance=1e-8, unit="probability", source=source)
        for ((found, target), value), source in zip(distance.items(), sources, strict=True)
    ]
    # a reference of two modes, at a half of whose ratio a policy still covers both
    modes = STICKY[0][1] / STICKY[0][0]
    for name, bound, wrong in (
        ("k2 as a loss", {"at_most": modes / 2}, modes),
        ("k3 as a loss", {"at_least": modes / 2}, 0.0),
    ):
        number = ledger.test(
            f"{name}: probability of the second mode over that of the first",
            float(policies[name][1] / policies[name][0]),
            wrong=wrong,
            unit="1",
            source=f"{modes:g} in the reference; below half of it one mode is picked, above both are covered",
            **bound,
        )
        numbers.append(number)
    return {"policies": policies, "divergences": divergences, "repeat": STICKY[1]}, numbers


def _tied_gradient_at(which: jax.Array, ref: Table, row: jax.Array) -> jax.Array:
    return expected_gradient(which, "loss", tie(row), ref).sum(axis=0)  # the chain rule through `tie`


def _token_shares() -> jax.Array:
    """Return the share of each token in every sequence."""
    return jax.nn.one_hot(oracle.enumerate_sequences(LM), LM.vocab_size, dtype=jnp.float64).mean(axis=1)


def lowest_divergence() -> np.ndarray:
    """Minimise KL(π‖ref) over policies q of independent tokens, in closed form, and return q.

    KL = T Σ q log q − Σ q log f − (T − 1) Σ q_i q_j log R_ij, for T tokens, the first token's distribution f and the
    probability R_ij of j after i.
    """
    first, repeat = STICKY
    size, horizon = LM.vocab_size, LM.horizon
    again = np.log(np.where(np.eye(size) == 1, repeat, (1 - repeat) / (size - 1)))

    def value_and_slope(free: np.ndarray) -> tuple[float, np.ndarray]:
        q = softmax(np.append(free, 0.0))
        value = horizon * q @ np.log(q) - q @ np.log(first) - (horizon - 1) * q @ again @ q
        of_q = horizon * np.log(q) - np.log(first) - (horizon - 1) * (again + again.T) @ q
        return value, (q * (of_q - q @ of_q))[:-1]

    starts = itertools.product(np.linspace(-3, 3, 7), repeat=size - 1)
    ends = [minimize(value_and_slope, start, jac=True) for start in starts]
    best = root(lambda free: value_and_slope(free)[1], min(ends, key=lambda end: end.fun).x, tol=1e-14).x
    return softmax(np.append(best, 0.0))
