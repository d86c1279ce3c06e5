"""Make tests/goldens/bleu.json: what sacreBLEU computes for random corpora, with random options.

PYTHONPATH=<where sacrebleu is> python tests/goldens/make_bleu_goldens.py
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

OUTPUT = Path(__file__).parent / "bleu.json"
PIECES = (
    *(
        "the",
        "cat",
        "a",
        "is",
        "The",
        "mat",
        "on",
        "café",
        "日本",
        "'s",
        "don't",
        "$5",
        "1,000",
        "3.14",
        "5-6",
        "2-",
        "x-y",
    ),
    *(".", ",", "..", ",5", "-", "(hi)", "[a]", "{~}", "^_`", "@-@", "?!", ";", ":", "&quot;", "&amp;lt;", "<skipped>"),
    *("\n", "-\n", "\t", "  ", "\u00a0"),
)
CASES = 48
RAGGED = 12  # more, of hypotheses that do not all have the same number of references


def random_text(rng: np.random.Generator, pieces: int) -> str:
    """Words, marks and whitespace, mostly but not always with spaces between."""
    return "".join(piece + " " * (rng.random() < 0.8) for piece in rng.choice(PIECES, rng.integers(0, pieces + 1)))


def perturbed(rng: np.random.Generator, text: str) -> str:
    """Some words lost, doubled or replaced."""
    words = text.split(" ")
    copies = rng.choice(3, len(words), p=[0.1, 0.85, 0.05])
    kept = [word for word, count in zip(words, copies, strict=True) for _ in range(count)]
    return " ".join(str(rng.choice(PIECES)) if rng.random() < 0.1 else word for word in kept)


def random_corpus(rng: np.random.Generator) -> tuple[list[str], list[list[str]]]:
    """Hypotheses, and of each as many references, which it resembles or does not."""
    size, count, pieces = rng.integers(1, 5), rng.integers(1, 4), rng.choice([1, 5, 16, 16])
    references = [[random_text(rng, pieces) for _ in range(count)] for _ in range(size)]
    alike = rng.random() < 0.85
    return [perturbed(rng, each[-1]) if alike else random_text(rng, pieces) for each in references], references


def ragged(rng: np.random.Generator, references: list[list[str]]) -> list[list[str]]:
    """The references, of which every hypothesis keeps at least one."""
    return [each[: rng.integers(1, len(each) + 1)] for each in references]


def random_options(rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of BLEU and of chrF; every fourth time the defaults."""
    if rng.random() < 0.25:
        return {}, {}
    smoothing = str(rng.choice(["exp", "floor", "add-k", "none"]))
    valued = smoothing in ("floor", "add-k") and rng.random() < 0.5
    lowercase = bool(rng.random() < 0.3)
    return {
        "max_order": int(rng.integers(1, 6)),
        "smoothing": smoothing,
        "smooth_value": float(rng.choice([0.0, 0.01, 2.0])) if valued else None,
        "tokenize": str(rng.choice(["13a", "none"])),
        "lowercase": lowercase,
        "effective_order": bool(rng.random() < 0.5),
    }, {
        "char_order": int(rng.integers(1, 8)),
        "word_order": int(rng.integers(0, 4)),
        "beta": int(rng.integers(1, 4)),
        "lowercase": lowercase,
        "eps_smoothing": bool(rng.random() < 0.4),
    }


def scores_of_sacrebleu(
    hypotheses: list[str], references: list[list[str]], bleu: dict[str, Any], chrf: dict[str, Any]
) -> tuple[float, float]:
    """BLEU and chrF of sacreBLEU, whose references are transposed and whose options have other names."""
    from sacrebleu.metrics import BLEU, CHRF

    names = {"max_order": "max_ngram_order", "smoothing": "smooth_method"}
    streams = [list(stream) for stream in itertools.zip_longest(*references)]  # None where there is none
    theirs = BLEU(force=True, **{names.get(name, name): value for name, value in bleu.items()})
    return theirs.corpus_score(hypotheses, streams).score, CHRF(**chrf).corpus_score(hypotheses, streams).score


def main() -> None:
    """Write the cases."""
    cases = []
    for seed in range(CASES + RAGGED):
        rng = np.random.default_rng([seed, 11])
        hypotheses, references = random_corpus(rng)
        if seed >= CASES:
            references = ragged(rng, references)
        bleu, chrf = random_options(rng)
        scores = scores_of_sacrebleu(hypotheses, references, bleu, chrf)
        cases.append({"hypotheses": hypotheses, "references": references, "bleu_options": bleu, "chrf_options": chrf})
        cases[-1] |= {"bleu": scores[0], "chrf": scores[1]}
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    OUTPUT.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    zeros = sum(case["bleu"] == 0 for case in cases)
    print(f"{OUTPUT.name}: {len(cases)} cases, of which {zeros} have BLEU 0")


if __name__ == "__main__":
    main()
