"""Measurements of language models: reference laws, metrics and what is drawn from them."""

from jaxrl_llm import submodules

__getattr__, __dir__ = submodules(__name__)
