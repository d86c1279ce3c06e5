"""Objectives: arrays in, arrays out, unreduced, each with its closed-form gradient as `.grad`; imports jax only."""
