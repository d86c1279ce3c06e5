"""Reward models: margins of the data enter the loss."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import models, train
from jaxrl_llm.data import records
from jaxrl_llm.models import ScalarHead
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config
from jaxrl_llm.models.heads import LoadedReward
from jaxrl_llm.objectives.reward_model import k_choose_2_loss, pairwise_loss
from jaxrl_llm.scoring import Sequences
from jaxrl_llm.training.batches import KINDS, Rows
from jaxrl_llm.training.encoding import Encoder
from jaxrl_llm.training.reward_model import reward_loss, scored_lines
from tests.conftest import TINY, random_params
from tests.models.test_heads import tokenizer_with
from tests.training.chats import TOOLS, byte_level

KEY = jax.random.key(0)
HEAD = ScalarHead(TINY["tabular"])
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
RANKED = {"prompt": "a", "answers": ["b", "c", "d"], "ranks": [0, 2, 1]}


def test_margins_are_those_of_the_line_or_the_scores_of_its_completions():
    assert records.ranked(PAIR).margins == records.ranked(RANKED).margins == ()
    assert records.ranked(PAIR | {"margin": 2}).margins == (2, 0)
    assert records.rated(PAIR | {"score_chosen": 8.5, "score_rejected": 3}).margins == (8.5, 3)
    assert records.rated(RANKED | {"scores": [9, 1, 4]}).margins == (9, 1, 4)
    assert records.ranked(PAIR | {"score_chosen": 8.5, "score_rejected": 3}).margins == (), "only as asked"


@pytest.mark.parametrize(
    ("parse", "line", "said"),
    [
        ("ranked", PAIR | {"margin": "2"}, "margin must be a finite number, but is '2'"),
        ("ranked", PAIR | {"margin": float("nan")}, "margin must be a finite number, but is nan"),
        ("ranked", RANKED | {"margin": 2}, "margin must be that of a pair"),
        ("rated", PAIR | {"score_chosen": 1}, "score_rejected must be a finite number, but is missing"),
        ("rated", RANKED | {"scores": [1, 2]}, r"a number for each of 3 answers, but are \[1, 2\]"),
        ("rated", RANKED | {"scores": [1, 2, None]}, "scores must be a finite number, but is None"),
        ("rated", PAIR | {"margin": 1, "score_chosen": 1, "score_rejected": 0}, "has both"),
    ],
)
def test_margins_that_are_no_numbers_are_refused(parse, line, said):
    with pytest.raises(ValueError, match=said):
        getattr(records, parse)(line)


def test_the_loss_is_that_of_pairs_with_their_margins():
    """Of pairs `pairwise_loss` with its margin; of K completions the mean over their pairs; metrics are of scores."""
    params = HEAD.init(KEY, random_params(TINY["tabular"]))
    given = [
        ([[0, 1], [2, 0, 1]], [0, 1], (1.5, 0.0)),
        ([[1], [0, 2]], [0, 1], ()),
        ([[1, 1], [2, 2], [0]], [1, 2, 0], (4.0, 1.0, 9.0)),
    ]
    rows = [Rows([], tokens, ranks, margins=margins) for tokens, ranks, margins in given]
    batch = jax.tree.map(jnp.asarray, KINDS["ranked"].collate(rows, 4))
    values = jax.jit(HEAD.scores)(params, *(leaf.reshape(9, 4) for leaf in batch.completions[:2])).reshape(3, 3)
    found = reward_loss(HEAD, margin_scale=0.5)(params, batch, None, KEY)
    first = pairwise_loss(values[:2, 0], values[:2, 1], margin=jnp.asarray([0.75, 0]))
    third = np.mean(
        [
            pairwise_loss(values[2, better], values[2, worse], margin=margin)
            for better, worse, margin in [(2, 0, 2.5), (2, 1, 4.0), (0, 1, 1.5)]
        ]
    )
    np.testing.assert_allclose(found.value, (first.sum() + third) / 3, rtol=1e-6)
    plain = k_choose_2_loss(values, batch.ranks, batch.real).mean()
    np.testing.assert_allclose(
        reward_loss(HEAD)(params, batch._replace(margins=None), None, KEY).value, plain, rtol=1e-6
    )
    lead = [values[0, 0] - values[0, 1], values[1, 0] - values[1, 1], *(values[2, 2] - values[2, :2])]
    np.testing.assert_allclose(found.metrics["margin"], np.mean([*lead, values[2, 0] - values[2, 1]]), rtol=1e-5)
    assert isinstance(batch.completions, Sequences)


def test_the_option_decides_whether_scores_of_the_data_count(monkeypatch):
    taken = {}

    def fit(run, data, objective, trained, **_):
        taken["kind"] = objective.kind
        return trained.params

    monkeypatch.setattr(train.recipes, "fit", fit)
    for options, kind in (({}, "ranked"), ({"score_margin": 0.5}, "rated")):
        train.reward("tiny-gpt2", [PAIR], **options, verbose=False)
        assert taken["kind"] == kind


# Scores of data -------------------------------------------------------------------------------------------------------

LINES = [
    {"prompt": "the cat", "completion": " sat", "id": 7},
    {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "mat"}]},
    {"text": "the cat sat"},
    PAIR,
    {"prompt": "the", "answers": [" cat", " mat", " cat sat"]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reward model with a chat template."""
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = tokenizer_with("own", folder / "tokenizer")
    lm = GPT2(GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2))
    head = ScalarHead(lm)
    models.save_reward_model(folder, head, head.init(KEY, random_params(lm)), tokenizer)
    return folder


def test_the_command_line_scores_lines(folder, tmp_path, run):
    """As `score` does, with all entries of a line; a summary is written to standard error."""
    data, reward = tmp_path / "lines.jsonl", train.RewardModel.load(folder)
    data.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    status, out, err = run("score", folder, "--data", data, "--batch-size", 2)
    assert status == 0
    found = [json.loads(line) for line in out.splitlines()]
    one, chat, text = (reward.score(*each) for each in (("the cat", " sat"), (LINES[1]["messages"],), ("the cat sat",)))
    better, worse, *three = reward.score(["a"] * 2 + ["the"] * 3, ["b", "c", " cat", " mat", " cat sat"])
    close = functools.partial(pytest.approx, abs=1e-5)
    assert found[:3] == [
        LINES[0] | {"score": close(one)},
        LINES[1] | {"score": close(chat)},
        LINES[2] | {"score": close(text)},
    ]
    assert found[3:] == [
        PAIR | {"score_chosen": close(better), "score_rejected": close(worse)},
        LINES[4] | {"scores": close(three)},
    ]
    assert one == close(text)
    share = "100.0%" if better > worse else "0.0%"
    assert err.splitlines() == [
        f"6 completions, mean score {np.mean([one, chat, text, *three]):.4g}",
        f"1 pair, {share} in the right order",
    ]


def test_lines_are_scored_as_they_are_trained_on():
    """With the tools of a line, and Alpaca's instruction as a user's message."""
    tokenizer = byte_level(TOOLS)
    lm = GPT2(GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2))
    head = ScalarHead(lm)
    found = LoadedReward(head, head.init(KEY, random_params(lm)), tokenizer, {})
    sides, encoder = {"chosen": " a", "rejected": " b"}, Encoder(tokenizer, max_length=64)
    for line in ({"prompt": "Hi", "tools": [{"name": "a"}]} | sides, {"instruction": "Hi"} | sides):
        record = encoder.checked(records.ranked)(line)
        row = encoder(record.prompt, record.completions, template=record.template, whole=True)
        scores = found.score_tokens([[*row.prompt, *each] for each in row.completions])
        (scored,) = scored_lines(found, [line])
        assert [scored["score_chosen"], scored["score_rejected"]] == pytest.approx(scores, abs=1e-5)
        assert scores != pytest.approx(found.score(["Hi"] * 2, [" a", " b"]), abs=1e-3)


def test_lines_that_cannot_be_scored_are_named(folder, tmp_path, run):
    data = tmp_path / "lines.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in [LINES[0], {"prompt": "a", "completion": "cat" * 64}]))
    status, _, err = run("score", folder, "--data", data)
    assert status == 2 and "lines.jsonl, line 2: a text of" in err and "longer than the context, 64" in err
    status, _, err = run("score", "tiny-gpt2", "--data", data)
    assert status == 2 and "tiny-gpt2 is not a reward model" in err
