"""Descent on k2 and k3 towards a reference that the policy, of independent tokens, cannot be."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize, root
from scipy.special import softmax

from experiments import ledger
from experiments.parts.expected_gradients import (
    ESTIMATORS,
    LM,
    Table,
    descend,
    expected_gradient,
    forward_kl,
    log_probs,
    reverse_kl,
)
from jaxrl_llm import oracle
from jaxrl_llm.tabular import TabularLM

STICKY = ((0.50, 0.45, 0.05), 0.9)  # the reference: a first token, which is then repeated


def tie(row: jax.Array) -> Table:
    """A policy with one row of logits for all prefixes: its tokens are independent."""
    return jnp.broadcast_to(row, (LM.num_prefixes, LM.vocab_size))


def sticky_reference() -> Table:
    """A first token, repeated ever after with a high probability: independent tokens cannot follow it."""
    first, repeat = STICKY
    last = [row[-1] for row in _prefixes()]
    again = jnp.log(jnp.where(jnp.eye(LM.vocab_size) == 1, repeat, (1 - repeat) / (LM.vocab_size - 1)))
    return jnp.concatenate([jnp.log(jnp.asarray(first))[None], again[jnp.asarray(last)]])


def _prefixes() -> list[list[int]]:
    """All prefixes of at least one token that the table has a row for."""
    return [
        row.tolist()
        for length in range(1, LM.horizon)
        for row in oracle.enumerate_sequences(TabularLM(LM.vocab_size, length))
    ]


def misspecified(config: Any) -> tuple[dict[str, Any], list[ledger.Number]]:
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
    laws = {"k2 as a loss": jax.nn.softmax(ends["k2"]), "k3 as a loss": jax.nn.softmax(ends["k3"])}
    laws |= {"argmin KL(π‖ref)": best, "argmin KL(ref‖π)": marginal}
    tied_reverse, tied_forward = (
        jax.jit(lambda law, kl=kl: kl(tie(jnp.log(law)), ref)) for kl in (reverse_kl, forward_kl)
    )
    divergences = {name: {"reverse": tied_reverse(law), "forward": tied_forward(law)} for name, law in laws.items()}
    distance = {
        pair: float(jnp.abs(laws[pair[0]] - laws[pair[1]]).max())
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
            float(laws[name][1] / laws[name][0]),
            wrong=wrong,
            unit="1",
            source=f"{modes:g} in the reference; below half of it one mode is picked, above both are covered",
            **bound,
        )
        numbers.append(number)
    return {"laws": laws, "divergences": divergences, "repeat": STICKY[1]}, numbers


def _tied_gradient_at(which: jax.Array, ref: Table, row: jax.Array) -> jax.Array:
    return expected_gradient(which, "loss", tie(row), ref).sum(axis=0)  # the chain rule through `tie`


def _token_shares() -> jax.Array:
    """The share of each token in every sequence."""
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
