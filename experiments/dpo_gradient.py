"""The gradient of DPO, −β σ(r̂_l − r̂_w)(∇log π_w − ∇log π_l): its three factors, exactly and during a run.

python -m experiments.dpo_gradient --preset quick
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

from jaxrl_llm import runtime

runtime.set_up()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import tyro  # noqa: E402
from tqdm import tqdm  # noqa: E402

from experiments import ledger  # noqa: E402
from jaxrl_llm import models, oracle, text  # noqa: E402
from jaxrl_llm.decoding import generate  # noqa: E402
from jaxrl_llm.objectives import preference  # noqa: E402
from jaxrl_llm.objectives.logprobs import sequence_log_prob  # noqa: E402
from jaxrl_llm.tabular import TabularLM  # noqa: E402

PROMPTS = (
    "And the king said",
    "In the beginning",
    "I have a dream",
    "The old man went",
    "Thou shalt not",
    "It was a dark night",
    "My lord, I pray",
    "The people of the city",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Pairs of answers of tiny-gpt2 to the prompts above; plain gradient descent, so that each factor is seen."""

    beta: float = 0.1
    answer: int = 16  # tokens
    steps: int = 30
    learning_rate: float = 0.15
    pairs_per_prompt: int = 1
    seed: int = 0


PRESETS = {"quick": Config(), "full": Config(pairs_per_prompt=4, steps=60)}


def run(config: Config) -> dict[str, Any]:
    """The identity on a tabular model in float64; two runs on tiny-gpt2 in float32."""
    with jax.enable_x64(True):
        exact = identity(config)
    loaded = models.load("tiny-gpt2")
    kinds = pairs(loaded, config)
    step = make_step(loaded, config)
    runs = {kind: train(loaded, step, kind, batch, config) for kind, batch in kinds.items()}
    return {
        "claim": "DPO pushes the chosen answer up and the rejected one down with one weight, σ(r̂_l − r̂_w): ½ at the "
        "start, less where a pair is already ordered. Where the two are nearly the same, both fall.",
        "numbers": numbers(exact, runs),
        "data": {"beta": config.beta, "runs": runs, "exact": exact},
    }


def identity(config: Config) -> dict[str, float]:
    """How far the closed form, and the one with the sigmoid's sign turned, are from `jax.grad`: tabular, all pairs."""
    lm = TabularLM(3, 3)
    names = ("reference", "policy")
    keys = dict(zip(names, jax.random.split(jax.random.key(config.seed), 2), strict=True))
    ref_params, other = lm.init(keys["reference"]), lm.init(keys["policy"])
    ref = oracle.sequence_log_probs(lm, ref_params)
    chosen, rejected = (index.reshape(-1) for index in np.indices((ref.size, ref.size)))

    @jax.jit
    def errors(params: Any) -> dict[str, jax.Array]:
        policy = oracle.sequence_log_probs(lm, params)
        scores = jax.jacrev(lambda params: oracle.sequence_log_probs(lm, params))(params)["logits"]

        def losses(params: Any) -> jax.Array:
            log_probs = oracle.sequence_log_probs(lm, params)
            return preference.dpo_loss(
                log_probs[chosen], log_probs[rejected], ref[chosen], ref[rejected], beta=config.beta
            )

        by_autodiff = jax.jacrev(losses)(params)["logits"]
        implied = config.beta * (policy - ref)
        difference = implied[rejected] - implied[chosen]
        pushes = scores[chosen] - scores[rejected]
        forms = {
            "right": -config.beta * jax.nn.sigmoid(difference)[:, None, None] * pushes,
            "turned": -config.beta * jax.nn.sigmoid(-difference)[:, None, None] * pushes,
        }
        scale = jnp.abs(by_autodiff).max()
        return {sign: jnp.abs(form - by_autodiff).max() / scale for sign, form in forms.items()}

    apart = jax.tree.map(lambda ref, noise: ref + 4 * noise, ref_params, other)
    return {
        f"{sign} {where}": float(error)
        for where, params in (("start", ref_params), ("later", apart))
        for sign, error in errors(params).items()
    }


def pairs(loaded: models.Loaded, config: Config) -> dict[str, dict[str, jax.Array]]:
    """Two kinds of pairs: different answers to a prompt, and answers that differ in their last token alone."""
    lm = loaded.model
    encoded = [text.encode(loaded.tokenizer, prompt) for prompt in PROMPTS for _ in range(config.pairs_per_prompt)]
    prompts, prompt_mask = text.left_pad(encoded)
    prompts, prompt_mask = jnp.asarray(prompts), jnp.asarray(prompt_mask)
    draw = functools.partial(
        generate, lm, loaded.params, prompts, prompt_mask=prompt_mask, max_new_tokens=config.answer
    )
    first, second = (draw(key=key).tokens for key in jax.random.split(jax.random.key(config.seed)))
    changed = (first[:, -1] + 1) % lm.vocab_size
    near = first.at[:, -1].set(jnp.where(second[:, -1] == first[:, -1], changed, second[:, -1]))

    def batch(chosen: jax.Array, rejected: jax.Array) -> dict[str, jax.Array]:
        answers = jnp.concatenate([chosen, rejected])
        tokens = jnp.concatenate([jnp.concatenate([prompts, prompts]), answers], axis=1)
        real = jnp.concatenate([jnp.concatenate([prompt_mask, prompt_mask]), jnp.ones(answers.shape, bool)], axis=1)
        return {"tokens": tokens, "mask": real}

    return {"different": batch(first, second), "nearly the same": batch(first, near)}


def make_scores(loaded: models.Loaded, config: Config) -> Any:
    """A function to the log-probabilities of the chosen and the rejected answers."""

    @jax.jit
    def scores(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        tokens, mask = batch["tokens"], batch["mask"]
        logits, _ = loaded.model.apply(params, tokens[:, :-1], mask=mask[:, :-1])
        log_probs = sequence_log_prob(logits[:, -config.answer :], tokens[:, -config.answer :])
        return tuple(jnp.split(log_probs, 2))

    return scores


def make_step(loaded: models.Loaded, config: Config) -> Any:
    """One step of plain gradient descent on DPO, which also measures the factors of the gradient."""
    optimiser = optax.sgd(config.learning_rate)
    scores = make_scores(loaded, config)

    @jax.jit
    def step(
        params: Any, batch: dict[str, jax.Array], ref: tuple[jax.Array, jax.Array]
    ) -> tuple[Any, dict[str, jax.Array]]:
        (chosen, rejected), pull_back = jax.vjp(lambda params: scores(params, batch), params)
        loss = preference.dpo_loss(chosen, rejected, *ref, beta=config.beta)
        of_chosen, of_rejected, *_ = preference.dpo_loss_grad(chosen, rejected, *ref, beta=config.beta)
        nothing = jnp.zeros_like(of_chosen)
        (up,) = pull_back((of_chosen / loss.size, nothing))
        (down,) = pull_back((nothing, of_rejected / loss.size))
        gradient = jax.tree.map(jnp.add, up, down)
        product = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, up, down)))
        measured = {
            "loss": loss.mean(),
            "weight": -of_chosen.mean() / config.beta,
            "chosen": (chosen - ref[0]).mean(),
            "rejected": (rejected - ref[1]).mean(),
            "up": optax.global_norm(up),
            "down": optax.global_norm(down),
            "whole": optax.global_norm(gradient),
            "cosine": -product / (optax.global_norm(up) * optax.global_norm(down)),  # of ∇log π_w and ∇log π_l
        }
        updates, _ = optimiser.update(gradient, optimiser.init(params))
        return optax.apply_updates(params, updates), measured

    return step


def train(
    loaded: models.Loaded, step: Any, kind: str, batch: dict[str, jax.Array], config: Config
) -> list[dict[str, float]]:
    """What was measured at every step of a run from the reference."""
    ref, params, rows = make_scores(loaded, config)(loaded.params, batch), loaded.params, []
    for _ in tqdm(range(config.steps + 1), desc=kind, unit="step"):
        params, measured = step(params, batch, ref)
        rows.append({name: float(f"{float(value):.6g}") for name, value in measured.items()})
    return rows


def numbers(exact: dict[str, float], runs: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """What would prove the claim wrong."""
    equation = "Rafailov et al. 2023, section 4"
    entries = [
        ledger.number(
            f"closed form against jax.grad, {where}",
            exact[f"right {key}"],
            expected=0.0,
            tolerance=1e-12,
            unit="of the largest entry, 729 pairs",
            source=equation,
        )
        for where, key in (("at the reference", "start"), ("away from it", "later"))
    ]
    entries += [
        ledger.number(
            "the same with the sigmoid's sign turned, at the reference",
            exact["turned start"],
            expected=0.0,
            tolerance=1e-12,
            unit="of the largest entry",
            source="σ(0) = ½ either way: a check at the start cannot tell",
        ),
        ledger.number(
            "the same with the sigmoid's sign turned, away from it",
            exact["turned later"],
            interval=(0.1, None),
            unit="of the largest entry",
            source="wrong",
        ),
    ]
    for kind, rows in runs.items():
        entries += [
            ledger.number(
                f"weight at the start, {kind}", rows[0]["weight"], expected=0.5, tolerance=1e-6, unit="", source="σ(0)"
            ),
            ledger.number(
                f"loss at the start, {kind}",
                rows[0]["loss"],
                expected=float(np.log(2)),
                tolerance=1e-6,
                unit="nats",
                source="log 2",
            ),
            ledger.number(
                f"cosine of ∇log π_w and ∇log π_l at the start, {kind}", rows[0]["cosine"], unit="", source="measured"
            ),
            ledger.number(
                f"log π_w at the end less at the start, {kind}",
                rows[-1]["chosen"],
                interval=(None, 0.0) if kind == "nearly the same" else None,
                unit="nats",
                source="likelihood displacement, Razin et al. 2024" if kind == "nearly the same" else "measured",
            ),
            ledger.number(
                f"margin at the end, {kind}",
                rows[-1]["chosen"] - rows[-1]["rejected"],
                interval=(0.0, None),
                unit="nats",
                source="it grows",
            ),
        ]
    return entries


def main(preset: Literal["quick", "full"] = "quick") -> None:
    """Write `results/dpo_gradient.json`."""
    ledger.run_and_write("dpo_gradient", run, PRESETS[preset], preset)


if __name__ == "__main__":
    tyro.cli(main)
