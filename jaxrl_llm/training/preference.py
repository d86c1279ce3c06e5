"""Preference optimisation with any loss of `objectives.preference`, by its name, or with a loss of your own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.language_model import LanguageModel, Params
from jaxrl_llm.numerics import times
from jaxrl_llm.objectives import preference
from jaxrl_llm.options import nearest
from jaxrl_llm.scoring import Sequences, log_probs, stacked
from jaxrl_llm.training.steps import Frozen, Loss, LossFn


class PairBatch(NamedTuple):
    """Row i of `chosen` is preferred to row i of `rejected`; both have one padded length."""

    chosen: Sequences
    rejected: Sequences
    logp_ref_chosen: Float[Array, "batch"] | None = None  # by `with_reference`; None: computed in the step
    logp_ref_rejected: Float[Array, "batch"] | None = None
    weight: Float[Array, "batch"] | None = None  # of a pair, such as its probability; None: all equal
    fields: Mapping[str, Array] = {}  # further numbers of each pair, [batch, ...], which a loss may take by name


class UnpairedBatch(NamedTuple):
    """Completions that are each desirable or not, for KTO."""

    completions: Sequences
    desirable: Bool[Array, "batch"]
    mismatched: Sequences  # the same prompts, each with another's completion, for KTO's reference point
    logp_ref: Float[Array, "batch"] | None = None
    logp_ref_mismatched: Float[Array, "batch"] | None = None
    weight: Float[Array, "batch"] | None = None


class Sums(NamedTuple):
    """log π(completion | prompt) of chosen and rejected completions, summed over tokens, in nats, and their lengths."""

    chosen: Float[Array, "batch"]
    rejected: Float[Array, "batch"]
    length_chosen: Float[Array, "batch"]
    length_rejected: Float[Array, "batch"]


LOSSES = {**preference.PAIR_LOSSES, "kto": preference.kto_loss}
NAMES = tuple(LOSSES)


def preference_loss(lm: LanguageModel, loss: str | Callable[..., Array] = "dpo", **hyperparameters: Any) -> LossFn:
    """Return the mean of a preference loss over a batch of pairs, or for "kto" over an `UnpairedBatch`.

    `frozen.ref` are the reference's parameters, if the loss needs them and the batch does not have its
    log-probabilities. No gradient flows to them. Metrics, in nats: `chosen_logp`, `rejected_logp` of whole completions
    (both often fall while the margin grows); and with a reference `margin`, the difference of the log-ratios,
    `accuracy`, the share of positive margins (a tie counts half), and `kl_chosen`, `kl_rejected`, the log-ratios.

    Args:
        loss: one of `NAMES`; or a function of a pair's two log-ratios to the reference, loss(a, b, *, ...) -> [batch],
            plain or declared with `objectives.preference.pair_loss`. Each keyword argument of such a function that
            `batch.fields` holds is taken from there; the losses of `NAMES` take no fields.
        hyperparameters: of the loss, such as beta; its own defaults otherwise. Numbers, or traced scalars.

    Raises:
        ValueError: for an unknown name or hyperparameter, a keyword argument without a value, or with two, a batch of
            the other kind, or a loss that does not return one value per pair.
    """
    function = find_loss(loss, hyperparameters)
    if function is preference.kto_loss:
        return _kto_loss(lm, hyperparameters)
    name = name_of(function)

    def mean_loss(params: Params, batch: PairBatch, frozen: Frozen | None, key: Array) -> Loss:
        if not isinstance(batch, PairBatch):
            raise ValueError(f"the batch of the loss {name} must be a PairBatch, but is {type(batch).__name__}.")
        policy = pair_sums(lm, params, batch)
        ref = _reference_sums(lm, batch, frozen, policy) if "reference" in function.needs else None
        per_pair = loss_of_sums(function, policy, ref, **_keywords(function, hyperparameters, batch.fields))
        if per_pair.shape != policy.chosen.shape:
            wanted, found = list(policy.chosen.shape), list(per_pair.shape)
            raise ValueError(f"the loss {name} must return one value per pair, {wanted}, but returned {found}.")
        weights = _weights(batch.weight, per_pair)
        means = {"chosen_logp": policy.chosen, "rejected_logp": policy.rejected}
        if ref is not None:
            ratios = policy.chosen - ref.chosen, policy.rejected - ref.rejected
            margin = ratios[0] - ratios[1]
            means |= {"margin": margin, "accuracy": (margin > 0) + (margin == 0) / 2}
            means |= {"kl_chosen": ratios[0], "kl_rejected": ratios[1]}
        return _mean(per_pair, weights, means)

    return mean_loss


def find_loss(loss: str | Callable[..., Array], hyperparameters: Mapping[str, Any]) -> Callable[..., Array]:
    """Return the loss of a name, or a user's function as a `pair_loss`; ValueError for an unknown name or keyword."""
    if isinstance(loss, str):
        if loss not in LOSSES:
            near = nearest(loss, LOSSES)
            hint = f": did you mean {near!r}?" if near else "."
            raise ValueError(f"the loss must be one of {', '.join(LOSSES)}, but is {loss!r}{hint}")
        loss = LOSSES[loss]
    function = loss if loss is preference.kto_loss or hasattr(loss, "needs") else preference.pair_loss(loss)
    unknown = sorted(set(hyperparameters) - set(function.hyperparameters))
    if unknown:
        listed = ", ".join(function.hyperparameters)
        raise ValueError(f"the loss {name_of(function)} has no {', '.join(unknown)}: its hyperparameters are {listed}.")
    return function


def name_of(loss: Callable[..., Array]) -> str:
    """Return the name of a loss: dpo for `dpo_loss`."""
    return loss.__name__.removesuffix("_loss")


def loss_of_sums(loss: Callable[..., Array], policy: Sums, ref: Sums | None, **keywords: Any) -> Float[Array, "batch"]:
    """Call a loss of `objectives.preference` with the log-probabilities it needs, summed or averaged over tokens."""
    of = [policy, ref] if "reference" in loss.needs else [policy]
    lengths = [
        jnp.maximum(each, 1) for each in (policy.length_chosen, policy.length_rejected)
    ]  # 0 where all is padding
    if "means" in loss.needs:
        of = [each._replace(chosen=each.chosen / lengths[0], rejected=each.rejected / lengths[1]) for each in of]
    lengths = lengths if "lengths" in loss.needs else []
    return loss(*(logp for each in of for logp in (each.chosen, each.rejected)), *lengths, **keywords)


def _keywords(loss: Callable[..., Array], given: Mapping[str, Any], fields: Mapping[str, Array]) -> dict[str, Any]:
    """Return the keyword arguments of a loss: the given ones, and those that the batch has."""
    fields = {} if loss in LOSSES.values() else fields
    takes_all = any(each.kind == each.VAR_KEYWORD for each in inspect.signature(loss).parameters.values())
    found = {name: field for name, field in fields.items() if takes_all or name in loss.hyperparameters}
    twice = sorted(set(given) & set(found))
    if twice:
        raise ValueError(f"{', '.join(twice)} must be given once, but is a keyword argument and a field of the batch.")
    required = [name for name, default in loss.hyperparameters.items() if default is inspect.Parameter.empty]
    missing = [name for name in required if name not in given and name not in found]
    if missing:
        raise ValueError(
            f"the loss {name_of(loss)} must be given {', '.join(missing)}, as keyword arguments or as fields of the "
            f"batch, but the batch has {', '.join(fields) or 'no fields'}."
        )
    return {**given, **found}


def pair_sums(lm: LanguageModel, params: Params, batch: PairBatch) -> Sums:
    """Return the log-probabilities of chosen and rejected completions under a model, in one call."""
    both = stacked(batch.chosen, batch.rejected)
    logp = log_probs(lm, params, both).sum(axis=-1)
    lengths = both.completion_mask.sum(axis=-1).astype(logp.dtype)
    return Sums(*jnp.split(logp, 2), *jnp.split(lengths, 2))


def with_reference(
    lm: LanguageModel, ref_params: Params, batch: PairBatch | UnpairedBatch
) -> PairBatch | UnpairedBatch:
    """Return the batch with the reference's log-probabilities, so that the step needs no reference."""
    if isinstance(batch, UnpairedBatch):
        sums = _sums_jit(lm, ref_params, stacked(batch.completions, batch.mismatched))
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


def _kto_loss(lm: LanguageModel, hyperparameters: Mapping[str, Any]) -> LossFn:
    """Return KTO's loss. Its reference point is that of the whole batch, so microbatches are refused."""

    def loss(params: Params, batch: UnpairedBatch, frozen: Frozen | None, key: Array) -> Loss:
        if not isinstance(batch, UnpairedBatch):
            raise ValueError(f"the batch of the loss kto must be an UnpairedBatch, but is {type(batch).__name__}.")
        logp = _sum(lm, params, batch.completions)
        mismatched = _sum(lm, jax.lax.stop_gradient(params), batch.mismatched)
        if batch.logp_ref is None:
            both = stacked(batch.completions, batch.mismatched)
            logp_ref, ref_mismatched = jnp.split(jax.lax.stop_gradient(_sum(lm, _reference(frozen), both)), 2)
        else:
            logp_ref, ref_mismatched = batch.logp_ref, batch.logp_ref_mismatched
        reference_point = preference.kto_reference_point(mismatched, ref_mismatched)
        per_answer = preference.kto_loss(logp, logp_ref, batch.desirable, reference_point, **hyperparameters)
        good = batch.desirable / jnp.maximum(batch.desirable.mean(), 1e-9)  # means over each kind
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
    means = {name: times(share, each).sum() for name, each in metrics.items()}
    return Loss(times(share, values).sum(), total, means)
