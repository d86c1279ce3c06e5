"""Preference losses: DPO and its relatives, one value per pair, and KTO, one value per completion.

Log-probabilities are those of whole completions, *summed* over their tokens, in nats; `length_normalised_ipo`, SimPO,
AlphaPO, ORPO and SFT alone take them averaged. The arguments of a loss are the two log-ratios to the reference, of the
chosen and the rejected completion,

    a = log π(y_w) − log ref(y_w),   b = log π(y_l) − log ref(y_l),   Δ = a − b,   x = βΔ,

or, without a reference, the two log-probabilities w = log π(y_w) and l = log π(y_l). `@pair_loss` makes of such a
function one of the log-probabilities, all of them differentiable. A loss of Δ alone has the gradient
dL/dΔ · (1, −1, −1, 1). TRL has these losses too, some by other names (its `sigmoid` is `dpo`; docs/coming_from_trl.md
lists them), with these differences: `ipo_loss` takes sums, where TRL's is `length_normalised_ipo_loss`, and the
likelihood terms of SFT, ORPO and CPO are one value per pair where TRL's are means over the tokens of a batch. A
hyperparameter is one number (`margin` of DPO also one per pair); under `jit` its range cannot be checked.

| loss | of one pair | at policy = reference | minimum at |
|---|---|---|---|
| dpo | −(1 − ε) log σ(x) − ε log σ(−x) | log 2 | x = log((1 − ε)/ε) |
| robust_dpo | (−(1 − ε) log σ(x) + ε log σ(−x)) / (1 − 2ε) | log 2 | x → ∞ |
| ipo | (Δ − 1/(2β))² | 1/(4β²) | Δ = 1/(2β) |
| hinge | max(0, 1 − x) | 1 | x ≥ 1 |
| exo | KL of (σ(x), σ(−x)) from (1 − ε, ε) | −log 2 − ½ log(ε(1 − ε)) | x = log((1 − ε)/ε) |
| discopop | −(1 − m) log σ(x) + m e^{−x}, m = σ(x/τ) | ½ log 2 + ½ | x → ∞ |
| length_normalised_dpo | dpo with a/|y_w| − b/|y_l| for Δ | log 2 | as dpo |
| length_normalised_ipo | ipo with a/|y_w| − b/|y_l| for Δ | 1/(4β²) | as ipo |
| ld_dpo | dpo with a − (1 − α)a′ − b + (1 − α)b′ for Δ, a′ and b′ beyond the shorter length | log 2 | as dpo |
| wpo | min(1, e^{s_w + s_l}) · dpo, s of a completion's tokens under the policy | ≤ log 2 | as dpo |
| aot | dpo with the k-th largest of log π(y_w) − log π(y_l) minus that of ref for Δ | log 2 | as dpo |
| aot_unpaired | dpo with the k-th largest a minus the k-th largest b for Δ | log 2 | as dpo |
| f_dpo | −log σ(β f′(π/ref of y_w) − β f′(π/ref of y_l)) | log 2 | as far apart as f′ goes |
| nca | −log σ(βa) − ½ log σ(−βa) − ½ log σ(−βb) | 2 log 2 | βa = log 2, b → −∞ |
| bco | −log σ(βa − δ) − log σ(δ − βb) | 2 log 2 (δ = 0) | a → ∞, b → −∞ |
| sppo | (a − 1/(2β))² + (b + 1/(2β))² | 1/(2β²) | a = −b = 1/(2β) |
| apo_zero | σ(−βa) + σ(βb) | 1 | a → ∞, b → −∞ |
| apo_down | σ(βa) + σ(−x) | 1 | a → −∞, Δ → ∞ |
| simpo | −log σ(β(w − l) − γ), no reference | | w − l → ∞ |
| alphapo | −log σ(β (e^{−αl} − e^{−αw})/α − γ), no reference | | w − l → ∞ |
| sft | −w, no reference | | w → 0 |
| orpo | −w − β log σ(log odds w − log odds l), no reference | | w → 0, l → −∞ |
| cpo | −w − log σ(β(w − l)), no reference | | w → 0, l → −∞ |
| kto | λ_D σ(β(z − a)) or λ_U σ(β(a − z)), no pair | λ/2 (z = 0) | a → ±∞ |

A loss of Δ alone does not determine where the two completions go: the chosen log-probability may fall while the margin
grows (watch both). A loss that stays at log 2 means that policy and reference share their parameters.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, relu
from jaxtyping import Array, Bool, Float

from jaxrl_llm.numerics import (
    bounded_exp,
    checked,
    finite_gradient,
    log_ratio,
    sigmoid,
    times,
    violated,
)
from jaxrl_llm.objectives.objective import objective

FLOATS, NUMBERS = 'Float[Array, "*batch"]', 'Real[Array, "*batch"]'
FURTHER = {"lengths": NUMBERS, "alignments": FLOATS}  # needs with an argument of each completion


def pair_loss(
    function: Callable[..., Array] | None = None,
    /,
    *,
    needs: tuple[str, ...] = ("reference",),
    constants: tuple[str, ...] = (),
    **ranges: str,
) -> Callable[..., Any]:
    """Declare a preference loss, written as a function of the two log-ratios of a pair: loss(a, b, *, ...) -> [batch].

    The result is a plain function of logp_policy_chosen, logp_policy_rejected, logp_ref_chosen, logp_ref_rejected and
    the hyperparameters. `training.preference.preference_loss` takes it, as it takes an undecorated function of a and b.

        @pair_loss
        def my_loss(a, b, *, beta=0.1, margin=0.0):
            return jax.nn.relu(margin - beta * log_ratio(a, b))

    `@my_loss.gradient` registers the closed form, a function of the same arguments that returns ∂L/∂Δ or the pair
    (∂L/∂a, ∂L/∂b); then `my_loss.grad` returns the derivatives with respect to the log-probabilities.

    Args:
        function: the loss, if the decorator is used without arguments.
        needs: "reference" for log-ratios to a reference, else the first two arguments are the policy's own
            log-probabilities; "margins" for the two log-ratios of chosen to rejected, the policy's and the reference's,
            instead; "means" for log-probabilities averaged over tokens instead of summed; "tails" for two further
            log-ratios, of the tokens beyond the length of the shorter completion; "lengths" for two further arguments,
            the numbers of tokens of the two completions; "alignments" for two, the mean of log π(y_t) − log Σ_v π(v)²
            over the tokens of each; "batch" for a loss that compares the pairs of a batch.
        constants: keyword arguments through which no gradient flows.
        ranges: the interval of a hyperparameter, such as label_smoothing="[0, 1]"; beta is positive by default.

    Raises:
        ValueError: if the function takes fewer arguments than it needs.
    """
    if function is None:
        return lambda function: pair_loss(function, needs=needs, constants=constants, **ranges)
    logps = _log_probs_of(needs)
    further = {name: kind for part, kind in FURTHER.items() if part in needs for name in _sides(part.removesuffix("s"))}
    of_logps = ["a", "b", "tail_a", "tail_b"][: 4 if "tails" in needs else 2]
    given = list(inspect.signature(function).parameters.values())
    taken = len(of_logps) + len(further)
    if len([each for each in given if each.kind == each.POSITIONAL_OR_KEYWORD]) < taken:
        wanted = ", ".join([*of_logps, *further])
        names = ", ".join(each.name for each in given) or "nothing"
        called = getattr(function, "__name__", function)
        raise ValueError(f"a preference loss must take {wanted}, but {called} takes {names}.")
    hyperparameters = [
        each if each.kind == each.VAR_KEYWORD else each.replace(kind=each.KEYWORD_ONLY) for each in given[taken:]
    ]
    if "beta" in [each.name for each in hyperparameters]:
        ranges = {"beta": "(0, inf)", **ranges}

    def of_pair(*arrays: Array) -> tuple[Array, ...]:
        """The log-ratios, or log-probabilities, and the further arguments."""
        found = [ratio for start in range(0, len(logps), 4) for ratio in ratios(*arrays[start : len(logps)][:4])]
        rest = zip(further, arrays[len(logps) :], strict=True)
        return (*found, *(_length(*each, found[0].dtype) if "length" in each[0] else each[1] for each in rest))

    def ratios(chosen: Array, rejected: Array, *ref: Array) -> tuple[Array, Array]:
        if "margins" in needs:
            return log_ratio(chosen, rejected), log_ratio(*ref)
        if "reference" in needs:
            return log_ratio(chosen, ref[0]), log_ratio(rejected, ref[1])
        return finite_gradient(chosen), finite_gradient(rejected)

    def slopes_of_log_probs(first: Array, second: Array) -> tuple[Array, ...]:
        """The slopes of two ratios as those of their log-probabilities."""
        if "margins" in needs:
            return first, -first, second, -second
        return (first, second, -first, -second) if "reference" in needs else (first, second)

    @functools.wraps(function)
    def loss(*arrays: Array, **keywords: Any) -> Array:
        return function(*of_pair(*arrays), **keywords)

    loss.__signature__ = inspect.Signature(
        [
            *(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=FLOATS) for name in logps),
            *(
                inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
                for name, kind in further.items()
            ),
            *hyperparameters,
        ],
        return_annotation=FLOATS,
    )
    loss.__doc__ = _documented(function, needs)
    aligned = [name for name in further if "alignment" in name]
    declared = objective(loss, constants=(*constants, *aligned), **ranges)
    register = declared.gradient

    def gradient(slopes: Callable[..., Any]) -> Callable[..., tuple[Array, ...]]:
        """Register ∂L/∂Δ, or ∂L/∂a, ∂L/∂b, ...; none flows through what is not finite, as in `log_ratio`."""

        @functools.wraps(slopes)
        def of_log_probs(*arrays: Array, **keywords: Any) -> tuple[Array, ...]:
            given = of_pair(*arrays)
            a, b = given[:2]
            found = slopes(*given, **keywords)
            if not isinstance(found, tuple):
                of_margin = jnp.where(jnp.isfinite(a - b), found, 0)
                found = of_margin, -of_margin
            found = [jnp.where(jnp.isfinite(x), slope, 0) for x, slope in zip(given, found, strict=False)]
            return tuple(of for pair in zip(found[::2], found[1::2], strict=True) for of in slopes_of_log_probs(*pair))

        return register(of_log_probs)

    declared.gradient = gradient
    declared.needs, declared.log_probs = frozenset(needs), tuple(logps)
    return declared


def _log_probs_of(needs: Collection[str]) -> list[str]:
    """Return the names of the log-probabilities that a loss of these needs takes, in their order."""
    of = ["policy", "ref"] if "reference" in needs else ["policy"]
    parts = ["", "tail_"] if "tails" in needs else [""]
    return [f"logp_{whose}_{side}" for part in parts for whose in of for side in _sides(part)]


def _sides(part: str) -> list[str]:
    """chosen and rejected, after `part_`."""
    return [f"{part.rstrip('_')}_{side}".lstrip("_") for side in ("chosen", "rejected")]


def _length(name: str, length: Array, dtype: Any) -> Array:
    """A number of tokens, a constant; below 1, which under `jit` cannot be refused, it counts as 1."""
    if violated(length >= 1):
        raise ValueError(f"{name} must be at least 1, but one is {length.min()}.")
    return jax.lax.stop_gradient(jnp.maximum(length, 1).astype(dtype))


def _documented(function: Callable[..., Array], needs: tuple[str, ...]) -> str:
    """The docstring, with the arguments that all losses share."""
    text, source, rest = (inspect.getdoc(function) or "").partition("\nSource:")
    text, _, own = text.partition("\nArgs:\n")
    scale = "averaged over their tokens, in nats per token" if "means" in needs else "summed over their tokens, in nats"
    shared = "    logp_policy_chosen, logp_policy_rejected"
    shared += ", logp_ref_chosen, logp_ref_rejected" if "reference" in needs else ""
    shared += f":\n        log-probabilities of the completions, {scale}.\n"
    if "tails" in needs:
        tails = _log_probs_of(needs)[4:]
        shared += (
            f"    {', '.join(tails)}:\n        their parts beyond the number of tokens that both completions have.\n"
        )
    if "lengths" in needs:
        shared += "    length_chosen, length_rejected: numbers of tokens of the completions, at least 1; constants.\n"
    if "alignments" in needs:
        shared += "    alignment_chosen, alignment_rejected: s of the completions; constants.\n"
    if "beta" in inspect.signature(function).parameters and "    beta: " not in own:
        shared += "    beta: β, the price of a nat of KL, in units of the reward.\n"
    found = "Returns:\n    One value per pair; no mean is taken.\n"
    if "Δ" in text and "reference" in needs:
        text = f"{text.rstrip()}\n\nΔ is the log-ratio to the reference of the chosen, minus that of the rejected one."
    return f"{text.rstrip()}\n\nArgs:\n{shared}{own.rstrip()}\n\n{found}{source}{rest}"


# Losses of the margin Δ alone -----------------------------------------------------------------------------------------


@pair_loss(constants=("margin",), label_smoothing="[0, 1]")
def dpo_loss(a, b, *, beta: float = 0.1, label_smoothing: float = 0.0, margin: float | Float[Array, "*batch"] = 0.0):
    """Direct preference optimisation; its conservative form (cDPO) with label smoothing; ODPO with a margin.

        L = −(1 − ε) log σ(x) − ε log σ(−x),   x = βΔ − m          (eq. 7, where ε = m = 0)

    At Δ = m = 0 it is log 2, with the slope −(½ − ε) per unit of x; with ε > 0 its minimum is at x = log((1 − ε)/ε).

    Args:
        label_smoothing: ε, the assumed share of flipped labels.
        margin: m, the lead in reward that the chosen one should have: a number, or one per pair; a constant.

    Source: Rafailov et al. 2023; label smoothing: Mitchell 2023; margin: Amini et al. 2024 (ODPO), arXiv 2402.10571.
    """
    return _smoothed(beta * log_ratio(a, b) - margin, label_smoothing)


@dpo_loss.gradient
def _(a, b, *, beta, label_smoothing, margin):
    """β (ε − σ(−x)) · (1, −1, −1, 1)."""
    return beta * (label_smoothing - sigmoid(margin - beta * log_ratio(a, b)))


def _smoothed(x: Array, label_smoothing: float) -> Array:
    """−(1 − ε) log σ(x) − ε log σ(−x), whose slope is ε − σ(−x)."""
    return times(1 - label_smoothing, -log_sigmoid(x)) + times(label_smoothing, -log_sigmoid(-x))


@pair_loss(label_smoothing="[0, 0.5)")
def robust_dpo_loss(a, b, *, beta: float = 0.1, label_smoothing: float = 0.0):
    """DPO corrected for noisy labels: its mean over labels flipped with probability ε is the loss of clean labels.

        L = (−(1 − ε) log σ(x) + ε log σ(−x)) / (1 − 2ε),   x = βΔ

    At Δ = 0 it is log 2, with the slope −½ / (1 − 2ε) per unit of x; with ε > 0 it is not bounded below.

    Args:
        label_smoothing: ε, the known share of flipped labels.

    Source: Chowdhury et al. 2024.
    """
    x = beta * log_ratio(a, b)
    kept, flipped = times(1 - label_smoothing, -log_sigmoid(x)), times(label_smoothing, -log_sigmoid(-x))
    return (kept - flipped) / (1 - 2 * label_smoothing)


@robust_dpo_loss.gradient
def _(a, b, *, beta, label_smoothing):
    """−β ((1 − ε) σ(−x) + ε σ(x)) / (1 − 2ε) · (1, −1, −1, 1)."""
    x = beta * log_ratio(a, b)
    return -beta * ((1 - label_smoothing) * sigmoid(-x) + label_smoothing * sigmoid(x)) / (1 - 2 * label_smoothing)


@pair_loss
def ipo_loss(a, b, *, beta: float = 0.1):
    """Identity preference optimisation: a margin of a fixed size, in nats², instead of one without bound.

        L = (Δ − 1/(2β))²          (eq. 17, where β is called τ)

    At Δ = 0 it is 1/(4β²). Of log-probabilities averaged over tokens it is *another* loss, with another β:
    `length_normalised_ipo_loss`.

    Source: Azar et al. 2023.
    """
    return jnp.square(log_ratio(a, b) - 1 / (2 * beta))


@ipo_loss.gradient
def _(a, b, *, beta):
    """(2Δ − 1/β) · (1, −1, −1, 1)."""
    return 2 * (log_ratio(a, b) - 1 / (2 * beta))


@pair_loss
def hinge_loss(a, b, *, beta: float = 0.1):
    """The hinge on the margin of log-ratios to the reference: the loss of RSO.

        L = max(0, 1 − βΔ)

    At Δ = 0 it is 1. At the kink, βΔ = 1, the gradient is 0. (The hinge of SLiC, Zhao et al. 2023, has no reference.)

    Source: Liu et al. 2023 (RSO), arXiv 2309.06657.
    """
    return relu(1 - beta * log_ratio(a, b))


@hinge_loss.gradient
def _(a, b, *, beta):
    """−β 1[βΔ < 1] · (1, −1, −1, 1)."""
    return -beta * (1 - beta * log_ratio(a, b) > 0).astype(a.dtype)


@pair_loss(label_smoothing="(0, 1)")
def exo_loss(a, b, *, beta: float = 0.1, label_smoothing: float = 1e-3):
    """Exact optimisation on pairs: the reverse divergence of the policy's preference from the smoothed label.

        L = σ(x) (log σ(x) − log(1 − ε)) + σ(−x) (log σ(−x) − log ε),   x = βΔ          (eq. 16)

    Its minimum is 0, at x = log((1 − ε)/ε), and it is at most −log min(ε, 1 − ε); far below the minimum it is flat, and
    its gradient vanishes.

    Args:
        label_smoothing: ε, which must not be 0.

    Source: Ji et al. 2024.
    """
    margin = log_ratio(a, b)
    log_kept, log_flipped = jnp.log1p(-jnp.asarray(label_smoothing)), jnp.log(label_smoothing)
    return _p_log_ratio(beta * margin, log_kept) + _p_log_ratio(-beta * margin, log_flipped)


@exo_loss.gradient
def _(a, b, *, beta, label_smoothing):
    """β σ(x) σ(−x) (x − log((1 − ε)/ε)) · (1, −1, −1, 1)."""
    x = beta * log_ratio(a, b)
    return beta * _bell(x) * (x - (jnp.log1p(-jnp.asarray(label_smoothing)) - jnp.log(label_smoothing)))


def _p_log_ratio(x: Array, log_q: Array) -> Array:
    """σ(x) (log σ(x) − log q), 0 where σ(x) is."""
    p = sigmoid(x)
    return p * jnp.where(p > 0, log_sigmoid(x) - log_q, 0)


def _bell(x: Array) -> Array:
    """σ(x) σ(−x), the slope of σ."""
    return sigmoid(x) * sigmoid(-x)


@pair_loss(temperature="(0, inf)")
def discopop_loss(a, b, *, beta: float = 0.1, temperature: float = 0.05):
    """The log-ratio-modulated loss that a search by a language model found: logistic below 0, exponential above.

        L = −(1 − m) log σ(x) + m e^{−x},   x = βΔ, m = σ(x/τ)          (eq. 5)

    At Δ = 0 it is ½ log 2 + ½. It is not monotone: as x passes 0 it climbs from a local minimum to a local maximum,
    from 0.786 (x = −0.12) to 0.878 (x = 0.07) at the default τ, and from log 2 to 1 as τ → 0. m e^{−x} is held at e^80
    (float64: e^700), which only τ > 1 can reach.

    Args:
        temperature: τ, the width in x of the transition between the two forms.

    Source: Lu et al. 2024.
    """
    x = beta * log_ratio(a, b)
    return -sigmoid(-x / temperature) * log_sigmoid(x) + _modulated_exp(x, temperature)


@discopop_loss.gradient
def _(a, b, *, beta, temperature):
    """β (−(1 − m) σ(−x) + m (1 − m) log σ(x)/τ + m e^{−x} ((1 − m)/τ − 1)) · (1, −1, −1, 1)."""
    x = beta * log_ratio(a, b)
    rest = sigmoid(-x / temperature)  # 1 − m
    logistic = -rest * sigmoid(-x) + _bell(x / temperature) * log_sigmoid(x) / temperature
    return beta * (logistic + _modulated_exp(x, temperature) * (rest / temperature - 1))


def _modulated_exp(x: Array, temperature: float) -> Array:
    """σ(x/τ) e^{−x}, whose first factor may underflow where the second overflows; 0 at infinite x."""
    finite = jnp.isfinite(x)
    x = jnp.where(finite, x, 0)
    return jnp.where(finite, bounded_exp(log_sigmoid(x / temperature) - x), 0)


@pair_loss(needs=("reference", "lengths"), label_smoothing="[0, 1]")
def length_normalised_dpo_loss(
    a, b, length_chosen, length_rejected, *, beta: float = 0.1, label_smoothing: float = 0.0
):
    """DPO of log-ratios per token, so that a long completion does not win by its length.

        L = −(1 − ε) log σ(x) − ε log σ(−x),   x = β (a/|y_w| − b/|y_l|)

    At the reference it is log 2. It needs a β larger than DPO's, by about the length of a completion. Log-probabilities
    are sums, which are divided here. (Under `jit` a length below 1 cannot be refused, and counts as 1.)

    Args:
        label_smoothing: ε, as in `dpo_loss`.

    Source: Lambert et al. 2024 (Tülu 3), arXiv 2411.15124; TRL's `sigmoid_norm`.
    """
    return _smoothed(beta * log_ratio(a / length_chosen, b / length_rejected), label_smoothing)


@length_normalised_dpo_loss.gradient
def _(a, b, length_chosen, length_rejected, *, beta, label_smoothing):
    """β (ε − σ(−x)) · (1/|y_w|, −1/|y_l|, −1/|y_w|, 1/|y_l|)."""
    margin = a / length_chosen - b / length_rejected
    slope = jnp.where(jnp.isfinite(margin), beta * (label_smoothing - sigmoid(-beta * margin)), 0)
    return slope / length_chosen, -slope / length_rejected


@pair_loss(needs=("reference", "means"))
def length_normalised_ipo_loss(a, b, *, beta: float = 0.1):
    """IPO of log-ratios per token: a margin of a fixed size, in nats² per token².

        L = (Δ − 1/(2β))²          (eq. 17, of averages)

    At the reference it is 1/(4β²). TRL's `ipo` is this one; by its authors' word to TRL, so are the paper's results.

    Source: Azar et al. 2023; TRL's `ipo`.
    """
    return jnp.square(log_ratio(a, b) - 1 / (2 * beta))


@length_normalised_ipo_loss.gradient
def _(a, b, *, beta):
    """(2Δ − 1/β) · (1, −1, −1, 1), with respect to the averages."""
    return 2 * (log_ratio(a, b) - 1 / (2 * beta))


@pair_loss(needs=("reference", "tails"), label_smoothing="[0, 1]", alpha="[0, 1]")
def ld_dpo_loss(a, b, tail_a, tail_b, *, beta: float = 0.1, alpha: float = 0.5, label_smoothing: float = 0.0):
    """Length-desensitised DPO: what the longer completion has beyond the length of the other counts less.

        L = −(1 − ε) log σ(x) − ε log σ(−x),   x = β ((a − (1 − α) a′) − (b − (1 − α) b′))

    with a′ and b′ the parts of the log-ratios beyond the number of tokens that both completions have, 0 for the shorter
    one. With α = 1 it is DPO; with α = 0 nothing beyond that number counts. At the reference it is log 2.

    Args:
        alpha: α, the weight of those tokens (TRL's `ld_alpha`).
        label_smoothing: ε, as in `dpo_loss`.

    Source: Liu et al. 2024, arXiv 2409.06411.
    """
    return _smoothed(beta * _desensitised(a, b, tail_a, tail_b, alpha), label_smoothing)


@ld_dpo_loss.gradient
def _(a, b, tail_a, tail_b, *, beta, alpha, label_smoothing):
    """s = β (ε − σ(−x)) for a, −s for b, −(1 − α) s for a′, (1 − α) s for b′; the opposite for the reference."""
    margin = _desensitised(a, b, tail_a, tail_b, alpha)
    slope = jnp.where(jnp.isfinite(margin), beta * (label_smoothing - sigmoid(-beta * margin)), 0)
    return slope, -slope, (alpha - 1) * slope, (1 - alpha) * slope


def _desensitised(a: Array, b: Array, tail_a: Array, tail_b: Array, alpha: float) -> Array:
    less = [times(1 - alpha, jnp.where(jnp.isfinite(each), tail, 0)) for each, tail in ((a, tail_a), (b, tail_b))]
    return log_ratio(a - less[0], b - less[1])


@pair_loss(needs=("reference", "alignments"), label_smoothing="[0, 1]")
def wpo_loss(a, b, alignment_chosen, alignment_rejected, *, beta: float = 0.1, label_smoothing: float = 0.0):
    """Weighted preference optimisation: DPO, with a smaller weight for pairs that the policy would not have written.

        L = min(1, e^{s_w + s_l}) · (−(1 − ε) log σ(x) − ε log σ(−x)),   x = βΔ
        s = 1/|y| Σ_t [log π(y_t | y_<t) − log Σ_v π(v | y_<t)²]

    The weight is a constant. s is 0 if every token is as probable as the policy's own tokens are in the mean.

    Args:
        label_smoothing: ε, as in `dpo_loss`.

    Source: Zhou et al. 2024, arXiv 2406.11827 (its "sampled alignment"); TRL's `use_weighting`.
    """
    return times(_weight(alignment_chosen, alignment_rejected), _smoothed(beta * log_ratio(a, b), label_smoothing))


@wpo_loss.gradient
def _(a, b, alignment_chosen, alignment_rejected, *, beta, label_smoothing):
    """min(1, e^{s_w + s_l}) β (ε − σ(−x)) · (1, −1, −1, 1)."""
    slope = beta * (label_smoothing - sigmoid(-beta * log_ratio(a, b)))
    return times(_weight(alignment_chosen, alignment_rejected), slope)


def _weight(alignment_chosen: Array, alignment_rejected: Array) -> Array:
    return jnp.exp(jnp.minimum(alignment_chosen + alignment_rejected, 0))


# Losses of the sorted margins of a batch ------------------------------------------------------------------------------


@pair_loss(needs=("reference", "margins", "batch"), label_smoothing="[0, 1]")
def aot_loss(policy_margin, ref_margin, *, beta: float = 0.1, label_smoothing: float = 0.0):
    """Alignment by optimal transport, paired: the policy's margins exceed the reference's in every quantile.

        L_k = −(1 − ε) log σ(x_k) − ε log σ(−x_k),   x_k = β (p_(k) − r_(k))
        p = log π(y_w) − log π(y_l),   r = log ref(y_w) − log ref(y_l)

    with p_(k) and r_(k) the k-th smallest of all the pairs given: value k is of a quantile, not of a pair. With one
    pair it is DPO. At the reference it is log 2.

    Args:
        label_smoothing: ε, as in `dpo_loss`.

    Source: Melnyk et al. 2024, arXiv 2406.05882; TRL's `aot`.
    """
    return _smoothed(beta * log_ratio(_sorted(policy_margin), _sorted(ref_margin)), label_smoothing)


@aot_loss.gradient
def _(policy_margin, ref_margin, *, beta, label_smoothing):
    """β (ε − σ(−x_k)) for the k-th smallest p, and the opposite for the k-th smallest r."""
    return _slopes_of_sorted(policy_margin, ref_margin, beta, label_smoothing)


@pair_loss(needs=("reference", "batch"), label_smoothing="[0, 1]")
def aot_unpaired_loss(a, b, *, beta: float = 0.1, label_smoothing: float = 0.0):
    """Alignment by optimal transport, unpaired: chosen log-ratios exceed rejected ones in every quantile.

        L_k = −(1 − ε) log σ(x_k) − ε log σ(−x_k),   x_k = β (a_(k) − b_(k))

    with a_(k) and b_(k) the k-th smallest of all the pairs given. With one pair it is DPO; at the reference, log 2.

    Args:
        label_smoothing: ε, as in `dpo_loss`.

    Source: Melnyk et al. 2024, arXiv 2406.05882; TRL's `aot_unpaired`.
    """
    return _smoothed(beta * log_ratio(_sorted(a), _sorted(b)), label_smoothing)


@aot_unpaired_loss.gradient
def _(a, b, *, beta, label_smoothing):
    """β (ε − σ(−x_k)) for the k-th smallest a, and the opposite for the k-th smallest b."""
    return _slopes_of_sorted(a, b, beta, label_smoothing)


def _sorted(array: Array) -> Array:
    """All values, the smallest first, in the same shape."""
    return jnp.sort(array, axis=None).reshape(array.shape)


def _slopes_of_sorted(first: Array, second: Array, beta: float, label_smoothing: float) -> tuple[Array, Array]:
    margin = log_ratio(_sorted(first), _sorted(second)).ravel()
    slope = jnp.where(jnp.isfinite(margin), beta * (label_smoothing - sigmoid(-beta * margin)), 0)
    places = [jnp.argsort(each, axis=None) for each in (first, second)]
    of_first, of_second = (jnp.zeros_like(slope).at[place].set(slope).reshape(first.shape) for place in places)
    return of_first, -of_second


# Losses that push each completion for itself --------------------------------------------------------------------------


@pair_loss(alpha="[0, inf)")
def f_dpo_loss(a, b, *, beta: float = 0.1, divergence: str = "reverse_kl", alpha: float | None = None):
    """DPO where an f-divergence other than the reverse KL holds the policy at the reference.

        L = −log σ(β f′(u_w) − β f′(u_l)),   u = π(y)/ref(y)

    with f′(u) = log u (`"reverse_kl"`: DPO), 1 − 1/u (`"forward_kl"`), log(2u/(1 + u)) (`"jensen_shannon"`) or
    (u^{α−1} − 1)/(α − 1) (`"alpha"`: the forward KL at α = 0, the reverse one at α → 1; the paper's α is 1 − α).
    At u_w = u_l it is log 2. Powers of u are held at e^80 (float64: e^700).

    Args:
        divergence: one of the four names, a Python string; another one raises ValueError.
        alpha: α, of `"alpha"` alone, by default ½; with another divergence it raises ValueError.

    Source: Wang et al. 2023.
    """
    return -log_sigmoid(beta * _f_prime_difference(a, b, _power(divergence, alpha)))


@f_dpo_loss.gradient
def _(a, b, *, beta, divergence, alpha):
    """−β σ(−x) · (u_w f″(u_w), −u_l f″(u_l), −u_w f″(u_w), u_l f″(u_l)).

    u f″(u) is 1 (reverse KL), 1/u (forward KL), 1/(1 + u) (Jensen-Shannon) or u^{α−1} (alpha).
    """
    power = _power(divergence, alpha)
    margin = _f_prime_difference(a, b, power)
    slope = jnp.where(jnp.isfinite(margin), -beta * sigmoid(-beta * margin), 0)
    of_a, of_b = (sigmoid(-a), sigmoid(-b)) if power is None else _powers(a, b, power)
    return times(slope, of_a), -times(slope, of_b)


def _power(divergence: str, alpha: float | None) -> float | Array | None:
    """The c of f′(u) = (u^c − 1)/c, which is log u at c = 0; None for the Jensen-Shannon divergence."""
    powers = {"reverse_kl": 0.0, "forward_kl": -1.0, "jensen_shannon": None, "alpha": None}
    if divergence not in powers:
        raise ValueError(f"divergence must be one of {', '.join(powers)}, but is {divergence!r}.")
    if divergence == "alpha":
        return (0.5 if alpha is None else alpha) - 1
    if alpha is not None:
        raise ValueError(f'alpha must be given with the divergence "alpha" alone, but is {alpha} with {divergence!r}.')
    return powers[divergence]


def _f_prime_difference(a: Array, b: Array, power: float | Array | None) -> Array:
    """f′(u_w) − f′(u_l)."""
    return log_ratio(log_sigmoid(a), log_sigmoid(b)) if power is None else _power_difference(a, b, power)


def _power_difference(a: Array, b: Array, power: float | Array) -> Array:
    """(e^{ca} − e^{cb})/c, a − b at c = 0: e^{cb} (e^{c(a − b)} − 1)/c where the two are near each other, and large."""
    straight, known = jnp.asarray(power) == 0, ~jnp.isnan(a - b)
    c = jnp.where(straight, 1, power)
    a, b = (jnp.where(known, each, 0) for each in (a, b))
    lead = c * (a - b)
    near = jnp.abs(lead) < 1
    of_near = bounded_exp(c * b) * jnp.expm1(jnp.where(near, lead, 0))
    difference = jnp.where(near, of_near, bounded_exp(c * a) - bounded_exp(c * b)) / c
    return finite_gradient(jnp.where(known, jnp.where(straight, a - b, difference), jnp.nan))


def _powers(a: Array, b: Array, power: float | Array) -> tuple[Array, Array]:
    """e^{ca} and e^{cb}, the slopes of `_power_difference` but for the sign."""
    a, b = times(power, a), times(power, b)
    near = jnp.abs(a - b) < 1
    of_b = bounded_exp(b)
    return jnp.where(near, of_b * jnp.exp(jnp.where(near, a - b, 0)), bounded_exp(a)), of_b


@pair_loss
def nca_loss(a, b, *, beta: float = 0.1):
    """Noise-contrastive alignment: it holds the chosen reward at its target, so that it does not fall.

        L = −log σ(βa) − ½ log σ(−βa) − ½ log σ(−βb)

    At the reference it is 2 log 2; in a its minimum is at βa = log 2.

    Source: Chen et al. 2024.
    """
    return -(log_sigmoid(beta * a) + log_sigmoid(-beta * a) / 2) - log_sigmoid(-beta * b) / 2


@nca_loss.gradient
def _(a, b, *, beta):
    """β (½ σ(βa) − σ(−βa)) for a, ½ β σ(βb) for b."""
    return beta * (sigmoid(beta * a) / 2 - sigmoid(-beta * a)), beta * sigmoid(beta * b) / 2


@pair_loss(constants=("reward_shift",))
def bco_loss(a, b, *, beta: float = 0.1, reward_shift: float | Array = 0.0):
    """Binary classifier optimisation: the chosen completion above a threshold, the rejected one below it.

        L = −log σ(βa − δ) − log σ(−(βb − δ))

    At the reference, with δ = 0, it is 2 log 2.

    Args:
        reward_shift: δ, in the paper the mean of the rewards βa and βb, which the trainer keeps; a constant.

    Source: Jung et al. 2024.
    """
    return -log_sigmoid(beta * a - reward_shift) - log_sigmoid(reward_shift - beta * b)


@bco_loss.gradient
def _(a, b, *, beta, reward_shift):
    """−β σ(δ − βa) for a, β σ(βb − δ) for b."""
    return -beta * sigmoid(reward_shift - beta * a), beta * sigmoid(beta * b - reward_shift)


@pair_loss
def sppo_loss(a, b, *, beta: float = 0.1):
    """Self-play preference optimisation with hard labels (1 for the winner, 0 for the loser), in nats².

        L = (a − 1/(2β))² + (b + 1/(2β))²

    At the reference it is 1/(2β²).

    Source: Wu et al. 2024.
    """
    return jnp.square(a - 1 / (2 * beta)) + jnp.square(b + 1 / (2 * beta))


@sppo_loss.gradient
def _(a, b, *, beta):
    """2a − 1/β for a, 2b + 1/β for b."""
    return 2 * (a - 1 / (2 * beta)), 2 * (b + 1 / (2 * beta))


@pair_loss
def apo_zero_loss(a, b, *, beta: float = 0.1):
    """Anchored preference optimisation, for chosen completions better than the policy's own: it raises them.

        L = (1 − σ(βa)) + σ(βb)          (eq. 7, plus 1)

    At the reference it is 1; it lies between 0 and 2.

    Source: D'Oosterlinck et al. 2024.
    """
    return sigmoid(-beta * a) + sigmoid(beta * b)


@apo_zero_loss.gradient
def _(a, b, *, beta):
    """−β σ(βa) σ(−βa) for a, β σ(βb) σ(−βb) for b."""
    return -beta * _bell(beta * a), beta * _bell(beta * b)


@pair_loss
def apo_down_loss(a, b, *, beta: float = 0.1):
    """Anchored preference optimisation, for chosen completions worse than the policy's own: it lowers both.

        L = σ(βa) + (1 − σ(βΔ))          (eq. 8, plus 1)

    At the reference it is 1; it lies between 0 and 2.

    Source: D'Oosterlinck et al. 2024.
    """
    return sigmoid(beta * a) + sigmoid(-beta * log_ratio(a, b))


@apo_down_loss.gradient
def _(a, b, *, beta):
    """β (s(βa) − s(βΔ)) for a, β s(βΔ) for b, with s = σ(·) σ(−·)."""
    of_margin = jnp.where(jnp.isfinite(a - b), beta * _bell(beta * (a - b)), 0)
    return beta * _bell(beta * a) - of_margin, of_margin


# Losses without a reference -------------------------------------------------------------------------------------------


@pair_loss(needs=("means",))
def simpo_loss(w, l, *, beta: float = 0.1, gamma: float = 0.5):  # noqa: E741
    """Simple preference optimisation: no reference, the average log-probability as the reward, and a target margin.

        L = −log σ(β (w − l) − γ)          (eq. 6)

    At w = l it is log(1 + e^γ). The target lead is γ/β nats per token, and the defaults, which are TRL's, ask for 5.
    The paper's models have β from 2 to 2.5 and γ/β from 0.1 to 0.8: set both.

    Args:
        beta: β, the scale of the reward, which is per token: much larger than the β of losses of sums.
        gamma: γ, the target lead of βw over βl, in units of the reward.

    Source: Meng et al. 2024.
    """
    return -log_sigmoid(beta * log_ratio(w, l) - gamma)


@simpo_loss.gradient
def _(w, l, *, beta, gamma):  # noqa: E741
    """−β σ(γ − β (w − l)) · (1, −1)."""
    return -beta * sigmoid(gamma - beta * log_ratio(w, l))


@pair_loss(needs=("means",), alpha="(-inf, inf)")
def alphapo_loss(w, l, *, beta: float = 0.1, gamma: float = 0.5, alpha: float = 0.25):  # noqa: E741
    """SimPO with a reward of another shape, a power of the probability per token in place of its logarithm.

        L = −log σ(r(w) − r(l) − γ),   r(w) = β (1 − e^{−αw})/α

    As α → 0 it is SimPO. With α > 0 the reward is steeper where the completion is improbable, with α < 0 where it is
    probable. The paper's models have α near 0.25, and β and γ as SimPO's: set all three.

    Args:
        beta: β, the scale of the reward, which is per token.
        gamma: γ, the target lead, in units of the reward.
        alpha: α, the shape of the reward.

    Source: Gupta et al. 2025, arXiv 2501.03884; TRL's `alpha_param`.
    """
    return -log_sigmoid(beta * _power_difference(w, l, -alpha) - gamma)


@alphapo_loss.gradient
def _(w, l, *, beta, gamma, alpha):  # noqa: E741
    """−β σ(−x) · (e^{−αw}, −e^{−αl})."""
    lead = _power_difference(w, l, -alpha)
    slope = jnp.where(jnp.isfinite(lead), -beta * sigmoid(gamma - beta * lead), 0)
    of_w, of_l = _powers(w, l, -alpha)
    return times(slope, of_w), -times(slope, of_l)


@pair_loss(needs=("means",))
def sft_loss(w, l):  # noqa: E741
    """The negative log-likelihood of the chosen completion, in nats per token: a term beside a preference loss.

        L = −w

    Source: Pang et al. 2024 (RPO), arXiv 2404.19733, eq. 1; TRL's `sft`, which is a mean over the tokens of a batch.
    """
    return -w


@sft_loss.gradient
def _(w, l):  # noqa: E741
    """(−1, 0)."""
    return -jnp.ones_like(w), jnp.zeros_like(l)


@pair_loss(needs=("means",), nll_weight="[0, inf)")
def orpo_loss(w, l, *, beta: float = 0.1, nll_weight: float = 1.0):  # noqa: E741
    """Odds ratio preference optimisation: supervised fine-tuning and a preference in one, without a reference.

        L = −λ w − β log σ(log odds(w) − log odds(l)),   log odds(x) = log(e^x / (1 − e^x))          (eqs. 6 and 7)

    The term of the odds ratio is β log 2 at w = l. Within half a machine epsilon of 0, where the probability rounds to
    1, a log-probability counts as −½ epsilon in the odds, so that they and their gradient stay finite. A positive
    log-probability raises ValueError.

    Args:
        beta: β, the weight of the odds ratio (the paper's λ).
        nll_weight: λ, the weight of −w; with 0 the odds ratio is alone.

    Source: Hong et al. 2024. (TRL's −w is an average over the batch's tokens, the prompt's among them.)
    """
    return times(nll_weight, -w) + beta * -log_sigmoid(_log_odds_ratio(w, l))


@orpo_loss.gradient
def _(w, l, *, beta, nll_weight):  # noqa: E741
    """(−λ − β σ(−z)/(1 − e^w), β σ(−z)/(1 − e^l)), with z the log odds ratio."""
    z = _log_odds_ratio(w, l)
    slope = jnp.where(jnp.isfinite(z), -beta * sigmoid(-z), 0)
    return slope * _log_odds_slope(w) - nll_weight, -slope * _log_odds_slope(l)


def _log_odds_ratio(w: Array, l: Array) -> Array:  # noqa: E741
    if violated((jnp.maximum(w, l) <= 0) | jnp.isnan(w + l)):
        raise ValueError("log-probabilities must not be positive: orpo takes averages over tokens, in nats.")
    return log_ratio(_log_odds(w), _log_odds(l))


def _log_odds(x: Array) -> Array:
    """x − log(1 − e^x) without cancellation; the derivative does not fall to 0 where x is held below 0."""
    highest = -jnp.finfo(x.dtype).eps / 2
    x = jnp.where(x < highest, x, highest + (x - jax.lax.stop_gradient(x)))
    near = x > -0.7
    of_near = jnp.log(-jnp.expm1(jnp.where(near, x, -0.7)))
    return x - jnp.where(near, of_near, jnp.log1p(-jnp.exp(jnp.where(near, -0.7, x))))


def _log_odds_slope(x: Array) -> Array:
    """1/(1 − e^x)."""
    return -1 / jnp.expm1(jnp.minimum(x, -jnp.finfo(x.dtype).eps / 2))


@pair_loss(needs=(), label_smoothing="[0, 1]", nll_weight="[0, inf)")
def cpo_loss(w, l, *, beta: float = 0.1, label_smoothing: float = 0.0, nll_weight: float = 1.0):  # noqa: E741
    """Contrastive preference optimisation: DPO with a uniform reference, and the likelihood of the chosen completion.

        L = −(1 − ε) log σ(x) − ε log σ(−x) − λ w,   x = β (w − l)

    Args:
        label_smoothing: ε, as in `dpo_loss`.
        nll_weight: λ; with 0 the preference is alone.

    Source: Xu et al. 2024. (TRL's second term is an average over the batch's tokens instead of λ w.)
    """
    x = beta * log_ratio(w, l)
    preference = times(1 - label_smoothing, -log_sigmoid(x)) + times(label_smoothing, -log_sigmoid(-x))
    return preference - times(nll_weight, w)


@cpo_loss.gradient
def _(w, l, *, beta, label_smoothing, nll_weight):  # noqa: E741
    """(s − λ, −s) with s = β (ε − σ(−x))."""
    x = beta * log_ratio(w, l)
    slope = jnp.where(jnp.isfinite(x), beta * (label_smoothing - sigmoid(-x)), 0)
    return slope - nll_weight, -slope


PAIR_LOSSES: dict[str, Callable[..., Array]] = {
    name.removesuffix("_loss"): loss for name, loss in list(globals().items()) if hasattr(loss, "needs")
}


# A loss without pairs -------------------------------------------------------------------------------------------------


@objective(constants=("kl",), beta="(0, inf)", desirable_weight="[0, inf)", undesirable_weight="[0, inf)")
def kto_loss(
    logp_policy: Float[Array, "*batch"],
    logp_ref: Float[Array, "*batch"],
    desirable: Bool[Array, "*batch"],
    kl: float | Float[Array, "*batch"],
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, "*batch"]:
    """Kahneman-Tversky optimisation: completions that are each good or bad, against a reference point; no pairs.

        L = λ_D (1 − σ(β (a − z))) if desirable, λ_U (1 − σ(β (z − a))) if not,   z = max(0, kl)

    with a = log π(y) − log ref(y). At a = z it is λ/2.

    Args:
        logp_policy, logp_ref: log-probabilities of the completions, summed over their tokens, in nats.
        desirable: the good completions are true.
        kl: the reference point, one number or one per completion; a constant, in the paper an estimate of KL(π‖ref)
            from mismatched pairs: see `kto_reference_point`.
        beta: as in `dpo_loss`.
        desirable_weight, undesirable_weight: λ_D and λ_U, to make up for unequal numbers of good and bad completions.

    Source: Ethayarajh et al. 2024.
    """
    a, z = log_ratio(logp_policy, logp_ref), jnp.maximum(kl, 0)
    good = desirable_weight * sigmoid(-beta * (a - z))
    bad = undesirable_weight * sigmoid(-beta * (z - a))
    return jnp.where(desirable, good, bad)


@kto_loss.gradient
def _(logp_policy, logp_ref, desirable, kl, *, beta, desirable_weight, undesirable_weight):
    """∓λ β σ(x) σ(−x) · (1, −1), x = β (a − z), − for the desirable."""
    a, z = log_ratio(logp_policy, logp_ref), jnp.maximum(kl, 0)
    slope = jnp.where(desirable, -desirable_weight, undesirable_weight) * beta * _bell(beta * (a - z))
    slope = jnp.where(jnp.isfinite(a), slope, 0)
    return slope, -slope


def kto_reference_point(
    logp_policy_mismatched: Float[Array, "batch"], logp_ref_mismatched: Float[Array, "batch"]
) -> Float[Array, ""]:
    """The reference point of `kto_loss`, from completions of other prompts; no gradient flows through it.

        z = max(0, mean of log π(y′ | x) − log ref(y′ | x))

    Usually y′ are the batch's own completions, moved on by one prompt. At least two different prompts are needed: with
    one, y′ is the completion itself, z is its own a, and β (a − z) is 0 whatever the policy does.

    Args:
        logp_policy_mismatched, logp_ref_mismatched: log-probabilities of the mismatched completions, summed over their
            tokens, in nats.

    Raises:
        ValueError: if the shapes differ, a dtype is not floating, or there are fewer than two completions.

    Source: Ethayarajh et al. 2024.
    """
    logp_policy, logp_ref = checked(
        logp_policy_mismatched=logp_policy_mismatched, logp_ref_mismatched=logp_ref_mismatched
    )
    if logp_policy.size < 2:
        raise ValueError(f"logp_policy_mismatched must hold at least 2 completions, but holds {logp_policy.size}.")
    return jax.lax.stop_gradient(jnp.maximum(log_ratio(logp_policy, logp_ref).mean(), 0))
