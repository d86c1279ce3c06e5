"""Preference optimisation with any loss of `objectives.preference`, by its name, sums of them, or one of your own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.language_model import LanguageModel, Params
from jaxrl_llm.numerics import times
from jaxrl_llm.objectives import preference
from jaxrl_llm.options import nearest
from jaxrl_llm.scoring import Packed, Sequences, by_text, log_probs, log_probs_and_collisions, rows_of, stacked
from jaxrl_llm.training.steps import Frozen, Loss, LossFn, Metrics, Running


class PairBatch(NamedTuple):
    """Row i of `chosen` is preferred to row i of `rejected`; both have one padded length."""

    chosen: Sequences
    rejected: Sequences
    logp_ref_chosen: Float[Array, "batch"] | None = None  # by `with_reference`; None: computed in the step
    logp_ref_rejected: Float[Array, "batch"] | None = None
    logp_ref_tail_chosen: Float[Array, "batch"] | None = None  # their parts beyond the length of the shorter completion
    logp_ref_tail_rejected: Float[Array, "batch"] | None = None
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


class PackedPairs(NamedTuple):
    """Pairs in packed rows: of pair j of a bin, the chosen completion is text 2j and the rejected one text 2j + 1."""

    completions: Packed  # leaves [bins, 2, time]: a text is in any of the rows of its bin
    weight: Float[Array, "bins pairs"]  # of a pair; 0 where a bin has fewer pairs
    logp_ref_chosen: Float[Array, "bins pairs"] | None = None
    logp_ref_rejected: Float[Array, "bins pairs"] | None = None
    fields: Mapping[str, Array] = {}  # as those of `PairBatch`, [bins, pairs, ...]

    def by_side(self, per_token: Array) -> Float[Array, "texts time"]:
        """Return values [rows, time] with each text in a row of its own, chosen ones before rejected ones."""
        values = per_token.reshape(self.completions.tokens.shape)
        bins, pairs = self.weight.shape
        found = by_text(values, self.completions, count=2 * pairs).reshape(bins * pairs, 2, -1)
        return found.swapaxes(0, 1).reshape(2 * bins * pairs, -1)

    def pairs(self) -> PackedPairs:
        """Return what it has of each pair along one axis, as a `PairBatch` has it; without the completions."""
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), self._replace(completions=None))


class Sums(NamedTuple):
    """log π(completion | prompt) of chosen and rejected completions, summed over tokens, in nats, and their lengths.

    None is what no loss needs: the parts of the sums beyond the length of the shorter completion, and WPO's alignments.
    """

    chosen: Float[Array, "batch"]
    rejected: Float[Array, "batch"]
    length_chosen: Float[Array, "batch"]
    length_rejected: Float[Array, "batch"]
    tail_chosen: Float[Array, "batch"] | None = None
    tail_rejected: Float[Array, "batch"] | None = None
    alignment_chosen: Float[Array, "batch"] | None = None
    alignment_rejected: Float[Array, "batch"] | None = None


LOSSES = {**preference.PAIR_LOSSES, "kto": preference.kto_loss}
NAMES = tuple(LOSSES)
OF_PAIRS = ("margin",)  # hyperparameters of the named losses that a batch may hold for each pair
Given = str | Callable[..., Array]


def preference_loss(
    lm: LanguageModel,
    loss: Given | Sequence[Given] = "dpo",
    *,
    weights: Sequence[float] = (),
    ref_lm: LanguageModel | None = None,
    **hyperparameters: Any,
) -> LossFn:
    """Return the mean of a preference loss over a `PairBatch` or `PackedPairs`, or for "kto" over an `UnpairedBatch`.

        preference_loss(lm, ["dpo", "bco", "sft"], weights=[0.8, 0.2, 1.0])          (MPO: Wang et al. 2024)

    `frozen.ref` are the reference's parameters, if the loss needs them and the batch does not have its
    log-probabilities. No gradient flows to them. Metrics, in nats: `chosen_logp`, `rejected_logp` of whole completions
    (both often fall while the margin grows); and with a reference `margin`, the difference of the log-ratios,
    `accuracy`, the share of positive margins (a tie counts half), and `kl_chosen`, `kl_rejected`, the log-ratios.
    TRL's rewards are β times these log-ratios, and its margins β times the margin.

    "bco" subtracts a `reward_shift`, which is a metric too: the mean reward of the pairs of all steps before, 0 at
    first, if the state keeps it (`initial_state(..., loss=...)`, as the trainers do), else that of the batch.

    Args:
        loss: one of `NAMES`; or a function of a pair's two log-ratios to the reference, loss(a, b, *, ...) -> [batch],
            plain or declared with `objectives.preference.pair_loss`; or several of them, whose weighted sum is taken.
            Each keyword argument of a function that `batch.fields` holds is taken from there; of the losses of `NAMES`
            that is `margin` alone.
        weights: of the losses of a sum, in their order; by default 1 each.
        ref_lm: the model of the reference's parameters, if it is another one than `lm`, of the same tokens.
        hyperparameters: of the loss, such as beta; its own defaults otherwise. Numbers, or traced scalars. In a sum
            each loss takes those that it has.

    Raises:
        ValueError: for an unknown name or hyperparameter, a keyword argument without a value, or with two, weights that
            are not one for each loss, kto in a sum, a batch of the other kind, or a loss that does not return one value
            per pair.
    """
    functions = find_losses(loss, hyperparameters)
    weights = [float(weight) for weight in weights] or [1.0] * len(functions)
    if len(weights) != len(functions):
        raise ValueError(f"there must be one weight for each of {len(functions)} losses, but there are {len(weights)}.")
    ref_lm = lm if ref_lm is None else ref_lm
    if functions == [preference.kto_loss]:
        return _kto_loss(lm, ref_lm, hyperparameters)
    name, needs = "+".join(map(name_of, functions)), needs_of(functions)
    shifts = preference.bco_loss in functions and "reward_shift" not in hyperparameters

    def mean_reward(metrics: Metrics) -> Float[Array, ""]:
        beta = hyperparameters.get("beta", preference.bco_loss.hyperparameters["beta"])
        return jax.lax.stop_gradient(beta * (metrics["kl_chosen"] + metrics["kl_rejected"]) / 2)

    def mean_loss(params: Params, batch: PairBatch | PackedPairs, frozen: Frozen | None, key: Array) -> Loss:
        if not isinstance(batch, PairBatch | PackedPairs):
            raise ValueError(f"the batch of the loss {name} must be a PairBatch, but is {type(batch).__name__}.")
        policy = pair_sums(lm, params, batch, needs=needs)
        ref = _reference_sums(ref_lm, batch, frozen, policy, needs) if "reference" in needs else None
        if "batch" in needs and batch.weight is not None:
            raise ValueError(f"the loss {name}, which sorts the pairs of a batch, must not be given their weights.")
        batch = batch.pairs() if isinstance(batch, PackedPairs) else batch
        weights_of_pairs = _weights(batch.weight, policy.chosen)
        means = {"chosen_logp": policy.chosen, "rejected_logp": policy.rejected}
        if ref is not None:
            ratios = policy.chosen - ref.chosen, policy.rejected - ref.rejected
            margin = ratios[0] - ratios[1]
            means |= {"margin": margin, "accuracy": (margin > 0) + (margin == 0) / 2}
            means |= {"kl_chosen": ratios[0], "kl_rejected": ratios[1]}
        given = hyperparameters
        if shifts:
            shift = getattr(frozen, "running", None)
            if shift is None:  # no state: held-out data, or a step of one's own
                shift = mean_reward(_mean(0 * margin, weights_of_pairs, means).metrics)
            given = hyperparameters | {"reward_shift": shift}
            means |= {"reward_shift": jnp.broadcast_to(shift, margin.shape)}
        per_pair = sum(
            weight * _per_pair(function, policy, ref, given, batch.fields)
            for function, weight in zip(functions, weights, strict=True)
        )
        return _mean(per_pair, weights_of_pairs, means)

    mean_loss.needs_whole_batch = "batch" in needs
    if shifts:
        mean_loss.running = Running(0.0, lambda kept, found, step: kept + (mean_reward(found) - kept) / (step + 1))
    return mean_loss


def _per_pair(
    loss: Callable[..., Array], policy: Sums, ref: Sums | None, hyperparameters: Mapping[str, Any], fields: Any
) -> Float[Array, "batch"]:
    """Return the loss of each pair, with those of the hyperparameters that it has."""
    given = {name: value for name, value in hyperparameters.items() if name in loss.hyperparameters}
    found = loss_of_sums(loss, policy, ref, **_keywords(loss, given, fields))
    if getattr(found, "shape", None) != policy.chosen.shape:
        wanted = list(policy.chosen.shape)
        returned = list(found.shape) if hasattr(found, "shape") else type(found).__name__
        raise ValueError(f"the loss {name_of(loss)} must return one value per pair, {wanted}, but returned {returned}.")
    return found


def needs_of(losses: Sequence[Callable[..., Array]]) -> frozenset[str]:
    """Return what some of the losses need: see `objectives.preference.pair_loss`."""
    return frozenset({"reference", "batch"} if losses == [preference.kto_loss] else ()).union(
        *(getattr(loss, "needs", ()) for loss in losses)
    )


def find_losses(loss: Given | Sequence[Given], hyperparameters: Mapping[str, Any]) -> list[Callable[..., Array]]:
    """Return the losses of names, and a user's functions as `pair_loss`.

    Raises:
        ValueError: for an unknown name, a hyperparameter that none of them has, kto beside others, or no loss.
    """
    given = [loss] if isinstance(loss, str) or callable(loss) else list(loss)
    if not given:
        raise ValueError("there must be at least one loss, but there is none.")
    functions = [_function_of(each) for each in given]
    if preference.kto_loss in functions and len(functions) > 1:
        raise ValueError("kto, which has no pairs, cannot be a term of a sum.")
    names = list(dict.fromkeys(name for function in functions for name in function.hyperparameters))
    unknown = sorted(set(hyperparameters) - set(names))
    if unknown:
        of, its = "+".join(map(name_of, functions)), "its" if len(functions) == 1 else "their"
        listed = f"{its} hyperparameters are {', '.join(names)}" if names else "it takes none"
        raise ValueError(f"the loss {of} has no {', '.join(unknown)}: {listed}.")
    return functions


def _function_of(loss: Given) -> Callable[..., Array]:
    if isinstance(loss, str):
        if loss not in LOSSES:
            near = nearest(loss, LOSSES)
            hint = f"did you mean {near!r}?" if near else 'your own is "file.py:function".'
            raise ValueError(f"the loss must be one of {', '.join(LOSSES)}, but is {loss!r}: {hint}")
        loss = LOSSES[loss]
    if isinstance(loss, functools.partial) and hasattr(loss.func, "needs"):
        declared = functools.wraps(loss.func)(functools.partial(loss.func, *loss.args, **loss.keywords))
        declared.hyperparameters = loss.func.hyperparameters | loss.keywords
        return declared
    return loss if loss is preference.kto_loss or hasattr(loss, "needs") else preference.pair_loss(loss)


def name_of(loss: Callable[..., Array]) -> str:
    """Return the name of a loss: dpo for `dpo_loss`."""
    return loss.__name__.removesuffix("_loss")


def loss_of_sums(loss: Callable[..., Array], policy: Sums, ref: Sums | None, **keywords: Any) -> Float[Array, "batch"]:
    """Call a loss of `objectives.preference` with the log-probabilities it needs, summed or averaged over tokens."""
    lengths = [
        jnp.maximum(each, 1) for each in (policy.length_chosen, policy.length_rejected)
    ]  # 0 where all is padding
    of = {"policy": policy, "ref": ref}
    if "means" in loss.needs:
        of = {
            whose: each and each._replace(chosen=each.chosen / lengths[0], rejected=each.rejected / lengths[1])
            for whose, each in of.items()
        }
    names = [name.removeprefix("logp_").partition("_") for name in loss.log_probs]
    further = lengths if "lengths" in loss.needs else []
    further = further + [policy.alignment_chosen, policy.alignment_rejected] * ("alignments" in loss.needs)
    return loss(*(getattr(of[whose], part) for whose, _, part in names), *further, **keywords)


def _keywords(loss: Callable[..., Array], given: Mapping[str, Any], fields: Mapping[str, Array]) -> dict[str, Any]:
    """Return the keyword arguments of a loss: the given ones, and those that the batch has."""
    fields = {name: fields[name] for name in OF_PAIRS if name in fields} if loss in LOSSES.values() else fields
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


def pair_sums(
    lm: LanguageModel, params: Params, batch: PairBatch | PackedPairs, *, needs: Collection[str] = ()
) -> Sums:
    """Return the log-probabilities of chosen and rejected completions under a model, in one call.

    Packed bins have equally many places for pairs; at free ones the log-probabilities are −1 and the lengths 1.

    Args:
        needs: "tails" or "alignments", the further sums.

    Raises:
        ValueError: for alignments of packed pairs.
    """
    is_packed = isinstance(batch, PackedPairs)
    both = rows_of(batch.completions) if is_packed else stacked(batch.chosen, batch.rejected)
    alignments, tails = [None, None], [None, None]
    if "alignments" in needs:
        if is_packed:
            raise ValueError("pairs must not be packed for a loss that weighs them by the policy, such as wpo.")
        per_token, collisions = log_probs_and_collisions(lm, params, both)
        mean = (per_token - collisions).sum(axis=-1) / jnp.maximum(both.completion_mask.sum(axis=-1), 1)
        alignments = jnp.split(jax.lax.stop_gradient(mean), 2)
    else:
        per_token = log_probs(lm, params, both)
    counted = both.completion_mask.astype(per_token.dtype)
    if is_packed:
        per_token, counted = (batch.by_side(each) for each in (per_token, counted))
    sums, lengths = per_token.sum(axis=-1), counted.sum(axis=-1)
    if "tails" in needs:
        shared = jnp.tile(jnp.minimum(*jnp.split(lengths, 2)), 2)
        beyond = jnp.cumsum(counted, axis=-1) > shared[:, None]
        tails = jnp.split(jnp.where(beyond, per_token, 0).sum(axis=-1), 2)
    if is_packed:
        sums, lengths = jnp.where(lengths > 0, sums, -1), jnp.maximum(lengths, 1)
    return Sums(*jnp.split(sums, 2), *jnp.split(lengths, 2), *tails, *alignments)


def with_reference(
    lm: LanguageModel, ref_params: Params, batch: PairBatch | PackedPairs | UnpairedBatch
) -> PairBatch | PackedPairs | UnpairedBatch:
    """Return the batch with the reference's log-probabilities, so that the step needs no reference."""
    if isinstance(batch, PackedPairs):
        sums = _pair_sums_jit(lm, ref_params, batch)
        chosen, rejected = (leaf.reshape(batch.weight.shape) for leaf in (sums.chosen, sums.rejected))
        return batch._replace(logp_ref_chosen=chosen, logp_ref_rejected=rejected)
    if isinstance(batch, UnpairedBatch):
        sums = _sums_jit(lm, ref_params, stacked(batch.completions, batch.mismatched))
        logp_ref, logp_ref_mismatched = jnp.split(sums, 2)
        return batch._replace(logp_ref=logp_ref, logp_ref_mismatched=logp_ref_mismatched)
    return batch._replace(**dict(zip(OF_REFERENCE, _reference_jit(lm, ref_params, batch), strict=True)))


def _sum(lm: LanguageModel, params: Params, sequences: Sequences) -> Float[Array, "batch"]:
    return log_probs(lm, params, sequences).sum(axis=-1)


_sums_jit = jax.jit(_sum, static_argnums=0)
_pair_sums_jit = jax.jit(pair_sums, static_argnums=0)
OF_REFERENCE = {  # the columns of a batch that hold the reference's sums
    "logp_ref_chosen": "chosen",
    "logp_ref_rejected": "rejected",
    "logp_ref_tail_chosen": "tail_chosen",
    "logp_ref_tail_rejected": "tail_rejected",
}


@functools.partial(jax.jit, static_argnums=0)
def _reference_jit(lm: LanguageModel, params: Params, batch: PairBatch) -> tuple[Array, ...]:
    sums = pair_sums(lm, params, batch, needs=("tails",))
    return tuple(getattr(sums, name) for name in OF_REFERENCE.values())


def _reference_sums(
    lm: LanguageModel, batch: PairBatch, frozen: Frozen | None, policy: Sums, needs: Collection[str]
) -> Sums:
    if batch.logp_ref_chosen is None:
        sums = pair_sums(lm, _reference(frozen), batch, needs=set(needs) & {"tails"})
        return jax.lax.stop_gradient(sums)
    if "tails" in needs and getattr(batch, "logp_ref_tail_chosen", None) is None:
        raise ValueError(
            "the loss needs logp_ref_tail_chosen and _rejected of the batch: `with_reference` computes them."
        )
    stored = {name: getattr(batch, column, None) for column, name in OF_REFERENCE.items()}
    return policy._replace(**{name: each if each is None else each.reshape(-1) for name, each in stored.items()})


def _reference(frozen: Frozen | None) -> Params:
    if getattr(frozen, "ref", None) is None:
        raise ValueError("the reference is needed: give frozen=Frozen(ref=its parameters), or batches with_reference.")
    return frozen.ref


def _kto_loss(lm: LanguageModel, ref_lm: LanguageModel, hyperparameters: Mapping[str, Any]) -> LossFn:
    """Return KTO's loss. Its reference point is that of the whole batch, so microbatches are refused."""

    def loss(params: Params, batch: UnpairedBatch, frozen: Frozen | None, key: Array) -> Loss:
        if not isinstance(batch, UnpairedBatch):
            raise ValueError(f"the batch of the loss kto must be an UnpairedBatch, but is {type(batch).__name__}.")
        logp = _sum(lm, params, batch.completions)
        mismatched = _sum(lm, jax.lax.stop_gradient(params), batch.mismatched)
        if batch.logp_ref is None:
            both = stacked(batch.completions, batch.mismatched)
            logp_ref, ref_mismatched = jnp.split(jax.lax.stop_gradient(_sum(ref_lm, _reference(frozen), both)), 2)
        else:
            logp_ref, ref_mismatched = batch.logp_ref, batch.logp_ref_mismatched
        reference_point = preference.kto_reference_point(mismatched, ref_mismatched)
        per_answer = preference.kto_loss(logp, logp_ref, batch.desirable, reference_point, **hyperparameters)
        weights = _weights(batch.weight, per_answer)
        found = _mean(per_answer, weights, {"reference_point": reference_point + 0 * logp})
        means, counts, both = {}, {}, []
        for side, there in (("chosen", batch.desirable), ("rejected", ~batch.desirable)):
            of_side = _mean(0 * logp, weights * there, {"logp": logp, "kl": logp - logp_ref})
            means |= {f"{side}_logp": of_side.metrics["logp"], f"kl_{side}": of_side.metrics["kl"]}
            counts |= {f"{side}_logp": of_side.weight, f"kl_{side}": of_side.weight}
            both.append(of_side.weight > 0)
        means["margin"] = means["kl_chosen"] - means["kl_rejected"]
        counts["margin"] = jnp.where(both[0] & both[1], found.weight, 0)
        return found._replace(metrics=found.metrics | means, weights=counts)

    def absent(batch: UnpairedBatch) -> set[str]:
        """Return the metrics that a batch without completions of one side does not have."""
        is_there = {"chosen": batch.desirable, "rejected": ~batch.desirable}
        missing = [side for side, rows in is_there.items() if not bool(rows.any())]
        return {name for side in missing for name in (f"{side}_logp", f"kl_{side}", "margin")}

    loss.absent = absent
    loss.needs_whole_batch = True
    return loss


def _weights(given: Array | None, values: Array) -> Array:
    return jnp.ones_like(values) if given is None else given.astype(values.dtype)


def _mean(values: Array, weights: Array, metrics: dict[str, Array]) -> Loss:
    total = weights.sum()
    share = jax.lax.stop_gradient(weights / jnp.maximum(total, jnp.finfo(weights.dtype).tiny))
    means = {name: times(share, each).sum() for name, each in metrics.items()}
    return Loss(times(share, values).sum(), total, means)
