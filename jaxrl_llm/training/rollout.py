"""Rollouts: completions of prompts, sampled from the policy."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_llm import decoding
from jaxrl_llm.decoding.transforms import Chain, Temperature, Transform
from jaxrl_llm.language_model import LanguageModel, Params
from jaxrl_llm.scoring import Sequences


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """Sampling parameters. The trained policy is softmax(logits / temperature) in every log-probability.

    Args:
        max_new_tokens: most tokens of a completion.
        temperature: of the policy itself, and so of the reference too.
        transform: further filters, such as top-p. Tokens are then not sampled from the policy, and the importance
            weight of `Method` corrects for it as far as its cap allows.
        eos_ids: tokens that end a completion and belong to it.
    """

    max_new_tokens: int = dataclasses.field(metadata={"static": True})
    temperature: float | Float[Array, ""] = 1.0
    transform: Transform | None = None
    eos_ids: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def whole_transform(self) -> Transform:
        """The temperature, then the filters."""
        warm = Temperature(self.temperature)
        return warm if self.transform is None else Chain((warm, self.transform))


class Prompts(NamedTuple):
    """Prompts padded on the left."""

    tokens: Int[Array, "batch prompt"]
    mask: Bool[Array, "batch prompt"]


class Rollout(NamedTuple):
    """Prompts with sampled completions; those of one prompt are adjacent."""

    sequences: Sequences  # [batch, prompt + completion]
    logp_sampler: Float[Array, "batch time"]  # under the sampling distribution, in nats; 0 outside completions
    ended: Bool[Array, "batch"]  # by EOS, not by the limit


def rollout(
    lm: LanguageModel, params: Params, prompts: Prompts, key: Key[Array, ""], sampler: Sampler, *, group_size: int = 1
) -> Rollout:
    """Sample `group_size` completions of each prompt; traceable, so that it can be part of a jitted step.

    Raises:
        ValueError: as `decoding.generate`, for example for a prompt that leaves no room in the model's context.
    """
    tokens, mask = (jnp.repeat(jnp.asarray(each), group_size, axis=0) for each in prompts)
    drawn = decoding.generate(
        lm,
        params,
        tokens,
        max_new_tokens=sampler.max_new_tokens,
        transform=sampler.whole_transform,
        key=key,
        prompt_mask=mask,
        eos_id=sampler.eos_ids or None,
    )
    nothing = jnp.zeros(mask.shape, bool)
    sequences = Sequences(
        jnp.concatenate([tokens, drawn.tokens], axis=1),
        jnp.concatenate([mask, drawn.mask], axis=1),
        jnp.concatenate([nothing, drawn.mask], axis=1),
    )
    is_eos = jnp.isin(drawn.tokens, jnp.asarray(sampler.eos_ids, jnp.int32)) & drawn.mask
    logp_sampler = jnp.concatenate([nothing.astype(drawn.logp_sampler.dtype), drawn.logp_sampler], axis=1)
    return Rollout(sequences, logp_sampler, is_eos.any(axis=1))
