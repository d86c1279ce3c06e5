"""The loss around a point of parameter space: directions, the surface over two of them, and curvature.

Every function takes `loss_fn(params) -> scalar`, any function of the parameters; `next_token_loss`, `preference_loss`
and `reward_model_loss` make such functions.
"""

from jaxrl_llm.analysis.landscape.curvature import (
    Eigenpairs,
    curvature,
    hessian_vector_product,
    second_difference,
    slope,
    top_eigenpairs,
)
from jaxrl_llm.analysis.landscape.directions import (
    PrincipalDirections,
    coordinates,
    cosine,
    inner,
    interpolation_directions,
    norm,
    principal_directions,
    random_directions,
    rescaled,
)
from jaxrl_llm.analysis.landscape.surface import (
    LossHole,
    Surface,
    axis,
    loss_section,
    loss_surface,
    next_token_loss,
    preference_loss,
    reward_model_loss,
    surface_of,
)

__all__ = [
    "Eigenpairs",
    "LossHole",
    "PrincipalDirections",
    "Surface",
    "axis",
    "coordinates",
    "cosine",
    "curvature",
    "hessian_vector_product",
    "inner",
    "interpolation_directions",
    "loss_section",
    "loss_surface",
    "next_token_loss",
    "norm",
    "preference_loss",
    "principal_directions",
    "random_directions",
    "rescaled",
    "reward_model_loss",
    "second_difference",
    "slope",
    "surface_of",
    "top_eigenpairs",
]
