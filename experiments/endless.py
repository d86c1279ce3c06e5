"""A model that never ends its text, and the log-probabilities of texts under it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import models, text
from jaxrl_llm.language_model import Cache, LanguageModel, Params
from jaxrl_llm.objectives.logprobs import token_log_probs


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
        """Call the model's."""
        return self.lm.init_cache(*sizes, **options)

    def hidden(self, *arguments: Any, **options: Any) -> tuple[jax.Array, Cache | None]:
        """Call the model's."""
        return self.lm.hidden(*arguments, **options)

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Return the model's, and −inf where a token is removed."""
        return self.lm.logits(params, hidden).at[..., jnp.asarray(self.removed)].set(-jnp.inf)

    def apply(self, params: Params, tokens: jax.Array, cache: Cache | None = None, **options: Any) -> tuple:
        """Return the logits of the next tokens."""
        hidden, cache = self.hidden(params, tokens, cache, **options)
        return self.logits(params, hidden), cache


def endless(loaded: models.Loaded) -> Endless:
    """Return the loaded model without its special tokens."""
    special = {*loaded.tokenizer.all_special_ids, *text.eos_ids(loaded.tokenizer, loaded.config)}
    return Endless(loaded.model, tuple(sorted(token for token in special if token < loaded.model.vocab_size)))


def log_probs(
    lm: LanguageModel, params: Params, prompts: list[list[int]], texts: np.ndarray, *, batch: int = 64
) -> np.ndarray:
    """Return the log-probability of each token of `texts` [row, time] after its prompt, by forward passes."""
    padded, mask = text.left_pad([[*prompt, *row] for prompt, row in zip(prompts, texts.tolist(), strict=True)])
    padding = ((0, -len(texts) % batch), (0, 0))
    padded, mask = np.pad(padded, padding, mode="edge"), np.pad(mask, padding, mode="edge")
    pieces = [
        _last(lm, params, padded[i : i + batch], mask[i : i + batch], texts.shape[1])
        for i in range(0, len(padded), batch)
    ]
    return np.concatenate(pieces)[: len(texts)]


@functools.partial(jax.jit, static_argnames=("lm", "count"))
def _last(lm: LanguageModel, params: Params, tokens: jax.Array, mask: jax.Array, count: int) -> jax.Array:
    """Return the log-probabilities of the last `count` tokens of each row."""
    hidden, _ = lm.hidden(params, tokens, mask=mask)
    return token_log_probs(lm.logits(params, hidden[:, -count - 1 : -1]), tokens[:, -count:])
