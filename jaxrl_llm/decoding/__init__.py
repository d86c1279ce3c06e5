"""Decoding: each decoder is a state, a step and a scan, and runs on any `LanguageModel`."""

from jaxrl_llm.decoding import constraints, transforms
from jaxrl_llm.decoding.beam import Beams, beam_search
from jaxrl_llm.decoding.constraints import StopStrings, stop_strings
from jaxrl_llm.decoding.contrastive import contrastive_search
from jaxrl_llm.decoding.core import Generation, Guidance
from jaxrl_llm.decoding.exact_search import exact_search
from jaxrl_llm.decoding.generate import Memory, generate, stream
from jaxrl_llm.decoding.many import generate_many
from jaxrl_llm.decoding.reranking import MBR, BestOfN, Vote, best_of_n, minimum_bayes_risk, self_consistency
from jaxrl_llm.decoding.sliding import slide, slide_stream
from jaxrl_llm.decoding.speculative import Draft, DraftModel, PromptLookup, Speculation, speculative_generate
from jaxrl_llm.decoding.stochastic_beam import StochasticBeams, inclusion_probability, stochastic_beam_search
from jaxrl_llm.decoding.tree import Tree, search_tree

__all__ = [
    "MBR",
    "Beams",
    "BestOfN",
    "Draft",
    "DraftModel",
    "Generation",
    "Guidance",
    "Memory",
    "PromptLookup",
    "Speculation",
    "StochasticBeams",
    "StopStrings",
    "Tree",
    "Vote",
    "beam_search",
    "best_of_n",
    "constraints",
    "contrastive_search",
    "exact_search",
    "generate",
    "generate_many",
    "inclusion_probability",
    "minimum_bayes_risk",
    "search_tree",
    "self_consistency",
    "slide",
    "slide_stream",
    "speculative_generate",
    "stochastic_beam_search",
    "stop_strings",
    "stream",
    "transforms",
]
