"""A scalar head on any language model: reward models and critics, and their folders."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.language_model import LanguageModel, Params
from jaxrl_llm.models import families, huggingface, loading

ARCHITECTURES = {
    "gpt2": "GPT2ForSequenceClassification",
    "llama": "LlamaForSequenceClassification",
    "stablelm": "StableLmForSequenceClassification",
}


@dataclasses.dataclass(frozen=True)
class ScalarHead:
    """A number for each token: the product of its hidden state with one vector, without a bias.

    The parameters are {"model": the language model's, "head": [width]}.
    """

    lm: LanguageModel

    def init(self, key: Array, lm_params: Params | None = None, *, zero: bool = False) -> Params:
        """A head of variance 1/(width + 1), or of zeros, on given parameters or on random ones."""
        model_key, head_key = jax.random.split(key)
        params = self.lm.init(model_key) if lm_params is None else lm_params
        shape = jax.eval_shape(lambda params: self.lm.hidden(params, jnp.zeros((1, 1), jnp.int32))[0], params).shape
        width = shape[-1]
        head = jnp.zeros(width) if zero else jax.random.normal(head_key, (width,)) / jnp.sqrt(width + 1)
        return {"model": params, "head": head}

    def values(
        self, params: Params, tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"] | None = None
    ) -> Float[Array, "batch time"]:
        """The number at each token, of what stands up to there.

        At padding it means nothing; of a model with a root it is that of what stands before.
        """
        hidden, _ = self.lm.hidden(params["model"], tokens, mask=mask)
        head = params["head"]
        return hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32)) @ head.astype(
            jnp.promote_types(head.dtype, jnp.float32)
        )

    def scores(
        self, params: Params, tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"] | None = None
    ) -> Float[Array, "batch"]:
        """The number at the last real token of each row, wherever padding stands."""
        values = self.values(params, tokens, mask)
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        last = jnp.where(mask, jnp.arange(tokens.shape[1]), 0).max(axis=1)
        return jnp.take_along_axis(values, last[:, None], axis=1)[:, 0]


@dataclasses.dataclass(frozen=True)
class LoadedReward:
    """A reward model, its parameters, its tokenizer (None where the source has none) and its `config.json`."""

    head: ScalarHead
    params: Params
    tokenizer: Any
    config: dict[str, Any]


def save_reward_model(
    path: str | os.PathLike[str], head: ScalarHead, params: Params, tokenizer: Any = None, *, dtype: Any = None
) -> None:
    """Write a folder in the form of transformers' `...ForSequenceClassification` with one label.

    transformers reads the score at the last token that is not `pad_token_id`: padding must be a token that does not
    end texts, or stand on the left.

    Raises:
        ValueError: if transformers has no such form of the model, or the folder holds another file of weights.
    """
    config = families.config_of(head.lm)
    family = config["model_type"]
    if family not in ARCHITECTURES:
        raise ValueError(f"a reward model on {family} cannot be saved: only on {', '.join(ARCHITECTURES)}.")
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_labels": 1}
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = getattr(tokenizer, "eos_token_id", None) if pad is None else pad
    extra = {"architectures": [ARCHITECTURES[family]]} | labels | ({} if pad is None else {"pad_token_id": pad})
    score = np.asarray(params["head"])[None].astype(np.float32 if dtype is None else dtype)
    loading.save(
        path, head.lm, params["model"], tokenizer, config=extra, dtype=dtype, further={huggingface.SCORE: score}
    )


def load_reward_model(path: str | os.PathLike[str], *, dtype: Any = None) -> LoadedReward:
    """Load what `save_reward_model`, or transformers, has written.

    Raises:
        FileNotFoundError, ValueError: as `models.load`, or if the folder has no head of one label.
    """
    loaded = loading.load(path, dtype=dtype)
    found = dict(huggingface.read_tensors(Path(loading.locate(path)), only=(huggingface.SCORE,)))
    score = found.get(huggingface.SCORE)
    if score is None or score.shape[0] != 1:
        raise ValueError(
            f"{path} is no reward model: {huggingface.SCORE} of the shape [1, width] was expected, "
            f"but there is {'none' if score is None else list(score.shape)}."
        )
    params = {"model": loaded.params, "head": jnp.asarray(score[0], jnp.float32 if dtype is None else dtype)}
    return LoadedReward(ScalarHead(loaded.model), params, loaded.tokenizer, loaded.config)
