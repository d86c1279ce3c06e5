"""A model whose texts never end."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm import models, text
from jaxrl_llm.language_model import Cache, LanguageModel, Params


@dataclasses.dataclass(frozen=True)
class Endless:
    """The distribution of a model given that the text goes on: its special tokens have probability 0.

    Texts of all decoders then have one length, at which log-probabilities, repetition and diversity can be compared.
    """

    lm: LanguageModel
    removed: tuple[int, ...]  # tokens that end a text, and other special ones

    @property
    def vocab_size(self) -> int:
        return self.lm.vocab_size

    @property
    def max_length(self) -> int:
        return self.lm.max_length

    @property
    def min_prompt_length(self) -> int:
        return self.lm.min_prompt_length

    def init_cache(self, *sizes: int, **options: Any) -> Cache:
        """Call the model's method."""
        return self.lm.init_cache(*sizes, **options)

    def hidden(self, *arguments: Any, **options: Any) -> tuple[jax.Array, Cache | None]:
        """Call the model's method."""
        return self.lm.hidden(*arguments, **options)

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Return the model's logits, −inf at the removed tokens."""
        return self.lm.logits(params, hidden).at[..., jnp.asarray(self.removed)].set(-jnp.inf)

    def apply(self, params: Params, tokens: jax.Array, cache: Cache | None = None, **options: Any) -> tuple:
        """Return the logits of the next tokens."""
        hidden, cache = self.hidden(params, tokens, cache, **options)
        return self.logits(params, hidden), cache


def endless(loaded: models.Loaded) -> Endless:
    """Return the loaded model without its special tokens."""
    config = loaded.config | {"vocab_size": loaded.model.vocab_size}
    special = {*loaded.tokenizer.all_special_ids, *text.eos_ids(loaded.tokenizer, config)}
    return Endless(loaded.model, tuple(sorted(token for token in special if token < loaded.model.vocab_size)))
