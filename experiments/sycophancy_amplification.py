"""The law by which a slight taste for agreement becomes sycophancy, on tables and on a small GPT-2.

Where a share p of the annotators prefers the answer that agrees with the user, an aligned model agrees with
probability σ(logit π_ref + logit(p)/β), and the best of n answers with 1 − (1 − π_ref)ⁿ. The GPT-2 has one layer and
answers in one token; `eos_displacement` has answers that end by EOS.

python -m experiments.sycophancy_amplification --preset quick
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.frame import experiment
from experiments.parts import amplification_gpt2, amplification_numbers, amplification_table
from experiments.parts.amplification_numbers import EXAMPLE
from jaxrl_llm.analysis.amplification import amplified_agreement, best_of_n_agreement
from jaxrl_llm.tabular import TabularLM


@dataclasses.dataclass(frozen=True)
class Config:
    """A table of 9 answers, and a GPT-2 of some thousand parameters that is asked about 64 claims."""

    table_references: tuple[float, ...] = (0.2, 0.5)
    table_shares: tuple[float, ...] = (0.4, 0.6, 0.9)
    table_betas: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1)
    newton_steps: int = 60

    words: int = 8
    width: int = 16
    layers: int = 1
    heads: int = 2
    seeds: int = 2  # of reference and training
    references: tuple[float, ...] = (0.5,)
    sft_steps: int = 80
    sft_batch: int = 128
    sft_learning_rate: float = 0.02
    shares: tuple[float, ...] = (0.6,)
    betas: tuple[float, ...] = (1.0, 0.1)
    dpo_steps: int = 80
    dpo_prompts: int = 32
    annotators: int = 16  # who judge each pair
    dpo_learning_rate: float = 0.01
    online: tuple[str, ...] = ("ppo",)
    online_betas: tuple[float, ...] = (1.0, 0.1)
    online_steps: int = 40
    online_batch: int = 128
    online_learning_rate: float = 0.02

    best_of: tuple[int, ...] = (1, 2, 4, 8, 16)
    repeats: int = 16
    seed: int = 0


PRESETS = {
    "quick": Config(),
    "full": Config(
        table_references=(0.2, 0.5, 0.8),
        table_shares=(0.4, 0.5, 0.6, 0.75, 0.9),
        width=32,
        seeds=6,  # by the spread of a run at seed 0: 4 of them decide too rarely whether a mean is within 0.02
        references=(0.5, 0.3),
        sft_steps=300,
        sft_learning_rate=0.01,
        shares=(0.4, 0.6, 0.9),
        betas=(1.0, 0.5, 0.25, 0.1),
        dpo_steps=250,
        annotators=256,  # with 16, the noise of labels alone is 0.017 for a seed: near what counts as off the law
        dpo_learning_rate=0.005,
        online=("ppo", "rloo"),
        online_betas=(1.0, 0.5, 0.1),
        online_steps=300,
        online_learning_rate=0.005,
        repeats=32,
        seed=1,
    ),
}


@experiment(**PRESETS)
def run(config: Config) -> dict[str, Any]:
    """Run the table in float64, the GPT-2 in float32.

    Raises:
        ValueError: as `check`.
    """
    check(config)
    table_key, gpt2_key = jax.random.split(jax.random.key(config.seed))
    table = on_table(config, table_key)
    points, best = on_gpt2(config, gpt2_key)
    return {
        "claim": amplification_numbers.claim(table, points, config),
        "numbers": amplification_numbers.numbers(table, points, best),
        "data": {"curves": curves(config), "table": table, "gpt2": points, "best_of_n": best},
    }


def check(config: Config) -> None:
    """Check before a run what would fail, or mean nothing, at its end.

    Raises:
        ValueError: for a probability that is not in (0, 1), a β that is not above 0, nothing to run, fewer seeds than
            an interval needs, a method other than PPO and RLOO, or a batch that its groups do not divide.
    """
    for name in ("table_references", "table_shares", "references", "shares"):
        if not (values := getattr(config, name)) or not all(0 < value < 1 for value in values):
            raise ValueError(f"{name} must be probabilities in (0, 1), but are {values}.")
    for name in ("table_betas", "betas", "online_betas"):
        if not (values := getattr(config, name)) or not all(0 < value < np.inf for value in values):
            raise ValueError(f"{name} must be finite and above 0, but are {values}.")
    if not config.best_of or min(config.best_of) < 1 or config.repeats < 1:
        raise ValueError(f"best_of and repeats must be 1 or more, but are {config.best_of} and {config.repeats}.")
    if config.seeds < 2:
        raise ValueError(f"an interval over seeds needs 2 or more, but seeds is {config.seeds}.")
    for name in config.online:
        size = amplification_gpt2.method_named(name).group_size
        if config.online_batch < size or config.online_batch % size:
            raise ValueError(f"online_batch must be groups of {size} for {name}, but is {config.online_batch}.")


def on_table(config: Config, key: jax.Array) -> dict[str, Any]:
    """Return every point of the grid, by three exact ways, and the error of best-of-n's law."""
    with jax.enable_x64(True):
        lm = TabularLM(vocab_size=3, horizon=2)
        axes = (jnp.asarray(each) for each in (config.table_references, config.table_shares, config.table_betas))
        grid_key, best_key = jax.random.split(key)
        grid, found = amplification_table.on_grid(lm, *axes, grid_key, steps=config.newton_steps)
        reference, share, beta = map(np.asarray, grid)
        law = amplified_agreement(reference, share, beta=beta)
        points = {"reference": reference, "share": share, "beta": beta, "law": law}
        references, errors = np.asarray(config.table_references), []
        for n in config.best_of:
            key_of_n = jax.random.fold_in(best_key, n)
            exact = amplification_table.best_of_n(lm, jnp.asarray(references), key_of_n, n=n)
            errors.append(np.abs(np.asarray(exact) - best_of_n_agreement(references, n)).max())
        return points | {
            **{name: np.asarray(each) for name, each in found._asdict().items()},
            "best_of_n_error": float(max(errors)),
        }


def on_gpt2(config: Config, key: jax.Array) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return every trainer at its points, from every reference and seed; and the best of n draws of the references."""
    given = amplification_gpt2.world(config)
    points, best = [], []
    grid = np.asarray([(share, beta) for share in config.shares for beta in config.betas])
    example = np.asarray([(EXAMPLE, beta) for beta in config.online_betas])
    sft = jax.jit(jax.vmap(lambda aim, key: amplification_gpt2.fine_tuned(given, aim, key, config), (None, 0)))
    for place, aim in enumerate(tqdm(config.references, unit="reference")):
        sft_key, dpo_key, online_key, best_key = jax.random.split(jax.random.fold_in(key, place), 4)
        refs = sft(aim, jax.random.split(sft_key, config.seeds))
        before = np.asarray(jax.vmap(lambda params: amplification_gpt2.agreement(given, params))(refs), np.float64)
        runs = {"DPO": (grid, lambda *lane: amplification_gpt2.by_dpo(given, config, *lane))}
        if place == 0:
            runs |= {
                name.upper(): (
                    example,
                    lambda *lane, name=name: amplification_gpt2.by_policy_gradient(name, given, config, *lane),
                )
                for name in config.online
            }
        for name, (at, lane) in runs.items():
            run_key = dpo_key if name == "DPO" else amplification_gpt2.key_of(name, online_key)
            after = np.asarray(amplification_gpt2.on_grid(lane, refs, at, run_key), np.float64)
            points += amplification_numbers.points(
                name, aim, at, before, after, given.training, opinions=given.thinks_true
            )
        first = jax.tree.map(lambda leaf: leaf[0], refs)
        wins, ref = amplification_gpt2.best_of_n(given, first, best_key, sizes=config.best_of, repeats=config.repeats)
        best.append(amplification_numbers.best_of_n(config, aim, np.asarray(wins), np.asarray(ref, np.float64)))
    return points, best


def curves(config: Config) -> list[dict[str, Any]]:
    """Return the law from π_ref = ½ along 1/β, for every share, as far as any point goes."""
    betas = (*config.table_betas, *config.betas, *config.online_betas)
    inverse = np.geomspace(1 / max(betas), 1 / min(betas), 60)
    return [
        {"share": share, "inverse_beta": inverse, "agreement": amplified_agreement(0.5, share, beta=1 / inverse)}
        for share in sorted({*config.table_shares, *config.shares, *([EXAMPLE] if config.online else [])})
    ]
