"""Runs of preferences, from files and from Python: sums of losses, margins, references, distillation."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

import jaxrl_llm as jl
from jaxrl_llm import models, train
from jaxrl_llm.models import GPT2, GPT2Config
from jaxrl_llm.scoring import completion_log_probs
from jaxrl_llm.training import recipes
from jaxrl_llm.training.loop import RunLog

PAIRS = [{"prompt": f"Say {i}:", "chosen": " yes", "rejected": " no, " * (i % 2 + 1)} for i in range(4)]
OPTIONS = {"steps": 2, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, "save_every": 1}
QUIET = OPTIONS | {"verbose": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file of pairs, and a small model that has tiny-gpt2's tokens."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in PAIRS))
    loaded = models.load("tiny-gpt2")
    lm = GPT2(GPT2Config(vocab_size=4096, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    wider, shorter = (dataclasses.replace(lm.config, **each) for each in ({"n_embd": 24}, {"n_positions": 16}))
    for name, config, seed in (("model", lm.config, 0), ("other", wider, 1), ("short", shorter, 1)):
        each = GPT2(config)
        params = jax.jit(each.init)(jax.random.key(seed))
        models.save(folder / name, each, params, loaded.tokenizer, config={"eos_token_id": 0, "bos_token_id": 0})
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return jl.load(folder / "model")


@pytest.fixture
def call(folder, run):
    """`jaxrl-llm train dpo` on the pairs."""

    def call(out, *words):
        files = ["--data", folder / "pairs.jsonl", "--out", folder / out, "--model", folder / "model"]
        return run("train", "dpo", *files, "--steps", 1, "--batch-size", 4, *words)

    return call


def rows(folder):
    return RunLog(folder / "log.jsonl").rows()


def same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


# Losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_line_trains_and_takes_sums_of_losses_a_divergence_and_hyperparameters(call, folder):
    words = ["--loss", "f_dpo", "sft", "--loss-weights", 1, 0.1, "--beta", 0.3]
    words += ["--loss-kwargs", "divergence", "alpha", "alpha", 0.3, "--optimizer-kwargs", "b2", 0.95, "eps", 1e-6]
    status, out, _ = call("sum", *words)
    assert status == 0 and f"The model is in {folder / 'sum'}." in out
    assert models.load(folder / "sum").tokenizer is not None
    identity, row = json.loads((folder / "sum" / "run.json").read_text()), rows(folder / "sum")[-1]
    assert identity["loss"] == ["f_dpo", "sft"] and identity["loss_weights"] == [1.0, 0.1]
    assert identity["loss_kwargs"] == {"alpha": 0.3, "beta": 0.3, "divergence": "alpha"} and identity["steps"] == 1
    assert identity["optimizer_kwargs"] == {"b2": 0.95, "eps": 1e-6}
    nats = np.log(4096)  # of a token, nearly, before training; the first term is log 2 at the reference
    assert row["loss"] == pytest.approx(np.log(2) + 0.1 * nats, abs=0.05)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (
            {"loss": "f_dpo", "loss_kwargs": {"alpha": 0.3}},
            ValueError,
            'alpha must be given with the divergence "alpha"',
        ),
        ({"loss": ["dpo", "sft"], "loss_weights": (1.0,)}, ValueError, "a weight for each of 2 losses, but has 1"),
        ({"loss": ["dpo", 3]}, TypeError, "loss must be a name or a function, or several"),
        ({"loss": ["dpo", "sft"], "loss_weights": (1.0, -1.0)}, ValueError, "loss_weights must be a finite number"),
        ({"loss": ["dpo", "aot"], "microbatches": 2}, ValueError, r"microbatches must be 1 for dpo\+aot"),
        ({"loss": ["dpo", "kto"]}, ValueError, "kto, which has no pairs, cannot be a term of a sum"),
    ],
)
def test_losses_that_do_not_fit_are_refused(model, options, error, said):
    with pytest.raises(error, match=said):
        train.dpo(model, PAIRS, **QUIET | options)


@pytest.mark.slow
def test_a_margin_of_each_row_enters_dpo_and_the_reward_models_loss_and_is_not_dropped_in_silence(
    model, tmp_path, monkeypatch, capsys
):
    margins = [line | {"margin": 0.5 * place, "score": place} for place, line in enumerate(PAIRS)]
    expected = np.mean([np.log1p(np.exp(0.5 * place)) for place in range(4)])
    options = QUIET | {"steps": 1}
    train.dpo(model, margins, out=tmp_path / "dpo", **options)
    assert rows(tmp_path / "dpo")[0]["loss"] == pytest.approx(expected, rel=1e-4)
    train.reward(model, [line | {"margin": 100} for line in PAIRS], out=tmp_path / "reward", **options)
    first = rows(tmp_path / "reward")[0]  # −log σ(r_w − r_l − 100) is 100 − (r_w − r_l)
    assert first["loss"] == pytest.approx(100 - first["margin"], rel=1e-6)
    with pytest.raises(ValueError, match="margin must be in every row or in none, but is in 3"):
        train.dpo(model, [*margins[:3], PAIRS[3]], **options)
    with pytest.raises(ValueError, match="row 3: margin must be a finite number, but is '1'"):
        train.reward(model, [*margins[:3], PAIRS[3] | {"margin": "1"}], **options)
    ranked = [{"prompt": "Say", "answers": [" a", " b", " c"], "margin": 1.0}] * 4
    with pytest.raises(ValueError, match="margin must be that of a pair, chosen and rejected, but there are answers"):
        train.reward(model, ranked, **options)
    monkeypatch.setattr(recipes, "make_step", lambda *_, **__: 1 / 0)  # it is said before
    with pytest.raises(ZeroDivisionError):
        train.dpo(model, margins, loss="ipo", **options | {"verbose": True})
    assert "margin is in 4 rows, but nothing reads it" in capsys.readouterr().out


@pytest.mark.slow
def test_margins_that_are_no_numbers_and_held_out_data_of_another_kind_are_refused(model):
    wrong = [line | {"margin": "0,5"} for line in PAIRS]
    with pytest.raises(ValueError, match="margin must be a finite number, but is not in rows 0, 1, 2, 3"):
        train.dpo(model, wrong, **QUIET)
    with pytest.raises(ValueError, match="margin must be a finite number, but is not in row 1"):
        train.dpo(
            model, [line | {"margin": [1.0, np.nan, 2.0, 0.0][place]} for place, line in enumerate(PAIRS)], **QUIET
        )
    right = [line | {"margin": 2.0} for line in PAIRS]
    for data, held, said in ((right, PAIRS, "margin, but has none"), (PAIRS, right, "none, but has margin")):
        with pytest.raises(
            ValueError, match=f"eval_data must have the numbers that the loss takes of the data, {said}"
        ):
            train.dpo(model, data, eval_data=held, **QUIET)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": ["kto"], "precompute_reference": True}, "precompute_reference must be False for kto"),
        ({"loss": ["dpo", "sft"], "loss_weights": (0, 0)}, "loss_weights must not all be 0"),
        ({"lora_alpha": 8}, "lora_alpha is of adapters, which lora_rank asks for, but lora_rank is 0"),
        ({"lora_from": "x", "lora_alpha": 8}, "lora_alpha, .* must be left out with lora_from"),
    ],
)
def test_options_without_effect_are_refused(model, options, said):
    with pytest.raises(ValueError, match=said):
        train.dpo(model, PAIRS, **QUIET | options)


@pytest.mark.slow
def test_an_adapter_is_not_added_to_the_model_that_has_it(model, tmp_path):
    out, options = tmp_path / "run", QUIET | {"steps": 1}
    train.dpo(model, PAIRS, out=out, lora_rank=1, **options)
    for merged in (out, out / "adapter"):
        with pytest.raises(ValueError, match="is the model, with the adapter merged: give its base model"):
            train.dpo(str(merged), PAIRS, lora_from=out / "adapter", **options)


@pytest.mark.slow
def test_the_shift_of_bco_is_kept_by_a_run_and_by_one_that_is_resumed(model, tmp_path):
    options = QUIET | {"steps": 4, "loss": "bco", "beta": 0.5, "warmup": 0.0, "eval_data": PAIRS, "keep": 4}
    whole = train.dpo(model, PAIRS, out=tmp_path / "whole", **options)
    found = rows(tmp_path / "whole")
    rewards = [0.5 * (row["kl_chosen"] + row["kl_rejected"]) / 2 for row in found]
    expected = [0.0, *[np.mean(rewards[:before]) for before in range(1, 4)]]
    np.testing.assert_allclose([row["reward_shift"] for row in found], expected, atol=1e-6)
    assert max(map(abs, expected)) > 1e-3
    for step in (3, 4):  # as if the run had been killed after step 2
        shutil.rmtree(tmp_path / "whole" / "checkpoints" / str(step))
    resumed = train.dpo(model, PAIRS, out=tmp_path / "whole", resume=True, **options)
    same(resumed.params, whole.params)
    assert [row["reward_shift"] for row in rows(tmp_path / "whole")] == [row["reward_shift"] for row in found]


# The reference --------------------------------------------------------------------------------------------------------


def log_probs_of(lm, side):
    prompts, completions = [row["prompt"] for row in PAIRS], [row[side] for row in PAIRS]
    encode = lambda texts: [lm.tokenizer(each, add_special_tokens=False)["input_ids"] for each in texts]  # noqa: E731
    rows = completion_log_probs(lm.model, lm.params, encode(prompts), [[*each, 0] for each in encode(completions)])
    return np.asarray([row.sum() for row in rows])


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"reference": "short"}, ValueError, "a context of at least max_length, 64 tokens, but has 16"),
        ({"reference": 3}, TypeError, "reference must be a model, its name or its path, but is a int"),
        (
            {"reference": "other", "loss": "simpo"},
            ValueError,
            "reference must be None for simpo, which has no reference",
        ),
        ({"precompute_reference": True, "loss": "orpo"}, ValueError, "precompute_reference must be False for orpo"),
        ({"precompute_reference": True, "loss": "kto"}, ValueError, "precompute_reference must be False for kto"),
    ],
)
def test_references_that_do_not_fit_are_refused(model, folder, options, error, said):
    if isinstance(options.get("reference"), str):
        options = options | {"reference": folder / options["reference"]}
    with pytest.raises(error, match=said):
        train.dpo(model, PAIRS, **QUIET | options)


def test_a_reference_of_another_tokenizer_is_refused(model, folder):
    """Of the same size, but with other words."""
    words = models.load("tiny-gpt2-verses").tokenizer
    other = dataclasses.replace(models.load(folder / "model"), tokenizer=words)
    with pytest.raises(ValueError, match="the reference must have the tokenizer of the model, but has another one"):
        train.dpo(model, PAIRS, reference=other, **QUIET)
    other = dataclasses.replace(other, tokenizer=None)
    with pytest.raises(ValueError, match="the reference must have the tokenizer of the model, but has none"):
        train.dpo(model, PAIRS, reference=other, **QUIET)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "ld_dpo"])
def test_another_reference_is_used_and_once_ahead_gives_the_same_losses_and_is_read_again_on_resuming(
    model, folder, tmp_path, monkeypatch, loss
):
    """Of another size, by its path and loaded."""
    options = QUIET | {"steps": 3, "keep": 3, "eval_data": PAIRS[:3], "loss": loss, "beta": 0.5}
    other = jl.load(folder / "other")
    plain = train.dpo(model, PAIRS, out=tmp_path / "plain", reference=folder / "other", **options)
    options |= {"reference": other, "precompute_reference": True}
    ahead = train.dpo(model, PAIRS, out=tmp_path / "ahead", **options)
    for one, two in zip(rows(tmp_path / "plain"), rows(tmp_path / "ahead"), strict=True):
        for name in ("loss", "held_out_loss", "kl_chosen", "margin"):
            assert two[name] == pytest.approx(one[name], rel=1e-6, abs=1e-6)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=1e-6), plain.params, ahead.params)
    if loss == "dpo":
        ratios = [log_probs_of(model, side) - log_probs_of(other, side) for side in ("chosen", "rejected")]
        expected, first = np.log1p(np.exp(-0.5 * (ratios[0] - ratios[1]))).mean(), rows(tmp_path / "plain")[0]
        assert first["loss"] == pytest.approx(expected, rel=1e-4) and abs(expected - np.log(2)) > 1e-3
        assert first["kl_chosen"] == pytest.approx(ratios[0].mean(), abs=1e-4)
    shutil.rmtree(tmp_path / "ahead" / "checkpoints" / "3")
    monkeypatch.setattr(recipes, "with_reference", lambda *_: pytest.fail("it is in the folder"))
    resumed = train.dpo(model, PAIRS, out=tmp_path / "ahead", resume=True, **options)
    same(resumed.params, ahead.params)


def test_the_weights_of_a_reference_once_ahead_are_freed(model, monkeypatch):
    kept, reference_of = [], recipes.reference_of
    monkeypatch.setattr(recipes, "reference_of", lambda *given: kept.append(reference_of(*given)) or kept[-1])
    frozen = []
    monkeypatch.setattr(recipes, "make_step", lambda *_, **__: lambda state, batch, held: frozen.append(held) or 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        train.dpo(model, PAIRS, precompute_reference=True, **QUIET)
    assert kept[0].params is None and frozen[0].ref is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ref_model", "did you mean 'reference'"),
        ("reference_free", "losses without a reference are simpo"),
        ("margin", "the margin of a pair is the entry 'margin' of its row"),
        ("precompute_ref_log_probs", "did you mean 'precompute_reference'"),
        ("rpo_alpha", "the sum loss=['dpo', 'sft']"),
        ("ld_alpha", "did you mean 'loss'"),
    ],
)
def test_a_name_of_trl_is_answered_by_ours(name, said):
    with pytest.raises(TypeError, match=re.escape(said)):
        train.dpo("nowhere", [], **{name: 1})


# Distillation ---------------------------------------------------------------------------------------------------------

GIVEN = [{"prompt": f"Say {i}:", "completion": " it is"} for i in range(4)]


@pytest.mark.slow
def test_a_student_learns_from_a_teacher_on_given_and_on_its_own_completions(model, folder, tmp_path, capsys):
    options = OPTIONS | {"steps": 4, "save_every": 2, "max_new_tokens": 3, "teacher": folder / "other", "warmup": 0.0}
    out, eval_data = tmp_path / "student", {"eval_data": GIVEN}
    student = train.distill(model, iter(GIVEN), out=out, **options, **eval_data)
    found = rows(out)
    assert [row["on_policy"] for row in found] == [1.0, 0.0, 0.0, 1.0]
    assert found[3]["held_out_loss"] < found[1]["held_out_loss"]
    assert found[1]["length"] == 3 and found[0]["tokens_per_second"] > 0
    assert models.load(out).tokenizer is not None and "prompts and 0 completions truncated" in capsys.readouterr().out
    shutil.rmtree(out / "checkpoints" / "4")
    resumed = train.distill(model, GIVEN, out=out, resume=True, **options | {"verbose": False}, **eval_data)
    same(resumed.params, student.params)


@pytest.mark.slow
def test_the_command_line_distils_on_prompts_alone(folder, run):
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in GIVEN))
    words = ["--data", folder / "prompts.jsonl", "--out", folder / "distilled", "--model", folder / "model"]
    words += ["--steps", 1, "--batch-size", 4, "--max-new-tokens", 4, "--on-policy", 1, "--divergence", "reverse_kl"]
    status, _, err = run("train", "distill", *words)
    assert status == 2 and "teacher must be a model, its name or its path, but is None" in err
    status, *_ = run("train", "distill", *words, "--teacher", folder / "other")
    assert status == 0 and rows(folder / "distilled")[0]["on_policy"] == 1.0
    identity = json.loads((folder / "distilled" / "run.json").read_text())
    assert identity["kind"] == "distill" and len(identity["teacher_sha256"]) == 64


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"divergence": "forward_kl", "mixture": 0.3},
            "mixture must be None for forward_kl, which has none, but is 0.3",
        ),
        ({"mixture": 1.0}, "mixture must be below 1, but is 1.0"),
        ({"teacher": "short"}, "the teacher must have a context of at least max_length, 64 tokens, but has 16"),
    ],
)
def test_settings_of_distillation_that_do_not_fit_are_refused(model, folder, options, said):
    with pytest.raises(ValueError, match=said):
        train.distill(model, GIVEN, **QUIET | options | {"teacher": folder / options.get("teacher", "other")})
