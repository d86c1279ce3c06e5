"""Data sets and their formats: records, verses, film reviews, number names, parallel text."""

from jaxrl_llm import submodules

__getattr__, __dir__ = submodules(__name__)
