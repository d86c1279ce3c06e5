"""Translation of texts by a T5 or a decoder-only model: batched, greedy or by beam search."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxrl_llm import text
from jaxrl_llm.decoding import generate
from jaxrl_llm.decoding.beam import beam_search
from jaxrl_llm.mesh import filled
from jaxrl_llm.models import T5, Loaded
from jaxrl_llm.models.conditional import Conditional, given
from jaxrl_llm.options import check_characters

SOURCE_BUCKET = 16  # tokens: sources are padded to a multiple of it, so that many lengths share one program
BATCH = 32  # sentences per batch


@dataclasses.dataclass(frozen=True)
class Form:
    """The prompt template of a translation model: `prefix` before the sentence, `suffix` after it."""

    prefix: str = ""
    suffix: str = ""

    @classmethod
    def of(cls, loaded: Loaded, *, prefix: str | None = None, suffix: str | None = None) -> Form:
        """Return the form of a model: these arguments, else `translation` in its `config.json`, else a default.

        By default a T5 has no prefix and no suffix. A decoder-only model has a line break as its suffix, and the
        translation is the next line.
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
    allow_unknown: bool = False,
) -> list[str]:
    """Translate each sentence by greedy decoding (one beam) or beam search.

    The translation of a decoder-only model ends at the end of its line.

    Args:
        form: prefix and suffix of the sentences; by default `Form.of(loaded)`.
        length_penalty: beams are ranked by log p / length**length_penalty.
        max_new_tokens: the largest number of tokens of a translation.
        batch_size: sentences per batch.
        allow_unknown: read a word that is not in the tokenizer's vocabulary as the unknown token.

    Raises:
        ValueError: if the model has no tokenizer; if a sentence (reported by number, from 1) is empty, does not fit the
            context of a decoder-only model or, without `allow_unknown`, has a word that is not in the tokenizer's
            vocabulary; or as `generate` and `beam_search`.
    """
    if loaded.tokenizer is None:
        raise ValueError("the model must have a tokenizer, but its folder has no tokenizer files.")
    form = Form.of(loaded) if form is None else form
    rows = [
        known_tokens(loaded.tokenizer, sentence, form=form, name=f"sentence {number}", allow_unknown=allow_unknown)
        for number, sentence in enumerate(sentences, 1)
    ]
    for number, row in enumerate(rows, 1):
        if not isinstance(loaded.model, T5) and len(row) + max_new_tokens > loaded.model.max_length:
            raise ValueError(
                f"sentence {number} has {len(row)} tokens, and {max_new_tokens} new ones do not fit with it in the "
                f"model's context of {loaded.model.max_length}."
            )
    eos = text.eos_ids(loaded.tokenizer, loaded.config | {"vocab_size": loaded.model.vocab_size})
    translations = []
    for task in conditionals(loaded, rows, batch_size=batch_size):
        tokens = decoded(task, num_beams=num_beams, length_penalty=length_penalty, limit=max_new_tokens, eos=eos)
        translations += [decoded_text(loaded.tokenizer, row, eos).strip() for row in tokens]
    if not isinstance(loaded.model, T5):
        translations = [each.split("\n", 1)[0].strip() for each in translations]
    return translations[: len(sentences)]


def conditionals(loaded: Loaded, rows: Sequence[Sequence[int]], *, batch_size: int = BATCH) -> Iterator[Conditional]:
    """Yield the conditional model of each batch of sources (tokens). Batches have one shape; the last is filled up."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but is {batch_size}.")
    length = -(-max(map(len, rows), default=1) // SOURCE_BUCKET) * SOURCE_BUCKET
    batch_size = filled(min(batch_size, len(rows)))
    for start in range(0, len(rows), max(batch_size, 1)):
        batch = list(rows[start : start + batch_size])
        batch += [batch[-1]] * (batch_size - len(batch))
        tokens, mask = text.left_pad(batch)
        padding = ((0, 0), (length - tokens.shape[1], 0))
        yield given(loaded.model, loaded.params, np.pad(tokens, padding), np.pad(mask, padding))


def decoded(
    task: Conditional, *, num_beams: int, length_penalty: float, limit: int, eos: Sequence[int]
) -> list[list[int]]:
    """Return the tokens of the best translation of each source, EOS included."""
    common = {"prompt_mask": task.mask, "max_new_tokens": limit, "eos_id": eos}
    model = (task.lm, task.params, task.prompts)
    if num_beams == 1:
        found = generate(*model, greedy=True, **common)
        tokens, mask = np.asarray(found.tokens), np.asarray(found.mask)
    else:
        beams = beam_search(*model, num_beams=num_beams, length_penalty=length_penalty, **common)
        tokens, mask = np.asarray(beams.tokens[:, 0]), np.asarray(beams.mask[:, 0])
    return [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]


def decoded_text(tokenizer: Any, tokens: Sequence[int], eos: Sequence[int]) -> str:
    """Return the text of a translation, without EOS, also where it is an ordinary token of the tokenizer."""
    return tokenizer.decode([token for token in tokens if token not in eos], skip_special_tokens=True)


def known_tokens(
    tokenizer: Any, sentence: str, *, form: Form | None = None, name: str = "the text", allow_unknown: bool = False
) -> list[int]:
    """Return the tokens of a sentence in its form; unknown words are an error, for a model would translate others.

    Args:
        form: prefix and suffix; by default none.
        name: of the sentence, for errors.
        allow_unknown: read unknown words as the unknown token.

    Raises:
        TypeError: if the sentence is not a string.
        ValueError: if it is empty, or a word is not in the tokenizer's vocabulary.
    """
    check_characters(sentence, name)
    if not sentence.strip():
        raise ValueError(f"{name} is empty.")
    form = Form() if form is None else form
    whole = f"{form.prefix}{sentence}{form.suffix}"
    tokens = text.encode(tokenizer, whole)
    # A byte-level tokenizer knows every word; its unknown token is often the token that begins or ends a text.
    unknown = {tokenizer.unk_token_id} - {None, tokenizer.bos_token_id, tokenizer.eos_token_id}
    if unknown & set(tokens) and not allow_unknown:
        words = ", ".join(map(repr, _unknown_words(tokenizer, whole))) or "a word of it"
        raise ValueError(f"{name}, {sentence!r}: the model's tokenizer does not know {words}.")
    return tokens


def _unknown_words(tokenizer: Any, whole: str) -> list[str]:
    """Return the distinct unknown words; none for a tokenizer without offsets."""
    if not tokenizer.is_fast:
        return []
    encoding = tokenizer(whole, return_offsets_mapping=True)
    places = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    return list(
        dict.fromkeys(whole[slice(*place)].strip() for token, place in places if token == tokenizer.unk_token_id)
    )
