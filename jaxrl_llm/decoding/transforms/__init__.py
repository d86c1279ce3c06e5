"""Logits transforms: pytrees whose numbers are leaves, so another temperature never recompiles.

Each is called as `transform(logits [..., V]) -> logits [..., V]`, with `-inf` where a token is removed; those that look
back as `transform(logits, tokens [..., L], mask [..., L])`; those with a memory (`MinLength`, `ForcedTokens`,
`Mirostat`) by decoders. A filter keeps ties (tokens of equal logits stand or fall together) and at least one token, and
leaves the logits of what it keeps; `kept_mass` says how much that was. Numbers may be arrays of one value a row.
"""

from jaxrl_llm.decoding.transforms.base import Chain, Transform
from jaxrl_llm.decoding.transforms.control import BadWords, ForcedTokens, LogitBias, MinLength, Mirostat, bad_words
from jaxrl_llm.decoding.transforms.filters import Epsilon, Eta, MinP, Temperature, TopK, TopNSigma, TopP, Typical
from jaxrl_llm.decoding.transforms.penalties import FrequencyPenalty, NoRepeatNgram, PresencePenalty, RepetitionPenalty

__all__ = [
    "BadWords",
    "Chain",
    "Epsilon",
    "Eta",
    "ForcedTokens",
    "FrequencyPenalty",
    "LogitBias",
    "MinLength",
    "MinP",
    "Mirostat",
    "NoRepeatNgram",
    "PresencePenalty",
    "RepetitionPenalty",
    "Temperature",
    "TopK",
    "TopNSigma",
    "TopP",
    "Transform",
    "Typical",
    "bad_words",
]
