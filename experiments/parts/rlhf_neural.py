"""The same three terms on a language model that writes: REINFORCE on sampled answers, with and without each term.

The pretraining text is what the model itself wrote at the start, so that no corpus is needed. No model has a smaller
loss on it, in expectation, than the one that wrote it: there γ can hold the loss, and not lower it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxrl_llm import decoding, models, text
from jaxrl_llm.objectives import kl, policy_gradient, rlhf
from jaxrl_llm.objectives.advantages import rloo
from jaxrl_llm.objectives.aggregate import aggregate
from jaxrl_llm.objectives.logprobs import entropy, token_log_probs


def token_rewards(tokenizer: Any, vocab_size: int, letter: str) -> Float[Array, "vocab"]:
    """1 for every token that contains the letter."""
    return jnp.asarray([float(letter in tokenizer.decode([token]).lower()) for token in range(vocab_size)])


def answer_log_probs(lm: Any, params: Any, prompts: Array, answers: Array) -> tuple[Array, Array]:
    """log π of the answers' tokens, and the entropy of the law that each was drawn from."""
    rows = jnp.concatenate([prompts, answers], axis=1)
    hidden, _ = lm.hidden(params, rows[:, :-1])
    logits = lm.logits(params, hidden[:, prompts.shape[1] - 1 :])
    return token_log_probs(logits, answers), entropy(logits)


@functools.partial(jax.jit, static_argnames=("lm", "optimiser", "with_text"))
def update(
    lm: Any, optimiser: Any, params: Any, ref_params: Any, state: Any, batch: dict[str, Array], *, with_text: bool
) -> tuple[Any, Any, dict[str, Array]]:
    """One step of REINFORCE: leave-one-out advantages of r − β k1, and γ times the likelihood of the text."""
    prompts, answers, mask = batch["prompts"], batch["answers"], batch["mask"]
    logp_ref, _ = answer_log_probs(lm, ref_params, prompts, answers)

    def loss(params: Any) -> tuple[Array, dict[str, Array]]:
        logp, spread = answer_log_probs(lm, params, prompts, answers)
        divergence = jnp.where(mask, kl.k1(jax.lax.stop_gradient(logp), logp_ref), 0).sum(axis=-1)
        reward = jnp.where(mask, batch["token_rewards"][answers], 0).sum(axis=-1) / mask.shape[1]
        gain = (reward - batch["beta"] * divergence).reshape(-1, batch["group_size"].shape[0])
        advantages = jnp.broadcast_to(rloo(gain).reshape(-1, 1), logp.shape)
        total = aggregate(policy_gradient.reinforce_loss(logp, advantages), mask, "sequence_sum")
        if with_text:
            text_logp, _ = answer_log_probs(lm, params, batch["text"][:, :1], batch["text"][:, 1:])
            total -= rlhf.ptx_bonus(text_logp, gamma=batch["gamma"]).mean()
        return total, {"reward": reward.mean(), "kl": divergence.mean(), "entropy": spread.mean()}

    slopes, seen = jax.grad(loss, has_aux=True)(params)
    updates, state = optimiser.update(slopes, state)
    return optax.apply_updates(params, updates), state, seen


@functools.partial(jax.jit, static_argnames="lm")
def text_loss(lm: Any, params: Any, rows: Int[Array, "row time"]) -> Float[Array, ""]:
    """−E log π(x), per token."""
    return -answer_log_probs(lm, params, rows[:, :1], rows[:, 1:])[0].mean()


def train(config: Any, key: Array) -> dict[str, Any]:
    """Every arm from the same model, keys and prompts: its curves, and what it writes at the end."""
    loaded = models.load(config.model, dtype=jnp.float32)
    lm = loaded.model
    text_key, sample_key = jax.random.split(key)
    encoded = [text.encode(loaded.tokenizer, prompt) for prompt in config.prompts]
    tokens, mask = text.left_pad([row[: min(map(len, encoded))] for row in encoded])
    assert mask.all()
    prompts = jnp.asarray(np.repeat(tokens, config.samples, axis=0))
    beginnings = jnp.zeros((config.text_rows * (config.updates + 3), 1), jnp.int32) + loaded.tokenizer.bos_token_id
    written = decoding.generate(lm, loaded.params, beginnings, max_new_tokens=config.text_tokens, key=text_key).tokens
    written = jnp.concatenate([beginnings, written], axis=1)
    held_out, pool = jnp.split(written, [2 * config.text_rows])
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(config.learning_rate))
    common = {
        "prompts": prompts,
        "group_size": jnp.zeros(config.samples),
        "token_rewards": token_rewards(loaded.tokenizer, lm.vocab_size, config.letter),
    }
    arms = []
    for beta, gamma in config.arms:
        params, state, log = loaded.params, optimiser.init(loaded.params), []
        for step in range(config.updates + 1):
            step_key = jax.random.fold_in(sample_key, step)
            drawn = decoding.generate(
                lm,
                params,
                prompts,
                max_new_tokens=config.new_tokens,
                key=step_key,
                eos_id=loaded.tokenizer.eos_token_id,
            )
            rows = pool[step * config.text_rows :][: config.text_rows]
            batch = common | {"answers": drawn.tokens, "mask": drawn.mask, "text": rows, "beta": beta, "gamma": gamma}
            measured = float(text_loss(lm, params, held_out))
            # of the last step the measurement alone counts
            params, state, seen = update(lm, optimiser, params, loaded.params, state, batch, with_text=gamma > 0)
            log.append({name: float(value) for name, value in seen.items()} | {"pretraining_loss": measured})
        sample = loaded.tokenizer.decode(jnp.concatenate([prompts[0], drawn.tokens[0]]).tolist())
        curves = {name: [row[name] for row in log] for name in log[0]}
        arms.append({"beta": beta, "gamma": gamma, "sample": sample} | curves)
    return {"arms": arms}
