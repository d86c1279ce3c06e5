"""Rollouts: what a sampler refuses, where completions end, and groups that are drawn again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.decoding import stop_strings
from jaxrl_llm.decoding.transforms import Chain, MinP, TopK
from jaxrl_llm.scoring import Sequences
from jaxrl_llm.training import policy, reward_fns
from jaxrl_llm.training.policy import METHODS
from jaxrl_llm.training.rollout import Prompts, Rollout, Sampler, replaced_groups, rollout
from jaxrl_llm.training.steps import Frozen
from tests.conftest import TINY, random_params

TABLE = TINY["tabular"]
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": 0.0}, "temperature must be a finite number above 0, but is 0.0"),
        ({"temperature": float("nan")}, "temperature must be a finite number above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, but is 0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be an integer of at least 1"),
    ],
)
def test_a_sampler_that_cannot_sample_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Sampler(**{"max_new_tokens": 4} | wrong)
    jax.jit(lambda sampler: sampler.temperature)(Sampler(4, jnp.asarray(0.5)))


def test_completions_end_at_stop_strings_and_filters_hold():
    """The letters a, b, c: a completion ends with "cb" or with the token 1 = "b" as EOS only if asked to."""
    letters = [b"abc"[token % 3 : token % 3 + 1] for token in range(TABLE.vocab_size)]
    prompts = Prompts(jnp.zeros((64, 0), jnp.int32), jnp.zeros((64, 0), bool))
    sampler = Sampler(4, 1.5, stop=stop_strings(letters, ["cb", "aa"]))
    drawn = jax.jit(lambda params, sampler: rollout(TABLE, params, prompts, KEY, sampler))(
        random_params(TABLE), sampler
    )
    tokens, mask = np.asarray(drawn.sequences.tokens), np.asarray(drawn.sequences.completion_mask)
    written = [b"".join(letters[token] for token in row[real]).decode() for row, real in zip(tokens, mask, strict=True)]
    for text, ended in zip(written, drawn.ended, strict=True):
        stops = text.endswith(("cb", "aa"))
        assert bool(ended) == stops and (stops or len(text) == 4)
        assert "cb" not in text[:-1] and "aa" not in text[:-1]
    assert 0 < np.asarray(drawn.ended).sum() < 64
    assert any(stops and len(text) == 4 for text, stops in zip(written, drawn.ended, strict=True)), "at the limit too"
    filtered = dataclasses.replace(sampler, transform=Chain((TopK(1), MinP(0.5))), stop=None)
    same = jax.jit(lambda params, sampler: rollout(TABLE, params, prompts, KEY, sampler))(
        random_params(TABLE), filtered
    )
    assert len({tuple(row) for row in np.asarray(same.sequences.tokens).tolist()}) == 1


# Groups without a difference ------------------------------------------------------------------------------------------


def numbered(draw, count, width):
    """Completions whose tokens name their draw and row."""
    tokens = jnp.full((count, width), 100 * draw) + jnp.arange(count)[:, None]
    whole = jnp.ones((count, width), bool)
    return Rollout(Sequences(tokens, whole, whole), jnp.ones((count, width)), whole[:, 0])


NAN = float("nan")
DRAWS = [
    [0, 0, 1, 2, NAN, 3, 5, 5],  # the first, third and fourth group have no difference
    [7, 7, 7, 8, 9, 9, 9, 9],
    [1, 0, 4, 4, 2, 3, 6, 5],
    [1, 2, 1, 2, 1, 2, 1, 2],
]


@pytest.mark.parametrize(
    ("most", "rows", "count"),
    [
        (0, [0, 1, 2, 3, 4, 5, 6, 7], 0),
        (1, [102, 103, 2, 3, 4, 5, 6, 7], 1),
        (2, [102, 103, 2, 3, 200, 201, 204, 205], 2),
        (9, [102, 103, 2, 3, 200, 201, 204, 205], 2),
    ],
)
def test_groups_without_a_difference_are_replaced_in_their_order_up_to_the_bound(most, rows, count):
    def draw(again):
        return numbered(again, 8, 3 + again), jnp.asarray(DRAWS[again], jnp.float32)

    drawn, earned, further = replaced_groups(draw, group_size=2, most=most)
    assert further == count
    real = np.asarray(drawn.sequences.mask)
    assert [int(row[mask][0]) for row, mask in zip(np.asarray(drawn.sequences.tokens), real, strict=True)] == rows
    np.testing.assert_array_equal(earned, [DRAWS[row // 100][row % 100] for row in rows])
    assert real.sum(axis=1).tolist() == [3 + row // 100 for row in rows], "padded on the left"
    assert (np.asarray(drawn.logp_sampler) == real).all() and drawn.sequences.tokens.shape[1] == 3 + count


def test_further_draws_of_a_step_are_others_and_depend_on_it_alone():
    trainer = policy.online(TABLE, policy.optax.sgd(0.1))
    prompts = Prompts(jnp.zeros((16, 0), jnp.int32), jnp.zeros((16, 0), bool))
    state = policy.steps.initial_state(random_params(TABLE), policy.optax.sgd(0.1), KEY)

    def tokens(again, step=0):
        at = state._replace(step=jnp.asarray(step))
        drawn = trainer.draw(at, prompts, Sampler(4), Frozen(), again, group_size=1, critic=False)
        return np.asarray(drawn.sequences.tokens).tolist()

    draws = [tokens(0), tokens(1), tokens(2), tokens(0, 1), tokens(1, 1)]
    assert all(draws[a] != draws[b] for a in range(5) for b in range(a))
    assert tokens(1) == draws[1]


# Completions that no reward judged ------------------------------------------------------------------------------------


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("grpo", "rloo", "dr_grpo", "gspo", "ppo")]


@pytest.mark.parametrize("name", ["dapo", *SLOW])
def test_completions_without_a_reward_count_for_nothing(name):
    """Of groups of three without the last one it is the update of groups of two, but for the number of rows."""
    method = dataclasses.replace(METHODS[name], group_size=3)
    critic = reward_fns.ScalarHead(TABLE) if method.has_critic else None
    params = random_params(TABLE)
    trained = {"policy": params, "critic": critic.init(KEY, random_params(TABLE, 5))} if critic else params
    prompts = Prompts(jnp.zeros((2, 0), jnp.int32), jnp.zeros((2, 0), bool))
    draw = jax.jit(lambda params, sampler: rollout(TABLE, params, prompts, KEY, sampler, group_size=3))
    drawn = draw(params, Sampler(4, eos_ids=(2,)))
    earned = jnp.asarray([1.0, 2.0, NAN, 4.0, 0.0, NAN])
    kept = np.asarray([0, 1, 3, 4])

    def update(method, drawn, earned):
        @jax.jit
        def of(trained, drawn, earned):
            batch, described = policy.experience(TABLE, method, trained, params, drawn, earned, critic=critic)
            loss = policy.policy_loss(TABLE, method, critic=critic)
            return jax.grad(lambda trained: loss(trained, batch, None, KEY).value)(trained), described

        return of(trained, *reward_fns.only_judged(drawn, earned))

    found, described = update(method, drawn, earned)
    few = dataclasses.replace(method, group_size=2)
    expected, alone = update(few, jax.tree.map(lambda leaf: leaf[kept], drawn), earned[kept])
    share = 1 if method.mode == "token_mean" else 4 / 6
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, share * b, atol=1e-6), found, expected)
    for each in described:
        assert float(described[each]) == pytest.approx(float(alone[each]), abs=1e-5), each
    assert float(described["reward"]) == pytest.approx(7 / 4)
