"""Log-probabilities of texts under a language model: of completions, of several answers, of whole texts, per byte."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree
from tqdm import tqdm

from jaxrl_llm import runtime, text
from jaxrl_llm.language_model import (
    Cache,
    LanguageModel,
    Params,
    check_tokens,
    params_dtype,
    segment_starts,
    several_texts,
)
from jaxrl_llm.mesh import by_own_rows, everywhere, filled
from jaxrl_llm.numerics import host, is_concrete, log_softmax, on_device, wide
from jaxrl_llm.objectives import kl
from jaxrl_llm.objectives.logprobs import entropy, token_log_probs
from jaxrl_llm.products import summed_wide

PREFIX_BUCKET, TAIL_BUCKET, ANSWER_BUCKET, SLOT_BUCKET = 128, 32, 4, 256  # few rounded lengths, so few programs
MOST = 4  # readings that share a prefix
CHUNK_LOGITS = 2**24  # logits that are held at once: 64 MiB in float32
Out = TypeVar("Out", bound=PyTree)


class Sequences(NamedTuple):
    """Rows of tokens, padded on either side. Further axes, such as the completions of a prompt, may precede `time`."""

    tokens: Int[Array, "*batch time"]
    mask: Bool[Array, "*batch time"]  # real tokens
    completion_mask: Bool[
        Array, "*batch time"
    ]  # scored and trained on: those of the completion, with EOS; not always one run


class Packed(NamedTuple):
    """Several texts in each row, read as if each stood in a row of its own. Further axes may precede `time`."""

    tokens: Int[Array, "*batch time"]
    mask: Bool[Array, "*batch time"]
    completion_mask: Bool[Array, "*batch time"]
    segments: Int[Array, "*batch time"]  # the number of each token's text, padding included; it never falls in a row


def pad_completions(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    masks: Sequence[Sequence[bool]] | None = None,
    multiple: int = 1,
    length: int = 0,
) -> Sequences:
    """Return prompts with their completions as one batch, padded on the right.

    Args:
        prompts, completions: ragged rows of token ids, one completion a prompt.
        masks: of each completion, the tokens that count, such as the assistant's; None: all of them.
        multiple: the padded length is a multiple of it, so that few shapes are compiled.
        length: the padded length is at least this.

    Raises:
        ValueError: if there are none, prompts and completions differ in number, a completion is empty, or a mask has
            another length.
    """
    if not completions or len(prompts) != len(completions):
        raise ValueError(
            f"there must be one completion for each prompt, but there are {len(completions)} for {len(prompts)}."
        )
    if not all(map(len, completions)):
        raise ValueError(f"completion {next(i for i, row in enumerate(completions) if not len(row))} is empty.")
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    length = -(-max(length, *map(len, rows), 1) // multiple) * multiple
    tokens, mask = text.right_pad(rows, length=length)
    starts = np.asarray([*map(len, prompts)])[:, None]
    completion_mask = mask & (np.arange(length) >= starts)
    if masks is not None:
        if [*map(len, masks)] != [*map(len, completions)]:
            raise ValueError("masks must have one value for each token of the completions, but have other lengths.")
        completion_mask[completion_mask] = [each for row in masks for each in row]
    return Sequences(tokens, mask, completion_mask)


def check_sequences(lm: LanguageModel, sequences: Sequences, *, name: str = "sequences") -> None:
    """Check that each row holds tokens of the model, with a completion of at least one token after its prompt.

    Raises:
        ValueError: naming what is wrong. Under `jit` only shapes and dtypes can be read.
    """
    flat = rows_of(sequences)
    check_tokens(lm, host(flat.tokens), host(flat.mask), name=f"{name}.tokens")
    if flat.completion_mask.shape != flat.mask.shape:
        found = list(flat.completion_mask.shape)
        raise ValueError(f"{name}.completion_mask must have the shape of {name}.mask, but has {found}.")
    if not all(map(is_concrete, flat)):
        return
    scored, mask = np.asarray(flat.completion_mask), np.asarray(flat.mask)
    if (scored & ~mask).any():
        row = _first(scored & ~mask)
        raise ValueError(f"{name}.completion_mask must mark real tokens, but marks padding in row {row}.")
    if not scored.any(axis=1).all():
        raise ValueError(f"row {scored.any(axis=1).argmin()} of {name} has no completion.")
    unpreceded = scored & (np.cumsum(mask, axis=1) <= lm.min_prompt_length)
    if unpreceded.any():
        raise ValueError(
            f"row {_first(unpreceded)} of {name} has a completion without {lm.min_prompt_length} token before it."
        )


def rows_of(sequences: Sequences | Packed) -> Sequences | Packed:
    """Return the same rows along one batch axis."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), sequences)


def stacked(*parts: Sequences) -> Sequences:
    """Concatenate batches of one padded length.

    Raises:
        ValueError: if their lengths differ.
    """
    lengths = {part.tokens.shape[-1] for part in parts}
    if len(lengths) > 1:
        raise ValueError(f"sequences of one batch must have one padded length, but have {sorted(lengths)}.")
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def log_probs(
    lm: LanguageModel, params: Params, sequences: Sequences | Packed, *, temperature: float | Array = 1.0
) -> Float[Array, "batch time"]:
    """Return the log-probability of each completion token given the tokens before it, in nats; 0 elsewhere.

        log π(y_t | x, y_<t),   π = softmax(logits / temperature)

    Summed over time it is the log-probability of the completion. Logits are held for a chunk of the positions at a
    time, in the gradient too: [batch, time, vocab] is never held if it is large.
    """
    hidden = hidden_before(lm, params, sequences)
    tokens = jnp.where(sequences.completion_mask, sequences.tokens, 0)
    found = log_probs_after(lm, params, hidden, tokens, temperature=temperature)
    return jnp.where(sequences.completion_mask, found, 0)


def log_probs_after(
    lm: LanguageModel,
    params: Params,
    hidden: Float[Array, "batch time width"],
    tokens: Int[Array, "batch time"],
    *,
    temperature: float | Array = 1.0,
) -> Float[Array, "batch time"]:
    """Return the log-probability of each token under the logits of its hidden state, in nats, in the same chunks."""

    def of_chunk(held: tuple, hidden: Array, tokens: Array) -> Array:
        params, temperature = held
        return token_log_probs(lm.logits(params, hidden) / temperature, tokens)

    return by_chunks(of_chunk, lm.vocab_size, (params, temperature), hidden, tokens)


def log_probs_and_collisions(
    lm: LanguageModel, params: Params, sequences: Sequences
) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"]]:
    """Return `log_probs`, and log Σ_v π(v | x, y_<t)² at the same tokens: the mean probability of the policy's own.

    No gradient flows through the second.
    """

    def of_chunk(params: Params, hidden: Array, tokens: Array) -> tuple[Array, Array]:
        logits = lm.logits(params, hidden)
        collision = jax.nn.logsumexp(2 * log_softmax(wide(jax.lax.stop_gradient(logits))), axis=-1)
        return token_log_probs(logits, tokens), collision

    hidden = hidden_before(lm, params, sequences)
    tokens = jnp.where(sequences.completion_mask, sequences.tokens, 0)
    found = by_chunks(of_chunk, lm.vocab_size, params, hidden, tokens)
    return tuple(jnp.where(sequences.completion_mask, each, 0) for each in found)


def log_probs_and_entropy(
    lm: LanguageModel, params: Params, sequences: Sequences, *, temperature: float | Array = 1.0
) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"]]:
    """Return `log_probs`, and the entropy of each next-token distribution in nats; both 0 outside of completions."""

    def of_chunk(held: tuple, hidden: Array, tokens: Array) -> tuple[Array, Array]:
        params, temperature = held
        logits = lm.logits(params, hidden) / temperature
        return token_log_probs(logits, tokens), entropy(logits)

    hidden = hidden_before(lm, params, sequences)
    tokens = jnp.where(sequences.completion_mask, sequences.tokens, 0)
    found = by_chunks(of_chunk, lm.vocab_size, (params, temperature), hidden, tokens)
    return jax.tree.map(lambda leaf: jnp.where(sequences.completion_mask, leaf, 0), found)


def top_log_probs(
    lm: LanguageModel, params: Params, sequences: Sequences, *, k: int
) -> tuple[Int[Array, "batch time k"], Float[Array, "batch time k"]]:
    """Return the k most probable tokens at each completion token, best first, and their log-probabilities in nats.

    Outside of completions both are 0.
    """

    def of_chunk(params: Params, hidden: Array) -> tuple[Array, Array]:
        values, tokens = jax.lax.top_k(log_softmax(wide(lm.logits(params, hidden))), k)
        return tokens, values

    found = by_chunks(of_chunk, lm.vocab_size, params, hidden_before(lm, params, sequences))
    return tuple(jnp.where(sequences.completion_mask[..., None], each, 0) for each in found)


class Measures(NamedTuple):
    """Diagnostics of policy and reference for each completion token, in nats; 0 elsewhere."""

    logp_policy: Float[Array, "batch time"]
    logp_ref: Float[Array, "batch time"]
    entropy: Float[Array, "batch time"]  # of the policy's next-token distribution
    kl: Float[
        Array, "batch time"
    ]  # KL(policy‖ref) of the next-token distributions; its sum is Rao-Blackwell's estimate


def measures(
    lm: LanguageModel, params: Params, ref_params: Params, sequences: Sequences, *, temperature: float | Array = 1.0
) -> Measures:
    """Compute `log_probs` of policy and reference, and the policy's entropy and KL per token; no gradient flows."""

    def of_chunk(held: tuple, hidden: Array, hidden_ref: Array, tokens: Array) -> Measures:
        params, ref_params, temperature = held
        policy = lm.logits(params, hidden) / temperature
        ref = lm.logits(ref_params, hidden_ref) / temperature
        return Measures(
            token_log_probs(policy, tokens), token_log_probs(ref, tokens), entropy(policy), kl.exact_kl(policy, ref)
        )

    hidden, hidden_ref = (hidden_before(lm, each, sequences) for each in (params, ref_params))
    tokens = jnp.where(sequences.completion_mask, sequences.tokens, 0)
    found = by_chunks(of_chunk, lm.vocab_size, (params, ref_params, temperature), hidden, hidden_ref, tokens)
    return jax.tree.map(lambda leaf: jax.lax.stop_gradient(jnp.where(sequences.completion_mask, leaf, 0)), found)


def completion_log_probs(
    lm: LanguageModel,
    params: Params,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
    multiple: int = 32,
) -> list[Float[np.ndarray, "time"]]:
    """Return `log_probs` of ragged completions after their prompts, one array [time] each, batch by batch.

    Values do not depend on the batch, up to rounding. Rows of like length share a batch.

    Args:
        prompts, completions: rows of token ids, one completion a prompt.
        batch_size: rows of one forward pass.
        multiple: padded lengths are multiples of it, so that few shapes are compiled.

    Raises:
        ValueError: as `pad_completions` and `check_sequences`, or if `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but is {batch_size}.")
    if not len(prompts) == len(completions):
        raise ValueError(
            f"there must be one completion for each prompt, but there are {len(completions)} for {len(prompts)}."
        )
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):  # batches are of other rows
        length = len(prompt) + len(completion)
        if not len(completion):
            raise ValueError(f"completion {row} is empty.")
        if len(prompt) < lm.min_prompt_length:
            raise ValueError(f"prompt {row} is empty: this model needs at least one token to start from.")
        if length > lm.max_length:
            raise ValueError(
                f"text {row} has {length} tokens, which do not fit the model's context of {lm.max_length}."
            )
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]) + len(completions[row]))
    size = filled(min(batch_size, len(order)))
    found: list[np.ndarray] = [np.zeros(0)] * len(prompts)
    for start in range(0, len(order), size or 1):
        places = order[start : start + size]
        of_size = places + places[-1:] * (size - len(places))
        longest = max(len(prompts[row]) + len(completions[row]) for row in of_size)
        rows = pad_completions(
            [prompts[row] for row in of_size],
            [completions[row] for row in of_size],
            length=min(-(-longest // multiple) * multiple, lm.max_length),
        )
        check_sequences(lm, rows)
        values = np.asarray(compiled_log_probs(lm, params, on_device(rows)))
        for place, row, mask in zip(places, values, rows.completion_mask, strict=False):
            found[place] = row[mask]
    return found


@functools.partial(jax.jit, static_argnames=("lm",))
def compiled_log_probs(lm: LanguageModel, params: Params, sequences: Sequences) -> Float[Array, "batch time"]:
    """Return `log_probs` at temperature 1, whole on every device of a mesh."""
    return everywhere(log_probs(lm, params, sequences))


def next_token_log_probs(
    lm: LanguageModel, params: Params, tokens: Int[Array, "batch time"]
) -> Float[Array, "batch time-1"]:
    """Return the log-probability of each token but the first given those before it, in nats: rows without padding."""
    hidden, _ = lm.hidden(params, tokens[:, :-1])
    return log_probs_after(lm, params, hidden, tokens[:, 1:])


def stream_nats(
    lm: LanguageModel, params: Params, tokens: Int[np.ndarray, "total"], *, time: int, batch_size: int = 16
) -> tuple[float, int]:
    """Return the total −log p of a long token stream in nats, and the number of predicted tokens.

    The stream is cut into windows that share one token, so that every token but the first is predicted once, from at
    most `time` tokens before it.
    """
    count = len(tokens) - 1
    windows = -(-count // time)
    rows = -(-windows // batch_size) * batch_size
    index = np.arange(rows)[:, None] * time + np.arange(time + 1)
    windowed = np.asarray(tokens, np.int32)[np.minimum(index, count)]
    total = 0.0
    for start in range(0, rows, batch_size):
        batch = slice(start, start + batch_size)
        mask = jnp.asarray(index[batch, 1:] <= count)
        total += float(_masked_nats(lm, params, jnp.asarray(windowed[batch]), mask))
    return total, count


@functools.partial(jax.jit, static_argnames=("lm",))
def _masked_nats(lm: LanguageModel, params: Params, tokens: Array, mask: Array) -> Array:
    return -jnp.where(mask, next_token_log_probs(lm, params, tokens), 0.0).sum()


def bits_per_byte(total_nats: float, num_bytes: int) -> float:
    """Return the bits per byte of a text, a figure of merit that does not depend on the tokenizer.

        total_nats / (num_bytes · log 2)

    Args:
        total_nats: −Σ log p of the text's tokens.
        num_bytes: length of the text in UTF-8.

    Raises:
        ValueError: if there are no bytes.
    """
    if num_bytes < 1:
        raise ValueError(f"num_bytes must be at least 1, but is {num_bytes}.")
    return float(total_nats) / (num_bytes * math.log(2))


def hidden_before(lm: LanguageModel, params: Params, sequences: Sequences | Packed) -> Float[Array, "batch time width"]:
    """Return the hidden state that predicts each token.

    Of models that need a prompt, that of a row's first token is 0, and that of a further segment's has no meaning.

    Raises:
        ValueError: if the rows are packed and the model reads one text a row.
    """
    tokens, mask = sequences.tokens, sequences.mask
    segments = sequences.segments if isinstance(sequences, Packed) else None
    if lm.min_prompt_length:
        texts = several_texts(lm, None if segments is None else segments[:, :-1])
        hidden, _ = lm.hidden(params, tokens[:, :-1], mask=mask[:, :-1], **texts)
        return jnp.pad(hidden, ((0, 0), (1, 0), (0, 0)))
    before = ((0, 0), (1, 0))  # padding has the state of the tokens before it; without any, that of the empty prefix
    tokens, mask = jnp.pad(tokens[:, :-1], before), jnp.pad(mask[:, :-1], before)
    if segments is not None:
        mask &= ~segment_starts(segments)  # the first token of a segment follows none
    hidden, _ = lm.hidden(params, tokens, mask=mask, **several_texts(lm, segments))
    return hidden


def by_text(
    per_token: Float[Array, "batch row time"], packed: Packed, *, count: int
) -> Float[Array, "batch text time"]:
    """Return the values of the texts 0 to count − 1 of each batch, each text in a row of its own, padded by 0.

    Args:
        packed: leaves [batch, row, time]; the rows of a batch number their texts together, and a text is in one row.
    """
    batch, _, time = per_token.shape
    first = jnp.where(segment_starts(rows_of(packed).segments), jnp.arange(time), 0)
    place = jnp.arange(time) - jax.lax.cummax(first, axis=1).reshape(per_token.shape)
    found = jnp.zeros((batch, count, time), per_token.dtype)
    return found.at[jnp.arange(batch)[:, None, None], packed.segments, place].add(per_token, mode="drop")


def by_chunks(function: Callable[..., Out], vocab_size: int, held: PyTree, *arrays: Array) -> Out:
    """Apply `function(held, *chunk)` to arrays [batch, time, ...], a chunk of positions at a time if logits are many.

    Intermediates, such as logits, are recomputed for the gradient and never held for all positions. On a mesh each
    device goes over its own rows, so that an unembedding in parts is gathered once, not for every chunk.

    Args:
        held: what the function reads of every chunk, such as parameters.
    """

    def of_rows(held: PyTree, *arrays: Array) -> Out:
        batch, time = arrays[0].shape[:2]
        size = max(1, CHUNK_LOGITS // max(1, batch * vocab_size))
        if size >= time:
            return function(held, *arrays)
        chunks = -(-time // size)
        size = -(-time // chunks)  # of even sizes

        def cut(array: Array) -> Array:
            padding = [(0, 0)] * array.ndim
            padding[1] = (0, chunks * size - time)
            return jnp.moveaxis(jnp.pad(array, padding).reshape(batch, chunks, size, *array.shape[2:]), 1, 0)

        summed, as_it_was = summed_wide(held)

        def of_chunk(parts: tuple[Array, ...]) -> Out:
            return function(as_it_was(summed), *parts)

        found = jax.lax.map(jax.checkpoint(of_chunk), tuple(map(cut, arrays)))
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(batch, chunks * size)[:, :time], found)

    return by_own_rows(of_rows, held, *arrays)


def _first(marked: Bool[np.ndarray, "batch time"]) -> int:
    return int(marked.any(axis=1).argmax())


# Several answers of each question, of which many begin alike.


class Choices(NamedTuple):
    """The tokens of a question, and of each of its answers, which are scored against each other."""

    given: list[int]
    answers: list[list[int]]

    @property
    def length(self) -> int:
        """Tokens of the question with its longest answer, whose last one is not read."""
        return len(self.given) + max(map(len, self.answers)) - 1


class Reading(NamedTuple):
    """Tokens to be read for some answers of `length` tokens, the last of which is not read."""

    read: tuple[int, ...]
    length: int


class Group(NamedTuple):
    """Readings that begin alike, and how many tokens they share; each predicts its answers from later ones."""

    shared: int
    readings: list[Reading]


def answer_log_probs(
    lm: LanguageModel, params: Params, rows: Sequence[Choices], *, batch_size: int = 16, progress: bool = True
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
