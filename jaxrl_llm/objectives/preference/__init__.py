"""Preference losses: DPO and its relatives, one value per pair (KTO: per answer).

Log-probabilities are those of whole responses, *summed* over their tokens, in nats; SimPO and ORPO alone take them
averaged. With the log-ratios to the reference of the chosen and the rejected response

    a = log π(y_w) − log ref(y_w),   b = log π(y_l) − log ref(y_l),   Δ = a − b,   x = βΔ,

all four log-probabilities are differentiable, and a loss of Δ alone has the gradient dL/dΔ · (1, −1, −1, 1). Each loss
is that of the same name in TRL, with these differences: `ipo_loss` takes sums where TRL's divides by the answers'
lengths, and the likelihood terms of ORPO and CPO are one value per pair where TRL's are means over a batch's tokens.
A knob is one number; under `jit` its range cannot be checked.

| loss | of one pair | at policy = reference | least at |
|---|---|---|---|
| dpo | −(1 − ε) log σ(x) − ε log σ(−x) | log 2 | x = log((1 − ε)/ε) |
| robust_dpo | (−(1 − ε) log σ(x) + ε log σ(−x)) / (1 − 2ε) | log 2 | x → ∞ |
| ipo | (Δ − 1/(2β))² | 1/(4β²) | Δ = 1/(2β) |
| hinge | max(0, 1 − x) | 1 | x ≥ 1 |
| exo | KL of (σ(x), σ(−x)) from (1 − ε, ε) | −log 2 − ½ log(ε(1 − ε)) | x = log((1 − ε)/ε) |
| nca | −log σ(βa) − ½ log σ(−βa) − ½ log σ(−βb) | 2 log 2 | βa = log 2, b → −∞ |
| bco | −log σ(βa − δ) − log σ(δ − βb) | 2 log 2 (δ = 0) | a → ∞, b → −∞ |
| sppo | (a − 1/(2β))² + (b + 1/(2β))² | 1/(2β²) | a = −b = 1/(2β) |
| apo_zero | σ(−βa) + σ(βb) | 1 | a → ∞, b → −∞ |
| apo_down | σ(βa) + σ(−x) | 1 | a → −∞, Δ → ∞ |
| discopop | −(1 − m) log σ(x) + m e^{−x}, m = σ(x/τ) | ½ log 2 + ½ | x → ∞ |
| f_dpo | −log σ(β f′(π/ref of y_w) − β f′(π/ref of y_l)) | log 2 | as far apart as f′ goes |
| length_normalised_dpo | dpo with a/|y_w| − b/|y_l| for Δ | log 2 | as dpo |
| simpo | −log σ(β(w − l) − γ), no reference | | w − l → ∞ |
| orpo | −w − β log σ(log odds w − log odds l), no reference | | w → 0, l → −∞ |
| cpo | −w − log σ(β(w − l)), no reference | | w → 0, l → −∞ |
| kto | λ_D σ(β(z − a)) or λ_U σ(β(a − z)), no pair | λ/2 (z = 0) | a → ±∞ |

A loss of Δ alone does not say where the two go: the chosen log-probability may well fall while the margin grows (watch
both). A loss that stays at log 2 has policy and reference sharing their parameters.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Array

from jaxrl_llm.objectives.preference.margin import (
    discopop_loss,
    discopop_loss_grad,
    dpo_loss,
    dpo_loss_grad,
    exo_loss,
    exo_loss_grad,
    f_dpo_loss,
    f_dpo_loss_grad,
    hinge_loss,
    hinge_loss_grad,
    ipo_loss,
    ipo_loss_grad,
    length_normalised_dpo_loss,
    length_normalised_dpo_loss_grad,
    robust_dpo_loss,
    robust_dpo_loss_grad,
)
from jaxrl_llm.objectives.preference.reference_free import (
    cpo_loss,
    cpo_loss_grad,
    orpo_loss,
    orpo_loss_grad,
    simpo_loss,
    simpo_loss_grad,
)
from jaxrl_llm.objectives.preference.separate import (
    apo_down_loss,
    apo_down_loss_grad,
    apo_zero_loss,
    apo_zero_loss_grad,
    bco_loss,
    bco_loss_grad,
    kto_loss,
    kto_loss_grad,
    kto_reference_point,
    nca_loss,
    nca_loss_grad,
    sppo_loss,
    sppo_loss_grad,
)

PAIR_LOSSES: dict[str, Callable[..., Array]] = {  # of the same four log-probabilities, by name
    "dpo": dpo_loss,
    "robust_dpo": robust_dpo_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "exo": exo_loss,
    "nca": nca_loss,
    "bco": bco_loss,
    "sppo": sppo_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "discopop": discopop_loss,
    "f_dpo": f_dpo_loss,
}

__all__ = [
    "PAIR_LOSSES",
    "apo_down_loss",
    "apo_down_loss_grad",
    "apo_zero_loss",
    "apo_zero_loss_grad",
    "bco_loss",
    "bco_loss_grad",
    "cpo_loss",
    "cpo_loss_grad",
    "discopop_loss",
    "discopop_loss_grad",
    "dpo_loss",
    "dpo_loss_grad",
    "exo_loss",
    "exo_loss_grad",
    "f_dpo_loss",
    "f_dpo_loss_grad",
    "hinge_loss",
    "hinge_loss_grad",
    "ipo_loss",
    "ipo_loss_grad",
    "kto_loss",
    "kto_loss_grad",
    "kto_reference_point",
    "length_normalised_dpo_loss",
    "length_normalised_dpo_loss_grad",
    "nca_loss",
    "nca_loss_grad",
    "orpo_loss",
    "orpo_loss_grad",
    "robust_dpo_loss",
    "robust_dpo_loss_grad",
    "simpo_loss",
    "simpo_loss_grad",
    "sppo_loss",
    "sppo_loss_grad",
]
