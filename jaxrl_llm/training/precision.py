"""Compute in a narrow type, keep the weights in a wide one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxrl_llm.language_model import Params
from jaxrl_llm.training.steps import View


def compute_in(dtype: Any) -> View:
    """A view of the trained parameters in `dtype`, bfloat16 for one.

    The forward and backward passes read the narrow copy; gradients come back in the type of the weights themselves,
    which the optimiser moves, so that no small step is lost to rounding (Micikevicius et al. 2018).

    Raises:
        ValueError: if `dtype` is not floating.
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating type, but is {dtype}.")

    def narrow(params: Params, frozen: PyTree) -> Params:
        return jax.tree.map(
            lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, params
        )

    return narrow
