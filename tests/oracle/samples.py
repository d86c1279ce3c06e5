"""Every sample of a small tabular model, and the exact mean of a gradient over them."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrl_llm import oracle
from jaxrl_llm.tabular import TabularLM
from tests.conftest import random_params

LM = TabularLM(vocab_size=3, horizon=2)
SEQUENCES = np.asarray(list(itertools.product(range(3), repeat=2)))
REWARDS = np.random.default_rng(8).normal(size=9) + 2.0


class LogProbs(NamedTuple):
    """Of every sequence: its log-probability, those of its tokens, and the logits that its tokens are drawn from."""

    sequences: Float[Array, "sequences"]
    tokens: Float[Array, "sequences horizon"]
    logits: Float[Array, "sequences horizon vocab"]


@jax.jit
def distribution(params):
    """The distribution of `params`."""
    sequences = oracle.enumerate_sequences(LM)
    return LogProbs(
        oracle.sequence_log_probs(LM, params),
        oracle.token_log_probs_of(LM, params, sequences),
        oracle.next_token_logits(LM, params, sequences),
    )


@functools.cache
def params(seed):
    """Random parameters in float64: by convention 1 is the policy, 2 the reference and 3 an older policy."""
    return random_params(LM, seed, dtype=jnp.float64)


@functools.cache
def distributions():
    """The distributions of the policy, the reference and an older policy, in numpy."""
    return [jax.tree.map(np.asarray, distribution(params(seed))) for seed in (1, 2, 3)]


objective_grad = jax.jit(functools.partial(oracle.objective_grad, LM))
sequence_kl_grad = jax.jit(functools.partial(oracle.sequence_kl_grad, LM))


jacobian = jax.jit(jax.jacrev(distribution))


def mean_gradients(losses, *, of=None, group_size=1):
    """E[∇ℓ] of losses on samples, as autodiff finds it: the samples do not depend on the parameters.

    Args:
        losses: by name, a function of the policy's distribution to the loss of every group (of each sequence, in groups
            of one), or a pair of that and the log-probabilities of the sequences from which the samples are drawn; by
            default those of the policy.
        of: the parameters of the policy; by default `params(1)`.
    """
    of = params(1) if of is None else of
    own = distribution(of)
    pairs = {name: each if isinstance(each, tuple) else (each, own.sequences) for name, each in losses.items()}
    groups = np.asarray(list(itertools.product(range(9), repeat=group_size)))
    weights = {name: np.exp(np.asarray(drawn))[groups].prod(axis=1) for name, (_, drawn) in pairs.items()}

    return gradients(lambda own: {name: weights[name] @ loss(own) for name, (loss, _) in pairs.items()}, of=of)


def gradients(functions, *, of=None):
    """The gradients of a dictionary of numbers, a function of the policy's distribution, in the parameters."""
    of = params(1) if of is None else of
    slopes, scores = jax.jit(jax.jacrev(functions))(distribution(of)), jacobian(of)

    def chain(slope):
        """Through the distribution to the parameters."""
        return sum(np.tensordot(one, each["logits"], np.ndim(one)) for one, each in zip(slope, scores, strict=True))

    return {name: chain(slope) for name, slope in slopes.items()}
