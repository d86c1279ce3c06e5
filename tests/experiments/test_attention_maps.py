"""The experiment on attention: its measures on heads whose answers are known, and its committed results."""

import dataclasses

import numpy as np
import pytest

from experiments import attention_maps, ledger
from jaxrl_llm.analysis import word_alignment
from jaxrl_llm.data import number_names
from tests.experiments import entry

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
    return attention_maps.Corpus(pairs, sizes[:, 0], {"cross": cross}, allowed, *masks, masks[1])


def test_heads_are_counted_against_the_gold(corpus):
    rates = word_alignment.alignment_error_rate(attention_maps.alignment_counts(corpus))
    order = word_alignment.alignment_error_rate(attention_maps.in_order(corpus))
    assert rates[0, 0] == 0 and rates[1, 0] == order > 0.3
    assert word_alignment.alignment_error_rate(attention_maps.alignment_counts(corpus, late=True))[0, 0] > 0.5


def test_inversions_are_found_where_they_are(corpus):
    assert attention_maps.inversions(corpus, 0, 0).tolist() == [[0, 0], [1, 1], [0, 0], [2, 2], [2, 2]]
    assert attention_maps.inversions(corpus, 1, 0).tolist() == [[0, 0], [0, 1], [0, 0], [0, 2], [0, 2]]


def test_misses_are_rows_off_the_gold_alignment(corpus):
    assert not attention_maps.misses(corpus, 0, 0).any()
    in_order = attention_maps.misses(
        corpus, 1, 0
    ).tolist()  # 81: ein-und-achtzig, of which only "und" is on a possible link
    assert in_order[:3] == [[0, 0], [0, 2], [0, 0]] and in_order[3][1] > in_order[3][0]


def test_the_hypotheses_have_directions_that_the_data_can_contradict(corpus):
    """The second layer aligns worse here, the encoder's layers are equal, and its entropy falls with length."""
    size = corpus.source_words.shape[1]
    short = (corpus.lengths == 1)[:, None, None, None]
    encoder = np.broadcast_to(np.where(short, 1 / size, np.eye(size)), (2, len(corpus.pairs), 1, size, size))
    allowed = np.ones((len(corpus.pairs), size, size), bool)
    changed = dataclasses.replace(
        corpus, weights=corpus.weights | {"encoder": encoder}, allowed=corpus.allowed | {"encoder": allowed}
    )
    study = attention_maps.Study(changed, (0, 0), seed=0, resamples=10)
    numbers = {each["name"]: each for each in attention_maps.hypotheses(study)}
    assert not any(ledger.holds(each) for each in numbers.values())
    assert numbers["cross-attention aligns better in its last layer"]["value"] == 1


def test_a_part_is_what_it_is_of_the_whole(corpus):
    part = attention_maps.alignment_counts(corpus.part(1, 3))
    assert (part == attention_maps.alignment_counts(corpus)[1:3]).all() and len(part) == 2


def test_an_equal_number_of_each_length_is_drawn():
    numbers = attention_maps.stratified(number_names.split().held_out, per_length=20, seed=0)
    lengths = np.bincount(number_names.english_lengths(numbers))
    assert lengths[3:].tolist() == [20] * 7 and len(set(numbers)) == len(numbers)
    assert set(numbers) <= set(number_names.split().held_out)


# The committed results ------------------------------------------------------------------------------------------------


def test_the_map_that_is_drawn_shows_the_inversion():
    """Target on rows, source on columns: the transposed map of the number would not even fit."""
    data = entry("attention_maps")["data"]
    example, (layer, head) = data["example"], data["best"]
    weights = np.asarray(example["cross"][layer][head])
    assert weights.shape == (len(example["target"]), len(example["source"]))
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=2e-3)
    gold = {target: source for source, target in example["sure"]}
    for und in (place for place, word in enumerate(example["target"]) if word == "und"):
        assert gold[und - 1] == gold[und + 1] + 1, "x-und-y translates y-x"
        assert weights[und - 1].argmax() == gold[und - 1] and weights[und + 1].argmax() == gold[und + 1]
    assert example["source_text"] == number_names.pair(example["number"]).source_text
