"""The options of decoding, as data: what they are, which strategy knows which, and the transforms they make."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxrl_llm.cli.prompts import Batch

Strategy = Literal[
    "sample",
    "greedy",
    "beam",
    "diverse-beam",
    "stochastic-beam",
    "contrastive",
    "speculative",
    "lookup",
    "best-of-n",
    "mbr",
]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen."""

    temperature: float = 1.0
    """Divides the logits: below 1 sharper, above 1 flatter."""
    top_k: int | None = None
    """Keep the k most probable tokens."""
    top_p: float | None = None
    """Keep the smallest set of most probable tokens with this mass."""
    min_p: float | None = None
    """Keep the tokens of at least this share of the most probable one's probability."""
    typical_p: float | None = None
    """Keep the most typical tokens with this mass."""
    epsilon: float | None = None
    """Keep the tokens of at least this probability."""
    eta: float | None = None
    """Epsilon, lowered where the entropy is high."""
    top_n_sigma: float | None = None
    """Keep the tokens within so many standard deviations of the largest logit."""
    mirostat: float | None = None
    """Hold the surprise near this target, in bits (mirostat 2)."""
    repetition_penalty: float | None = None
    """Divides the logits of tokens that were seen, in the prompt too."""
    presence_penalty: float | None = None
    """Subtracted from the logits of tokens that were generated."""
    frequency_penalty: float | None = None
    """Subtracted for every time that a token was generated."""
    no_repeat_ngram: int | None = None
    """No n-gram of this length twice."""
    min_new_tokens: int | None = None
    """No end before so many tokens."""
    regex: str | None = None
    """The new text must match this pattern as a whole."""
    choices: tuple[str, ...] = ()
    """The new text must be one of these."""
    seed: int = 0
    """Of the random numbers; the same seed gives the same text."""

    def transform(self, batch: Batch) -> Any:
        """The logits transforms that were asked for: constraints first, so that filters choose among what is left."""
        from jaxrl_llm.decoding import transforms

        simple = [
            ("repetition_penalty", transforms.RepetitionPenalty),
            ("presence_penalty", transforms.PresencePenalty),
            ("frequency_penalty", transforms.FrequencyPenalty),
            ("no_repeat_ngram", transforms.NoRepeatNgram),
            ("top_k", transforms.TopK),
            ("top_p", transforms.TopP),
            ("min_p", transforms.MinP),
            ("typical_p", transforms.Typical),
            ("epsilon", transforms.Epsilon),
            ("eta", transforms.Eta),
            ("top_n_sigma", transforms.TopNSigma),
        ]
        given = {name: kind(getattr(self, name)) for name, kind in simple if getattr(self, name) is not None}
        parts = self._constraint(batch)
        if self.min_new_tokens is not None:
            parts.append(transforms.MinLength(self.min_new_tokens, batch.eos_ids))
        parts += [given[name] for name, _ in simple[:4] if name in given]
        parts += [transforms.Temperature(self.temperature)] if self.temperature != 1.0 else []
        parts += [given[name] for name, _ in simple[4:] if name in given]
        parts += [transforms.Mirostat(self.mirostat, 0.1)] if self.mirostat is not None else []
        return transforms.Chain(tuple(parts)) if parts else None

    def _constraint(self, batch: Batch) -> list[Any]:
        if self.regex is None and not self.choices:
            return []
        if self.regex is not None and self.choices:
            raise ValueError("give either --regex or --choices, not both.")
        from jaxrl_llm import text
        from jaxrl_llm.decoding import constraints

        vocabulary = text.token_bytes(batch.loaded.tokenizer, batch.loaded.model.vocab_size)
        make, wanted = (
            (constraints.from_regex, self.regex) if self.choices == () else (constraints.from_choices, self.choices)
        )
        return [constraints.Constrained(make(wanted, vocabulary), batch.eos_ids)]


DRAWING = {"temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon", "eta", "top_n_sigma", "mirostat"}
WEIGHING = {"repetition_penalty", "presence_penalty", "frequency_penalty"}
REMOVING = {"no_repeat_ngram", "min_new_tokens", "regex", "choices"}
KNOWN: dict[str, set[str]] = {
    "greedy": WEIGHING | REMOVING,
    "beam": REMOVING,
    "diverse-beam": REMOVING,
    "contrastive": set(),
}  # the others know all


def unheeded(strategy: str, sampling: Sampling) -> set[str]:
    """The options that were given and that the strategy does not know."""
    defaults = Sampling()
    names = [field.name for field in dataclasses.fields(Sampling) if field.name != "seed"]
    given = {name for name in names if getattr(sampling, name) != getattr(defaults, name)}
    return given - KNOWN.get(strategy, DRAWING | WEIGHING | REMOVING)


def options(names: set[str]) -> str:
    """As they are written on the command line."""
    return ", ".join("--" + name.replace("_", "-") for name in sorted(names))


def check_known(strategy: str, sampling: Sampling) -> None:
    """Raise if an option was given that the strategy would not heed."""
    if unheeded(strategy, sampling):
        raise ValueError(f"--strategy {strategy} has no use for {options(unheeded(strategy, sampling))}.")


@dataclasses.dataclass(frozen=True)
class Search:
    """What only some strategies need."""

    num_beams: int = 4
    """beam, diverse-beam, stochastic-beam: the width."""
    length_penalty: float = 0.0
    """beam, diverse-beam: scores are log-probabilities over length to this power."""
    num_groups: int | None = None
    """diverse-beam: groups of beams; as many as beams if not given."""
    diversity_penalty: float = 0.5
    """diverse-beam: for each time that an earlier group chose a token."""
    candidates: int = 6
    """contrastive: tokens compared in each step."""
    alpha: float = 0.6
    """contrastive: weight of the penalty for states like earlier ones."""
    num_draft: int = 4
    """speculative, lookup: tokens drafted in a round."""
    draft_model: str | None = None
    """speculative: a cheaper model of the same vocabulary."""
    lookup_ngram: int = 3
    """lookup: the longest ending that is looked up in the text so far."""
    num_candidates: int = 8
    """best-of-n, mbr: samples to choose from."""
