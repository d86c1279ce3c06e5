"""Sampling and greedy generation as one compiled scan, whole or in pieces."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxrl_llm import text
from jaxrl_llm.decoding import core
from jaxrl_llm.decoding.constraints import StopStrings
from jaxrl_llm.decoding.core import Generation, Guidance, Request
from jaxrl_llm.decoding.transforms import Transform, update_alive
from jaxrl_llm.language_model import Cache, LanguageModel, Params
from jaxrl_llm.mesh import everywhere
from jaxrl_llm.numerics import log_softmax, wide
from jaxrl_llm.objectives.logprobs import token_log_probs


def generate(
    lm: LanguageModel,
    params: Params,
    prompts: Int[Array, "batch prompt"] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Int[Array, "batch"],
    transform: Transform | Sequence[Transform] | None = None,
    greedy: bool = False,
    key: Key[Array, "*#batch"] | None = None,
    prompt_mask: Bool[Array, "batch prompt"] | None = None,
    eos_id: int | Sequence[int] | Int[Array, "*eos"] | None = None,
    pad_id: int | Int[Array, ""] = 0,
    stop: StopStrings | None = None,
    guidance: Guidance | None = None,
    n: int = 1,
) -> Generation:
    """Continue each prompt by up to `max_new_tokens` tokens, drawn from the model or greedily.

    One compiled program serves all temperatures, keys, prompts and numbers of tokens of a bucket (prompts: the next
    power of two, at least 16; new tokens: the next multiple of 16). When all rows have ended it stops computing.

    Args:
        prompts: an array of token ids, with a mask where it is padded; or lists of ids, of any lengths.
        max_new_tokens: for all rows, or for each. The longest is what the program is compiled for.
        transform: changes the logits before a token is chosen (`jaxrl_llm.decoding.transforms`); several in a sequence
            are applied in their order.
        greedy: take the most probable token; no key is needed then.
        key: one key, from which each row derives its own by its index, or one key for each row. A row's tokens depend
            on its prompt and its key alone, not on the batch, the padding or the bucket, as far as rounding lets them:
            in bfloat16 the logits of other batch sizes differ by about 0.01, which can flip near-ties.
        prompt_mask: false at padding, which may stand on the left, on the right or between.
        eos_id: the token, or any of the tokens, that ends a row.
        pad_id: the token after a row's end.
        stop: strings that end a row when its new text contains one (`decoding.stop_strings`); the token that completes
            one is the row's last. `MinLength(n, ...)` holds them back: text before the n-th token is not searched.
        guidance: a second prompt for every row, and how far to move away from what follows it (classifier-free
            guidance). `logp` stays that of the first prompt.
        n: completions of each prompt, which are adjacent rows of the result. A prompt is read once. What is given for
            each row (limits, keys, numbers of transforms) is given for batch · n rows.

    Raises:
        ValueError: for shapes, dtypes and token ids that do not fit, a prompt that is empty (where the model has no
            root state) or leaves no room in the model's context, or a missing key.
        FloatingPointError: if the model's logits are NaN, or no token is possible. (Under an outer `jit` values cannot
            be read: there `logp` is not finite from that token on.)
    """
    request = core.request(
        lm, prompts, prompt_mask, max_new_tokens=max_new_tokens, transform=transform, greedy=greedy, key=key,
        eos_id=eos_id, pad_id=pad_id, stop=stop, guidance=guidance, n=n,
    )  # fmt: skip
    length = core.longest(max_new_tokens)
    return core.check_generation(jax.tree.map(lambda leaf: leaf[:, :length], decode(lm, params, request)))


def stream(
    lm: LanguageModel,
    params: Params,
    prompts: Int[Array, "batch prompt"] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Int[Array, "batch"],
    tokens_at_a_time: int = 8,
    transform: Transform | Sequence[Transform] | None = None,
    greedy: bool = False,
    key: Key[Array, "*#batch"] | None = None,
    prompt_mask: Bool[Array, "batch prompt"] | None = None,
    eos_id: int | Sequence[int] | Int[Array, "*eos"] | None = None,
    pad_id: int | Int[Array, ""] = 0,
    stop: StopStrings | None = None,
    guidance: Guidance | None = None,
    memory: Memory | None = None,
) -> Iterator[Generation]:
    """The tokens of `generate`, as soon as they are known: the first, then pieces of `tokens_at_a_time`.

    The other arguments are those of `generate`. They are checked now; tokens are generated when asked for.

    Args:
        memory: what was read in earlier calls with this model. Of a prompt that begins with it only the rest is read.

    Raises:
        ValueError: as `generate`; or for a memory with several prompts or with guidance.
    """
    core.check_size("tokens_at_a_time", tokens_at_a_time, 1)
    request = core.request(
        lm, prompts, prompt_mask, max_new_tokens=max_new_tokens, transform=transform, greedy=greedy, key=key,
        eos_id=eos_id, pad_id=pad_id, stop=stop, guidance=guidance,
    )  # fmt: skip
    if memory is not None and request.prompts.shape[0] != 1:
        raise ValueError("a memory is of one text: prompts must be a single one, and guidance None.")
    return _pieces(lm, params, request, core.longest(max_new_tokens), tokens_at_a_time, memory)


class Memory:
    """The cache of one text that grows, such as a conversation, kept between two calls of `stream`.

    The next call reads the tokens after those in the cache. It reads the whole text anew if the text does not begin
    with them, or if the cache has no room for it.
    """

    def __init__(self):
        self.tokens: list[int] = []  # those that the cache holds
        self._cache: Cache | None = None

    def begin(self, lm: LanguageModel, params: Params, request: Request) -> tuple[State, Generation]:
        """Read what is new of the prompt, and choose the first token. The cache is lent until `keep`."""
        prompt = _tokens(request.prompts, request.mask)
        known, cache, self.tokens, self._cache = self.tokens, self._cache, [], None
        rest = prompt[len(known) :]
        bucket = core.prompt_bucket(len(rest))
        held = cache is not None and rest and prompt[: len(known)] == known
        if held and int(cache.length) + bucket + request.num_steps <= cache.max_length:
            tokens, mask = text.left_pad([rest], length=bucket)
            return _continue_jit(lm, params, request, cache, tokens, mask)
        num_slots = request.prompts.shape[1] + request.num_steps
        if held:
            num_slots = core.prompt_bucket(num_slots + bucket + request.num_steps)  # with room for a turn like this
        return _begin_jit(lm, params, request, num_slots=num_slots)

    def keep(self, cache: Cache, tokens: Sequence[int]) -> None:
        """Keep a cache, which holds the first of these tokens: the last ones may not have been fed to the model."""
        self.tokens, self._cache = list(tokens[: int(cache.valid.sum())]), cache


def _pieces(
    lm: LanguageModel, params: Params, request: Request, length: int, tokens_at_a_time: int, memory: Memory | None
) -> Iterator[Generation]:
    if memory is None:
        num_slots = request.prompts.shape[1] + request.num_steps
        state, first = _begin_jit(lm, params, request, num_slots=num_slots)
    else:
        state, first = memory.begin(lm, params, request)
    pieces = [jax.tree.map(lambda leaf: np.asarray(leaf)[:, None], first)]
    yield core.check_generation(pieces[0])
    for start in range(1, length, tokens_at_a_time):
        if bool(state.done.all()):
            break
        state, piece = advance_jit(lm, params, state, request, num_steps=tokens_at_a_time)
        pieces.append(jax.tree.map(lambda leaf, count=length - start: np.asarray(leaf)[:, :count], piece))
        yield core.check_generation(pieces[-1], start=start)
    if memory is not None:
        memory.keep(state.cache, [*_tokens(request.prompts, request.mask), *_tokens(*_joined(pieces))])


def _joined(pieces: Sequence[Generation]) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.concatenate([getattr(each, name) for each in pieces], axis=1) for name in ("tokens", "mask"))


def _tokens(tokens: Array, mask: Array) -> list[int]:
    """The tokens of a single row."""
    return np.asarray(tokens)[np.asarray(mask)].tolist()


@core.result
class State:
    """The state between two steps: the last token of each row is emitted, and not yet fed to the model."""

    cache: Cache
    token: Int[Array, "batch"]
    fed: Bool[Array, "batch"]  # true if that token will count in the cache
    done: Bool[Array, "batch"]
    time: Int[Array, "*#batch"]  # tokens emitted so far
    transform: PyTree[Array]  # the state of the transform
    stop: Int[Array, "batch"] | None  # how far each row is into a stop string


@functools.partial(jax.jit, static_argnames="lm")
def decode(lm: LanguageModel, params: Params, request: Request) -> Generation:
    """The compiled part of `generate`."""
    state, first = begin(lm, params, request, num_slots=request.prompts.shape[1] + request.num_steps)
    _, rest = advance(lm, params, state, request, num_steps=request.num_steps)
    return everywhere(jax.tree.map(lambda head, tail: jnp.concatenate([head[:, None], tail], axis=1), first, rest))


def begin(lm: LanguageModel, params: Params, request: Request, *, num_slots: int) -> tuple[State, Generation]:
    """Read the prompts, unembed their last tokens, and choose the first token of each row."""
    prompt = core.prefill(lm, params, request, num_slots=num_slots)
    return start(request, lm.logits(params, prompt.last), prompt.cache)


def _continue(
    lm: LanguageModel, params: Params, request: Request, cache: Cache, tokens: Array, mask: Array
) -> tuple[State, Generation]:
    """Read the rest of the prompts, whose first tokens are in the cache, and choose the first token of each row."""
    prompt = core.read(lm, params, cache, tokens, mask)
    return start(request, lm.logits(params, prompt.last), prompt.cache)


def start(request: Request, logits: Float[Array, "rows vocab"], cache: Cache) -> tuple[State, Generation]:
    """Choose the first token of each row, whose prompt the cache holds."""
    batch = request.limits.shape[0]
    state = State(
        cache=cache,
        token=jnp.zeros(batch, jnp.int32),
        fed=jnp.zeros(batch, bool),
        done=jnp.zeros(batch, bool),
        time=jnp.zeros((), jnp.int32),
        transform=request.initial_state(),
        stop=None if request.stop is None else request.stop.start(batch),
    )
    state, first = choose(request, logits, state)
    return state, everywhere(first)


def advance(
    lm: LanguageModel, params: Params, state: State, request: Request, *, num_steps: int
) -> tuple[State, Generation]:
    """Generate up to `num_steps` more tokens, until all rows have ended."""
    one = functools.partial(step, lm, params, request)
    state, emitted = core.run_blocks(one, state, lambda state: ~state.done.all(), num_steps=num_steps)
    return state, everywhere(core.by_row(request, emitted))


def step(lm: LanguageModel, params: Params, request: Request, state: State) -> tuple[State, Generation]:
    """Feed the last token of each row to the model, and choose the next one."""
    copies = 1 if request.guidance_scale is None else 2
    token, fed = jnp.tile(state.token, copies), jnp.tile(state.fed, copies)
    hidden, cache = lm.hidden(params, token[:, None], state.cache, mask=fed[:, None])
    return choose(request, lm.logits(params, hidden[:, 0]), dataclasses.replace(state, cache=cache))


def choose(request: Request, logits: Float[Array, "rows vocab"], state: State) -> tuple[State, Generation]:
    """Choose the next token of each row."""
    logits, guided = _guide(wide(logits), request.guidance_scale)
    warped = request.transform.apply(state.transform, guided)
    if request.keys is None:
        token, logp_sampler = core.greedy(warped), core.greedy_log_prob(warped)
    else:
        time = jnp.broadcast_to(state.time, request.limits.shape)
        token = core.sample(jax.vmap(jax.random.fold_in)(request.keys, time), warped)
        logp_sampler = token_log_probs(warped, token)
    emitted, done = core.emit(request, logits, token, logp_sampler, state.done, state.time)
    stop = state.stop
    if stop is not None:
        searched = emitted.mask & request.transform.may_end(state.transform)
        stop = jnp.where(searched, request.stop.advance(stop, token), stop)
        done |= request.stop.reached(stop)
    after = update_alive(request.transform, state.transform, token, guided, emitted.mask)
    return State(state.cache, emitted.tokens, emitted.mask, done, state.time + 1, after, stop), emitted


def _guide(
    logits: Float[Array, "rows vocab"], scale: Float[Array, "batch"] | None
) -> tuple[Float[Array, "batch vocab"], Float[Array, "batch vocab"]]:
    """The model's own logits z of each row, and those under guidance, with the same zero.

    z + (s − 1)(log p − log p_u)               (Ho and Salimans 2022; Sanchez et al. 2023, eq. 7)
    """
    if scale is None:
        return logits, logits
    own, unguided = jnp.split(logits, 2)
    scale = scale[:, None]
    # A token that either excludes is excluded, since −inf has no multiples; but scale 1 ignores the second prompt.
    possible = (own > -jnp.inf) & (unguided > -jnp.inf)
    away = jnp.where(possible, log_softmax(own), 0) - jnp.where(possible, log_softmax(unguided), 0)
    guided = jnp.where(possible, own + (scale - 1) * away, -jnp.inf)
    return own, jnp.where(scale == 1, own, guided)


_begin_jit = functools.partial(jax.jit, static_argnames=("lm", "num_slots"))(begin)
_continue_jit = functools.partial(jax.jit, static_argnames="lm", donate_argnames="cache")(_continue)
advance_jit = functools.partial(jax.jit, static_argnames=("lm", "num_steps"), donate_argnames="state")(advance)
