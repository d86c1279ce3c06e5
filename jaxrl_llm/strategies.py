"""Decoding strategies by name: from prompts and options to hypotheses. Each is one call of `jaxrl_llm.decoding`."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxrl_llm import decoding, files, language_model, models
from jaxrl_llm import mesh as meshes
from jaxrl_llm.analysis.chrf import sentence_chrf
from jaxrl_llm.decoding import constraints, transforms
from jaxrl_llm.decoding.healing import Healing
from jaxrl_llm.decoding_options import Sampling, Search, Strategy
from jaxrl_llm.models.conditional import Conditional
from jaxrl_llm.options import Range, check_characters

MIROSTAT_RATE = 0.1


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A continuation of a prompt."""

    tokens: list[int]
    """The new tokens; a final EOS is one of them."""
    logp: Float[np.ndarray, "time"]
    """Log-probability of each under the model, in nats."""
    log_prob: float
    """Their sum; of beams after a transform that re-weighs and of sampled ones, that of the distribution after it; of
    texts that have several hypotheses, that of all of them together."""
    details: dict[str, float] = dataclasses.field(default_factory=dict)
    """Further numbers of the strategy, by name."""


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of a strategy."""

    task: Conditional
    """The model, its parameters, and the prompts."""
    sampling: Sampling
    search: Search
    eos_ids: list[int]
    transform: transforms.Transform | None = None
    stop: decoding.StopStrings | None = None
    guidance: decoding.Guidance | None = None
    shown: Callable[[int, Sequence[int]], str] | None = None
    """The text of a row's new tokens, without a stop string; for mbr, and beams with regex or choices."""
    first: int = 0
    """Index of its first row among those of all batches: rows draw by their index, however they are batched."""
    n: int = 1
    """Samples of each row, for sample."""
    healing: Healing | None = None
    """The transform by which each row writes the end of its prompt again, if that is asked for."""

    @property
    def model(self) -> tuple[Any, Any, Any]:
        """The model, its parameters and the prompts: positional arguments of every decoder."""
        return self.task.lm, self.task.params, self.task.prompts

    @property
    def common(self) -> dict[str, Any]:
        """The arguments that all decoders share."""
        limit = self.sampling.max_new_tokens
        return {"max_new_tokens": limit, "prompt_mask": self.task.mask, "eos_id": self.eos_ids}

    @property
    def drawing(self) -> dict[str, Any]:
        """The common arguments, the transform, and a key."""
        return self.common | {"transform": self.whole_transform, "key": self.keys()}

    @property
    def whole_transform(self) -> transforms.Transform | None:
        """The transform after that of healing, of which each sample has its own."""
        if self.healing is None:
            return self.transform
        starts = jnp.repeat(self.healing.start, self.n)
        return transforms.Chain(
            (dataclasses.replace(self.healing, start=starts), transforms.as_transform(self.transform))
        )

    def keys(self) -> Key[Array, "*#rows"]:
        """Return the key of all samples, or one for each of a later batch: every sample has an index of its own."""
        key, count = jax.random.key(self.sampling.seed), self.n * len(self.task.prompts)
        if not self.first:
            return key
        return jax.vmap(lambda row: jax.random.fold_in(key, row))(self.n * self.first + jnp.arange(count))

    @property
    def token_by_token(self) -> dict[str, Any]:
        """The arguments of `generate` and `stream`; of those whose context slides, without guidance."""
        guided = {} if self.sampling.context == "slide" else {"guidance": self.guidance}
        return self.drawing | {"stop": self.stop} | guided

    @property
    def generate(self) -> Callable[..., decoding.Generation]:
        """The decoder of sample, greedy and mbr."""
        return decoding.slide if self.sampling.context == "slide" else decoding.generate


def run(strategy: Strategy, request: Request) -> list[list[Hypothesis]]:
    """Return the hypotheses of each prompt, best first.

    Raises:
        ValueError, FloatingPointError: as the decoder does.
    """
    return STRATEGIES[strategy](request)


def run_many(request: Request, *, greedy: bool, rows: int, progress: bool) -> list[Hypothesis]:
    """Return the hypothesis of each prompt, by continuous batching.

    Raises:
        ValueError, FloatingPointError: as `decoding.generate_many` does.
    """
    options = request.drawing | {"stop": request.stop, "greedy": greedy, "rows": rows, "progress": progress}
    return [each for row in rows_of(decoding.generate_many(*request.model, **options)) for each in row]


def transforms_of(
    sampling: Sampling, eos_ids: Sequence[int], vocabulary: Callable[[], Sequence[bytes]]
) -> list[transforms.Transform]:
    """Return the logits transforms that the options ask for: constraints first, so that filters choose among the rest.

    Args:
        vocabulary: gives the bytes of each token (`text.token_bytes`); called if the text is constrained or biased.
    """

    def constrained(compiled: Callable[[Any, Sequence[bytes]], constraints.Automaton]) -> Callable[[Any], Any]:
        return lambda value: constraints.Constrained(compiled(value, vocabulary()), eos_ids)

    def biases(given: Sequence[str]) -> list[transforms.Transform]:
        numbers = {text: float(value) for text, _, value in (each.rpartition("=") for each in given)}
        return [constraints.text_bias(vocabulary(), text, value) for text, value in numbers.items()]

    kinds = {
        "regex": constrained(constraints.from_regex),
        "choices": constrained(constraints.from_choices),
        "json_schema": constrained(lambda schema, pieces: constraints.from_json_schema(_schema(schema), pieces)),
        "grammar": lambda given: constraints.from_grammar(_grammar(given), vocabulary(), eos_ids),
        "ban": lambda texts: transforms.Chain(constraints.banned_text(vocabulary(), each) for each in texts),
        "min_new_tokens": lambda count: transforms.MinLength(count, eos_ids),
        "bias": lambda given: transforms.Chain(biases(given)),
        "repetition_penalty": transforms.RepetitionPenalty,
        "presence_penalty": transforms.PresencePenalty,
        "frequency_penalty": transforms.FrequencyPenalty,
        "no_repeat_ngram": transforms.NoRepeatNgram,
        "temperature": transforms.Temperature,
        "top_k": transforms.TopK,
        "top_p": lambda p: transforms.TopP(p, sampling.min_tokens_to_keep),
        "min_p": transforms.MinP,
        "typical_p": transforms.Typical,
        "epsilon": transforms.Epsilon,
        "eta": transforms.Eta,
        "top_n_sigma": transforms.TopNSigma,
        "mirostat": lambda target: transforms.Mirostat(target, MIROSTAT_RATE),
    }

    def made(name: str, value: Any) -> transforms.Transform:
        try:
            return kinds[name](value)
        except RecursionError:
            raise ValueError(f"{name} must be nested less deeply, but exceeds Python's limit of recursion.") from None

    given = {name: getattr(sampling, name) for name in kinds}
    return [made(name, value) for name, value in given.items() if value != getattr(Sampling, name)]


def _schema(schema: Mapping[str, Any] | str | os.PathLike) -> Mapping[str, Any]:
    """A JSON schema: a mapping, a text that begins with a brace, or the path of its file."""
    if isinstance(schema, Mapping):
        return schema
    if not isinstance(schema, str | os.PathLike):
        raise TypeError(f"json_schema must be a JSON schema as a mapping, or the path of its file, but is {schema!r}.")
    is_text = isinstance(schema, str) and schema.lstrip().startswith("{")
    content = schema if is_text else _read("json_schema", "a JSON schema", schema)
    check_characters(content, "json_schema")
    try:
        return json.loads(content)
    except ValueError as error:
        what = f"JSON, but {schema!r:.60}" if is_text else f"a file of JSON, but {schema}"
        raise ValueError(f"json_schema must be {what} is not: {error}.") from error


def _grammar(grammar: str | os.PathLike) -> str:
    """A grammar as Lark text: a string with a line break or a colon is the text itself, others are paths."""
    if not isinstance(grammar, str | os.PathLike):
        raise TypeError(f"grammar must be a grammar in Lark syntax, or the path of its file, but is {grammar!r}.")
    if isinstance(grammar, str) and re.search("[\n:]", grammar):
        check_characters(grammar, "grammar")
        return grammar
    return _read("grammar", "Lark text with a rule start", grammar)


def _read(name: str, what: str, path: str | os.PathLike) -> str:
    try:
        return files.read_text(path)
    except OSError as error:
        raise ValueError(
            f"{name} must be {what}, or the path of its file, but is {os.fspath(path)!r:.100}: {error.strerror}."
        ) from error


def with_draft(search: Search, params: language_model.Params) -> Search:
    """Return the options with the draft model loaded, in the dtype of the model's parameters and on their devices.

    Raises:
        TypeError: if `draft_model` is not a model, its path or its name.
        ValueError: if it is an encoder-decoder.
    """
    draft = search.draft_model
    if isinstance(draft, str | os.PathLike):
        sharding = meshes.sharding_of(meshes.lies_on(params))
        draft = models.load(draft, dtype=language_model.params_dtype(params), sharding=sharding)
    if not (hasattr(draft, "model") and hasattr(draft, "params")):
        raise TypeError(f"draft_model must be a loaded model, its path or its name, but is {draft!r}.")
    if isinstance(draft.model, models.T5):
        raise ValueError("draft_model must be a decoder-only model, but is an encoder-decoder.")
    return dataclasses.replace(search, draft_model=draft)


def rows_of(generation: decoding.Generation, details: Callable[[int], dict[str, float]] = lambda row: {}) -> list:
    """Return the one hypothesis of each row."""
    arrays = (np.asarray(each) for each in (generation.tokens, generation.mask, generation.logp))
    return [
        [Hypothesis(tokens[mask].tolist(), logp[mask], float(logp[mask].sum()), details(row))]
        for row, (tokens, mask, logp) in enumerate(zip(*arrays, strict=True))
    ]


def _hypotheses(
    tokens: Array, mask: Array, logp: Array, log_prob: Array | None = None, **details: Array
) -> list[list[Hypothesis]]:
    """The hypotheses of each row that exist; by default, `log_prob` is the sum of `logp`."""
    total = logp.sum(axis=-1) if log_prob is None else log_prob
    arrays = [np.asarray(each) for each in (tokens, mask, logp, total, *details.values())]
    return [
        [
            Hypothesis(
                tokens[mask].tolist(), logp[mask], float(total), dict(zip(details, map(float, more), strict=True))
            )
            for tokens, mask, logp, total, *more in zip(*row, strict=True)
            if mask.any()
        ]
        for row in zip(*arrays, strict=True)
    ]


def _sample(request: Request) -> list[list[Hypothesis]]:
    return rows_of(request.generate(*request.model, n=request.n, **request.token_by_token))


def _greedy(request: Request) -> list[list[Hypothesis]]:
    return rows_of(request.generate(*request.model, greedy=True, **request.token_by_token))


def _beam(request: Request, **kind: Any) -> list[list[Hypothesis]]:
    search = request.search
    rules = {"num_beams": search.num_beams, "length_penalty": search.length_penalty, "stop": request.stop, **kind}
    if search.no_repeat_in == "beam":
        rules |= {"no_repeat_ngram": request.sampling.no_repeat_ngram, "no_repeat_in": "beam"}
    beams = decoding.beam_search(*request.model, transform=request.whole_transform, **rules, **request.common)
    found = _hypotheses(beams.tokens, beams.mask, beams.logp, beams.log_prob)
    if not request.sampling.whole_text:
        return found
    return [
        _of_one_text(hypotheses, functools.partial(request.shown, row), in_order=search.length_penalty != 0)
        for row, hypotheses in enumerate(found)
    ]


def _of_one_text(
    hypotheses: list[Hypothesis], shown: Callable[[Sequence[int]], str], *, in_order: bool
) -> list[Hypothesis]:
    """Merge the hypotheses of each text, which differ in its tokens: log Σ exp of their log-probabilities.

    Args:
        in_order: keep the order of the best hypothesis of each text; else sort by the merged log-probability.
    """
    by_text: dict[str, list[Hypothesis]] = {}
    for hypothesis in hypotheses:
        by_text.setdefault(shown(hypothesis.tokens), []).append(hypothesis)
    merged = [
        dataclasses.replace(group[0], log_prob=float(np.logaddexp.reduce([each.log_prob for each in group])))
        for group in by_text.values()
    ]
    return merged if in_order else sorted(merged, key=lambda each: -each.log_prob)


def _diverse_beam(request: Request) -> list[list[Hypothesis]]:
    search, by = request.search, request.search.diversity_by
    groups = search.num_groups or (search.num_beams if by == "token" else 1)
    return _beam(request, num_groups=groups, diversity_penalty=search.diversity_penalty, diversity_by=by)


def _sampled_beam(request: Request) -> list[list[Hypothesis]]:
    return _beam(request, key=request.keys())


def _stochastic_beam(request: Request) -> list[list[Hypothesis]]:
    options = request.drawing | {"num_beams": request.search.num_beams, "stop": request.stop}
    found = decoding.stochastic_beam_search(*request.model, **options)
    return _hypotheses(found.tokens, found.mask, found.logp, log_prob_as_sampled=found.log_prob)


def _contrastive(request: Request) -> list[list[Hypothesis]]:
    search = request.search
    Range(1, request.task.lm.vocab_size).check("candidates", search.candidates, integer=True)
    options = request.common | {"stop": request.stop}
    return rows_of(decoding.contrastive_search(*request.model, top_k=search.candidates, alpha=search.alpha, **options))


def _speculative(request: Request) -> list[list[Hypothesis]]:
    draft = request.search.draft_model
    return _speculate(request, decoding.DraftModel(draft.model, draft.params))


def _lookup(request: Request) -> list[list[Hypothesis]]:
    return _speculate(request, decoding.PromptLookup(request.search.lookup_ngram))


def _speculate(request: Request, draft: decoding.Draft) -> list[list[Hypothesis]]:
    options = request.drawing | {"stop": request.stop}
    found = decoding.speculative_generate(*request.model, draft=draft, num_draft=request.search.num_draft, **options)
    return rows_of(
        found.generation, lambda row: {"accepted": int(found.accepted[row]), "rounds": int(found.rounds[row])}
    )


def _best_of_n(request: Request) -> list[list[Hypothesis]]:
    def mean_log_prob(samples: decoding.Generation) -> Any:
        return (samples.logp * samples.mask).sum(axis=-1) / samples.mask.sum(axis=-1).clip(1)

    n = request.search.num_candidates
    found = decoding.best_of_n(*request.model, n=n, score=mean_log_prob, **request.token_by_token)
    return rows_of(found.generation, lambda row: {"log_prob_per_token": float(found.scores[row].max())})


def _mbr(request: Request) -> list[list[Hypothesis]]:
    n = request.search.num_candidates
    samples = _sample(dataclasses.replace(request, n=n))
    chosen = []
    for row in range(len(samples) // n):
        candidates = [each for (each,) in samples[row * n : (row + 1) * n]]
        texts = [request.shown(row, each.tokens) for each in candidates]
        found = decoding.minimum_bayes_risk(texts, sentence_chrf)
        utility = {"expected_chrf": float(found.expected_utility[found.index])}
        chosen.append([dataclasses.replace(candidates[found.index], details=utility)])
    return chosen


STRATEGIES: dict[Strategy, Callable[[Request], list[list[Hypothesis]]]] = {
    "sample": _sample,
    "greedy": _greedy,
    "beam": _beam,
    "diverse-beam": _diverse_beam,
    "sampled-beam": _sampled_beam,
    "stochastic-beam": _stochastic_beam,
    "contrastive": _contrastive,
    "speculative": _speculative,
    "lookup": _lookup,
    "best-of-n": _best_of_n,
    "mbr": _mbr,
}
