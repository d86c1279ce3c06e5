"""Rotary position embedding (Su et al. 2021): frequencies, rotation, and its fields of a `config.json`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.models.decoder import check_config


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary frequencies for a longer context: `linear`, or `llama3` (Llama 3.1)."""

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int | None = None  # llama3 needs it

    def __post_init__(self):
        if self.rope_type not in ("linear", "llama3"):
            raise ValueError(f"rope_type must be default, linear or llama3, but is {self.rope_type!r}.")
        if self.rope_type == "llama3" and not self.original_max_position_embeddings:
            raise ValueError("rope_type llama3 needs original_max_position_embeddings.")
        check_config(self)
        if self.factor == 0:
            raise ValueError("factor must be above 0.")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                "low_freq_factor must be below high_freq_factor, "
                f"but they are {self.low_freq_factor} and {self.high_freq_factor}."
            )


def rope_frequencies(dim: int, *, theta: float, scaling: RopeScaling | None) -> Float[Array, "half"]:
    """Return radians per position for each pair of `dim` coordinates: θ^(−2i/dim), scaled by `scaling`."""
    half = dim // 2
    frequencies = float(theta) ** (-jnp.arange(half) / half)
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    # llama3: wavelengths beyond the original context are scaled, short ones kept, those between interpolated.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = jnp.clip(kept, 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotate(
    x: Float[Array, "batch head time head_dim"], angles: Float[Array, "batch time half"]
) -> Float[Array, "batch head time head_dim"]:
    """Rotate the pairs of coordinates (i, i + half); coordinates from 2 · half on are left unchanged."""
    half = angles.shape[-1]
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


# Settings ------------------------------------------------------------------------------------------------------------

LLAMA3_FACTORS = ("low_freq_factor", "high_freq_factor")  # required: they have no common default


def rope_from_config(config: dict[str, Any], source: str, *, rotated: float) -> dict[str, Any]:
    """Return our fields `rope_theta`, `rope_scaling` and `partial_rotary_factor`.

    They have an old form (separate fields) and a new one (`rope_parameters`). The new form takes precedence over
    separate fields, but `rope_scaling` and `rope_parameters` must not contradict each other.

    Args:
        rotated: the default of `partial_rotary_factor`.

    Raises:
        ValueError: if a form is not an object, or has one object for each kind of layer; if the forms contradict each
            other; or if a scaling is unknown or lacks a factor.
    """
    scaling, parameters = (_settings(config, source, form) for form in ("rope_scaling", "rope_parameters"))
    for name in scaling.keys() & parameters.keys():
        if scaling[name] != parameters[name]:
            raise ValueError(
                f"{source}: rope_scaling and rope_parameters must agree, but have the {name} "
                f"{scaling[name]!r} and {parameters[name]!r}."
            )
    beside = {name: config.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    settings = beside | scaling | parameters
    rope_type = settings.get("rope_type", "default")
    theta, factor = settings["rope_theta"], settings["partial_rotary_factor"]
    values = {
        "rope_theta": 10000.0 if theta is None else theta,
        "rope_scaling": None,
        "partial_rotary_factor": rotated if factor is None else factor,
    }
    if rope_type == "llama3" and (lacking := [name for name in LLAMA3_FACTORS if name not in settings]):
        raise ValueError(f"{source}: rope_type llama3 needs {' and '.join(lacking)}.")
    if rope_type != "default":
        known = {field.name for field in dataclasses.fields(RopeScaling)}
        scaling = {name: value for name, value in settings.items() if name in known} | {"rope_type": rope_type}
        try:
            values["rope_scaling"] = RopeScaling(**scaling)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: rope scaling {settings}: {error}") from error
    return values


def _settings(config: dict[str, Any], source: str, form: str) -> dict[str, Any]:
    """Return the fields of one form that are not null, with the type under its present name."""
    given = {} if config.get(form) is None else config[form]
    if not isinstance(given, dict):
        raise ValueError(f"{source}: {form} must be an object, but is {given!r}.")
    if nested := [name for name, value in given.items() if isinstance(value, dict)]:
        raise ValueError(f"{source}: {form} must be one for all layers, but has {', '.join(nested)}.")
    said = {name: value for name, value in given.items() if value is not None}
    older = said.pop("type", None)
    return said if older is None else {"rope_type": older} | said


def rope_parameters(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Return the settings in the new form."""
    rope = {"rope_type": "default", "rope_theta": theta}
    if scaling is None:
        return rope
    fields = dataclasses.asdict(scaling)
    return rope | {
        name: fields[name] for name in (("rope_type", "factor") if scaling.rope_type == "linear" else fields)
    }
