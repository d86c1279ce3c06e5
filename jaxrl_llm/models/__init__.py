"""Neural language models, implemented from scratch; loading and saving."""

from jaxrl_llm.models.configuration import Config, Llama, LlamaConfig, StableLM, StableLMConfig
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config
from jaxrl_llm.models.heads import LoadedReward, ScalarHead, load_reward_model, save_reward_model
from jaxrl_llm.models.loading import Loaded, load, save
from jaxrl_llm.models.t5 import T5, T5Config
from jaxrl_llm.models.transformer import Decoder

__all__ = [
    "GPT2",
    "T5",
    "Config",
    "Decoder",
    "GPT2Config",
    "Llama",
    "LlamaConfig",
    "Loaded",
    "LoadedReward",
    "ScalarHead",
    "StableLM",
    "StableLMConfig",
    "T5Config",
    "load",
    "load_reward_model",
    "save",
    "save_reward_model",
]
