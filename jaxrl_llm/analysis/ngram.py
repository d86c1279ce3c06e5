"""An n-gram model of a stream of tokens: interpolated Kneser-Ney, a baseline for neural models.

R. Kneser and H. Ney, "Improved backing-off for m-gram language modeling", 1995; the three discounts are of S. F. Chen
and J. Goodman, "An empirical study of smoothing techniques for language modeling", 1999.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class _Order:
    """The n-grams of one order. The id of an n-gram is its index in `keys`.

    Attributes:
        keys: (id of the first n − 1 tokens) · vocab_size + (the last token), ascending, [grams].
        shares: (c(hw) − D(c(hw))) / c(h·) of each n-gram hw, [grams].
        backoff: γ(h) of each (n − 1)-gram h, [contexts]; 1 where nothing follows it.
    """

    keys: np.ndarray
    shares: np.ndarray
    backoff: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class KneserNey:
    """Interpolated modified Kneser-Ney: the distribution of a token w after its context h, the n − 1 tokens before it.

        p_n(w | h) = (c(hw) − D_n(c(hw))) / c(h·) + γ(h) p_{n−1}(w | h′),    γ(h) = Σ_w D_n(c(hw)) / c(h·)

    h′ is h without its first token, and p_0 is uniform, 1 / vocab_size. c counts occurrences at the highest order, and
    distinct preceding tokens at every lower one. Where c(h·) = 0, p_n = p_{n−1}.
    D_n(0) = 0, and D_n(1), D_n(2), D_n(3 and more) are estimated from N_k, the number of n-grams with c = k:

        D_n(k) = k − (k + 1) Y N_{k+1} / N_k,    Y = N_1 / (N_1 + 2 N_2)

    Where one of these is undefined or not in (0, k], all three are Y, or 1/2 if N_1 or N_2 is 0. So γ > 0, and every
    token has a positive probability.

    Attributes:
        vocab_size: number of possible tokens.
        discounts: D_n(1), D_n(2), D_n(3 and more) of the orders n = 1, 2, ...
    """

    vocab_size: int
    discounts: tuple[tuple[float, float, float], ...]
    _orders: tuple[_Order, ...] = dataclasses.field(repr=False)

    @classmethod
    def fit(cls, tokens: np.ndarray, *, order: int, vocab_size: int) -> KneserNey:
        """Fit a model to the stream `tokens` [time], with contexts of up to `order` − 1 tokens.

        Raises:
            ValueError: if `order` or `vocab_size` is below 1, the stream is shorter than `order`, or a token is not in
                [0, vocab_size).
            TypeError: if the tokens are not integers.
        """
        if order < 1 or vocab_size < 1:
            raise ValueError(f"order and vocab_size must be at least 1, but are {order} and {vocab_size}.")
        stream = _checked(tokens, vocab_size)
        if len(stream) < order:
            raise ValueError(f"the stream must have at least {order} tokens for order {order}, but has {len(stream)}.")
        orders, discounts, contexts = [], [], 1
        for keys, counts in _counts(stream, order, vocab_size):
            discounts.append(_discounts(counts))
            orders.append(_discounted(keys, counts, keys // vocab_size, contexts, discounts[-1]))
            contexts = len(keys)
        return cls(vocab_size, tuple(discounts), tuple(orders))

    def log_probs(self, tokens: np.ndarray) -> np.ndarray:
        """Return log p of each token of a stream [time] given the up to order − 1 tokens before it, [time], in nats.

        The first token has no context, so that its distribution is p_1; the second token's is p_2, up to the order.

        Raises:
            ValueError: if the stream is empty or a token is not in [0, vocab_size).
            TypeError: if the tokens are not integers.
        """
        stream = _checked(tokens, self.vocab_size)
        probs = np.full(len(stream), 1 / self.vocab_size)
        context = np.zeros(len(stream), np.int64)  # id of the n − 1 tokens before each token; −1 if unseen
        for table in self._orders:
            keys = context * self.vocab_size + stream
            place = np.minimum(np.searchsorted(table.keys, keys), len(table.keys) - 1)
            seen = table.keys[place] == keys
            probs *= np.where(context >= 0, table.backoff[context], 1)
            probs += np.where(seen, table.shares[place], 0)
            context = np.concatenate([[-1], np.where(seen, place, -1)[:-1]])
        return np.log(probs)


def _checked(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.size == 0:
        raise ValueError(f"tokens must be one stream of at least one token, but have the shape {list(tokens.shape)}.")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(f"tokens must be integers, but are {tokens.dtype}.")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(f"tokens must be in [0, {vocab_size}), but span [{tokens.min()}, {tokens.max()}].")
    return tokens.astype(np.int64)


def _counts(stream: np.ndarray, order: int, vocab_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield keys and counts c of the n-grams of order 1, 2, ..., `order`, [grams] each."""
    ids = np.zeros(len(stream) + 1, np.int64)  # ids of the n-grams that start at each token; here n = 0
    keys = occurrences = None
    for n in range(1, order + 1):
        shorter_ids, shorter_keys = ids, keys
        grams = shorter_ids[:-1] * vocab_size + stream[n - 1 :]
        keys, first, ids, occurrences = np.unique(grams, return_index=True, return_inverse=True, return_counts=True)
        if n > 1:  # each distinct n-gram is one more token before the (n − 1)-gram that it ends in
            yield shorter_keys, np.bincount(shorter_ids[first + 1], minlength=len(shorter_keys))
    yield keys, occurrences


def _discounts(counts: np.ndarray) -> tuple[float, float, float]:
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == k)) for k in (1, 2, 3, 4))
    single = n1 / (n1 + 2 * n2) if n1 and n2 else 0.5
    if min(n1, n2, n3, n4) > 0:
        three = (single, 2 - 3 * single * n3 / n2, 3 - 4 * single * n4 / n3)
        if all(0 < discount <= k for k, discount in enumerate(three, 1)):
            return three
    return single, single, single


def _discounted(
    keys: np.ndarray,
    counts: np.ndarray,
    context: np.ndarray,
    contexts: int,
    discounts: tuple[float, float, float],
) -> _Order:
    removed = np.array([0, *discounts])[np.minimum(counts, 3)]
    totals = np.bincount(context, weights=counts, minlength=contexts)
    held_back = np.bincount(context, weights=removed, minlength=contexts)
    followed = totals > 0
    backoff = np.divide(held_back, totals, out=np.ones(contexts), where=followed)
    shares = np.divide(counts - removed, totals[context], out=np.zeros(len(keys)), where=followed[context])
    return _Order(keys, shares, backoff)
