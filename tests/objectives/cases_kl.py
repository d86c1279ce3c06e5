"""Cases of `objectives.kl` and `objectives.logprobs`."""

from jaxrl_llm.objectives import kl, logprobs
from tests.objectives.cases import Case, log_probs, mask


def pair(rng, n):
    return Case((log_probs(rng, n.batch, n.time), log_probs(rng, n.batch, n.time)))


def two_distributions(rng, n):
    return Case((rng.normal(size=(n.batch, n.vocab)), rng.normal(size=(n.batch, n.vocab))))


def mixed_distributions(rng, n):
    return Case(two_distributions(rng, n).differentiable, (), {"mixture": rng.uniform(0.05, 0.95)})


def masked_distributions(rng, n):
    shape = (n.batch, n.time, n.vocab)
    return Case((rng.normal(size=shape), rng.normal(size=shape)), (mask(rng, n.batch, n.time, kept=n.kept),))


def distribution(rng, n):
    return Case((2 * rng.normal(size=(n.batch, n.vocab)),))


def tokens_of_logits(rng, n):
    tokens = rng.integers(0, n.vocab, (n.batch, n.time))
    return Case((2 * rng.normal(size=(n.batch, n.time, n.vocab)),), (tokens,))


def masked_tokens_of_logits(rng, n):
    case = tokens_of_logits(rng, n)
    return Case(case.differentiable, (*case.constants, mask(rng, n.batch, n.time, kept=n.kept)))


def tokens_of_hidden(rng, n):
    hidden, unembedding = rng.normal(size=(n.batch, n.time, 3)), rng.normal(size=(n.vocab, 3))
    return Case((hidden, unembedding), (rng.integers(0, n.vocab, (n.batch, n.time)),), {"chunk_size": 3})


CASES = {
    kl.k1: pair,
    kl.k2: pair,
    kl.k3: pair,
    kl.exact_kl: two_distributions,
    kl.exact_forward_kl: two_distributions,
    kl.jensen_shannon: mixed_distributions,
    kl.rao_blackwell_kl: masked_distributions,
    logprobs.token_log_probs: tokens_of_logits,
    logprobs.sequence_log_prob: masked_tokens_of_logits,
    logprobs.fused_token_log_probs: tokens_of_hidden,
    logprobs.entropy: distribution,
}
