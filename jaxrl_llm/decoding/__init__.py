"""Decoding: each decoder is a state, a step and a scan, and runs on any `LanguageModel`."""

from jaxrl_llm.decoding import transforms
from jaxrl_llm.decoding.checks import Guidance
from jaxrl_llm.decoding.generate import generate, stream
from jaxrl_llm.decoding.loop import Generation
from jaxrl_llm.decoding.stopping import StopStrings, stop_strings
from jaxrl_llm.decoding.tree import Tree, search_tree

__all__ = [
    "Generation",
    "Guidance",
    "StopStrings",
    "Tree",
    "generate",
    "search_tree",
    "stop_strings",
    "stream",
    "transforms",
]
