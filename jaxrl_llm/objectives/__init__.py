"""Objectives: arrays in, arrays out, unreduced; imports jax only."""

from jaxrl_llm import submodules

__getattr__, __dir__ = submodules(__name__)
