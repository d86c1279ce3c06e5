"""Answers of a language model: questions as tokens, and log-probabilities of their answers in batches."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from jaxrl_llm import runtime, text
from jaxrl_llm.analysis.sycophancy.questions import Asked, check_type, words
from jaxrl_llm.language_model import Cache, LanguageModel, Params, params_dtype
from jaxrl_llm.mesh import everywhere, filled, on_mesh_of
from jaxrl_llm.models import T5, Loaded
from jaxrl_llm.numerics import log_softmax

LETTER_LEAD = " ("  # the beginning of an answer by its letter
SPEAKERS = {"user": "Question", "assistant": "Answer"}  # of a conversation as plain text
PREFIX_BUCKET, TAIL_BUCKET, ANSWER_BUCKET, SLOT_BUCKET = 128, 32, 4, 256  # few rounded lengths, so few programs
MOST = 4  # readings that share a prefix


class Answers(NamedTuple):
    """Log-probabilities of the measured answer and of the others together, in nats; NaN where a question is too long.

    `letters` are those of their labels as next tokens after " (", `words` of the answers in words, summed over tokens.
    """

    letters: Float[np.ndarray, "question answer"]
    words: Float[np.ndarray, "question answer"]


class Row(NamedTuple):
    """The tokens of a question, and of each of its answers."""

    given: list[int]
    answers: list[list[int]]

    @property
    def length(self) -> int:
        """Tokens of the question with its longest answer, whose last one is not read."""
        return len(self.given) + max(map(len, self.answers)) - 1


class ModelSource:
    """A loaded model that answers questions. Equal questions are read once.

    Args:
        chat: whether questions are put in the model's chat template, if it has one.
        batch_size: prefixes of questions that are read at a time.
        progress: whether to draw a progress bar.

    Raises:
        TypeError: if the model is not loaded.
        ValueError: if the model is an encoder-decoder, or has no tokenizer.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        name: str = "the model",
        chat: bool = True,
        batch_size: int = 16,
        progress: bool = True,
    ):
        check_type("the model", loaded, Loaded, "a loaded one, such as models.load(...)")
        if isinstance(loaded.model, T5):
            raise ValueError(f"{name} must be a decoder-only model, but is an encoder-decoder, which translates.")
        if loaded.tokenizer is None:
            raise ValueError(f"{name} has no tokenizer files, so that text cannot be turned into tokens.")
        self.name, self.loaded, self.chat = name, loaded, chat
        self.batch_size, self.progress = batch_size, progress

    def answers(self, asked: Sequence[Asked]) -> Answers:
        """Return the log-probabilities of the answers by letters and by words.

        Raises:
            ValueError: if the tokenizer splits a letter or does not know it.
            FloatingPointError: if the model computes NaN.
        """
        tokens = label_tokens(self.loaded.tokenizer, sorted({letter for each in asked for letter in each.item.letters}))
        letters = [
            Row(
                encode(self.loaded.tokenizer, each.item.question, LETTER_LEAD, chat=self.chat),
                [[tokens[letter]] for letter in each.item.letters],
            )
            for each in asked
        ]
        worded = [self.row(*words(each.item)) for each in asked]
        found = self.log_probs([*letters, *worded])
        return Answers(*(against_others(part, asked) for part in (found[: len(asked)], found[len(asked) :])))

    def row(self, prompt: str | Sequence[Mapping[str, str]], lead: str, answers: Sequence[str]) -> Row:
        """Return a question or conversation, and texts that answer it, as tokens; an answer begins with `lead`."""
        return answered_row(self.loaded.tokenizer, prompt, lead, answers, chat=self.chat)

    def log_probs(self, rows: Sequence[Row]) -> list[Float[np.ndarray, "answer"]]:
        """Return those of each row's answers, in nats; NaN where one is longer than the model's context.

        Raises:
            FloatingPointError: if the model computes NaN.
        """
        lm, params = self.loaded.model, self.loaded.params
        short = [row for row in rows if row.length <= lm.max_length]
        with on_mesh_of(params):
            found = answer_log_probs(lm, params, short, batch_size=self.batch_size, progress=self.progress)
        broken = sum(bool(np.isnan(each).any()) for each in found)
        if broken:
            raise FloatingPointError(
                f"{self.name} computes NaN for {broken} of the {len(found)} questions that fit its context."
            )
        scores = iter(found)
        return [next(scores) if row.length <= lm.max_length else np.full(len(row.answers), np.nan) for row in rows]


def against_others(
    log_probs: Sequence[Float[np.ndarray, "answer"]], asked: Sequence[Asked]
) -> Float[np.ndarray, "question 2"]:
    """Return the log-probabilities of the measured answers, and of the sums of all others.

    Args:
        log_probs: of each question's answers with the item's letters, in their order.
    """
    pairs = []
    for row, each in zip(log_probs, asked, strict=True):
        place = each.item.letters.index(each.letter)
        with np.errstate(invalid="ignore"):  # of NaN
            pairs.append([row[place], np.logaddexp.reduce(np.delete(row, place))])
    return np.asarray(pairs, float).reshape(-1, 2)


def label_tokens(tokenizer: Any, letters: Sequence[str]) -> dict[str, int]:
    """Return the token with which a model continues " (" to name each label, in one form for all of them.

    The letter as it follows " (" is tried first, then with a space before it, then both by themselves: SentencePiece
    tokenizers write the first word of a text differently from later ones.

    Raises:
        ValueError: if there is no form in which the tokenizer has each letter as one token.
    """
    for before, space in itertools.product((LETTER_LEAD, ""), ("", " ")):
        tokens = {letter: _label_token(tokenizer, before, space + letter) for letter in letters}
        if None not in tokens.values():
            return tokens
    pieces = [[tokenizer.decode([token]) for token in _plain(tokenizer, letter)] for letter in letters]
    raise ValueError(
        f"the labels {', '.join(letters)} must be one token each, all with or all without a space, but are "
        f"{', '.join(map(str, pieces))}."
    )


def _label_token(tokenizer: Any, before: str, label: str) -> int | None:
    """Return the token of a label after a text, None if it has none of its own."""
    given, joined = _plain(tokenizer, before) if before else [], _plain(tokenizer, before + label)
    tokens = joined[len(given) :]
    whole = joined[: len(given)] == given and len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id
    return tokens[0] if whole and tokenizer.decode(tokens).strip() == label.strip() else None


def _plain(tokenizer: Any, string: str) -> list[int]:
    return tokenizer(string, add_special_tokens=False)["input_ids"]


def answered_row(
    tokenizer: Any, prompt: str | Sequence[Mapping[str, str]], lead: str, answers: Sequence[str], *, chat: bool = True
) -> Row:
    """Return the tokens of a question and of each answer after `lead`; all begin where the first one differs.

    Raises:
        ValueError: if an answer has no token of its own.
    """
    given = encode(tokenizer, prompt, lead, chat=chat)
    wholes = [encode(tokenizer, prompt, lead + answer, chat=chat) for answer in answers]
    while any(whole[: len(given)] != given for whole in wholes):  # a token reaches over the seam
        given = given[:-1]
    tails = [whole[len(given) :] for whole in wholes]
    if not all(tails):
        raise ValueError(f"an answer adds no token to the question: {answers[tails.index([])]!r}.")
    return Row(given, tails)


def encode(tokenizer: Any, prompt: str | Sequence[Mapping[str, str]], lead: str, *, chat: bool = True) -> list[int]:
    """Return the tokens of a prompt in the chat template, if there is one, or as plain text, with `lead` appended.

    An EOS token that the tokenizer puts after every plain text is removed: the answer is to continue it.
    """
    if chat and tokenizer.chat_template:
        return text.encode(tokenizer, prompt, chat=True, lead=lead)
    if not isinstance(prompt, str):
        turns = [f"{SPEAKERS[message['role']]}: {message['content']}\n" for message in prompt]
        prompt = "".join(turns) + f"{SPEAKERS['assistant']}: "
    tokens = text.encode(tokenizer, prompt, lead=lead)
    return tokens[:-1] if len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id else tokens


class Reading(NamedTuple):
    """Tokens to be read for some answers of `length` tokens, the last of which is not read."""

    read: tuple[int, ...]
    length: int


class Group(NamedTuple):
    """Readings that begin alike, and how many tokens they share; each predicts its answers from later ones."""

    shared: int
    readings: list[Reading]


def answer_log_probs(
    lm: LanguageModel, params: Params, rows: Sequence[Row], *, batch_size: int = 16, progress: bool = True
) -> list[Float[np.ndarray, "answer"]]:
    """Return log p(answer | question) of each row's answers in nats, over the whole vocabulary.

        Σ_t log softmax(logits(question, answer_{<t}))[answer_t]

    A prefix that questions share, such as the biography before both orders of the options, is read once, and a question
    once for all answers that differ in the last token alone. Batches have similar lengths. At most the logits of one
    position of one batch, [batch, vocab], are held. Values do not depend on the batch, up to rounding.

    Args:
        batch_size: prefixes of questions that are read at a time.
        progress: whether to draw a progress bar.

    Raises:
        ValueError: if `batch_size` is below 1, a question has no token, or one is longer than the model's context.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but is {batch_size}.")
    for place, row in enumerate(rows, 1):
        if not row.given or row.length > lm.max_length:
            raise ValueError(
                f"question {place} must have from 1 to {lm.max_length} tokens with its answers, the model's context, "
                f"but has {row.length if row.given else 0}."
            )
    keys = [[(Reading((*row.given, *answer[:-1]), len(answer)), answer[-1]) for answer in row.answers] for row in rows]
    lasts, found = defaultdict(list), {}
    for reading, last in dict.fromkeys(itertools.chain(*keys)):
        lasts[reading].append(last)
    groups = sorted(groups_of(lasts), key=lambda group: (len(group.readings), group.shared))
    size = filled(min(batch_size, max(len(groups), 1)))
    with tqdm(total=len(lasts), unit="question", disable=not progress or runtime.is_file(), leave=False) as bar:
        for start in range(0, len(groups), size):
            found |= _score_batch(lm, params, lasts, groups[start : start + size], size)
            bar.update(sum(len(group.readings) for group in groups[start : start + size]))
    return [np.asarray([found[key] for key in row], float) for row in keys]


def groups_of(readings: Iterable[Reading]) -> list[Group]:
    """Group readings that share at least half of their tokens, at most `MOST` together."""
    found: list[Group] = []
    for reading in sorted(readings):
        unread = len(reading.read) - reading.length
        if found and len(found[-1].readings) < MOST:
            shared, others = found[-1]
            alike = itertools.takewhile(
                lambda pair: pair[0] == pair[1], zip(others[0].read, reading.read, strict=False)
            )
            shared = min(shared, unread, sum(1 for _ in alike))
            if 2 * shared >= max(len(each.read) for each in [*others, reading]):
                found[-1] = Group(shared, [*others, reading])
                continue
        found.append(Group(unread, [reading]))
    return found


def _score_batch(
    lm: LanguageModel, params: Params, lasts: Mapping[Reading, Sequence[int]], groups: list[Group], size: int
) -> dict[tuple[Reading, int], float]:
    """Read the shared prefixes, then one reading of each group at a time; return the scores of answers.

    The batch is padded to `size` groups, and a group with fewer readings repeats its last, so that shapes stay few.
    """
    found, padded = {}, groups + [groups[-1]] * (size - len(groups))
    length = _rounded(max(1, *(group.shared for group in groups)), PREFIX_BUCKET)
    longest = max(len(reading.read) - group.shared for group in groups for reading in group.readings)
    slots = _rounded(length + _rounded(longest, TAIL_BUCKET), SLOT_BUCKET)
    prefixes = [group.readings[0].read[: group.shared] for group in padded]
    cache = _read_prefix(lm, params, *text.left_pad(prefixes, length=length), slots)
    for number in range(max(len(group.readings) for group in groups)):
        chosen = [group.readings[min(number, len(group.readings) - 1)] for group in padded]
        tails = [reading.read[group.shared :] for reading, group in zip(chosen, padded, strict=True)]
        tokens, mask = text.right_pad(tails, length=_rounded(max(map(len, tails)), TAIL_BUCKET))
        time = _rounded(max(reading.length for reading in chosen), ANSWER_BUCKET)
        answers = np.full((size, max(len(lasts[reading]) for reading in chosen), time), -1)
        for row, reading in zip(answers, chosen, strict=True):
            for answer, last in zip(row, lasts[reading], strict=False):
                answer[time - reading.length :] = [*reading.read[len(reading.read) + 1 - reading.length :], last]
        scores = np.asarray(_read_answers(lm, params, cache, tokens, mask, answers))
        for row, reading in zip(scores, chosen, strict=True):
            found |= {(reading, last): score for last, score in zip(lasts[reading], row, strict=False)}
    return found


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


@functools.partial(jax.jit, static_argnames=("lm", "slots"))
def _read_prefix(
    lm: LanguageModel, params: Params, tokens: Int[Array, "group time"], mask: Bool[Array, "group time"], slots: int
) -> Cache:
    cache = lm.init_cache(tokens.shape[0], slots, dtype=params_dtype(params))
    return lm.hidden(params, tokens, cache, mask=mask)[1]


@functools.partial(jax.jit, static_argnames=("lm",))
def _read_answers(
    lm: LanguageModel,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "group time"],
    mask: Bool[Array, "group time"],
    answers: Int[Array, "group answer length"],
) -> Float[Array, "group answer"]:
    """Return the log-probabilities of answers, padded on the left by −1, whose tokens the last positions predict."""
    hidden, _ = lm.hidden(params, tokens, cache, mask=mask)
    places = mask.sum(axis=1)[:, None] - np.arange(answers.shape[-1], 0, -1)  # of the last tokens
    last = jnp.take_along_axis(hidden, places[:, :, None].clip(0), axis=1)
    answers = jnp.moveaxis(answers, -1, 0)

    def position(inputs: tuple[Array, Array]) -> Array:
        state, tokens = inputs
        return jnp.take_along_axis(log_softmax(lm.logits(params, state)), tokens, axis=-1)

    found = jax.lax.map(position, (last.swapaxes(0, 1), answers))
    return everywhere(jnp.where(answers >= 0, found, 0).sum(axis=0))
