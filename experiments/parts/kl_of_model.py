"""Estimators of the KL between a language model and a reference, from text that the model wrote."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import ledger, statistics
from experiments.parts.gaussian_kl import ESTIMATORS
from jaxrl_llm import decoding, models, text
from jaxrl_llm.objectives import kl
from jaxrl_llm.objectives.logprobs import token_log_probs

SCHULMAN = "Schulman 2020, joschu.net/blog/kl-approx.html"
BLOCK = 16  # rows


def model_part(config: Any, key: jax.Array, noise_key: jax.Array) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compare the language model with itself at another temperature, and with noise on its weights."""
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
    by_reference = {
        name: {
            each: np.asarray(value, np.float64).mean(axis=1)
            for each, value in estimate(loaded.params, *reference, prompts, drawn.tokens).items()
        }
        for name, reference in references.items()
    }
    described = [
        {"reference": name, "estimates": {each: _with_interval(value) for each, value in rows.items()}}
        for name, rows in by_reference.items()
    ]
    data = {"references": described, "rows": config.rows, "tokens": config.tokens, "name": config.model}
    return data, precision(by_reference)


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


def _with_interval(rows: np.ndarray) -> dict[str, float]:
    """Return the mean over independent rows, and its 95% interval."""
    return dict(zip(("mean", "low", "high"), statistics.student(rows), strict=True))


def precision(by_reference: dict[str, dict[str, np.ndarray]]) -> list[ledger.Number]:
    """Test that Rao-Blackwell varies less over rows than every other estimator, on blocks of the same rows."""
    p_values, numbers = [], []
    for reference, rows in by_reference.items():
        logs = {name: np.log(each.reshape(-1, BLOCK).var(axis=1, ddof=1)) for name, each in rows.items()}
        source = f"{len(logs['k1'])} blocks of the same {BLOCK} rows"
        mean, low, high = statistics.student(rows["Rao-Blackwell"])
        about = {"unit": "nats per token", "source": f"{len(rows['k1'])} rows"}
        numbers.append(ledger.measurement(f"KL, reference {reference}", mean, confidence=(low, high), **about))
        for name in ESTIMATORS:
            gain = logs[name] - logs["Rao-Blackwell"]
            p_values.append(statistics.above_zero(gain))
            mean, low, high = np.exp(statistics.student(gain))
            title = f"variance of {name} over Rao-Blackwell's, reference {reference}"
            numbers.append(ledger.measurement(title, mean, confidence=(low, high), unit="1", source=source))
    least = ledger.test(
        "largest p, Rao-Blackwell varies less over rows than k1, k2 and k3, both references",
        max(statistics.holm(p_values)),
        at_most=0.05,
        wrong=0.5,
        unit="1",
        source=f"one-sided Wilcoxon over log variances of blocks, Holm over {len(p_values)}",
    )
    return [least, *numbers]
