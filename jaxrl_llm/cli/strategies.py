"""Every strategy of decoding under one roof: from a batch of prompts to answers, each with a note."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxrl_llm.cli.options import Sampling, Search
from jaxrl_llm.cli.prompts import Batch


@dataclasses.dataclass(frozen=True)
class Answer:
    """New tokens of one prompt, and what there is to say about them."""

    tokens: list[int]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
    """What every strategy is given."""

    batch: Batch
    sampling: Sampling
    search: Search
    max_new_tokens: int

    @property
    def model(self) -> tuple[Any, Any, Any]:
        """The model, its parameters, and the prompts."""
        return self.batch.loaded.model, self.batch.loaded.params, self.batch.tokens

    @property
    def common(self) -> dict[str, Any]:
        """The arguments that all decoders share."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "prompt_mask": self.batch.mask,
            "eos_id": self.batch.eos_ids,
        }

    @property
    def drawing(self) -> dict[str, Any]:
        """The common arguments, the transforms, and a key."""
        import jax

        return self.common | {
            "transform": self.sampling.transform(self.batch),
            "key": jax.random.key(self.sampling.seed),
        }


def answers(strategy: str, task: Task) -> list[list[Answer]]:
    """The answers to each prompt, best first."""
    return STRATEGIES[strategy](task)


def _rows(generation: Any, note: Callable[[int], str] = lambda row: "") -> list[list[Answer]]:
    """One answer a row."""
    pairs = zip(generation.tokens, generation.mask, strict=True)
    return [[Answer(tokens[mask].tolist(), note(row))] for row, (tokens, mask) in enumerate(pairs)]


def _sample(task: Task) -> list[list[Answer]]:
    from jaxrl_llm.decoding import generate

    generation = generate(*task.model, **task.drawing)
    return _rows(generation, lambda row: f"log-probability {float(generation.logp[row].sum()):.2f}")


def _greedy(task: Task) -> list[list[Answer]]:
    from jaxrl_llm.decoding import generate

    arguments = {name: value for name, value in task.drawing.items() if name != "key"}
    generation = generate(*task.model, greedy=True, **arguments)
    return _rows(generation, lambda row: f"log-probability {float(generation.logp[row].sum()):.2f}")


def _beam(task: Task, *, diverse: bool = False) -> list[list[Answer]]:
    from jaxrl_llm.decoding import beam_search

    search = task.search
    groups = {
        "num_groups": search.num_groups or search.num_beams,
        "diversity_penalty": search.diversity_penalty,
    }
    beams = beam_search(
        *task.model,
        num_beams=search.num_beams,
        length_penalty=search.length_penalty,
        transform=task.sampling.transform(task.batch),
        **(groups if diverse else {}),
        **task.common,
    )
    return _hypotheses(beams)


def _diverse_beam(task: Task) -> list[list[Answer]]:
    return _beam(task, diverse=True)


def _stochastic_beam(task: Task) -> list[list[Answer]]:
    from jaxrl_llm.decoding import stochastic_beam_search

    return _hypotheses(stochastic_beam_search(*task.model, num_beams=task.search.num_beams, **task.drawing))


def _hypotheses(beams: Any) -> list[list[Answer]]:
    """The hypotheses of each row that exist."""
    return [
        [
            Answer(tokens[mask].tolist(), f"log-probability {float(log_prob):.2f}")
            for tokens, mask, log_prob in zip(*row, strict=True)
            if mask.any()
        ]
        for row in zip(beams.tokens, beams.mask, beams.log_prob, strict=True)
    ]


def _contrastive(task: Task) -> list[list[Answer]]:
    from jaxrl_llm.decoding import contrastive_search

    generation = contrastive_search(*task.model, top_k=task.search.candidates, alpha=task.search.alpha, **task.common)
    return _rows(generation, lambda row: f"log-probability {float(generation.logp[row].sum()):.2f}")


def _speculative(task: Task) -> list[list[Answer]]:
    if task.search.draft_model is None:
        raise ValueError("--strategy speculative needs --draft-model; without one, try --strategy lookup.")
    from jaxrl_llm import language_model, models
    from jaxrl_llm.decoding import DraftModel

    draft = models.load(task.search.draft_model, dtype=language_model.params_dtype(task.batch.loaded.params))
    return _speculate(task, DraftModel(draft.model, draft.params))


def _lookup(task: Task) -> list[list[Answer]]:
    from jaxrl_llm.decoding import PromptLookup

    return _speculate(task, PromptLookup(task.search.lookup_ngram))


def _speculate(task: Task, draft: Any) -> list[list[Answer]]:
    from jaxrl_llm.decoding import speculative_generate

    found = speculative_generate(*task.model, draft=draft, num_draft=task.search.num_draft, **task.drawing)
    return _rows(
        found.generation, lambda row: f"{int(found.accepted[row])} drafts accepted in {int(found.rounds[row])} rounds"
    )


def _best_of_n(task: Task) -> list[list[Answer]]:
    from jaxrl_llm.decoding import best_of_n

    def mean_log_prob(samples: Any) -> Any:
        return (samples.logp * samples.mask).sum(axis=-1) / samples.mask.sum(axis=-1).clip(1)

    found = best_of_n(*task.model, n=task.search.num_candidates, score=mean_log_prob, **task.drawing)
    return _rows(found.generation, lambda row: f"log-probability per token {float(found.scores[row].max()):.3f}")


def _mbr(task: Task) -> list[list[Answer]]:
    import functools

    import jax.numpy as jnp

    from jaxrl_llm.analysis.chrf import sentence_chrf
    from jaxrl_llm.decoding import generate, minimum_bayes_risk

    n, (lm, params, prompts) = task.search.num_candidates, task.model
    repeated = functools.partial(jnp.repeat, repeats=n, axis=0)
    samples = generate(lm, params, repeated(prompts), **(task.drawing | {"prompt_mask": repeated(task.batch.mask)}))
    flat = [row[0].tokens for row in _rows(samples)]
    chosen = []
    for start in range(0, len(flat), n):
        decode = functools.partial(task.batch.loaded.tokenizer.decode, skip_special_tokens=True)
        texts = [decode(tokens) for tokens in flat[start : start + n]]
        found = minimum_bayes_risk(texts, sentence_chrf)
        best = int(found.index)
        chosen.append([Answer(flat[start + best], f"expected chrF {float(found.expected_utility[best]):.1f}")])
    return chosen


STRATEGIES: dict[str, Callable[[Task], list[list[Answer]]]] = {
    "sample": _sample,
    "greedy": _greedy,
    "beam": _beam,
    "diverse-beam": _diverse_beam,
    "stochastic-beam": _stochastic_beam,
    "contrastive": _contrastive,
    "speculative": _speculative,
    "lookup": _lookup,
    "best-of-n": _best_of_n,
    "mbr": _mbr,
}
