"""Rotary position embedding (Su et al. 2021): frequencies, rotation, and its fields of a `config.json`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrl_llm.models.decoder import check_choice


@dataclasses.dataclass(frozen=True)
class Rotary:
    """The rotation of a head's first coordinates.

    Every scaling for longer contexts is other frequencies. LongRoPE (Ding et al. 2024) has `long` ones for rows that
    are longer than the `original` context.
    """

    frequencies: tuple[float, ...]  # radians per position of each pair of coordinates
    amplitude: float = 1.0  # of cosines and sines
    long: tuple[float, ...] = ()
    original: int = 0

    def __post_init__(self):
        for name in ("frequencies", "long"):
            object.__setattr__(self, name, tuple(np.float64(getattr(self, name)).tolist()))

    def turn(
        self, positions: Int[Array, "batch time"], lengths: Int[Array, "batch #time"]
    ) -> tuple[Float[Array, "batch time half"], Float[Array, "batch time half"]]:
        """Return cosines and sines of the angles at these positions.

        LongRoPE's long frequencies hold for the tokens of a text of more tokens than the original context. With a
        cache the length of a text is not known yet: there the number of slots decides.
        """
        frequencies = jnp.asarray(self.frequencies)
        if self.long:
            frequencies = jnp.where((lengths > self.original)[..., None], jnp.asarray(self.long), frequencies)
        angles = positions[..., None] * frequencies
        return self.amplitude * jnp.cos(angles), self.amplitude * jnp.sin(angles)


def rotate(
    x: Float[Array, "batch head time head_dim"],
    cos: Float[Array, "batch time half"],
    sin: Float[Array, "batch time half"],
    *,
    interleaved: bool = False,
) -> Float[Array, "batch head time head_dim"]:
    """Rotate the pairs of coordinates (i, i + half), or (2i, 2i + 1); coordinates from 2 · half on are unchanged."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    if interleaved:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return jnp.concatenate([turned.reshape(*x.shape[:-1], 2 * half), x[..., 2 * half :]], axis=-1)
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


# Frequencies ----------------------------------------------------------------------------------------------------------

Settings = Mapping[str, Any]  # of a `config.json`


class Scaling(NamedTuple):
    """A kind of scaling for longer contexts."""

    needed: tuple[str, ...]  # settings
    scale: Callable[[np.ndarray, Settings, int], Rotary]  # of plain frequencies, settings, and the context length


def rotary(settings: Settings, head_dim: int, *, max_length: int) -> Rotary:
    """Return the rotation that the rotary settings of a `config.json` describe.

    Args:
        settings: `rope_type`, `rope_theta`, `partial_rotary_factor`, and the factors of the type: linear; llama3 (Llama
            3.1); yarn (Peng et al. 2023); longrope (Ding et al. 2024).
        max_length: the context length, by which LongRoPE without a `factor` knows its amplitude.

    Raises:
        ValueError: for an unknown type, or a factor that is missing or out of range.
    """
    kind = settings.get("rope_type", "default")
    check_choice("rope_type", kind, SCALINGS)
    scaling = SCALINGS[kind]
    if lacking := [name for name in scaling.needed if settings.get(name) is None]:
        raise ValueError(f"rope_type {kind} needs {' and '.join(lacking)}.")
    for name in ("rope_theta", "factor", *scaling.needed):
        value = settings.get(name, 1.0)
        values = value if name in ("short_factor", "long_factor") and isinstance(value, tuple | list) else [value]
        if not all(isinstance(each, int | float) and not isinstance(each, bool) and each > 0 for each in values):
            raise ValueError(f"{name} must be above 0, but is {value!r}.")
    share = settings.get("partial_rotary_factor", 1.0)
    dim = int(head_dim * share) if isinstance(share, int | float) else 0
    if dim % 2 or not 0 < dim <= head_dim:
        raise ValueError(
            f"partial_rotary_factor must leave an even number of a head's {head_dim} coordinates to turn, 2 or more, "
            f"but is {share!r}."
        )
    plain = float(settings["rope_theta"]) ** (-np.arange(dim // 2) / (dim // 2))
    return scaling.scale(plain, settings, max_length)


def _llama3(plain: np.ndarray, settings: Settings, max_length: int) -> Rotary:
    """Scale wavelengths beyond the original context, keep short ones, and interpolate between."""
    low, high, factor = (settings[name] for name in ("low_freq_factor", "high_freq_factor", "factor"))
    if low >= high:
        raise ValueError(f"low_freq_factor must be below high_freq_factor, but they are {low} and {high}.")
    turns = settings["original_max_position_embeddings"] * plain / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return Rotary(plain * (kept + (1 - kept) / factor))


def _yarn(plain: np.ndarray, settings: Settings, max_length: int) -> Rotary:
    """Divide by the factor what turns less than β_slow times in the original context, and keep what turns β_fast."""
    factor, original, theta = settings["factor"], settings["original_max_position_embeddings"], settings["rope_theta"]
    dim = 2 * len(plain)

    def place(turns: float) -> float:  # the coordinate that turns so often
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def amplitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    low, high = place(settings.get("beta_fast") or 32), place(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    scaled = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)
    one, every = settings.get("mscale"), settings.get("mscale_all_dim")
    found = amplitude(one) / amplitude(every) if one and every else amplitude(1)
    return Rotary(plain * (1 - scaled) + plain / factor * scaled, _amplitude(settings, found))


def _longrope(plain: np.ndarray, settings: Settings, max_length: int) -> Rotary:
    original = settings["original_max_position_embeddings"]
    if original <= 1:
        raise ValueError(f"original_max_position_embeddings must be above 1, but is {original!r}.")
    for name in ("short_factor", "long_factor"):
        if np.shape(settings[name]) != plain.shape:
            raise ValueError(f"{name} must be {len(plain)} numbers, but is {settings[name]!r}.")
    factor = settings.get("factor") or max_length / original
    found = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (plain / np.asarray(settings[name]) for name in ("short_factor", "long_factor"))
    return Rotary(short, _amplitude(settings, found), long=long, original=int(original))


def _amplitude(settings: Settings, found: float) -> float:
    """Return the amplitude that is given, else the one that is found."""
    return float(found if settings.get("attention_factor") is None else settings["attention_factor"])


ORIGINAL = "original_max_position_embeddings"
SCALINGS = {
    "default": Scaling((), lambda plain, settings, max_length: Rotary(plain)),
    "linear": Scaling(("factor",), lambda plain, settings, max_length: Rotary(plain / settings["factor"])),
    "llama3": Scaling(("factor", "low_freq_factor", "high_freq_factor", ORIGINAL), _llama3),
    "yarn": Scaling(("factor", ORIGINAL), _yarn),
    "longrope": Scaling(("short_factor", "long_factor", ORIGINAL), _longrope),
}


# Settings of a config.json --------------------------------------------------------------------------------------------


def rope_parameters(config: Settings, defaults: Settings) -> dict[str, Any]:
    """Return the rotary settings of a `config.json` in one form: {"rope_type", "rope_theta", factors ...}.

    They have an old form (`rope_theta`, `rope_scaling` and `partial_rotary_factor` as separate fields) and a new one
    (`rope_parameters`), which may hold settings for each kind of layer. The new form takes precedence over separate
    fields, but `rope_scaling` and `rope_parameters` must not contradict each other.

    Args:
        defaults: the family's `rope_theta`; `partial_rotary_factor`, which is absent if the family turns whole heads;
            `rope_local_base_freq`, which is there if the family has settings for each kind of layer: in the old form
            the base of sliding attention, which has no scaling. If it is None it is that of full attention;
            `older_types`, other names of kinds of scaling.

    Raises:
        ValueError: if a form is not an object, the forms contradict each other, or a part of each head should turn in a
            family that turns whole heads.
    """
    scaling, given = (_settings(config, form) for form in ("rope_scaling", "rope_parameters"))
    nested = {name: value for name, value in {**scaling, **given}.items() if isinstance(value, Mapping)}
    # What stands beside the kinds of layers in `rope_parameters` has no effect, as in transformers.
    flat = {name: value for name, value in scaling.items() if name not in nested}
    flat = _joined(flat, {} if nested else given)
    if "rope_local_base_freq" not in defaults:
        kinds = {name: _joined(flat, _settings(nested, name)) for name in nested}
        return {name: _complete(config, kinds[name], defaults) for name in kinds} or _complete(config, flat, defaults)
    full = _complete(config, _joined(flat, _settings(nested, "full_attention")), defaults)
    local = config.get("rope_local_base_freq") or defaults["rope_local_base_freq"] or full["rope_theta"]
    sliding = {"rope_theta": local} | _settings(nested, "sliding_attention")
    return {"full_attention": full, "sliding_attention": _complete(config, sliding, defaults)}


def _complete(config: Settings, given: Settings, defaults: Settings) -> dict[str, Any]:
    """Return these settings with those that are separate fields, or the family's."""
    settings = {"rope_type": "default", "rope_theta": 10000.0}
    older = {"su": "longrope"} | defaults.get("older_types", {})
    for separate in (defaults, config):
        settings |= {name: separate[name] for name in SEPARATE if separate.get(name) is not None}
    original = settings.get(ORIGINAL)  # beside them it takes precedence, as in transformers
    settings |= given if original is None else {**given, ORIGINAL: original}
    settings["rope_type"] = older.get(settings["rope_type"], settings["rope_type"])
    if ORIGINAL in SCALINGS.get(settings["rope_type"], SCALINGS["default"]).needed:
        settings.setdefault(ORIGINAL, config.get("max_position_embeddings"))
    else:
        settings.pop(ORIGINAL, None)
    if "partial_rotary_factor" not in defaults and (share := settings.pop("partial_rotary_factor", 1)) != 1:
        raise ValueError(f"partial_rotary_factor = {share!r} is not supported.")
    return settings


SEPARATE = ("rope_theta", "partial_rotary_factor", ORIGINAL)


def _joined(scaling: Settings, given: Settings) -> dict[str, Any]:
    """Return the settings of two forms in one.

    Raises:
        ValueError: if they contradict each other.
    """
    for name, value in given.items():
        if name in scaling and scaling[name] != value:
            both = f"{scaling[name]!r} and {value!r}"
            raise ValueError(f"rope_scaling and rope_parameters must agree, but have the {name} {both}.")
    return {**scaling, **given}


def _settings(config: Mapping[str, Any], form: str) -> dict[str, Any]:
    """Return the fields of one form that are not null, with the type under its present name."""
    given = {} if config.get(form) is None else config[form]
    if not isinstance(given, Mapping):
        raise ValueError(f"{form} must be an object, but is {given!r}.")
    said = {name: value for name, value in given.items() if value is not None}
    older = said.pop("type", None)
    return said if older is None else {"rope_type": older} | said
