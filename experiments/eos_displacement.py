"""DPO on answers that end by EOS moves probability out of EOS instead of the word before it.

DPO settles the ratio of whole answers only. Where an answer is a word and EOS, that ratio can move because of the word,
as in `sycophancy_amplification`, or because EOS becomes unlikely after one of the words. The model then says that word
and goes on.

python -m experiments.eos_displacement --preset quick
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import scipy.stats
from jaxtyping import Array, Float

from experiments import ledger
from experiments import sycophancy_amplification as amplification
from experiments.frame import experiment
from experiments.sycophancy_amplification import FEW, NEAR, PROMPT, World, beyond
from jaxrl_llm.analysis.sycophancy import amplified_agreement
from jaxrl_llm.scoring import log_probs


@dataclasses.dataclass(frozen=True)
class Config:
    """A GPT-2 of some thousand parameters, fine-tuned to disagree more often than not, and then trained by DPO."""

    words: int = 8
    width: int = 16
    layers: int = 1
    heads: int = 2
    seeds: int = 2  # of reference and training
    reference: float = 0.3  # how often the reference agrees
    sft_steps: int = 80
    sft_batch: int = 128
    sft_learning_rate: float = 0.02
    share: float = 0.9  # of annotators who prefer agreement
    betas: tuple[float, ...] = (1.0, 0.1)
    dpo_steps: int = 80
    dpo_prompts: int = 32
    annotators: int = 16  # who judge each pair
    dpo_learning_rate: float = 0.005
    seed: int = 0


FAR = 0.1  # of probability: a run that is further off the prediction has moved EOS instead of the word


@experiment(quick=Config(), full=Config(seeds=16, betas=(1.0, 0.25, 0.1), sft_steps=300, dpo_steps=400))
def run(config: Config) -> dict[str, Any]:
    """Train from the reference of every seed at every β, and read the word and the EOS after it.

    Raises:
        ValueError: for a share or reference that is not in (0, 1), or no β above 0.
    """
    if not 0 < config.share < 1 or not 0 < config.reference < 1 or not config.betas or min(config.betas) <= 0:
        raise ValueError(
            f"share and reference must be in (0, 1), and betas above 0, but are {config.share}, {config.reference} "
            f"and {config.betas}."
        )
    given = amplification.world(config, ends=True)
    sft_key, dpo_key = jax.random.split(jax.random.key(config.seed))
    refs = jax.jit(jax.vmap(lambda key: amplification.fine_tuned(given, config.reference, key, config)))(
        jax.random.split(sft_key, config.seeds)
    )
    before = np.asarray(jax.vmap(lambda params: answer_log_probs(given, params))(refs), np.float64)

    def lane(ref: Any, share: Array, beta: Array, key: Array) -> Array:
        return answer_log_probs(given, amplification.trained_by_dpo(given, config, ref, share, beta, key))

    at = np.asarray([(config.share, beta) for beta in config.betas])
    after = np.asarray(amplification.on_grid(lane, refs, at, dpo_key), np.float64)
    points = [
        {"beta": beta} | summary(before, after[:, place], config.share, beta, given.thinks_true)
        for place, beta in enumerate(config.betas)
    ]
    return {"claim": claim(points, config), "numbers": numbers(points), "data": {"points": points}}


def answer_log_probs(given: World, params: Any) -> Float[Array, "prompts 2 2"]:
    """Return log π of the word and of EOS after it, for the disagreeing and the agreeing answer."""
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), given.answers)
    return log_probs(given.lm, params, flat)[:, PROMPT:].reshape(-1, 2, 2)


def agreement(log_prob: Float[np.ndarray, "*any 2"]) -> Float[np.ndarray, "*any"]:
    """Return the probability of agreement among the two answers."""
    return 1 / (1 + np.exp(log_prob[..., 0] - log_prob[..., 1]))


def summary(
    before: Float[np.ndarray, "seeds prompts 2 2"],
    after: Float[np.ndarray, "seeds prompts 2 2"],
    share: float,
    beta: float,
    opinions: np.ndarray,
) -> dict[str, Any]:
    """Return means over prompts, [opinion][seed], of users who think that the claim is false, and true.

    `word_off` and `whole_off` are the agreement of the word and of the whole answer, each less its prediction; `eos_*`
    are geometric means.
    """
    read = {"prediction": amplified_agreement(agreement(before[..., 0]), share, beta=beta)}
    read["word_off"] = agreement(after[..., 0]) - read["prediction"]
    read["whole_off"] = agreement(after.sum(axis=-1)) - amplified_agreement(
        agreement(before.sum(axis=-1)), share, beta=beta
    )
    by_opinion = {
        name: [values[:, opinions == opinion].mean(axis=1) for opinion in (False, True)]
        for name, values in read.items()
    }
    eos = {
        f"eos_after_{name}": [np.exp(after[:, opinions == opinion, place, 1].mean(axis=1)) for opinion in (False, True)]
        for place, name in enumerate(("disagreeing", "agreeing"))
    }
    return by_opinion | eos


def stacked(points: list[dict[str, Any]], name: str) -> Float[np.ndarray, "means seeds"]:
    """Return what was measured of every seed, for each β and opinion."""
    return np.concatenate([np.asarray(point[name]) for point in points])


def displaced(points: list[dict[str, Any]]) -> int:
    """Count the seeds of which any run says a word too often or too rarely by more than FAR."""
    return int((np.abs(stacked(points, "word_off")) > FAR).any(axis=0).sum())


def numbers(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the test of the promise, that of whole answers, and the size of the failure."""
    word, whole = (stacked(points, name) for name in ("word_off", "whole_off"))
    seeds, count = word.shape[1], displaced(points)
    described = {"unit": "probability", "source": f"users of either opinion at {len(points)} β, {seeds} seeds"}
    share = scipy.stats.binomtest(count, seeds).proportion_ci()
    eos = np.concatenate([stacked(points, f"eos_after_{name}") for name in ("disagreeing", "agreeing")])
    return [
        ledger.test(
            "largest |deviation| of the word from the prediction, mean over seeds",
            float(np.abs(word.mean(axis=1)).max()),
            at_most=NEAR,
            wrong=0.1,
            **described,
        ),
        ledger.test(
            f"largest p-value that a mean of whole answers is {NEAR} or more off the prediction",
            max(map(beyond, whole)),
            at_most=0.05,
            wrong=0.5,  # of a mean that is off by the margin
            unit="probability",
            source=f"two one-sided t-tests over {seeds} seeds, for either opinion at {len(points)} β; all count",
        ),
        ledger.measurement("largest |deviation| of the word, single seed", float(np.abs(word).max()), **described),
        ledger.measurement(
            "largest |deviation| of whole answers, single seed", float(np.abs(whole).max()), **described
        ),
        ledger.measurement(
            f"seeds of which a word is off the prediction by more than {FAR}",
            count / seeds,
            share.low,
            share.high,
            unit=f"share of {seeds}",
            source="for users of either opinion at any β; Clopper and Pearson's interval",
        ),
        ledger.measurement("least probability of EOS after a word", float(eos.min()), **described),
    ]


def claim(points: list[dict[str, Any]], config: Config) -> str:
    """Return the promise, and what was measured instead."""
    word, whole = (np.abs(stacked(points, f"{name}_off")).max() for name in ("word", "whole"))
    return (
        f"Promised: DPO on answers of a word and EOS reaches the amplification formula to {NEAR}. Measured"
        f"{' in this small run' if config.seeds < FEW else ''}: single seeds are off it by up to {whole:.3f} in whole "
        f"answers, but by up to {word:.2f} in the word, by more than {FAR} in {displaced(points)} of {config.seeds} "
        f"seeds. {_cause(whole)}"
    )


def _cause(whole: float) -> str:
    """Return what explains the word, given the largest deviation of whole answers: EOS, unless they are off, too."""
    if whole > NEAR:
        return "Whole answers are off the prediction, too: this training is too short to tell."
    return "The difference is in the EOS after the word."
