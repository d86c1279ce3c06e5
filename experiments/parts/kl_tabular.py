"""Estimators of the KL between sequences, exactly: bias and variance along a path of policies, by enumeration."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from experiments import ledger
from jaxrl_llm import oracle
from jaxrl_llm.objectives import kl
from jaxrl_llm.tabular import TabularLM

LM = TabularLM(vocab_size=3, horizon=4)


def tabular_part(key: jax.Array, *, path_length: float, path_points: int) -> tuple[dict[str, Any], list[ledger.Number]]:
    """Compute exact bias and spread along a straight line of logits away from the reference."""
    ref_key, direction_key = jax.random.split(key)
    ref = 1.5 * LM.init(ref_key)["logits"].astype(jnp.float64)
    direction = LM.init(direction_key)["logits"].astype(jnp.float64)
    steps = jnp.linspace(0, path_length, path_points + 1)[1:]
    divergence, mean, variance = along_path(ref, direction, steps)
    bias = {name: value - divergence for name, value in mean.items()}
    unbiased = [name for name in bias if not name.startswith("k2")]
    others = [value / variance["Rao-Blackwell"] for name, value in variance.items() if name != "Rao-Blackwell"]
    k1_variance, rao_blackwell_variance = map(float, counter_example())
    numbers = [
        ledger.identity(
            f"81 sequences: largest bias of {', '.join(unbiased)}",
            max(float(jnp.abs(bias[name]).max()) for name in unbiased),
            tolerance=1e-10,
            unit="nats",
            source="oracle.moments",
        ),
        ledger.test(
            "81 sequences: smallest variance of another estimator over Rao-Blackwell's on the path",
            float(jnp.stack(others).min()),
            at_least=1.0,
            wrong=0.9,  # on some random distributions of two tokens it is below 1
            unit="1",
            source="oracle.moments; not a theorem for sums over tokens",
        ),
        ledger.identity(
            "Var(Rao-Blackwell) − Var(k1) where later tokens undo what the first did",
            rao_blackwell_variance - k1_variance,
            expected=math.log(4) ** 2 / 4,
            tolerance=1e-10,
            unit="nats²",
            source="two tokens whose log-ratios always add to 1; Σ KL_t differs between the first tokens",
        ),
        one_token(),
    ]
    spread = {name: jnp.sqrt(value) for name, value in variance.items()}
    return {"kl": divergence, "bias": bias, "sd": spread}, numbers


def one_token() -> ledger.Number:
    """Compare k2 with k1 on one token of two values, at a divergence far below the Gaussians' crossing."""
    probs, ref = jnp.asarray([0.99, 0.01]), jnp.asarray([0.9999, 0.0001])
    k1, k2 = (estimator(jnp.log(probs), jnp.log(ref)) for estimator in (kl.k1, kl.k2))
    variance = [float((probs * each**2).sum() - (probs * each).sum() ** 2) for each in (k1, k2)]
    return ledger.identity(
        "Var(k2)/Var(k1) of one token of two values, at KL = 0.036 nats",
        variance[1] / variance[0],
        expected=(math.log(0.99 / 0.9999) + math.log(100)) ** 2 / 4,
        tolerance=1e-9,
        unit="1",
        source="(0.99, 0.01) against (0.9999, 0.0001): ((d₁ + d₂)/2)², d the log-ratios",
    )


@jax.jit
def along_path(ref: jax.Array, direction: jax.Array, steps: jax.Array) -> tuple[jax.Array, Any, Any]:
    """KL(π‖ref), and every estimator's exact mean and variance, at each step from the reference."""

    def at(step):
        policy = ref + step * direction
        values = sequence_estimates(LM, policy, ref)
        found = oracle.moments(LM, {"logits": policy}, lambda groups: {n: v[groups[:, 0]] for n, v in values.items()})
        return oracle.sequence_kl(LM, {"logits": policy}, {"logits": ref}), found.mean, found.variance

    return jax.lax.map(at, steps)


def sequence_estimates(lm: TabularLM, policy: jax.Array, ref: jax.Array) -> dict[str, jax.Array]:
    """Each estimator on every sequence: of the whole sequence's log-ratio, and summed over tokens."""
    sequences = oracle.enumerate_sequences(lm)
    laws = [{"logits": table} for table in (policy, ref)]
    tokens = [oracle.token_log_probs_of(lm, law, sequences) for law in laws]
    wholes = [each.sum(axis=1) for each in tokens]
    return {
        "k1, sequence": kl.k1(*wholes),
        "k2, sequence": kl.k2(*wholes),
        "k3, sequence": kl.k3(*wholes),
        "k2, tokens": kl.k2(*tokens).sum(axis=1),
        "k3, tokens": kl.k3(*tokens).sum(axis=1),
        "Rao-Blackwell": kl.rao_blackwell_kl(*(oracle.next_token_logits(lm, law, sequences) for law in laws)),
    }


@jax.jit
def counter_example() -> tuple[jax.Array, jax.Array]:
    """Variances of k1 and Rao-Blackwell where the second token's log-ratio makes good what the first one's was."""
    lm = TabularLM(vocab_size=2, horizon=2)
    first = jnp.asarray([0.8, 0.2])
    second = 0.5 / first * math.exp(-1)  # so that log(0.5 / first) + log(1 / second) = 1
    policy = jnp.asarray([[0.0, 0.0], [0.0, -1e3], [0.0, -1e3]])
    ref = jnp.log(jnp.concatenate([first[None], jnp.stack([second, 1 - second], axis=1)]))
    values = sequence_estimates(lm, policy, ref)
    found = oracle.moments(lm, {"logits": policy}, lambda groups: {n: v[groups[:, 0]] for n, v in values.items()})
    return found.variance["k1, sequence"], found.variance["Rao-Blackwell"]
