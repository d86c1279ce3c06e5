"""The experiment on attention: its measures on heads whose answers are known, and what its results promise."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import ledger
from experiments.parts import attention_corpus as corpora
from jaxrl_llm.analysis import alignment
from jaxrl_llm.data import number_names

RESULTS = Path(__file__).resolve().parents[2] / "results" / "attention_maps.json"
NUMBERS = np.asarray([7, 81, 100, 345_678, 841_592])


def place_of_source(pair, target):
    """The source word that the gold has for a target word; of "und" the ten."""
    return min(source for source, to in pair.possible if to == target)


@pytest.fixture(scope="module")
def corpus():
    """Two layers of one cross-attention head: the gold alignment, and one that keeps the order."""
    pairs = [number_names.pair(number) for number in NUMBERS]
    sizes = np.asarray([[len(pair.source), len(pair.target)] for pair in pairs])
    sources, targets = sizes.max(axis=0) + 1
    cross = np.zeros((2, len(pairs), 1, targets, sources))
    for index, pair in enumerate(pairs):
        for target in range(len(pair.target)):
            cross[0, index, 0, target, place_of_source(pair, target)] = 1
            cross[1, index, 0, target, min(target, len(pair.source) - 1)] = 1
        cross[:, index, 0, len(pair.target), len(pair.source)] = 1  # </s> looks at </s>
    masks = [np.arange(size)[None] < sizes[:, [side]] for side, size in enumerate((sources, targets))]
    with_end = [np.arange(size)[None] <= sizes[:, [side]] for side, size in enumerate((sources, targets))]
    allowed = {"cross": with_end[1][:, :, None] & with_end[0][:, None, :]}
    return corpora.Corpus(pairs, sizes[:, 0], {"cross": cross}, allowed, *masks, masks[1])


def test_heads_are_counted_against_the_gold(corpus):
    rates = alignment.alignment_error_rate(corpora.counts(corpus))
    order = alignment.alignment_error_rate(corpora.in_order(corpus))
    assert rates[0, 0] == 0 and rates[1, 0] == order > 0.3
    assert alignment.alignment_error_rate(corpora.counts(corpus, late=True))[0, 0] > 0.5


def test_inversions_are_found_where_they_are(corpus):
    assert corpora.inversions(corpus, 0, 0) == {81: [True], 345_678: [True] * 2, 841_592: [True] * 2}
    assert not any(any(crossed) for crossed in corpora.inversions(corpus, 1, 0).values())


def test_rows_are_sorted_by_kind_of_word(corpus):
    found = {name: len(each) for name, each in corpora.aligned(corpus, 0, 0).items()}
    assert found == {"units, tens": 1 + 2 + 1 + 2 * 6, "und": 5, "hundert": 5, "tausend": 2}
    assert all(each.all() for each in corpora.aligned(corpus, 0, 0).values())
    assert not corpora.aligned(corpus, 1, 0)["tausend"].any()


def test_a_part_is_what_it_is_of_the_whole(corpus):
    part = corpora.counts(corpus.part(1, 3))
    assert (part == corpora.counts(corpus)[1:3]).all() and len(part) == 2


def test_an_equal_number_of_each_length_is_drawn():
    numbers = corpora.stratified(number_names.split().held_out, per_length=20, seed=0)
    lengths = np.bincount(number_names.english_lengths(numbers))
    assert lengths[3:].tolist() == [20] * 7 and len(set(numbers)) == len(numbers)
    assert set(numbers) <= set(number_names.split().held_out)


# The committed results ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def entry():
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def number(entry, name):
    (found,) = [each for each in entry["numbers"] if each["name"] == name]
    return found


@pytest.mark.parametrize(
    ("name", "loosest"),
    [
        ("largest error of a row's sum", 1e-5),
        ("largest weight on padding or on what is not yet written", 0),
        ("largest weight in the row of padding", 0),
    ],
)
def test_rows_are_laws_and_padding_gets_nothing(entry, name, loosest):
    found = number(entry, name)
    assert found["tolerance"] <= loosest and ledger.holds(found)


def test_the_best_head_aligns_with_less_than_five_per_cent_error(entry):
    found = number(entry, "alignment error rate, best head")
    assert found["interval"][1] <= 0.05 and ledger.holds(found)
    assert entry["data"]["names"] >= 200


@pytest.mark.parametrize(
    ("name", "sign"),
    [
        ("entropy of encoder attention, last layer − first", -1),
        ("alignment error rate, mean of the last layer's heads − first", -1),
        ("entropy of encoder attention, long names − short", 1),
    ],
)
def test_layers_and_lengths_differ_by_more_than_their_error(entry, name, sign):
    found = number(entry, name)
    error = found["interval"][0 if sign > 0 else 1]
    assert sign * found["value"] > sign * error > 0


def test_what_is_read_a_row_late_or_in_order_is_worse(entry):
    best = number(entry, "alignment error rate, best head")["value"]
    for other in ("alignment error rate of a head that keeps the order", "alignment error rate, mean of all heads"):
        assert number(entry, other)["value"] > 5 * best
    assert number(entry, "alignment error rate, best head, words read one row late")["value"] > 0.5


def test_the_maps_that_are_drawn_show_the_inversion(entry):
    """Target on rows, source on columns: the transposed map of the long number would not even fit."""
    layer, head = entry["data"]["best"]
    for example in entry["data"]["examples"]:
        weights = np.asarray(example["cross"][layer][head])
        assert weights.shape == (len(example["target"]), len(example["source"]))
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=2e-3)
        gold = {target: source for source, target in example["sure"]}
        for und in (place for place, word in enumerate(example["target"]) if word == "und"):
            assert gold[und - 1] == gold[und + 1] + 1, "x-und-y translates y-x"
            assert weights[und - 1].argmax() == gold[und - 1] and weights[und + 1].argmax() == gold[und + 1]
    assert example["source_text"] == number_names.pair(example["number"]).source_text
