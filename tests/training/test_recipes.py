"""Whole runs from files to folders, by the command line and from Python."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jaxrl_llm.training.recipe_measures import held_out
from jaxrl_llm.training.recipe_parts import Trained, batches_of, prepare
from jaxrl_llm.training.recipe_run import Run, keys_of
from jaxrl_llm.training.run_log import RunLog

from jaxrl_llm import models
from jaxrl_llm.models import GPT2, GPT2Config
from jaxrl_llm.training import recipe_measures, recipes
from jaxrl_llm.training.batches import COLLATE, Batches, encoder_of
from jaxrl_llm.training.methods import METHODS
from jaxrl_llm.training.rollout import Sampler
from jaxrl_llm.training.steps import Loss

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
    with pytest.raises(ValueError, match='kind was "sft" and is "preference"'):
        resumed = dataclasses.replace(
            run, resume=True, data=folder / "preferences.jsonl", eval_data=None, microbatches=1
        )
        recipes.preference(resumed, say=said.append)


@pytest.mark.parametrize(("loss", "data"), [("dpo", "preferences"), ("kto", "judged")])
def test_preferences_move_the_policy_and_begin_at_the_reference(folder, loss, data):
    run = settings(folder, data, loss, dtype="bfloat16" if loss == "kto" else "float32")
    recipes.preference(run, loss=loss, say=lambda text: None)
    row = RunLog(run.out / "log.jsonl").rows()[0]
    assert row["loss"] == pytest.approx(np.log(2) if loss == "dpo" else 0.5, abs=1e-5)
    before, after = models.load(folder / "model"), loaded_again(folder, loss)
    assert any((new != old).any() for new, old in zip(leaves(after.params), leaves(before.params), strict=True))
    if loss == "dpo":
        for other, knobs, said in (("ipo", {}, 'loss was "dpo"'), ("dpo", {"beta": 0.3}, "knobs was")):
            with pytest.raises(ValueError, match=said):
                recipes.preference(
                    dataclasses.replace(run, resume=True), loss=other, knobs=knobs, say=lambda text: None
                )


def test_a_run_is_its_settings_and_what_its_data_hold(folder, tmp_path):
    data = tmp_path / "sft.jsonl"
    data.write_text((folder / "sft.jsonl").read_text())
    run = dataclasses.replace(settings(folder, "sft", "identity"), data=data)
    before = run.identity("reward", centering=0.0)
    assert before == dataclasses.replace(run, log_every=2, keep=5).identity("reward", centering=0.0)
    assert before != run.identity("reward", centering=0.1)
    data.write_text(data.read_text().replace("Say 0", "Ask 0"))
    after = run.identity("reward", centering=0.0)
    assert [name for name in before if before[name] != after[name]] == ["data_sha256"]
    json.dumps(before)


def test_the_keys_of_a_run_are_all_different(folder):
    keys = keys_of(settings(folder, "sft", "keys"))
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 3


@pytest.mark.parametrize(("batch_size", "microbatches"), [(4, 2), (5, 1), (16, 1)])
def test_the_held_out_loss_is_of_every_line(folder, batch_size, microbatches):
    """Though the batch does not divide them, or is larger than the file."""
    file = folder / "seven.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES["sft"][:7]))
    run = settings(folder, "sft", "held", eval_data=file, batch_size=batch_size, microbatches=microbatches)
    setup, sizes = prepare(run, lambda text: None), []

    def loss(params, batch, frozen, key):
        sizes.append(batch.tokens.shape[0])
        return Loss(batch.completion_mask.sum() / batch.tokens.shape[0], batch.tokens.shape[0])

    found = held_out(run, setup, loss, "demonstrations", Trained({}, {}, None, None))({})
    counts = [len(setup.encoder(line["prompt"], [line["answer"]]).answers[0]) for line in LINES["sft"][:7]]
    assert found == pytest.approx(np.mean(counts)) and max(sizes) <= batch_size // microbatches


def test_a_sample_fits_a_small_context(monkeypatch):
    taken = []
    monkeypatch.setattr(recipe_measures, "sampled", lambda setup, asked, sampler: taken.append((asked, sampler)))
    for context in (8, 48, 64):
        setup = SimpleNamespace(lm=SimpleNamespace(max_length=context), eos=(0,))
        recipe_measures.continued(setup, SimpleNamespace(rows=lambda place: SimpleNamespace(prompt=[*range(60)])))
        asked, sampler = taken.pop()
        assert asked.tokens.shape[1] + sampler.max_new_tokens == context and asked.tokens[0, -1] == 59


def test_what_a_recipe_cannot_do_is_said_before_anything_is_written(folder):
    for changes, said in [
        ({"model": "tiny-t5"}, "tiny-t5 is a T5, which writes from a source"),
        ({"out": folder / "model"}, "holds the model to start from"),
    ]:
        run = dataclasses.replace(settings(folder, "sft", "nowhere"), **changes)
        with pytest.raises(ValueError, match=said):
            recipes.sft(run)
        assert not (run.out / "checkpoints").exists()
    said = []
    setup = prepare(settings(folder, "sft", "nowhere", resume=True), said.append)
    assert "holds no checkpoint to resume from: the run begins anew" in said[0]
    with pytest.raises(ValueError, match=r"sft\.jsonl: batch_size must be from 1 to the 8 records, but is 9"):
        batches_of(settings(folder, "sft", "nowhere"), setup, folder / "sft.jsonl", "demonstrations", batch_size=9)
    batches_of(settings(folder, "sft", "nowhere"), setup, folder / "sft.jsonl", "demonstrations", batch_size=3)
    assert "2 records, which chance chooses, are left out of each epoch" in said[-1]
    for changes, match in [
        ({"steps": -1}, "steps must be at least 1, but is -1"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"save_every": 0}, "save_every must be at least 1"),
        ({"microbatches": 0}, "microbatches must be at least 1"),
        ({"microbatches": 3}, "3 microbatches must divide batch_size, 4"),
        ({"warmup": 2.0}, "warmup must lie in"),
        ({"learning_rate": float("nan")}, "learning_rate must lie in"),
    ]:
        with pytest.raises(ValueError, match=match):
            settings(folder, "sft", "nowhere", **changes)
    with pytest.raises(ValueError, match="kto compares with all answers of a batch"):
        recipes.preference(settings(folder, "judged", "nowhere", microbatches=2), loss="kto")
    online = settings(folder, "prompts", "nowhere")
    for knobs, match in [
        ({"method": "x"}, "method must be one of reinforce, rloo"),
        ({"method": dataclasses.replace(METHODS["rloo"], gamma=0.1)}, "gamma, .* is 0.1, and text is None: give both"),
        ({"text": folder / "sft.jsonl"}, "gamma, .* is 0.0, and text is .*: give both"),
        (
            {"method": dataclasses.replace(METHODS["rloo"], minibatches=3)},
            "3 minibatches of 1 microbatches must divide",
        ),
    ]:
        with pytest.raises(ValueError, match=match):
            recipes.policy_gradient(online, reward_function="math:sqrt", **knobs)


@pytest.mark.slow
def test_adapters_are_saved_beside_the_merged_model(folder):
    run = settings(folder, "preferences", "lora", lora_rank=2, checkpoint_blocks=True)
    recipes.preference(run, loss="ipo", say=lambda text: None)
    merged, base = loaded_again(folder, "lora"), models.load(folder / "model")
    changed = [not np.array_equal(*pair) for pair in zip(leaves(merged.params), leaves(base.params), strict=True)]
    assert sum(changed) == 1, "the attention's kernel alone"
    assert (run.out / "adapter" / "adapter_config.json").is_file()


@pytest.mark.slow
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
        method=dataclasses.replace(METHODS["grpo"], group_size=2, gamma=0.1),
        text=folder / "sft.jsonl",
        sampler=few,
        reward_function=f"{folder / 'reward.py'}:vowels",
        say=lambda text: None,
    )
    for out in ("ppo", "grpo"):
        loaded_again(folder, out)
        first = RunLog(folder / out / "log.jsonl").rows()[0]
        assert abs(first["kl"]) < 1e-5 and {"reward", "entropy", "clip_fraction", "kl_k1", "kl_k3"} <= set(first)
        assert first["answer_tokens"] == pytest.approx(4 * first["length"]) and first["tokens_per_second"] > 0
    assert first["text_loss"] > 0, "the one with gamma"


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
    for error, code, said in [
        (RuntimeError("step 3 failed: the reward function raised KeyError"), 2, "step 3 failed"),
        (KeyboardInterrupt("stopped after step 2 of 6; it can be resumed."), 130, "stopped after step 2"),
    ]:

        def fails(*args, error=error, **knobs):
            raise error

        monkeypatch.setattr(recipes, "sft", fails)
        with pytest.raises(SystemExit) as stop:
            call("sft", "--data", folder / "sft.jsonl", "--out", folder / "wrong", *shared)
        assert stop.value.code == code and said in capsys.readouterr().err


def test_the_command_lines_knobs_reach_the_method(monkeypatch):
    import tyro

    from jaxrl_llm.cli.train import Grpo, Ppo

    taken = {}
    monkeypatch.setattr(recipes, "policy_gradient", lambda run, **knobs: taken.update(knobs))
    words = (
        "--data a --out b --lambda 0.5 --discount 0.9 --value-clip None --value-coefficient 1 --no-whiten --gamma 0.1"
    )
    tyro.cli(Ppo, args=f"{words} --text c --clip-high 0.3 --dual-clip 3 --importance-cap 4".split()).run()
    expected = dataclasses.replace(
        METHODS["ppo"], lambda_=0.5, discount=0.9, value_clip=None, value_coefficient=1.0, whiten=False, gamma=0.1,
        clip_high=0.3, dual_clip=3.0, importance_cap=4.0,
    )  # fmt: skip
    assert taken["method"] == expected and str(taken["text"]) == "c"
    for name in ("gspo", "dapo", "cispo"):  # whose clips are their own
        tyro.cli(Grpo, args=f"--data a --out b --method {name}".split()).run()
        assert taken["method"] == METHODS[name] and taken["text"] is None


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
