"""Measurements of language models and their texts: attention, loss landscapes, BLEU, diversity, bootstrap intervals."""

from jaxrl_llm import submodules

__getattr__, __dir__ = submodules(__name__)
