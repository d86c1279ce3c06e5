"""Runs of preferences, from files and from Python: sums of losses, margins, references, distillation."""

import json
import shutil

import jax
import numpy as np
import pytest

import jaxrl_llm as jl
from jaxrl_llm import models, train
from jaxrl_llm.models import GPT2, GPT2Config
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
    for name, seed in (("model", 0), ("other", 1)):
        params = lm.init(jax.random.key(seed))
        models.save(folder / name, lm, params, loaded.tokenizer, config={"eos_token_id": 0, "bos_token_id": 0})
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


def test_the_command_line_takes_sums_of_losses_and_a_divergence(call, folder):
    words = ["--loss", "f_dpo", "sft", "--loss-weights", 1, 0.1, "--beta", 0.3]
    status, *_ = call("sum", *words, "--loss-kwargs", "divergence", "alpha", "alpha", 0.3)
    assert status == 0
    identity, row = json.loads((folder / "sum" / "run.json").read_text()), rows(folder / "sum")[-1]
    assert identity["loss"] == ["f_dpo", "sft"] and identity["loss_weights"] == [1.0, 0.1]
    assert identity["loss_kwargs"] == {"alpha": 0.3, "beta": 0.3, "divergence": "alpha"}
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


def test_a_margin_of_each_row_enters_dpo_and_the_reward_models_loss_and_is_not_dropped_in_silence(
    model, tmp_path, capsys
):
    margins = [line | {"margin": 0.5 * place, "score": place} for place, line in enumerate(PAIRS)]
    expected = np.mean([np.log1p(np.exp(0.5 * place)) for place in range(4)])
    options = QUIET | {"steps": 1}
    train.dpo(model, margins, out=tmp_path / "dpo", **options)
    assert rows(tmp_path / "dpo")[0]["loss"] == pytest.approx(expected, rel=1e-4)
    train.reward(model, [line | {"margin": 100} for line in PAIRS], out=tmp_path / "reward", **options)
    first = rows(tmp_path / "reward")[0]  # −log σ(r_w − r_l − 100) is 100 − (r_w − r_l)
    assert first["loss"] == pytest.approx(100 - first["margin"], rel=1e-6)
    train.dpo(model, margins, loss="ipo", **options | {"verbose": True})
    assert "the loss takes no margin, so that of each row is not used" in capsys.readouterr().out
    with pytest.raises(ValueError, match="margin must be in every row or in none, but is in some"):
        train.dpo(model, [*margins[:3], PAIRS[3]], **options)
    with pytest.raises(ValueError, match="row 3: margin must be a finite number, but is '1'"):
        train.reward(model, [*margins[:3], PAIRS[3] | {"margin": "1"}], **options)
    ranked = [{"prompt": "Say", "answers": [" a", " b", " c"], "margin": 1.0}] * 4
    with pytest.raises(ValueError, match="margin must be that of a pair, but there are 3 completions"):
        train.reward(model, ranked, **options)


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
