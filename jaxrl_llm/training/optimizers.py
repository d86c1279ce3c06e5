"""The optimiser that the embedded models are trained with."""

from __future__ import annotations

import jax
import optax

from jaxrl_llm.language_model import Params


def muon(
    learning_rate: float, *, steps: int, warmup_steps: int, decay_steps: int, weight_decay: float
) -> optax.GradientTransformation:
    """Muon on the weight matrices, Adam on embeddings, norms and biases; warm-up, plateau, linear decay to 0.

    Updates of matrices have the size that Adam's would have, so that one learning rate serves both. Weights decay in
    matrices alone; gradients are clipped at norm 1.

    Source: Jordan et al. 2024; the size of the updates: Liu et al. 2025 (arXiv 2502.16982).
    """

    def is_matrix(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    def dimension_numbers(params: Params) -> Params:
        return jax.tree.map(lambda matrix: optax.contrib.MuonDimensionNumbers() if matrix else None, is_matrix(params))

    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, learning_rate, warmup_steps),
            optax.constant_schedule(learning_rate),
            optax.linear_schedule(learning_rate, 0.0, decay_steps),
        ],
        [warmup_steps, steps - decay_steps],
    )
    update = optax.contrib.muon(
        schedule,
        adam_b2=0.95,
        weight_decay=weight_decay,
        weight_decay_mask=is_matrix,
        muon_weight_dimension_numbers=dimension_numbers,
        consistent_rms=0.2,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), update)
