"""Measures of finished models, against the same by hand; and the figure of a run's log."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
import scipy.stats

import jaxrl_llm as jl
from jaxrl_llm import cli, evaluation, models, train
from jaxrl_llm.models import GPT2, GPT2Config
from jaxrl_llm.plots.run import panels, run_figure
from tests.models.test_memory import both
from tests.training.chats import TOOLS, byte_level

PAIRS = [{"prompt": f"Say {i}:", "chosen": " yes", "rejected": " no, " * (i % 2 + 1)} for i in range(5)]
ROWS = [{"prompt": f"Say {i}:", "completion": " it is" * (i % 3 + 1)} for i in range(5)]
PROMPTS = [{"prompt": f"Say {i}:", "gold": i} for i in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    lm = GPT2(GPT2Config(vocab_size=4096, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    tokenizer = models.load("tiny-gpt2").tokenizer
    init = jax.jit(lm.init)
    for seed in range(2):
        params = jax.tree.map(lambda leaf: 4 * leaf, init(jax.random.key(seed)))
        models.save(folder / str(seed), lm, params, tokenizer, config={"eos_token_id": 0})
    head = models.ScalarHead(lm)
    models.save_reward_model(folder / "reward", head, head.init(jax.random.key(2), init(jax.random.key(3))), tokenizer)
    for name, rows in (("pairs", PAIRS), ("rows", ROWS), ("prompts", PROMPTS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def lm(folder):
    return jl.load(folder / "0")


def scored(lm, rows, name):
    """The log-probabilities of completions, each with EOS."""
    ids = [[*lm.encode(row[name]), 0] for row in rows]
    return lm.log_probs([row["prompt"] for row in rows], ids)


def lengths(prompts, completions, gold):
    assert prompts == [row["prompt"] for row in PROMPTS]
    return [len(text) + each for text, each in zip(completions, gold, strict=True)]


def test_perplexity_is_that_of_all_completion_tokens(folder, lm):
    found = jl.evaluate(lm, folder / "rows.jsonl", batch_size=2)
    tokens = np.concatenate(scored(lm, ROWS, "completion"))
    assert found["loss"] == pytest.approx(-tokens.mean(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(-tokens.mean()), rel=1e-5) and found["rows"] == 5


def test_preferences_are_measured_with_and_without_a_reference(folder, lm):
    reference = jl.load(folder / "1")
    found = jl.evaluate(lm, PAIRS, reference=folder / "1", batch_size=3)
    sums, means = (
        [np.asarray([getattr(each, kind)() for each in scored(model, PAIRS, side)]) for side in ("chosen", "rejected")]
        for model, kind in ((lm, "sum"), (lm, "mean"))
    )
    others = [np.asarray([each.sum() for each in scored(reference, PAIRS, side)]) for side in ("chosen", "rejected")]
    margin = sums[0] - sums[1] - others[0] + others[1]
    assert (
        found["accuracy"] == (sums[0] > sums[1]).mean() and found["accuracy_per_token"] == (means[0] > means[1]).mean()
    )
    assert found["chosen_logp"] == pytest.approx(sums[0].mean(), rel=1e-4)
    assert found["implicit_accuracy"] == (margin > 0).mean()
    assert found["implicit_margin"] == pytest.approx(margin.mean(), rel=1e-3)
    same = jl.evaluate(lm, PAIRS, reference=lm)
    assert same["implicit_accuracy"] == 0.5 and same["implicit_margin"] == 0
    assert "implicit_margin" not in jl.evaluate(lm, PAIRS) and "loss" not in same


def test_a_reward_model_is_measured_on_pairs(folder):
    scorer = train.RewardModel.load(folder / "reward")
    better, worse = (
        scorer.score([row["prompt"] for row in PAIRS], [row[side] for row in PAIRS]) for side in ("chosen", "rejected")
    )
    lead = np.subtract(better, worse)
    for each in (folder / "reward", scorer):
        found = jl.evaluate(each, PAIRS)
        assert found["accuracy"] == (lead > 0).mean() and found["margin"] == pytest.approx(lead.mean(), abs=1e-5)
        assert found["score"] == pytest.approx(np.mean([better, worse]), abs=1e-5)
        assert found["loss"] == pytest.approx(np.logaddexp(0, -lead).mean(), abs=1e-5)


@pytest.mark.slow
def test_completions_are_judged_and_compared(folder, lm):
    options = {"max_new_tokens": 6, "seed": 3, "batch_size": 2}
    found = jl.evaluate(lm, PROMPTS, reward=lengths, against=folder / "1", **options)
    ours, theirs = (
        lengths(
            [row["prompt"] for row in PROMPTS],
            [each.text for each in model.generate([row["prompt"] for row in PROMPTS], **options)],
            range(5),
        )
        for model in (lm, jl.load(folder / "1"))
    )
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert found["reward"] == ours.mean() and found["against_reward"] == theirs.mean() and ours.std() > 0
    assert found["reward_stderr"] == pytest.approx(scipy.stats.sem(ours))
    assert found["win_rate"] == (ours > theirs).mean() + (ours == theirs).mean() / 2
    same = jl.evaluate(lm, PROMPTS, reward_model=folder / "reward", against=lm, **options)
    assert same == jl.evaluate(lm, PROMPTS, reward=str(folder / "reward"), against=lm, **options)
    assert same["win_rate"] == 0.5 and same["win_rate_low"] < 0.5 < same["win_rate_high"]
    both = jl.evaluate(lm, PAIRS, reward=lambda prompts, completions: [1.0] * len(prompts), max_new_tokens=2)
    assert both["reward"] == 1 and 0 <= both["accuracy"] <= 1
    few = jl.evaluate(lm, PAIRS, reward=lambda prompts, completions: [None, 2.0, None, None, 4.0], max_new_tokens=2)
    assert few["reward"] == 3.0 and few["reward_stderr"] == pytest.approx(1.0)


def test_rewards_are_called_as_in_training(lm):
    """By name if completions or their tokens are asked for, with the entries of the prompts."""
    seen = {}

    def ids(completion_ids, prompts, gold):
        seen.update(ids=completion_ids, prompts=prompts, gold=gold)
        return [float(len(each)) for each in completion_ids]

    found = jl.evaluate(lm, PROMPTS, reward=ids, max_new_tokens=3)
    assert found["reward"] == found["length"] and seen["gold"] == [0, 1, 2, 3, 4]
    assert seen["prompts"] == [row["prompt"] for row in PROMPTS] and all(type(each) is int for each in seen["ids"][0])
    named = jl.evaluate(lm, PROMPTS, reward=lambda completions, **entries: [len(entries["gold"])] * 5, max_new_tokens=3)
    assert named["reward"] == 5
    one = jl.evaluate(lm, PROMPTS[:1], reward=lambda prompts, completions: [2.0], max_new_tokens=2)
    assert one["reward"] == 2 and one["rows"] == 1 and "reward_stderr" not in one
    with pytest.raises(
        RuntimeError, match=r"the reward function raised ZeroDivisionError: .* \(test_evaluation.py, line"
    ):
        jl.evaluate(lm, PROMPTS, reward=lambda prompts, completions: 1 / 0, max_new_tokens=3)
    with pytest.raises(ValueError, match="the reward function takes solution, but the data have gold"):
        jl.evaluate(lm, PROMPTS, reward=lambda prompts, completions, solution: [1.0] * 5, max_new_tokens=3)


def test_the_chat_template_is_given_what_training_gives_it(lm):
    """Tools and other variables of a row; and Alpaca's instruction as a user's message."""
    tokenizer = byte_level(TOOLS)
    chatty = jl.interface.LM(dataclasses.replace(lm.loaded, tokenizer=tokenizer))
    asked, tools = [{"role": "user", "content": "Hi"}], [{"name": "a"}]
    sampled, seen = {"max_new_tokens": 8, "seed": 0}, []

    def reward(prompts, completion_ids):
        seen.append((prompts, completion_ids))
        return [0.0] * len(prompts)

    rows = [{"prompt": "Hi", "tools": tools}, {"prompt": "Hi", "tools": tools}, {"instruction": "Hi"}]
    jl.evaluate(chatty, rows, reward=reward, **sampled)
    prompts, written = seen.pop()
    assert prompts == [asked] * 3
    shown = chatty.generate([asked] * 2, chat={"tools": tools}, **sampled)
    shown += chatty.generate([asked], chat=True, **sampled)
    assert written == [each.tokens for each in shown] and written[0] != written[2]
    with pytest.raises(ValueError, match="colour must be left out, as the chat template does not read it"):
        jl.evaluate(chatty, [{"prompt": "Hi", "chat_template_kwargs": {"colour": 1}}], reward=reward)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", ["0 pairs reference=1", "0 prompts reward=thirds.py:thirds against=1", "reward pairs"]
)
def test_two_processes_give_the_numbers_of_one(folder, words, monkeypatch, capsys):
    reward = "def thirds(prompts, completions, gold):\n"
    reward += "    return [None if i == 2 else len(text) / 3 for text, i in zip(completions, gold)]\n"
    (folder / "thirds.py").write_text(reward)
    model, data, *options = words.split()
    command = ["evaluate", str(folder / model), "--data", f"{folder / data}.jsonl", "--batch-size", "2"]
    for name, value in (each.split("=") for each in options):
        command += [f"--{name}", str(folder / value)]
    command += ["--max-new-tokens", "6", "--temperature", "0.7"] if data == "prompts" else []
    first, other = both(["jaxrl_llm.cli", *command, "--mesh", "data=2,fsdp=2"], devices=2, JAX_NUM_PROCESSES="2")
    monkeypatch.setattr(sys, "argv", ["jaxrl-llm", *command])
    cli.main()
    found, one = (
        dict(line.split() for line in text.splitlines() if "records" not in line)
        for text in (first, capsys.readouterr().out)
    )
    assert found.keys() == one.keys() and other == ""
    for name, value in one.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-5), name


def test_rows_that_were_skipped_are_not_counted(lm):
    bad, long = {"prompt": "a"}, {"prompt": "a" * 200, "completion": "b"}
    found = jl.evaluate(lm, [*ROWS, bad, long], on_bad="skip", cut="skip", max_length=40)
    assert found == jl.evaluate(lm, ROWS) and found["rows"] == 5


def test_wilsons_interval_is_that_of_scipy():
    for wins, count in ((0, 5), (3, 7), (40, 40)):
        expected = scipy.stats.binomtest(wins, count).proportion_ci(method="wilson")
        assert evaluation.wilson(wins / count, count) == pytest.approx(tuple(expected), abs=1e-12)


def test_what_cannot_be_evaluated_is_refused(folder, lm):
    for data, options, said in (
        (PROMPTS, {}, "the data must have completions, or reward must be given, but rows have prompt, gold"),
        (ROWS, {"reference": lm}, "reference needs preferences, rows with chosen and rejected, but has prompt, compl"),
        (ROWS, {"against": lm}, "against compares rewards: reward or reward_model must be given"),
        (PROMPTS, {"reward": lengths, "reward_model": folder / "reward"}, "one of reward and reward_model must be"),
        (PROMPTS, {"reward": lambda prompts, completions: [np.nan]}, "must be one finite number for each of 5"),
        (ROWS, {"temperature": 2.0, "max_new_tokens": 64}, "temperature is of completions, which a reward asks for"),
        (PROMPTS, {"temperature": 0}, "temperature must be a finite number above 0, but is 0"),
    ):
        few = {"max_new_tokens": 2} if "reward" in options else {}
        with pytest.raises(ValueError, match=said):
            jl.evaluate(lm, data, **few | options)
    with pytest.raises(ValueError, match="a reward model needs preferences, rows with chosen and rejected"):
        jl.evaluate(folder / "reward", ROWS)
    with pytest.raises(ValueError, match="reference must be left out for a reward model"):
        jl.evaluate(folder / "reward", PAIRS, reference=lm)
    small = GPT2(GPT2Config(vocab_size=4096, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    short = models.Loaded(small, small.init(jax.random.key(0)), lm.tokenizer, {})
    with pytest.raises(ValueError, match="the reference must have a context of at least max_length, 64 tokens, but"):
        jl.evaluate(lm, PAIRS, reference=short)
    jl.evaluate(lm, PAIRS, reference=short, max_length=16)
    with pytest.raises(ValueError, match=r"the reference must be a language model, but .*reward is a reward model"):
        jl.evaluate(lm, PAIRS, reference=folder / "reward")
    with pytest.raises(TypeError, match="lm must be a model, its name or its path, but is a RewardModel"):
        jl.evaluate(lm, PAIRS, reference=train.RewardModel.load(folder / "reward"))
    with pytest.raises(TypeError, match="did you mean 'reward'"):
        jl.evaluate(lm, PROMPTS, reward_funcs=lengths)


def test_the_command_line_evaluates(run, folder):
    status, out, err = run("evaluate", folder / "0", "--data", folder / "pairs.jsonl", "--reference", folder / "1")
    assert status == 0, err
    told = dict(line.split() for line in out.splitlines() if line.count(" ") == 1)
    expected = jl.evaluate(folder / "0", PAIRS, reference=folder / "1")
    assert {name: float(value) for name, value in told.items()} == pytest.approx(expected, rel=1e-5)
    status, _, err = run("evaluate", folder / "0", "--data", folder / "prompts.jsonl")
    assert status == 2 and err.startswith("jaxrl-llm: the data must have completions")


# The figure of a log --------------------------------------------------------------------------------------------------

LOG = [
    {"step": 1, "loss": 2.0, "kl": 0.1, "seconds": 1.0, "sample": "a"},
    {"step": 2, "loss": 1.0, "kl": 0.2, "held_out_loss": 1.5, "held_out_accuracy": 0.5},
    {"step": 4, "loss": 0.5, "kl": 0.1, "held_out_loss": 1.2, "held_out_accuracy": 0.7},
]


def test_a_log_is_drawn_a_panel_for_each_metric_with_its_held_out_values(tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LOG) + '{"step": 5, "lo')
    assert panels(LOG) == ["loss", "accuracy", "kl"]
    for figure in (run_figure(tmp_path), run_figure(LOG), run_figure(str(tmp_path / "log.jsonl"))):
        loss, accuracy, kl = figure.axes
        assert [line.get_xydata().tolist() for line in loss.lines] == [
            [[1, 2.0], [2, 1.0], [4, 0.5]],
            [[2, 1.5], [4, 1.2]],
        ]
        assert loss.get_title(loc="left") == "loss" and accuracy.get_title(loc="left") == "accuracy, held-out"
        assert len(kl.lines) == 1
    assert run_figure(LOG)._repr_png_()[0].startswith(b"\x89PNG")
    assert [axes.get_title(loc="left") for axes in run_figure(LOG, metrics=["kl", "held_out_loss"]).axes] == [
        "kl",
        "loss",
    ]
    with pytest.raises(ValueError, match="metrics must be among loss, accuracy, kl, but have lr"):
        run_figure(LOG, metrics=["lr"])
    with pytest.raises(ValueError, match="must have rows with metrics, but has 0"):
        run_figure([])
    with pytest.raises(FileNotFoundError, match=r"has no log\.jsonl: it is not the output folder of a run"):
        run_figure(tmp_path / "nowhere")


def test_the_command_line_draws_a_run(run, tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LOG))
    status, out, _ = run("plot", tmp_path, "--out", tmp_path / "run.svg", "--metrics", "loss", "kl")
    assert status == 0 and out == f"drawn: {tmp_path / 'run.svg'}\n" and (tmp_path / "run.svg").stat().st_size > 1000
    status, _, err = run("plot", tmp_path / "x")
    assert status == 2 and "has no log.jsonl" in err and err.count("\n") == 1
