"""Figures of merit that do not depend on a tokenizer."""

from __future__ import annotations

import math


def bits_per_byte(total_nats: float, num_bytes: int) -> float:
    """Bits per byte of a text whose tokens cost `total_nats` = −Σ log p in all, and which has `num_bytes` UTF-8 bytes.

        total_nats / (num_bytes · log 2)

    Raises:
        ValueError: if there are no bytes.
    """
    if num_bytes < 1:
        raise ValueError(f"bits per byte needs a text of at least one byte, but num_bytes is {num_bytes}.")
    return float(total_nats) / (num_bytes * math.log(2))
