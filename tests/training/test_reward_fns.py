"""Rewards of completions: functions of text by their place, what they receive, weights, and reward models."""

import concurrent.futures
import math
import multiprocessing
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import models, scoring, text
from jaxrl_llm.data.records import Prompt
from jaxrl_llm.models.heads import LoadedReward, ScalarHead
from jaxrl_llm.scoring import Sequences
from jaxrl_llm.text import encode
from jaxrl_llm.training import online, recipes, reward_fns
from jaxrl_llm.training.config import GRPOConfig
from jaxrl_llm.training.rollout import Rollout
from tests.conftest import TINY, random_params
from tests.models.test_heads import tokenizer_with
from tests.training.chats import TOOLS, byte_level

LM = TINY["gpt2"]
KEY = jax.random.key(0)


def drawn_of(count):
    whole = jnp.ones((count, 2), bool)
    return Rollout(Sequences(jnp.zeros((count, 2), jnp.int32), whole, whole), jnp.zeros((count, 2)), whole[:, 0])


@pytest.mark.parametrize(
    ("returned", "error", "said"),
    [
        ([1.0, float("nan"), 2.0], ValueError, "rewards must be finite, but that of completion 1 is nan"),
        ([1.0, 2.0], ValueError, r"one number for each of 3 completions, but returned float32\[2\]"),
        (["a", "b", "c"], ValueError, "must return 3 numbers, but returned"),
        (None, ValueError, "must return 3 numbers, but returned None"),
        (
            ZeroDivisionError("by zero"),
            RuntimeError,
            r"raised ZeroDivisionError: by zero \(test_reward_fns\.py, line \d+\)",
        ),
        ([[1.0], [2.0, 3.0], [1.0]], ValueError, "must return 3 numbers, but returned"),
    ],
)
def test_a_reward_function_that_fails_is_named(returned, error, said):
    def reward(rollout):
        if isinstance(returned, Exception):
            raise returned
        return returned

    with pytest.raises(error, match=said):
        reward_fns.rewards_of(reward, drawn_of(3))


@pytest.mark.parametrize(
    ("process", "own", "expected"), [(0, [0, 1], [10, 1, 12, math.nan, 0, 0]), (1, [2], [0] * 4 + [14, 5])]
)
def test_of_several_processes_each_judges_the_completions_of_its_prompts(process, own, expected, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(reward_fns, "together", lambda part: part()[None])  # what the other one has found is added
    drawn = jax.tree.map(np.asarray, drawn_of(6))
    drawn = drawn._replace(logp_sampler=np.arange(12).reshape(6, 2) / 2)  # a number of each row

    def of(asked):
        assert [record.fields["place"] for record in asked] == own
        rows = lambda part: part.logp_sampler[:, 0].tolist()  # noqa: E731
        return lambda part: [None if row == 3 else row + 10 * (row % 2 == 0) for row in rows(part)]

    asked = [Prompt("ask", {"place": place}) for place in range(3)]
    np.testing.assert_array_equal(reward_fns.of_own(of, asked, drawn, name="it"), expected)


def test_rewards_may_be_whole_numbers_or_truths():
    for given in ([1, 0, 2], [True, False, True], np.asarray([1.5, 2, 3], np.float64)):
        found = reward_fns.rewards_of(lambda rollout, given=given: given, drawn_of(3))
        np.testing.assert_allclose(found, np.asarray(given, float))
        assert found.dtype == jnp.float32


RECORDS = [Prompt("ask", {"gold": 1}), Prompt(({"role": "user", "content": "me"},), {"gold": 2, "unit": "kg"})]


class Words:
    def decode(self, row, *, skip_special_tokens):
        return " ".join(map(str, row))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda prompts, completions: [1.0] * len(completions), [1, 1, 1, 1]),
        (lambda prompts, completions, gold: gold, [1, 1, 2, 2]),
        (lambda prompts, completions, *, gold, odd=None: [g if odd is None else 9 for g in gold], [1, 1, 2, 2]),
        (lambda prompts, completions, **fields: fields["gold"], [1, 1, 2, 2]),
        (lambda prompts, completions, unit: [len(each or "") for each in unit], [0, 0, 2, 2]),
        (lambda asked, written, /, gold: gold, [1, 1, 2, 2]),
        (
            lambda completions, **others: [2.0 * (each == "0 0") + len(others["prompts"]) for each in completions],
            [6] * 4,
        ),
        (
            lambda completion_ids, gold: [g + len(ids) for g, ids in zip(gold, completion_ids, strict=True)],
            [3, 3, 4, 4],
        ),
    ],
)
def test_a_reward_of_text_receives_the_entries_that_it_has_parameters_for(function, expected):
    """By name, in any order, if completions are called so, else prompts and completions first."""
    found = reward_fns.rewards_of(reward_fns.of_text(function, Words(), records=RECORDS), drawn_of(4))
    np.testing.assert_array_equal(found, expected)


def test_prompts_are_those_of_the_records_strings_and_messages():
    taken = []
    reward = lambda prompts, completions: taken.extend(prompts) or [0] * 4  # noqa: E731
    reward_fns.rewards_of(reward_fns.of_text(reward, Words(), records=RECORDS), drawn_of(4))
    assert taken == ["ask"] * 2 + [[{"role": "user", "content": "me"}]] * 2
    reward_fns.rewards_of(reward_fns.of_text(reward, Words()), drawn_of(4))
    assert taken[4:] == [""] * 4, "without records, decoded from the tokens: here there are none before completions"


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda prompts, completions, glod: [], "the reward function takes glod, but the data have gold, unit"),
        (lambda completions: [], None),
        (lambda texts: [], r"must take \(prompts, completions\), but takes \(texts\)"),
        (lambda prompts, completions, unit: [], None),  # a later record has it
    ],
)
def test_a_reward_of_text_that_takes_what_there_is_not_is_refused(function, said):
    if said is None:
        reward_fns.check_entries(function, RECORDS)
        return
    with pytest.raises(ValueError, match=said):
        reward_fns.check_entries(function, RECORDS)


def test_a_reward_function_that_is_not_there_is_named(tmp_path):
    (tmp_path / "broken.py").write_text("def reward(:")
    (tmp_path / "exits.py").write_text("1 / 0")
    for place, said in [
        (f"{tmp_path / 'broken.py'}:reward", "SyntaxError"),
        (f"{tmp_path / 'exits.py'}:reward", "ZeroDivisionError"),
        (f"{tmp_path / 'none.py'}:reward", "FileNotFoundError"),
        ("math:nothing", "AttributeError"),
        ("math:pi", "reward must be a function, but math:pi is a float"),
        ("nothing", "reward must be a function at .*, but is nothing: ValueError"),
    ]:
        with pytest.raises(ValueError, match=said):
            reward_fns.function_at(place)


SCORER = """
from __future__ import annotations

import dataclasses

from helper_of_a_reward import half


@dataclasses.dataclass
class Score:
    value: float


def reward(prompts, completions):
    return [Score(half(len(each))).value for each in completions]
"""


@pytest.fixture
def clean():
    """Modules and path as before."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def test_a_file_is_a_module_with_siblings_and_classes_that_workers_can_import(tmp_path, monkeypatch, clean):
    (tmp_path / "helper_of_a_reward.py").write_text("def half(number):\n    return number / 2\n")
    (tmp_path / "scorer.py").write_text(SCORER)
    found = reward_fns.function_at(f"{tmp_path / 'scorer.py'}:reward")
    assert found([], ["four"]) == [2.0]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        assert pool.submit(found, [], ["four", ""]).result() == [2.0, 0.0]
    assert reward_fns.function_at(f"{tmp_path / 'scorer.py'}:reward") is found, (
        "a file that has not changed is run once"
    )
    (tmp_path / "scorer.py").write_text(SCORER.replace("len(each)", "4 * len(each)"))
    assert reward_fns.function_at(f"{tmp_path / 'scorer.py'}:reward")([], ["four"]) == [8.0], "an edit counts"
    monkeypatch.chdir(tmp_path)
    assert reward_fns.function_at("scorer:reward")([], ["four"]) == [8.0]


def test_a_module_of_the_current_folder_is_found_and_names_of_others_are_not_taken(tmp_path, monkeypatch, clean):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])  # as of a console script
    (tmp_path / "in_the_current_folder.py").write_text("def f(prompts, completions):\n    return []\n")
    assert reward_fns.function_at("in_the_current_folder:f")([], []) == []
    (tmp_path / "math.py").write_text("def f(prompts, completions):\n    return [1]\n")
    assert reward_fns.function_at("math.py:f")([], []) == [1] and sys.modules["math"] is math
    (tmp_path / "fails.py").write_text("1 / 0")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        reward_fns.function_at("fails.py:f")
    assert "fails" not in sys.modules


# Several rewards, and completions that are not judged -----------------------------------------------------------------


def test_rewards_are_weighed_over_those_that_judge():
    given = {
        "a": lambda _: [1.0, None, 2, None],
        "b": lambda _: jnp.asarray([3.0, 4.0, 5.0, 6.0]),
        "c": lambda _: [None] * 4,
    }
    found = reward_fns.judge(given, drawn_of(4), weights=(2.0, -1.0, 7.0))
    np.testing.assert_array_equal(found.total, [-1, -4, -1, -6])
    np.testing.assert_array_equal(found.each["a"], [1, np.nan, 2, np.nan])
    alone = reward_fns.judge({"a": given["a"]}, drawn_of(4))
    np.testing.assert_array_equal(alone.total, [1, np.nan, 2, np.nan])
    with pytest.raises(ValueError, match="the reward b must return one number for each of 3 completions"):
        reward_fns.judge({"a": lambda _: [1, 2, None], "b": given["b"]}, drawn_of(3))
    with pytest.raises(ValueError, match="rewards must be finite, but that of completion 1 is nan"):
        reward_fns.rewards_of(lambda _: [None, float("nan"), 1.0], drawn_of(3))


# Reward models of other tokenizers ------------------------------------------------------------------------------------


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


def test_a_reward_model_of_another_tokenizer_reads_the_texts():
    """As `score` does; of the policy's own tokens it reads those that were drawn, but conversations are texts."""
    policy, other = (models.load(name).tokenizer for name in ("tiny-gpt2", "tiny-gpt2-verses"))
    other.chat_template = TEMPLATE
    small = models.GPT2(models.GPT2Config(vocab_size=4096, n_positions=48, n_embd=8, n_layer=1, n_head=1))
    found = LoadedReward(ScalarHead(small), ScalarHead(small).init(KEY), other, {})
    asked, written = ["The king", ({"role": "user", "content": "And he"},)], [" was a good man", " said"]
    prompts = [policy(each)["input_ids"] for each in ("The king", "And he")]
    completions = [[*policy(written[0])["input_ids"], 0], policy(written[1])["input_ids"]]
    rows = jax.tree.map(jnp.asarray, scoring.pad_completions(prompts, completions, length=16))
    drawn = Rollout(rows, jnp.zeros((2, 16)), jnp.asarray([True, False]))
    records = [Prompt(each) for each in asked]
    expected = found.score(asked, [written[0], [{"role": "assistant", "content": written[1]}]])
    scores = reward_fns.of_loaded(found, policy, records=records, same_tokens=False)(drawn)
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    scores = reward_fns.of_loaded(found, policy, records=records, same_tokens=True)(drawn)
    own = found.score_tokens([[*prompts[0], *completions[0]]])
    np.testing.assert_allclose(scores, [own[0], expected[1]], atol=1e-6)
    assert abs(own[0] - expected[0]) > 1e-4 and not found.has_tokens_of(policy)


def test_a_reward_model_reads_a_policys_conversations_where_it_was_trained_to_be_read(tmp_path):
    """After the template's newline, which the policy does not write; of strings at EOS, which it does."""
    tokenizer = tokenizer_with("own", tmp_path)
    lm = models.GPT2(models.GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=8, n_layer=1, n_head=1))
    found = LoadedReward(ScalarHead(lm), ScalarHead(lm).init(KEY), tokenizer, {})
    eos = tokenizer.eos_token_id
    config = GRPOConfig(reward=found, max_new_tokens=4)
    run = recipes.begin(models.Loaded(lm, lm.init(KEY), tokenizer, {}), config, verbose=False)
    judge = online.judges_of(run)
    chats = [({"role": "user", "content": each},) for each in ("the cat", "a")]
    for asked, shown in ((chats, [encode(tokenizer, each, chat=True) for each in chats]), (["the", "a"], None)):
        shown = shown or [tokenizer(each)["input_ids"] for each in asked]
        records = [Prompt(each) for each in asked]
        judge.check(records, longest=max(map(len, shown)))
        written = [[*tokenizer(each)["input_ids"], eos] for each in (" sat", " mat")]
        rows = jax.tree.map(jnp.asarray, scoring.pad_completions(shown, written, length=32))
        drawn = Rollout(rows, jnp.zeros((2, 32)), jnp.ones(2, bool))
        expected = found.score(asked, [" sat", " mat"])
        np.testing.assert_allclose(judge(records, drawn).total, expected, atol=1e-5)
        at_eos = found.score_tokens([[*a, *b] for a, b in zip(shown, written, strict=True)])
        assert np.allclose(at_eos, expected, atol=1e-5) == (asked is not chats)


def test_a_reward_model_reads_the_tools_of_a_prompt_and_what_rewards_are_given_is_what_the_policy_reads():
    tokenizer = byte_level(TOOLS)
    lm = models.GPT2(models.GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=8, n_layer=1, n_head=1))
    params = ScalarHead(lm).init(KEY)
    found = LoadedReward(ScalarHead(lm), params, tokenizer, {})
    config = GRPOConfig(reward=found, max_new_tokens=4)
    run = recipes.begin(models.Loaded(lm, params["model"], tokenizer, {}), config, verbose=False)
    tools = {"tools": [{"name": "a"}]}
    rows = [{"prompt": "Hi"} | tools, {"instruction": "Hi"}]
    batches, asked = recipes.batches_of(run, rows, "prompt-only", batch_size=2)
    message = {"role": "user", "content": "Hi"}
    assert [each.prompt for each in asked] == [(message,)] * 2
    shown = [list(batches.rows(place).prompt) for place in range(2)]
    written = [[*tokenizer(each)["input_ids"], tokenizer.eos_token_id] for each in (" a", " b")]
    drawn = Rollout(
        jax.tree.map(jnp.asarray, scoring.pad_completions(shown, written, length=64)),
        jnp.zeros((2, 64)),
        jnp.ones(2, bool),
    )
    expected = [
        text.whole(tokenizer, [message], [{"role": "assistant", "content": said}], **given)
        for said, given in ((" a", tools), (" b", {}))
    ]
    assert len(expected[0]) > len(expected[1])
    np.testing.assert_allclose(online.judges_of(run)(asked, drawn).total, found.score_tokens(expected), atol=1e-5)


def test_an_end_that_is_an_ordinary_token_of_the_tokenizer_is_no_part_of_a_completion():
    tokenizer, taken = byte_level(TOOLS), []
    end = tokenizer("!")["input_ids"][0]
    lm = models.GPT2(models.GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=8, n_layer=1, n_head=1))
    config = GRPOConfig(reward=lambda prompts, completions: taken.extend(completions) or [0], max_new_tokens=4)
    run = recipes.begin(models.Loaded(lm, lm.init(KEY), tokenizer, {"eos_token_id": end}), config, verbose=False)
    written = [tokenizer(each)["input_ids"] for each in ("Hi!", " a!")]
    rows = jax.tree.map(jnp.asarray, scoring.pad_completions(written[:1], written[1:], length=32))
    drawn = Rollout(rows, jnp.zeros((1, 32)), jnp.ones(1, bool))
    online.judges_of(run)([Prompt("Hi!")], drawn)
    assert taken == [" a"]
    assert reward_fns.texts(rows, tokenizer, run.eos) == (["Hi!"], [" a"])


@pytest.mark.slow
def test_texts_are_without_special_tokens_and_a_reward_model_reads_the_tokens():
    from jaxrl_llm import models

    tokenizer = models.load("tiny-gpt2").tokenizer
    asked, given = tokenizer("The sea")["input_ids"], tokenizer(" is wide.")["input_ids"]
    rows = jax.tree.map(jnp.asarray, scoring.pad_completions([[0, *asked]], [[*given, 0]], length=16))
    drawn = Rollout(rows, jnp.zeros((1, 16)), jnp.ones(1, bool))
    assert reward_fns.texts(rows, tokenizer) == (["The sea"], [" is wide."])
    longer = reward_fns.of_text(lambda prompts, answers: [len(prompts[0]) + 100 * len(answers[0])], tokenizer)
    assert float(reward_fns.rewards_of(longer, drawn)[0]) == 7 + 100 * 9
    head = ScalarHead(LM)
    params = head.init(KEY, random_params(LM))
    small = scoring.pad_completions([[1, 2]], [[3, 4]], length=6)
    found = reward_fns.of_model(head, params)(
        Rollout(jax.tree.map(jnp.asarray, small), jnp.zeros((1, 6)), jnp.ones(1, bool))
    )
    np.testing.assert_allclose(found, head.scores(params, jnp.asarray([[1, 2, 3, 4]])), rtol=1e-5)
