"""The same three terms on a language model that writes: REINFORCE on sampled answers, with and without each term.

The pretraining text is what the model itself wrote at the start, so that no corpus is needed. No model has a smaller
loss on it, in expectation, than the one that wrote it: there γ can hold the loss, and not lower it.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from jaxrl_llm import decoding, models, text
from jaxrl_llm.objectives import kl, policy_gradient, rlhf
from jaxrl_llm.objectives.advantages import rloo
from jaxrl_llm.objectives.aggregate import aggregate
from jaxrl_llm.objectives.logprobs import token_log_probs


def token_rewards(tokenizer: Any, vocab_size: int, letter: str) -> Float[Array, "vocab"]:
    """1 for every token that contains the letter."""
    return jnp.asarray([float(letter in tokenizer.decode([token]).lower()) for token in range(vocab_size)])


def answer_logits(lm: Any, params: Any, prompts: Array, answers: Array) -> Float[Array, "row time vocab"]:
    """The logits of the next-token distribution at each of the answers' tokens."""
    rows = jnp.concatenate([prompts, answers], axis=1)
    hidden, _ = lm.hidden(params, rows[:, :-1])
    return lm.logits(params, hidden[:, prompts.shape[1] - 1 :])


@functools.partial(jax.jit, static_argnames=("lm", "optimiser"))
def update(
    lm: Any, optimiser: Any, params: Any, ref_params: Any, state: Any, batch: dict[str, Array]
) -> tuple[Any, Any, dict[str, Array]]:
    """Take one step of REINFORCE: leave-one-out advantages of r − β k1, and γ times the likelihood of the text.

    The KL that is reported is summed over the answers' tokens with each token's divergence computed over the whole
    vocabulary (Rao-Blackwell), which varies less than the k1 of the reward.
    """
    prompts, answers, mask = batch["prompts"], batch["answers"], batch["mask"]
    ref_logits = answer_logits(lm, ref_params, prompts, answers)
    logp_ref = token_log_probs(ref_logits, answers)

    def loss(params: Any) -> tuple[Array, dict[str, Array]]:
        logits = answer_logits(lm, params, prompts, answers)
        logp = token_log_probs(logits, answers)
        divergence = jnp.where(mask, kl.k1(jax.lax.stop_gradient(logp), logp_ref), 0).sum(axis=-1)
        reward = jnp.where(mask, batch["token_rewards"][answers], 0).sum(axis=-1) / mask.shape[1]
        gain = (reward - batch["beta"] * divergence).reshape(-1, batch["group_size"].shape[0])
        advantages = jnp.broadcast_to(rloo(gain).reshape(-1, 1), logp.shape)
        total = aggregate(policy_gradient.reinforce_loss(logp, advantages), mask, "sequence_sum")
        total -= rlhf.ptx_bonus(text_log_probs(lm, params, batch["text"]), gamma=batch["gamma"]).mean()
        exact = jnp.where(mask, kl.exact_kl(logits, ref_logits), 0).sum(axis=-1)
        return total, {"reward": reward.mean(), "kl": exact.mean()}

    slopes, seen = jax.grad(loss, has_aux=True)(params)
    updates, state = optimiser.update(slopes, state)
    return optax.apply_updates(params, updates), state, seen


def text_log_probs(lm: Any, params: Any, rows: Int[Array, "row time"]) -> Float[Array, "row time-1"]:
    """The log-probability of every token after the first."""
    return token_log_probs(answer_logits(lm, params, rows[:, :1], rows[:, 1:]), rows[:, 1:])


@functools.partial(jax.jit, static_argnames="lm")
def text_loss(lm: Any, params: Any, rows: Int[Array, "row time"]) -> Float[Array, ""]:
    """−E log π(x), per token."""
    return -text_log_probs(lm, params, rows).mean()


def train(config: Any, key: Array) -> list[dict[str, Any]]:
    """Train every arm several times from the same model; return its curves as [training, update].

    The arms of one training share their keys, prompts and text.
    """
    loaded = models.load(config.model, dtype=jnp.float32)
    encoded = [text.encode(loaded.tokenizer, prompt) for prompt in config.prompts]
    tokens, mask = text.left_pad([row[: min(map(len, encoded))] for row in encoded])
    assert mask.all()
    common = {
        "prompts": jnp.asarray(np.repeat(tokens, config.samples, axis=0)),
        "group_size": jnp.zeros(config.samples),
        "token_rewards": token_rewards(loaded.tokenizer, loaded.model.vocab_size, config.letter),
    }
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(config.learning_rate))
    runs = list(itertools.product(config.arms, jax.random.split(key, config.trainings)))
    curves = [
        _train_once(config, loaded, optimiser, common | {"beta": beta, "gamma": gamma}, training_key)
        for (beta, gamma), training_key in tqdm(runs, unit="training", disable=None)
    ]
    by_arm = jax.tree.map(
        lambda *rows: np.asarray(rows).reshape(len(config.arms), config.trainings, -1),
        *curves,
        is_leaf=lambda node: isinstance(node, list),
    )
    return [
        {"beta": beta, "gamma": gamma} | {name: values[arm] for name, values in by_arm.items()}
        for arm, (beta, gamma) in enumerate(config.arms)
    ]


def _train_once(config: Any, loaded: Any, optimiser: Any, common: dict[str, Any], key: Array) -> dict[str, list[float]]:
    lm, params, state, log = loaded.model, loaded.params, optimiser.init(loaded.params), []
    text_key, sample_key = jax.random.split(key)
    beginnings = jnp.full((config.text_rows * (config.updates + 3), 1), loaded.tokenizer.bos_token_id, jnp.int32)
    written = decoding.generate(lm, loaded.params, beginnings, max_new_tokens=config.text_tokens, key=text_key).tokens
    held_out, pool = jnp.split(jnp.concatenate([beginnings, written], axis=1), [2 * config.text_rows])
    for step in range(config.updates + 1):
        drawn = decoding.generate(
            lm,
            params,
            common["prompts"],
            max_new_tokens=config.new_tokens,
            key=jax.random.fold_in(sample_key, step),
            eos_id=loaded.tokenizer.eos_token_id,
        )
        rows = pool[step * config.text_rows :][: config.text_rows]
        batch = common | {"answers": drawn.tokens, "mask": drawn.mask, "text": rows}
        measured = float(text_loss(lm, params, held_out))
        # of the last step the measurement alone counts
        params, state, seen = update(lm, optimiser, params, loaded.params, state, batch)
        log.append({name: float(value) for name, value in seen.items()} | {"pretraining_loss": measured})
    return {name: [row[name] for row in log] for name in log[0]}
