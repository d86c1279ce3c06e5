"""Speculative decoding: cheap drafts, judged together by the target in one call; the target's distribution is kept."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxrl_llm.decoding import core
from jaxrl_llm.decoding.constraints import StopStrings
from jaxrl_llm.decoding.core import Generation, Request
from jaxrl_llm.decoding.generate import begin
from jaxrl_llm.decoding.transforms import Transform, as_transform, update_alive
from jaxrl_llm.language_model import Cache, LanguageModel, Params
from jaxrl_llm.mesh import everywhere
from jaxrl_llm.numerics import is_concrete, wide
from jaxrl_llm.objectives.logprobs import token_log_probs


@core.result
class Speculation:
    """The generation, and the counts of drafts and rounds of each row.

    In a round a row has up to `num_draft` drafts; they are judged one after the other up to the first rejected one.
    Drafts for which a row has no room, or after its end, are not counted. The first token needs no round.
    """

    generation: Generation
    accepted: Int[Array, "batch"]  # drafts that became tokens
    judged: Int[Array, "batch"]  # drafts that were accepted or rejected
    drafted: Int[Array, "batch"]  # drafts made, among them those after a rejected one
    rounds: Int[Array, "batch"]  # calls of the target

    @property
    def acceptance_rate(self) -> Float[Array, ""]:
        """Accepted among judged drafts of all rows: α of Leviathan et al. (2023); NaN if none was judged.

        If every draft were accepted with this probability, a round of γ drafts would yield (1 − α^(γ+1)) / (1 − α)
        tokens (their eq. 1).
        """
        return self.accepted.sum() / self.judged.sum()


def speculative_generate(
    lm: LanguageModel,
    params: Params,
    prompts: Int[Array, "batch prompt"] | Sequence[Sequence[int]],
    *,
    draft: Draft,
    num_draft: int = 4,
    max_new_tokens: int | Int[Array, "batch"],
    transform: Transform | Sequence[Transform] | None = None,
    greedy: bool = False,
    key: Key[Array, "*#batch"] | None = None,
    prompt_mask: Bool[Array, "batch prompt"] | None = None,
    eos_id: int | Sequence[int] | Int[Array, "*eos"] | None = None,
    pad_id: int | Int[Array, ""] = 0,
    stop: StopStrings | None = None,
) -> Speculation:
    """Continue each prompt as `generate` does, with fewer calls of the model (Leviathan et al. 2023; Chen et al. 2023).

    In a round, `num_draft` tokens are proposed. The target scores all of them in one call, accepts some, and draws one
    more. The tokens follow the target's distribution after `transform`, whatever the drafts are; greedy ones are those
    of `generate`. (Sampled ones are not the draws of `generate` for the same key.)

    Args:
        draft: what proposes tokens: `DraftModel(lm, params)`, a cheaper model of the same vocabulary, or
            `PromptLookup(ngram)`, the row's own text.
        num_draft: drafts of a round. It is compiled in; the cache has room for rounds that accept none.
        transform: changes the target's logits. A draft model has a transform of its own.

    The other arguments, and what makes programs compile, are those of `generate`.

    Raises:
        ValueError: for a draft that does not fit the target, `num_draft` below 1, and for what `generate` refuses.
        FloatingPointError: if the target's or the draft model's logits are NaN, or no token is possible. (Under an
            outer `jit` the check for broken draft logits is skipped.)
    """
    if not isinstance(draft, Draft):
        raise ValueError(f"draft must be a DraftModel or a PromptLookup, but is {draft!r}.")
    num_draft = core.check_size("num_draft", num_draft, 1)
    request = core.request(
        lm, prompts, prompt_mask, max_new_tokens=max_new_tokens, transform=transform, greedy=greedy, key=key,
        eos_id=eos_id, pad_id=pad_id, stop=stop,
    )  # fmt: skip
    draft.check(lm, request)
    speculation, broken = decode(lm, params, request, draft, num_draft=num_draft)
    if is_concrete(broken) and broken.any():
        row = int(np.argmax(broken))
        raise FloatingPointError(f"the draft model's logits are NaN, +inf, or all −inf in row {row}.")
    length = core.longest(max_new_tokens)
    found = jax.tree.map(lambda leaf: leaf[:, :length], speculation.generation)
    return dataclasses.replace(speculation, generation=core.check_generation(found))


# Drafts ---------------------------------------------------------------------------------------------------------------


class Drafts(NamedTuple):
    """Tokens proposed after the last one of each row, and the distribution q that each was drawn from."""

    tokens: Int[Array, "batch draft"]
    probs: Float[Array, "batch draft vocab"] | None  # None: point masses
    exists: Bool[Array, "batch draft"]  # a row may have fewer drafts: the first ones of it exist
    broken: Bool[Array, "batch draft"]  # the draft model's logits were NaN, or left no token


@runtime_checkable
class Draft(Protocol):
    """Proposes tokens. It is a pytree; its state does not contain the last token of each row yet."""

    def check(self, lm: LanguageModel, request: Request) -> None:
        """Raise ValueError if it cannot draft for this target and request."""

    def init(self, request: Request, *, num_slots: int) -> PyTree[Array]:
        """The state after the prompts; `num_slots` are enough for all that is read, rejected drafts too."""

    def propose(
        self,
        state: PyTree[Array],
        keys: Key[Array, "batch"] | None,
        token: Int[Array, "batch"],
        alive: Bool[Array, "batch"],
        room: Int[Array, "batch"],
        *,
        num_draft: int,
    ) -> tuple[Drafts, PyTree[Array]]:
        """Drafts after `token`, the last one of each row, and what `settle` needs.

        Args:
            keys: None if greedy.
            room: the number of tokens that each row may still have.
        """

    def settle(
        self, state: PyTree[Array], trail: PyTree[Array], drafts: Drafts, accepted: Int[Array, "batch"]
    ) -> PyTree[Array]:
        """The state after a round in which the first `accepted` drafts of each row were kept."""


@core.result
class ModelState:
    """The state of a draft model. It has not read the last draft of the previous round either, if that was kept."""

    cache: Cache
    transform: PyTree[Array]  # the state of its transform, before the last token
    logits: (
        Float[Array, "batch vocab"] | None
    )  # those that the last token was chosen from, for a transform with a state
    skipped: Int[Array, "batch"]  # the last draft of the previous round
    skipped_counts: Bool[Array, "batch"]  # whether it was accepted


@core.result
class ModelTrail:
    """The caches and states of a round of drafting, from which `settle` rewinds."""

    cache: Cache
    transform: PyTree[Array]  # [draft + 1, batch, ...]: the states before each draft, and after the last
    logits: Float[Array, "draft batch vocab"] | None
    read: Int[Array, "batch time"]  # the tokens that were read
    counts: Bool[Array, "batch time"]  # which of them count if all drafts are kept


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftModel:
    """Drafts of a cheaper model of the same vocabulary.

    Args:
        transform: changes the draft model's logits; it may be another than the target's.
    """

    lm: LanguageModel = dataclasses.field(metadata={"static": True})
    params: Params
    transform: Transform | Sequence[Transform] | None = None

    def check(self, lm: LanguageModel, request: Request) -> None:
        if self.lm.vocab_size != lm.vocab_size:
            raise ValueError(
                f"the draft model must share the target's vocabulary of {lm.vocab_size} tokens, "
                f"but has {self.lm.vocab_size}."
            )
        if is_concrete(request.limits):
            as_transform(self.transform).check(np.asarray(request.limits))
            core.check_room(self.lm, request.mask, np.asarray(request.limits))

    def init(self, request: Request, *, num_slots: int) -> ModelState:
        prompt, batch = core.prefill(self.lm, self.params, request, num_slots=num_slots), request.limits.shape[0]
        state = dataclasses.replace(request, transform=as_transform(self.transform)).initial_state()
        logits = wide(self.lm.logits(self.params, prompt.last)) if jax.tree.leaves(state) else None
        return ModelState(prompt.cache, state, logits, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool))

    def propose(
        self,
        state: ModelState,
        keys: Key[Array, "batch"] | None,
        token: Int[Array, "batch"],
        alive: Bool[Array, "batch"],
        room: Int[Array, "batch"],
        *,
        num_draft: int,
    ) -> tuple[Drafts, ModelTrail]:
        """Draft in `num_draft` calls of the model. The first reads what is not read yet; the last draft is not read."""
        transform = as_transform(self.transform)
        read = jnp.stack([state.skipped, token], axis=1)
        counts = jnp.stack([state.skipped_counts & alive, alive], axis=1)
        hidden, cache = self.lm.hidden(self.params, read, state.cache, mask=counts)
        logits, followed = wide(self.lm.logits(self.params, hidden[:, 1])), state.logits
        if followed is not None:
            followed = jnp.where(counts[:, :1], wide(self.lm.logits(self.params, hidden[:, 0])), followed)
        here = update_alive(transform, state.transform, token, followed, alive)

        def choose(logits: Array, here: PyTree, index: Array) -> tuple[PyTree, tuple]:
            token, probs, broken = _draw(transform.apply(here, logits), keys, index)
            fed = alive & (index + 1 < room)  # no row reads beyond its room
            trail = (here, None if followed is None else logits)
            return update_alive(transform, here, token, logits, fed), (token, probs, broken, fed, trail)

        def step(carry: tuple[Cache, Array, PyTree], index: Array) -> tuple[tuple, tuple]:
            cache, logits, here = carry
            here, chosen = choose(logits, here, index)
            hidden, cache = self.lm.hidden(self.params, chosen[0][:, None], cache, mask=chosen[3][:, None])
            return (cache, wide(self.lm.logits(self.params, hidden[:, 0])), here), chosen

        (cache, logits, here), chosen = jax.lax.scan(step, (cache, logits, here), jnp.arange(num_draft - 1))
        after, last = choose(logits, here, jnp.asarray(num_draft - 1))
        chosen = jax.tree.map(lambda many, one: jnp.concatenate([many, one[None]]), chosen, last)
        columns, (states, logits) = chosen[:4], chosen[4]
        tokens, probs, broken, fed = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), columns)
        states = jax.tree.map(lambda many, one: jnp.concatenate([many, one[None]]), states, after)
        exists = alive[:, None] & (jnp.arange(num_draft) < room[:, None])
        exists &= jnp.cumsum(broken, axis=1) == 0
        read = jnp.concatenate([read, tokens[:, :-1]], axis=1)
        counts = jnp.concatenate([counts, fed[:, :-1]], axis=1)
        return Drafts(tokens, probs, exists, broken), ModelTrail(cache, states, logits, read, counts)

    def settle(self, state: ModelState, trail: ModelTrail, drafts: Drafts, accepted: Int[Array, "batch"]) -> ModelState:
        num_draft, rows = drafts.tokens.shape[1], jnp.arange(accepted.shape[0])
        order = jnp.arange(-1, num_draft)  # of what was read: the skipped draft, the last token, then the drafts
        kept = trail.counts & (order <= accepted[:, None])
        return ModelState(
            cache=rewind(self.lm, self.params, state.cache, trail.cache, trail.read, kept),
            transform=jax.tree.map(lambda leaf: leaf[accepted, rows], trail.transform),
            logits=None if trail.logits is None else trail.logits[jnp.minimum(accepted, num_draft - 1), rows],
            skipped=drafts.tokens[:, -1],
            skipped_counts=accepted == num_draft,
        )


def _draw(
    warped: Float[Array, "batch vocab"], keys: Key[Array, "batch"] | None, index: Int[Array, ""]
) -> tuple[Int[Array, "batch"], Float[Array, "batch vocab"] | None, Bool[Array, "batch"]]:
    """A token of each row, its distribution, and true if there was none."""
    broken = ~jnp.isfinite(warped.max(axis=-1))
    if keys is None:
        return core.greedy(warped), None, broken
    token = core.sample(jax.vmap(lambda key: jax.random.fold_in(key, index))(keys), warped)
    return token, jax.nn.softmax(warped, axis=-1), broken


@core.result
class History:
    """The tokens of each row, of the prompt and new ones, from the left and without gaps."""

    tokens: Int[Array, "batch slot"]
    length: Int[Array, "batch"]

    def append(self, tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"]) -> History:
        """The history with the tokens of the mask appended; these are at the left."""
        rows, slots = jnp.arange(tokens.shape[0])[:, None], self.length[:, None] + jnp.arange(tokens.shape[1])
        slots = jnp.where(mask, slots, self.tokens.shape[1])
        written = self.tokens.at[rows, slots].set(tokens, mode="drop")
        return History(written, self.length + mask.sum(axis=1, dtype=jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """Drafts from the row's own text: the tokens after an earlier occurrence of the last tokens, up to `ngram` of them.

    It takes the latest of the places with the longest common suffix. Where the drafts reach the end of the text, they
    continue into themselves, so that a loop goes on. A row whose last token did not occur before has no drafts. `ngram`
    is compiled in.
    """

    ngram: int = dataclasses.field(default=3, metadata={"static": True})

    def check(self, lm: LanguageModel, request: Request) -> None:
        core.check_size("ngram", self.ngram, 1)

    def init(self, request: Request, *, num_slots: int) -> History:
        prompts, mask = request.prompts, request.mask
        tokens = jnp.take_along_axis(prompts, jnp.argsort(~mask, axis=1, stable=True), axis=1)
        return History(jnp.pad(tokens, ((0, 0), (0, request.num_steps + 1))), mask.sum(axis=1, dtype=jnp.int32))

    def propose(
        self,
        state: History,
        keys: Key[Array, "batch"] | None,
        token: Int[Array, "batch"],
        alive: Bool[Array, "batch"],
        room: Int[Array, "batch"],
        *,
        num_draft: int,
    ) -> tuple[Drafts, History]:
        history = state.append(token[:, None], alive[:, None])
        tokens, last = history.tokens, history.length - 1
        place = jnp.arange(tokens.shape[1])
        same, common = jnp.ones(tokens.shape, bool), jnp.zeros(tokens.shape, jnp.int32)
        for back in range(min(self.ngram, tokens.shape[1])):
            wanted = jnp.take_along_axis(tokens, jnp.maximum(last - back, 0)[:, None], axis=1)
            shifted = jnp.pad(tokens, ((0, 0), (back, 0)))[:, : tokens.shape[1]]
            same &= (shifted == wanted) & (place >= back) & (last >= back)[:, None]
            common += same
        common = jnp.where(place < last[:, None], common, 0)
        longest = common.max(axis=1, keepdims=True)
        found = jnp.where((common == longest) & (longest > 0), place, -1).max(axis=1)
        period = jnp.maximum(last - found, 1)[:, None]
        slots = jnp.maximum(found, 0)[:, None] + 1 + jnp.arange(num_draft) % period
        follow = jnp.take_along_axis(tokens, slots, axis=1)
        exists = (alive & (found >= 0))[:, None] & (jnp.arange(num_draft) < room[:, None])
        return Drafts(follow, None, exists, jnp.zeros(follow.shape, bool)), history

    def settle(self, state: History, trail: History, drafts: Drafts, accepted: Int[Array, "batch"]) -> History:
        return trail.append(drafts.tokens, jnp.arange(drafts.tokens.shape[1]) < accepted[:, None])


# Acceptance -----------------------------------------------------------------------------------------------------------


def acceptance_probability(
    p: Float[Array, "... vocab"], q: Float[Array, "... vocab"], token: Int[Array, "..."]
) -> Float[Array, "..."]:
    """min(1, p(x) / q(x)) for a draft x ~ q (Leviathan et al. 2023, section 2.3); 0 where q(x) = 0: no draft was made.

    With `residual` for what is rejected, Σ_x q(x) [a(x) δ_x + (1 − a(x)) residual] = p.
    """
    p, q = (jnp.take_along_axis(probs, token[..., None], axis=-1)[..., 0] for probs in (p, q))
    return jnp.where(q > 0, jnp.minimum(p / jnp.where(q > 0, q, 1), 1), 0)


def residual(p: Float[Array, "... vocab"], q: Float[Array, "... vocab"]) -> Float[Array, "... vocab"]:
    """max(p − q, 0), normalised: the distribution of the token that replaces a rejected draft.

    It is p if q = 0, or if rounding leaves nothing of the difference. (Leviathan et al. 2023, section 2.3.)
    """
    excess = jnp.maximum(p - q, 0)
    total = excess.sum(axis=-1, keepdims=True)
    return jnp.where(total > 0, excess / jnp.where(total > 0, total, 1), p)


def verify(
    keys: Key[Array, "batch"],
    drafts: Int[Array, "batch draft"],
    p: Float[Array, "batch draft+1 vocab"],
    q: Float[Array, "batch draft vocab"],
) -> tuple[Int[Array, "batch"], Int[Array, "batch"]]:
    """The number of drafts of each row that are accepted, and the token after them.

    Args:
        p: the target's distribution before each draft, and after the last.
        q: the distribution that each draft was drawn from; all 0 where there is no draft.
    """
    pairs = jax.vmap(jax.random.split)(keys)
    accepts = core.bernoulli(pairs[:, 0], acceptance_probability(p[:, :-1], q, drafts))
    accepted = jnp.cumprod(accepts, axis=1, dtype=jnp.int32).sum(axis=1, dtype=jnp.int32)
    q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))  # after the last draft nothing is subtracted
    p, q = (jnp.take_along_axis(probs, accepted[:, None, None], axis=1)[:, 0] for probs in (p, q))
    return accepted, core.sample(pairs[:, 1], jnp.log(residual(p, q)))


def verify_greedy(
    drafts: Int[Array, "batch draft"], exists: Bool[Array, "batch draft"], best: Int[Array, "batch draft+1"]
) -> tuple[Int[Array, "batch"], Int[Array, "batch"]]:
    """`verify` for a greedy target: drafts are accepted while they are its `best` tokens."""
    accepted = jnp.cumprod((drafts == best[:, :-1]) & exists, axis=1, dtype=jnp.int32).sum(axis=1, dtype=jnp.int32)
    return accepted, jnp.take_along_axis(best, accepted[:, None], axis=1)[:, 0]


# Caches that are rewound ----------------------------------------------------------------------------------------------


@functools.cache
def caches_by_slot(lm: LanguageModel) -> bool:
    """True if a model caches everything in slots, so that a token is forgotten when its slot is not valid.

    It compares the shapes of two caches: a leaf that does not grow with the slots is a running state.
    """
    short, long = (jax.tree.leaves(jax.eval_shape(lambda n=n: lm.init_cache(0, n)).memory) for n in (2, 3))
    return all(one.shape != other.shape for one, other in zip(short, long, strict=True))


def rewind(
    lm: LanguageModel,
    params: Params,
    before: Cache,
    after: Cache,
    tokens: Int[Array, "batch time"],
    kept: Bool[Array, "batch time"],
) -> Cache:
    """The cache `after` the tokens were appended to `before`, in which only those `kept` count.

    Slots are made invalid. A model with a running state reads the tokens that are kept once more.
    """
    if not caches_by_slot(lm):
        return lm.hidden(params, tokens, before, mask=kept)[1]
    window = jax.lax.dynamic_slice_in_dim(after.valid, before.length, kept.shape[1], axis=1)
    valid = jax.lax.dynamic_update_slice_in_dim(after.valid, window & kept, before.length, axis=1)
    return dataclasses.replace(after, valid=valid)


# Rounds ---------------------------------------------------------------------------------------------------------------


@core.result
class State:
    """The state between two rounds: the last token of each row is emitted, and not yet fed to the models."""

    cache: Cache
    transform: PyTree[Array]  # the state of the target's transform
    draft: PyTree[Array]
    token: Int[Array, "batch"]
    done: Bool[Array, "batch"]
    count: Int[Array, "batch"]  # tokens emitted so far
    result: Speculation
    broken: Bool[Array, "batch"]
    round: Int[Array, ""]
    stop: Int[Array, "batch"] | None  # how far each row is into a stop string


@functools.partial(jax.jit, static_argnames=("lm", "num_draft"))
def decode(
    lm: LanguageModel, params: Params, request: Request, draft: Draft, *, num_draft: int
) -> tuple[Speculation, Bool[Array, "batch"]]:
    """The compiled part: prefill, then rounds until all rows have ended. Also the rows whose drafts were broken."""
    num_slots = request.prompts.shape[1] + request.num_steps * (num_draft + 1)
    first, emitted = begin(lm, params, request, num_slots=num_slots)

    def widen(leaf: Array, fill: Array | int = 0) -> Array:
        rest = jnp.full((leaf.shape[0], request.num_steps), fill, leaf.dtype)
        return jnp.concatenate([leaf[:, None], rest], axis=1)

    found = dataclasses.replace(jax.tree.map(widen, emitted), tokens=widen(emitted.tokens, request.pad_id))
    zeros = jnp.zeros(request.limits.shape[0], jnp.int32)
    state = State(
        cache=first.cache,
        transform=first.transform,
        draft=draft.init(request, num_slots=num_slots),
        token=first.token,
        done=first.done,
        count=zeros + 1,
        result=Speculation(found, accepted=zeros, judged=zeros, drafted=zeros, rounds=zeros),
        broken=zeros > 0,
        round=jnp.zeros((), jnp.int32),
        stop=first.stop,
    )
    play = functools.partial(_round, lm, params, request, draft, num_draft)
    state = jax.lax.while_loop(lambda state: ~state.done.all(), play, state)
    return everywhere((state.result, state.broken))


def _round(lm: LanguageModel, params: Params, request: Request, draft: Draft, num_draft: int, state: State) -> State:
    """Draft, judge, emit, and forget what was rejected."""
    alive, room, places = ~state.done, request.limits - state.count, jnp.arange(num_draft + 1)
    keys = None
    if request.keys is not None:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, state.round + 1))(request.keys)  # 0: the first token's
    drafts, trail = draft.propose(state.draft, keys, state.token, alive, room, num_draft=num_draft)

    read = jnp.concatenate([state.token[:, None], drafts.tokens], axis=1)
    counts = jnp.concatenate([alive[:, None], drafts.exists], axis=1) & (places < room[:, None])
    hidden, cache = lm.hidden(params, read, state.cache, mask=counts)
    logits = wide(lm.logits(params, hidden))
    warped, states = _apply_all(request.transform, state.transform, logits, drafts.tokens, counts[:, 1:])
    accepted, token = _judge(keys, drafts, warped)
    tokens = jnp.where(places < accepted[:, None], jnp.pad(drafts.tokens, ((0, 0), (0, 1))), token[:, None])
    stops = None if state.stop is None else _stops(request, state.stop, states, tokens)
    mask, ended = _emitted(request, tokens, stops, accepted, alive, room)

    rows, count = jnp.arange(accepted.shape[0]), mask.sum(axis=1, dtype=jnp.int32)
    seen = places[:-1] < jnp.minimum(accepted + 1, count)[:, None]  # the drafts that decided anything
    kept = counts & (places <= accepted[:, None])
    transform = jax.tree.map(lambda leaf: leaf[accepted, rows], states)
    return State(
        cache=rewind(lm, params, state.cache, cache, read, kept),
        transform=update_alive(request.transform, transform, token, logits[rows, accepted], alive),
        draft=draft.settle(state.draft, trail, drafts, accepted),
        token=jnp.where(alive, token, request.pad_id),
        done=state.done | ended,
        count=state.count + count,
        result=Speculation(
            generation=_write(request, state, tokens, mask, logits, warped),
            accepted=state.result.accepted + jnp.minimum(accepted, count),
            judged=state.result.judged + (drafts.exists & seen).sum(axis=1, dtype=jnp.int32),
            drafted=state.result.drafted + drafts.exists.sum(axis=1, dtype=jnp.int32),
            rounds=state.result.rounds + alive,
        ),
        broken=state.broken | (drafts.broken & seen).any(axis=1),
        round=state.round + 1,
        stop=None if stops is None else jnp.where(count > 0, stops[rows, count - 1], state.stop),
    )


def _apply_all(
    transform: Transform,
    state: PyTree[Array],
    logits: Float[Array, "batch draft+1 vocab"],
    drafts: Int[Array, "batch draft"],
    counts: Bool[Array, "batch draft"],
) -> tuple[Float[Array, "batch draft+1 vocab"], PyTree[Array]]:
    """The transformed logits before each draft, as if those before it were accepted, and after the last.

    Also the states of the transform at these places, [draft + 1, batch, ...].
    """

    def step(state: PyTree, column: tuple[Array, Array, Array]) -> tuple[PyTree, tuple]:
        logits, token, counts = column
        return update_alive(transform, state, token, logits, counts), (transform.apply(state, logits), state)

    columns = (logits, jnp.pad(drafts, ((0, 0), (0, 1))), jnp.pad(counts, ((0, 0), (0, 1))))
    _, (warped, states) = jax.lax.scan(step, state, tuple(jnp.moveaxis(each, 1, 0) for each in columns))
    return jnp.moveaxis(warped, 0, 1), states


def _judge(
    keys: Key[Array, "batch"] | None, drafts: Drafts, warped: Float[Array, "batch draft+1 vocab"]
) -> tuple[Int[Array, "batch"], Int[Array, "batch"]]:
    """The number of drafts of each row that the target accepts, and the token after them."""
    if keys is None:
        return verify_greedy(drafts.tokens, drafts.exists, core.greedy(warped))
    p = jax.nn.softmax(warped, axis=-1)
    q = jax.nn.one_hot(drafts.tokens, p.shape[-1], dtype=p.dtype) if drafts.probs is None else drafts.probs
    keys = jax.vmap(lambda key: jax.random.fold_in(key, drafts.tokens.shape[1]))(keys)  # those before drew the drafts
    return verify(keys, drafts.tokens, p, jnp.where(drafts.exists[..., None], q, 0))


def _stops(
    request: Request, state: Int[Array, "batch"], states: PyTree[Array], tokens: Int[Array, "batch draft+1"]
) -> Int[Array, "batch draft+1"]:
    """Return the states of the stop strings after each token; `states` of the transform are those before the tokens."""

    def step(stop: Array, column: tuple[PyTree, Array]) -> tuple[Array, Array]:
        transform, token = column
        searched = request.transform.may_end(transform)
        stop = jnp.where(searched, request.stop.advance(stop, token), stop)
        return stop, stop

    return jax.lax.scan(step, state, (states, tokens.T))[1].T


def _emitted(
    request: Request,
    tokens: Int[Array, "batch draft+1"],
    stops: Int[Array, "batch draft+1"] | None,
    accepted: Int[Array, "batch"],
    alive: Bool[Array, "batch"],
    room: Int[Array, "batch"],
) -> tuple[Bool[Array, "batch draft+1"], Bool[Array, "batch"]]:
    """The mask of the tokens of a round that are emitted, up to the first that ends the row; and the rows that end."""
    place = jnp.arange(tokens.shape[1])
    ends = request.ends(tokens) if stops is None else request.ends(tokens) | request.stop.reached(stops)
    after_end = jnp.cumsum(ends, axis=1) - ends > 0
    mask = alive[:, None] & (place <= accepted[:, None]) & (place < room[:, None]) & ~after_end
    return mask, (mask & ends).any(axis=1) | (mask.sum(axis=1) >= room)


def _write(
    request: Request,
    state: State,
    tokens: Int[Array, "batch draft+1"],
    mask: Bool[Array, "batch draft+1"],
    logits: Float[Array, "batch draft+1 vocab"],
    warped: Float[Array, "batch draft+1 vocab"],
) -> Generation:
    """The generation with the tokens of a round, each row's at its own place."""
    logp = token_log_probs(logits, tokens)
    logp_sampler = core.greedy_log_prob(warped) if request.keys is None else token_log_probs(warped, tokens)
    found = state.result.generation
    rows, slots = jnp.arange(tokens.shape[0])[:, None], state.count[:, None] + jnp.arange(tokens.shape[1])
    slots = jnp.where(mask, slots, found.tokens.shape[1])  # tokens that are not emitted are dropped
    piece = Generation(tokens, mask, logp, logp_sampler)
    return jax.tree.map(lambda old, new: old.at[rows, slots].set(new, mode="drop"), found, piece)
