"""Logits transforms: pytrees whose numbers are leaves, so another temperature never recompiles.

Each is called as `transform(logits [..., V]) -> logits [..., V]`, with `-inf` where a token is removed; those that look
back as `transform(logits, tokens [B, L], mask [B, L])`. A filter keeps ties (tokens of equal logits stand or fall
together) and at least one token, and leaves the logits of what it keeps; `kept_mass` says how much that was. Numbers
may be arrays of one value a row.
"""

from jaxrl_llm.decoding.transforms.base import Chain, Transform
from jaxrl_llm.decoding.transforms.filters import Temperature, TopK, TopP

__all__ = ["Chain", "Temperature", "TopK", "TopP", "Transform"]
