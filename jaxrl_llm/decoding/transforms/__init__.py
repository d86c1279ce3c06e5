"""Logits transforms: pytrees whose numbers are leaves, so another temperature never recompiles.

A stateless one is called as `transform(logits [..., V]) -> logits [..., V]`, with −inf where a token is removed; one
that looks back as `transform(logits, tokens [..., L], mask [..., L])`. Those with a state of their own (`MinLength`,
`ForcedTokens`, `Mirostat`) are for decoders. A filter keeps at least one token and all ties, and does not change the
logits of the tokens that it keeps; `kept_mass` is their probability. Numbers may be arrays of one value for each row.
To write one, see `Transform`.
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
