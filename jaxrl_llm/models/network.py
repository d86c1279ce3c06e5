"""What every neural model shares: the check of its configuration, and the pure-function shell around its NNX module."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
import numbers
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from jaxrl_llm.language_model import Params

TokenId = int  # in a configuration: 0 is one
KINDS = {  # of a configuration's fields: numpy's numbers count, but True is no number
    "int": ("a positive integer", lambda value: isinstance(value, numbers.Integral) and value > 0),
    "TokenId": ("a token id, 0 or above", lambda value: isinstance(value, numbers.Integral) and value >= 0),
    "float": ("a finite number, 0 or above", lambda value: isinstance(value, numbers.Real) and 0 <= value < math.inf),
    "bool": ("true or false", lambda value: isinstance(value, bool | np.bool_)),
    "str": ("a name", lambda value: isinstance(value, str)),
}


def check_config(config: Any) -> None:
    """Raise for a field of a configuration that is not what its annotation says, naming it."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), field.type.removesuffix(" | None")
        if kind not in KINDS or (value is None and kind != field.type):
            continue
        expected, fits = KINDS[kind]
        if not fits(value) or (isinstance(value, bool) and kind != "bool"):
            raise ValueError(f"{field.name} must be {expected}, but is {value!r}.")


@dataclasses.dataclass(frozen=True)
class Network(abc.ABC):
    """An NNX module as pure functions: `config` is all its state, its parameters are a plain nested dict.

    `nnx.split` of the abstract module, once, gives the static graph; merging it with the parameters costs nothing under
    `jit`.
    """

    config: Any

    @abc.abstractmethod
    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The NNX module, with parameters drawn at random."""

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def init(self, key: Array) -> Params:
        """Random parameters."""
        return nnx.to_pure_dict(nnx.split(self.build(nnx.Rngs(key)))[1])

    def merge(self, params: Params) -> nnx.Module:
        """The module with these parameters."""
        return nnx.merge(self._split[0], params)

    @functools.cached_property
    def _split(self) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(nnx.eval_shape(lambda: self.build(nnx.Rngs(0))))

    @property
    def abstract_params(self) -> Params:
        """The parameters' shapes and dtypes, without the parameters."""
        return nnx.to_pure_dict(self._split[1])

    def num_params(self) -> int:
        """How many numbers the parameters are."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract_params))
