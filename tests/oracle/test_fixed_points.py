"""Fixed points of online methods: their expected updates over all groups of completions, run to their fixed points."""

import dataclasses
import functools
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import oracle
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.objectives import rlhf
from jaxrl_llm.scoring import Sequences, log_probs
from jaxrl_llm.tabular import TabularLM
from jaxrl_llm.training import policy, reward_fns, steps
from jaxrl_llm.training.policy import METHODS
from jaxrl_llm.training.rollout import Prompts, Rollout, Sampler
from tests.conftest import first_quick

LM, GROUP, TABLES, BETA = TabularLM(3, 2), 3, 5, 0.5
EVERY = np.asarray(oracle.enumerate_sequences(LM))
GROUPS = np.asarray(list(itertools.product(range(9), repeat=GROUP)))
SHARED = {"group_size": GROUP, "importance_cap": 1e9}
# Without whitening, and with γ = λ = 1, any critic is a baseline.
CHANGES = {"ppo": {"whiten": False, "lambda_": 1.0}}
CRITIC = ScalarHead(LM)


@pytest.fixture(scope="module", autouse=True)
def _float64(float64):
    """All of it in double precision."""


def method_of(name, **changes):
    return dataclasses.replace(METHODS[name], **SHARED, **CHANGES.get(name, {}), **changes)


@functools.cache
def tables():
    """Random references and rewards."""
    keys = jax.random.split(jax.random.key(0), 2)
    shape = (TABLES, *jax.tree.leaves(LM.init(keys[0]))[0].shape)
    return jax.random.normal(keys[0], shape), jax.random.normal(keys[1], (TABLES, 9))


def params_of(logits):
    return {"logits": logits}


# The oracle: probabilities of all sequences, and no code of the trainers ----------------------------------------------


def expected_loss(logits, ref, values, *, advantage, kl, beta):
    """A loss whose gradient is the expected first update, tokens of a completion averaged."""
    tokens = oracle.token_log_probs_of(LM, params_of(logits), EVERY)
    tokens_ref = oracle.token_log_probs_of(LM, params_of(ref), EVERY)
    whole, whole_ref = tokens.sum(axis=1), tokens_ref.sum(axis=1)
    chances = jax.lax.stop_gradient(jnp.exp(whole))
    if advantage == "policy gradient":
        credit = chances * values
    else:
        drawn = values[GROUPS].reshape(9, 9, 9, GROUP)
        deviation = drawn[..., 0] - drawn.mean(axis=-1)  # of the first completion; the others are alike
        spread = drawn.std(axis=-1, ddof=1) + 1e-4 if advantage == "group" else 1
        credit = jnp.einsum("a,b,c,abc->a", chances, chances, chances, deviation / spread)
    d = jax.lax.stop_gradient(whole - whole_ref)
    penalty = {
        "reverse": (chances * d * whole).sum() / 2,
        "centred reverse": (1 - 1 / GROUP) * (chances * d * whole).sum() / 2,
        "forward": (chances[:, None] * (jnp.exp(tokens_ref - tokens) - 1 + tokens - tokens_ref)).sum() / 2,
    }[kl]
    return -(credit * whole).sum() / 2 + beta * penalty


UNBIASED = {"advantage": "policy gradient", "kl": "reverse"}
SCALED = {"advantage": "group", "kl": "centred reverse"}
EXPECTED = {
    "reinforce": UNBIASED,
    "rloo": UNBIASED,
    "ppo": UNBIASED,
    "grpo": {"advantage": "group", "kl": "forward"},
    "dr_grpo": {"advantage": "centred", "kl": "centred reverse"},
    "dapo": SCALED,
    "gspo": SCALED,
    "cispo": SCALED,
}


def gain_left(logits, ref, values):
    """(J* − J)/(J* − J_ref): 1 at the reference, 0 at the optimum of RLHF."""
    optimum = rlhf.gibbs_optimum(oracle.sequence_log_probs(LM, params_of(ref)), values, beta=BETA)

    def distance(at):
        found = oracle.sequence_log_probs(LM, params_of(at))
        return (jnp.exp(found) * (found - optimum)).sum()

    return distance(logits) / distance(ref)


@functools.cache
def fixed_points(count=1500):
    """Of each expected update on every table, from the reference; with and without a penalty."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, count))
    kinds = dict.fromkeys(tuple(each.items()) for each in EXPECTED.values())

    def ended(beta, ref, values):
        def of(kind):
            slope = jax.grad(functools.partial(expected_loss, ref=ref, values=values, beta=beta, **dict(kind)))

            def advance(carry, _):
                logits, state = carry
                updates, state = optimizer.update(slope(logits), state)
                return (logits + updates, state), None

            (logits, _), _ = jax.lax.scan(advance, (ref, optimizer.init(ref)), length=count)
            return logits, jnp.abs(slope(logits)).max(), gain_left(logits, ref, values)

        return [of(kind) for kind in kinds]

    found = jax.jit(jax.vmap(jax.vmap(ended, (None, 0, 0)), (0, None, None)))(jnp.asarray([BETA, 0.0]), *tables())
    return {kind: jax.tree.map(np.asarray, each) for kind, each in zip(kinds, found, strict=True)}


def fixed_point(name, beta):
    return jax.tree.map(lambda leaf: leaf[int(beta == 0)], fixed_points()[tuple(EXPECTED[name].items())])


# The methods against it -----------------------------------------------------------------------------------------------


@functools.cache
def first_updates():
    """The methods' expected first updates, through the trainers' code, at a random policy of each table."""
    methods = {name: method_of(name, beta=BETA) for name in METHODS}

    critic = CRITIC.init(jax.random.key(1))

    def whole_params(params):
        return {"policy": params, "critic": critic}

    def of_table(logits, ref, values):
        params, ref_params = params_of(logits), params_of(ref)

        def of_group(indices):
            whole = jnp.ones((GROUP, 2), bool)
            rows = Sequences(jnp.asarray(EVERY)[indices], whole, whole)
            drawn = Rollout(rows, log_probs(LM, params, rows), whole[:, 0])
            found = {}
            for name, each in methods.items():
                of, critic = (whole_params(params), CRITIC) if each.has_critic else (params, None)
                found[name] = policy.experience(LM, each, of, ref_params, drawn, values[indices], critic=critic)[0]
            return found

        batches = jax.vmap(of_group)(jnp.asarray(GROUPS))
        weights = jnp.exp(oracle.sequence_log_probs(LM, params)[GROUPS].sum(axis=1))

        def expected(trained):
            def value(method, batch):
                of = whole_params(trained) if method.has_critic else trained
                return policy.policy_loss(LM, method, critic=CRITIC)(of, batch, None, jax.random.key(0)).value

            return {
                name: weights @ jax.vmap(functools.partial(value, each))(batches[name])
                for name, each in methods.items()
            }

        return jax.jacrev(expected)(params)

    logits = tables()[0] + jax.random.normal(jax.random.key(5), tables()[0].shape)
    return logits, jax.jit(jax.vmap(of_table))(logits, *tables())


@functools.cache
def expected_updates():
    """Of each kind, at the same policies."""
    kinds = dict.fromkeys(tuple(each.items()) for each in EXPECTED.values())

    def of_table(*table):
        return [jax.grad(functools.partial(expected_loss, **dict(kind), beta=BETA))(*table) for kind in kinds]

    return dict(zip(kinds, jax.jit(jax.vmap(of_table))(first_updates()[0], *tables()), strict=True))


@pytest.mark.parametrize("name", first_quick(METHODS, 4))
def test_the_expected_update_of_every_method_is_that_of_the_oracle_on_every_table(name):
    """Two methods sum over the two tokens of a completion, the others average; `dr_grpo` divides by the longest."""
    found = first_updates()[1][name]["logits"]
    expected = expected_updates()[tuple(EXPECTED[name].items())] * (2 if name in ("reinforce", "rloo") else 1)
    np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_fixed_points_are_the_optimum_of_rlhf_or_another_policy(name):
    _, slope, left = fixed_point(name, BETA)
    assert slope.max() < 1e-6, "they are fixed"
    if name in ("reinforce", "rloo", "ppo", "dr_grpo"):
        assert left.max() < 1e-9
    else:
        assert left.min() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dr_grpo", "dapo", "gspo", "cispo"])
def test_without_a_penalty_methods_end_at_the_best_completion(name):
    logits, _, _ = fixed_point(name, 0.0)
    chances = np.exp(jax.vmap(lambda each: oracle.sequence_log_probs(LM, params_of(each)))(logits))
    best = np.take_along_axis(chances, tables()[1].argmax(axis=1)[:, None], axis=1)
    assert best.min() > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rloo", "grpo", "dapo", "gspo"])
def test_sampled_runs_end_at_the_fixed_point_of_every_table(name):
    """As one program for all tables, in single precision as in training."""
    ends, ref, values = (jnp.asarray(each, jnp.float32) for each in (fixed_point(name, BETA)[0], *tables()))
    method = dataclasses.replace(METHODS[name], group_size=GROUP, beta=BETA)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 600))
    empty = (256, 0)
    prompts = Prompts(jnp.zeros(empty, jnp.int32), jnp.zeros(empty, bool))

    def run(ref, values, key):
        trainer, frozen = policy.online(LM, optimizer), steps.Frozen(ref=params_of(ref))
        reward = reward_fns.of_tokens(lambda rows: values[(rows.tokens * jnp.asarray([3, 1])).sum(axis=1)])

        def advance(state):
            return trainer.step(state, prompts, reward, method=method, sampler=Sampler(2), frozen=frozen)

        begin = functools.partial(steps.initial_state, params_of(ref), optimizer)
        return steps.whole_run(begin, advance, steps=600)(key)[0].params["logits"]

    def distance(at, end):
        at, end = (oracle.sequence_log_probs(LM, params_of(each)) for each in (at, end))
        return (jnp.exp(at) * (at - end)).sum()

    found = jax.jit(jax.vmap(run))(ref, values, jax.random.split(jax.random.key(2), TABLES))
    assert (jax.vmap(distance)(found, ends) < 0.01 * jax.vmap(distance)(ref, ends)).all()


def documented():
    """The gains that are left as the document has them: the median, the least and the most of each method."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "trainers" / "online.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]+`) \| [^|]+ \| ([\d.]+)% \(([\d.]+)% to ([\d.]+)%\) \|$", text, flags=re.MULTILINE)
    return {name: row for names, *row in rows for name in re.findall(r"`(\w+)`", names)}


def test_the_document_has_a_row_of_every_method_with_its_optimum():
    assert set(documented()) == set(METHODS)
    for name, (median, least, most) in documented().items():
        assert float(least) <= float(median) <= float(most)
        assert (float(most) == 0) == (name in ("reinforce", "rloo", "ppo", "dr_grpo")), "the optimum of RLHF"


@pytest.mark.slow
def test_the_document_has_the_gains_that_are_left():
    for name, row in documented().items():
        left = 100 * fixed_point(name, BETA)[2]
        assert row == [f"{abs(each):.1f}" for each in (np.median(left), left.min(), left.max())]
