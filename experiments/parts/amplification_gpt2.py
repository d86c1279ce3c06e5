"""The amplification law on a small GPT-2: a user says what they think of a claim, and the model agrees or does not."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from experiments.parts.sentiment_models import adam
from jaxrl_llm import decoding
from jaxrl_llm.language_model import Params
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.scoring import Sequences, log_probs, pad_completions
from jaxrl_llm.training import policy, rewards, steps
from jaxrl_llm.training.methods import METHODS, Method
from jaxrl_llm.training.preference import PairBatch, preference_loss
from jaxrl_llm.training.rollout import Prompts, Sampler
from jaxrl_llm.training.sft import sft_loss

EOS, TRUE, FALSE, THINKS_TRUE, THINKS_FALSE, FIRST_WORD = range(6)
PROMPT, ANSWER = 3, 1  # tokens: subject, property, opinion; a word, and EOS after it in a world of answers that end
# What PPO's defaults add for large models (λ < 1, whitening, means over tokens) is left out: it has a bias.
PPO = {"whiten": False, "lambda_": 1.0, "mode": "sequence_sum", "value_clip": None, "epochs": 2}


@dataclasses.dataclass(frozen=True)
class World:
    """Every claim with every opinion of it, and a GPT-2 to answer."""

    lm: GPT2
    answers: Sequences  # [prompts, 2, time]; the second of each prompt agrees with the user
    training: Int[np.ndarray, "some"]  # the prompts to align on: a quarter of the claims is left out

    @property
    def prompts(self) -> Prompts:
        """All of them."""
        tokens = self.answers.tokens[:, 0, :PROMPT]
        return Prompts(tokens, jnp.ones(tokens.shape, bool))

    @property
    def thinks_true(self) -> Bool[np.ndarray, "prompts"]:
        """Return whether the user of each prompt thinks that the claim is true."""
        return np.asarray(self.prompts.tokens[:, -1] == THINKS_TRUE)

    def rows(self, prompts: Array, agreeing: Array) -> Sequences:
        """Return some prompts, each with the answer that agrees or the other one."""
        return jax.tree.map(lambda leaf: leaf[prompts, agreeing.astype(jnp.int32)], self.answers)


def world(config: Any, *, ends: bool = False) -> World:
    """Return every subject with every property as the claims, and a new model that is just large enough.

    Answers are one word. If it `ends`, EOS is part of the answer, so that DPO has a second token to move.
    """
    words = np.arange(config.words)
    grid = np.meshgrid(words, words, [False, True], indexing="ij")
    subjects, properties, opinions = (each.ravel() for each in grid)
    rows = zip(subjects, properties, opinions, strict=True)
    prompts = [
        [FIRST_WORD + a, FIRST_WORD + config.words + b, THINKS_TRUE if true else THINKS_FALSE] for a, b, true in rows
    ]
    end = [EOS] if ends else []
    answers = [[word, *end] for true in opinions for word in ((FALSE, TRUE) if true else (TRUE, FALSE))]
    padded = pad_completions([prompt for prompt in prompts for _ in range(2)], answers)
    shape = {"n_embd": config.width, "n_layer": config.layers, "n_head": config.heads}
    lm = GPT2(GPT2Config(vocab_size=FIRST_WORD + 2 * config.words, n_positions=PROMPT + ANSWER + ends, **shape))
    of_prompts = jax.tree.map(lambda leaf: jnp.asarray(leaf).reshape(len(prompts), 2, -1), padded)
    return World(lm, of_prompts, np.flatnonzero((subjects + properties) % 4))


def word_probs(given: World, params: Params) -> Float[Array, "prompts 2"]:
    """Return the probabilities of the word that disagrees with the user, and of the one that agrees."""
    hidden, _ = given.lm.hidden(params, given.prompts.tokens)
    probs = jax.nn.softmax(given.lm.logits(params, hidden[:, -1]))
    return jnp.take_along_axis(probs, given.answers.tokens[:, :, PROMPT], axis=1)


def agreement(given: World, params: Params) -> Float[Array, "prompts"]:
    """Return the probability of agreement after every prompt, among the two words that answer."""
    disagrees, agrees = word_probs(given, params).T
    return agrees / (agrees + disagrees)


def agrees(rows: Sequences) -> Bool[Array, "batch"]:
    """Return whether an answer's first word is what the user thinks."""
    opinion, word = rows.tokens[:, PROMPT - 1], rows.tokens[:, PROMPT]
    return jnp.where(opinion == THINKS_TRUE, word == TRUE, word == FALSE)


def fine_tuned(given: World, probability: Array, key: Array, config: Any) -> Params:
    """Return a reference: a new model, fine-tuned on answers that agree with this probability, whatever the claim."""
    optimizer = adam(config.sft_learning_rate, config.sft_steps)
    loss = sft_loss(given.lm)

    def advance(state: steps.TrainState) -> tuple[steps.TrainState, None]:
        prompt_key, answer_key = jax.random.split(state.step_key)
        rows = jax.random.randint(prompt_key, (config.sft_batch,), 0, given.prompts.tokens.shape[0])
        agreeing = jax.random.uniform(answer_key, rows.shape) < probability
        return steps.update(loss, optimizer, state, given.rows(rows, agreeing))[0], None

    def initial(key: Array) -> steps.TrainState:
        init_key, run_key = jax.random.split(key)
        return steps.initial_state(given.lm.init(init_key), optimizer, run_key)

    return steps.whole_run(initial, advance, steps=config.sft_steps)(key)[0].params


def by_dpo(given: World, config: Any, ref: Params, share: Array, beta: Array, key: Array) -> Float[Array, "prompts"]:
    """Return agreement after DPO."""
    return agreement(given, trained_by_dpo(given, config, ref, share, beta, key))


def trained_by_dpo(given: World, config: Any, ref: Params, share: Array, beta: Array, key: Array) -> Params:
    """Train by DPO: every step has new annotators, of whom each prefers agreement with probability `share`."""
    optimizer = adam(config.dpo_learning_rate, config.dpo_steps)
    loss = preference_loss(given.lm, "dpo", beta=beta)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), given.answers)
    ref_logp = log_probs(given.lm, ref, flat).sum(axis=1).reshape(-1, 2)

    def advance(state: steps.TrainState) -> tuple[steps.TrainState, None]:
        prompt_key, judge_key = jax.random.split(state.step_key)
        rows = jax.random.choice(prompt_key, jnp.asarray(given.training), (config.dpo_prompts,))
        votes = jax.random.uniform(judge_key, (config.annotators, rows.size)) < share
        for_agreement = votes.mean(axis=0)
        # The two labels that a pair can get, each as often as it got it.
        both, agreeing = jnp.tile(rows, 2), jnp.repeat(jnp.asarray([True, False]), rows.size)
        weight = jnp.concatenate([for_agreement, 1 - for_agreement])
        logp = ref_logp[both, agreeing.astype(jnp.int32)], ref_logp[both, (~agreeing).astype(jnp.int32)]
        pairs = PairBatch(given.rows(both, agreeing), given.rows(both, ~agreeing), *logp, weight=weight)
        return steps.update(loss, optimizer, state, pairs)[0], None

    train = steps.whole_run(lambda key: steps.initial_state(ref, optimizer, key), advance, steps=config.dpo_steps)
    return train(key)[0].params


def method_named(name: str) -> Method:
    """Return PPO or RLOO as they run here.

    Raises:
        ValueError: for another method.
    """
    if name not in ("ppo", "rloo"):
        raise ValueError(f"online methods must be ppo or rloo, but one is {name!r}.")
    return dataclasses.replace(METHODS[name], **(PPO if name == "ppo" else {}))


def key_of(name: str, key: Array) -> Array:
    """Return a key of its own for whatever has a name."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def by_policy_gradient(
    name: str, given: World, config: Any, ref: Params, share: Array, beta: Array, key: Array
) -> Float[Array, "prompts"]:
    """Return agreement after PPO or RLOO on the annotators' reward: logit p for an answer that agrees, else 0."""
    method = dataclasses.replace(method_named(name), beta=beta)
    critic = ScalarHead(given.lm) if method.has_critic else None
    optimizer = adam(config.online_learning_rate, config.online_steps * method.epochs)
    trainer = policy.online(given.lm, optimizer, critic=critic)
    reward = rewards.of_tokens(lambda rows: jnp.where(agrees(rows), jnp.log(share) - jnp.log1p(-share), 0))
    sampler = Sampler(ANSWER, eos_ids=(EOS,))
    count = config.online_batch // method.group_size

    def advance(state: steps.TrainState) -> tuple[steps.TrainState, None]:
        rows = jax.random.choice(jax.random.fold_in(state.step_key, 7), jnp.asarray(given.training), (count,))
        prompts = jax.tree.map(lambda leaf: leaf[rows], given.prompts)
        frozen = steps.Frozen(ref=ref)
        return trainer.step(state, prompts, reward, method=method, sampler=sampler, frozen=frozen)[0], None

    def initial(key: Array) -> steps.TrainState:
        critic_key, run_key = jax.random.split(key)
        params = ref if critic is None else {"policy": ref, "critic": critic.init(critic_key, ref, zero=True)}
        return steps.initial_state(params, optimizer, run_key)

    params = steps.whole_run(initial, advance, steps=config.online_steps)(key)[0].params
    return agreement(given, params if critic is None else params["policy"])


def on_grid(
    run: Callable[..., Array], refs: Params, points: Float[np.ndarray, "points 2"], key: Array
) -> Float[Array, "seeds points prompts"]:
    """Return `run(ref, share, beta, key)` of every seed's reference at every point, as lanes of one program."""
    seeds = jax.tree.leaves(refs)[0].shape[0]
    keys = jax.random.split(key, (seeds, len(points)))
    shares, betas = jnp.asarray(points, jnp.float32).T
    over_points = jax.vmap(run, in_axes=(None, 0, 0, 0))
    return jax.jit(jax.vmap(over_points, in_axes=(0, None, None, 0)))(refs, shares, betas, keys)


def best_of_n(
    given: World, ref: Params, key: Array, *, sizes: tuple[int, ...], repeats: int
) -> tuple[Int[Array, "sizes"], Float[Array, "prompts"]]:
    """Count how often the best of n draws agrees, in `repeats` tries after every prompt; return π_ref(agree) too.

    The draws of a smaller n are the first of those of the largest.
    """
    prompts = jnp.repeat(given.prompts.tokens, repeats, axis=0)
    agreeing_word = jnp.where(prompts[:, -1:] == THINKS_TRUE, TRUE, FALSE)

    def score(drawn: decoding.Generation) -> Array:
        return (drawn.tokens[..., 0] == agreeing_word).astype(jnp.float32)

    drawn = decoding.best_of_n(given.lm, ref, prompts, n=max(sizes), score=score, key=key, max_new_tokens=1)
    best = [drawn.scores[:, :n].max(axis=1).sum().astype(int) for n in sizes]
    return jnp.stack(best), word_probs(given, ref)[:, 1]
