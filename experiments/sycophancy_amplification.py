"""Why a slight taste for agreement becomes sycophancy: the law of the optimum, on a table and on a small GPT-2.

Where a share p of the annotators prefers the answer that agrees with the user, an aligned model agrees with
probability σ(logit π_ref + logit(p)/β), and the best of n answers with 1 − (1 − π_ref)ⁿ.

python -m experiments.sycophancy_amplification --preset quick
"""

from __future__ import annotations

from jaxrl_llm import runtime

runtime.set_up()  # before jax: its compilation cache

import dataclasses  # noqa: E402
from typing import Any, Literal  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402
from tqdm import tqdm  # noqa: E402

from experiments import ledger  # noqa: E402
from experiments.parts import amplification_gpt2, amplification_numbers, amplification_table  # noqa: E402
from jaxrl_llm.analysis.amplification import amplified_agreement, best_of_n_agreement  # noqa: E402
from jaxrl_llm.tabular import TabularLM  # noqa: E402

EXAMPLE = 0.6  # the share at which all trainers are held against each other


@dataclasses.dataclass(frozen=True)
class Config:
    """A table of 9 answers, and a GPT-2 of some thousand parameters that is asked about 64 claims."""

    table_references: tuple[float, ...] = (0.2, 0.5, 0.8)
    table_shares: tuple[float, ...] = (0.4, 0.5, 0.6, 0.75, 0.9)
    table_betas: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1)
    newton_steps: int = 60

    words: int = 8
    width: int = 16
    layers: int = 1
    heads: int = 2
    seeds: int = 2
    references: tuple[float, ...] = (0.5,)
    sft_steps: int = 150
    sft_batch: int = 128
    sft_learning_rate: float = 0.02
    shares: tuple[float, ...] = (0.6, 0.9)
    betas: tuple[float, ...] = (1.0, 0.1)
    dpo_steps: int = 150
    dpo_prompts: int = 32
    annotators: int = 16  # who judge each pair
    dpo_learning_rate: float = 0.01
    online: tuple[str, ...] = ("ppo",)
    online_betas: tuple[float, ...] = (1.0, 0.1)
    online_steps: int = 60
    online_batch: int = 128
    online_learning_rate: float = 0.02

    best_of: tuple[int, ...] = (1, 2, 4, 8, 16)
    repeats: int = 16
    seed: int = 0


PRESETS = {
    "quick": Config(),
    "full": Config(
        width=32,
        seeds=4,
        references=(0.5, 0.3),
        sft_steps=300,
        sft_learning_rate=0.01,
        shares=(0.4, 0.6, 0.9),
        betas=(1.0, 0.5, 0.25, 0.1),
        dpo_steps=250,
        dpo_learning_rate=0.005,
        online=("ppo", "rloo"),
        online_betas=(1.0, 0.5, 0.1),
        online_steps=300,
        online_learning_rate=0.005,
        repeats=32,
    ),
}


def run(config: Config) -> dict[str, Any]:
    """The table in float64, the GPT-2 in float32."""
    table_key, gpt2_key = jax.random.split(jax.random.key(config.seed))
    table = on_table(config, table_key)
    points, best = on_gpt2(config, gpt2_key)
    worst = amplification_numbers.worst_deviation(points)
    return {
        "claim": "Alignment amplifies: where 60 per cent of the annotators prefer agreement, a model that agreed half "
        "of the time agrees with probability σ(logit(0.6)/β), 0.983 at β = 0.1. Exact optima lie on the law; a GPT-2 "
        f"trained by {', '.join(dict.fromkeys(each['method'] for each in points))} lies within {worst:.3f} of it.",
        "numbers": amplification_numbers.numbers(table, points, best),
        "data": ledger.rounded({"curves": curves(config), "table": table, "gpt2": points, "best_of_n": best}),
    }


def on_table(config: Config, key: jax.Array) -> dict[str, Any]:
    """Every point of the grid, by three exact ways, and the law of best-of-n."""
    with jax.enable_x64(True):
        lm = TabularLM(vocab_size=3, horizon=2)
        axes = (jnp.asarray(each) for each in (config.table_references, config.table_shares, config.table_betas))
        grid, found = amplification_table.on_grid(lm, *axes, key, steps=config.newton_steps)
        reference, share, beta = map(np.asarray, grid)
        law = amplified_agreement(reference, share, beta=beta)
        points = {"reference": reference, "share": share, "beta": beta, "law": law}
        best = [
            np.abs(
                np.asarray(amplification_table.best_of_n(lm, jnp.asarray(config.table_references), key, n=n))
                - best_of_n_agreement(np.asarray(config.table_references), n)
            ).max()
            for n in config.best_of
        ]
        return points | {
            **{name: np.asarray(each) for name, each in found._asdict().items()},
            "best_of_n_error": float(max(best)),
        }


def on_gpt2(config: Config, key: jax.Array) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every trainer at its points, from every reference and seed; and the best of n draws from the references."""
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
            after = amplification_gpt2.on_grid(lane, refs, at, dpo_key if name == "DPO" else online_key)
            points += amplification_numbers.points(name, aim, at, before, np.asarray(after, np.float64), given.training)
        first = jax.tree.map(lambda leaf: leaf[0], refs)
        wins, ref = amplification_gpt2.best_of_n(given, first, best_key, sizes=config.best_of, repeats=config.repeats)
        best.append(amplification_numbers.best_of_n(config, aim, np.asarray(wins), np.asarray(ref, np.float64)))
    return points, best


def curves(config: Config) -> list[dict[str, Any]]:
    """The law from π_ref = ½, along 1/β."""
    inverse = np.geomspace(1, 1 / min(config.betas), 60)
    return [
        {"share": share, "inverse_beta": inverse, "agreement": amplified_agreement(0.5, share, beta=1 / inverse)}
        for share in config.table_shares
    ]


def main(preset: Literal["quick", "full"] = "quick") -> None:
    """Write `results/sycophancy_amplification.json`."""
    ledger.run_and_write("sycophancy_amplification", run, PRESETS[preset], preset)


if __name__ == "__main__":
    tyro.cli(main)
