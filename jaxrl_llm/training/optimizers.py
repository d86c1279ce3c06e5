"""Optimisers: AdamW as the trainers use it, and Muon, which trained the embedded models."""

from __future__ import annotations

import jax
import optax

from jaxrl_llm.language_model import Params


def adamw(
    learning_rate: float, *, steps: int, warmup: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """Return AdamW on clipped gradients, with a linear warm-up over a share of the steps and linear decay to 0."""
    rising = min(steps - 1, round(warmup * steps))
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(learning_rate / max(1, rising), learning_rate, max(1, rising)),
            optax.linear_schedule(learning_rate, 0.0, max(1, steps - rising)),
        ],
        [rising],
    )
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.adamw(schedule, weight_decay=weight_decay))


def muon(
    learning_rate: float, *, steps: int, warmup_steps: int, decay_steps: int, weight_decay: float
) -> optax.GradientTransformation:
    """Return Muon on the weight matrices and Adam on embeddings, norms and biases; warm-up, plateau, linear decay.

    Updates of matrices are scaled to the size of Adam's, so that one learning rate serves both. Weight decay acts on
    matrices alone; gradients are clipped to norm 1.

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
