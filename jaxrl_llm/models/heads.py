"""Scalar heads on any language model: reward models and critics, with loading and saving."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm import text
from jaxrl_llm.data.records import Fields, Message, Text, alike
from jaxrl_llm.language_model import LanguageModel, Params, several_texts
from jaxrl_llm.mesh import everywhere, filled, on_mesh_of
from jaxrl_llm.models import configuration, families, huggingface, loading, lora


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
    """A reward model with its parameters, its tokenizer (None if the folder has none) and its `config.json`.

    A text is scored at its last token: of strings that is EOS, of a conversation the last token that the chat template
    writes. transformers reads the same token of a saved reward model.
    """

    head: ScalarHead
    params: Params
    tokenizer: Any
    config: dict[str, Any]

    @property
    def max_length(self) -> int:
        """The model's context: the most tokens of a text that is scored."""
        return self.head.lm.max_length

    def has_tokens_of(self, tokenizer: Any) -> bool:
        """Return True if the tokens of this tokenizer are those of the reward model, so that it can score them."""
        return text.same_tokens(self.tokenizer, tokenizer)

    def tokens(self, prompt: Text, completion: Text | None = None, *, template: Fields | None = None) -> list[int]:
        """Return the tokens that are scored: of a prompt with its completion, or of a whole text or conversation.

        Args:
            template: variables of the chat template, such as `tools`; those that it does not read are left out.

        Raises:
            ValueError: for a reward model without a tokenizer, or texts longer than its context.
        """
        if self.tokenizer is None:
            raise ValueError("the reward model must have a tokenizer to score texts, but has none.")
        if completion is None:
            prompt, completion = ("", prompt) if isinstance(prompt, str) else ((), tuple(prompt))
        else:
            prompt, (completion,) = alike(_frozen(prompt), (_frozen(completion),))
        tokens = text.whole(self.tokenizer, prompt, completion, **text.read_by(self.tokenizer, template or {}))
        if len(tokens) > self.max_length:
            raise ValueError(f"a text of {len(tokens)} tokens is longer than the context, {self.max_length}.")
        return tokens

    def score(
        self,
        prompts: Text | Sequence[Text],
        completions: Text | Sequence[Text] | None = None,
        *,
        batch_size: int = 16,
    ) -> float | list[float]:
        """Return the score of each completion after its prompt.

        Args:
            prompts, completions: one completion for each prompt, strings or lists of messages; a single prompt may have
                several completions. Two strings or conversations give a number. Without completions, `prompts` are
                whole texts or conversations.
            batch_size: rows of one forward pass. Scores do not depend on it, up to rounding.

        Raises:
            TypeError: for prompts or completions of another type.
            ValueError: unless there is one completion for each prompt, or if a row does not fit the model's context.
        """
        for name, given in (("prompts", prompts), ("completions", "" if completions is None else completions)):
            if isinstance(given, Mapping) or not hasattr(given, "__len__"):
                raise TypeError(f"{name} must be a string, a conversation or several, but is {given!r:.60}.")
        if _is_one(prompts if completions is None else completions):
            one = [prompts] if completions is None else prompts
            return self.score(one, None if completions is None else [completions], batch_size=batch_size)[0]
        if completions is not None and _is_one(prompts):
            prompts = [prompts] * len(completions)
        if completions is not None and len(prompts) != len(completions):
            raise ValueError(
                f"there must be one completion for each prompt, but there are {len(completions)} for {len(prompts)}."
            )
        given = [None] * len(prompts) if completions is None else completions
        return self.score_tokens(list(map(self.tokens, prompts, given)), batch_size=batch_size)

    def score_tokens(self, rows: Sequence[Sequence[int]], *, batch_size: int = 16) -> list[float]:
        """Return the score of rows of tokens, each at its last token; rows of like length share a batch."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, but is {batch_size}.")
        with on_mesh_of(self.params):
            return self._scored(rows, batch_size)

    def _scored(self, rows: Sequence[Sequence[int]], batch_size: int) -> list[float]:
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        found, size = [0.0] * len(rows), filled(min(batch_size, len(rows)))
        for start in range(0, len(order), size or 1):
            places = order[start : start + size]
            of_size = places + places[-1:] * (size - len(places))
            length = min(-(-max(len(rows[row]) for row in of_size) // MULTIPLE) * MULTIPLE, self.max_length)
            tokens, mask = text.right_pad([rows[row] for row in of_size], length=length)
            scores = np.asarray(_scores(self.head, self.params, jnp.asarray(tokens), jnp.asarray(mask)), float)
            for place, score in zip(places, scores.tolist(), strict=False):
                found[place] = score
        return found


MULTIPLE = 32  # padded lengths are multiples of it, so that few programs are compiled
_scores = jax.jit(lambda head, params, tokens, mask: everywhere(head.scores(params, tokens, mask)), static_argnums=0)


def _frozen(given: Text | Sequence[Message]) -> Text:
    return given if isinstance(given, str) else tuple(given)


def _is_one(texts: Any) -> bool:
    """Return True for one string or one conversation."""
    return isinstance(texts, str) or (len(texts) > 0 and all(isinstance(each, Mapping) for each in texts))


def save_reward_model(
    path: str | os.PathLike[str],
    head: ScalarHead,
    params: Params,
    tokenizer: Any = None,
    *,
    config: Mapping[str, Any] | None = None,
    dtype: Any = None,
) -> None:
    """Write a folder in the format of transformers' `...ForSequenceClassification` with one label.

    transformers takes the score at the last token that is not `pad_token_id`, here at the last token of the text. So
    the folder's padding token is one that no text ends with: the tokenizer's own, unless it ends texts; else its
    unknown or a reserved token; else a new one, <|pad|>, for which the embedding gets a row of zeros. Without a
    tokenizer there is none, and transformers takes one row at a time.

    Args:
        config: further fields for `config.json`, such as those of the model that was trained.

    Raises:
        ValueError: if transformers has no such format of the model.
    """
    own = configuration.config_of(head.lm)
    family = own["model_type"]
    architecture = families.FAMILIES[family].reward
    if architecture is None:
        known = [name for name, each in families.FAMILIES.items() if each.reward]
        raise ValueError(f"a reward model to save must be on {', '.join(known)}, but is on {family}.")
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_labels": 1}
    lm, lm_params, config = head.lm, params["model"], dict(config or {})
    if tokenizer is not None:
        tokenizer = _padding(tokenizer, config | {"vocab_size": own["vocab_size"]})
        lm, lm_params = _widened(lm, lm_params, tokenizer.pad_token_id + 1)
    extra = {"architectures": [architecture], "pad_token_id": getattr(tokenizer, "pad_token_id", None)} | labels
    score = np.asarray(params["head"])[None].astype(np.float32 if dtype is None else dtype)
    further = {huggingface.SCORE: score}
    loading.save(path, lm, lm_params, tokenizer, config=config | extra, dtype=dtype, further=further)


PAD_TOKEN = "<|pad|>"
RESERVED = re.compile(r".*(pad|reserved|unused).*", re.IGNORECASE)  # names of tokens that no text has


def _padding(tokenizer: Any, config: Mapping[str, Any]) -> Any:
    """Return a copy of the tokenizer that pads on the right, with a token that no text ends with."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"  # absolute positions, as GPT-2's, are then right without `position_ids`
    ends = {*text.eos_ids(tokenizer, config), tokenizer.eos_token_id, tokenizer.bos_token_id}
    if tokenizer.chat_template:
        with contextlib.suppress(ValueError):  # a template that refuses this conversation
            ends |= set(text.whole(tokenizer, PROBE[:1], PROBE[1:]))
    special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    reserved = [number for number, name in sorted(special.items()) if RESERVED.fullmatch(name)]
    for number in (tokenizer.pad_token_id, tokenizer.unk_token_id, *reserved):
        if number is not None and number not in ends and number < config["vocab_size"]:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(number)
            return tokenizer
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def _widened(lm: LanguageModel, params: Params, vocab_size: int) -> tuple[LanguageModel, Params]:
    """Return the model with room for a vocabulary of this size; new rows of the embedding are zeros."""
    if vocab_size <= lm.vocab_size:
        return lm, params
    replace = getattr(lm.config, "replace", functools.partial(dataclasses.replace, lm.config))
    wider = dataclasses.replace(lm, config=replace(vocab_size=vocab_size))

    def padded(leaf: Array, wanted: jax.ShapeDtypeStruct) -> Array:
        widths = [(0, new - old) for new, old in zip(wanted.shape, leaf.shape, strict=True)]
        return jnp.pad(leaf, widths) if leaf.shape != wanted.shape else leaf

    return wider, jax.tree.map(padded, params, wider.abstract_params)


def load_reward_model(
    path: str | os.PathLike[str], *, dtype: Any = None, sharding: huggingface.ShardingRule | None = None
) -> LoadedReward:
    """Load a reward model that `save_reward_model` or transformers has written, or an adapter of one.

    Args:
        dtype, sharding: of the parameters, as in `models.load`.

    Raises:
        FileNotFoundError, ValueError: as `models.load`, or if the folder has no head of one label.
    """
    loaded = loading.load(path, dtype=dtype, sharding=sharding)
    score = _stored_head(loading.locate(path))
    if score is None or score.shape[0] != 1:
        raise ValueError(
            f"{path} is not a reward model: {huggingface.SCORE} must be [1, width], "
            f"but {'is missing' if score is None else f'is {list(score.shape)}'}."
        )
    params = {"model": loaded.params, "head": jnp.asarray(score[:][0], jnp.float32 if dtype is None else dtype)}
    return LoadedReward(ScalarHead(loaded.model), params, loaded.tokenizer, loaded.config)


def stored_head(loaded: loading.Loaded, path: str | os.PathLike[str]) -> Float[Array, "width"] | None:
    """Return the head of a reward model that `models.load(path)` has read without it; None of a language model."""
    if not is_reward(loaded.config):
        return None
    score = _stored_head(loading.locate(path))
    return None if score is None or score.shape[0] != 1 else jnp.asarray(score[:][0], jnp.float32)


def is_reward(config: Mapping[str, Any]) -> bool:
    """Return True if a `config.json` is that of a sequence classifier."""
    return str((config.get("architectures") or [""])[0]).endswith("ForSequenceClassification")


def _stored_head(folder: Path) -> Any:
    """Return the tensor of the head that a folder holds, or None; an adapter without one has its base's."""
    if not lora.is_adapter(folder):
        return dict(huggingface.stored_tensors(folder)).get(huggingface.SCORE) if folder.is_dir() else None
    found = lora.head_of(folder)
    return _stored_head(loading.locate(lora.base_of(folder))) if found is None else found
