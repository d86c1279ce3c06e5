"""Descent on k2 and k3 towards a reference that the policy, of independent tokens, cannot be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments import ledger
from experiments.parts.expected_gradients import (
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


def misspecified(config: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Where descent on k2 and on k3 ends, if the policy cannot be the reference."""
    ref, start = sticky_reference(), jnp.asarray([0.1, 0.0, 0.0])
    steps = {"steps": config.tied_steps, "every": config.tied_steps}
    ends = {}
    for name in ("k2", "k3"):
        gradient_of = functools.partial(_tied_gradient_at, name, ref)
        ends[name], _ = descend(start, gradient_of, config.tied_learning_rate, **steps)
    marginal = (jnp.exp(jax.jit(log_probs)(ref))[:, None] * _token_shares()).sum(axis=0)
    best = _lowest(lambda row: reverse_kl(tie(row), ref))
    laws = {"k2 as a loss": jax.nn.softmax(ends["k2"]), "k3 as a loss": jax.nn.softmax(ends["k3"])}
    laws |= {"argmin KL(π‖ref)": jax.nn.softmax(best), "argmin KL(ref‖π)": marginal}
    tied_reverse, tied_forward = (
        jax.jit(lambda law, kl=kl: kl(tie(jnp.log(law)), ref)) for kl in (reverse_kl, forward_kl)
    )
    divergences = {name: {"reverse": tied_reverse(law), "forward": tied_forward(law)} for name, law in laws.items()}
    distance = {
        pair: float(jnp.abs(laws[pair[0]] - laws[pair[1]]).max())
        for pair in (("k2 as a loss", "argmin KL(π‖ref)"), ("k3 as a loss", "argmin KL(ref‖π)"))
    }
    sources = (
        "the lowest minimum over a grid of starts, by Newton's method",
        "its closed form: the mean of the reference's marginals",
    )
    numbers = [
        ledger.number(
            f"{found} ends at {target}: distance",
            value,
            expected=0.0,
            tolerance=1e-8,
            unit="probability",
            source=source,
        )
        for ((found, target), value), source in zip(distance.items(), sources, strict=True)
    ]
    numbers.append(
        ledger.number(
            "distance of the two ends",
            float(jnp.abs(laws["k2 as a loss"] - laws["k3 as a loss"]).max()),
            interval=(0.1, 1.0),
            unit="probability",
            source="mode-seeking against mass-covering",
        )
    )
    return {"laws": laws, "divergences": divergences, "repeat": STICKY[1]}, numbers


def _tied_gradient_at(name: str, ref: Table, row: jax.Array) -> jax.Array:
    return expected_gradient(name, "loss", tie(row), ref).sum(axis=0)  # the chain rule through `tie`


def _token_shares() -> jax.Array:
    """The share of each token in every sequence."""
    return jax.nn.one_hot(oracle.enumerate_sequences(LM), LM.vocab_size, dtype=jnp.float64).mean(axis=1)


def _lowest(function: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The lowest minimum of a function of logits (the last one held at 0) that Newton's method finds from a grid."""

    def of_free(free):
        return function(jnp.append(free, 0.0))

    def newton(free, _):
        hessian = jax.hessian(of_free)(free)
        values, vectors = jnp.linalg.eigh(hessian)
        step = vectors @ ((vectors.T @ jax.grad(of_free)(free)) / jnp.maximum(jnp.abs(values), 1e-3))
        return free - step * jnp.minimum(1, 0.5 / jnp.linalg.norm(step)), None

    grid = jnp.linspace(-3, 3, 7)
    starts = jnp.stack([axis.ravel() for axis in jnp.meshgrid(grid, grid)], axis=-1)
    ends = jax.jit(jax.vmap(lambda start: jax.lax.scan(newton, start, length=100)[0]))(starts)
    return jnp.append(ends[jnp.argmin(jax.jit(jax.vmap(of_free))(ends))], 0.0)
