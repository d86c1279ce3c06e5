"""Decoding: each decoder is a state, a step and a scan, and runs on any `LanguageModel`."""

from jaxrl_llm.decoding import transforms
from jaxrl_llm.decoding.generate import generate, stream
from jaxrl_llm.decoding.loop import Generation
from jaxrl_llm.decoding.tree import Tree, search_tree

__all__ = ["Generation", "Tree", "generate", "search_tree", "stream", "transforms"]
