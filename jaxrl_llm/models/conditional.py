"""p(target | source) of any model: a T5 encodes the source, a decoder-only model has it as its prompt."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxrl_llm.language_model import LanguageModel, Params
from jaxrl_llm.models.decoder import Network
from jaxrl_llm.models.t5 import T5


class Conditional(NamedTuple):
    """A language model, its parameters, and the prompts after which the targets follow."""

    lm: LanguageModel
    params: Params
    prompts: Int[Array, "batch prompt"]
    mask: Bool[Array, "batch prompt"]


def given(
    model: Network, params: Params, source: Int[Array, "batch time"], mask: Bool[Array, "batch time"]
) -> Conditional:
    """Return the language model of the target given the source, as every decoder accepts it.

    For a T5 the prompts are its start token. For a decoder-only model they are the sources, which must end in a
    separator. Sources may be padded on either side; for a decoder-only model the left is cheapest.

    Raises:
        ValueError: as `T5.start` does.
    """
    if not isinstance(model, T5):
        return Conditional(model, params, source, mask)
    prompts = model.decoder_prompts(source.shape[0])
    return Conditional(*model.start(params, source, mask), prompts, jnp.ones(prompts.shape, bool))
