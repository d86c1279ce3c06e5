"""Estimators of the KL between a language model and a reference, from text that the model wrote."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import ledger
from experiments.parts.gaussian_kl import ESTIMATORS
from jaxrl_llm import decoding, models, text
from jaxrl_llm.objectives import kl
from jaxrl_llm.objectives.logprobs import token_log_probs

SCHULMAN = "Schulman 2020, joschu.net/blog/kl-approx.html"


def model_part(config: Any, key: jax.Array, noise_key: jax.Array) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The language model against itself at another temperature, and against itself with noise on its weights."""
    loaded = models.load(config.model)
    prompt = jnp.asarray(text.encode(loaded.tokenizer, config.prompt), jnp.int32)
    prompts = jnp.tile(prompt, (config.rows, 1))
    drawn = decoding.generate(loaded.model, loaded.params, prompts, max_new_tokens=config.tokens, key=key)
    noisy = perturbed(loaded.params, noise_key, config.noise)
    estimate = jax.jit(functools.partial(model_estimates, loaded.model))
    references = {
        f"itself at temperature {config.temperature:g}": (loaded.params, config.temperature),
        f"{100 * config.noise:g}% noise on its weights": (noisy, 1.0),
    }
    described, numbers = [], []
    for name, (ref_params, temperature) in references.items():
        per_token = estimate(loaded.params, ref_params, temperature, prompts, drawn.tokens)
        rows = {each: np.asarray(value, np.float64).mean(axis=1) for each, value in per_token.items()}
        described.append(
            {"reference": name, "estimates": {each: mean_and_error(value) for each, value in rows.items()}}
        )
        numbers += agreement(name, rows, float(per_token["k3"].min()))
    return {"references": described, "rows": config.rows, "tokens": config.tokens, "name": config.model}, numbers


def model_estimates(
    model: Any, params: Any, ref_params: Any, temperature: float, prompts: jax.Array, tokens: jax.Array
) -> dict[str, jax.Array]:
    """Each estimator at every generated token [batch, time]."""
    inputs = jnp.concatenate([prompts, tokens], axis=1)[:, :-1]
    policy, ref = (model.apply(each, inputs)[0][:, prompts.shape[1] - 1 :] for each in (params, ref_params))
    ref = ref / temperature
    log_probs = token_log_probs(policy, tokens), token_log_probs(ref, tokens)
    estimates = {name: estimator(*log_probs) for name, estimator in ESTIMATORS.items()}
    return estimates | {"Rao-Blackwell": kl.exact_kl(policy, ref)}


@jax.jit
def perturbed(params: Any, key: jax.Array, noise: float) -> Any:
    """Every tensor plus Gaussian noise of this share of its own root mean square."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten(
        [
            leaf + noise * jnp.sqrt(jnp.square(leaf).mean()) * jax.random.normal(each, leaf.shape, leaf.dtype)
            for leaf, each in zip(leaves, keys, strict=True)
        ]
    )


def mean_and_error(rows: np.ndarray) -> dict[str, float]:
    """The mean over independent rows, and its standard error."""
    return {"mean": float(rows.mean()), "error": float(rows.std(ddof=1) / math.sqrt(len(rows)))}


def agreement(reference: str, rows: dict[str, np.ndarray], least: float) -> list[dict[str, Any]]:
    """The unbiased estimators agree on the same samples, within 4 standard errors of their differences."""
    pairs = (("k1", "Rao-Blackwell"), ("k3", "Rao-Blackwell"), ("k1", "k3"))
    differences = {pair: mean_and_error(rows[pair[0]] - rows[pair[1]]) for pair in pairs}
    entries = [
        ledger.number(
            f"{first} − {second}, {reference}",
            found["mean"],
            expected=0.0,
            tolerance=4 * found["error"],
            unit="nats per token",
            source="4 standard errors of the paired difference over rows",
        )
        for (first, second), found in differences.items()
    ]
    errors = {name: mean_and_error(each)["error"] for name, each in rows.items()}
    return [
        *entries,
        ledger.number(
            f"standard error of k1 over Rao-Blackwell's, {reference}",
            errors["k1"] / errors["Rao-Blackwell"],
            interval=(1.0, None),
            unit="1",
            source="the same rows",
        ),
        ledger.number(f"smallest k3, {reference}", least, interval=(0.0, None), unit="nats", source=SCHULMAN),
    ]
