"""Scalar heads on any language model: reward models and critics, with loading and saving."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.language_model import LanguageModel, Params, several_texts
from jaxrl_llm.models import families, huggingface, loading


@dataclasses.dataclass(frozen=True)
class ScalarHead:
    """A scalar for each token: the inner product of its hidden state with one vector, without bias.

    The parameters are {"model": the language model's, "head": [width]}.
    """

    lm: LanguageModel

    def init(self, key: Array, lm_params: Params | None = None, *, zero: bool = False) -> Params:
        """Return a random head of variance 1/(width + 1), or zeros, with the given or random model parameters."""
        model_key, head_key = jax.random.split(key)
        params = self.lm.init(model_key) if lm_params is None else lm_params
        shape = jax.eval_shape(lambda params: self.lm.hidden(params, jnp.zeros((1, 1), jnp.int32))[0], params).shape
        width = shape[-1]
        head = jnp.zeros(width) if zero else jax.random.normal(head_key, (width,)) / jnp.sqrt(width + 1)
        return {"model": params, "head": head}

    def values(
        self,
        params: Params,
        tokens: Int[Array, "batch time"],
        mask: Bool[Array, "batch time"] | None = None,
        segments: Int[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch time"]:
        """Return the scalar at each token.

        At padding it is undefined; for a model with a root state it is that of the tokens before.
        """
        hidden, _ = self.lm.hidden(params["model"], tokens, mask=mask, **several_texts(self.lm, segments))
        head = params["head"]
        return hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32)) @ head.astype(
            jnp.promote_types(head.dtype, jnp.float32)
        )

    def scores(
        self, params: Params, tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"] | None = None
    ) -> Float[Array, "batch"]:
        """Return the scalar at the last real token of each row, with padding on either side."""
        values = self.values(params, tokens, mask)
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        last = jnp.where(mask, jnp.arange(tokens.shape[1]), 0).max(axis=1)
        return jnp.take_along_axis(values, last[:, None], axis=1)[:, 0]


@dataclasses.dataclass(frozen=True)
class LoadedReward:
    """A reward model with its parameters, its tokenizer (None if the folder has none) and its `config.json`."""

    head: ScalarHead
    params: Params
    tokenizer: Any
    config: dict[str, Any]


def save_reward_model(
    path: str | os.PathLike[str], head: ScalarHead, params: Params, tokenizer: Any = None, *, dtype: Any = None
) -> None:
    """Write a folder in the format of transformers' `...ForSequenceClassification` with one label.

    transformers takes the score at the last token that is not `pad_token_id`: the padding token must not end texts, or
    padding must be on the left.

    Raises:
        ValueError: if transformers has no such format of the model.
    """
    config = families.config_of(head.lm)
    family = config["model_type"]
    architecture = families.FAMILIES[family].reward
    if architecture is None:
        known = [name for name, each in families.FAMILIES.items() if each.reward]
        raise ValueError(f"a reward model to save must be on {', '.join(known)}, but is on {family}.")
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_labels": 1}
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = getattr(tokenizer, "eos_token_id", None) if pad is None else pad
    extra = {"architectures": [architecture]} | labels | ({} if pad is None else {"pad_token_id": pad})
    score = np.asarray(params["head"])[None].astype(np.float32 if dtype is None else dtype)
    loading.save(
        path, head.lm, params["model"], tokenizer, config=extra, dtype=dtype, further={huggingface.SCORE: score}
    )


def load_reward_model(path: str | os.PathLike[str], *, dtype: Any = None) -> LoadedReward:
    """Load a reward model that `save_reward_model` or transformers has written.

    Raises:
        FileNotFoundError, ValueError: as `models.load`, or if the folder has no head of one label.
    """
    loaded = loading.load(path, dtype=dtype)
    score = dict(huggingface.stored_tensors(loading.locate(path))).get(huggingface.SCORE)
    if score is None or score.shape[0] != 1:
        raise ValueError(
            f"{path} is not a reward model: {huggingface.SCORE} must be [1, width], "
            f"but {'is missing' if score is None else f'is {list(score.shape)}'}."
        )
    params = {"model": loaded.params, "head": jnp.asarray(score[:][0], jnp.float32 if dtype is None else dtype)}
    return LoadedReward(ScalarHead(loaded.model), params, loaded.tokenizer, loaded.config)
