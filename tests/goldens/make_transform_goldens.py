"""Make the goldens of the transforms: random logits, and what each processor of transformers makes of them.

    make goldens

`transforms.safetensors` holds the logits and tokens, and one array for each of `CASES`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from jaxrl_llm.decoding.transforms import (
    Chain,
    Epsilon,
    Eta,
    LogitBias,
    MinLength,
    MinP,
    NoRepeatNgram,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    Transform,
    Typical,
    bad_words,
)

PATH = Path(__file__).parent / "transforms.safetensors"
ROWS, SLOTS, VOCAB = 4, 24, 40
BAD = [[3], [17], [5, 6], [1, 2, 3], [0, 4], [9, 9], [2, 8, 1, 11]]
BIAS = {1: 2.5, 7: -4.0, 30: -np.inf, 39: 0.125}


def bias_array() -> np.ndarray:
    """`BIAS` as ours takes it."""
    bias = np.zeros(VOCAB, np.float32)
    bias[list(BIAS)] = list(BIAS.values())
    return bias


# name: our transform, and how to build theirs from the module of transformers' processors
CASES: dict[str, tuple[Transform, Callable]] = {
    "temperature 0.7": (Temperature(0.7), lambda t: t.TemperatureLogitsWarper(0.7)),
    "top-k 1": (TopK(1), lambda t: t.TopKLogitsWarper(1)),
    "top-k 7": (TopK(7), lambda t: t.TopKLogitsWarper(7)),
    "top-p 0.8": (TopP(0.8), lambda t: t.TopPLogitsWarper(0.8)),
    "min-p 0": (MinP(0.0), lambda t: t.MinPLogitsWarper(0.0)),
    "min-p 0.05": (MinP(0.05), lambda t: t.MinPLogitsWarper(0.05)),
    "min-p 0.4": (MinP(0.4), lambda t: t.MinPLogitsWarper(0.4)),
    "min-p 1": (MinP(1.0), lambda t: t.MinPLogitsWarper(1.0)),
    "typical 0.2": (Typical(0.2), lambda t: t.TypicalLogitsWarper(0.2)),
    "typical 0.9": (Typical(0.9), lambda t: t.TypicalLogitsWarper(0.9)),
    "epsilon 0.01": (Epsilon(0.01), lambda t: t.EpsilonLogitsWarper(0.01)),
    "epsilon 0.9": (Epsilon(0.9), lambda t: t.EpsilonLogitsWarper(0.9)),
    "eta 0.02": (Eta(0.02), lambda t: t.EtaLogitsWarper(0.02)),
    "eta 0.5": (Eta(0.5), lambda t: t.EtaLogitsWarper(0.5)),
    "repetition 1.3": (RepetitionPenalty(1.3), lambda t: t.RepetitionPenaltyLogitsProcessor(1.3)),
    "repetition 0.5": (RepetitionPenalty(0.5), lambda t: t.RepetitionPenaltyLogitsProcessor(0.5)),
    "no repeat 1": (NoRepeatNgram(1), lambda t: t.NoRepeatNGramLogitsProcessor(1)),
    "no repeat 2": (NoRepeatNgram(2), lambda t: t.NoRepeatNGramLogitsProcessor(2)),
    "no repeat 3": (NoRepeatNgram(3), lambda t: t.NoRepeatNGramLogitsProcessor(3)),
    "bad words": (bad_words(VOCAB, BAD), lambda t: t.NoBadWordsLogitsProcessor(BAD)),
    "bias": (
        LogitBias(bias_array()),
        lambda t: t.SequenceBiasLogitsProcessor({(token,): float(bias) for token, bias in BIAS.items()}),
    ),
    "length 2 of 3": (MinLength(3, [5, 9]), lambda t: t.MinNewTokensLengthLogitsProcessor(SLOTS - 2, 3, [5, 9])),
    "length 3 of 3": (MinLength(3, [5, 9]), lambda t: t.MinNewTokensLengthLogitsProcessor(SLOTS - 3, 3, [5, 9])),
    "chain": (
        Chain((RepetitionPenalty(1.2), Temperature(0.9), TopK(12), Typical(0.7))),
        lambda t: t.LogitsProcessorList(
            [
                t.RepetitionPenaltyLogitsProcessor(1.2),
                t.TemperatureLogitsWarper(0.9),
                t.TopKLogitsWarper(12),
                t.TypicalLogitsWarper(0.7),
            ]
        ),
    ),
}


def inputs(seed: int) -> dict[str, np.ndarray]:
    """Random logits, and tokens that repeat and end in forbidden beginnings. No ties: their top-p cuts them."""
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(ROWS, VOCAB)) * [[0.3], [1], [2], [5]]).astype(np.float32)
    logits[:, 33] = -np.inf
    tokens = rng.integers(0, 12, (ROWS, SLOTS))
    endings = [[1, 2], [5], [2, 8, 1], [9]]
    for row, ending in enumerate(endings):
        for end in (8, 15, SLOTS):
            tokens[row, end - len(ending) : end] = ending
    return {"logits": logits, "tokens": tokens}


call = jax.jit(lambda transform, *given: transform(*given))


def ours(name: str, logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the logits of this library's transform of that name."""
    transform = CASES[name][0]
    if isinstance(transform, MinLength):
        return np.asarray(transform.apply(np.full(ROWS, int(name.split()[1])), logits))
    context = (tokens, np.ones_like(tokens, bool)) if transform.looks_back else ()
    return np.asarray(call(transform, logits, *context))


def theirs(name: str, logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the logits of the processor of transformers."""
    import torch
    from transformers.generation import logits_process

    return CASES[name][1](logits_process)(torch.tensor(tokens), torch.tensor(logits)).numpy()


def main() -> None:
    """Write the file, with the names of the cases as keys."""
    given = inputs(0)
    outputs = {name: np.ascontiguousarray(theirs(name, **given)) for name in CASES}
    save_file(given | outputs, PATH)
    for name, output in outputs.items():
        print(f"{name}: {np.isfinite(output).sum(axis=1).tolist()} tokens kept")


if __name__ == "__main__":
    main()
