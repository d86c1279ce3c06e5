"""Translating texts with a loaded model, a T5 or a decoder-only one: batched, greedy or by beam search."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrl_llm import text
from jaxrl_llm.decoding import generate
from jaxrl_llm.decoding.beam import beam_search
from jaxrl_llm.models import T5, Loaded
from jaxrl_llm.models.conditional import Conditional, given

SOURCE_BUCKET = 16  # tokens: sources are padded to a multiple of it, so that one program serves many lengths
BATCH = 32  # sentences that are translated at once


@dataclasses.dataclass(frozen=True)
class Form:
    """How a sentence is put to a model: `prefix` before it, `suffix` behind it."""

    prefix: str = ""
    suffix: str = ""

    @classmethod
    def of(cls, loaded: Loaded, *, prefix: str | None = None, suffix: str | None = None) -> Form:
        """What is given here; else what `translation` in the model's `config.json` says; else the plain form.

        That is nothing for a T5, and for a decoder-only model a line break behind the sentence: the translation is the
        line after it.
        """
        declared = loaded.config.get("translation") or {}
        plain = {"prefix": "", "suffix": "" if isinstance(loaded.model, T5) else "\n"}
        known = plain | {name: declared[name] for name in plain if name in declared}
        asked = {"prefix": prefix, "suffix": suffix}
        return cls(**known | {name: value for name, value in asked.items() if value is not None})


def translate(
    loaded: Loaded,
    sentences: Sequence[str],
    *,
    form: Form | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    max_new_tokens: int = 64,
    batch_size: int = BATCH,
) -> list[str]:
    """The most probable translation of each sentence that greedy decoding (one beam) or beam search finds.

    Args:
        form: how the sentences are put to the model; by default as `Form.of` says.
        length_penalty: hypotheses of several beams are ranked by log p / length**length_penalty.
        max_new_tokens: the most tokens of a translation.
        batch_size: sentences that are translated at once.

    A decoder-only model's translation ends where its line ends.

    Raises:
        ValueError: if the model has no tokenizer, a sentence (named by its number, from 1) is empty or has a word that
            the tokenizer does not know, or as `generate` and `beam_search` do.
    """
    if loaded.tokenizer is None:
        raise ValueError("the model has no tokenizer files, so that text cannot be turned into tokens.")
    form = Form.of(loaded) if form is None else form
    rows = [
        known_tokens(loaded.tokenizer, sentence, form=form, name=f"sentence {number}")
        for number, sentence in enumerate(sentences, 1)
    ]
    eos = text.eos_ids(loaded.tokenizer, loaded.config)
    translations = []
    for task in conditionals(loaded, rows, batch_size=batch_size):
        tokens = decoded(task, num_beams=num_beams, length_penalty=length_penalty, limit=max_new_tokens, eos=eos)
        translations += [loaded.tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens]
    if not isinstance(loaded.model, T5):
        translations = [each.split("\n", 1)[0].strip() for each in translations]
    return translations[: len(sentences)]


def conditionals(loaded: Loaded, rows: Sequence[Sequence[int]], *, batch_size: int = BATCH) -> Iterator[Conditional]:
    """The model given each batch of sources (tokens), all batches of one shape; the last repeats its last source."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but is {batch_size}.")
    length = -(-max(map(len, rows), default=1) // SOURCE_BUCKET) * SOURCE_BUCKET
    batch_size = min(batch_size, len(rows))
    for start in range(0, len(rows), max(batch_size, 1)):
        batch = list(rows[start : start + batch_size])
        batch += [batch[-1]] * (batch_size - len(batch))
        tokens, mask = text.left_pad(batch)
        padding = ((0, 0), (length - tokens.shape[1], 0))
        source, source_mask = jnp.asarray(np.pad(tokens, padding)), jnp.asarray(np.pad(mask, padding))
        yield given(loaded.model, loaded.params, source, source_mask)


def decoded(
    task: Conditional, *, num_beams: int, length_penalty: float, limit: int, eos: Sequence[int]
) -> list[list[int]]:
    """The tokens of the best translation of each source, EOS included."""
    common = {"prompt_mask": task.mask, "max_new_tokens": limit, "eos_id": eos}
    model = (task.lm, task.params, task.prompts)
    if num_beams == 1:
        found = generate(*model, greedy=True, **common)
        tokens, mask = np.asarray(found.tokens), np.asarray(found.mask)
    else:
        beams = beam_search(*model, num_beams=num_beams, length_penalty=length_penalty, **common)
        tokens, mask = np.asarray(beams.tokens[:, 0]), np.asarray(beams.mask[:, 0])
    return [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]


def known_tokens(tokenizer: Any, sentence: str, *, form: Form | None = None, name: str = "the text") -> list[int]:
    """The tokens of a sentence in its form, each of which stands for what is written there.

    An unknown word is an error: a model answers as if there were some other one.

    Args:
        form: by default the plain sentence.
        name: what errors call the sentence.

    Raises:
        ValueError: if the sentence is empty, or the tokenizer does not know a word of it.
    """
    if not sentence.strip():
        raise ValueError(f"{name} is empty.")
    form = Form() if form is None else form
    whole = f"{form.prefix}{sentence}{form.suffix}"
    tokens = text.encode(tokenizer, whole)
    # Where bytes are tokens, nothing is unknown, and the unknown token is often that of a text's beginning or end.
    unknown = {tokenizer.unk_token_id} - {None, tokenizer.bos_token_id, tokenizer.eos_token_id}
    if unknown & set(tokens):
        words = ", ".join(map(repr, _unknown_words(tokenizer, whole))) or "a word of it"
        raise ValueError(f"{name}, {sentence!r}: the model's tokenizer does not know {words}.")
    return tokens


def _unknown_words(tokenizer: Any, whole: str) -> list[str]:
    """What the unknown tokens stand for, each once; nothing where a tokenizer in Python does not tell."""
    if not tokenizer.is_fast:
        return []
    encoding = tokenizer(whole, return_offsets_mapping=True)
    places = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    return list(
        dict.fromkeys(whole[slice(*place)].strip() for token, place in places if token == tokenizer.unk_token_id)
    )
