"""The value of k1, k2, k3 and the Rao-Blackwell estimator: Gaussians, a tabular model, and a language model.

    python -m experiments.kl_estimators --preset quick

Gaussians by closed form, quadrature and sampling; the tabular model by enumeration; tiny-gpt2 by sampling from it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

from jaxrl_llm import runtime

runtime.set_up()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402
from scipy.optimize import brentq  # noqa: E402
from scipy.stats import norm  # noqa: E402

from experiments import ledger  # noqa: E402
from experiments.ledger import rounded  # noqa: E402
from experiments.parts import gaussian_kl as gaussian  # noqa: E402
from experiments.parts.kl_of_model import SCHULMAN, model_part  # noqa: E402
from experiments.parts.kl_tabular import tabular_part  # noqa: E402

WIDE = math.sqrt(3)  # the reference N(0, 3): Var(k3) is infinite from a variance of 2 on


@dataclasses.dataclass(frozen=True)
class Config:
    """Means of the Gaussian reference, numbers of samples, and the language model's two references."""

    shifts: tuple[float, ...] = (0.1, 1.0, 2.0)
    num_chunks: int = 1_000
    chunk_size: int = 10_000
    path_points: int = 24
    path_length: float = 3.0
    model: str = "tiny-gpt2"
    prompt: str = "I have a dream"
    rows: int = 256
    tokens: int = 32
    temperature: float = 1.3
    noise: float = 0.05
    seed: int = 0


def run(config: Config) -> dict[str, Any]:
    """All four parts, their keys split from one seed."""
    sampling, path, generating, noise = jax.random.split(jax.random.key(config.seed), 4)
    with jax.enable_x64(True):
        gaussians, numbers = gaussian_part(config, sampling)
        tabular, tabular_numbers = tabular_part(path, path_length=config.path_length, path_points=config.path_points)
    model, model_numbers = model_part(config, generating, noise)
    return {
        "claim": "Between Gaussians k2 has less variance than k1 only while KL < 0.618 nats, and k3 only while KL < "
        "0.628; k1, k3 and Rao-Blackwell agree on the KL of a real language model, and Rao-Blackwell reads it most "
        "precisely.",
        "numbers": [*numbers, *crossovers(), *tabular_numbers, *model_numbers],
        "data": rounded({"gaussians": gaussians, "tabular": tabular, "model": model}),
    }


def gaussian_part(config: Config, key: jax.Array) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Schulman's table three times, and what samples cannot see of Var(k3)."""
    num_samples, numbers, rows = config.num_chunks * config.chunk_size, [], []
    sums = gaussian.sampled(
        key, jnp.asarray(config.shifts), WIDE, num_chunks=config.num_chunks, chunk_size=config.chunk_size
    )
    for index, shift in enumerate(config.shifts):
        mean, square = (
            {name: float(sums[name][field][:, index].sum()) / num_samples for name in gaussian.ESTIMATORS}
            for field in ("sum", "squares")
        )
        row = {
            "closed form": gaussian.closed_form(shift),
            "quadrature": gaussian.by_quadrature(shift),
            "sampled": gaussian.from_moments(mean, square, shift),
            "standard error": gaussian.standard_errors(shift, num_samples),
        }
        numbers += table_numbers(shift, row, num_samples) + mean_numbers(shift, mean, row["standard error"])
        rows.append({"shift": shift} | row)
    least = min(float(sums["k3"]["least"].min()), float(sums["wide"]["least"].min()))
    largest = float(sums["x"]["largest"].max())
    blocks = gaussian.block_variances(sums["k3"], config.chunk_size)[:, config.shifts.index(max(config.shifts))]
    numbers += tail_numbers(config, rows, largest, blocks)
    name = f"smallest k3 of {num_samples:.0e} draws"
    numbers.append(ledger.number(name, least, interval=(0.0, None), unit="nats", source=SCHULMAN))
    at = np.unique(np.round(np.logspace(0, math.log10(config.num_chunks), 40)).astype(int))
    running = {
        f"{shift:g}": gaussian.running_sd(sums["k3"], config.chunk_size, at)[:, index]
        for index, shift in enumerate(config.shifts)
    } | {"wide": gaussian.running_sd(sums["wide"], config.chunk_size, at)[:, 0]}
    return {"table": rows, "running": {"samples": config.chunk_size * at, "sd": running}}, numbers


def table_numbers(shift: float, row: dict[str, dict[str, float]], num_samples: int) -> list[dict[str, Any]]:
    """Every entry of the table: by quadrature against the closed form, and sampled within 4 standard errors."""
    entries = []
    for column, exact in row["closed form"].items():
        name, place = f"μ = {shift:g}: {column}", {"unit": "1", "source": SCHULMAN}
        entries.append(
            ledger.number(name, row["quadrature"][column], expected=exact, tolerance=1e-8 * max(1, exact), **place)
        )
        error = row["standard error"][column]
        # Where 4 standard errors exceed the entry itself, the sampled value is reported, not bounded.
        bound = {"tolerance": 4 * error} if 4 * error < exact else {}
        entries.append(
            ledger.number(f"{name}, {num_samples:.0e} draws", row["sampled"][column], expected=exact, **bound, **place)
        )
    return entries


def mean_numbers(shift: float, mean: dict[str, float], errors: dict[str, float]) -> list[dict[str, Any]]:
    """E[k1] = E[k3] = KL, within 4 standard errors."""
    return [
        ledger.number(
            f"μ = {shift:g}: mean {name}",
            mean[name],
            expected=shift**2 / 2,
            tolerance=4 * errors[f"{name} mean"],
            unit="nats",
            source=f"{SCHULMAN}: KL = μ²/2",
        )
        for name in ("k1", "k3")
    ]


def tail_numbers(
    config: Config, rows: list[dict[str, Any]], largest: float, blocks: np.ndarray
) -> list[dict[str, Any]]:
    """How much of Var(k3) lies beyond everything that was drawn."""
    shift = max(config.shifts)
    unseen = math.exp(shift**2) * norm.sf(largest - 2 * shift) / gaussian.central_moment("k3", 2, shift)
    found = rows[config.shifts.index(shift)]
    exact = gaussian.central_moment("k3", 2, shift)
    return [
        ledger.number(
            f"μ = {shift:g}: share of blocks of {config.chunk_size} draws that under-read Var(k3)",
            float((blocks < exact).mean()),
            interval=(0.5 + 4 * 0.5 / math.sqrt(len(blocks)), 1.0),
            unit="1",
            source=f"{len(blocks)} blocks; a symmetric reading gives a half, here passed by 4 standard errors",
        ),
        ledger.number(
            f"μ = {shift:g}: median block's Var(k3) over the true one",
            float(np.median(blocks) / exact),
            interval=(0.0, 1.0),
            unit="1",
            source="e^{μ²} − 1 − μ²",
        ),
        ledger.number(
            f"μ = {shift:g}: share of Var(k3) beyond the largest draw, x = {largest:.2f}",
            unseen,
            interval=(0.01, 1.0),
            unit="1",
            source="E[r²; x > c] = e^{μ²} Φ(2μ − c)",
        ),
        ledger.number(
            f"μ = {shift:g}: standard error of the sampled k3 sd/KL",
            found["standard error"]["k3 sd/KL"],
            unit="1",
            source="closed-form fourth central moment: larger than the entry, hence no bound on its sample",
        ),
    ]


def crossovers() -> list[dict[str, Any]]:
    """Where the variance (and for k2, the mean squared error) passes that of k1, by root finding."""

    def variance(name, divergence):
        return gaussian.central_moment(name, 2, math.sqrt(2 * divergence))

    def mean_squared_error(divergence):
        return variance("k2", divergence) + (divergence**2 / 2) ** 2

    def crossing(function):
        return brentq(lambda divergence: function(divergence) - 2 * divergence, 0.1, 2.0, xtol=1e-12)

    k2, k3 = (crossing(functools.partial(variance, name)) for name in ("k2", "k3"))
    place = {"unit": "nats", "source": f"{SCHULMAN}: Var(k1) = μ² = 2 KL"}
    return [
        ledger.number(
            "k2 has less variance than k1 up to KL =", k2, expected=(5**0.5 - 1) / 2, tolerance=1e-9, **place
        ),
        ledger.number("k3 has less variance than k1 up to KL =", k3, expected=0.628, tolerance=5e-4, **place),
        ledger.number(
            "k2 has a smaller mean squared error than k1 up to KL =",
            crossing(mean_squared_error),
            interval=(0.1, k2),
            **place,
        ),
    ]


def main(preset: Literal["quick", "full"] = "quick") -> None:
    """Write `results/kl_estimators.json`.

    Args:
        preset: quick is 10⁷ Gaussian draws and 256 rows of text, full 10⁸ and 1024.
    """
    ledger.run_and_write("kl_estimators", run, PRESETS[preset], preset)


PRESETS = {"quick": Config(), "full": Config(num_chunks=10_000, rows=1024)}

if __name__ == "__main__":
    tyro.cli(main)
