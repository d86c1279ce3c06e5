"""The gradient of DPO, −β σ(r̂_l − r̂_w)(∇log π_w − ∇log π_l): its three factors, exactly and during a run.

python -m experiments.dpo_gradient --preset quick
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments import ledger
from experiments.frame import experiment
from experiments.statistics import student
from jaxrl_llm import models, oracle, text
from jaxrl_llm.decoding import generate
from jaxrl_llm.objectives import preference
from jaxrl_llm.objectives.logprobs import sequence_log_prob
from jaxrl_llm.tabular import TabularLM

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
    """Batches of pairs of answers of tiny-gpt2 to the prompts above, and a run of gradient descent on each."""

    beta: float = 0.1
    answer: int = 16  # tokens
    steps: int = 10
    learning_rate: float = 0.15
    batches: int = 2  # each sampled anew, with one pair for each prompt
    seed: int = 0


KINDS = ("different", "nearly the same")


@experiment(quick=Config(), full=Config(batches=5, steps=30))
def run(config: Config) -> dict[str, Any]:
    """Check the identity on a tabular model in float64; train tiny-gpt2 in float32 on every batch of either kind."""
    with jax.enable_x64(True):
        exact = identity(config)
    loaded = models.load("tiny-gpt2")
    step, scores = make_step(loaded, config), make_scores(loaded, config)
    runs = {kind: [] for kind in KINDS}
    for key in tqdm(jax.random.split(jax.random.key(config.seed), config.batches), unit="batch"):
        for kind, batch in pairs(loaded, config, key).items():
            runs[kind].append(train(loaded, step, scores, batch, config))
    # [batch, step] of every measured field
    runs = {
        kind: {field: np.asarray([[row[field] for row in rows] for rows in each]) for field in each[0][0]}
        for kind, each in runs.items()
    }
    near = runs["nearly the same"]
    fallen = int(((near["chosen"][:, -1] < 0) & (near["rejected"][:, -1] < 0)).sum())
    return {
        "claim": "DPO pushes the chosen answer up and the rejected one down with one weight, σ(r̂_l − r̂_w). If they "
        "differ only in the last token, more of the two pushes cancels, and both answers fall: in tiny-gpt2, on "
        f"{fallen} of {config.batches} batches of pairs.",
        "numbers": numbers(exact, runs),
        "data": {"beta": config.beta, "pairs": len(PROMPTS), "runs": runs, "exact": exact},
    }


def identity(config: Config) -> dict[str, float]:
    """Compare the closed form, and the one with the sigmoid's sign turned, with `jax.grad`: tabular, all pairs."""
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


def pairs(loaded: models.Loaded, config: Config, key: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """Sample two kinds of pairs: different answers to a prompt, and answers that differ in their last token alone."""
    lm = loaded.model
    encoded = [text.encode(loaded.tokenizer, prompt) for prompt in PROMPTS]
    prompts, prompt_mask = text.left_pad(encoded)
    prompts, prompt_mask = jnp.asarray(prompts), jnp.asarray(prompt_mask)
    draw = functools.partial(
        generate, lm, loaded.params, prompts, prompt_mask=prompt_mask, max_new_tokens=config.answer
    )
    first, second = (draw(key=key).tokens for key in jax.random.split(key))
    changed = (first[:, -1] + 1) % lm.vocab_size
    near = first.at[:, -1].set(jnp.where(second[:, -1] == first[:, -1], changed, second[:, -1]))

    def batch(chosen: jax.Array, rejected: jax.Array) -> dict[str, jax.Array]:
        answers = jnp.concatenate([chosen, rejected])
        tokens = jnp.concatenate([jnp.concatenate([prompts, prompts]), answers], axis=1)
        real = jnp.concatenate([jnp.concatenate([prompt_mask, prompt_mask]), jnp.ones(answers.shape, bool)], axis=1)
        return {"tokens": tokens, "mask": real}

    return {"different": batch(first, second), "nearly the same": batch(first, near)}


def make_scores(loaded: models.Loaded, config: Config) -> Any:
    """Return a function from parameters and a batch to the log-probabilities of chosen and rejected answers."""

    @jax.jit
    def scores(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        tokens, mask = batch["tokens"], batch["mask"]
        logits, _ = loaded.model.apply(params, tokens[:, :-1], mask=mask[:, :-1])
        log_probs = sequence_log_prob(logits[:, -config.answer :], tokens[:, -config.answer :])
        return tuple(jnp.split(log_probs, 2))

    return scores


def make_step(loaded: models.Loaded, config: Config) -> Any:
    """Return a step of plain gradient descent on DPO, which also measures the factors of the gradient."""
    optimiser = optax.sgd(config.learning_rate)
    scores = make_scores(loaded, config)

    @jax.jit
    def step(
        params: Any, batch: dict[str, jax.Array], ref: tuple[jax.Array, jax.Array]
    ) -> tuple[Any, dict[str, jax.Array]]:
        (chosen, rejected), pull_back = jax.vjp(lambda params: scores(params, batch), params)
        loss = preference.dpo_loss(chosen, rejected, *ref, beta=config.beta)
        of_chosen, of_rejected, *_ = preference.dpo_loss.grad(chosen, rejected, *ref, beta=config.beta)
        nothing = jnp.zeros_like(of_chosen)
        (up,) = pull_back((of_chosen / loss.size, nothing))
        (down,) = pull_back((nothing, of_rejected / loss.size))
        gradient = jax.tree.map(jnp.add, up, down)
        measured = {
            "weight": -of_chosen.mean() / config.beta,
            "chosen": (chosen - ref[0]).mean(),
            "rejected": (rejected - ref[1]).mean(),
            "left": optax.tree.norm(gradient) / (optax.tree.norm(up) + optax.tree.norm(down)),
        }
        updates, _ = optimiser.update(gradient, optimiser.init(params))
        return optax.apply_updates(params, updates), measured

    return step


def train(
    loaded: models.Loaded, step: Any, scores: Any, batch: dict[str, jax.Array], config: Config
) -> list[dict[str, float]]:
    """Run from the reference; return the measures before every step and after the last."""
    ref, params, rows = scores(loaded.params, batch), loaded.params, []
    for _ in range(config.steps + 1):
        params, measured = step(params, batch, ref)
        rows.append(measured)
    return [{name: float(value) for name, value in row.items()} for row in rows]


def numbers(exact: dict[str, float], runs: dict[str, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Return the identities, and what the runs do to the answers, with intervals over the batches."""
    near, different = runs["nearly the same"], runs["different"]
    batches = f"mean of {len(near['left'])} batches of {len(PROMPTS)} pairs"
    _, _, most = student(near["chosen"][:, -1])
    _, least, _ = student(different["left"][:, 0] - near["left"][:, 0])
    entries = [
        ledger.identity(
            "closed form against jax.grad, at the reference and away from it",
            max(exact["right start"], exact["right later"]),
            tolerance=1e-12,
            unit="of the largest entry, 729 pairs",
            source="Rafailov et al. 2023, section 4",
        ),
        ledger.identity(
            "the same with the sigmoid's sign turned, at the reference",
            exact["turned start"],
            tolerance=1e-12,
            unit="of the largest entry",
            source="σ(0) = ½ either way: a check at the start cannot tell",
        ),
        ledger.test(
            "the same with the sigmoid's sign turned, away from it",
            exact["turned later"],
            at_least=0.1,
            wrong=1e-12,
            unit="of the largest entry",
            source="a policy 4 logits away: the sign matters",
        ),
        ledger.test(
            "change of log π_w, nearly the same: upper end of its 95% interval",
            most,
            at_most=0.0,
            wrong=10.0,
            unit="nats",
            source=f"likelihood displacement, Razin et al. 2024; Student's t, {batches}",
        ),
        ledger.test(
            "share of the pushes that is left at the start, different − nearly the same: lower end of its 95% interval",
            least,
            at_least=0.0,
            wrong=-0.1,
            unit="1",
            source=f"‖up + down‖/(‖up‖ + ‖down‖); Student's t of the paired differences, {batches}",
        ),
    ]
    for kind, measured in runs.items():
        for field, at, name, unit in (
            ("left", 0, "share of the pushes that is left at the start", "1"),
            ("chosen", -1, "change of log π_w", "nats"),
            ("rejected", -1, "change of log π_l", "nats"),
        ):
            mean = student(measured[field][:, at])
            entries.append(ledger.measurement(f"{name}, {kind}", *mean, unit=unit, source=batches))
    return entries
