"""Whole runs: from files to folders by the command line, and from Python with data in memory."""

import copy
import dataclasses
import functools
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxrl_llm as jl
from jaxrl_llm import models, train
from jaxrl_llm.models import GPT2, GPT2Config
from jaxrl_llm.models.heads import LoadedReward, ScalarHead
from jaxrl_llm.objectives.preference import kto_loss
from jaxrl_llm.options import field_docs
from jaxrl_llm.training import online, recipes
from jaxrl_llm.training.config import DPOConfig, GRPOConfig, PPOConfig, RewardConfig, SFTConfig
from jaxrl_llm.training.loop import RunLog
from jaxrl_llm.training.policy import METHODS, method_of
from jaxrl_llm.training.preference import NAMES
from jaxrl_llm.training.recipes import Objective, Trained
from jaxrl_llm.training.steps import Frozen, Loss
from tests.training import chats

LINES = {
    "sft": [{"prompt": f"Say {i}:", "answer": " it is " * (i % 3 + 1)} for i in range(8)],
    "pairs": [{"prompt": f"Say {i}:", "chosen": " yes", "rejected": " no, " * (i % 2 + 1)} for i in range(8)],
    "unpaired": [{"prompt": f"Say {i}:", "answer": f" yes {i}", "label": i % 2} for i in range(8)],
    "ranked": [{"prompt": f"Say {i}:", "answers": [" a", " b", " c"][: 2 + i % 2]} for i in range(8)],
    "prompts": [{"prompt": f"Say {i}:", "gold": i} for i in range(8)],
}
OPTIONS = {"steps": 2, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, "save_every": 1}
CONFIGS = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "grpo": GRPOConfig, "ppo": PPOConfig}


def vowels(prompts, completions):
    return [each.count("e") * 1.0 for each in completions]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of every kind, and a small model that has tiny-gpt2's tokens."""
    folder = tmp_path_factory.mktemp("runs")
    for name, lines in LINES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loaded = models.load("tiny-gpt2")
    lm = GPT2(GPT2Config(vocab_size=4096, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    params = jax.jit(lm.init)(jax.random.key(0))
    models.save(folder / "model", lm, params, loaded.tokenizer, config={"eos_token_id": 0, "bos_token_id": 0})
    (folder / "reward.py").write_text(inspect.getsource(vowels))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return models.load(folder / "model")


@pytest.fixture(scope="module")
def preferred(folder):
    """A run of DPO, in `dpo`."""
    return train.dpo(folder / "model", folder / "pairs.jsonl", out=folder / "dpo", **OPTIONS, verbose=False)


@pytest.fixture
def call(folder, run):
    """`jaxrl-llm train` on the files of the folder."""

    def call(command, data, out, *words):
        files = ["--data", folder / f"{data}.jsonl", "--out", folder / out, "--model", folder / "model"]
        return run("train", command, *files, "--steps", 1, "--batch-size", 4, *words)

    return call


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def assert_saved(folder, params):
    found = models.load(folder)
    assert found.tokenizer is not None and all(np.isfinite(leaf).all() for leaf in leaves(found.params))
    assert_same(found.params, params)


# Runs in a folder -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fine_tuning_lowers_the_loss_reports_and_is_resumed(folder, capsys):
    out, data = folder / "sft", folder / "sft.jsonl"
    options = OPTIONS | {"steps": 6, "microbatches": 2, "eval_data": data}
    tuned = train.sft(folder / "model", data, out=out, **options)
    rows, said = RunLog(out / "log.jsonl").rows(), capsys.readouterr().out
    assert rows[-1]["held_out_loss"] < rows[0]["held_out_loss"] - 0.02
    assert all(isinstance(row["sample"], str) and row["tokens"] > 0 for row in rows)
    assert "8 records, 0 bad lines skipped, 0 prompts and 0 completions truncated" in said
    assert f"The model is in {out}." in said
    assert_saved(out, tuned.params)
    for changes, match in [
        ({}, "already has a run: resume it, or choose another folder"),
        ({"resume": True, "learning_rate": 0.5}, "learning_rate was"),
    ]:
        with pytest.raises(ValueError, match=match):
            train.sft(folder / "model", data, out=out, **(options | changes))
    again = train.sft(folder / "model", data, out=out, **options, resume=True)
    assert_same(again.params, tuned.params)
    with pytest.raises(ValueError, match='kind was "sft" and is "dpo"'):
        train.dpo(folder / "model", folder / "pairs.jsonl", out=out, **OPTIONS | {"steps": 6, "resume": True})


@pytest.mark.parametrize(("loss", "data"), [("dpo", "pairs"), pytest.param("kto", "unpaired", marks=pytest.mark.slow)])
def test_preferences_move_the_policy_from_the_reference(folder, model, preferred, loss, data):
    out, tuned = folder / loss, preferred
    options = OPTIONS | {"loss": loss, "dtype": "bfloat16" if loss == "kto" else "float32", "verbose": False}
    if loss == "kto":
        tuned = train.dpo(folder / "model", folder / f"{data}.jsonl", out=out, **options)
    assert RunLog(out / "log.jsonl").rows()[0]["loss"] == pytest.approx(np.log(2) if loss == "dpo" else 0.5, abs=1e-5)
    assert_saved(out, tuned.params)
    assert any((new != old).any() for new, old in zip(leaves(tuned.params), leaves(model.params), strict=True))
    for changes, said in (
        ({"loss": "ipo", "data": "pairs"}, f'loss was "{loss}" and is "ipo"'),
        ({"beta": 0.3}, "loss_kwargs was"),
    ):
        file = folder / f"{changes.pop('data', data)}.jsonl"
        with pytest.raises(ValueError, match=said):
            train.dpo(folder / "model", file, out=out, **options | changes | {"resume": True})


@pytest.mark.slow
def test_a_step_of_kto_without_a_bad_answer_logs_no_numbers_of_bad_answers(folder):
    lines = [line | {"label": True} for line in LINES["unpaired"]]
    train.dpo(folder / "model", lines, loss="kto", out=folder / "kto_good", **OPTIONS, verbose=False)
    for row in RunLog(folder / "kto_good" / "log.jsonl").rows():
        assert {"chosen_logp", "kl_chosen"} <= set(row) and not {"rejected_logp", "kl_rejected", "margin"} & set(row)


def test_a_run_in_memory_is_that_of_the_files_writes_nothing_and_leaves_the_model(
    model, preferred, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipes, "rollout", lambda *_: pytest.fail("a sample that no one reads"))
    before = leaves(model.params)
    tuned = train.dpo(model, iter(LINES["pairs"]), config=DPOConfig(**OPTIONS), verbose=False)
    assert_same(tuned.params, preferred.params)
    assert_same(leaves(model.params), before)
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")
    assert tuned.generate("Say", max_new_tokens=2, greedy=True)[0].tokens, "what is returned is an LM"


def square(a, b, *, beta=0.1, gap, **others):
    return (a - b - beta * gap) ** 2


@pytest.mark.slow
def test_a_preference_loss_of_ones_own_receives_the_numbers_of_its_rows_and_bfloat16_is_widened(folder, model, capsys):
    """At the reference a = b = 0, so that the first loss is the mean of (beta · gap)²."""
    rows = [line | {"gap": place, "note": "x"} for place, line in enumerate(LINES["pairs"])]
    (folder / "loss.py").write_text(inspect.getsource(square))
    out, place = folder / "square", f"{folder / 'loss.py'}:square"
    options = OPTIONS | {"batch_size": 8, "beta": 2.0, "steps": 1}
    narrow = jl.load(folder / "model", dtype="bfloat16")
    tuned = train.dpo(narrow, rows, loss=place, out=out, **options)
    expected = np.mean([(2 * gap) ** 2 for gap in range(8)])
    assert RunLog(out / "log.jsonl").rows()[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert json.loads((out / "run.json").read_text())["loss"] == place
    assert {leaf.dtype for leaf in jax.tree.leaves(tuned.params)} == {np.dtype("float32")}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(narrow.params)} == {"bfloat16"}
    assert "the weights are widened from bfloat16 to float32" in capsys.readouterr().out
    del rows[1]["gap"]
    for given in (rows, LINES["pairs"]):
        with pytest.raises(ValueError, match=r"the loss square must be given gap, .* but the batch has no fields"):
            train.dpo(model, given, loss=square, **options)
        lacks = "gap is not a number in every row, so the loss does not receive it" in capsys.readouterr().out
        assert lacks == (given is rows)


@pytest.mark.slow
def test_adapters_are_saved_beside_the_merged_model(folder, model):
    out = folder / "lora"
    options = OPTIONS | {"loss": "ipo", "lora_rank": 2, "checkpoint_blocks": True}
    tuned = train.dpo(jl.load(folder / "model"), folder / "pairs.jsonl", out=out, verbose=False, **options)
    assert_saved(out, tuned.params)
    changed = [not np.array_equal(*pair) for pair in zip(leaves(tuned.params), leaves(model.params), strict=True)]
    assert sum(changed) == 1, "the attention's kernel alone"
    saved = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(folder / "model")


@pytest.mark.slow
def test_a_reward_model_is_trained_by_adapters_and_an_adapter_is_trained_on(folder, model):
    """Its adapter holds the head; training goes on from it, and the whole is a model anywhere."""
    first, again = folder / "reward_lora", folder / "sft_lora"
    options = OPTIONS | {"verbose": False, "lora_rank": 2, "lora_targets": "all-linear", "lora_dropout": 0.25}
    scorer = train.reward(folder / "model", folder / "ranked.jsonl", out=first, **options)
    changed = [
        not np.array_equal(*pair) for pair in zip(leaves(scorer.params["model"]), leaves(model.params), strict=True)
    ]
    assert sum(changed) == 4, "the kernels of the one layer"
    from_adapter, whole = train.RewardModel.load(first / "adapter"), train.RewardModel.load(first)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), from_adapter.params, scorer.params)
    scores = scorer.score(["Say 1:", "Say 2:"], [" a", " b"])
    for each in (from_adapter, whole):
        assert each.score(["Say 1:", "Say 2:"], [" a", " b"]) == pytest.approx(scores, abs=1e-5)
    config = json.loads((first / "adapter" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.25 and config["base_model_name_or_path"] == str(folder / "model")
    with pytest.raises(
        ValueError, match=r"lora_from must be an adapter of the model, but .*adapter is the model, with"
    ):
        train.reward(first / "adapter", LINES["ranked"], lora_from=first / "adapter", **OPTIONS, verbose=False)
    still = OPTIONS | {"steps": 1, "learning_rate": 0.0}
    for start in (scorer, first, first / "adapter"):
        run = recipes.begin(start, RewardConfig(), verbose=False)
        np.testing.assert_array_equal(recipes.trained_of(run, head=scorer.head).params["head"], scorer.params["head"])
        with pytest.raises(ValueError, match=r"must be a language model, but .* is a reward model"):
            recipes.trained_of(run)
    still |= {"lora_from": first / "adapter"}
    run = recipes.begin(folder / "model", RewardConfig(**still), out=folder / "none", verbose=False)
    np.testing.assert_array_equal(recipes.trained_of(run, head=scorer.head).params["head"], scorer.params["head"])
    assert len(run.identity("reward")["lora_sha256"]) == 64 and "lora_from" in run.free, "by contents, wherever it lies"
    kept = train.dpo(folder / "model", LINES["pairs"], out=again, verbose=False, **still)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), kept.params, scorer.params["model"])
    assert RunLog(again / "log.jsonl").rows()[0]["loss"] == pytest.approx(np.log(2), abs=1e-6), (
        "the start is the reference"
    )
    saved = json.loads((again / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], saved["task_type"], saved["lora_dropout"]) == (2, "CAUSAL_LM", 0.0)
    assert_saved(again / "adapter", jl.load(again / "adapter").params)
    assert jl.load(again / "adapter").generate("Say", max_new_tokens=2, greedy=True)[0].tokens


@pytest.mark.slow
def test_a_critic_is_trained_by_adapters_too(folder, model):
    """It starts at 0 as one that is trained whole, and its base is that of the policy."""
    online = OPTIONS | {"max_new_tokens": 6, "verbose": False, "lora_rank": 2, "lora_rslora": True}
    run = recipes.begin(model, PPOConfig(reward=vowels, lora_rank=2), verbose=False)
    trained = recipes.trained_of(run, reference=True, critic=models.ScalarHead(model.model))
    assert sum(leaf.size for leaf in leaves(trained.params)) < 0.02 * sum(leaf.size for leaf in leaves(model.params))
    seen = jax.jit(trained.view)(trained.params, trained.frozen)
    assert_same(seen["policy"], model.params)
    assert_same(seen["critic"], {"model": model.params, "head": np.zeros(16)})
    train.ppo(model, LINES["prompts"], reward=vowels, out=folder / "ppo_lora", **online)
    rows = RunLog(folder / "ppo_lora" / "log.jsonl").rows()
    assert rows[0]["value_loss"] > 0 and rows[1]["explained_variance"] != rows[0]["explained_variance"]
    assert json.loads((folder / "ppo_lora" / "adapter" / "adapter_config.json").read_text())["use_rslora"]


@pytest.mark.slow
def test_online_runs_use_a_reward_model_or_a_function(folder, model):
    scorer = train.reward(model, LINES["ranked"], out=folder / "reward", **OPTIONS | {"steps": 4}, verbose=False)
    assert scorer.params["head"].shape == (16,)
    assert RunLog(folder / "reward" / "log.jsonl").rows()[-1]["accuracy"] > 0.5
    online = OPTIONS | {"max_new_tokens": 6}
    assert GRPOConfig(reward_model=scorer).rewards == GRPOConfig(reward=scorer).rewards == (scorer,)
    train.ppo(model, LINES["prompts"], reward_model=scorer, out=folder / "ppo", **online, verbose=False)
    from_folder = train.ppo(model, LINES["prompts"], reward_model=folder / "reward", **online, verbose=False)
    assert_saved(folder / "ppo", from_folder.params)
    few = {"lora_rank": 2, "dtype": "bfloat16", "group_size": 2, "gamma": 0.1, "text": LINES["sft"]}
    train.grpo(model, LINES["prompts"], reward=vowels, out=folder / "grpo", **online | few, verbose=False)
    for out in ("ppo", "grpo"):
        first = RunLog(folder / out / "log.jsonl").rows()[0]
        assert abs(first["kl"]) < 1e-5 and {"reward", "entropy", "clip_fraction", "kl_k1", "kl_k3"} <= set(first)
        assert first["completion_tokens"] == pytest.approx(4 * first["length"]) and first["tokens_per_second"] > 0
    assert first["text_loss"] > 0, "the one with gamma"


@pytest.mark.slow
def test_a_method_of_ones_own_has_its_hyperparameters_as_defaults(model):
    taken = {}
    own = dataclasses.replace(METHODS["rloo"], beta=0.3, group_size=2, mode="token_mean")

    def reward(prompts, completions, **fields):
        taken.update(fields)
        return [0.0] * len(completions)

    tuned = train.grpo(
        model, LINES["prompts"], reward=reward, method=own, beta=0.0, max_new_tokens=4, **OPTIONS, verbose=False
    )
    assert len(taken["gold"]) == 4 and len(set(taken["gold"])) == 2, "two prompts of two completions"
    for new, old in zip(leaves(tuned.params), leaves(model.params), strict=True):
        np.testing.assert_array_equal(new, old)  # equal rewards and no KL: nothing moves


def test_a_reward_model_scores_completions_and_is_saved(model, tmp_path):
    scorer = train.reward(model, LINES["ranked"], **OPTIONS | {"steps": 1}, verbose=False)
    prompts, completions = ["Say 1:", "", "Say 2:"], [" yes", "Once upon a time", " no"]
    scores = scorer.score(prompts, completions)
    assert all(isinstance(score, float) for score in scores) and len(set(scores)) == 3
    assert scorer.score(prompts[::-1], completions[::-1], batch_size=2) == pytest.approx(scores[::-1], abs=1e-6)
    rows = [[*model.tokenizer(text)["input_ids"], 0] for text in ("Say 1: yes", "Say 2: no")]
    expected = jax.jit(scorer.head.scores)(scorer.params, np.asarray(rows))
    np.testing.assert_allclose([scores[0], scores[2]], expected, rtol=0, atol=1e-5)
    scorer.save(tmp_path)
    assert train.RewardModel.load(tmp_path).score(prompts, completions) == pytest.approx(scores, abs=1e-6)
    assert scorer.score([], []) == []
    assert scorer.score("Say 1:", [" yes", " no"]) == scorer.score(["Say 1:"] * 2, [" yes", " no"])
    assert scorer.score("Say 1:", " yes") == pytest.approx(scores[0], abs=1e-6)
    assert len(repr(scorer)) < 60
    with pytest.raises(ValueError, match="one completion for each prompt, but there are 1 for 2"):
        scorer.score(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="a text of 66 tokens is longer than the context, 64"):
        scorer.score(["a"], [" word" * 64])


# Online runs ----------------------------------------------------------------------------------------------------------


def lengths(prompts, completions, gold):
    return [None if right == 3 else len(each) / 10 for each, right in zip(completions, gold, strict=True)]


ONLINE = OPTIONS | {
    "steps": 2, "max_new_tokens": 6, "group_size": 2, "verbose": False, "dynamic_sampling": 2, "stop": "e", "top_k": 40,
    "min_p": 1e-4, "reward_weights": (1, -0.5), "eval_data": LINES["prompts"][:5],
}  # fmt: skip


@pytest.mark.slow
def test_online_runs_log_each_reward_and_measure_held_out_prompts(folder):
    """One of five held-out completions is not judged by `lengths`, so that 4/5 of its mean is in the sum."""
    seen = []

    def letters(prompts, completions):
        seen.append((prompts, completions))
        return [float("a" in each) for each in completions]

    out = folder / "online"
    train.grpo(folder / "model", LINES["prompts"], reward=[letters, lengths], out=out, **ONLINE)
    rows = RunLog(out / "log.jsonl").rows()
    for row in rows:
        expected = row["held_out_reward/letters"] - 0.5 * 4 / 5 * row["held_out_reward/lengths"]
        assert row["held_out_reward"] == pytest.approx(expected, abs=1e-6)
        for each in ("reward", "reward/letters", "reward/lengths", "held_out_kl", "held_out_length", "held_out_ended"):
            assert np.isfinite(row[each]), each
        assert row["sample"].startswith("Say 0:") and row["sample_2"].startswith("Say 1:")
        assert 0 <= row["redraws"] <= 2 and row["judged"] == 1
    assert len(rows) == 2 and rows[-1]["held_out_kl"] > rows[0]["held_out_kl"] > 0
    drawn = sum(len(completions) for _, completions in seen)
    assert drawn == 2 * 5 + sum(4 * (1 + row["redraws"]) for row in rows)
    assert all(len(set(prompts)) == 2 for prompts, _ in seen if len(prompts) == 4), "two prompts of two completions"
    assert json.loads((out / "run.json").read_text())["reward"][1] == f"{__name__}:lengths"


@pytest.mark.slow
def test_an_online_run_with_dynamic_sampling_is_resumed_bit_for_bit(folder, model):
    def letters(prompts, completions):
        if len(calls) >= limit:
            raise RuntimeError("stopped")
        calls.append(len(completions))
        return [float("a" in each) for each in completions]

    options = ONLINE | {"steps": 4, "reward": [letters, lengths], "reward_weights": (1.0, 0.0), "eval_data": None}
    calls, limit = [], 99
    whole = train.grpo(model, LINES["prompts"], **options)
    calls, limit = [], len(calls) - 1
    with pytest.raises(RuntimeError, match="the reward letters raised RuntimeError: stopped"):
        train.grpo(model, LINES["prompts"], out=folder / "halted", **options)
    limit = 99
    resumed = train.grpo(model, LINES["prompts"], out=folder / "halted", **options | {"resume": True})
    assert_same(resumed.params, whole.params)


@pytest.mark.slow
def test_a_batch_that_no_reward_judged_moves_nothing_and_has_no_mean_reward(folder, model):
    out = folder / "unjudged"
    few = {"reward": lambda prompts, completions: [None] * len(completions), "beta": 0.0, "max_new_tokens": 4}
    tuned = train.grpo(model, LINES["prompts"], out=out, eval_data=LINES["prompts"], **OPTIONS | few, verbose=False)
    assert_same(leaves(tuned.params), leaves(model.params))
    row = RunLog(out / "log.jsonl").rows()[0]
    assert row["judged"] == 0 and not {"reward", "reward_std", "kl", "held_out_reward"} & set(row)


def test_reward_models_that_cannot_read_the_completions_are_refused(folder, model):
    """Before anything is compiled: a shorter context, and one of another tokenizer that is too short."""
    other = models.load("tiny-gpt2-verses").tokenizer
    short = GPT2(GPT2Config(vocab_size=4096, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    scorer = ScalarHead(short)
    for tokenizer, said in (
        (model.tokenizer, "context of the reward model must hold its longest prompt, 5 tokens, and .* 14, but is 16"),
        (other, "context of the reward model must hold its longest prompt, [4-6] tokens, and .* 14, but is 16"),
    ):
        found = LoadedReward(scorer, scorer.init(jax.random.key(0)), tokenizer, {})
        with pytest.raises(ValueError, match=said):
            train.grpo(model, LINES["prompts"], reward=[vowels, found], max_new_tokens=14, batch_size=4)
    small = ScalarHead(GPT2(GPT2Config(vocab_size=23, n_positions=64, n_embd=16, n_layer=1, n_head=2)))
    found = LoadedReward(small, small.init(jax.random.key(0)), None, {})
    with pytest.raises(ValueError, match=r"without a tokenizer must have the policy's vocabulary of 4096 .* has 23"):
        train.grpo(model, LINES["prompts"], reward=found, batch_size=4)
    run = recipes.begin(model, GRPOConfig(reward=[vowels, vowels, "jaxrl_llm.rewards:number"]), verbose=False)
    judges = online.judges_of(run)
    assert list(judges.each) == ["vowels", "vowels_2", "number"]
    talk = [{"prompt": [{"role": "user", "content": "a"}]}]
    found = LoadedReward(scorer, scorer.init(jax.random.key(0)), other, {})
    chats = dataclasses.replace(model, tokenizer=copy.deepcopy(model.tokenizer))
    chats.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"the reward model cannot read the prompts: .* no chat template"):
        train.grpo(chats, talk, reward=found, max_new_tokens=4, batch_size=4)


# What identifies a run, what it measures ------------------------------------------------------------------------------


def test_a_run_is_its_options_and_the_contents_of_its_model_and_data(folder, model):
    def identity(lm, **changes):
        config = RewardConfig(**OPTIONS | {"optimizer_kwargs": {"b2": 0.9}} | changes)
        run = recipes.begin(lm, config, folder / "identity", verbose=False)
        found = run.identity("reward", data_sha256="abc")
        assert json.loads(json.dumps(found)) == found, "values keep their types"
        return {name: value for name, value in found.items() if name not in run.free}

    before = identity(folder / "model")
    assert before["learning_rate"] == 1e-2 and before["steps"] == 2 and before["optimizer_kwargs"] == {"b2": 0.9}
    assert before == identity(folder / "model", log_every=2, keep=5, microbatches=2, checkpoint_blocks=True)
    assert before == identity(f"{folder}/model/") == identity(model), "a path is nothing"
    assert before != identity(folder / "model", centering=0.1)
    other = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf + 1, model.params))
    assert identity(model) == identity(dataclasses.replace(model)) != identity(other)
    assert "steps" not in identity(model, schedule="constant", warmup=2), "such a run can be made longer"
    run = recipes.begin(model, SFTConfig(eval_data=LINES["sft"]), verbose=False)
    assert run.identity("sft")["eval_data"] == "in memory, a list"
    method = dataclasses.replace(METHODS["rloo"], beta=0.3)
    assert run.identity("x", method=method, reward=vowels)["method"]["beta"] == 0.3
    assert run.identity("x", reward=vowels)["reward"].endswith(":vowels")


@pytest.mark.slow
def test_a_run_is_resumed_with_more_memory_or_steps_but_not_with_other_weights(folder, model, tmp_path):
    options = OPTIONS | {"schedule": "constant", "warmup": 0, "verbose": False}
    whole = train.sft(folder / "model", LINES["sft"], out=tmp_path / "whole", **options | {"steps": 4})
    data = tmp_path / "copy.jsonl"
    data.write_bytes((folder / "sft.jsonl").read_bytes())
    out = tmp_path / "out"
    train.sft(folder / "model", LINES["sft"], out=out, **options)
    more = {"resume": True, "steps": 4, "microbatches": 2}
    grown = train.sft(f"{folder}/model/", LINES["sft"], out=out, **options | more)
    for new, old in zip(leaves(grown.params), leaves(whole.params), strict=True):
        np.testing.assert_allclose(new, old, atol=2e-4)
    assert json.loads((out / "run.json").read_text())["steps"] == 4
    other = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf * 1.01, model.params))
    with pytest.raises(ValueError, match="model_sha256 was"):
        train.sft(other, LINES["sft"], out=out, **options | more)


@pytest.mark.slow
def test_epochs_are_counted_and_logged_with_the_learning_rate(model, tmp_path, capsys):
    options = OPTIONS | {"log_every": 1, "save_every": 10}
    del options["steps"]
    train.sft(model, LINES["sft"], out=tmp_path, num_epochs=1.5, schedule="cosine", warmup=1, **options)
    said = capsys.readouterr().out
    assert "1.5 epochs of 2 batches: 3 steps." in said and "3 steps: loss " in said
    rows = RunLog(tmp_path / "log.jsonl").rows()
    assert [row["epoch"] for row in rows] == [0.5, 1, 1.5]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.01, 0.01, 0.005])
    assert json.loads((tmp_path / "run.json").read_text())["steps"] == 3
    train.sft(model, LINES["sft"], out=tmp_path, steps=3, schedule="cosine", warmup=1, **options, resume=True)
    with pytest.raises(ValueError, match="one of steps and num_epochs must be given, but both are, 2 and 3"):
        SFTConfig(steps=2, num_epochs=3)
    with pytest.raises(TypeError, match="did you mean 'num_epochs'"):
        train.sft(model, LINES["sft"], num_train_epochs=3)


@pytest.mark.slow
def test_held_out_numbers_are_means_over_all_rows_and_the_best_checkpoint_is_the_model(folder, model, tmp_path, capsys):
    """Of a reward model: its accuracy is over pairs, though prompts have one or three of them."""
    options = OPTIONS | {"steps": 4, "learning_rate": 0.1, "eval_data": LINES["ranked"], "microbatches": 2}
    scorer = train.reward(model, LINES["ranked"], out=tmp_path / "a", keep_best="held_out_loss", **options)
    rows = RunLog(tmp_path / "a" / "log.jsonl").rows()
    best = min(rows, key=lambda row: row["held_out_loss"])
    said = capsys.readouterr().out
    assert f"The best held_out_loss is that of step {best['step']}, {best['held_out_loss']:.4g}: the model is" in said
    pairs = [
        (line["prompt"], better, worse)
        for line in LINES["ranked"]
        for place, better in enumerate(line["answers"])
        for worse in line["answers"][place + 1 :]
    ]
    asked, better, worse = zip(*pairs, strict=True)
    lead = np.asarray(scorer.score(asked, better)) - np.asarray(scorer.score(asked, worse))
    assert best["held_out_margin"] == pytest.approx(lead.mean(), abs=1e-5)
    assert best["held_out_accuracy"] == pytest.approx(((lead > 0) + (lead == 0) / 2).mean())
    again = train.reward(model, LINES["ranked"], out=tmp_path / "a", resume=True, keep_best="held_out_loss", **options)
    assert_same(again.params, scorer.params)
    assert_saved_reward(tmp_path / "a", scorer.params)
    for keep_best, said in (
        ("held_out_ended", "keep_best must be a metric that ends in accuracy, margin"),
        (
            "held_out_kl",
            "keep_best must be one of held_out_loss, held_out_accuracy, held_out_margin, held_out_score, but",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            train.reward(model, LINES["ranked"], keep_best=keep_best, **options, verbose=False)
    with pytest.raises(ValueError, match="keep_best needs held-out data: eval_data must be given, but is None"):
        RewardConfig(keep_best="held_out_loss")


def assert_saved_reward(folder, params):
    """The embedding has a row more, that of the padding token."""
    found = train.RewardModel.load(folder).params
    for new, old in zip(leaves(found), leaves(params), strict=True):
        np.testing.assert_array_equal(new[: len(old)], old)


@pytest.mark.slow
def test_the_best_checkpoint_of_an_online_run_is_by_its_held_out_reward(model, tmp_path, capsys):
    options = OPTIONS | {
        "num_epochs": 0.75,
        "learning_rate": 0.1,
        "reward": vowels,
        "max_new_tokens": 4,
        "group_size": 2,
    }
    del options["steps"]  # 3 of the 4 batches of an epoch
    held = {"eval_data": LINES["prompts"][:4], "keep_best": "held_out_reward"}
    tuned = train.grpo(model, LINES["prompts"], out=tmp_path, **options, **held)
    rows = RunLog(tmp_path / "log.jsonl").rows()
    best = max(rows, key=lambda row: row["held_out_reward"])
    assert [row["epoch"] for row in rows] == [0.25, 0.5, 0.75]
    assert f"The best held_out_reward is that of step {best['step']}, " in capsys.readouterr().out
    assert_saved(tmp_path, tuned.params)
    short = train.grpo(model, LINES["prompts"], **options | {"schedule": "constant", "warmup": 0}, verbose=False)
    assert any((one != two).any() for one, two in zip(leaves(short.params), leaves(tuned.params), strict=True))
    with pytest.raises(ValueError, match="keep_best needs held-out data"):
        GRPOConfig(reward=vowels, keep_best="held_out_reward")


@pytest.mark.slow
def test_weights_in_bfloat16_are_trained_and_saved_so(folder, model, tmp_path):
    options = OPTIONS | {"dtype": "bfloat16", "param_dtype": "bfloat16", "verbose": False, "learning_rate": 1e-3}
    tuned = train.sft(model, LINES["sft"], out=tmp_path, eval_data=LINES["sft"], **options)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(tuned.params)} == {"bfloat16"}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    rows = RunLog(tmp_path / "log.jsonl").rows()
    assert rows[-1]["held_out_perplexity"] == pytest.approx(np.exp(rows[-1]["held_out_loss"]))
    assert_same(train.sft(model, LINES["sft"], out=tmp_path, resume=True, **options).params, tuned.params)


def test_an_adapter_records_the_name_or_path_of_its_model(folder, model):
    """The name alone, as PEFT reads it, and nothing for a model that is in memory alone."""
    path, trained = str(folder / "model"), train._model(model, recipes.begin(model, SFTConfig(), verbose=False))
    for lm, expected in ((path, path), (jl.load(path), path), (model, ""), (trained, "")):
        assert recipes.begin(lm, SFTConfig(), folder / "nowhere", verbose=False).path == expected


def test_a_warmup_in_steps_is_of_the_runs_steps_whatever_their_updates():
    for warmup in (2, 0.2):
        config = PPOConfig(reward=vowels, steps=10, warmup=warmup, learning_rate=1.0, schedule="constant")
        rate, _ = recipes.optimizer_for(config, updates=8)
        assert [float(rate(place)) for place in (0, 8, 16, 79)] == pytest.approx([1 / 16, 1 / 16 + 15 / 32, 1, 1])


def test_the_keys_of_a_run_are_all_different_and_its_vocabulary_is_the_models(model):
    run = recipes.begin(dataclasses.replace(model, config={"eos_token_id": [7, 50256]}), SFTConfig(), verbose=False)
    assert len({tuple(jax.random.key_data(key).tolist()) for key in run.keys}) == 3
    assert run.eos == (0, 7)


@pytest.mark.parametrize(
    ("batch_size", "microbatches", "whole"), [(4, 2, False), (5, 1, False), (16, 1, False), (2, 1, True)]
)
def test_the_held_out_loss_is_of_every_row(model, batch_size, microbatches, whole):
    """Though the batch does not divide them, or is larger than the data; a loss that compares rows sees two or more."""
    options = SFTConfig(batch_size=batch_size, microbatches=microbatches, eval_data=LINES["sft"][:7])
    run, sizes = recipes.begin(model, options, verbose=False), []

    def loss(params, batch, frozen, key):
        sizes.append(batch.tokens.shape[0])
        return Loss(batch.completion_mask.sum() / batch.tokens.shape[0], batch.tokens.shape[0])

    loss.needs_whole_batch = whole
    objective = Objective("sft", loss, "prompt-completion", ())
    found = recipes.held_out(run, objective, Trained({}, Frozen()))({})["held_out_loss"]
    encode = run.encoder()
    counts = [len(encode(line["prompt"], [line["answer"]]).completions[0]) for line in LINES["sft"][:7]]
    assert found == pytest.approx(np.mean(counts)) and max(sizes) <= batch_size // microbatches + whole
    assert min(sizes) > whole


@pytest.mark.parametrize("context", [8, 48, 64])
def test_a_sample_fits_a_small_context(model, context):
    lm = GPT2(dataclasses.replace(model.model.config, n_positions=context))
    run = recipes.begin(dataclasses.replace(model, model=lm), SFTConfig(cut="left"), verbose=False)
    long = [{"prompt": "Say " * 60, "completion": "."}]
    batches, _ = recipes.batches_of(run, long, "prompt-completion", batch_size=1)
    asked, sampler = recipes._start_of(run, batches)
    assert asked.tokens.shape[1] + sampler.max_new_tokens <= context
    assert asked.tokens[0, -1] == batches.rows(0).prompt[-1]


def test_what_data_leave_out_is_reported(model, capsys):
    run = recipes.begin(model, SFTConfig(on_bad="skip"))
    batches, _ = recipes.batches_of(run, [*LINES["sft"], {}], "prompt-completion", batch_size=3)
    said = capsys.readouterr().out
    assert "data: 8 records, 1 bad rows skipped" in said and "data, row 8: completion is missing" in said
    assert "2 records, chosen at random, left out of each epoch" in said
    assert batches.order.left_over == 2


HI, BYE = {"role": "user", "content": "The king"}, {"role": "user", "content": "thank you"}
WISE, WELCOME = {"role": "assistant", "content": "was wise."}, {"role": "assistant", "content": "Farewell."}
FOOL, SORRY = {"role": "assistant", "content": "was"}, {"role": "assistant", "content": "Sorry."}
TWO_TURNS = {"chosen": [HI, WISE, BYE, WELCOME], "rejected": [HI, FOOL, {"role": "user", "content": "no"}, SORRY]}
SHOWN = {
    "llama2": "<s> [INST] The king [/INST]⟦ was wise. </s>⟧<s> [INST] thank you [/INST]⟦ Farewell. </s>⟧",
    "qwen2": "<|im_start|>user\nThe king<|im_end|>\n<|im_start|>assistant\n⟦was wise.<|im_end|>⟧\n"
    "<|im_start|>user\nthank you<|im_end|>\n<|im_start|>assistant\n⟦Farewell.<|im_end|>⟧",
    "gemma": "<bos><start_of_turn>user\nThe king<end_of_turn>\n<start_of_turn>model\n⟦was wise.<end_of_turn>⟧\n"
    "<start_of_turn>user\nthank you<end_of_turn>\n<start_of_turn>model\n⟦Farewell.<end_of_turn>⟧",
}


@pytest.fixture(params=SHOWN)
def two_turns(request, tmp_path):
    """A form of chat, a small model of it, and a file of two preferences of two turns."""
    tokenizer = chats.FORMS[request.param]()
    lm = GPT2(GPT2Config(vocab_size=4200, n_positions=256, n_embd=8, n_layer=1, n_head=1))
    config = {"eos_token_id": [tokenizer.eos_token_id, *chats.ends(tokenizer)]}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(TWO_TURNS) + "\n" + json.dumps(TWO_TURNS | {"prompt_id": "x"}))
    return request.param, models.Loaded(lm, jax.jit(lm.init)(jax.random.key(0)), tokenizer, config), path


def test_two_turn_preferences_are_read_as_the_assistants_words(two_turns, monkeypatch, capsys):
    """As one printed example shows before the first step; what nothing reads of a line is counted."""
    form, loaded, path = two_turns
    monkeypatch.setattr(recipes, "make_step", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.dpo(loaded, path, steps=1, batch_size=1, show_mask=True)
    said = capsys.readouterr().out
    assert f"{SHOWN[form]}\n\n" in said and "prompt_id is in 1 line, but nothing reads it." in said


@pytest.mark.slow
def test_two_turn_preferences_train_chat_models(two_turns):
    _, loaded, path = two_turns
    tuned = train.dpo(loaded, path, steps=1, batch_size=1, learning_rate=1e-2, verbose=False)
    assert any((new != old).any() for new, old in zip(leaves(tuned.params), leaves(loaded.params), strict=True))


@pytest.mark.slow
def test_a_file_with_a_completion_and_a_prompt_that_are_too_long_trains_and_names_them(folder, call):
    lines = [{"prompt": "a", "completion": " b" * 99}, {"prompt": "a" * 200, "completion": " b"}, *LINES["sft"]]
    (folder / "long.jsonl").write_text("\n".join(map(json.dumps, lines)))
    status, out, _ = call("sft", "long", "long", "--cut", "skip")
    assert status == 0 and "8 records, 0 bad lines skipped, 2 too long lines skipped" in out
    skipped = [json.loads(line) for line in (folder / "long" / "skipped.jsonl").read_text().splitlines()]
    assert [each["line"] for each in skipped] == [1, 2] and "longer than 64" in skipped[0]["reason"]
    status, out, _ = call("sft", "long", "long2", "--cut", "left", "--on-bad", "skip", "--train-on", "last")
    assert status == 0 and "9 records, 1 bad lines skipped, 1 prompts and 0 completions truncated" in out


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "arguments", "options", "error", "said"),
    [
        ("sft", (3, "sft"), {}, TypeError, "lm must be a model, its name or its path, but is a int"),
        ("sft", ("tiny-t5", "sft"), {}, ValueError, "must be decoder-only, but tiny-t5 is a T5"),
        ("sft", ("model", 5), {}, TypeError, "data must be a path or an iterable of dicts, but is a int"),
        ("sft", ("model", [{"prompt": "a"}]), {}, ValueError, "data has 1 bad row: row 0: completion is missing"),
        ("sft", ("model", LINES["sft"]), {}, ValueError, "data has 8 records: batch_size must be at most 8, but is 16"),
        ("sft", ("model", "sft"), {"resume": True}, ValueError, "resume needs an output folder"),
        (
            "sft",
            ("model", "sft"),
            {"stepz": 1},
            TypeError,
            "got an unexpected keyword argument 'stepz': did you mean 'steps'",
        ),
        ("sft", ("model", "sft"), {"config": DPOConfig()}, TypeError, "config must be a SFTConfig, but is a DPOConfig"),
        ("sft", ("model", "sft"), {"steps": -1}, ValueError, "steps must be an integer of at least 1, but is -1"),
        ("sft", ("model", "sft"), {"steps": "3"}, ValueError, "steps must be an integer of at least 1, but is '3'"),
        ("sft", ("model", "sft"), {"log_every": 0}, ValueError, "log_every must be an integer of at least 1"),
        ("sft", ("model", "sft"), {"save_every": 0}, ValueError, "save_every must be an integer of at least 1"),
        ("sft", ("model", "sft"), {"microbatches": 0}, ValueError, "microbatches must be an integer of at least 1"),
        ("sft", ("model", "sft"), {"microbatches": 3}, ValueError, "microbatches must divide batch_size, 16, but is 3"),
        (
            "sft",
            ("model", "sft"),
            {"warmup": -1},
            ValueError,
            "warmup must be a finite number of at least 0, but is -1",
        ),
        ("sft", ("model", "sft"), {"learning_rate": float("nan")}, ValueError, "learning_rate must be a finite number"),
        ("sft", ("model", "sft"), {"cut": "middle"}, ValueError, "cut must be one of left, right, raise, skip, but"),
        ("sft", ("model", "sft"), {"dtype": "int8"}, ValueError, "dtype must be one of float32, bfloat16"),
        ("reward", ("model", "ranked"), {"lora_dropout": 0.1}, ValueError, "lora_dropout is of adapters, which"),
        (
            "sft",
            ("model", "sft"),
            {"lora_targets": "c_attn"},
            ValueError,
            "lora_targets is of adapters, which lora_rank",
        ),
        ("dpo", ("model", "pairs"), {"lora_rank": 2, "lora_dropout": 1.0}, ValueError, "lora_dropout must be below 1"),
        (
            "dpo",
            ("model", "pairs"),
            {"lora_rank": 2, "lora_targets": ["q"]},
            ValueError,
            "targets must be among c_attn",
        ),
        ("sft", ("model", "sft"), {"lora_rank": 2, "lora_from": "a"}, ValueError, "must be left out with lora_from"),
        (
            "sft",
            ("model", "sft"),
            {"lora_from": "nowhere"},
            FileNotFoundError,
            "nowhere must be a folder .* has no adap",
        ),
        ("dpo", ("model", "pairs"), {"loss": "ppo"}, ValueError, "the loss must be one of dpo, .*kto, but is 'ppo'"),
        ("dpo", ("model", "pairs"), {"loss_kwargs": {"gamma": 1}}, ValueError, "the loss dpo has no gamma"),
        ("dpo", ("model", "pairs"), {"loss_kwargs": [1]}, TypeError, r"loss_kwargs must be a dict, but is \[1\]"),
        ("dpo", ("model", "pairs"), {"loss": "math:pi"}, ValueError, "loss must be a function, but math:pi is a float"),
        (
            "dpo",
            ("model", "unpaired"),
            {"loss": "kto", "microbatches": 2},
            ValueError,
            "microbatches must be 1 for kto",
        ),
        ("grpo", ("model", "prompts"), {}, ValueError, "reward or reward_model must be given, or both, but neither is"),
        (
            "grpo",
            ("model", LINES["prompts"][:2]),
            {"reward": vowels, "max_new_tokens": 8},
            ValueError,
            "prompts has 2 records of 4 completions: batch_size must be at most 8, but is 16",
        ),
        ("grpo", ("model", "prompts"), {"reward": 3}, TypeError, "reward must be a function or a reward model, but is"),
        ("grpo", ("model", "prompts"), {"reward": vowels, "method": "x"}, ValueError, "method must be one of grpo"),
        (
            "grpo",
            ("model", "prompts"),
            {"reward": vowels, "gamma": 0.1},
            ValueError,
            "gamma and text must be given tog",
        ),
        ("grpo", ("model", "prompts"), {"reward": vowels, "text": "a"}, ValueError, "gamma and text must be given"),
        (
            "grpo",
            ("model", "prompts"),
            {"reward": vowels, "temperature": 0.0},
            ValueError,
            "temperature must be a finite",
        ),
        (
            "grpo",
            ("model", "prompts"),
            {"reward": vowels, "stop": ("a", "")},
            ValueError,
            "stop must be strings that are",
        ),
        (
            "grpo",
            ("model", "prompts"),
            {"reward": vowels, "top_k": 0},
            ValueError,
            "top_k must be an integer of at least",
        ),
        (
            "grpo",
            ("model", "prompts"),
            {"reward": [vowels, vowels], "reward_weights": (1.0,)},
            ValueError,
            r"reward_weights must be 2 finite numbers, one for each reward, but are \[1.0\]",
        ),
        (
            "grpo",
            ("model", "prompts"),
            {"reward": jl.rewards.number, "batch_size": 4, "max_new_tokens": 4},
            ValueError,
            "the reward function takes solution or answer, but the data have gold",
        ),
        (
            "grpo",
            ("model", "prompts"),
            {"reward": vowels, "batch_size": 4, "eval_data": [{"text": "a"}], "max_new_tokens": 4},
            ValueError,
            "eval_data has 1 bad row: row 0: prompt is missing",
        ),
        (
            "grpo",
            ("model", "prompts"),
            {"reward": vowels, "keep_best": "reward"},
            ValueError,
            "keep_best needs held-out",
        ),
        (
            "grpo",
            ("model", "prompts"),
            {"reward": [vowels, vowels], "eval_data": LINES["prompts"], "keep_best": "held_out_reward/x"}
            | {"batch_size": 4, "max_new_tokens": 4},
            ValueError,
            "keep_best must be one of held_out_reward, held_out_reward/vowels, held_out_reward/vowels_2, held_out_kl,",
        ),
        (
            "ppo",
            ("model", "prompts"),
            {"reward": vowels, "dynamic_sampling": 1},
            ValueError,
            "dynamic_sampling must be 0 for a group_size of 1",
        ),
        ("grpo", ("model", "prompts"), {"reward": vowels, "group_size": 3}, ValueError, "group_size must divide batch"),
        ("grpo", ("model", "prompts"), {"reward": vowels, "minibatches": 3}, ValueError, "minibatches × microbatches"),
        ("ppo", ("model", "prompts"), {"reward": vowels, "lambda_": 2.0}, ValueError, "lambda_ must be a number in"),
    ],
)
def test_what_a_trainer_cannot_do_is_refused_before_anything_is_written(
    folder, model, trainer, arguments, options, error, said
):
    lm, data = arguments
    lm = model if lm == "model" else lm
    data = folder / f"{data}.jsonl" if isinstance(data, str) else data
    with pytest.raises(error, match=said):
        getattr(train, trainer)(lm, data, **options)
    assert not (folder / "model" / "checkpoints").exists()


def test_a_run_that_is_to_be_resumed_but_has_no_checkpoint_begins_anew(folder, capsys):
    recipes.begin(folder / "model", SFTConfig(resume=True), folder / "nowhere")
    assert "nowhere has no checkpoint to resume from: the run starts from the beginning" in capsys.readouterr().out


# The command line and help --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "data", "words", "said"),
    [
        ("dpo", "bad", [], "line 1: chosen and rejected are the same completion"),
        ("dpo", "empty", [], "has no records"),
        ("sft", "sft", ["--cut", "raise", "--max-length", 5], "are longer than 5"),
        ("grpo", "prompts", ["--reward", "nowhere:f"], "reward must be a function at"),
        ("grpo", "prompts", ["--reward", "math:sqrt", "--max-new-tokens", 64], "leaves no room"),
    ],
)
def test_the_command_line_names_what_is_wrong(call, folder, command, data, words, said):
    (folder / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    (folder / "empty.jsonl").write_text("\n")
    status, _, err = call(command, data, "wrong", *words)
    assert status == 2 and said in err and err.splitlines()[-1].startswith("jaxrl-llm: ")
    assert not (folder / "wrong" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("step 3 failed: the reward function raised KeyError"), 2),
        (KeyboardInterrupt("stopped after step 2 of 6; it can be resumed."), 130),
    ],
)
def test_an_error_of_a_trainer_is_one_line(call, monkeypatch, error, code):
    def fails(*args, **options):
        raise error

    monkeypatch.setattr(train, "sft", fails)
    status, _, err = call("sft", "sft", "wrong")
    assert status == code and err == f"jaxrl-llm: {error}\n"


def test_the_options_reach_the_method(call, monkeypatch, tmp_path):
    taken = {}
    monkeypatch.setattr(train, "ppo", lambda lm, data, **given: taken.update(given))
    monkeypatch.setattr(train, "grpo", lambda lm, data, **given: taken.update(given))
    words = "--lambda 0.5 --discount 0.9 --value-clip None --value-coefficient 1 --no-whiten --gamma 0.1 --text c"
    words = f"{words} --clip-high 0.3 --dual-clip 3 --importance-cap 4 --reward a:b"
    call("ppo", "prompts", "x", *words.split())
    expected = dataclasses.replace(
        METHODS["ppo"], lambda_=0.5, discount=0.9, value_clip=None, value_coefficient=1.0, whiten=False, gamma=0.1,
        clip_high=0.3, dual_clip=3.0, importance_cap=4.0,
    )  # fmt: skip
    assert method_of(taken["config"]) == expected and str(taken["config"].text) == "c"
    assert str(taken["out"]).endswith("x") and type(taken["config"]) is PPOConfig
    words = "--reward a:b c:d --reward-model r --reward-weights 1 0.5 -2 --stop x y --dynamic-sampling 3 --top-k 5"
    call("grpo", "prompts", "x", *words.split(), "--eval-data", "h")
    config = taken["config"]
    assert config.rewards == ("a:b", "c:d", Path("r")) and config.reward_weights == (1, 0.5, -2)
    assert config.stop == ("x", "y") and config.redraws == 3 and config.top_k == 5 and config.eval_data == Path("h")
    assert GRPOConfig(reward="a:b", method="dapo").redraws == 9 and GRPOConfig(reward="a:b").redraws == 0
    for name in ("grpo", "rloo", "dr_grpo", "gspo", "dapo", "cispo"):  # whose defaults are their own
        call("grpo", "prompts", "x", "--method", name, "--reward", "a:b")
        assert method_of(taken["config"]) == METHODS[name] and taken["config"].text is None
    words = "--method dr_grpo --beta 0.1 --kl reverse --scale-rewards batch --entropy-coefficient 0.01 --normaliser 9"
    words = f"{words} --importance-mode sequence_mask --importance-floor 0.5 --overlong-buffer 0.3 --mask-truncated"
    call("grpo", "prompts", "x", *words.split(), "--reward", "a:b")
    assert method_of(taken["config"]) == dataclasses.replace(
        METHODS["dr_grpo"], beta=0.1, kl="reverse", scale_rewards="batch", entropy_coefficient=0.01, normaliser=9.0,
        importance_mode="sequence_mask", importance_floor=0.5, overlong_buffer=0.3, mask_truncated=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "dapo", "kl": "forward"}, "beta must be above 0 with kl forward, but is 0 for dapo"),
        ({"method": "reinforce", "clip_high": 0.3}, "clip_low and clip_high must be None for reinforce"),
        ({"method": "reinforce", "epochs": 2}, "epochs × minibatches must be 1 for the surrogate reinforce"),
        ({"method": "grpo", "normaliser": 9.0}, "normaliser must be None for the mode sequence_mean, but is 9"),
        ({"method": "rloo", "scale_rewards": "group"}, "scale_rewards must be none for rloo, but is group"),
        (
            {"importance_mode": "sequence_truncate", "top_p": 0.9},
            "importance_mode must be token_truncate or token_mask",
        ),
        ({"importance_floor": 3.0}, "importance_floor must be at most importance_cap, 2.0, but is 3.0"),
        ({"overlong_buffer": 1.5}, r"overlong_buffer must be a number in \[0, 1\], but is 1.5"),
    ],
)
def test_online_options_without_effect_or_out_of_range_are_refused_before_the_model_is_loaded(options, said):
    with pytest.raises(ValueError, match=said):
        train.grpo("no such model", [], reward=len, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_option_is_documented_in_python_and_on_the_command_line(call, name):
    trainer, fields = getattr(train, name), dataclasses.fields(CONFIGS[name])
    docs = field_docs(CONFIGS[name])
    signature = inspect.signature(trainer)
    for field in fields:
        assert docs[field.name], field.name
        assert f"{field.name} (" in trainer.__doc__ and field.name in signature.parameters
        default = signature.parameters[field.name].default
        assert default == getattr(CONFIGS[name](**({"reward": "a:b"} if "reward" in docs else {})), field.name) or (
            field.name == "reward"
        )
    status, out, _ = call(name, "prompts", "x", "--help")
    assert status == 0
    assert all(f"--{field.name.strip('_').replace('_', '-')}" in out for field in fields)


def test_every_loss_is_named_where_it_is_chosen():
    named = field_docs(DPOConfig)["loss"]
    assert {each.strip(" .") for each in named.split(";")[0].replace(" or ", ", ").split(",")} == set(NAMES)


def test_help_needs_no_jax():
    code = """
import sys
from jaxrl_llm import cli
sys.argv = ["jaxrl-llm", "train", "grpo", "--help"]
try:
    cli.main()
finally:
    print("heavy:", sorted({"jax", "flax", "transformers", "optax"} & set(sys.modules)))
"""
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0 and done.stdout.endswith("heavy: []\n") and not done.stderr
    for part in ("--learning-rate", "--group-size", "units of reward per nat", "Most tokens of prompt and completion"):
        assert part in done.stdout


# Edges ----------------------------------------------------------------------------------------------------------------


def test_the_folder_of_a_loaded_model_is_not_overwritten(folder):
    before = (folder / "model" / "model.safetensors").read_bytes()
    for lm in (folder / "model", jl.load(folder / "model")):
        with pytest.raises(ValueError, match="out must be another folder than that of the model"):
            train.sft(lm, LINES["sft"], out=folder / "model", **OPTIONS)
    with pytest.raises(ValueError, match="out must be another folder than that of the model"):
        train.grpo(lm, LINES["prompts"], reward_model=folder / "prize", out=folder / "prize", **OPTIONS)
    assert (folder / "model" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["config.json", "log.jsonl", "model.safetensors", "run.json"], "has config.json, model.safetensors: choose"),
        (["log.jsonl"], "has log.jsonl: choose"),
        (list("abcdefg"), "has a, b, c, d, e, ...: choose"),
        (["checkpoints", "run.json", "log.jsonl", ".hidden"], None),
        (["checkpoints"], None),
    ],
)
def test_no_run_begins_in_a_folder_that_has_other_files(model, tmp_path, files, said):
    for name in files:
        (tmp_path / name).mkdir() if name == "checkpoints" else (tmp_path / name).touch()
    if said is None:
        assert recipes.begin(model, SFTConfig(), tmp_path, verbose=False).out == tmp_path
        return
    with pytest.raises(ValueError, match=f"out must be a new or empty folder, but .* {re.escape(said)}"):
        recipes.begin(model, SFTConfig(resume=True), tmp_path, verbose=False)
    with pytest.raises(ValueError, match=r"out must be a folder, but .* is a file"):
        recipes.begin(model, SFTConfig(), tmp_path / files[0], verbose=False)


def test_what_contradicts_is_refused(model):
    pairs, method = LINES["pairs"], METHODS["grpo"]
    with pytest.raises(ValueError, match="beta must be given once"):
        train.dpo(model, pairs, beta=0.1, loss_kwargs={"beta": 0.2}, **OPTIONS)
    with pytest.raises(ValueError, match="batch_size must be at least 2 for kto"):
        train.dpo(model, LINES["unpaired"], loss=kto_loss, steps=1, batch_size=1)
    with pytest.raises(ValueError, match="eval_data must have at least 2 records for a loss that compares rows, but"):
        train.dpo(model, LINES["unpaired"], loss="kto", eval_data=LINES["unpaired"][:1], **OPTIONS, verbose=False)
    with pytest.raises(ValueError, match="a Method must be given without config"):
        train.grpo(model, LINES["prompts"], config=GRPOConfig(reward=vowels), method=method)
    with pytest.raises(ValueError, match="steps must be an integer of at least 1, but is"):
        train.dpo(model, pairs, steps=2.0)
