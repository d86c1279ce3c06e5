"""Optimiser steps, trainers and checkpoints: they only compose the floors below."""

from jaxrl_llm import submodules

__getattr__, __dir__ = submodules(__name__)
