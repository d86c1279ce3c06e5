"""Whole runs from files to folders, by the command line and from Python."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxrl_llm import models
from jaxrl_llm.models import GPT2, GPT2Config
from jaxrl_llm.training import recipes
from jaxrl_llm.training.batches import COLLATE, Batches, encoder_of
from jaxrl_llm.training.methods import METHODS
from jaxrl_llm.training.recipes import Run
from jaxrl_llm.training.rollout import Sampler
from jaxrl_llm.training.run_log import RunLog

LINES = {
    "sft": [{"prompt": f"Say {i}:", "answer": " it is " * (i % 3 + 1)} for i in range(8)],
    "preferences": [{"prompt": f"Say {i}:", "chosen": " yes", "rejected": " no, " * (i % 2 + 1)} for i in range(8)],
    "judged": [{"prompt": f"Say {i}:", "answer": f" yes {i}", "label": i % 2} for i in range(8)],
    "ranked": [{"prompt": f"Say {i}:", "answers": [" a", " b", " c"][: 2 + i % 2]} for i in range(8)],
    "prompts": [{"prompt": f"Say {i}:"} for i in range(8)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of every kind, and a small model that has tiny-gpt2's tokens."""
    folder = tmp_path_factory.mktemp("runs")
    for name, lines in LINES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loaded = models.load("tiny-gpt2")
    lm = GPT2(GPT2Config(vocab_size=4096, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    import jax

    params = lm.init(jax.random.key(0))
    models.save(folder / "model", lm, params, loaded.tokenizer, config={"eos_token_id": 0, "bos_token_id": 0})
    (folder / "reward.py").write_text(
        "def vowels(prompts, answers):\n    return [a.count('e') * 1.0 for a in answers]\n"
    )
    return folder


def settings(folder, data, out, **changes):
    given = {"steps": 2, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, "save_every": 1}
    return Run(model=str(folder / "model"), data=folder / f"{data}.jsonl", out=folder / out, **(given | changes))


def loaded_again(folder, out):
    found = models.load(folder / out)
    assert found.tokenizer is not None and all(np.isfinite(leaf).all() for leaf in leaves(found.params))
    return found


def leaves(tree):
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_fine_tuning_lowers_the_loss_says_what_it_did_and_is_resumed(folder):
    said = []
    run = settings(folder, "sft", "sft", steps=6, microbatches=2, eval_data=folder / "sft.jsonl")
    recipes.sft(run, say=said.append)
    rows = RunLog(run.out / "log.jsonl").rows()
    assert rows[-1]["held_out_loss"] < rows[0]["held_out_loss"] - 0.02
    assert all(isinstance(row["sample"], str) and row["tokens"] > 0 for row in rows)
    assert "8 records, 0 bad lines skipped, 0 prompts and 0 answers cut" in said[0] and str(run.out) in said[-1]
    loaded_again(folder, "sft")
    with pytest.raises(ValueError, match="holds a run already: resume it, or choose another folder"):
        recipes.sft(run)
    with pytest.raises(ValueError, match="learning_rate was"):
        recipes.sft(dataclasses.replace(run, resume=True, learning_rate=0.5), say=said.append)
    recipes.sft(dataclasses.replace(run, resume=True), say=said.append)


@pytest.mark.parametrize(("loss", "data"), [("dpo", "preferences"), ("kto", "judged")])
def test_preferences_move_the_policy_and_begin_at_the_reference(folder, loss, data):
    run = settings(folder, data, loss, dtype="bfloat16" if loss == "kto" else "float32")
    recipes.preference(run, loss=loss, say=lambda text: None)
    row = RunLog(run.out / "log.jsonl").rows()[0]
    assert row["loss"] == pytest.approx(np.log(2) if loss == "dpo" else 0.5, abs=1e-5)
    before, after = models.load(folder / "model"), loaded_again(folder, loss)
    assert any((new != old).any() for new, old in zip(leaves(after.params), leaves(before.params), strict=True))


def test_adapters_are_saved_beside_the_merged_model(folder):
    run = settings(folder, "preferences", "lora", lora_rank=2, checkpoint_blocks=True)
    recipes.preference(run, loss="ipo", say=lambda text: None)
    merged, base = loaded_again(folder, "lora"), models.load(folder / "model")
    changed = [not np.array_equal(*pair) for pair in zip(leaves(merged.params), leaves(base.params), strict=True)]
    assert sum(changed) == 1, "the attention's kernel alone"
    assert (run.out / "adapter" / "adapter_config.json").is_file()


def test_a_reward_model_is_trained_and_ppo_and_grpo_use_rewards(folder):
    recipes.reward(settings(folder, "ranked", "reward", steps=4), say=lambda text: None)
    head = models.load_reward_model(folder / "reward")
    assert head.params["head"].shape == (16,)
    assert RunLog(folder / "reward" / "log.jsonl").rows()[-1]["accuracy"] > 0.5
    few = Sampler(6)
    recipes.policy_gradient(
        settings(folder, "prompts", "ppo"), method="ppo", sampler=few, reward_model=str(folder / "reward"),
        say=lambda text: None,
    )  # fmt: skip
    recipes.policy_gradient(
        settings(folder, "prompts", "grpo", lora_rank=2, dtype="bfloat16"),
        method=dataclasses.replace(METHODS["grpo"], group_size=2),
        sampler=few,
        reward_function=f"{folder / 'reward.py'}:vowels",
        say=lambda text: None,
    )
    for out in ("ppo", "grpo"):
        loaded_again(folder, out)
        first = RunLog(folder / out / "log.jsonl").rows()[0]
        assert abs(first["kl"]) < 1e-5 and {"reward", "entropy", "clip_fraction", "kl_k1", "kl_k3"} <= set(first)


def test_the_command_line_trains_and_names_what_is_wrong(folder, capsys, monkeypatch):
    from jaxrl_llm import cli

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["jaxrl-llm", "train", *map(str, words)])
        cli.main()
        return capsys.readouterr()

    shared = ["--model", folder / "model", "--steps", 1, "--batch-size", 4]
    found = call("dpo", "--data", folder / "preferences.jsonl", "--out", folder / "cli", "--beta", 0.2, *shared)
    assert "The model is in" in found.out
    loaded_again(folder, "cli")
    (folder / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    (folder / "empty.jsonl").write_text("\n")
    for words, said in [
        (["dpo", "--data", folder / "bad.jsonl"], "line 1: chosen and rejected are the same answer"),
        (["dpo", "--data", folder / "empty.jsonl"], "holds no record"),
        (["dpo", "--data", folder / "preferences.jsonl", "--knobs", "gamma", "1"], "the loss dpo has no gamma"),
        (["sft", "--data", folder / "sft.jsonl", "--cut", "raise", "--max-length", 5], "are longer than 5"),
        (["grpo", "--data", folder / "prompts.jsonl"], "give one reward"),
        (["grpo", "--data", folder / "prompts.jsonl", "--reward", "nowhere:f"], "a reward function is given as"),
        (
            ["grpo", "--data", folder / "prompts.jsonl", "--reward", "math:sqrt", "--max-new-tokens", 64],
            "leaves no room",
        ),
    ]:
        with pytest.raises(SystemExit) as stop:
            call(*words, "--out", folder / "wrong", *shared)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err, words
    assert not (folder / "wrong" / "model.safetensors").exists()


def test_help_explains_each_knob_at_once():
    command = [sys.executable, "-m", "jaxrl_llm.cli", "train", "grpo", "--help"]
    wide = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=wide)
    assert done.returncode == 0
    for part in ("--learning-rate", "--group-size", "units of reward per nat", "Tokens of prompt and answer"):
        assert part in done.stdout


@pytest.mark.parametrize("kind", ["demonstrations", "preferences", "judged", "ranked", "prompts"])
def test_batches_hold_what_the_records_say(folder, kind):
    from jaxrl_llm.data.encoding import Encoder
    from jaxrl_llm.data.jsonl import JsonLines
    from jaxrl_llm.data.records import PARSERS

    tokenizer = models.load(folder / "model").tokenizer
    name = "sft" if kind == "demonstrations" else kind
    records = JsonLines(folder / f"{name}.jsonl", PARSERS[kind])
    encode = encoder_of(Encoder(tokenizer, max_length=64), room=8)
    batches = Batches(records, encode, COLLATE[kind], batch_size=4, seed=0, multiple=16)
    batch, asked = batches(1), batches.records(1)
    first = getattr(
        batch, {"preferences": "chosen", "judged": "answers", "ranked": "answers"}.get(kind, "_replace"), None
    )
    rows = batch if kind in ("demonstrations", "prompts") else first
    tokens, mask = np.asarray(rows.tokens), np.asarray(rows.mask)
    assert tokens.shape[-1] % 16 == 0
    for place, record in enumerate(asked):
        row = (place, 0) if kind == "ranked" else place
        text = tokenizer.decode(tokens[row][mask[row]], skip_special_tokens=True)
        assert text.startswith(record.prompt)
    if kind == "judged":
        np.testing.assert_array_equal(batch.desirable, [record.good for record in asked])
        other = tokenizer.decode(
            np.asarray(batch.mismatched.tokens)[1][batch.mismatched.mask[1]], skip_special_tokens=True
        )
        assert other == asked[1].prompt + asked[0].answer
    if kind == "ranked":
        np.testing.assert_array_equal(batch.real.sum(axis=1), [len(record.answers) for record in asked])
    assert batches.describe(1).startswith("records of lines ")
