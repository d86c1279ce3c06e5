"""Preference optimisation with any loss of `objectives.preference`, by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.language_model import LanguageModel, Params
from jaxrl_llm.objectives import preference
from jaxrl_llm.scoring import Sequences, log_probs, stacked
from jaxrl_llm.training.steps import Frozen, Loss, LossFn


class PairBatch(NamedTuple):
    """Row i of `chosen` is preferred to row i of `rejected`; both have one padded length."""

    chosen: Sequences
    rejected: Sequences
    logp_ref_chosen: Float[Array, "batch"] | None = None  # once ahead: `with_reference`; None: computed in the step
    logp_ref_rejected: Float[Array, "batch"] | None = None
    weight: Float[Array, "batch"] | None = None  # how much a pair counts, such as its probability; None: all alike


class JudgedBatch(NamedTuple):
    """Answers that are each good or bad, for KTO."""

    answers: Sequences
    desirable: Bool[Array, "batch"]
    mismatched: Sequences  # the same prompts, each with the answer to another one: KTO's reference point
    logp_ref: Float[Array, "batch"] | None = None
    logp_ref_mismatched: Float[Array, "batch"] | None = None
    weight: Float[Array, "batch"] | None = None


class Sums(NamedTuple):
    """log π(answer | prompt) of chosen and rejected answers, summed over tokens, in nats, and how many those are."""

    chosen: Float[Array, "batch"]
    rejected: Float[Array, "batch"]
    length_chosen: Float[Array, "batch"]
    length_rejected: Float[Array, "batch"]


def _of_four(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda policy, ref, **knobs: function(policy.chosen, policy.rejected, ref.chosen, ref.rejected, **knobs)


def _of_lengths(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda policy, ref, **knobs: function(
        policy.chosen,
        policy.rejected,
        ref.chosen,
        ref.rejected,
        policy.length_chosen,
        policy.length_rejected,
        **knobs,
    )


def _averaged(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda policy, _, **knobs: function(
        policy.chosen / policy.length_chosen, policy.rejected / policy.length_rejected, **knobs
    )


def _summed(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda policy, _, **knobs: function(policy.chosen, policy.rejected, **knobs)


class Named(NamedTuple):
    """A loss of pairs: the objective itself, and how it is called with the sums of policy and reference."""

    objective: Callable[..., Array]
    of_sums: Callable[..., Float[Array, "batch"]]
    needs_reference: bool = True


LOSSES: dict[str, Named] = {
    **{name: Named(function, _of_four(function)) for name, function in preference.PAIR_LOSSES.items()},
    "length_normalised_dpo": Named(
        preference.length_normalised_dpo_loss, _of_lengths(preference.length_normalised_dpo_loss)
    ),
    "simpo": Named(preference.simpo_loss, _averaged(preference.simpo_loss), needs_reference=False),
    "orpo": Named(preference.orpo_loss, _averaged(preference.orpo_loss), needs_reference=False),
    "cpo": Named(preference.cpo_loss, _summed(preference.cpo_loss), needs_reference=False),
}
NAMES = (*LOSSES, "kto")


def preference_loss(lm: LanguageModel, name: str = "dpo", **knobs: Any) -> LossFn:
    """The mean of a preference loss over a batch of pairs, or over one of judged answers for "kto".

    `frozen.ref` are the reference's parameters, if the loss needs them and the batch does not bring its
    log-probabilities. No gradient flows to them. Metrics, in nats: `chosen_logp`, `rejected_logp` of the answers as
    wholes (both often fall while the margin grows), and where there is a reference `margin`, the difference of the
    log-ratios, `accuracy`, the share of positive margins (a tie counts half), and `kl_chosen`, `kl_rejected`, the
    log-ratios themselves.

    Args:
        name: one of `NAMES`.
        knobs: of the objective, such as beta; its own defaults otherwise. Numbers, or traced scalars.

    Raises:
        ValueError: for a name or a knob that there is not, or a batch of the other kind.
    """
    check_name(name, knobs)
    if name == "kto":
        return _kto_loss(lm, knobs)

    def loss(params: Params, batch: PairBatch, frozen: Frozen | None, key: Array) -> Loss:
        if not isinstance(batch, PairBatch):
            raise ValueError(
                f"the loss {name} is of pairs: it takes a PairBatch, but was given {type(batch).__name__}."
            )
        policy = pair_sums(lm, params, batch)
        ref = _reference_sums(lm, batch, frozen, policy) if LOSSES[name].needs_reference else None
        per_pair = LOSSES[name].of_sums(policy, ref, **knobs)
        weights = _weights(batch.weight, per_pair)
        means = {"chosen_logp": policy.chosen, "rejected_logp": policy.rejected}
        if ref is not None:
            ratios = policy.chosen - ref.chosen, policy.rejected - ref.rejected
            margin = ratios[0] - ratios[1]
            means |= {"margin": margin, "accuracy": (margin > 0) + (margin == 0) / 2}
            means |= {"kl_chosen": ratios[0], "kl_rejected": ratios[1]}
        return _mean(per_pair, weights, means)

    return loss


def check_name(name: str, knobs: dict[str, Any]) -> None:
    """Raise for a loss, or a knob of it, that there is not."""
    if name not in NAMES:
        raise ValueError(f"the loss must be one of {', '.join(NAMES)}, but is {name!r}.")
    objective = preference.kto_loss if name == "kto" else LOSSES[name].objective
    allowed = [each.name for each in inspect.signature(objective).parameters.values() if each.kind == each.KEYWORD_ONLY]
    unknown = sorted(set(knobs) - set(allowed))
    if unknown:
        raise ValueError(f"the loss {name} has no {', '.join(unknown)}: its knobs are {', '.join(allowed)}.")


def pair_sums(lm: LanguageModel, params: Params, batch: PairBatch) -> Sums:
    """What a model says of chosen and rejected answers, in one call."""
    both = stacked(batch.chosen, batch.rejected)
    logp = log_probs(lm, params, both).sum(axis=-1)
    lengths = both.completion_mask.sum(axis=-1).astype(logp.dtype)
    return Sums(*jnp.split(logp, 2), *jnp.split(lengths, 2))


def with_reference(lm: LanguageModel, ref_params: Params, batch: PairBatch | JudgedBatch) -> PairBatch | JudgedBatch:
    """The batch with the reference's log-probabilities: computed once ahead, the reference need not be kept."""
    if isinstance(batch, JudgedBatch):
        sums = _sums_jit(lm, ref_params, stacked(batch.answers, batch.mismatched))
        logp_ref, logp_ref_mismatched = jnp.split(sums, 2)
        return batch._replace(logp_ref=logp_ref, logp_ref_mismatched=logp_ref_mismatched)
    chosen, rejected = jnp.split(_sums_jit(lm, ref_params, stacked(batch.chosen, batch.rejected)), 2)
    return batch._replace(logp_ref_chosen=chosen, logp_ref_rejected=rejected)


def _sum(lm: LanguageModel, params: Params, sequences: Sequences) -> Float[Array, "batch"]:
    return log_probs(lm, params, sequences).sum(axis=-1)


_sums_jit = jax.jit(_sum, static_argnums=0)


def _reference_sums(lm: LanguageModel, batch: PairBatch, frozen: Frozen | None, policy: Sums) -> Sums:
    if batch.logp_ref_chosen is not None:
        return policy._replace(chosen=batch.logp_ref_chosen, rejected=batch.logp_ref_rejected)
    return jax.lax.stop_gradient(pair_sums(lm, _reference(frozen), batch))


def _reference(frozen: Frozen | None) -> Params:
    if getattr(frozen, "ref", None) is None:
        raise ValueError("the reference is needed: give frozen=Frozen(ref=its parameters), or batches with_reference.")
    return frozen.ref


def _kto_loss(lm: LanguageModel, knobs: dict[str, Any]) -> LossFn:
    """KTO over judged answers. Its reference point is the batch's: parts of one do not add up, and are refused."""

    def loss(params: Params, batch: JudgedBatch, frozen: Frozen | None, key: Array) -> Loss:
        if not isinstance(batch, JudgedBatch):
            raise ValueError(f"the loss kto takes a JudgedBatch, but was given {type(batch).__name__}.")
        logp = _sum(lm, params, batch.answers)
        mismatched = _sum(lm, jax.lax.stop_gradient(params), batch.mismatched)
        if batch.logp_ref is None:
            both = stacked(batch.answers, batch.mismatched)
            logp_ref, ref_mismatched = jnp.split(jax.lax.stop_gradient(_sum(lm, _reference(frozen), both)), 2)
        else:
            logp_ref, ref_mismatched = batch.logp_ref, batch.logp_ref_mismatched
        reference_point = preference.kto_reference_point(mismatched, ref_mismatched)
        per_answer = preference.kto_loss(logp, logp_ref, batch.desirable, reference_point, **knobs)
        good = batch.desirable / jnp.maximum(batch.desirable.mean(), 1e-9)  # means over the good, and over the bad
        bad = ~batch.desirable / jnp.maximum((~batch.desirable).mean(), 1e-9)
        means = {"chosen_logp": good * logp, "rejected_logp": bad * logp, "reference_point": reference_point + 0 * logp}
        means |= {"kl_chosen": good * (logp - logp_ref), "kl_rejected": bad * (logp - logp_ref)}
        means |= {"margin": (good - bad) * (logp - logp_ref)}
        return _mean(per_answer, _weights(batch.weight, per_answer), means)

    loss.needs_whole_batch = True
    return loss


def _weights(given: Array | None, values: Array) -> Array:
    return jnp.ones_like(values) if given is None else given.astype(values.dtype)


def _mean(values: Array, weights: Array, metrics: dict[str, Array]) -> Loss:
    total = weights.sum()
    share = jax.lax.stop_gradient(weights / jnp.maximum(total, jnp.finfo(weights.dtype).tiny))
    return Loss((share * values).sum(), total, {name: (share * each).sum() for name, each in metrics.items()})
