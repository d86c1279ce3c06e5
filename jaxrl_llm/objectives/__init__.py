"""Objectives: arrays in, arrays out, unreduced, each with its closed-form gradient as `.grad`; imports jax only."""

from jaxrl_llm import submodules

__getattr__, __dir__ = submodules(__name__)
