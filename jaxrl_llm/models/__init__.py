"""The neural language models, from scratch, and how they are loaded and saved."""

from jaxrl_llm.models.gpt2 import GPT2, GPT2Config
from jaxrl_llm.models.llama import Llama, LlamaConfig
from jaxrl_llm.models.loading import Loaded, load, save

__all__ = ["GPT2", "GPT2Config", "Llama", "LlamaConfig", "Loaded", "load", "save"]
