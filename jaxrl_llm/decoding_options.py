"""The options of decoding, declared once for Python and the command line; nothing here needs jax."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from jaxrl_llm.options import FLOAT32, Checked, Range, check_characters, number

Strategy = Literal[
    "sample",
    "greedy",
    "beam",
    "diverse-beam",
    "sampled-beam",
    "stochastic-beam",
    "contrastive",
    "speculative",
    "lookup",
    "best-of-n",
    "mbr",
]

WHOLE_TEXT = ("regex", "choices", "json_schema", "grammar")


def count(default: int | None, low: int) -> Any:
    """A field whose value must be an integer of 32 bits, not below `low`."""
    return number(default, low, int32=True)


@dataclasses.dataclass(frozen=True)
class Sampling(Checked):
    """The choice of each token, and the end of a text."""

    max_new_tokens: int = count(64, 1)
    """Maximum number of new tokens."""
    cut: Literal["left", "right"] | None = None
    """Cut prompts that do not fit the context with the new tokens, on this side; otherwise they are refused."""
    context: Literal["refuse", "slide"] = "refuse"
    """A text that does not fit the model's context is refused, or its window slides: each time that it is full, its
    last half is read anew. For sample, greedy and mbr."""
    heal: bool = False
    """Take the last tokens of a prompt back, as many as begin a longer token, and write their text again (they count as
    new tokens), so that the prompt may end within a word. For sample, greedy, mbr and the beams other than
    stochastic-beam."""
    temperature: float = number(1.0, 0, above=True)
    """Divides the logits: below 1 sharper, above 1 flatter."""
    top_k: int | None = count(None, 1)
    """Keep the k most probable tokens."""
    top_p: float | None = number(None, 0, 1, above=True)
    """Keep the smallest set of most probable tokens with this mass."""
    min_tokens_to_keep: int | None = count(None, 1)
    """Keep at least so many tokens of --top-p."""
    min_p: float | None = number(None, 0, 1)
    """Keep the tokens of at least this share of the most probable one's probability."""
    typical_p: float | None = number(None, 0, 1, above=True)
    """Keep the most typical tokens with this mass."""
    epsilon: float | None = number(None, 0, 1)
    """Keep the tokens of at least this probability."""
    eta: float | None = number(None, 0, 1)
    """Epsilon, lowered where the entropy is high."""
    top_n_sigma: float | None = number(None, 0)
    """Keep the tokens within so many standard deviations of the largest logit."""
    mirostat: float | None = number(None, 0, above=True)
    """Hold the surprisal near this target, in bits (mirostat 2)."""
    repetition_penalty: float | None = number(None, 0, above=True)
    """Divides the logits of tokens that were seen, in the prompt too."""
    presence_penalty: float | None = number(None, -math.inf)
    """Subtracted from the logits of tokens that were generated."""
    frequency_penalty: float | None = number(None, -math.inf)
    """Subtracted for every time that a token was generated."""
    no_repeat_ngram: int | None = count(None, 1)
    """Forbid repeated n-grams of this length."""
    min_new_tokens: int | None = count(None, 0)
    """Minimum number of new tokens."""
    regex: str | None = None
    """The new text must match this pattern as a whole."""
    choices: tuple[str, ...] = ()
    """The new text must be one of these."""
    json_schema: str | None = dataclasses.field(default=None, metadata={"any_type": True})
    """The new text must be JSON that is valid by this JSON schema, a file or text that begins with { (in Python also a
    mapping)."""
    grammar: str | None = dataclasses.field(default=None, metadata={"any_type": True})
    """The new text must be of this context-free grammar in Lark syntax, a file or text with a colon; one that reaches
    max_new_tokens is cut. It needs the extra `grammar`."""
    ban: tuple[str, ...] = ()
    """Strings that the new text must not contain, however it is cut into tokens: " king" bars " kingdom" too."""
    bias: tuple[str, ...] = dataclasses.field(default=(), metadata={"any_type": True})
    """Numbers added to the logits of the tokens that complete a string, such as " king=-2" (in Python also a mapping
    from strings to numbers)."""
    stop: tuple[str, ...] = ()
    """Strings that end the text, or control tokens such as <|im_end|>; they are not part of it."""
    guidance_prompt: str | None = None
    """Move away from what would follow this prompt too (classifier-free guidance). For sample, greedy, best-of-n and
    mbr."""
    guidance_scale: float = number(1.5, -math.inf)
    """Strength of the guidance; 1 is none."""
    seed: int = number(0, 0, 2**32 - 1)
    """Random seed; the same seed gives the same text."""

    def __post_init__(self):
        _check_single(self)
        if self.temperature == 0:
            raise ValueError(
                "temperature must be a finite number above 0, but is 0: for the most probable tokens, choose greedy."
            )
        if self.cut not in (None, "left", "right"):
            raise ValueError(f"cut must be left or right, or None, but is {self.cut!r}.")
        if self.context not in ("refuse", "slide"):
            raise ValueError(f"context must be refuse or slide, but is {self.context!r}.")
        if self.context == "slide" and (self.cut is not None or self.guidance_prompt is not None):
            raise ValueError("a context that slides does not go with cut and guidance_prompt.")
        if self.top_k == 0:
            raise ValueError("top_k must be an integer of at least 1, but is 0: leave it out to keep all tokens.")
        super().__post_init__()
        if self.min_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must be at most max_new_tokens, {self.max_new_tokens}, but is {self.min_new_tokens}."
            )
        object.__setattr__(self, "bias", _biases(self.bias))
        for name in ("choices", "stop", "ban"):
            strings = getattr(self, name)
            if not isinstance(strings, Iterable):
                raise TypeError(f"{name} must be a string or several, but is {strings!r}.")
            strings = (strings,) if isinstance(strings, str) else tuple(strings)
            if not all(isinstance(each, str) and each for each in strings):
                raise ValueError(f"{name} must be strings that are not empty, but are {list(strings)}.")
            object.__setattr__(self, name, strings)
        for name in ("regex", "guidance_prompt", "choices", "stop", "ban", "bias"):
            given = getattr(self, name) or ()
            for each in (given,) if isinstance(given, str) else given:
                check_characters(each, name)
        if self.ban and self.whole_text:
            raise ValueError(
                f"ban must be empty with {self.whole_text[0]}, but is {list(self.ban)}: "
                "together they can leave no text."
            )
        if self.min_new_tokens and self.whole_text:
            raise ValueError(
                f"min_new_tokens must be left out with {self.whole_text[0]}, but is {self.min_new_tokens}: "
                "together they can leave no text."
            )
        if self.heal and (left := [*self.whole_text, *(["ban"] if self.ban else [])]):
            raise ValueError(f"heal does not go with {left[0]}, which is for the text after the prompt.")
        if len(self.whole_text) > 1:
            raise ValueError(f"give either {' or '.join(self.whole_text)}, not both.")
        if self.min_tokens_to_keep is not None and self.top_p is None:
            raise ValueError("min_tokens_to_keep needs top_p.")
        if self.guidance_prompt is None and self.guidance_scale != Sampling.guidance_scale:
            raise ValueError("guidance_scale needs guidance_prompt.")

    @property
    def whole_text(self) -> list[str]:
        """The options given that say what the whole new text may be."""
        return [name for name in WHOLE_TEXT if getattr(self, name) not in (None, ())]


def _check_single(options: Checked) -> None:
    """Raise ValueError for an array of numbers."""
    for field in dataclasses.fields(options):
        if "range" in field.metadata and getattr(getattr(options, field.name), "ndim", 0):
            raise ValueError(
                f"{field.name} must be one number for all prompts, but is {getattr(options, field.name)!r:.60}: "
                "jl.decoding takes one for each row."
            )


def _biases(given: Any) -> tuple[str, ...]:
    """Return biases in the form "TEXT=NUMBER"."""
    given = (given,) if isinstance(given, str) else given
    if isinstance(given, Mapping):
        if wrong := [each for each in given if not isinstance(each, str)]:
            raise TypeError(f"bias must map strings to numbers, but has the key {wrong[0]!r}: token ids are not taken.")
        given = [f"{text}={value}" for text, value in given.items()]
    if not isinstance(given, Iterable):
        raise TypeError(f"bias must be strings of the form TEXT=NUMBER, or a mapping, but is {given!r}.")
    listed = tuple(given)
    for each in listed:
        text, _, value = str(each).rpartition("=")
        is_number = re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", value)
        if not text or not is_number or abs(float(value)) > FLOAT32:
            raise ValueError(f"bias must be of the form TEXT=NUMBER, with a finite number, but is {each!r}.")
    return listed


@dataclasses.dataclass(frozen=True)
class Search(Checked):
    """Options of single strategies."""

    num_beams: int = count(4, 1)
    """beam, diverse-beam, sampled-beam, stochastic-beam: the width."""
    length_penalty: float = number(0.0, -math.inf)
    """beam, diverse-beam, sampled-beam: scores are log-probabilities over length to this power."""
    no_repeat_in: Literal["sequence", "beam"] = "sequence"
    """beam, diverse-beam, sampled-beam: --no-repeat-ngram compares a text with itself, or also with the other beams."""
    num_groups: int | None = count(None, 1)
    """diverse-beam: groups of beams; as many as beams if not given."""
    diversity_penalty: float = number(0.5, 0)
    """diverse-beam: for each time that an earlier group chose a token."""
    diversity_by: Literal["token", "hamming", "hamming-factor"] = "token"
    """diverse-beam: compare the tokens of groups, or whole texts without groups: their Hamming distance, whose penalty
    is subtracted or a factor."""
    candidates: int = count(6, 1)
    """contrastive: tokens compared in each step."""
    alpha: float = number(0.6, 0, 1)
    """contrastive: weight of the penalty for states like earlier ones."""
    num_draft: int = count(4, 1)
    """speculative, lookup: tokens drafted in a round."""
    draft_model: str | None = dataclasses.field(default=None, metadata={"any_type": True})
    """speculative: a cheaper model of the same vocabulary, by path or name (in Python also a loaded one)."""
    lookup_ngram: int = count(3, 1)
    """lookup: the longest ending that is looked up in the text so far."""
    num_candidates: int = count(8, 1)
    """best-of-n, mbr: samples to choose from."""

    def __post_init__(self):
        _check_single(self)
        super().__post_init__()


@dataclasses.dataclass(frozen=True)
class TreeSearch(Checked):
    """The size of a search tree, and the choice of the children of a node."""

    depth: int = count(5, 1)
    """Levels: tokens from the root to a leaf."""
    branching: int = count(2, 1)
    """Children of a node."""
    select: Literal["best", "sample", "top-k", "nucleus"] = "best"
    """The most probable children, or children drawn without replacement: from all tokens, the top k or the nucleus."""
    top_k: int | None = count(None, 1)
    """For top-k; 20 if not given."""
    top_p: float | None = number(None, 0, 1, above=True)
    """For nucleus; 0.5 if not given."""
    min_tokens_to_keep: int | None = count(None, 1)
    """For nucleus: keep at least so many tokens; with as many as the branching, every node has all its children."""
    temperature: float = number(1.0, 0, above=True)
    """For children that are drawn."""
    seed: int = number(0, 0, 2**32 - 1)
    """Random seed, for children that are drawn."""
    score_length: Literal["generated", "all"] = "generated"
    """A score is the log-probability of the generated tokens over their number, or over that of all tokens, those of
    the prompt too."""

    def __post_init__(self):
        _check_single(self)
        super().__post_init__()
        filters = {"best": set(), "sample": set(), "top-k": {"top_k"}, "nucleus": {"top_p", "min_tokens_to_keep"}}
        if self.select not in filters:
            raise ValueError(f"select must be one of {', '.join(filters)}, but is {self.select!r}.")
        if self.select == "best" and self.temperature != 1.0:
            raise ValueError("temperature is for children that are drawn: select sample, top-k or nucleus.")
        for name, default in (("top_k", 20), ("top_p", 0.5), ("min_tokens_to_keep", None)):
            if name not in filters[self.select] and getattr(self, name) is not None:
                raise ValueError(f"the selection {self.select} does not use {name}.")
            if name in filters[self.select] and getattr(self, name) is None:
                object.__setattr__(self, name, default)


COMPLETIONS = Range(1, int32=True)
EVERYWHERE = {"max_new_tokens", "seed", "cut"}  # a strategy that draws nothing gives the same for every seed
FILTERS = {"temperature", "top_k", "top_p", "min_tokens_to_keep", "min_p", "typical_p", "epsilon", "eta"}
FILTERS |= {"top_n_sigma", "mirostat"}
PENALTIES = {"repetition_penalty", "presence_penalty", "frequency_penalty", "bias"}
CONSTRAINTS = {"no_repeat_ngram", "min_new_tokens", "ban", *WHOLE_TEXT}
DRAWING = FILTERS | PENALTIES | CONSTRAINTS
TOKEN_BY_TOKEN = {"context", "heal", "stop", "guidance_prompt", "guidance_scale"}
BEAMS = {"num_beams", "length_penalty", "no_repeat_in", "stop", "heal"}
USED: dict[Strategy, set[str]] = {
    "sample": DRAWING | TOKEN_BY_TOKEN,
    "greedy": PENALTIES | CONSTRAINTS | TOKEN_BY_TOKEN,
    "beam": PENALTIES | CONSTRAINTS | BEAMS,
    "diverse-beam": PENALTIES | CONSTRAINTS | BEAMS | {"num_groups", "diversity_penalty", "diversity_by"},
    "sampled-beam": DRAWING | BEAMS,
    "stochastic-beam": DRAWING | {"num_beams", "stop"},
    "contrastive": {"candidates", "alpha", "stop"},
    "speculative": DRAWING | {"num_draft", "draft_model", "stop"},
    "lookup": DRAWING | {"num_draft", "lookup_ngram", "stop"},
    "best-of-n": DRAWING | {"num_candidates", "stop", "guidance_prompt", "guidance_scale"},
    "mbr": DRAWING | TOKEN_BY_TOKEN | {"num_candidates"},
}


def is_beam(strategy: Strategy) -> bool:
    """Return whether the strategy gives several hypotheses of a prompt, best first."""
    return strategy.endswith("beam")


def unused(strategy: Strategy, *groups: Sampling | Search, named: Iterable[str] = ()) -> set[str]:
    """Return the options that were given and that the strategy does not use.

    Given are those that differ from their default and, of `Search`, whose defaults have an effect, those `named`.
    """
    given = {field.name for field in dataclasses.fields(Search)}.intersection(named) | {
        field.name
        for group in groups
        for field in dataclasses.fields(group)
        if getattr(group, field.name) is not field.default and getattr(group, field.name) != field.default
    }
    return given - EVERYWHERE - USED[strategy]


def used(strategy: Strategy, group: Sampling | Search) -> dict[str, Any]:
    """Return the options that the strategy uses, with their values."""
    kept = EVERYWHERE | USED[strategy]
    return {name: value for name, value in vars(group).items() if name in kept}


def chosen(strategy: Strategy, *, greedy: bool) -> Strategy:
    """Return the strategy, which `greedy` names too.

    Raises:
        TypeError: if greedy is neither True nor False.
        ValueError: if the strategy is unknown, or the two name different ones.
    """
    if strategy not in USED:
        raise ValueError(f"strategy must be one of {', '.join(USED)}, but is {strategy!r}.")
    if greedy not in (True, False):
        raise TypeError(f"greedy must be True or False, but is {greedy!r}.")
    if greedy and strategy not in ("sample", "greedy"):
        raise ValueError(f"greedy and {strategy} are two strategies: give one.")
    return "greedy" if greedy else strategy


def check(strategy: Strategy, sampling: Sampling, search: Search, *, n: int = 1, named: Iterable[str] = ()) -> None:
    """Check that the strategy uses all options that were given, and can give `n` completions of a prompt.

    Args:
        named: the options that were given, also those with the value of their default.

    Raises:
        ValueError: naming the options.
    """
    if left := unused(strategy, sampling, search, named=named):
        hint = ": strategy='beam' does." if strategy == "sample" and "num_beams" in left else "."
        raise ValueError(f"the strategy {strategy} does not use {', '.join(sorted(left))}{hint}")
    COMPLETIONS.check("n", n, integer=True)
    if n > 1 and strategy in ("greedy", "contrastive"):
        raise ValueError(f"n must be 1 for {strategy}, which gives one completion of a prompt, but is {n}.")
    if is_beam(strategy) and n > search.num_beams:
        raise ValueError(f"num_beams must be at least the {n} completions asked for, but is {search.num_beams}.")
    if search.no_repeat_in != "sequence" and sampling.no_repeat_ngram is None:
        raise ValueError(f"no_repeat_in={search.no_repeat_in!r} needs no_repeat_ngram.")
    if strategy == "speculative" and search.draft_model is None:
        raise ValueError("the strategy speculative needs draft_model; without one, try the strategy lookup.")
