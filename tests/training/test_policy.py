"""Online training: where rewards go, what the first step is, and where runs end."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import oracle, scoring
from jaxrl_llm.decoding.transforms import TopP
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.objectives import rlhf
from jaxrl_llm.scoring import Measures, Sequences
from jaxrl_llm.tabular import TabularLM
from jaxrl_llm.training import policy, reward_fns, steps
from jaxrl_llm.training.config import GRPOConfig, PPOConfig
from jaxrl_llm.training.policy import METHODS, Experience, Method, critic_values, experience, token_rewards
from jaxrl_llm.training.rollout import Prompts, Rollout, Sampler
from jaxrl_llm.training.steps import Frozen
from tests.conftest import TINY, first_quick, random_params

LM, TABLE = TINY["gpt2"], TINY["tabular"]
KEY = jax.random.key(0)
TOKENS, REAL = np.asarray([[0, 3, 1], [4, 1, 5], [0, 0, 9], [2, 6, 5]]), np.arange(3) >= [[1], [0], [2], [0]]
PROMPTS = {lm: Prompts(TOKENS % lm.vocab_size, REAL) for lm in (LM, TABLE)}
SAMPLER = Sampler(5, eos_ids=(2,))
SMALL = TabularLM(3, 2)
EVERY = np.asarray(oracle.enumerate_sequences(SMALL))
SMALL_REWARDS = np.random.default_rng(3).normal(size=len(EVERY))
BETA = 0.3


def count_of(token):
    return reward_fns.of_tokens(lambda rows: ((rows.tokens == token) & rows.completion_mask).sum(axis=1) * 1.0)


OPTIMIZER = optax.sgd(0.02)
CRITIC, TABLE_CRITIC = ScalarHead(LM), ScalarHead(TABLE)
# One for all methods, so that they share what is compiled.
TRAINERS = {lm: policy.online(lm, OPTIMIZER, critic=critic) for lm, critic in ((LM, CRITIC), (TABLE, None))}


@functools.cache
def parameters(lm, critic=None):
    """Of a policy, and of a critic if there is one."""
    params = random_params(lm)
    return params if critic is None else {"policy": params, "critic": critic.init(KEY, random_params(lm, 5))}


def started(params):
    return steps.initial_state(params, OPTIMIZER, KEY)


VARIED = reward_fns.of_tokens(lambda rows: jnp.where(rows.completion_mask, rows.tokens, 0).sum(axis=1) / 10.0)


def drawn_by(lm, sampler=SAMPLER):
    """Of GPT-2 one completion of each prompt, of the table four."""
    size, critic = (1, CRITIC) if lm is LM else (4, None)
    state = started(parameters(lm, critic))
    return TRAINERS[lm].draw(state, PROMPTS[lm], sampler, Frozen(), group_size=size, critic=critic is not None)


# The first step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", first_quick(["reinforce", "grpo", *sorted(set(METHODS) - {"reinforce", "grpo"})], 2))
def test_every_method_begins_with_ratio_1_and_divergence_0_and_leaves_the_reference(name):
    """PPO, with policy and critic, of a GPT-2; the others of a table."""
    method = METHODS[name]
    lm, critic, size = (LM, CRITIC, 1) if method.has_critic else (TABLE, None, 4)
    ref = parameters(lm)
    before = jax.tree.map(np.array, ref)
    one_update = dataclasses.replace(method, epochs=1, group_size=size)
    state, metrics = TRAINERS[lm].step(
        started(parameters(lm, critic)), PROMPTS[lm], VARIED, method=one_update, sampler=SAMPLER, frozen=Frozen(ref=ref)
    )
    assert float(metrics["ratio"]) == pytest.approx(1, abs=1e-5)
    assert max(abs(float(metrics[kind])) for kind in ("kl", "kl_k1", "kl_k3")) < 1e-5
    assert float(metrics["clip_fraction"]) < 1e-6
    assert int(state.step) == 1 and 0 < float(metrics["entropy"]) < np.log(lm.vocab_size)
    jax.tree.map(np.testing.assert_array_equal, ref, before)
    trained = state.params["policy"] if method.has_critic else state.params
    assert any((np.asarray(new) != old).any() for new, old in zip(*map(jax.tree.leaves, (trained, ref)), strict=True))


# Methods and changes of them whose expected first update is the policy gradient, or is known not to be.
FIRST_UPDATES = {
    "reinforce": ({}, True),
    "rloo": ({}, True),
    "rloo, a loss": ({"kl": "reverse"}, True),
    "rloo, means of sequences": ({"kl": "reverse", "mode": "sequence_mean"}, True),
    "rloo, mean of tokens": ({"kl": "reverse", "mode": "token_mean"}, True),
    "rloo, a constant": ({"kl": "reverse", "mode": "constant", "normaliser": 2.0}, True),
    "dr_grpo": ({"normaliser": 0.5}, True),  # 1/2 = 1 − 1/N: centred advantages are short by that factor
    "rloo, forward": ({"kl": "forward"}, False),
    "grpo": ({"mode": "sequence_sum", "kl": "reward"}, False),
}


# The first two are those of tests/oracle/test_fixed_points.py, the others weigh tokens as "a constant" does.
SLOW_UPDATES = ("reinforce", "rloo", "rloo, means of sequences", "rloo, mean of tokens")


@functools.cache
def first_updates(*, slow):
    """The methods, the expected gradients of their first updates over all pairs of answers, and the policy gradient."""
    methods = {
        case: dataclasses.replace(METHODS[case.split(",")[0]], beta=BETA, group_size=2, importance_cap=1e9, **changes)
        for case, (changes, _) in FIRST_UPDATES.items()
        if (case in SLOW_UPDATES) == slow
    }
    ref, params = (random_params(SMALL, seed, dtype=jnp.float64) for seed in (0, 1))

    @jax.jit
    def gradients(params, ref):
        def of_group(indices):
            tokens, whole = jnp.asarray(EVERY)[indices], jnp.ones((2, 2), bool)
            rows, earned = Sequences(tokens, whole, whole), jnp.asarray(SMALL_REWARDS)[indices]
            drawn = Rollout(rows, scoring.log_probs(SMALL, params, rows), whole[:, 0])
            return {case: experience(SMALL, each, params, ref, drawn, earned)[0] for case, each in methods.items()}

        groups = oracle.enumerate_groups(SMALL, 2)
        batches = jax.vmap(of_group)(groups)
        weights = jnp.exp(oracle.sequence_log_probs(SMALL, params)[groups].sum(axis=1))

        def expected(trained):
            def value(method, batch):
                return policy.policy_loss(SMALL, method)(trained, batch, None, KEY).value

            return {
                case: weights @ jax.vmap(functools.partial(value, each))(batches[case])
                for case, each in methods.items()
            }

        exact = oracle.objective_grad(SMALL, params, ref, jnp.asarray(SMALL_REWARDS), beta=BETA)
        return jax.jacrev(expected)(params), exact["logits"]

    found, exact = jax.tree.map(np.asarray, gradients(params, ref))
    return methods, {case: each["logits"] for case, each in found.items()}, -exact


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW_UPDATES)) for case in FIRST_UPDATES]
)
def test_the_expected_first_update_is_the_policy_gradient_or_is_known_not_to_be(case):
    with jax.enable_x64(True):
        methods, found, exact = first_updates(slow=case in SLOW_UPDATES)
    if methods[case].mode in ("sequence_mean", "token_mean") or methods[case].normaliser == 2:
        exact = exact / 2  # tokens of every answer: β weighs the divergence against the reward as before
    error = np.abs(found[case] - exact).max() / np.abs(exact).max()
    assert error < 1e-10 if FIRST_UPDATES[case][1] else error > 0.05


# The KL penalty -------------------------------------------------------------------------------------------------------


BETAS = [0.0, 1e-3, 0.05, 1.0]


def penalised(name, earned, **changes):
    """The advantages of a group of completions of 16 tokens with about 0.1 nats of k1, by β."""
    whole = jnp.ones((4, 16), bool)
    rows = Sequences(jnp.zeros((4, 16), jnp.int32), whole, whole)
    ref = jnp.full((4, 16), -3.0)
    found = Measures(ref + 0.02 * jax.random.normal(KEY, (4, 16)), ref, 0 * ref, 0 * ref)
    compared = jax.jit(lambda method: policy._compared(method, found, rows, jnp.asarray(earned))[:, 0])
    methods = [dataclasses.replace(METHODS[name], kl="reward", beta=beta, **changes) for beta in BETAS]
    return np.asarray([compared(each) for each in methods]), (found.logp_policy - ref).sum(axis=1)


@pytest.mark.parametrize("earned", [[0.0] * 4, [1.0] * 4, [0.0, 1.0, 0.0, 3.0]])
@pytest.mark.parametrize("name", ["grpo", "rloo", "dr_grpo", "dapo"])
def test_the_penalty_has_the_size_of_beta_whatever_the_spread_of_the_group(name, earned):
    found, k1 = penalised(name, earned)
    if len(set(earned)) == 1:
        np.testing.assert_array_equal(found[0], 0)
    pull = -(k1 - k1.mean()) * (4 / 3 if name == "rloo" else 1)
    for beta, each in zip(BETAS, found, strict=True):
        np.testing.assert_allclose(each - found[0], beta * pull, atol=1e-6)


@pytest.mark.parametrize("kl", ["reward", "reverse", "forward"])
def test_the_first_update_is_linear_in_beta(kl):
    """On one sampled batch, in which the rewards of half of the groups are equal."""
    params, ref = (random_params(SMALL, seed, dtype=jnp.float32) for seed in (1, 0))
    method = dataclasses.replace(METHODS["grpo"], kl=kl)
    rows = jnp.asarray(EVERY)[jax.random.randint(KEY, (64,), 0, 9)]
    whole = jnp.ones((64, 2), bool)
    earned = jnp.where(jnp.arange(64) < 32, 0, jnp.asarray(SMALL_REWARDS)[(rows * jnp.asarray([3, 1])).sum(axis=1)])

    @jax.jit
    @jax.vmap
    def update(beta):
        each, sequences = dataclasses.replace(method, beta=beta), Sequences(rows, whole, whole)
        drawn = Rollout(sequences, scoring.log_probs(SMALL, params, sequences), whole[:, 0])
        batch, _ = experience(SMALL, each, params, ref, drawn, earned)
        return jax.grad(lambda params: policy.policy_loss(SMALL, each)(params, batch, None, KEY).value)(params)[
            "logits"
        ]

    found = np.asarray(update(jnp.asarray(BETAS)))
    pull = found[-1] - found[0]
    assert np.abs(pull).max() > 0.05
    for beta, each in zip(BETAS, found, strict=True):
        np.testing.assert_allclose(each - found[0], beta * pull, atol=1e-6)


def steps_to_half(name, **changes):
    """The median step at which the mean reward passes ½, of 8 runs for each β, where 1 of 180 completions is right."""
    lm, betas = TabularLM(3, 4), jnp.asarray([0.0, 1e-3, 0.05])
    ref = lm.init(jax.random.key(7))
    chances = jnp.exp(oracle.sequence_log_probs(lm, ref))
    right = oracle.enumerate_sequences(lm)[jnp.abs(chances - 1 / 180).argmin()]
    reward = reward_fns.of_tokens(lambda rows: (rows.tokens == right).all(axis=1) * 1.0)
    optimizer = optax.adam(0.02)
    trainer, prompts = policy.online(lm, optimizer), Prompts(jnp.zeros((16, 0), jnp.int32), jnp.zeros((16, 0), bool))

    def run(beta, key):
        method = dataclasses.replace(METHODS[name], beta=beta, **changes)

        def advance(state):
            state, metrics = trainer.step(
                state, prompts, reward, method=method, sampler=Sampler(4), frozen=Frozen(ref=ref)
            )
            return state, metrics["reward"]

        return steps.whole_run(lambda key: steps.initial_state(ref, optimizer, key), advance, steps=130)(key)[1]

    keys = jax.random.split(KEY, 8)
    curves = jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (0, None)))(betas, keys)
    return np.median((curves > 0.5).argmax(axis=2) + 130 * (curves <= 0.5).all(axis=2), axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, pytest.param({"kl": "reward"}, marks=pytest.mark.slow)])
def test_a_small_penalty_does_not_slow_learning_where_most_groups_fail(changes):
    found = steps_to_half("grpo", **changes)
    assert 30 < found[0] < 150 and (found < 1.15 * found[0]).all()


@pytest.mark.parametrize("name", ["grpo", "gspo", "rloo"])
def test_what_a_filter_took_away_weakens_penalty_and_surrogate_alike(name):
    """Completions of 12 tokens, of which it keeps 0.9 of each next-token distribution, 0.28 of the completion's."""
    lm, rng = TabularLM(2, 14), np.random.default_rng(0)
    given = [rng.integers(0, 2, size).tolist() for size in (12, 13, 12, 11)]
    rows = jax.tree.map(jnp.asarray, scoring.pad_completions([[1], [0], [1, 1], [0]], given))
    answer, params = rows.completion_mask, lm.init(KEY)
    logp = jax.jit(functools.partial(scoring.log_probs, lm))(params, rows)
    mass = np.where(answer, np.log(rng.uniform(0.87, 0.93, answer.shape)), 0)
    sizes = jnp.where(answer, jnp.asarray([[1.0], [-0.5], [0.7], [-1.2]]), 0)
    ref = jnp.where(answer, logp + 0.3 * rng.normal(size=answer.shape), 0)
    plain = Experience(rows, logp, logp, ref, sizes, 0 * logp, 0 * logp)
    filtered = plain._replace(logp_sampler=logp - mass)

    @jax.jit
    def norms(batch):
        parts = []
        for beta, share in ((0.0, 1.0), (1.0, 0.0)):
            loss = policy.policy_loss(lm, dataclasses.replace(METHODS[name], kl="reverse", beta=beta))
            given = batch._replace(advantages=share * batch.advantages)
            parts.append(jax.grad(lambda params, of=loss, given=given: of(params, given, None, KEY).value)(params))
        return [optax.tree.norm(part) for part in parts]

    kept = np.asarray(norms(filtered)) / np.asarray(norms(plain))  # of the surrogate, and of the penalty
    assert (np.abs(kept - 0.9) < 0.03).all()


@pytest.mark.parametrize(
    ("mode", "bounds", "expected"),
    [
        ("token_truncate", {}, [[0.5, 3], [2, 1]]),
        ("token_truncate", {"importance_floor": 0.8, "importance_cap": 2.0}, [[0.8, 2], [2, 1]]),
        ("token_mask", {"importance_floor": 0.8, "importance_cap": 2.0}, [[0, 0], [2, 1]]),
        ("sequence_truncate", {"importance_cap": 1.8}, [[1.5, 1.5], [1.8, 1.8]]),
        ("sequence_mask", {"importance_cap": 1.8}, [[1.5, 1.5], [0, 0]]),
    ],
)
def test_importance_weights_of_tokens_and_of_completions_are_truncated_or_masked(mode, bounds, expected):
    answer = np.ones((2, 2), bool)
    batch = Experience(Sequences(np.zeros((2, 2), int), answer, answer), *[np.zeros((2, 2))] * 6)
    batch = batch._replace(logp_old=np.log(np.asarray([[0.5, 3], [2, 1]], np.float32)))
    method = Method(importance_mode=mode, **{"importance_cap": 9.0} | bounds)
    found = jax.jit(policy._sampler_weight)(method, batch)
    np.testing.assert_allclose(np.broadcast_to(found, (2, 2)), expected, rtol=1e-5)


# Lengths and entropy --------------------------------------------------------------------------------------------------


def test_long_completions_lose_up_to_one():
    """DAPO's numbers: 16384 tokens and a cache of 4096."""
    found = policy.overlong_penalty(jnp.asarray([1, 16384, 18432, 20480]), 20480, buffer=4096 / 20480)
    np.testing.assert_allclose(found, [0, 0, 0.5, 1], atol=1e-6)
    np.testing.assert_array_equal(policy.overlong_penalty(jnp.asarray([1, 20480]), 20480, buffer=0.0), 0)


def test_lengths_reach_the_reward_the_loss_and_the_normaliser():
    drawn = drawn_by(TABLE)
    ended, params = np.asarray(drawn.ended), parameters(TABLE)
    assert 0 < ended.sum() < 16
    length = np.asarray(drawn.sequences.completion_mask).sum(axis=1)
    methods = [
        Method(advantage="rloo", overlong_buffer=0.4),  # 2 of 5 tokens
        dataclasses.replace(METHODS["dr_grpo"], mask_truncated=True),
        dataclasses.replace(METHODS["dr_grpo"], mask_truncated=True, normaliser=5.0),
    ]

    @jax.jit
    def scored(drawn):
        found = [experience(TABLE, each, params, params, drawn, earned)[0] for each in methods]
        losses = [policy.policy_loss(TABLE, each)(params, found[1], None, KEY).value for each in methods[1:]]
        return [each.advantages for each in found[:2]], found[1].sequences.completion_mask, losses

    earned = jnp.arange(16.0) ** 2
    (shaped, masked), counted, (by_default, given) = jax.tree.map(np.asarray, scored(drawn))
    reward = (np.arange(16) ** 2 - np.clip((length - 3) / 2, 0, 1)).reshape(4, 4)
    expected = ((reward - reward.mean(axis=1, keepdims=True)) * 4 / 3).reshape(-1, 1)
    np.testing.assert_allclose(shaped, np.where(drawn.sequences.completion_mask, expected, 0), rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(counted.any(axis=1), ended)
    squares = (np.arange(16.0) ** 2).reshape(4, 4)
    alone = np.where(ended, (squares - squares.mean(axis=1, keepdims=True)).ravel(), 0)
    np.testing.assert_allclose(masked.max(axis=1) + masked.min(axis=1), alone, atol=1e-4)
    assert by_default == given == pytest.approx(-(alone * length).sum() / 16 / 5, rel=1e-4)


def test_without_eos_no_completion_ends_and_none_can_be_left_out():
    method = dataclasses.replace(METHODS["grpo"], mask_truncated=True)
    with pytest.raises(ValueError, match="mask_truncated must be False without EOS"):
        TRAINERS[TABLE].step(None, PROMPTS[TABLE], VARIED, method=method, sampler=Sampler(5), frozen=Frozen())


@pytest.mark.slow
def test_the_entropy_bonus_moves_the_optimum_as_it_must():
    """Of one token: J = E[r] − β KL + c H is largest at ref^{β/(β + c)} e^{r/(β + c)}; its gradient is 0 there."""
    lm, beta, weight = TabularLM(5, 1), 0.5, 0.2
    with jax.enable_x64(True):
        ref = random_params(lm, dtype=jnp.float64)
        log_ref, earned = oracle.sequence_log_probs(lm, ref), jnp.asarray([1.0, -0.5, 0.3, 2.0, 0.0])
        best = jax.nn.log_softmax((beta * log_ref + earned) / (beta + weight))
        rows = jnp.asarray(oracle.enumerate_groups(lm, 2))
        method = dataclasses.replace(METHODS["rloo"], group_size=2, beta=beta, entropy_coefficient=weight)

        @jax.jit
        def slope(logits):
            params, tokens = {"logits": logits}, rows.reshape(-1, 1)
            whole = jnp.ones(tokens.shape, bool)
            sequences = Sequences(tokens, whole, whole)
            drawn = Rollout(sequences, scoring.log_probs(lm, params, sequences), whole[:, 0])
            batch, _ = experience(lm, method, params, ref, drawn, earned[tokens[:, 0]])
            chances = jnp.exp(oracle.sequence_log_probs(lm, params))[rows].prod(axis=1)

            def expected(params):
                def of_group(batch):
                    return policy.policy_loss(lm, method)(params, batch, None, KEY).value

                return chances @ jax.vmap(of_group)(jax.tree.map(lambda leaf: leaf.reshape(-1, 2, 1), batch))

            return jax.grad(expected)(params)["logits"]

        assert np.abs(slope(best.reshape(ref["logits"].shape))).max() < 1e-10
        assert np.abs(slope(ref["logits"])).max() > 1e-2


# Rewards and advantages -----------------------------------------------------------------------------------------------


def test_the_reward_stands_at_the_last_token_of_the_answer_and_the_penalty_at_each():
    answer = np.asarray([[False, True, True, False], [False, False, True, True]])
    rows, earned = Sequences(np.zeros((2, 4), int), answer, answer), np.asarray([10.0, 20.0])
    found = Measures(*(np.full((2, 4), value) for value in (-1.0, -3.0, 0.0, 0.0)))
    in_reward = jax.jit(token_rewards)(Method(beta=0.5), found, rows, earned)
    np.testing.assert_allclose(in_reward, [[0, -1, 9, 0], [0, 0, -1, 19]])
    in_loss = jax.jit(token_rewards)(Method(beta=0.5, kl="reverse"), found, rows, earned)
    np.testing.assert_allclose(in_loss, [[0, 0, 10, 0], [0, 0, 0, 20]])


@pytest.mark.parametrize("bootstrap", [False, True])
def test_an_answer_that_was_cut_off_ends_or_goes_on(bootstrap):
    """With γ = λ = 1, the advantage is the return minus the value: the end is worth 0, or what the critic says."""
    params = parameters(TABLE, TABLE_CRITIC)
    method = dataclasses.replace(METHODS["ppo"], bootstrap=bootstrap, lambda_=1.0, whiten=False, beta=0.0)
    drawn = drawn_by(TABLE)
    assert 0 < drawn.ended.sum() < 16
    earned = np.arange(16, dtype=np.float32)

    @jax.jit
    def found(method, params, drawn):
        batch, _ = experience(TABLE, method, params, params["policy"], drawn, earned, critic=TABLE_CRITIC)
        return batch, *critic_values(TABLE_CRITIC, params["critic"], drawn.sequences)

    batch, values, end = found(method, params, drawn)
    last = np.where(bootstrap & ~np.asarray(drawn.ended), end, 0)
    expected = np.where(drawn.sequences.completion_mask, (earned + last)[:, None] - values, 0)
    np.testing.assert_allclose(batch.advantages, expected, atol=1e-4)
    expected = np.where(drawn.sequences.completion_mask, (earned + last)[:, None], 0)
    np.testing.assert_allclose(batch.returns, expected, atol=1e-4)


def test_values_are_those_before_each_token_and_do_not_see_it():
    params = parameters(LM, CRITIC)["critic"]
    rows = scoring.pad_completions([[3, 1], [4]], [[1, 5], [9, 2, 6]], length=6)
    of_rows = jax.jit(functools.partial(critic_values, CRITIC))
    values, _ = of_rows(params, rows)
    changed = rows._replace(tokens=np.where(np.arange(6) == 3, 7, rows.tokens))
    others, _ = of_rows(params, changed)
    np.testing.assert_allclose(values[:, :4], others[:, :4], atol=1e-6)
    plain = jax.jit(CRITIC.values)(params, rows.tokens, rows.mask)
    np.testing.assert_allclose(values[0, 2:4], plain[0, 1:3], atol=1e-5)


# The distribution that samples ----------------------------------------------------------------------------------------


def test_sampler_and_trainer_have_one_temperature():
    drawn = drawn_by(LM, dataclasses.replace(SAMPLER, temperature=0.6))
    found = jax.jit(functools.partial(scoring.log_probs, LM))(parameters(LM), drawn.sequences, temperature=0.6)
    np.testing.assert_allclose(found, drawn.logp_sampler, atol=1e-4)


def test_what_a_filter_took_away_is_made_up_for_up_to_the_cap():
    """The weight is π/μ, the kept mass, at each token."""
    drawn = drawn_by(TABLE, dataclasses.replace(SAMPLER, transform=TopP(0.5)))
    method = Method(advantage="rloo", importance_cap=0.8)

    @jax.jit
    def scored(params, drawn):
        batch, _ = experience(TABLE, method, params, params, drawn, jnp.arange(16.0))
        return batch, policy.policy_loss(TABLE, method)(params, batch, None, KEY).value

    batch, found = scored(parameters(TABLE), drawn)
    ratio = np.exp(np.asarray(batch.logp_old - batch.logp_sampler))
    answer = np.asarray(drawn.sequences.completion_mask)
    assert (ratio[answer] < 1.0001).all() and (ratio[answer] < 0.8).any() and (ratio[answer] > 0.8).any()
    per_token = -np.minimum(ratio, 0.8) * np.asarray(batch.advantages * batch.logp_old)
    assert float(found) == pytest.approx(np.where(answer, per_token, 0).sum(axis=1).mean(), rel=1e-4)


def test_answers_follow_their_prompts_in_groups_and_say_whether_they_ended():
    drawn = drawn_by(TABLE)
    tokens, mask, answer = map(np.asarray, drawn.sequences)
    np.testing.assert_array_equal(tokens[:, :3], np.repeat(PROMPTS[TABLE].tokens, 4, axis=0))
    assert not answer[:, :3].any() and (answer[:, 3:] == mask[:, 3:]).all()
    ended = [2 in row[real] for row, real in zip(tokens, answer, strict=True)]
    np.testing.assert_array_equal(drawn.ended, ended)
    assert len({tuple(row) for row in tokens[:4, 3:]}) > 1, "the answers to one prompt differ"


# Updates --------------------------------------------------------------------------------------------------------------


def test_minibatches_take_every_row_once_an_epoch():
    method = dataclasses.replace(METHODS["grpo"], epochs=3, minibatches=4)
    rows = np.asarray(policy.minibatch_rows(method, 8, KEY))
    assert rows.shape == (12, 2)
    for epoch in rows.reshape(3, 8):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(8))
    assert (rows[:4] != rows[4:8]).any()
    with pytest.raises(ValueError, match="minibatches must divide the 6 completions of a batch, but is 4"):
        policy.minibatch_rows(method, 6, KEY)


@pytest.mark.slow
def test_the_pretraining_text_pulls_its_own_loss_down():
    method = dataclasses.replace(METHODS["rloo"], gamma=5.0, group_size=2)
    state = started(parameters(LM))
    text = jax.tree.map(jnp.asarray, scoring.pad_completions([[1], [2]], [[5, 3, 5, 3], [5, 3, 5]], length=8))
    losses = []
    for _ in range(12):
        state, metrics = TRAINERS[LM].step(
            state,
            PROMPTS[LM],
            count_of(7),
            method=method,
            sampler=SAMPLER,
            frozen=Frozen(ref=parameters(LM)),
            text=text,
        )
        losses.append(float(metrics["text_loss"]))
    assert losses[-1] < losses[0] - 0.5


def ragged_experience(lengths=(1, 6, 2, 5)):
    """Answers of 1 to 6 tokens, in parts of unequal numbers, by an older policy and another distribution."""
    rng = np.random.default_rng(0)
    given = [rng.integers(0, TABLE.vocab_size, size).tolist() for size in lengths]
    rows = jax.tree.map(jnp.asarray, scoring.pad_completions([[1], [2, 0], [1], [0, 2]], given))
    shape = rows.tokens.shape
    logs = [np.where(rows.completion_mask, rng.normal(size=shape) - 3, 0).astype(np.float32) for _ in range(6)]
    return Experience(rows, *logs)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("grpo", {"kl": "forward"}),
        ("dapo", {"kl": "reverse"}),
        ("ppo", {"mode": "sequence_sum"}),
        pytest.param("ppo", {}, marks=pytest.mark.slow),
        pytest.param("gspo", {"kl": "reverse"}, marks=pytest.mark.slow),
    ],
)
def test_accumulation_gives_the_gradient_of_the_whole_batch(name, changes):
    method = dataclasses.replace(METHODS[name], **changes)
    critic = TABLE_CRITIC if method.has_critic else None
    loss = policy.policy_loss(TABLE, method, critic=critic)

    @jax.jit
    def both(params, batch):
        found = lambda params, part, key: loss(params, part, None, key)  # noqa: E731
        return [steps.gradients(found, params, batch, KEY, microbatches=parts) for parts in (1, 2)]

    (whole, metrics), (added, of_parts) = both(parameters(TABLE, critic), ragged_experience())
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a / scale, b / scale, atol=1e-5), added, whole)
    assert {"clip_fraction", "ratio"} < set(metrics) and float(metrics["clip_fraction"]) > 0
    for metric, value in metrics.items():
        assert float(of_parts[metric]) == pytest.approx(float(value), rel=1e-4), metric


@pytest.mark.slow
def test_pretraining_text_is_cut_into_the_microbatches():
    """The step stays the same, and the program needs less memory."""
    method = dataclasses.replace(METHODS["rloo"], gamma=0.7, beta=0.0)
    batch, state, rng = ragged_experience(), started(parameters(TABLE)), np.random.default_rng(0)
    texts = [rng.integers(0, 3, 1 + row % 6 + row % 2).tolist() for row in range(4096)]
    texts = jax.tree.map(jnp.asarray, scoring.pad_completions([[1]] * 4096, texts))
    found, memory = [], []
    for parts in (1, 4):
        update = policy.online(TABLE, OPTIMIZER, microbatches=parts).update.lower(state, batch, method, None, texts)
        compiled = update.compile()
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
        found.append(compiled(started(parameters(TABLE)), batch, method, None, texts))
    assert memory[1] < 0.5 * memory[0]
    (whole, metrics), (added, of_parts) = found
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), added.params, whole.params)
    assert of_parts.keys() == metrics.keys() and "text_loss" in metrics
    for metric, value in metrics.items():
        assert float(of_parts[metric]) == pytest.approx(float(value), rel=1e-4), metric


def test_groups_without_a_difference_are_counted_and_the_spread_is_that_of_groups():
    drawn = drawn_by(TABLE)
    earned = jnp.asarray([[1.0] * 4, [0.0, 0, 1, 1], [5.0] * 4, [7.0, 7, 7, 8]]).ravel()
    of = jax.jit(lambda method: experience(TABLE, method, parameters(TABLE), parameters(TABLE), drawn, earned)[1])
    metrics = of(METHODS["grpo"])
    assert float(metrics["frac_reward_zero_std"]) == 0.5
    assert float(metrics["reward_std"]) == pytest.approx((3**-0.5 + 0.5) / 4, rel=1e-5)
    alone = of(METHODS["reinforce"])
    assert "frac_reward_zero_std" not in alone
    assert float(alone["reward_std"]) == pytest.approx(np.std(np.asarray(earned), ddof=1), rel=1e-5)


def test_gspo_counts_the_answers_whose_ratio_it_clips():
    answer = np.asarray([[True, True, False], [True, True, True]])
    batch = Experience(Sequences(np.zeros((2, 3), int), answer, answer), *[np.zeros((2, 3))] * 6)
    logp = np.log([[1.5, 1 / 1.5, 9.0], [1.1, 1.0, 1.0]])  # of answers: 1, and the cube root of 1.1
    ratios = jax.jit(policy._ratios)
    found, counts = ratios(METHODS["gspo"], logp, batch)
    assert float(found["clip_fraction"]) == 0.5 and float(counts["clip_fraction"]) == 2
    assert float(found["ratio"]) == pytest.approx((1 + 1.1 ** (1 / 3)) / 2, rel=1e-5)
    of_tokens, counts = ratios(METHODS["grpo"], logp, batch)
    assert float(of_tokens["clip_fraction"]) == pytest.approx(2 / 5) and float(counts["clip_fraction"]) == 5


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_is_drawn():
    method = dataclasses.replace(METHODS["rloo"], group_size=2)
    state = started(parameters(LM))
    mask = np.arange(LM.max_length) >= np.asarray([[LM.max_length - 1], [0]])
    full = Prompts(np.ones(mask.shape, np.int32), mask)
    with pytest.raises(ValueError, match="prompt 1 has 42 tokens, and 5 new ones do not fit"):
        TRAINERS[LM].step(state, full, VARIED, method=method, sampler=SAMPLER, frozen=Frozen(ref=state.params))


@pytest.mark.slow
def test_a_run_on_a_table_ends_at_the_optimum_of_rlhf():
    """As one program, over two seeds; the experiment exact_alignment has all methods."""
    method = dataclasses.replace(METHODS["rloo"], beta=0.5)
    ref = random_params(SMALL)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 600))
    trainer = policy.online(SMALL, optimizer)
    empty = (512 // method.group_size, 0)
    prompts = Prompts(jnp.zeros(empty, jnp.int32), jnp.zeros(empty, bool))
    reward = reward_fns.of_tokens(
        lambda rows: jnp.asarray(SMALL_REWARDS, jnp.float32)[(rows.tokens * jnp.asarray([3, 1])).sum(axis=1)]
    )

    def advance(state):
        return trainer.step(state, prompts, reward, method=method, sampler=Sampler(2), frozen=Frozen(ref=ref))

    run = steps.whole_run(lambda key: steps.initial_state(ref, optimizer, key), advance, steps=600)
    states, metrics = jax.jit(jax.vmap(run))(jax.random.split(KEY, 2))
    best = rlhf.gibbs_optimum(oracle.sequence_log_probs(SMALL, ref), SMALL_REWARDS.astype(np.float32), beta=0.5)
    for seed in range(2):
        params = jax.tree.map(lambda leaf, seed=seed: leaf[seed], states.params)
        found = oracle.sequence_log_probs(SMALL, params)
        assert float((jnp.exp(found) * (found - best)).sum()) < 1e-3
    assert metrics["reward"].shape == (2, 600)


def test_numbers_of_a_method_are_leaves():
    assert len(jax.tree.leaves(METHODS["ppo"])) == 10
    names = typing.get_type_hints(GRPOConfig)["method"], typing.get_type_hints(PPOConfig)["method"]
    assert {name for each in names for name in typing.get_args(each)} == set(METHODS), "the command line has all"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"kl": "k1"}, "kl must be one of reward, reverse, forward, but is 'k1'"),
        ({"advantage": "rloo", "scale_rewards": "group"}, "scale_rewards must be none for rloo, but is group"),
        ({"epochs": 2}, "epochs × minibatches must be 1 for the surrogate reinforce, .* but is 2 × 1"),
        ({"minibatches": 4}, "epochs × minibatches must be 1 for the surrogate reinforce, .* but is 1 × 4"),
        ({"normaliser": 32.0}, "normaliser must be None for the mode sequence_sum, but is 32"),
        ({"importance_mode": "none"}, "importance_mode must be one of token_truncate"),
        ({"group_size": 1}, "group_size must be at least 2 for rloo"),
        ({"epochs": 0}, "epochs must be an integer of at least 1, but is 0"),
        ({"minibatches": 1.5}, "minibatches must be an integer of at least 1, but is 1.5"),
        ({"beta": -1.0}, "beta must be a finite number of at least 0, but is -1.0"),
        ({"beta": jnp.asarray(-1.0)}, "beta must be a finite number of at least 0"),
        ({"beta": np.asarray([0.1, -1.0])}, "beta must be a finite number of at least 0"),
        ({"beta": "much"}, "beta must be a finite number of at least 0, but is 'much'"),
        ({"gamma": float("nan")}, "gamma must be a finite number of at least 0"),
        ({"discount": 1.5}, r"discount must be a number in \[0, 1\], but is 1.5"),
        ({"importance_cap": 0.0}, "importance_cap must be a finite number above 0"),
        ({"whiten": 1}, "whiten must be True or False, but is 1"),
        ({"surrogate": "gsop"}, "surrogate must be one of reinforce, .*, but is 'gsop'"),
        ({"advantage": "loo"}, "advantage must be one of returns"),
        ({"beta": jnp.asarray(1.0), "mode": "mean"}, "mode must be one of token_mean"),
        ({"surrogate": "gspo"}, "mode must be sequence_mean for gspo, .* but is sequence_sum"),
        ({"surrogate": "ppo_clip", "clip_low": 2.0}, r"clip_low must be a number in \[0, 1\]"),
        ({"dual_clip": 3.0}, "dual_clip must be None for the surrogate reinforce, but is 3.0"),
    ],
)
def test_a_method_out_of_range_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Method(**wrong)


def test_choices_of_a_traced_method_are_checked_and_its_numbers_pass():
    with pytest.raises(ValueError, match="surrogate must be one of"):
        jax.eval_shape(lambda beta: Method(beta=beta, surrogate="gsop").beta, 0.1)
    jax.eval_shape(lambda beta: Method(beta=beta).beta, 0.1)
