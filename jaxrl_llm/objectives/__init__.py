"""Objectives: arrays in, arrays out, unreduced; imports jax only."""
