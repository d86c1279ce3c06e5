"""The numbers that the committed results on beam search and decoding strategies promise, and how tight they are."""

import itertools
import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "results"
STRATEGIES = sorted(path.stem for path in RESULTS.glob("decoding_strategies*.json"))

# name of the number in beam_search.json, what it must be, and the loosest tolerance it may be given
EXPECTED = [
    ("tokens of beam search with k = 1 that are not greedy's", 0, 0),
    ("tokens of 3 groups of one beam with factor 0 that are not greedy's", 0, 0),
    *[(f"{n}-grams repeated where {n}-grams are blocked", 0, 0) for n in (1, 2, 3, 4)],
    ("hypotheses of a prompt that are the same, without groups", 0, 0),
    ("largest error of a hypothesis's Σ log p", 0, 1e-3),
]

# differences that must be larger than their own error
GAINS = [
    ("beam_search", "log-probability of the best hypothesis, k = 3 − greedy"),
    ("beam_search", "log-probability of the best hypothesis, k = 16 − greedy"),
    ("beam_search", "log-probability of the best hypothesis, k = 3 − with 2-grams blocked"),
    ("beam_search", "distinct 2-grams, 3 groups, factor 5 − factor 0"),
    ("decoding_strategies", "seq-rep-4, greedy − human"),
    ("decoding_strategies", "seq-rep-4, beam, k = 4 − human"),
    ("decoding_strategies", "seq-rep-4, greedy − pure sampling"),
    ("decoding_strategies", "surprise, human − greedy"),
    ("decoding_strategies", "surprise, pure sampling − greedy"),
    ("decoding_strategies", "log-probability, best of 4 − pure sampling"),
]


def entry(results: str) -> dict:
    return json.loads((RESULTS / f"{results}.json").read_text(encoding="utf-8"))


def number(results: str, name: str) -> dict:
    """The one number of this name."""
    (found,) = [each for each in entry(results)["numbers"] if each["name"] == name]
    return found


@pytest.mark.parametrize(("name", "expected", "loosest"), EXPECTED)
def test_searches_are_exact(name, expected, loosest):
    found = number("beam_search", name)
    assert found["tolerance"] <= loosest
    assert found["expected"] == expected
    assert found["value"] == pytest.approx(expected, abs=loosest)


@pytest.mark.parametrize(("results", "name"), GAINS)
def test_differences_are_larger_than_their_error(results, name):
    found = number(results, name)
    assert found["value"] > found["interval"][0] > 0


def test_a_wider_beam_is_not_claimed_to_be_always_better():
    share = number("beam_search", "prompts and steps of k at which the wider beam is worse")["value"]
    sweep = entry("beam_search")["data"]["sweeps"]["width"]
    prompts = list(zip(*(each["log_probs"] for each in sweep), strict=True))
    steps = [after < before - 1e-3 for row in prompts for before, after in itertools.pairwise(row)]
    assert share == pytest.approx(sum(steps) / len(steps), abs=1e-9)
    assert 0 < share < 0.5


def test_the_exercise_shows_its_three_searches():
    data = entry("beam_search")["data"]
    assert data["prompts"][0] == "I have a dream"
    assert (data["beams"], data["new_tokens"]) == (3, 25)
    assert [len(each["texts"]) for each in data["examples"]] == [3, 3, 3]
    assert [("blocked" in each["title"], "0.1" in each["title"]) for each in data["examples"]] == [
        (False, False),
        (True, False),
        (True, True),
    ]


@pytest.mark.parametrize("results", STRATEGIES)
def test_every_strategy_has_every_metric_with_an_interval(results):
    rows = entry(results)["data"]["rows"]
    assert rows[0]["name"] == "human"
    assert len({row["name"] for row in rows}) == len(rows) == 18
    for row in rows:
        for metric in ("perplexity", "loops", "seq_rep_4", "zipf", "distinct_1", "distinct_2", "self_bleu"):
            assert row[metric]["low"] <= row[metric]["estimate"] <= row[metric]["high"], (row["name"], metric)


def test_sampling_from_the_model_itself_is_nearest_to_human_perplexity():
    data = entry("decoding_strategies")["data"]
    assert data["nearest"]["perplexity"] in ("pure sampling", "MBR of 8 by chrF")  # the latter chooses among samples
    assert set(data["perplexity_like_human"]) <= {"pure sampling", "MBR of 8 by chrF"}
    assert number("decoding_strategies", "strategies whose texts have another length than the human ones")["value"] == 0


@pytest.mark.parametrize("results", ["beam_search", *STRATEGIES])
def test_claim_holds(results):
    assert entry(results)["holds"]
