"""A closed form for how a slight preference for agreement becomes sycophancy, on tables and on a small GPT-2.

Where a share p of the annotators prefers the answer that agrees with the user, an aligned model agrees with
probability σ(logit π_ref + logit(p)/β), and the best of n answers with 1 − (1 − π_ref)ⁿ. The GPT-2 has one layer and
answers in one token; `eos_displacement` has answers that end by EOS.

python -m experiments.sycophancy_amplification --preset quick
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from experiments import ledger, statistics
from experiments.frame import experiment
from experiments.optimisers import adam, minimum
from jaxrl_llm import decoding, oracle
from jaxrl_llm.analysis.sycophancy import amplified_agreement, best_of_n_agreement
from jaxrl_llm.language_model import Params
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.objectives import preference, rlhf
from jaxrl_llm.scoring import Sequences, log_probs, pad_completions
from jaxrl_llm.tabular import TabularLM
from jaxrl_llm.training import policy, reward_fns, steps
from jaxrl_llm.training.policy import METHODS, Method
from jaxrl_llm.training.preference import PairBatch, preference_loss
from jaxrl_llm.training.rollout import Prompts, Sampler
from jaxrl_llm.training.supervised import sft_loss

NEAR = 0.02  # of probability: the largest deviation of a GPT-2 that counts as agreement
EXPECTED = 5  # draws of either kind that a z needs
EXAMPLE = 0.6  # the share at which all trainers are compared
FEW = 5  # seeds: fewer make a small run, which says so
EOS, TRUE, FALSE, THINKS_TRUE, THINKS_FALSE, FIRST_WORD = range(6)
PROMPT, ANSWER = 3, 1  # tokens: subject, property, opinion; a word, and EOS after it in a world of answers that end
# What PPO's defaults add for large models (λ < 1, whitening, means over tokens) is left out: it has a bias.
PPO = {"whiten": False, "lambda_": 1.0, "mode": "sequence_sum", "value_clip": None, "epochs": 2}


@dataclasses.dataclass(frozen=True)
class Config:
    """A table of 9 answers, and a GPT-2 of some thousand parameters that is asked about 64 claims."""

    table_references: tuple[float, ...] = (0.2, 0.5)
    table_shares: tuple[float, ...] = (0.4, 0.6, 0.9)
    table_betas: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1)
    newton_steps: int = 60

    words: int = 8
    width: int = 16
    layers: int = 1
    heads: int = 2
    seeds: int = 2  # of reference and training
    references: tuple[float, ...] = (0.5,)
    sft_steps: int = 80
    sft_batch: int = 128
    sft_learning_rate: float = 0.02
    shares: tuple[float, ...] = (0.6,)
    betas: tuple[float, ...] = (1.0, 0.1)
    dpo_steps: int = 80
    dpo_prompts: int = 32
    annotators: int = 16  # who judge each pair
    dpo_learning_rate: float = 0.01
    online: tuple[str, ...] = ("ppo",)
    online_betas: tuple[float, ...] = (1.0, 0.1)
    online_steps: int = 40
    online_batch: int = 128
    online_learning_rate: float = 0.02

    best_of: tuple[int, ...] = (1, 2, 4, 8, 16)
    repeats: int = 16
    seed: int = 0


@experiment(
    quick=Config(),
    full=Config(
        table_references=(0.2, 0.5, 0.8),
        table_shares=(0.4, 0.5, 0.6, 0.75, 0.9),
        width=32,
        seeds=6,  # by the spread of a run at seed 0: 4 of them decide too rarely whether a mean is within 0.02
        references=(0.5, 0.3),
        sft_steps=300,
        sft_learning_rate=0.01,
        shares=(0.4, 0.6, 0.9),
        betas=(1.0, 0.5, 0.25, 0.1),
        dpo_steps=250,
        annotators=256,  # with 16, the noise of labels alone is 0.017 for a seed: near NEAR
        dpo_learning_rate=0.005,
        online=("ppo", "rloo"),
        online_betas=(1.0, 0.5, 0.1),
        online_steps=300,
        online_learning_rate=0.005,
        repeats=32,
        seed=1,
    ),
)
def run(config: Config) -> dict[str, Any]:
    """Run the table in float64, the GPT-2 in float32.

    Raises:
        ValueError: as `check`.
    """
    check(config)
    table_key, gpt2_key = jax.random.split(jax.random.key(config.seed))
    table = on_table(config, table_key)
    points, best = on_gpt2(config, gpt2_key)
    return {
        "claim": claim(table, points, config),
        "numbers": numbers(table, points, best),
        "data": {"curves": curves(config), "table": table, "gpt2": points, "best_of_n": best},
    }


def check(config: Config) -> None:
    """Check before a run what would fail, or mean nothing, at its end.

    Raises:
        ValueError: for a probability that is not in (0, 1), a β that is not above 0, nothing to run, fewer seeds than
            an interval needs, a method other than PPO and RLOO, or a batch that its groups do not divide.
    """
    for name in ("table_references", "table_shares", "references", "shares"):
        if not (values := getattr(config, name)) or not all(0 < value < 1 for value in values):
            raise ValueError(f"{name} must be probabilities in (0, 1), but are {values}.")
    for name in ("table_betas", "betas", "online_betas"):
        if not (values := getattr(config, name)) or not all(0 < value < np.inf for value in values):
            raise ValueError(f"{name} must be finite and above 0, but are {values}.")
    if not config.best_of or min(config.best_of) < 1 or config.repeats < 1:
        raise ValueError(f"best_of and repeats must be 1 or more, but are {config.best_of} and {config.repeats}.")
    if config.seeds < 2:
        raise ValueError(f"an interval over seeds needs 2 or more, but seeds is {config.seeds}.")
    for name in config.online:
        size = method_named(name).group_size
        if config.online_batch < size or config.online_batch % size:
            raise ValueError(f"online_batch must be groups of {size} for {name}, but is {config.online_batch}.")


def on_table(config: Config, key: jax.Array) -> dict[str, Any]:
    """Return every point of the grid, by three exact ways, and the error of best-of-n's prediction."""
    with jax.enable_x64(True):
        lm = TabularLM(vocab_size=3, horizon=2)
        axes = (jnp.asarray(each) for each in (config.table_references, config.table_shares, config.table_betas))
        grid = tuple(each.ravel() for each in jnp.meshgrid(*axes, indexing="ij"))
        grid_key, best_key = jax.random.split(key)
        run = jax.vmap(lambda *point: optima(lm, *point, steps=config.newton_steps))
        found = jax.jit(run)(*grid, jax.random.split(grid_key, grid[0].size))
        reference, share, beta = map(np.asarray, grid)
        prediction = amplified_agreement(reference, share, beta=beta)
        points = {"reference": reference, "share": share, "beta": beta, "prediction": prediction}
        references, errors = np.asarray(config.table_references), []
        for n in config.best_of:
            key_of_n = jax.random.fold_in(best_key, n)
            exact = best_of_n_on_table(lm, jnp.asarray(references), key_of_n, n=n)
            errors.append(np.abs(np.asarray(exact) - best_of_n_agreement(references, n)).max())
        return points | {
            **{name: np.asarray(each) for name, each in found._asdict().items()},
            "best_of_n_error": float(max(errors)),
        }


def on_gpt2(config: Config, key: jax.Array) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return every trainer at its points, from every reference and seed; and the best of n draws of the references."""
    given = world(config)
    points, best = [], []
    grid = np.asarray([(share, beta) for share in config.shares for beta in config.betas])
    example = np.asarray([(EXAMPLE, beta) for beta in config.online_betas])
    sft = jax.jit(jax.vmap(lambda aim, key: fine_tuned(given, aim, key, config), (None, 0)))
    for place, aim in enumerate(tqdm(config.references, unit="reference")):
        sft_key, dpo_key, online_key, best_key = jax.random.split(jax.random.fold_in(key, place), 4)
        refs = sft(aim, jax.random.split(sft_key, config.seeds))
        before = np.asarray(jax.vmap(lambda params: agreement(given, params))(refs), np.float64)
        runs = {"DPO": (grid, lambda *lane: by_dpo(given, config, *lane))}
        if place == 0:
            runs |= {
                name.upper(): (example, lambda *lane, name=name: by_policy_gradient(name, given, config, *lane))
                for name in config.online
            }
        for name, (at, lane) in runs.items():
            run_key = dpo_key if name == "DPO" else key_of(name, online_key)
            after = np.asarray(on_grid(lane, refs, at, run_key), np.float64)
            points += compared(name, aim, at, before, after, given.training, opinions=given.thinks_true)
        first = jax.tree.map(lambda leaf: leaf[0], refs)
        wins, ref = sampled_best_of_n(given, first, best_key, sizes=config.best_of, repeats=config.repeats)
        best.append(best_of_n_point(config, aim, np.asarray(wins), np.asarray(ref, np.float64)))
    return points, best


def curves(config: Config) -> list[dict[str, Any]]:
    """Return the prediction from π_ref = ½ along 1/β, for every share, as far as any point goes."""
    betas = (*config.table_betas, *config.betas, *config.online_betas)
    inverse = np.geomspace(1 / max(betas), 1 / min(betas), 60)
    return [
        {"share": share, "inverse_beta": inverse, "agreement": amplified_agreement(0.5, share, beta=1 / inverse)}
        for share in sorted({*config.table_shares, *config.shares, *([EXAMPLE] if config.online else [])})
    ]


# Exact optima on a table of answers, some of which agree.


class Found(NamedTuple):
    """The probability of agreement at the optimum, found in three ways."""

    gibbs: Array  # in closed form
    dpo: Array  # DPO's minimum over the preferences of the whole population
    rlhf: Array  # the maximum of J, which policy gradients climb


def agreeing(lm: TabularLM) -> Bool[Array, "sequences"]:
    """Return the answers that agree: those whose tokens have an even sum, so that only the last token decides."""
    return oracle.enumerate_sequences(lm).sum(axis=1) % 2 == 0


def random_reference(lm: TabularLM, probability: Float[Array, ""], key: Array) -> dict[str, Array]:
    """Return a random table that agrees with exactly this probability."""
    agrees = agreeing(lm)
    raw = jax.random.normal(key, agrees.shape)

    def among(chosen: Array) -> Array:
        return raw - jax.nn.logsumexp(jnp.where(chosen, raw, -jnp.inf))

    return table_of(
        lm, jnp.where(agrees, jnp.log(probability) + among(agrees), jnp.log1p(-probability) + among(~agrees))
    )


def table_of(lm: TabularLM, log_probs: Float[Array, "sequences"]) -> dict[str, Array]:
    """Return the parameters with this distribution of sequences: a row holds the log-masses of its continuations."""
    masses = [
        jax.nn.logsumexp(log_probs.reshape(lm.vocab_size**length, -1), axis=1) for length in range(1, lm.horizon + 1)
    ]
    return {"logits": jnp.concatenate([mass.reshape(-1, lm.vocab_size) for mass in masses])}


def table_agreement(lm: TabularLM, params: dict[str, Array]) -> Float[Array, ""]:
    """Return π(agree), the sum over all answers that agree."""
    return jnp.where(agreeing(lm), jnp.exp(oracle.sequence_log_probs(lm, params)), 0).sum()


def optima(lm: TabularLM, ref_agreement: Array, share: Array, beta: Array, key: Array, *, steps: int) -> Found:
    """Return the agreement at the optimum for a share of annotators and a β, from one random reference."""
    ref_params = random_reference(lm, ref_agreement, key)
    ref = oracle.sequence_log_probs(lm, ref_params)
    rewards = jnp.where(agreeing(lm), jnp.log(share) - jnp.log1p(-share), 0)
    preferences = oracle.population_preferences(ref, rewards)

    def dpo(params: Any) -> Array:
        policy = oracle.sequence_log_probs(lm, params)
        chosen, ref_chosen = (jnp.broadcast_to(each[:, None], preferences.shape) for each in (policy, ref))
        rejected, ref_rejected = (jnp.broadcast_to(each, preferences.shape) for each in (policy, ref))
        return (preferences * preference.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)).sum()

    def shortfall(params: Any) -> Array:
        return -oracle.objective(lm, params, ref_params, rewards, beta=beta)

    optimum = jnp.exp(rlhf.gibbs_optimum(ref, rewards, beta=beta))
    ends = [table_agreement(lm, minimum(loss, ref_params, steps=steps)[0]) for loss in (dpo, shortfall)]
    return Found(jnp.where(agreeing(lm), optimum, 0).sum(), *ends)


def best_of_n_on_table(lm: TabularLM, references: Array, key: Array, *, n: int) -> Float[Array, "references"]:
    """Return the probability that the best of n answers agrees, if those rank first, from random references."""

    def one(probability: Array, key: Array) -> Array:
        log_probs = oracle.sequence_log_probs(lm, random_reference(lm, probability, key))
        best = rlhf.best_of_n(log_probs, agreeing(lm).astype(log_probs.dtype), n=n)
        return jnp.where(agreeing(lm), jnp.exp(best), 0).sum()

    return jax.vmap(one)(references, jax.random.split(key, references.size))


# A small GPT-2: a user says what they think of a claim, and the model agrees or does not.


@dataclasses.dataclass(frozen=True)
class World:
    """Every claim with every opinion about it, and a GPT-2 to answer."""

    lm: GPT2
    answers: Sequences  # [prompts, 2, time]; the second of each prompt agrees with the user
    training: Int[np.ndarray, "some"]  # the prompts to align on: a quarter of the claims is left out

    @property
    def prompts(self) -> Prompts:
        """Return all prompts."""
        tokens = self.answers.tokens[:, 0, :PROMPT]
        return Prompts(tokens, jnp.ones(tokens.shape, bool))

    @property
    def thinks_true(self) -> Bool[np.ndarray, "prompts"]:
        """Return whether the user of each prompt thinks that the claim is true."""
        return np.asarray(self.prompts.tokens[:, -1] == THINKS_TRUE)

    def rows(self, prompts: Array, agreeing: Array) -> Sequences:
        """Return some prompts, each with the answer that agrees or the other one."""
        return jax.tree.map(lambda leaf: leaf[prompts, agreeing.astype(jnp.int32)], self.answers)


def world(config: Any, *, ends: bool = False) -> World:
    """Return every subject with every property as the claims, and a new model that is just large enough.

    Answers are one word. If it `ends`, EOS is part of the answer, so that DPO has a second token to move.
    """
    words = np.arange(config.words)
    grid = np.meshgrid(words, words, [False, True], indexing="ij")
    subjects, properties, opinions = (each.ravel() for each in grid)
    rows = zip(subjects, properties, opinions, strict=True)
    prompts = [
        [FIRST_WORD + a, FIRST_WORD + config.words + b, THINKS_TRUE if true else THINKS_FALSE] for a, b, true in rows
    ]
    end = [EOS] if ends else []
    answers = [[word, *end] for true in opinions for word in ((FALSE, TRUE) if true else (TRUE, FALSE))]
    padded = pad_completions([prompt for prompt in prompts for _ in range(2)], answers)
    shape = {"n_embd": config.width, "n_layer": config.layers, "n_head": config.heads}
    lm = GPT2(GPT2Config(vocab_size=FIRST_WORD + 2 * config.words, n_positions=PROMPT + ANSWER + ends, **shape))
    of_prompts = jax.tree.map(lambda leaf: jnp.asarray(leaf).reshape(len(prompts), 2, -1), padded)
    return World(lm, of_prompts, np.flatnonzero((subjects + properties) % 4))


def word_probs(given: World, params: Params) -> Float[Array, "prompts 2"]:
    """Return the probabilities of the word that disagrees with the user, and of the one that agrees."""
    hidden, _ = given.lm.hidden(params, given.prompts.tokens)
    probs = jax.nn.softmax(given.lm.logits(params, hidden[:, -1]))
    return jnp.take_along_axis(probs, given.answers.tokens[:, :, PROMPT], axis=1)


def agreement(given: World, params: Params) -> Float[Array, "prompts"]:
    """Return the probability of agreement after every prompt, among the two words that answer."""
    disagrees, agrees = word_probs(given, params).T
    return agrees / (agrees + disagrees)


def agrees(rows: Sequences) -> Bool[Array, "batch"]:
    """Return whether an answer's first word is what the user thinks."""
    opinion, word = rows.tokens[:, PROMPT - 1], rows.tokens[:, PROMPT]
    return jnp.where(opinion == THINKS_TRUE, word == TRUE, word == FALSE)


def fine_tuned(given: World, probability: Array, key: Array, config: Any) -> Params:
    """Return a reference: a new model, fine-tuned on answers that agree with this probability, whatever the claim."""
    optimizer = adam(config.sft_learning_rate, config.sft_steps)
    loss = sft_loss(given.lm)

    def advance(state: steps.TrainState) -> tuple[steps.TrainState, None]:
        prompt_key, answer_key = jax.random.split(state.step_key)
        rows = jax.random.randint(prompt_key, (config.sft_batch,), 0, given.prompts.tokens.shape[0])
        agreeing = jax.random.uniform(answer_key, rows.shape) < probability
        return steps.update(loss, optimizer, state, given.rows(rows, agreeing))[0], None

    def initial(key: Array) -> steps.TrainState:
        init_key, run_key = jax.random.split(key)
        return steps.initial_state(given.lm.init(init_key), optimizer, run_key)

    return steps.whole_run(initial, advance, steps=config.sft_steps)(key)[0].params


def by_dpo(given: World, config: Any, ref: Params, share: Array, beta: Array, key: Array) -> Float[Array, "prompts"]:
    """Return agreement after DPO."""
    return agreement(given, trained_by_dpo(given, config, ref, share, beta, key))


def trained_by_dpo(given: World, config: Any, ref: Params, share: Array, beta: Array, key: Array) -> Params:
    """Train by DPO: every step has new annotators, of whom each prefers agreement with probability `share`."""
    optimizer = adam(config.dpo_learning_rate, config.dpo_steps)
    loss = preference_loss(given.lm, "dpo", beta=beta)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), given.answers)
    ref_logp = log_probs(given.lm, ref, flat).sum(axis=1).reshape(-1, 2)

    def advance(state: steps.TrainState) -> tuple[steps.TrainState, None]:
        prompt_key, judge_key = jax.random.split(state.step_key)
        rows = jax.random.choice(prompt_key, jnp.asarray(given.training), (config.dpo_prompts,))
        votes = jax.random.uniform(judge_key, (config.annotators, rows.size)) < share
        for_agreement = votes.mean(axis=0)
        # The two labels that a pair can get, each as often as it got it.
        both, agreeing = jnp.tile(rows, 2), jnp.repeat(jnp.asarray([True, False]), rows.size)
        weight = jnp.concatenate([for_agreement, 1 - for_agreement])
        logp = ref_logp[both, agreeing.astype(jnp.int32)], ref_logp[both, (~agreeing).astype(jnp.int32)]
        pairs = PairBatch(given.rows(both, agreeing), given.rows(both, ~agreeing), *logp, weight=weight)
        return steps.update(loss, optimizer, state, pairs)[0], None

    train = steps.whole_run(lambda key: steps.initial_state(ref, optimizer, key), advance, steps=config.dpo_steps)
    return train(key)[0].params


def method_named(name: str) -> Method:
    """Return PPO or RLOO as they run here.

    Raises:
        ValueError: for another method.
    """
    if name not in ("ppo", "rloo"):
        raise ValueError(f"online methods must be ppo or rloo, but one is {name!r}.")
    return dataclasses.replace(METHODS[name], **(PPO if name == "ppo" else {}))


def key_of(name: str, key: Array) -> Array:
    """Return a key of its own for whatever has a name."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def by_policy_gradient(
    name: str, given: World, config: Any, ref: Params, share: Array, beta: Array, key: Array
) -> Float[Array, "prompts"]:
    """Return agreement after PPO or RLOO on the annotators' reward: logit p for an answer that agrees, else 0."""
    method = dataclasses.replace(method_named(name), beta=beta)
    critic = ScalarHead(given.lm) if method.has_critic else None
    optimizer = adam(config.online_learning_rate, config.online_steps * method.epochs)
    trainer = policy.online(given.lm, optimizer, critic=critic)
    reward = reward_fns.of_tokens(lambda rows: jnp.where(agrees(rows), jnp.log(share) - jnp.log1p(-share), 0))
    sampler = Sampler(ANSWER, eos_ids=(EOS,))
    count = config.online_batch // method.group_size

    def advance(state: steps.TrainState) -> tuple[steps.TrainState, None]:
        rows = jax.random.choice(jax.random.fold_in(state.step_key, 7), jnp.asarray(given.training), (count,))
        prompts = jax.tree.map(lambda leaf: leaf[rows], given.prompts)
        frozen = steps.Frozen(ref=ref)
        return trainer.step(state, prompts, reward, method=method, sampler=sampler, frozen=frozen)[0], None

    def initial(key: Array) -> steps.TrainState:
        critic_key, run_key = jax.random.split(key)
        params = ref if critic is None else {"policy": ref, "critic": critic.init(critic_key, ref, zero=True)}
        return steps.initial_state(params, optimizer, run_key)

    params = steps.whole_run(initial, advance, steps=config.online_steps)(key)[0].params
    return agreement(given, params if critic is None else params["policy"])


def on_grid(
    run: Callable[..., Array], refs: Params, points: Float[np.ndarray, "points 2"], key: Array
) -> Float[Array, "seeds points prompts"]:
    """Return `run(ref, share, beta, key)` of every seed's reference at every point, as lanes of one program."""
    seeds = jax.tree.leaves(refs)[0].shape[0]
    keys = jax.random.split(key, (seeds, len(points)))
    shares, betas = jnp.asarray(points, jnp.float32).T
    over_points = jax.vmap(run, in_axes=(None, 0, 0, 0))
    return jax.jit(jax.vmap(over_points, in_axes=(0, None, None, 0)))(refs, shares, betas, keys)


def sampled_best_of_n(
    given: World, ref: Params, key: Array, *, sizes: tuple[int, ...], repeats: int
) -> tuple[Int[Array, "sizes"], Float[Array, "prompts"]]:
    """Count how often the best of n draws agrees, in `repeats` tries after every prompt; return π_ref(agree) too.

    The draws of a smaller n are the first of those of the largest.
    """
    prompts = jnp.repeat(given.prompts.tokens, repeats, axis=0)
    agreeing_word = jnp.where(prompts[:, -1:] == THINKS_TRUE, TRUE, FALSE)

    def score(drawn: decoding.Generation) -> Array:
        return (drawn.tokens[..., 0] == agreeing_word).astype(jnp.float32)

    drawn = decoding.best_of_n(given.lm, ref, prompts, n=max(sizes), score=score, key=key, max_new_tokens=1)
    best = [drawn.scores[:, :n].max(axis=1).sum().astype(int) for n in sizes]
    return jnp.stack(best), word_probs(given, ref)[:, 1]


# Measured agreement against the prediction.


def compared(
    method: str,
    aim: float,
    grid: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    training: np.ndarray,
    opinions: np.ndarray,
) -> list[dict[str, Any]]:
    """Return a point of the grid each: means over prompts, then over seeds with Student's 95% intervals.

    The prediction is that of each prompt's own reference, so that errors of fine-tuning are not counted as deviations.
    `off_the_law` has the deviation; `held_out_deviation` is the same on the claims that alignment left out.

    Args:
        grid: (share, beta) of each point. before: agreement of the references, [seed, prompt]; after: [seed, point,
            prompt]. training: the prompts that were aligned on; the others are held out. opinions: bool [prompt], the
            user's.
    """
    held_out = np.setdiff1d(np.arange(before.shape[1]), training)
    found = []
    for place, (share, beta) in enumerate(grid):
        prediction = amplified_agreement(before, share, beta=beta)
        measured = after[:, place]
        off = measured - prediction
        mean, low, high = statistics.student(measured.mean(axis=1))
        found.append(
            {"method": method, "reference": aim, "share": share, "beta": beta, "prediction": prediction.mean()}
            | {"mean": mean, "low": low, "high": high}
            | off_the_law(off, opinions)
            | {"held_out_deviation": off_the_law(off[:, held_out], opinions[held_out])["deviation"]}
        )
    return found


def off_the_law(off: np.ndarray, opinions: np.ndarray) -> dict[str, Any]:
    """Return the deviation of a point from the prediction, of users of either opinion by themselves.

    Over both, what a model does too much with the one hides what it does too little with the other: one that always
    says "true" agrees with half of all users. A single prompt, on the other hand, would mostly show noise.

    Args:
        off: measured − prediction, [seed, prompt].

    Returns:
        `deviation`, `deviation_low` and `deviation_high`: the mean over prompts and seeds for the opinion that is
        further off, and its interval; `p`: the larger p-value of the two opinions that the mean is off by NEAR or
        more; `largest_of_seed`: the largest distance of one seed's mean.
    """
    of_seeds = np.stack([off[:, opinions == opinion].mean(axis=1) for opinion in (False, True)])
    worst = of_seeds[np.abs(of_seeds.mean(axis=1)).argmax()]
    mean, low, high = statistics.student(worst)
    return {
        "deviation": mean,
        "deviation_low": low,
        "deviation_high": high,
        "p": max(map(beyond, of_seeds)),
        "largest_of_seed": float(np.abs(of_seeds).max()),
    }


def beyond(values: np.ndarray, *, margin: float = NEAR) -> float:
    """Return the p-value of the two one-sided t-tests that the mean of some values is `margin` or more away from 0.

    A spread of values earns nothing: the wider they scatter, the larger it is.
    """
    mean, error = values.mean(), values.std(ddof=1) / np.sqrt(len(values))
    room = margin - abs(mean)
    return float(scipy.stats.t.sf(room / error, len(values) - 1)) if error > 0 else float(room <= 0)


def worst_deviation(found: list[dict[str, Any]]) -> float:
    """Return the largest distance of a mean over prompts of one opinion and seeds from the prediction."""
    return max(abs(each["deviation"]) for each in found)


def best_of_n_point(config: Any, aim: float, wins: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Return the best of n draws after every prompt against 1 − (1 − π_ref)ⁿ, in standard errors of the count.

    `z` is None where fewer than `EXPECTED` draws that agree, or that do not, are expected: it is not normal there.
    """
    rows = []
    for n, won in zip(config.best_of, wins, strict=True):
        prediction = best_of_n_agreement(reference, n)
        spread = np.sqrt(config.repeats * (prediction * (1 - prediction)).sum())
        draws, expected = config.repeats * prediction.size, config.repeats * prediction.sum()
        normal = min(expected, draws - expected) >= EXPECTED
        z = float((won - expected) / spread) if normal else None
        rows.append({"n": n, "prediction": prediction.mean(), "sampled": won / draws, "z": z})
    return {"reference": aim, "draws": draws, "sizes": rows}


def numbers(table: dict[str, Any], found: list[dict[str, Any]], best: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the exact optima, the test of the GPT-2 against the prediction, and that of best-of-n."""
    return [*_of_table(table), *_of_gpt2(found), *_of_best(table, best)]


def claim(table: dict[str, Any], found: list[dict[str, Any]], config: Any) -> str:
    """Return the prediction, and how much of it was measured."""
    agreement = float(amplified_agreement(0.5, EXAMPLE, beta=0.1))
    exact = "lie" if ledger.verdict(_of_table(table)) is not False else "do not lie"
    near, (*methods, last) = sum(each["p"] <= 0.05 for each in found), dict.fromkeys(each["method"] for each in found)
    trained = f"{', '.join(methods)} and {last}" if methods else last
    among = f"all {near}" if near == len(found) else f"{near} of {len(found)}"
    return (
        f"If {EXAMPLE:.0%} of annotators prefer agreement, the optimum agrees with probability σ(logit π_ref + "
        f"logit({EXAMPLE})/β): {agreement:.3f} from ½ at β = 0.1. Optima on tables {exact} on this prediction; "
        f"{'in this small run, ' if config.seeds < FEW else ''}a GPT-2 (layers: {config.layers}, width: "
        f"{config.width}, answers of one token) trained by {trained} is shown to be within {NEAR} of it at {among} "
        f"points, in the mean over {config.seeds} seeds."
    )


def _of_table(table: dict[str, Any]) -> list[dict[str, Any]]:
    ways = {"gibbs": "closed form", "dpo": "DPO on the population", "rlhf": "maximum of E[r] − β KL"}
    return [
        ledger.identity(
            f"largest |agreement − prediction| on a table, {name}",
            float(np.abs(table[way] - table["prediction"]).max()),
            tolerance=1e-10,
            unit=f"probability, over {len(table['prediction'])} points",
            source="σ(logit π_ref + logit(p)/β); exact, 9 answers",
        )
        for way, name in ways.items()
    ]


def _of_gpt2(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    described = {
        "unit": f"probability, over {len(found)} points",
        "source": "means over the prompts of either opinion, and over seeds, against the prediction",
    }
    entries = [
        ledger.test(
            f"largest p-value that a mean is {NEAR} or more off the prediction, GPT-2",
            max(each["p"] for each in found),
            at_most=0.05,
            wrong=0.5,  # of a mean that is off by the margin
            unit="probability",
            source=f"two one-sided t-tests over seeds, for either opinion at {len(found)} points; all must be small, "
            "so that none is corrected",
        ),
        ledger.measurement("largest |deviation| of a GPT-2 from the prediction", worst_deviation(found), **described),
        ledger.measurement(
            "the same on claims that alignment left out",
            max(abs(each["held_out_deviation"]) for each in found),
            **described,
        ),
        ledger.measurement(
            "largest |deviation| of a single seed",
            max(each["largest_of_seed"] for each in found),
            unit=described["unit"],
            source="means over the prompts of either opinion, against the prediction",
        ),
    ]
    examples = [each for each in found if each["share"] == EXAMPLE and each["reference"] == 0.5]
    for method in dict.fromkeys(each["method"] for each in examples):
        at = min((each for each in examples if each["method"] == method), key=lambda each: each["beta"])
        entries.append(
            ledger.measurement(
                f"agreement after {method}, p = {EXAMPLE}, β = {at['beta']:g}",
                at["mean"],
                at["low"],
                at["high"],
                unit="probability",
                source=f"a GPT-2 from π_ref = ½, Student's interval over seeds; predicted: {at['prediction']:.4f}",
            )
        )
    return entries


def _of_best(table: dict[str, Any], best: list[dict[str, Any]]) -> list[dict[str, Any]]:
    known = [(row["n"], abs(row["z"])) for each in best for row in each["sizes"] if row["z"] is not None]
    sampled = ledger.test(
        "largest |z| of sampled best-of-n, GPT-2",
        max((z for _, z in known), default=0.0),
        at_most=4,
        wrong=6.4,  # at n = 1, of a sampler that agrees with 55 for 50%
        unit="standard errors",
        source=f"{best[0]['draws']} times for each n; n = {', '.join(f'{n}' for n in sorted({n for n, _ in known}))}: "
        f"{EXPECTED} of either kind are expected",
    )
    return [
        ledger.identity(
            "largest |best-of-n agreement − (1 − (1 − π_ref)ⁿ)| on a table",
            table["best_of_n_error"],
            tolerance=1e-12,
            unit="probability",
            source="the exact prediction of best-of-n",
        ),
        *([sampled] if known else []),
    ]
